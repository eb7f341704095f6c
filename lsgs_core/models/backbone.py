"""What every backbone has in common: its public face and the checks on its input."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lsgs_core.errors import InputError

Images = Tensor | Sequence[Tensor]


class Backbone(nn.Module, ABC):
    """A segmentation network for M modalities of which any non-empty subset may be available.

    `images` is a sequence of M tensors of shape [B, D_m, H, W] or, when every modality has D
    bands, one tensor [B, M, D, H, W]; its floating dtype is that of the model. `available` is
    bool [B, M] with at least one True per sample. Everything else raises `InputError`. The pixels
    of an absent modality have no influence on the output in eval mode.

    Args:
        bands: Number of bands D_m of each of the M >= 2 modalities.
        classes: Number of classes, 1 for a binary mask.

    Raises:
        InputError: For fewer than two modalities, a modality without bands or no class.
    """

    head_count = 3  # the paper's three heads for the same mask

    def __init__(self, bands: Sequence[int], classes: int) -> None:
        super().__init__()
        if len(bands) < 2 or min(bands) < 1:
            raise InputError(f"bands is {tuple(bands)}; expected two or more counts of at least 1")
        if classes < 1:
            raise InputError(f"classes is {classes}; expected at least 1")
        self.bands = tuple(bands)
        self.classes = classes
        self.configuration: dict[str, Any] = {}  # filled by `build_backbone`

    def forward(self, images: Images, available: Tensor) -> Tensor:
        """Return the logits of head 0, [B, classes, H, W]."""
        return self.heads(images, available)[:, 0]

    @abstractmethod
    def heads(self, images: Images, available: Tensor) -> Tensor:
        """Return the logits of all heads, [B, heads, classes, H, W]."""

    @abstractmethod
    def latent(self, images: Images, available: Tensor) -> Tensor:
        """Return the latent [B, C, ...] where distortion is measured; the decoder does not run."""

    @abstractmethod
    def low_rank_layers(self) -> dict[str, nn.Module]:
        """Return the layers that low-rank adaptation changes, by their name in the model."""

    def scenario_latents(self, images: Images, masks: Tensor) -> Tensor:
        """Return the latents of the same images under K scenarios.

        Args:
            images: As for `forward`.
            masks: Bool [K, M], the modalities available in each scenario.

        Returns:
            Latents [K, B, C, ...]. Distortion wants them from a model in eval mode.

        Raises:
            InputError: For images or masks of another shape or dtype, or an empty scenario.
        """
        patches = self.check_images(images)
        self.check_masks(masks, "masks")
        batch = len(patches[0])
        return torch.stack([self.latent(patches, mask.expand(batch, -1)) for mask in masks])

    def check(self, images: Images, available: Tensor) -> list[Tensor]:
        """Return the images as M tensors [B, D_m, H, W], or raise `InputError`."""
        patches = self.check_images(images)
        self.check_masks(available, "available", rows=len(patches[0]))
        return patches

    def check_images(self, images: Images) -> list[Tensor]:
        """Return the images as M tensors [B, D_m, H, W], or raise `InputError`."""
        if isinstance(images, Tensor):
            if images.ndim != 5:
                raise InputError(f"images: found shape {list(images.shape)}, not [B, M, D, H, W]")
            patches = list(images.unbind(1))
        else:
            patches = list(images)
        if len(patches) != len(self.bands):
            raise InputError(f"images: found {len(patches)} modalities, not {len(self.bands)}")
        dtype = next(self.parameters()).dtype
        batch, _, height, width = patches[0].shape if patches[0].ndim == 4 else (0, 0, 0, 0)
        for index, (patch, count) in enumerate(zip(patches, self.bands, strict=True)):
            expected = [batch, count, height, width]
            if list(patch.shape) != expected or 0 in expected:
                raise InputError(
                    f"images of modality {index}: found shape {list(patch.shape)}; expected "
                    f"[B, {count}, H, W] with B, H, W above 0 and the same for every modality"
                )
            if patch.dtype != dtype:
                raise InputError(
                    f"images of modality {index}: found {patch.dtype}, not the model's {dtype}"
                )
        return patches

    def check_masks(self, masks: Tensor, field: str, rows: int | None = None) -> None:
        """Raise `InputError` unless `masks` is bool [rows, M] with a True in every row."""
        wanted = "K" if rows is None else rows
        right = masks.ndim == 2 and len(masks) == (rows or len(masks)) and len(masks) > 0
        if not right or masks.shape[1] != len(self.bands) or masks.dtype != torch.bool:
            raise InputError(
                f"{field}: found {masks.dtype} of shape {list(masks.shape)}; "
                f"expected torch.bool of shape [{wanted}, {len(self.bands)}]"
            )
        if not bool(masks.any(dim=1).all()):
            raise InputError(f"{field}: a row has no modality; expected at least one in each")
