"""A batch of patches: what networks, losses, scoring and evaluation take."""

from dataclasses import dataclass, replace
from typing import Self

import torch


@dataclass(frozen=True)
class Batch:
    """B patches with M modalities of D_m bands each.

    Attributes:
        images: M tensors [B, D_m, H, W] float32, normalised; 0 where a modality has no data.
        available: [B, M] bool, whether a modality has data in the patch.
        target: binary [B, 1, H, W] float32, multilabel [B, C, H, W] float32, both 0 or 1;
            multiclass [B, H, W] int64, the index of the class. 0 where `valid` is False.
        valid: [B, H, W] bool, the pixels that have a label; see `counted`.
        patch_ids: [B] int64, as in the patch table.
        block_ids: [B] int64, the spatial block of each patch.
        seen: [B, M, H, W] bool, the pixels that each modality sees; None: available ones see all.
    """

    images: tuple[torch.Tensor, ...]
    available: torch.Tensor
    target: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    patch_ids: torch.Tensor | None = None
    block_ids: torch.Tensor | None = None
    seen: torch.Tensor | None = None

    def counted(self, present: torch.Tensor) -> torch.Tensor:
        """Return the pixels that loss and metrics count, [B, H, W] bool.

        They have a label, and a modality that is present sees them: what clouds hide from all of
        these is nobody's mistake.

        Args:
            present: [B, M] bool, the modalities that the network is given.
        """
        assert self.valid is not None
        if self.seen is None:
            return self.valid & present.any(dim=1)[:, None, None]
        return self.valid & (self.seen & present[:, :, None, None]).any(dim=1)

    @property
    def complete(self) -> torch.Tensor:
        """Return the patches in which all modalities see the same pixels, [B] bool."""
        whole = self.available.all(dim=1)
        if self.seen is None:
            return whole
        return whole & (self.seen.all(dim=1) == self.seen.any(dim=1)).flatten(1).all(dim=1)

    def to(self, device: torch.device | str) -> Self:
        """Return the batch with all its tensors on `device`."""
        tensors = {n: t.to(device) for n, t in vars(self).items() if isinstance(t, torch.Tensor)}
        return replace(self, images=tuple(image.to(device) for image in self.images), **tensors)
