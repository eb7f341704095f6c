"""What all backbones have in common: their interface and the checks of their input."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lsgs_core.errors import InputError, check_count, check_shape, check_type
from lsgs_core.scenarios import LARGEST_MODALITY_COUNT

Images = Tensor | Sequence[Tensor]


def zero_absent(features: Tensor, available: Tensor) -> Tensor:
    """Zero features [B, ...] or [B, M, ...] where `available`, [B] or [B, M], is False.

    They are filled and not multiplied, so that absent features may hold anything, such as NaN.
    """
    added = (None,) * (features.ndim - available.ndim)
    return features.masked_fill(~available[(..., *added)], 0.0)


class Backbone(nn.Module, ABC):
    """A segmentation network for M modalities, of which any non-empty subset may be available.

    `images` are M tensors of shape [B, D_m, H, W] or, when every modality has D bands, one tensor
    [B, M, D, H, W], in the floating dtype of the model. `available` is bool [B, M] with at least
    one True per sample. In evaluation mode, the pixels of an absent modality do not influence the
    output.

    Args:
        bands: Number of bands D_m of each of the M >= 2 modalities.
        classes: Number of classes, 1 for a binary mask.
        settings: Dataclass with the sizes of the backbone.
    """

    head_count = 3  # the paper has three heads for the same mask

    def __init__(self, bands: Sequence[int], classes: int, settings: Any = None) -> None:
        super().__init__()
        check_type("bands", bands, Sequence)
        check_count("length of bands", len(bands), 2, LARGEST_MODALITY_COUNT)
        self.bands = tuple(check_count("bands", count) for count in bands)
        self.classes, self.settings = check_count("classes", classes), settings
        self.configuration: dict[str, Any] = {}  # `build_backbone` fills it

    def forward(self, images: Images, available: Tensor) -> Tensor:
        """Return the logits of head 0, [B, classes, H, W]."""
        return self.heads(images, available)[:, 0]

    @abstractmethod
    def heads(self, images: Images, available: Tensor) -> Tensor:
        """Return the logits of all heads, [B, heads, classes, H, W]."""

    @abstractmethod
    def latent(self, images: Images, available: Tensor) -> Tensor:
        """Return the latent [B, C, ...] that distortion compares; the decoder does not run."""

    def scenario_latents(self, images: Images, masks: Tensor) -> Tensor:
        """Return the latents [K, B, C, ...] of the same images under K scenarios.

        The masks are bool [K, M], the modalities that are available in each scenario. The latents
        are those of `latent`; a backbone may override this to compute shared work once.
        """
        patches = self.check(images, masks, scenarios=True)
        batch = len(patches[0])
        return torch.stack([self.latent(patches, mask.expand(batch, -1)) for mask in masks])

    def scenario_logits(self, images: Images, masks: Tensor) -> Iterator[Tensor]:
        """Yield the logits [B, classes, H, W] of head 0 under each of K scenarios.

        They come one by one, because they are large; all else is as in `scenario_latents`.
        """
        patches = self.check(images, masks, scenarios=True)
        for mask in masks:
            yield self(patches, mask.expand(len(patches[0]), -1))

    def for_scoring(self) -> Self:
        """Return a copy in evaluation mode that computes faster, not to be trained or saved.

        Batch normalisation is folded into the convolution before it, and weights have the memory
        order that is fastest on a CPU; the results are equal up to rounding.
        """
        folded = copy.deepcopy(self).eval()
        for parent in [m for m in folded.modules() if isinstance(m, nn.Sequential)]:
            for (name, conv), (after, norm) in pairwise([*parent.named_children()]):
                adapted = parametrize.is_parametrized(conv)
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and not adapted:
                    parent.register_module(name, fuse_conv_bn_eval(conv, norm))
                    parent.register_module(after, nn.Identity())
        for conv in folded.modules():
            if isinstance(conv, nn.Conv2d) and not parametrize.is_parametrized(conv):
                conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
        return folded

    @abstractmethod
    def low_rank_layers(self) -> dict[str, nn.Module]:
        """Return the layers that low-rank adaptation changes, by their name in the model."""

    def check(self, images: Images, masks: Tensor, scenarios: bool = False) -> list[Tensor]:
        """Return the images as M tensors [B, D_m, H, W], or raise `InputError`; see the class.

        The masks are bool [B, M], or [K, M] for K scenarios, with a True in each row.
        """
        check_type("images", images, Tensor, list, tuple)
        if isinstance(images, Tensor) and images.ndim != 5:
            raise InputError(f"images: expected [B, M, D, H, W], found shape {list(images.shape)}")
        patches = list(images.unbind(1) if isinstance(images, Tensor) else images)
        count, dtype = len(self.bands), next(self.parameters()).dtype
        if len(patches) != count:
            raise InputError(f"images: expected {count} modalities, found {len(patches)}")
        first = patches[0].shape if isinstance(patches[0], Tensor) else ()
        for index, (patch, bands) in enumerate(zip(patches, self.bands, strict=True)):
            field = f"images of modality {index}"
            shape = [first[0], bands, *first[2:]] if len(first) == 4 else [None] * 4
            check_type(field, patch, Tensor)
            check_shape(field, patch, shape)
            if patch.dtype != dtype or not patch.numel():
                expected = f"the model's {dtype}, with B, H, W above 0"
                found = f"shape {list(patch.shape)} of {patch.dtype}"
                raise InputError(f"{field}: expected {expected}, found {found}")
        field = "masks" if scenarios else "available"
        check_type(field, masks, Tensor)
        check_shape(field, masks, [None if scenarios else len(patches[0]), count])
        if masks.dtype != torch.bool or not len(masks) or not bool(masks.any(dim=1).all()):
            expected = "torch.bool with at least one modality in each row"
            found = f"{masks.dtype} of shape {list(masks.shape)}"
            raise InputError(f"{field}: expected {expected}, found {found}")
        return patches
