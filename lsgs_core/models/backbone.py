"""What every backbone has in common: its public face and the checks on its input."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lsgs_core.errors import InputError

Images = Tensor | Sequence[Tensor]


def zero_absent(features: Tensor, available: Tensor) -> Tensor:
    """Zero features [B, ...] or [B, M, ...] where `available`, [B] or [B, M], is False.

    A fill and no product, so that what is absent may hold anything.
    """
    added = (None,) * (features.ndim - available.ndim)
    return features.masked_fill(~available[(..., *added)], 0.0)


class Backbone(nn.Module, ABC):
    """A segmentation network for M modalities of which any non-empty subset may be available.

    `images` is a sequence of M tensors of shape [B, D_m, H, W] or, when every modality has D
    bands, one tensor [B, M, D, H, W]; its floating dtype is that of the model. `available` is
    bool [B, M] with at least one True per sample. Everything else raises `InputError`. The pixels
    of an absent modality have no influence on the output in eval mode.

    Args:
        bands: Number of bands D_m of each of the M >= 2 modalities.
        classes: Number of classes, 1 for a binary mask.
        settings: Sizes, a dataclass of the backbone's own.

    Raises:
        InputError: For fewer than two modalities, a modality without bands or no class.
    """

    head_count = 3  # the paper's three heads for the same mask

    def __init__(self, bands: Sequence[int], classes: int, settings: Any = None) -> None:
        super().__init__()
        self.settings = settings
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

    def scenario_latents(self, images: Images, masks: Tensor) -> Tensor:
        """Return the latents [K, B, C, ...] of the same images under K scenarios.

        They are those of `latent`, by a loop; a backbone may compute once what scenarios share. The
        masks are bool [K, M], the modalities available in each. Distortion wants eval mode.
        """
        patches = self.check(images, masks, scenarios=True)
        batch = len(patches[0])
        return torch.stack([self.latent(patches, mask.expand(batch, -1)) for mask in masks])

    def for_scoring(self) -> Self:
        """Return a copy in eval mode that is faster at it, and not to be trained or saved.

        Batch normalisation is folded into the convolution before it, and weights lie in the order
        in which a CPU reads them; the results are the same up to rounding.
        """
        folded = copy.deepcopy(self).eval()
        for module in [*folded.modules()]:
            if isinstance(module, nn.Sequential):
                for (index, conv), (after, norm) in pairwise([*module.named_children()]):
                    if (
                        isinstance(conv, nn.Conv2d)
                        and isinstance(norm, nn.BatchNorm2d)
                        and not parametrize.is_parametrized(conv)
                    ):
                        module.register_module(index, fuse_conv_bn_eval(conv, norm))
                        module.register_module(after, nn.Identity())
        for module in folded.modules():
            if isinstance(module, nn.Conv2d) and not parametrize.is_parametrized(module):
                weight = module.weight.data.contiguous(memory_format=torch.channels_last)
                module.weight.data = weight
        return folded

    @abstractmethod
    def low_rank_layers(self) -> dict[str, nn.Module]:
        """Return the layers that low-rank adaptation changes, by their name in the model."""

    def check(self, images: Images, masks: Tensor, scenarios: bool = False) -> list[Tensor]:
        """Return the images as M tensors [B, D_m, H, W]; masks are [B, M] or of K scenarios [K, M].

        Raises:
            InputError: For images or masks of another shape or dtype, or an empty row.
        """
        if isinstance(images, Tensor) and images.ndim != 5:
            raise InputError(f"images: found shape {list(images.shape)}, not [B, M, D, H, W]")
        patches = list(images.unbind(1) if isinstance(images, Tensor) else images)
        count, dtype = len(self.bands), next(self.parameters()).dtype
        if len(patches) != count:
            raise InputError(f"images: found {len(patches)} modalities, not {count}")
        batch, _, height, width = patches[0].shape if patches[0].ndim == 4 else (0, 0, 0, 0)
        for index, (patch, bands) in enumerate(zip(patches, self.bands, strict=True)):
            shape, expected = list(patch.shape), [batch, bands, height, width]
            if shape != expected or 0 in expected or patch.dtype != dtype:
                raise InputError(
                    f"images of modality {index}: found shape {shape} of {patch.dtype}; expected "
                    f"[B, {bands}, H, W] of the model's {dtype}, with B, H, W above 0 and the "
                    "same for every modality"
                )
        field, rows = ("masks", "K") if scenarios else ("available", batch)
        right = masks.ndim == 2 and len(masks) > 0 and (scenarios or len(masks) == batch)
        if not right or masks.shape[1] != count or masks.dtype != torch.bool:
            raise InputError(
                f"{field}: found {masks.dtype} of shape {list(masks.shape)}; "
                f"expected torch.bool of shape [{rows}, {count}]"
            )
        if not bool(masks.any(dim=1).all()):
            raise InputError(f"{field}: a row has no modality; expected at least one in each")
        return patches
