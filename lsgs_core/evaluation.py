"""Evaluation: counts of true and false pixels per scenario, and the figures made of them.

The record of a run is tidy: one row per block, scenario and class with its counts tp, fp, fn. Every
metric is computed from pooled counts, so rows of several folds are simply put together.

An IoU or F1 whose pooled counts are all zero (no positive pixel in truth or prediction) is not
defined: it is NaN here and left out of means, where others count it as 0 or as 1.
"""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
import torch
from torch import Tensor, nn

from lsgs_core.batch import Batch
from lsgs_core.errors import InputError
from lsgs_core.losses import TaskKind
from lsgs_core.scenarios import ScenarioSet

COUNTS = ["tp", "fp", "fn"]


class AlwaysPositive(nn.Module):
    """The trivial predictor: every class at every pixel, whatever it sees.

    Args:
        classes: Number of classes C.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, images: list[Tensor], available: Tensor) -> Tensor:
        """Logits [B, C, H, W], all positive."""
        batch, _, height, width = images[0].shape
        return images[0].new_ones(batch, self.classes, height, width)


def predict(logits: Tensor, kind: TaskKind, threshold: float = 0.5) -> Tensor:
    """Binary masks per class from logits, bool [B, C, H, W].

    Binary and multi-label: probability of at least `threshold`. Multi-class: the largest logit.
    """
    if kind == "multiclass":
        chosen = logits.argmax(dim=1, keepdim=True)
        return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, chosen, True)
    return logits.sigmoid() >= threshold


def class_map(logits: Tensor, kind: TaskKind, threshold: float = 0.5) -> Tensor:
    """The most probable class per pixel, int64 [B, H, W]; -1 where none reaches the threshold."""
    chosen = logits.argmax(dim=1)
    found = predict(logits, kind, threshold).any(dim=1)
    return torch.where(found, chosen, -1)


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    scenarios: ScenarioSet,
    classes: tuple[str, ...],
    kind: TaskKind,
    threshold: float = 0.5,
) -> pd.DataFrame:
    """Count true positives, false positives and false negatives under every scenario.

    A patch without the files that a scenario needs is counted with what it has; pixels that no
    modality of the scenario sees are not counted (`Batch.counted`).

    Args:
        model: Called as `model(images, available)` for logits [B, C, H, W]; evaluation mode, on
            the device of its parameters.
        batches: Batches with targets.
        scenarios: The scenarios to evaluate, each separately.
        classes: Name of every class.
        kind: Kind of the target.
        threshold: On the probability, for binary and multi-label targets.

    Returns:
        One row per block, scenario and class: block, scenario, class, tp, fp, fn (pixels).

    Raises:
        InputError: No batch, or a batch without target.
    """
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    masks = torch.tensor(scenarios.masks, device=device)
    names = list(scenarios.names)
    rows: list[pd.DataFrame] = []
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for batch in batches:
                if batch.target is None or batch.valid is None or batch.block_ids is None:
                    raise InputError("evaluation: expected batches with target, valid, block_ids")
                moved = batch.to(device)
                truth = _truth(moved, len(classes), kind)
                for name, mask in zip(names, masks, strict=True):
                    present = moved.available & mask
                    served = present.any(dim=1)  # networks need at least one modality
                    counts = torch.zeros(len(present), len(classes), 3, dtype=torch.int64)
                    if bool(served.any()):
                        logits = model([i[served] for i in moved.images], present[served])
                        counted = moved.counted(present)[served, None]
                        predicted = predict(logits, kind, threshold)
                        counts[served.cpu()] = _counts(predicted, truth[served], counted).cpu()
                    frame = pd.DataFrame(counts.flatten(end_dim=1).numpy(), columns=COUNTS)
                    frame["block"] = batch.block_ids.repeat_interleave(len(classes)).numpy()
                    frame["class"] = list(classes) * len(counts)
                    frame["scenario"] = name
                    rows.append(frame)
    finally:
        model.train(training)
    if not rows:
        raise InputError("evaluation: expected at least one labelled patch, found none")
    pooled = pd.concat(rows).groupby(["block", "scenario", "class"], sort=False)[COUNTS].sum()
    order = {name: position for position, name in enumerate([*names, *classes])}
    return pooled.reset_index().sort_values(
        ["block", "scenario", "class"],
        key=lambda column: column if column.name == "block" else column.map(order),
        ignore_index=True,
    )


def validation_scores(
    model: nn.Module,
    batches: Iterable[Batch],
    scenarios: ScenarioSet,
    classes: tuple[str, ...],
    kind: TaskKind,
) -> dict[str, float]:
    """What learning curves show: IoU of the full scenario, and the mean over scenarios."""
    records = evaluate(model, batches, scenarios, classes, kind)
    figures = summary(records.assign(model="this"), scenarios, by=["model"]).iloc[0]
    return {
        "validation_full_iou": float(figures["full_iou"]),
        "validation_mean_iou": float(figures["mean_iou"]),
    }


def class_scores(records: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """IoU and F1 of every class, from counts pooled within the groups of `by`.

    Args:
        records: Rows with tp, fp, fn and a column `class`.
        by: Columns to keep apart, such as ["method", "scenario"].

    Returns:
        The columns of `by`, class, iou and f1; NaN where not defined (see the module).
    """
    pooled = records.groupby([*by, "class"], sort=False)[COUNTS].sum().reset_index()
    tp, fp, fn = (pooled[name].astype(float) for name in COUNTS)
    union = (tp + fp + fn).where(lambda pixels: pixels > 0)
    pooled["iou"] = tp / union
    pooled["f1"] = 2 * tp / (union + tp)
    return pooled.drop(columns=COUNTS)


def scenario_scores(records: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Mean over classes of IoU and F1 per scenario.

    Args:
        records: Rows with scenario, class and counts.
        by: Further columns to keep apart, such as ["backbone", "method"].

    Returns:
        The columns of `by`, scenario, iou, f1.
    """
    scores = class_scores(records, [*by, "scenario"])
    grouped = scores.groupby([*by, "scenario"], sort=False)[["iou", "f1"]]
    return grouped.mean().reset_index()


def summary(records: pd.DataFrame, scenarios: ScenarioSet, by: list[str]) -> pd.DataFrame:
    """Figures of the whole: mean over scenarios, worst scenario, full, and the drop from full.

    Args:
        records: Rows with scenario, class and counts.
        scenarios: Names the full scenario.
        by: Columns to keep apart.

    Returns:
        The columns of `by`, mean_iou, worst_iou, worst_scenario, full_iou and drop (full minus
        mean), of the IoU averaged over classes.
    """
    rows = []
    for keys, group in scenario_scores(records, by).groupby(by, sort=False):
        iou = group.set_index("scenario")["iou"]
        full = iou[scenarios.names[scenarios.full]]
        rows.append(
            {
                **dict(zip(by, keys if isinstance(keys, tuple) else (keys,), strict=True)),
                "mean_iou": iou.mean(),
                "worst_iou": iou.min(),
                "worst_scenario": iou.idxmin(),
                "full_iou": full,
                "drop": full - iou.mean(),
            }
        )
    return pd.DataFrame(rows)


def _truth(batch: Batch, classes: int, kind: TaskKind) -> Tensor:
    """Truth as bool [B, C, H, W]; False where there is no label."""
    assert batch.target is not None
    assert batch.valid is not None
    if kind == "multiclass":
        known = torch.where(batch.valid, batch.target, 0)
        return nn.functional.one_hot(known, classes).movedim(-1, 1).bool()
    return batch.target > 0.5


def _counts(predicted: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """True positives, false positives and false negatives per sample and class, [B, C, 3]."""
    pairs = (predicted & truth, predicted & ~truth, ~predicted & truth)
    return torch.stack([(pair & valid).sum(dim=(2, 3)) for pair in pairs], dim=2)
