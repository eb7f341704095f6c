"""Losses over the labelled pixels, for binary, multi-label and multi-class targets."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

TaskKind = Literal["binary", "multilabel", "multiclass"]
LossName = Literal["logits", "paper"]


def segmentation_loss(
    logits: Tensor, target: Tensor, valid: Tensor, kind: TaskKind
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the logits over the pixels that count.

    Binary cross-entropy, averaged over the classes, for binary and multi-label targets; categorical
    cross-entropy for multi-class ones.

    Args:
        logits: [B, C, H, W].
        target: [B, C, H, W] float in {0, 1}; multi-class: [B, H, W] int64 class index.
        valid: [B, H, W] bool; pixels that are not valid have no influence whatever they hold.
        kind: Kind of the target.

    Returns:
        The mean over all valid pixels of the batch (a scalar; 0 where there is none), and the mean
        per sample, [B], detached, for samplers that watch the loss (0 for a sample without any).
    """
    if kind == "multiclass":
        per_pixel = F.cross_entropy(logits, torch.where(valid, target, 0), reduction="none")
    else:
        known = torch.where(valid[:, None], target, 0.0)
        per_pixel = F.binary_cross_entropy_with_logits(logits, known, reduction="none").mean(dim=1)
    return _mean_over_valid(per_pixel, valid)


def paper_loss(heads: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The published loss: binary cross-entropy with logits of what is already a probability.

    The authors apply a sigmoid in the network and another one in the loss, and average over the
    network's three heads. Kept for those who want to reproduce it: it cannot fall below
    log(1 + exp(-1)) = 0.313 where the target is 1 and log(2) = 0.693 where it is 0.

    Args:
        heads: Logits of every head, [B, heads, C, H, W].
        target: [B, C, H, W] float in {0, 1}.
        valid: [B, H, W] bool.

    Returns:
        As `segmentation_loss`.
    """
    known = torch.where(valid[:, None], target, 0.0)[:, None].expand_as(heads)
    per_pixel = F.binary_cross_entropy_with_logits(heads.sigmoid(), known, reduction="none")
    return _mean_over_valid(per_pixel.mean(dim=(1, 2)), valid)


def _mean_over_valid(per_pixel: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of [B, H, W] over valid pixels: of the batch, and of every sample."""
    weight = valid.to(per_pixel.dtype)
    sums = (per_pixel * weight).sum(dim=(1, 2))
    counts = weight.sum(dim=(1, 2))
    return sums.sum() / counts.sum().clamp(min=1), (sums / counts.clamp(min=1)).detach()
