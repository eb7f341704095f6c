"""Scoring of any network: its latent is the output of one of its modules, read by a hook."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from lsgs_core.errors import InputError
from lsgs_core.models.backbone import zero_absent


class _Reached(Exception):  # noqa: N818 - no error: it ends a forward pass at the latent
    """Carries the latent out of a forward pass."""


class HookedModel(nn.Module):
    """Adds to any network the method `latent`, the only one that scoring needs.

    Absent modalities are set to zero before the network receives them. The forward pass ends at the
    hooked module, so that a decoder after it costs nothing.

    Args:
        model: Any network.
        module: Name of the module whose output is the latent, as in `model.named_modules()`.
        call: Function that calls the network with a list of M tensors [B, D_m, H, W]; the default
            is `model(images)`.

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

    def __init__(
        self,
        model: nn.Module,
        module: str,
        call: Callable[[nn.Module, list[Tensor]], Any] = lambda model, images: model(images),
    ) -> None:
        super().__init__()
        self.model, self.call, self._module = model, call, module
        names = [name for name, _ in model.named_modules()]
        if module not in names:
            raise InputError(f"module: expected one of {names[1:20]}, found {module!r}")

    def latent(self, images: Sequence[Tensor], available: Tensor) -> Tensor:
        """Return the output of the hooked module, [B, C, ...], with absent modalities at zero.

        Args:
            images: M tensors [B, D_m, H, W].
            available: bool [B, M].

        Raises:
            InputError: The forward pass does not reach the module, or its output is no tensor.
        """

        def read(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise InputError(
                    f"module: expected {self._module!r} to return a tensor, found "
                    f"{type(output).__name__}"
                )
            raise _Reached(output)

        handle = self.model.get_submodule(self._module).register_forward_hook(read)
        try:
            self(images, available)
        except _Reached as reached:
            return reached.args[0]
        finally:
            handle.remove()
        raise InputError(f"module: the forward pass does not reach {self._module!r}")

    def forward(self, images: Sequence[Tensor], available: Tensor) -> Any:
        """Return the network's output for the available modalities."""
        pairs = zip(images, available.unbind(dim=1), strict=True)
        return self.call(self.model, [zero_absent(*pair) for pair in pairs])
