"""Evaluation of every scenario: the records of a run, and the figures made of them.

Protocol "strict": one row per block, scenario and class with its counts of pixels tp, fp, fn. Every
metric is computed from pooled counts, so rows of several folds are simply put together. An IoU or
F1 whose pooled counts are all zero (no positive pixel in truth or prediction) is not defined: it is
NaN here and left out of means, where others count it as 0 or as 1.

Protocol "paper": one row per patch, scenario and class with the soft Jaccard index and F1 that the
authors report, which are then averaged over patches.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lsgs_core.batch import Batch
from lsgs_core.errors import InputError
from lsgs_core.scenarios import ScenarioSet
from study.devices import Processes
from study.losses import Protocol, TaskKind

COUNTS = ["tp", "fp", "fn"]
SOFT = ["soft_iou", "soft_f1"]
THRESHOLD = 0.5  # on probabilities, of binary and multi-label targets


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


def predict(logits: Tensor, kind: TaskKind) -> Tensor:
    """Binary masks per class from logits, bool [B, C, H, W].

    Binary and multi-label: probability of at least `THRESHOLD`. Multi-class: the largest logit.
    """
    if kind == "multiclass":
        chosen = logits.argmax(dim=1, keepdim=True)
        return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, chosen, True)
    return logits.sigmoid() >= THRESHOLD


def class_map(logits: Tensor, kind: TaskKind) -> Tensor:
    """The most probable class per pixel, int64 [B, H, W]; -1 where none reaches the threshold."""
    chosen = logits.argmax(dim=1)
    found = predict(logits, kind).any(dim=1)
    return torch.where(found, chosen, -1)


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    scenarios: ScenarioSet,
    classes: tuple[str, ...],
    kind: TaskKind,
    protocol: Protocol = "strict",
) -> pd.DataFrame:
    """Compare predictions with the truth under every scenario.

    A patch without the files that a scenario needs is counted with what it has; pixels that no
    modality of the scenario sees are not counted (`Batch.counted`). In a run of several processes
    all are given the same batches and share the work (`study.devices`).

    Args:
        model: Called as `model(images, available)` for logits [B, C, H, W]; evaluation mode, on
            the device of its parameters.
        batches: Batches with targets.
        scenarios: The scenarios to evaluate, each separately.
        classes: Name of every class.
        kind: Kind of the target.
        protocol: See the module.

    Returns:
        Strict: one row per block, scenario and class: block, scenario, class, tp, fp, fn (pixels).
        Paper: one row per patch, scenario and class: patch, block, scenario, class, soft_iou,
        soft_f1 (NaN where no pixel counts).

    Raises:
        InputError: No batch, or a batch without target.
    """
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    masks = torch.tensor(scenarios.masks, device=device)
    names = list(scenarios.names)
    columns = COUNTS if protocol == "strict" else SOFT
    processes = Processes(device)
    rows: list[pd.DataFrame] = []
    given = False
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for number, batch in enumerate(batches):
                if batch.target is None or batch.valid is None or batch.block_ids is None:
                    raise InputError("evaluation: expected batches with target, valid, block_ids")
                given = True
                if number % processes.count != processes.rank:
                    continue
                moved = batch.to(device)
                truth = _truth(moved, len(classes), kind)
                for name, mask in zip(names, masks, strict=True):
                    present = moved.available & mask
                    served = present.any(dim=1)  # networks need at least one modality
                    found = torch.zeros(len(present), len(classes), len(columns)).double()
                    if protocol == "paper":
                        found.fill_(torch.nan)
                    if bool(served.any()):
                        logits = model([i[served] for i in moved.images], present[served])
                        counted = moved.counted(present)[served, None]
                        if protocol == "strict":
                            predicted = predict(logits, kind)
                            measured = _counts(predicted, truth[served], counted).double()
                        else:
                            measured = _soft_scores(logits, truth[served], counted, kind)
                        found[served.cpu()] = measured.cpu()
                    frame = pd.DataFrame(found.flatten(end_dim=1).numpy(), columns=columns)
                    frame["block"] = batch.block_ids.repeat_interleave(len(classes)).numpy()
                    if protocol == "paper" and batch.patch_ids is not None:
                        frame["patch"] = batch.patch_ids.repeat_interleave(len(classes)).numpy()
                    frame["class"] = list(classes) * len(found)
                    frame["scenario"] = name
                    rows.append(frame)
    finally:
        model.train(training)
    if not given:
        raise InputError("evaluation: expected at least one labelled patch, found none")
    everyone = [frame for share in processes.gather(rows) for frame in share]
    table = pd.concat(everyone, ignore_index=True)
    places = ["patch", "block"] if "patch" in table else ["block"]
    keys = [*places, "scenario", "class"]
    if protocol == "strict":
        table = table.groupby(keys, sort=False)[COUNTS].sum().astype("int64").reset_index()
    order = {name: position for position, name in enumerate([*names, *classes])}
    return table[[*keys, *columns]].sort_values(
        keys,
        key=lambda column: column if column.name in places else column.map(order),
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
    """IoU and F1 of every class, within the groups of `by`.

    Strict records: from pooled counts. Paper records: the mean over patches.

    Args:
        records: Rows of `evaluate`, with a column `class`.
        by: Columns to keep apart, such as ["method", "scenario"].

    Returns:
        The columns of `by`, class, iou and f1, NaN where not defined (see the module); of paper
        records also their standard deviations over patches, iou_deviation and f1_deviation.
    """
    grouped = records.groupby([*by, "class"], sort=False)
    if "tp" not in records:
        means = grouped[SOFT].mean().rename(columns={"soft_iou": "iou", "soft_f1": "f1"})
        spread = grouped[SOFT].std().set_axis(["iou_deviation", "f1_deviation"], axis=1)
        return means.join(spread).reset_index()
    pooled = grouped[COUNTS].sum().reset_index()
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


def summary(
    records: pd.DataFrame,
    scenarios: ScenarioSet,
    by: list[str],
    prior: NDArray[np.float64] | None = None,
) -> pd.DataFrame:
    """Figures of the whole: mean over scenarios, worst scenario, expected, full, drop from full.

    Args:
        records: Rows with scenario, class and counts.
        scenarios: Names the scenarios.
        by: Columns to keep apart.
        prior: How probable every scenario is in deployment, [K]; None is uniform.

    Returns:
        The columns of `by`, mean_iou, worst_iou, worst_scenario, expected_iou (under the prior),
        full_iou and drop (full minus mean), of the IoU averaged over classes. A scenario in which
        no class is in truth or prediction is left out.
    """
    names = list(scenarios.names)
    weights = np.full(len(names), 1 / len(names)) if prior is None else prior
    rows = []
    for keys, group in scenario_scores(records, by).groupby(by, sort=False):
        iou = group.set_index("scenario")["iou"].reindex(names)
        full = iou.iloc[scenarios.full]
        rows.append(
            {
                **dict(zip(by, keys if isinstance(keys, tuple) else (keys,), strict=True)),
                "mean_iou": iou.mean(),
                "worst_iou": iou.min(),
                "worst_scenario": iou.idxmin() if iou.notna().any() else "",
                "expected_iou": float(expected(iou.to_numpy(), weights)),
                "full_iou": full,
                "drop": full - iou.mean(),
            }
        )
    return pd.DataFrame(rows)


def expected(scores: NDArray[np.float64], prior: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of scores [..., K] under a prior [K] over the scenarios that have one (not NaN)."""
    weights = np.where(np.isnan(scores), 0, prior)
    total, mass = (np.nan_to_num(scores) * weights).sum(axis=-1), weights.sum(axis=-1)
    return np.divide(total, mass, out=np.full(np.shape(mass), np.nan), where=mass > 0)


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


def _soft_scores(logits: Tensor, truth: Tensor, counted: Tensor, kind: TaskKind) -> Tensor:
    """Soft Jaccard index and F1 per sample and class, [B, C, 2].

    sum p y / (sum p + sum y - sum p y) and 2 sum p y / (sum p + sum y); where the truth is empty,
    both are inverted first, as the authors do. Never thresholded.
    """
    probability = (logits.softmax(dim=1) if kind == "multiclass" else logits.sigmoid()).double()
    positive = truth.double()
    empty = ~(truth & counted).any(dim=(2, 3), keepdim=True)
    probability = torch.where(empty, 1 - probability, probability) * counted
    positive = torch.where(empty, 1 - positive, positive) * counted
    shared = (probability * positive).sum(dim=(2, 3))
    both = (probability + positive).sum(dim=(2, 3))
    return torch.stack((shared / (both - shared), 2 * shared / both), dim=2)
