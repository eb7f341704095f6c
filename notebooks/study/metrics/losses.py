"""Losses over the labelled pixels, for binary, multi-label and multi-class targets."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

TaskKind = Literal["binary", "multilabel", "multiclass"]
Protocol = Literal["strict", "paper"]


def segmentation_loss(
    logits: Tensor, target: Tensor, valid: Tensor, kind: TaskKind
) -> tuple[Tensor, Tensor]:
    """Cross-entropy plus soft Jaccard loss, over the pixels that count.

    Cross-entropy alone leaves rare classes below the threshold of 0.5 everywhere, and an IoU at
    that threshold is what is reported. It is binary, averaged over the classes, for binary and
    multi-label targets, and categorical for multi-class ones.

    Args:
        logits: [B, C, H, W].
        target: [B, C, H, W] float in {0, 1}; multi-class: [B, H, W] int64 class index.
        valid: [B, H, W] bool; pixels that are not valid have no influence whatever they hold.
        kind: Kind of the target.

    Returns:
        The loss (a scalar; 0 where no pixel is valid), and the cross-entropy per sample, [B],
        detached, for samplers that watch the loss (NaN for a sample without any valid pixel).
    """
    if kind == "multiclass":
        classes = torch.where(valid, target, 0)
        per_pixel = F.cross_entropy(logits, classes, reduction="none")
        truth = F.one_hot(classes, logits.shape[1]).movedim(-1, 1).to(logits.dtype)
        probability = logits.softmax(dim=1)
    else:
        truth = torch.where(valid[:, None], target, 0.0)
        per_pixel = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(dim=1)
        probability = logits.sigmoid()
    entropy, per_sample = _mean_over_valid(per_pixel, valid)
    return entropy + soft_jaccard_loss(probability, truth, valid), per_sample


def soft_jaccard_loss(probability: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """One minus the Jaccard index of probabilities, pooled over the batch, averaged over classes.

    With sums over all valid pixels of the batch, (sum p y + 1) / (sum p + sum y - sum p y + 1). The
    one pixel that is added makes a class that is nowhere, and is predicted nowhere, no loss. The
    probability p and the truth y are [B, C, H, W], valid is bool [B, H, W].
    """
    weight = valid[:, None].to(probability.dtype)
    shared = (probability * truth * weight).sum(dim=(0, 2, 3))
    union = ((probability + truth) * weight).sum(dim=(0, 2, 3)) - shared
    return (1 - (shared + 1) / (union + 1)).mean()


def paper_loss(heads: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The published loss: binary cross-entropy with logits of what is already a probability.

    The authors apply a sigmoid in the network and another one in the loss, and average over the
    network's three heads. Kept for those who want to reproduce it: it cannot fall below
    log(1 + exp(-1)) = 0.313 where the target is 1 and log(2) = 0.693 where it is 0.

    Heads are the logits of every head, [B, heads, C, H, W]; the others are those of
    `segmentation_loss`, and so is the result.
    """
    truth = torch.where(valid[:, None], target, 0.0)[:, None].expand_as(heads)
    per_pixel = F.binary_cross_entropy_with_logits(heads.sigmoid(), truth, reduction="none")
    return _mean_over_valid(per_pixel.mean(dim=(1, 2)), valid)


def _mean_over_valid(per_pixel: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of [B, H, W] over valid pixels: of the batch, and of every sample."""
    weight = valid.to(per_pixel.dtype)
    sums = (per_pixel * weight).sum(dim=(1, 2))
    counts = weight.sum(dim=(1, 2))
    mean = sums.sum() / counts.sum().clamp(min=1)
    return mean, (sums / counts).detach()
