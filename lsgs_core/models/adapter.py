"""Any network: scored at its latent or its prediction, and as a backbone of the study."""

from collections.abc import Callable, Iterator, Sequence
from textwrap import shorten
from typing import Any, Self

import torch
from torch import Tensor, nn

from lsgs_core.batch import Batch
from lsgs_core.errors import InputError, check_count, check_shape, check_type
from lsgs_core.models.backbone import Backbone, Images, zero_absent


class _Reached(Exception):  # noqa: N818 - no error: it ends a forward pass at the latent
    """Ends a forward pass."""


def _of_a_list(model: nn.Module, images: list[Tensor]) -> Any:  # pickles, as a lambda does not
    return model(images)


class HookedModel(nn.Module):
    """Adds to any network the method `latent`, the only one that scoring needs.

    Absent modalities are replaced before the network receives them. The first forward pass for a
    latent is complete, which counts the calls of the module; the others end at its last call, so
    that a decoder after it costs nothing.

    Args:
        model: Any network.
        module: Name of the module whose output is the latent, as in `model.named_modules()`.
        call: Function that calls the network with a list of M tensors [B, D_m, H, W]; the default
            is `model(images)`.
        calls: How often the module runs in a forward pass, such as M times for an encoder that all
            modalities share. The outputs are concatenated along the channels.
        absent: What stands for an absent modality: M tensors [D_m] with a value per band, such as
            a mean; an `nn.Parameter` is a token that training learns. None is zero.
        low_rank: Names of the layers that `add_lora` adapts.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 1))
        >>> hooked = HookedModel(network, "1", lambda net, images: net(torch.cat(images, dim=1)))
        >>> images = [torch.ones(2, 3, 8, 8), torch.ones(2, 1, 8, 8)]
        >>> hooked.latent(images, torch.tensor([[True, False]] * 2)).shape
        torch.Size([2, 8, 6, 6])
    """

    def __init__(
        self,
        model: nn.Module,
        module: str,
        call: Callable[[nn.Module, list[Tensor]], Any] = _of_a_list,
        calls: int = 1,
        absent: Sequence[Tensor] | None = None,
        low_rank: Sequence[str] = (),
    ) -> None:
        super().__init__()
        check_type("model", model, nn.Module)
        check_type("call", call, Callable)
        check_count("calls", calls)
        self.model, self.call, self.calls, self._module = model, call, calls, module
        self._counted = False
        # A module that is shared has several names, and each of them is right.
        names = [name for name, _ in model.named_modules(remove_duplicate=False)]
        check_type("low_rank", low_rank, list, tuple)
        for field, name in (("module", module), *(("low_rank", name) for name in low_rank)):
            if not isinstance(name, str) or name not in names:
                raise InputError.of(field, f"one of {names[1:20]}", name)
        self._low_rank = tuple(low_rank)
        check_type("absent", absent, list, tuple, nn.ParameterList, type(None))
        self._filled = len(absent or ())  # number of modalities, where they have values
        for index, value in enumerate(absent or ()):
            check_type("absent", value, Tensor)
            check_shape("absent", value, [None])
            kept = value if isinstance(value, nn.Parameter) else nn.Buffer(value.clone())
            setattr(self, f"absent{index}", kept)

    def latent(self, images: Sequence[Tensor], available: Tensor) -> Tensor:
        """Return the output of the hooked module, [B, C, ...].

        Raises:
            InputError: The module runs more or less often than `calls` says, or its outputs are no
                tensors, or cannot be concatenated.
        """
        outputs: list[Tensor] = []

        def read(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                expected, found = f"{self._module!r} to return a tensor", type(output).__name__
                raise InputError(f"module: expected {expected}, found {found}")
            outputs.append(output)
            if self._counted and len(outputs) == self.calls:
                raise _Reached
            outputs[-1] = output.clone()  # a later layer may work in place

        handle = self.model.get_submodule(self._module).register_forward_hook(read)
        try:
            self(images, available)
        except _Reached:
            pass
        finally:
            handle.remove()
        if len(outputs) != self.calls:
            expected = f"{self._module!r} to run {self.calls} times in a forward pass"
            raise InputError(f"calls: expected {expected}, found {len(outputs)}")
        self._counted = True
        if len({(output.ndim, output.shape[:1], output.shape[2:]) for output in outputs}) > 1:
            shapes = [list(output.shape) for output in outputs]
            raise InputError(f"module: expected outputs that differ in channels, found {shapes}")
        return outputs[0] if self.calls == 1 else torch.cat(outputs, dim=1)

    def forward(self, images: Sequence[Tensor], available: Tensor) -> Any:
        """Return the network's output for the available modalities."""
        check_type("images", images, Sequence)
        if self._filled not in (0, len(images)):
            raise InputError(f"absent: expected {len(images)} tensors, found {self._filled}")
        blanked = []
        for index, image in enumerate(Batch(tuple(images), available).images):
            value = getattr(self, f"absent{index}", image.new_zeros(image.shape[1])).to(image.dtype)
            check_shape(f"absent modality {index}", value, [image.shape[1]])
            there = available[:, index, None, None, None]
            blanked.append(torch.where(there, image, value[:, None, None]))
        try:
            return self.call(self.model, blanked)
        except (TypeError, AttributeError) as error:
            expected = "a function that calls the network with a list of tensors, one per modality"
            raise InputError(f"call: expected {expected}: {shorten(str(error), 200)}") from error

    def low_rank_layers(self) -> dict[str, nn.Module]:
        """Return the layers that low-rank adaptation changes, by their name in the network."""
        return {name: self.model.get_submodule(name) for name in self._low_rank}


class PredictionModel(nn.Module):
    """Makes scoring compare predictions: the latent of this module is what the network predicts.

    The distortion d_k(x) is then the mean over classes and pixels of the squared difference of the
    probabilities predicted under scenario k and under the full one. It costs a decoder for each
    scenario, and the whole network where that is no `Backbone`. It differs less between networks
    that were pretrained with other random seeds.

    Args:
        model: Network whose `forward(images, available)` returns logits [B, C, H, W].
        exclusive: True where a pixel has exactly one class (softmax), False where each class is
            predicted by itself (sigmoid).
    """

    def __init__(self, model: nn.Module, exclusive: bool = False) -> None:
        super().__init__()
        check_type("model", model, nn.Module)
        check_type("exclusive", exclusive, bool)
        self.model, self.exclusive = model, exclusive

    def latent(self, images: Sequence[Tensor], available: Tensor) -> Tensor:
        """Return the predicted probabilities, [B, C, H, W]."""
        return self._probabilities(self.model(images, available))

    def each_latent(self, images: Sequence[Tensor], masks: Tensor) -> Iterator[Tensor]:
        """Yield the predicted probabilities under each of K scenarios, masks bool [K, M].

        A backbone computes once what its scenarios have in common; any other network runs whole.
        """
        if isinstance(self.model, Backbone):
            yield from map(self._probabilities, self.model.scenario_logits(images, masks))
        else:
            for mask in masks:
                yield self.latent(images, mask.expand(len(images[0]), -1))

    def _probabilities(self, logits: Any) -> Tensor:
        check_type("logits", logits, Tensor)
        if self.exclusive and logits.shape[1:2] == (1,):  # its probability would always be 1
            raise InputError("exclusive: expected False for a single class")
        return logits.softmax(dim=1) if self.exclusive else logits.sigmoid()

    def for_scoring(self) -> "PredictionModel":
        """Return a copy around the faster copy of a backbone; any other network is taken itself."""
        faster = getattr(self.model, "for_scoring", lambda: self.model)()
        return PredictionModel(faster, self.exclusive)


class AdaptedBackbone(Backbone):
    """A backbone of any network with methods `forward` and `latent` of images and availability.

    Other arguments are those of `Backbone`.

    Args:
        network: Returns logits [B, classes, H, W] and a latent [B, C, ...], such as `HookedModel`.
            Its method `low_rank_layers`, if it has one, names what `add_lora` adapts. M networks
            see one modality each; the results are means over those that are available.
    """

    head_count = 1

    def __init__(
        self, network: nn.Module | Sequence[nn.Module], bands: Sequence[int], classes: int
    ) -> None:
        super().__init__(bands, classes)
        networks = [network] if isinstance(network, nn.Module) else network
        check_type("network", networks, list, tuple)
        for one in networks:
            check_type("network", one, nn.Module)
            if not hasattr(one, "latent") or next(one.parameters(), None) is None:
                raise InputError("network: expected parameters and a method `latent`")
        if len(networks) not in (1, len(bands)):
            raise InputError(f"network: expected 1 or {len(bands)}, found {len(networks)}")
        self.networks = nn.ModuleList(networks)

    def heads(self, images: Images, available: Tensor) -> Tensor:
        """Return the logits of the only head, [B, 1, classes, H, W]."""
        patches = self.check(images, available)
        logits = self._called("__call__", patches, available)
        size = patches[0].shape[2:]
        check_shape("logits of the network", logits, [len(available), self.classes, *size])
        return logits[:, None]

    def latent(self, images: Images, available: Tensor) -> Tensor:
        """Return the latent of the network, [B, C, ...]."""
        return self._called("latent", self.check(images, available), available)

    def _called(self, method: str, patches: list[Tensor], available: Tensor) -> Tensor:
        """Return the mean of what the networks that see a modality return."""
        seen = [[patch] for patch in patches] if len(self.networks) > 1 else [patches]
        columns = available.chunk(len(seen), dim=1)
        parts: list[Tensor] = []
        for network, images, there in zip(self.networks, seen, columns, strict=True):
            field = f"result of the network's {method.replace('__call__', 'forward')}"
            try:
                found = getattr(network, method)(images, there)
            except TypeError as error:
                expected = f"one for images and availability: {shorten(str(error), 200)}"
                raise InputError(f"{field}: expected {expected}") from error
            check_type(field, found, Tensor)
            if not found.is_floating_point() or found.ndim < 2:
                expected = "floating-point numbers [B, C, ...]"
                form = f"{found.dtype} {list(found.shape)}"
                raise InputError(f"{field}: expected {expected}, found {form}")
            parts.append(found)
            check_shape(field, found, [len(available), *parts[0].shape[1:]])
        used = torch.stack([there.any(dim=1) for there in columns], dim=1)
        total = zero_absent(torch.stack(parts, dim=1), used).sum(dim=1)
        return total / used.sum(dim=1).view(-1, *(1,) * (total.ndim - 1))

    def for_scoring(self) -> Self:
        """Return itself: with folded layers, a hook could read something else."""
        return self

    def low_rank_layers(self) -> dict[str, nn.Module]:
        """Return the layers that the networks name, by their name in this model."""
        layers = [x for n in self.networks for x in getattr(n, "low_rank_layers", dict)().values()]
        return {name: module for name, module in self.named_modules() if module in layers}
