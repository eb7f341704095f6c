"""A batch of patches: the input of networks, losses, scoring and evaluation."""

from dataclasses import dataclass, replace
from typing import Self

import torch

from lsgs_core.errors import InputError, check_shape, check_type


@dataclass(frozen=True)
class Batch:
    """B patches with M modalities of D_m bands each.

    Attributes:
        images: M tensors [B, D_m, H, W] float32, normalised; 0 where a modality has no data.
        available: bool [B, M], True where a modality has data in the patch.
        target: Binary or multilabel [B, C, H, W] float32 of 0 and 1 (C is 1 in the binary case), or
            the class indices of a multiclass task, [B, H, W] int64. It is 0 where `valid` is False.
        valid: bool [B, H, W], True for pixels that have a label; see also `counted`.
        patch_ids: int64 [B], identifiers of the patches in the patch table.
        block_ids: int64 [B], the spatial block of each patch.
        seen: bool [B, M, H, W], True for pixels that a modality observes. None means that an
            available modality observes every pixel.
    """

    images: tuple[torch.Tensor, ...]
    available: torch.Tensor
    target: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    patch_ids: torch.Tensor | None = None
    block_ids: torch.Tensor | None = None
    seen: torch.Tensor | None = None

    def __post_init__(self) -> None:
        check_type("images", self.images, tuple)
        for image in self.images:
            if not isinstance(image, torch.Tensor) or image.ndim != 4:
                raise InputError.of("images", "tensors [B, D_m, H, W]", image)
            check_shape("images", image, [len(self.images[0]), None, None, None])
        count = len(self.images[0]) if self.images else None
        size = list(self.images[0].shape[2:]) if self.images else [None, None]
        shapes = {
            "available": [count, len(self.images)],
            "valid": [count, *size],
            "patch_ids": [count],
            "block_ids": [count],
            "seen": [count, len(self.images), *size],
        }
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value is None and name != "available":
                continue
            check_type(name, value, torch.Tensor)
            check_shape(name, value, shape)
            whole, ids = not (value.is_floating_point() or value.is_complex()), name.endswith("ids")
            if (value.dtype == torch.bool) == ids or not whole:
                expected = "integers" if ids else "torch.bool"
                raise InputError(f"{name}: expected {expected}, found {value.dtype}")
        if self.target is not None:
            check_type("target", self.target, torch.Tensor)
            classes = [None] if self.target.ndim == 4 else []
            check_shape("target", self.target, [count, *classes, *size])

    def counted(self, present: torch.Tensor) -> torch.Tensor:
        """Return the pixels that count in losses and metrics, bool [B, H, W].

        These have a label and are observed by at least one modality that the network receives
        (`present`, bool [B, M]): no network can be blamed for a pixel that clouds hide from all its
        inputs. Without `valid`, or where `present` has another form, `InputError` is raised.
        """
        check_type("valid", self.valid, torch.Tensor)
        check_type("present", present, torch.Tensor)
        check_shape("present", present, self.available.shape)
        if present.dtype != torch.bool:
            raise InputError(f"present: expected torch.bool, found {present.dtype}")
        assert self.valid is not None  # for mypy
        if self.seen is None:
            return self.valid & present.any(dim=1)[:, None, None]
        return self.valid & (self.seen & present[:, :, None, None]).any(dim=1)

    @property
    def complete(self) -> torch.Tensor:
        """Return the patches in which all modalities observe the same pixels, bool [B]."""
        complete = self.available.all(dim=1)
        if self.seen is not None:
            complete &= (self.seen.all(dim=1) == self.seen.any(dim=1)).flatten(1).all(dim=1)
        return complete

    def to(self, device: torch.device | str) -> Self:
        """Return the batch with all its tensors on `device`."""
        tensors = {n: t.to(device) for n, t in vars(self).items() if isinstance(t, torch.Tensor)}
        return replace(self, images=tuple(image.to(device) for image in self.images), **tensors)
