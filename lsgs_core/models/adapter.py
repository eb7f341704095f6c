"""Scoring of any network: what is compared is the output of a module of it, or its prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lsgs_core.errors import InputError, check_count, check_shape, check_type, shown
from lsgs_core.models.backbone import zero_absent


class _Reached(Exception):  # noqa: N818 - no error: it ends a forward pass at the latent
    """Ends a forward pass."""


class HookedModel(nn.Module):
    """Adds to any network the method `latent`, the only one that scoring needs.

    Absent modalities are set to zero before the network receives them. The first forward pass is
    complete, which counts the calls of the module; the others end at its last call, so that a
    decoder after it costs nothing.

    Args:
        model: Any network.
        module: Name of the module whose output is the latent, as in `model.named_modules()`.
        call: Function that calls the network with a list of M tensors [B, D_m, H, W]; the default
            is `model(images)`.
        calls: How often the module runs in a forward pass, such as M times for an encoder that all
            modalities share. The outputs are concatenated along the channels.

    Raises:
        InputError: The network has no such module, or `calls` is no positive integer.

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
        call: Callable[[nn.Module, list[Tensor]], Any] = lambda model, images: model(images),
        calls: int = 1,
    ) -> None:
        super().__init__()
        check_type("model", model, nn.Module)
        check_type("call", call, Callable)
        check_count("calls", calls)
        self.model, self.call, self.calls, self._module = model, call, calls, module
        self._counted = False
        # A module that is shared has several names, and each of them is right.
        names = [name for name, _ in model.named_modules(remove_duplicate=False)]
        if not isinstance(module, str) or module not in names:
            raise InputError(f"module: expected one of {names[1:20]}, found {shown(module)}")

    def latent(self, images: Sequence[Tensor], available: Tensor) -> Tensor:
        """Return the output of the hooked module, [B, C, ...], with absent modalities at zero.

        Args:
            images: M tensors [B, D_m, H, W].
            available: bool [B, M].

        Raises:
            InputError: The module runs more or less often than `calls` says, or its outputs are no
                tensors, or cannot be concatenated.
        """
        outputs: list[Tensor] = []

        def read(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise InputError(
                    f"module: expected {self._module!r} to return a tensor, found "
                    f"{type(output).__name__}"
                )
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
            raise InputError(
                f"calls: expected {self._module!r} to run {self.calls} times in a forward pass, "
                f"found {len(outputs)}"
            )
        self._counted = True
        if len({(output.ndim, output.shape[:1], output.shape[2:]) for output in outputs}) > 1:
            shapes = [list(output.shape) for output in outputs]
            raise InputError(f"module: expected outputs that differ in channels, found {shapes}")
        return outputs[0] if self.calls == 1 else torch.cat(outputs, dim=1)

    def forward(self, images: Sequence[Tensor], available: Tensor) -> Any:
        """Return the network's output for the available modalities."""
        check_type("images", images, Sequence)
        for image in images:
            check_type("images", image, Tensor)
            check_shape("images", image, [len(images[0]), None, None, None])
        check_type("available", available, Tensor)
        check_shape("available", available, [len(images[0]) if images else 0, len(images)])
        if available.dtype != torch.bool:
            raise InputError(f"available: expected torch.bool, found {available.dtype}")
        pairs = zip(images, available.unbind(dim=1), strict=True)
        return self.call(self.model, [zero_absent(*pair) for pair in pairs])


class PredictionModel(nn.Module):
    """Makes scoring compare predictions: the latent of this module is what the network predicts.

    The distortion d_k(x) is then the mean over classes and pixels of the squared difference of the
    probabilities predicted under scenario k and under the full one. It costs a decoder for each
    scenario, and differs less between networks that were pretrained with other random seeds.

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
        logits = self.model(images, available)
        check_type("logits", logits, Tensor)
        return logits.softmax(dim=1) if self.exclusive else logits.sigmoid()

    def for_scoring(self) -> PredictionModel:
        """Return a copy around the faster copy of a backbone; any other network is taken itself."""
        model: Any = self.model
        faster = model.for_scoring() if hasattr(model, "for_scoring") else model
        return PredictionModel(faster, self.exclusive)
