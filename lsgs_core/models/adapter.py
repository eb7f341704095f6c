"""Scoring of a network that is not ours: its latent is the output of a module, read by a hook."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from lsgs_core.errors import InputError
from lsgs_core.models.backbone import zero_absent

Call = Callable[[nn.Module, list[Tensor]], Any]


class _Read(Exception):  # noqa: N818 - not an error: it ends a forward pass early
    """Carries the latent out of a forward pass, whose rest is not needed."""

    def __init__(self, latent: Tensor) -> None:
        self.latent = latent


def _as_list(model: nn.Module, images: list[Tensor]) -> Any:
    return model(images)


class HookedModel(nn.Module):
    """Gives any network the method `latent`, which is all that scoring asks for.

    Absent modalities are set to zero before the network sees them. The forward pass ends at the
    hooked module, so a decoder after it costs nothing.

    Args:
        model: Any network.
        module: Name of the module whose output is the latent, as in `model.named_modules()`.
        call: How the network is called with a list of M tensors [B, D_m, H, W]; by default
            `model(images)`.

    Raises:
        InputError: The network has no such module.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 1))
        >>> hooked = HookedModel(network, "1", lambda net, images: net(torch.cat(images, dim=1)))
        >>> images = [torch.ones(2, 3, 8, 8), torch.ones(2, 1, 8, 8)]
        >>> hooked.latent(images, torch.tensor([[True, False]] * 2)).shape
        torch.Size([2, 8, 6, 6])
    """

    def __init__(self, model: nn.Module, module: str, call: Call = _as_list) -> None:
        super().__init__()
        self.model, self.call = model, call
        known = dict(model.named_modules())
        if module not in known:
            raise InputError(f"module: {module!r} is unknown; the model has {list(known)[1:20]}")
        self._hooked = module

    def latent(self, images: Sequence[Tensor], available: Tensor) -> Tensor:
        """The output of the hooked module, [B, C, ...], with absent modalities set to zero.

        Args:
            images: M tensors [B, D_m, H, W].
            available: bool [B, M].

        Raises:
            InputError: The forward pass does not reach the module, or its output is no tensor.
        """

        def read(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise InputError(f"module: {self._hooked!r} gives a {type(output).__name__}")
            raise _Read(output)

        seen = [zero_absent(i, a) for i, a in zip(images, available.unbind(dim=1), strict=True)]
        handle = self.model.get_submodule(self._hooked).register_forward_hook(read)
        try:
            self.call(self.model, seen)
        except _Read as found:
            return found.latent
        finally:
            handle.remove()
        raise InputError(f"module: the forward pass does not reach {self._hooked!r}")

    def forward(self, images: Sequence[Tensor], available: Tensor) -> Any:
        """What the network makes of the modalities that are there."""
        seen = [zero_absent(i, a) for i, a in zip(images, available.unbind(dim=1), strict=True)]
        return self.call(self.model, seen)
