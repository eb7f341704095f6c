"""Evaluation of every scenario: the records of a run, and the metrics computed from them.

Protocol "strict": one row per block, scenario and class with its pixel counts tp, fp, fn. Every
metric is computed from pooled counts, so the rows of several folds are simply concatenated. An IoU
or F1 whose pooled counts are all zero (no positive pixel in truth or prediction) is undefined: here
it is NaN and left out of means, where others count it as 0 or as 1.

Protocol "paper": one row per patch, scenario and class with the soft Jaccard index and F1 of the
authors, which are then averaged over patches.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lsgs_core.batch import Batch
from lsgs_core.errors import Floats, InputError
from lsgs_core.models.backbone import Backbone
from lsgs_core.scenarios import ScenarioSet
from study.metrics.losses import Protocol, TaskKind
from study.provenance.devices import Processes

COUNTS = ["tp", "fp", "fn"]
SOFT = ["soft_iou", "soft_f1"]
THRESHOLD = 0.5  # on probabilities, of binary and multi-label targets
BINS = 15  # of calibration errors, as in Guo et al. 2017


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
    all are given the same batches and share the work (`study.provenance.devices`).

    Args:
        model: Called in evaluation mode as `model(images, available)` for logits [B, C, H, W].
        batches: Batches with targets; without any, or without a target, `InputError` is raised.
        scenarios: The scenarios, each evaluated separately.
        classes: Names of the C classes.
        kind: What `predict` makes of logits. "multilabel" judges each class of any target alone.
        protocol: Decides the rows.

    Returns:
        Strict: the columns block, scenario, class, tp, fp and fn (pixels). Paper: patch, block,
        scenario, class, soft_iou and soft_f1 (NaN where no pixel counts).
    """
    device = next(model.parameters(), torch.empty(0)).device
    processes = Processes(device)
    measured: list[tuple[NDArray[Any], ...]] = []
    count, training = 0, model.training
    model.eval()
    try:
        for count, batch in enumerate(batches, start=1):
            if batch.target is None or batch.valid is None or batch.block_ids is None:
                raise InputError("evaluation: expected batches with target, valid, block_ids")
            if (count - 1) % processes.count == processes.rank:
                of_batch = batch.to(device), scenarios, len(classes), kind, protocol
                measured.append((_measure(model, *of_batch), batch.block_ids.numpy(force=True)))
                if protocol == "paper" and batch.patch_ids is not None:
                    measured[-1] += (batch.patch_ids.numpy(force=True),)
    finally:
        model.train(training)
    if not count:
        raise InputError("evaluation: expected at least one labelled patch, found none")
    parts = [part for share in processes.gather(measured) for part in share]
    values, *places = map(np.concatenate, zip(*parts, strict=True))
    if protocol == "strict":
        blocks, block_of = np.unique(places[0], return_inverse=True)
        pooled = np.zeros((len(blocks), *values.shape[1:]), np.int64)
        np.add.at(pooled, block_of, values.astype(np.int64))
        values, places = pooled, [blocks]
    order = np.lexsort(places)
    keys: list[Any] = [order, scenarios.names, classes]
    index = pd.MultiIndex.from_product(keys, names=["row", "scenario", "class"])
    columns = COUNTS if protocol == "strict" else SOFT
    table = pd.DataFrame(values[order].reshape(-1, len(columns)), index, columns).reset_index()
    rows = table.pop("row").to_numpy()
    for name, ids in zip(("block", "patch"), places, strict=False):
        table.insert(0, name, ids[rows])
    return table


@torch.no_grad()  # not inference mode: what a network caches must serve training
def scenario_logits(
    model: nn.Module, batch: Batch, scenarios: ScenarioSet
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Yield what a network makes of a batch under each scenario that leaves some patch a modality.

    Yields:
        The index of the scenario; which patches have a modality, bool [B]; and for these b patches
        the logits, [b, C, H, W], and the pixels that count, bool [b, H, W].
    """
    masks = torch.tensor(scenarios.masks, device=batch.available.device)
    if isinstance(model, Backbone) and bool(batch.available.all()):  # encodes each sensor once
        served = batch.available.any(dim=1)
        for index, logits in enumerate(model.scenario_logits(batch.images, masks)):
            yield index, served, logits, batch.counted(masks[index].expand_as(batch.available))
        return
    for index, mask in enumerate(masks):
        present = batch.available & mask
        served = present.any(dim=1)  # networks need at least one modality
        if bool(served.any()):
            logits = model([image[served] for image in batch.images], present[served])
            yield index, served, logits, batch.counted(present)[served]


def _measure(
    model: nn.Module,
    batch: Batch,
    scenarios: ScenarioSet,
    classes: int,
    kind: TaskKind,
    protocol: Protocol,
) -> Floats:
    """Return the counts or soft scores of every patch, scenario and class, [B, K, C, 3 or 2]."""
    truth, strict = _truth(batch, classes), protocol == "strict"
    shape = len(truth), len(scenarios), classes, len(COUNTS if strict else SOFT)
    values = np.full(shape, 0.0 if strict else np.nan)
    measure = _counts if strict else _soft_scores
    for index, served, logits, counted in scenario_logits(model, batch, scenarios):
        measured = measure(logits, truth[served], counted[:, None], kind)
        values[served.numpy(force=True), index] = measured.numpy(force=True)
    return values


def calibration_errors(
    model: nn.Module, batches: Iterable[Batch], scenarios: ScenarioSet, kind: TaskKind
) -> pd.DataFrame:
    """Return the expected calibration error of every scenario (Guo et al. 2017, equation 3).

    Probabilities are sorted into bins of equal width; the error is the mean distance between the
    mean probability of a bin and the share of it that is true, weighted by its pixels. A multiclass
    pixel counts once, with the probability of the class that is predicted; any other counts once
    for every class. Pixels that no sensor of the scenario sees are left out. The model is in
    evaluation mode; arguments are those of `evaluate`.

    Returns:
        The columns scenario and calibration_error, from 0 to 1; NaN where no pixel counts.
    """
    device = next(model.parameters()).device
    total = np.zeros((len(scenarios), 3, BINS))  # pixels, sum of probabilities, sum of truths
    for batch in (batch.to(device) for batch in batches):
        for index, served, logits, counted in scenario_logits(model, batch, scenarios):
            assert batch.target is not None
            if kind == "multiclass":
                probability, predicted = logits.softmax(dim=1).max(dim=1, keepdim=True)
                true = predicted == batch.target[served][:, None]
            else:
                probability, true = logits.sigmoid(), batch.target[served] > 0.5
            chosen = counted[:, None].expand(probability.shape)
            weights = [part[chosen].double().numpy(force=True) for part in (probability, true)]
            places = np.minimum((weights[0] * BINS).astype(int), BINS - 1)
            total[index] += [np.bincount(places, by, BINS) for by in (None, *weights)]
    pixels, distances = total[:, 0].sum(axis=1), np.abs(total[:, 1] - total[:, 2]).sum(axis=1)
    errors = np.divide(distances, pixels, out=np.full(len(pixels), np.nan), where=pixels > 0)
    return pd.DataFrame({"scenario": scenarios.names, "calibration_error": errors})


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
    """Compute IoU and F1 of every class by groups, NaN where undefined, from pooled counts.

    Of paper records they are means over patches, with iou_deviation and f1_deviation beside them.
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
    prior: Floats | None = None,
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


def expected(scores: Floats, prior: Floats) -> Floats:
    """Return the mean of scores [..., K] under a prior [K], over the scores that are not NaN."""
    weights = np.where(np.isnan(scores), 0, prior)
    total, mass = (np.nan_to_num(scores) * weights).sum(axis=-1), weights.sum(axis=-1)
    return np.divide(total, mass, out=np.full(np.shape(mass), np.nan), where=mass > 0)


def lowest_quarter(scores: Floats) -> Floats:
    """Return the mean of the lowest quarter, rounded up, of scores [..., K] that are not NaN.

    Of many scenarios it is less noisy than the lowest: the mean of two of 7, and of eight of 31.
    """
    kept = -(-(~np.isnan(scores)).sum(axis=-1) // 4)
    ranks = np.arange(scores.shape[-1])
    lowest = np.where(ranks < kept[..., None], np.sort(scores, axis=-1), 0.0)  # NaN comes last
    return np.divide(lowest.sum(axis=-1), kept, out=np.full(kept.shape, np.nan), where=kept > 0)


# Summaries of the IoU of K scenarios, [..., K] with NaN where undefined, under a prior [K].
SUMMARIES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "worst_iou": lambda scores, _: np.fmin.reduce(scores, axis=-1),  # ignores NaN
    "lowest_quarter_iou": lambda scores, _: lowest_quarter(scores),
    "mean_iou": lambda scores, prior: expected(scores, np.ones_like(prior)),
    "expected_iou": expected,
    "full_iou": lambda scores, _: scores[..., -1],
}


def _truth(batch: Batch, classes: int) -> Tensor:
    """Return the truth as bool [B, C, H, W], of class indices too."""
    assert batch.target is not None
    assert batch.valid is not None
    if batch.target.ndim == 3:
        target = torch.where(batch.valid, batch.target, 0)
        return nn.functional.one_hot(target, classes).movedim(-1, 1).bool()
    return batch.target > 0.5


def _counts(logits: Tensor, truth: Tensor, counted: Tensor, kind: TaskKind) -> Tensor:
    """Count true positives, false positives and false negatives, [B, C, 3]."""
    predicted = predict(logits, kind)
    pairs = (predicted & truth, predicted & ~truth, ~predicted & truth)
    return torch.stack([(pair & counted).sum(dim=(2, 3)) for pair in pairs], dim=2)


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
