"""How well the probabilities of a network keep what they promise, scenario by scenario."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lsgs_core.batch import Batch
from lsgs_core.scenarios import ScenarioSet
from study.losses import TaskKind

BINS = 15  # as in Guo et al. 2017


@torch.inference_mode()
def calibration_errors(
    model: nn.Module, batches: Sequence[Batch], scenarios: ScenarioSet, kind: TaskKind
) -> pd.DataFrame:
    """Return the expected calibration error of every scenario (Guo et al. 2017, equation 3).

    Probabilities are sorted into bins of equal width; the error is the mean distance between the
    mean probability of a bin and the share of it that is true, weighted by its pixels. A multiclass
    pixel counts once, with the probability of the class that is predicted; any other counts once
    for every class. Pixels that no sensor of the scenario sees are left out.

    Args:
        model: Gives logits [B, C, H, W] for `model(images, available)`; in evaluation mode.
        batches: Batches with target and valid pixels.
        scenarios: The scenarios.
        kind: Kind of the target.

    Returns:
        The columns scenario and calibration_error, from 0 to 1; NaN where no pixel counts.
    """
    device = next(model.parameters()).device
    errors = []
    for mask in torch.tensor(scenarios.masks, device=device):
        total = np.zeros((3, BINS))  # pixels, sum of probabilities, sum of truths
        for batch in (batch.to(device) for batch in batches):
            present = batch.available & mask
            served = present.any(dim=1)
            if not bool(served.any()):
                continue
            logits = model([image[served] for image in batch.images], present[served])
            counted = batch.counted(present)[served]
            assert batch.target is not None
            probability, truth = _promised(logits, batch.target[served], kind)
            chosen = counted[:, None].expand(probability.shape)
            values, true = (part[chosen].double().cpu().numpy() for part in (probability, truth))
            places = np.minimum((values * BINS).astype(int), BINS - 1)
            for row, weights in enumerate((None, values, true)):
                total[row] += np.bincount(places, weights, BINS)
        pixels = total[0].sum()
        errors.append(np.abs(total[1] - total[2]).sum() / pixels if pixels else np.nan)
    return pd.DataFrame({"scenario": scenarios.names, "calibration_error": errors})


def _promised(logits: Tensor, target: Tensor, kind: TaskKind) -> tuple[Tensor, Tensor]:
    """Return probabilities and whether they came true, both [B, C or 1, H, W]."""
    if kind == "multiclass":
        probability, predicted = logits.softmax(dim=1).max(dim=1, keepdim=True)
        return probability, predicted == target[:, None]
    return logits.sigmoid(), target > 0.5
