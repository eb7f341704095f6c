"""LoRA: low-rank adaptation of a frozen network (Hu et al. 2021), the paper's second baseline.

W becomes W + B A, with `rank` rows in A, B at zero in the beginning and no scaling factor, in the
layers that a backbone names in `low_rank_layers()`. All other parameters are frozen.
"""

import math

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lsgs_core.errors import InputError, check_count, check_type
from lsgs_core.models.backbone import Backbone


class LowRankUpdate(nn.Module):
    """Adds a product of two small matrices to a weight [out, in, ...].

    Trailing kernel axes count as inputs, and the shape of the weight limits the rank.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        outputs, inputs = weight.shape[0], weight[0].numel()
        rank = min(rank, outputs, inputs)
        self.a = nn.Parameter(weight.new_empty(rank, inputs))
        self.b = nn.Parameter(weight.new_zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the adapted weight, which has the same shape."""
        return weight + (self.b @ self.a).view_as(weight)


def add_lora(model: Backbone, rank: int = 4) -> int:
    """Freeze a backbone, add low-rank updates, and return the number of trained parameters.

    The backbone is changed in place; its outputs stay the same until training begins. The paper's
    rank is 4.

    Raises:
        InputError: The rank is below 1, the model already has low-rank updates, or it names no
            layer, or one that is neither linear nor convolutional.
    """
    check_type("model", model, Backbone)
    check_count("rank", rank)
    layers = model.low_rank_layers()
    kinds = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d
    if not layers or not all(isinstance(layer, kinds) for layer in layers.values()):
        raise InputError.of("low_rank_layers", "linear or convolutional layers", layers)
    if any(parametrize.is_parametrized(layer) for layer in layers.values()):
        raise InputError("model: expected one without low-rank updates, found one that has them")
    model.requires_grad_(False)
    for layer in layers.values():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        parametrize.register_parametrization(layer, "weight", LowRankUpdate(weight, rank))
    return trained_parameters(model)


def merge_lora(model: Backbone) -> None:
    """Add the updates to the weights, so that the model is an ordinary backbone again."""
    check_type("model", model, Backbone)
    for layer in model.low_rank_layers().values():
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    model.requires_grad_(True)


def trained_parameters(model: nn.Module) -> int:
    """Return the number of parameters that training changes."""
    check_type("model", model, nn.Module)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def training_mode(model: nn.Module) -> None:
    """Set the training mode, except in batch normalisation with frozen parameters.

    Moving running statistics would change a frozen network.
    """
    check_type("model", model, nn.Module)
    model.train()
    for module in model.modules():
        parameters = [*module.parameters()]
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and parameters:
            module.train(any(parameter.requires_grad for parameter in parameters))
