"""A batch of patches: the input of networks, losses, scoring and evaluation."""

from dataclasses import dataclass, replace
from typing import Self

import torch


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

    def counted(self, present: torch.Tensor) -> torch.Tensor:
        """Return the pixels that count in losses and metrics, bool [B, H, W].

        These have a label and are observed by at least one modality that the network receives: no
        network can be blamed for a pixel that clouds hide from all its inputs.

        Args:
            present: bool [B, M], the modalities that the network receives.
        """
        assert self.valid is not None
        if self.seen is None:
            return self.valid & present.any(dim=1)[:, None, None]
        return self.valid & (self.seen & present[:, :, None, None]).any(dim=1)

    @property
    def complete(self) -> torch.Tensor:
        """Return the patches in which all modalities observe the same pixels, bool [B]."""
        all_available = self.available.all(dim=1)
        if self.seen is None:
            return all_available
        return all_available & (self.seen.all(dim=1) == self.seen.any(dim=1)).flatten(1).all(dim=1)

    def to(self, device: torch.device | str) -> Self:
        """Return the batch with all its tensors on `device`."""
        tensors = {n: t.to(device) for n, t in vars(self).items() if isinstance(t, torch.Tensor)}
        return replace(self, images=tuple(image.to(device) for image in self.images), **tensors)
