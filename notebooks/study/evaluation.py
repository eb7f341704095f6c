"""Evaluation of every scenario: the records of a run, and the metrics computed from them.

Protocol "strict": one row per block, scenario and class with its pixel counts tp, fp, fn. Every
metric is computed from pooled counts, so the rows of several folds are simply concatenated. An IoU
or F1 whose pooled counts are all zero (no positive pixel in truth or prediction) is undefined: here
it is NaN and left out of means, where others count it as 0 or as 1.

Protocol "paper": one row per patch, scenario and class with the soft Jaccard index and F1 of the
authors, which are then averaged over patches.
"""

from collections.abc import Callable, Iterable
from typing import Any

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
    """The trivial predictor, which predicts every class at every pixel."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, images: list[Tensor], available: Tensor) -> Tensor:
        """Return positive logits, [B, C, H, W]."""
        batch, _, height, width = images[0].shape
        return images[0].new_ones(batch, self.classes, height, width)


def predict(logits: Tensor, kind: TaskKind) -> Tensor:
    """Return the predicted mask of every class, bool [B, C, H, W], from logits of that shape.

    Binary and multi-label: probability of at least `THRESHOLD`. Multi-class: the largest logit.
    """
    if kind == "multiclass":
        return nn.functional.one_hot(logits.argmax(dim=1), logits.shape[1]).movedim(-1, 1).bool()
    return logits.sigmoid() >= THRESHOLD


def class_map(logits: Tensor, kind: TaskKind) -> Tensor:
    """Return the most probable class per pixel, int64 [B, H, W]; -1 where none is predicted."""
    return torch.where(predict(logits, kind).any(dim=1), logits.argmax(dim=1), -1)


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    scenarios: ScenarioSet,
    classes: tuple[str, ...],
    kind: TaskKind,
    protocol: Protocol = "strict",
) -> pd.DataFrame:
    """Compare predictions with the truth under every scenario, by a protocol of the module.

    A patch that lacks modalities of a scenario is evaluated with those it has; pixels that no
    modality of the scenario sees are not counted (`Batch.counted`). In a run of several processes,
    all are given the same batches and share the work (`study.devices`).

    Args:
        model: Called in evaluation mode as `model(images, available)` for logits [B, C, H, W].
        batches: Batches with targets; without any, or without a target, `InputError` is raised.
        scenarios: The scenarios, each evaluated separately.
        classes: Names of the C classes.
        kind: Kind of the target.
        protocol: Decides the rows.

    Returns:
        Strict: the columns block, scenario, class, tp, fp and fn (pixels). Paper: patch, block,
        scenario, class, soft_iou and soft_f1 (NaN where no pixel counts).
    """
    parameter = next(model.parameters(), torch.empty(0))
    masks = torch.tensor(scenarios.masks, device=parameter.device)
    processes = Processes(parameter.device)
    rows: list[pd.DataFrame] = []
    count, training = 0, model.training
    model.eval()
    try:
        for count, batch in enumerate(batches, start=1):
            if batch.target is None or batch.valid is None or batch.block_ids is None:
                raise InputError("evaluation: expected batches with target, valid, block_ids")
            if (count - 1) % processes.count == processes.rank:
                batch = batch.to(parameter.device)
                truth = _truth(batch, len(classes), kind)
                for name, mask in zip(scenarios.names, masks, strict=True):
                    table = _measure(model, batch, truth, mask, kind, protocol)
                    table["class"] = list(classes) * len(truth)
                    rows.append(table.assign(scenario=name))
    finally:
        model.train(training)
    if not count:
        raise InputError("evaluation: expected at least one labelled patch, found none")
    table = pd.concat([frame for share in processes.gather(rows) for frame in share])
    places = ["patch", "block"] if "patch" in table else ["block"]
    keys = [*places, "scenario", "class"]
    if protocol == "strict":
        table = table.groupby(keys, sort=False)[COUNTS].sum().astype("int64").reset_index()
    order = {name: position for position, name in enumerate([*scenarios.names, *classes])}

    def in_order(column: pd.Series) -> pd.Series:
        return column if column.name in places else column.map(order)

    table = table[[*keys, *(COUNTS if protocol == "strict" else SOFT)]]
    return table.sort_values(keys, key=in_order, ignore_index=True)


@torch.inference_mode()
def _measure(
    model: nn.Module, batch: Batch, truth: Tensor, mask: Tensor, kind: TaskKind, protocol: Protocol
) -> pd.DataFrame:
    """Return the counts or soft scores of every patch and class under one scenario."""
    assert batch.block_ids is not None
    columns = COUNTS if protocol == "strict" else SOFT
    present = batch.available & mask
    served = present.any(dim=1)  # networks need at least one modality
    unserved = 0.0 if protocol == "strict" else torch.nan
    values = torch.full((*truth.shape[:2], len(columns)), unserved, dtype=torch.float64)
    if bool(served.any()):
        logits = model([image[served] for image in batch.images], present[served])
        counted = batch.counted(present)[served, None]
        if protocol == "strict":
            measured = _counts(predict(logits, kind), truth[served], counted).double()
        else:
            measured = _soft_scores(logits, truth[served], counted, kind)
        values[served.cpu()] = measured.cpu()
    table = pd.DataFrame(values.flatten(end_dim=1).numpy(), columns=columns)
    table["block"] = batch.block_ids.cpu().repeat_interleave(truth.shape[1]).numpy()
    if protocol == "paper" and batch.patch_ids is not None:
        table["patch"] = batch.patch_ids.cpu().repeat_interleave(truth.shape[1]).numpy()
    return table


def validation_scores(
    model: nn.Module,
    batches: Iterable[Batch],
    scenarios: ScenarioSet,
    classes: tuple[str, ...],
    kind: TaskKind,
) -> dict[str, float]:
    """Return the IoU of the full scenario and the mean over scenarios, for learning curves."""
    records = evaluate(model, batches, scenarios, classes, kind).assign(model="this")
    row = summary(records, scenarios, by=["model"]).iloc[0]
    return {f"validation_{name}": float(row[name]) for name in ("full_iou", "mean_iou")}


def class_scores(records: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Compute IoU and F1 of every class, within the groups of `by`, NaN where undefined.

    They are from pooled counts, or for paper records the mean over patches, with the standard
    deviations iou_deviation and f1_deviation.
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
    """Average IoU and F1 over the classes: the columns of `by`, scenario, iou and f1."""
    keys = [*by, "scenario"]
    grouped = class_scores(records, keys).groupby(keys, sort=False)
    return grouped[["iou", "f1"]].mean().reset_index()


def summary(
    records: pd.DataFrame,
    scenarios: ScenarioSet,
    by: list[str],
    prior: NDArray[np.float64] | None = None,
) -> pd.DataFrame:
    """Summarise the IoU, averaged over classes, over the scenarios, within the groups of `by`.

    The prior is the probability of every scenario in deployment, [K]; None is uniform.

    Returns:
        The columns of `by`, mean_iou, worst_iou, lowest_quarter_iou, worst_scenario, expected_iou
        (under the prior), full_iou and drop (full minus mean). A scenario in which no class is in
        truth or prediction is left out.
    """
    names = list(scenarios.names)
    weights = np.full(len(names), 1 / len(names)) if prior is None else prior
    rows = []
    for keys, group in scenario_scores(records, by).groupby(by, sort=False):
        iou = group.set_index("scenario")["iou"].reindex(names)
        values = iou.to_numpy(dtype=float)
        row: dict[str, Any] = {name: float(of(values, weights)) for name, of in SUMMARIES.items()}
        row["worst_scenario"] = iou.idxmin() if iou.notna().any() else ""
        row["drop"] = row["full_iou"] - row["mean_iou"]
        rows.append(dict(zip(by, keys, strict=True)) | row)
    columns = ["mean_iou", "worst_iou", "lowest_quarter_iou", "worst_scenario", "expected_iou"]
    return pd.DataFrame(rows)[[*by, *columns, "full_iou", "drop"]]


def expected(scores: NDArray[np.float64], prior: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of scores [..., K] under a prior [K], over the scores that are not NaN."""
    weights = np.where(np.isnan(scores), 0, prior)
    total, mass = (np.nan_to_num(scores) * weights).sum(axis=-1), weights.sum(axis=-1)
    return np.divide(total, mass, out=np.full(np.shape(mass), np.nan), where=mass > 0)


def lowest_quarter(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of the lowest quarter, rounded up, of scores [..., K] that are not NaN.

    Of many scenarios it is less noisy than the lowest: the mean of two of 7, and of eight of 31.
    """
    kept = -(-(~np.isnan(scores)).sum(axis=-1) // 4)
    ranks = np.arange(scores.shape[-1])
    lowest = np.where(ranks < kept[..., None], np.sort(scores, axis=-1), 0.0)  # NaN comes last
    return np.divide(lowest.sum(axis=-1), kept, out=np.full(kept.shape, np.nan), where=kept > 0)


# Summaries of the IoU of K scenarios, [..., K] with NaN where undefined, under a prior [K].
SUMMARIES: dict[str, Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]] = {
    "worst_iou": lambda scores, _: np.fmin.reduce(scores, axis=-1),  # ignores NaN
    "lowest_quarter_iou": lambda scores, _: lowest_quarter(scores),
    "mean_iou": lambda scores, prior: expected(scores, np.ones_like(prior)),
    "expected_iou": expected,
    "full_iou": lambda scores, _: scores[..., -1],
}


def _truth(batch: Batch, classes: int, kind: TaskKind) -> Tensor:
    """Return the truth as bool [B, C, H, W]; False where there is no label."""
    assert batch.target is not None
    assert batch.valid is not None
    if kind == "multiclass":
        target = torch.where(batch.valid, batch.target, 0)
        return nn.functional.one_hot(target, classes).movedim(-1, 1).bool()
    return batch.target > 0.5


def _counts(predicted: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Count true positives, false positives and false negatives, [B, C, 3]."""
    pairs = (predicted & truth, predicted & ~truth, ~predicted & truth)
    return torch.stack([(pair & valid).sum(dim=(2, 3)) for pair in pairs], dim=2)


def _soft_scores(logits: Tensor, truth: Tensor, counted: Tensor, kind: TaskKind) -> Tensor:
    """Return the soft Jaccard index and F1 per sample and class, [B, C, 2], without threshold.

    They are sum p y / (sum p + sum y - sum p y) and 2 sum p y / (sum p + sum y). Where the truth is
    empty, p and y are inverted first, as the authors do.
    """
    probability = (logits.softmax(dim=1) if kind == "multiclass" else logits.sigmoid()).double()
    positive = truth.double()
    empty = ~(truth & counted).any(dim=(2, 3), keepdim=True)
    probability = torch.where(empty, 1 - probability, probability) * counted
    positive = torch.where(empty, 1 - positive, positive) * counted
    shared = (probability * positive).sum(dim=(2, 3))
    both = (probability + positive).sum(dim=(2, 3))
    return torch.stack((shared / (both - shared), 2 * shared / both), dim=2)
