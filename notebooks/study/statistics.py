"""Differences between methods, with intervals that know of replicates and of spatial blocks.

A replicate is a seed of fine-tuning, with the held-out counts of all folds pooled. Methods are
compared within replicates: they share initial weights, order of the data and random numbers. What
else could have been drawn are the seeds and the blocks of the scene, so the bootstrap resamples
both, and a block stays one block for all methods. Pretrained networks and scorings, one per fold,
are shared by all replicates: intervals do not tell how results vary with the pretraining. "Uniform"
is the mean of its arms, and the difference between them is the noise floor.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
from numpy.typing import NDArray

from lsgs_core.errors import InputError
from lsgs_core.methods import METHODS
from lsgs_core.scenarios import ScenarioSet
from study.evaluation import COUNTS, expected

Array = NDArray[np.float64]
# Columns that name a contrast, the method and its reference methods.
Named = tuple[dict[str, str], str, list[str]]
METRICS = ("worst_iou", "mean_iou", "expected_iou", "full_iou")
UNIFORM_ARMS = ("uniform", "uniform_again")
FEWEST_BLOCKS = 9
# Two-sided 5 %, power 80 %: normal quantiles 1.96 + 0.84.
DETECTABLE = float(scipy.stats.norm.ppf(0.975) + scipy.stats.norm.ppf(0.8))


@dataclass(frozen=True)
class Counts:
    """Records of one data set and backbone as an array; only seeds that all methods have.

    Attributes:
        methods: Names, M.
        seeds: Replicates, S.
        blocks: Spatial blocks, B.
        values: tp, fp, fn, float64 [B, M, S, K, C, 3].
    """

    methods: list[str]
    seeds: list[int]
    blocks: list[int]
    values: Array

    @classmethod
    def of(cls, records: pd.DataFrame, methods: Sequence[str], scenarios: ScenarioSet) -> Counts:
        """Put records into an array.

        Args:
            records: Of one data set and backbone: seed, fold, method, block, scenario, class,
                tp, fp, fn.
            methods: Which ones.
            scenarios: K of them.

        Raises:
            InputError: No seed that all methods have, or a seed without some fold or block.
        """
        rows = records[records["method"].isin(list(methods))]
        seeds_of = rows.groupby("method")["seed"].agg(set)
        shared = set.intersection(*(seeds_of.get(name, set()) for name in methods))
        if not shared:
            raise InputError(f"records: no seed has every method of {list(methods)}")
        seeds = sorted(shared)
        rows = rows[rows["seed"].isin(seeds)]
        blocks = sorted(rows["block"].unique())
        axes: dict[str, list[Any]] = {
            "block": blocks,
            "method": list(methods),
            "seed": seeds,
            "scenario": list(scenarios.names),
            "class": list(dict.fromkeys(rows["class"])),
        }
        if not set(rows["scenario"]) <= set(scenarios.names):
            raise InputError(f"records: expected the scenarios {list(scenarios.names)}")
        whole = pd.MultiIndex.from_product(list(axes.values()), names=list(axes))
        table = rows.groupby(list(axes))[COUNTS].sum().reindex(whole)
        if missing := int(table["tp"].isna().sum()):
            raise InputError(
                f"records: of {len(table)} combinations of {list(axes)}, {missing} are "
                "missing; every method needs the same folds in every seed"
            )
        values = table.to_numpy(dtype=np.float64).reshape(*map(len, axes.values()), 3)
        return cls(list(methods), seeds, blocks, values)

    def scores(self, weights: Array) -> Array:
        """IoU averaged over classes when blocks are weighted, [R, M, S, K], for weights [R, B].

        Classes without any pixel in truth and prediction are left out of the mean; NaN where all
        are.
        """
        shape = self.values.shape[1:]
        pooled = (weights @ self.values.reshape(len(self.values), -1)).reshape(-1, *shape)
        union = pooled.sum(axis=-1)
        iou = np.divide(pooled[..., 0], union, out=np.full(union.shape, np.nan), where=union > 0)
        return expected(iou, np.ones(iou.shape[-1]))

    def metric(self, name: str, weights: Array, prior: Array) -> Array:
        """A metric of every method and replicate, [R, M, S], for block weights [R, B]."""
        scores = self.scores(weights)
        match name:
            case "worst_iou":
                return np.fmin.reduce(scores, axis=-1)  # not those that are NaN
            case "mean_iou":
                return expected(scores, np.ones_like(prior))
            case "expected_iou":
                return expected(scores, prior)
            case "full_iou":
                return scores[..., -1]
        raise InputError(f"metric: expected one of {METRICS}, found {name!r}")


def whole_replicates(records: pd.DataFrame) -> pd.DataFrame:
    """Leave out the seeds of a method that do not have all folds yet.

    A study that is still running has such seeds; their pooled counts would be over other blocks.

    Args:
        records: With dataset, backbone, method, seed, fold.
    """
    keys = ["dataset", "backbone"]
    wanted = records.groupby(keys)["fold"].transform("nunique")
    found = records.groupby([*keys, "method", "seed"])["fold"].transform("nunique")
    return records[found == wanted].reset_index(drop=True)


def contrast(
    records: pd.DataFrame,
    scenarios: ScenarioSet,
    method: str,
    reference: Sequence[str],
    metric: str,
    prior: Array | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Difference of a method to the mean of reference methods, with its bootstrap interval.

    Args:
        records: Of one data set and backbone.
        scenarios: K of them.
        method: Name.
        reference: Names; their metrics are averaged within every replicate.
        metric: One of `METRICS`.
        prior: For expected_iou, [K]; None is uniform.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        replicates, blocks, difference, low and high (95 %, percentiles), standard_error, p
        (two-sided, from the same draws) and detectable, the smallest true difference that this
        design finds with a power of 80 %.

    Raises:
        InputError: Too few replicates or blocks, or records that are not paired.
    """
    counts = Counts.of(records, [method, *reference], scenarios)
    if len(counts.seeds) < 2 or len(counts.blocks) < 2:
        raise InputError(
            f"contrast: expected at least 2 replicates and 2 blocks, found {len(counts.seeds)} "
            f"and {len(counts.blocks)}"
        )
    weighted = np.full(len(scenarios), 1 / len(scenarios)) if prior is None else prior

    def difference(blocks: NDArray[np.int64], seeds: NDArray[np.int64], axis: int) -> Array:
        weights = _weights(blocks, len(counts.blocks))
        values = counts.metric(metric, weights, weighted)
        paired = values[:, 0] - values[:, 1:].mean(axis=1)  # (R, S)
        drawn = _weights(seeds, len(counts.seeds))
        return (paired * drawn).sum(axis=1) / drawn.sum(axis=1)

    if len(counts.blocks) < FEWEST_BLOCKS:
        warnings.warn(
            f"{len(counts.blocks)} spatial blocks: intervals over fewer than {FEWEST_BLOCKS} are "
            "not to be trusted",
            stacklevel=2,
        )
    all_blocks, all_seeds = np.arange(len(counts.blocks)), np.arange(len(counts.seeds))
    found = scipy.stats.bootstrap(
        (all_blocks, all_seeds),
        lambda blocks, seeds, axis: difference(
            np.atleast_2d(blocks), np.atleast_2d(seeds), axis
        ).reshape(blocks.shape[:-1]),
        n_resamples=resamples,
        batch=50,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    drawn = found.bootstrap_distribution
    below, above = (drawn <= 0).sum(), (drawn >= 0).sum()
    return {
        "replicates": len(counts.seeds),
        "blocks": len(counts.blocks),
        "difference": float(difference(all_blocks[None], all_seeds[None], -1)[0]),
        "low": float(found.confidence_interval.low),
        "high": float(found.confidence_interval.high),
        "standard_error": float(found.standard_error),
        "p": float(min(1.0, 2 * (min(below, above) + 1) / (len(drawn) + 1))),
        "detectable": DETECTABLE * float(found.standard_error),
    }


def differences(
    records: pd.DataFrame,
    scenarios: ScenarioSet,
    metrics: Sequence[str] = METRICS,
    prior: Array | None = None,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Difference of every method to uniform, per data set and backbone.

    Args:
        records: With dataset, backbone, seed, fold, method, block, scenario, class and counts.
        scenarios: K of them.
        metrics: Some of `METRICS`.
        prior: For expected_iou, [K].
        resamples: Of the bootstrap.

    Returns:
        dataset, backbone, metric, method, reference, what `contrast` gives, and p_holm, corrected
        over the methods of a data set, backbone and metric (the second uniform arm, whose row is
        the noise floor, is not one of them). Methods that share fewer than two replicates
        with their reference are left out.
    """

    def wanted(present: list[str]) -> Iterator[Named]:
        arms = [name for name in UNIFORM_ARMS if name in present]
        for name in present:
            reference = [arm for arm in arms[:1] if arm != name] if name in arms else arms
            yield {"method": name, "reference": "+".join(reference)}, name, reference

    return _contrasts(records, scenarios, wanted, metrics, prior, resamples)


def planned(
    records: pd.DataFrame,
    scenarios: ScenarioSet,
    contrasts: str,
    metrics: Sequence[str],
    prior: Array | None = None,
    resamples: int = 2000,
) -> pd.DataFrame:
    """The contrasts that were fixed beforehand, per data set and backbone that has their methods.

    Args:
        records: As in `differences`.
        scenarios: K of them.
        contrasts: Such as "lsgs-uniform, lsgs-cardinality"; uniform is the mean of its arms.
        metrics: Some of `METRICS`.
        prior: For expected_iou, [K].
        resamples: Of the bootstrap.

    Returns:
        dataset, backbone, metric, contrast, what `contrast` gives, and p_holm, corrected over the
        contrasts of a data set, backbone and metric.

    Raises:
        InputError: A contrast that is not two methods with a hyphen between them, or a method that
            there is not.
    """
    pairs = [tuple(part.strip().split("-")) for part in contrasts.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise InputError(f"contrasts: expected such as 'lsgs-uniform', found {contrasts!r}")
    known = {*METHODS, *records["method"]}
    if unknown := sorted({name for pair in pairs for name in pair} - known):
        raise InputError(f"contrasts: no method {unknown[0]!r}; there are {sorted(known)}")

    def wanted(present: list[str]) -> Iterator[Named]:
        arms = [name for name in UNIFORM_ARMS if name in present]
        for method, other in pairs:
            reference = arms if other == "uniform" else [other]
            yield {"contrast": f"{method} - {other}"}, method, reference

    return _contrasts(records, scenarios, wanted, metrics, prior, resamples)


def _contrasts(
    records: pd.DataFrame,
    scenarios: ScenarioSet,
    wanted: Callable[[list[str]], Iterator[Named]],
    metrics: Sequence[str],
    prior: Array | None,
    resamples: int,
) -> pd.DataFrame:
    """The contrasts wanted of the methods that are there, where they share two seeds or more."""
    rows = []
    for (dataset, backbone), part in records.groupby(["dataset", "backbone"], sort=False):
        seeds = part.groupby("method", sort=False)["seed"].agg(set)
        for metric in metrics:
            table: list[dict[str, Any]] = []
            for named, method, reference in wanted(list(seeds.index)):
                shared = [seeds.get(name, set()) for name in [method, *reference]]
                if not reference or len(set.intersection(*shared)) < 2:
                    continue
                found = contrast(part, scenarios, method, reference, metric, prior, resamples)
                keys = {"dataset": dataset, "backbone": backbone, "metric": metric}
                table.append({**keys, **named, **found})
            judged = [row for row in table if row.get("method") not in UNIFORM_ARMS]
            for row, p in zip(judged, holm([row["p"] for row in judged]), strict=True):
                row["p_holm"] = p
            rows += table
    return pd.DataFrame(rows)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Holm 1979): adjusted p-values, in the order given."""
    order = np.argsort(p_values, kind="stable")
    steps = np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(np.asarray(p_values)[order] * steps))
    return adjusted.tolist()


def _weights(drawn: NDArray[np.int64], count: int) -> Array:
    """How often each of `count` was drawn, [R, count], for draws [R, n]."""
    flat = drawn + count * np.arange(len(drawn))[:, None]
    return np.bincount(flat.ravel(), minlength=count * len(drawn)).reshape(-1, count).astype(float)
