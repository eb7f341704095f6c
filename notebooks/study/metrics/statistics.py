"""Differences between methods, with intervals over replicates and spatial blocks.

A replicate is a seed, with the held-out counts of all folds pooled: in a tier with
`pretraining_seed: -1` it is a pretrained network of its own, in others a fine-tuning of a network
that all replicates share, whose intervals do not tell how results vary with the pretraining.
Methods are compared within replicates, which share initial weights, order of the data and random
numbers. The bootstrap resamples seeds and blocks; a resampled block is the same for all methods.
"Uniform" is the mean of its arms, and the difference between the arms is the noise floor.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
import scipy.optimize
import scipy.special
import scipy.stats
from numpy.typing import NDArray

from lsgs_core.errors import Floats, InputError
from lsgs_core.methods import METHODS, find_method
from lsgs_core.scenarios import ScenarioSet
from study.metrics.evaluation import COUNTS, SUMMARIES, expected

# Names of the metrics, and their titles in figures and tables.
METRICS = {
    "worst_iou": "worst scenario",
    "lowest_quarter_iou": "lowest quarter of the scenarios",
    "mean_iou": "mean over scenarios",
    "expected_iou": "expected in deployment",
    "full_iou": "all modalities",
}
UNIFORM_ARMS = ("uniform", "uniform_again")
FEWEST_BLOCKS = 9
# Two-sided 5 %, power 80 %: normal quantiles 1.96 + 0.84.
DETECTABLE = float(scipy.stats.norm.ppf(0.975) + scipy.stats.norm.ppf(0.8))


def method_title(method: str) -> str:
    """Return the title of a method in figures and tables."""
    if method == "pretrained":
        return "before fine-tuning"
    return find_method(method).title if method.partition("@")[0] in METHODS else method


@dataclass(frozen=True)
class Counts:
    """Records of one data set and backbone as an array, for the seeds that all methods have."""

    seeds: list[int]  # the S replicates
    blocks: list[int]  # the B spatial blocks
    values: Floats  # tp, fp, fn, [B, M, S, K, C, 3]

    @classmethod
    def of(cls, records: pd.DataFrame, methods: Sequence[str], scenarios: ScenarioSet) -> Self:
        """Put the records of one data set and backbone into an array.

        Records have the columns seed, fold, method, block, scenario, class, tp, fp and fn. Raises
        `InputError` where no seed has all methods, or a seed lacks a fold or block.
        """
        rows = records[records["method"].isin(list(methods))]
        seeds_of = rows.groupby("method")["seed"].agg(set)
        seeds = sorted(set.intersection(*(seeds_of.get(name, set()) for name in methods)))
        if not seeds:
            raise InputError(f"records: expected a seed with all methods of {list(methods)}")
        if not set(rows["scenario"]) <= set(scenarios.names):
            raise InputError(f"records: expected the scenarios {list(scenarios.names)}")
        rows = rows[rows["seed"].isin(seeds)]
        axes: dict[str, list[Any]] = {
            "block": sorted(rows["block"].unique()),
            "method": list(methods),
            "seed": seeds,
            "scenario": list(scenarios.names),
            "class": list(dict.fromkeys(rows["class"])),
        }
        combinations = pd.MultiIndex.from_product(list(axes.values()), names=list(axes))
        table = rows.groupby(list(axes))[COUNTS].sum().reindex(combinations)
        if missing := int(table["tp"].isna().sum()):
            raise InputError(
                f"records: of {len(table)} combinations of {list(axes)}, {missing} are "
                "missing; every method needs the same folds in every seed"
            )
        values = table.to_numpy(dtype=np.float64).reshape(*map(len, axes.values()), 3)
        return cls(seeds, axes["block"], values)

    def scenario_iou(self, weights: Floats) -> Floats:
        """Return the IoU of every scenario, averaged over classes, float64 [R, M, S, K].

        A class, and then a scenario, without any pixel in truth and prediction is left out. Weights
        are those of the blocks, [R, B].
        """
        shape = self.values.shape[1:]
        pooled = (weights @ self.values.reshape(len(self.values), -1)).reshape(-1, *shape)
        union = pooled.sum(axis=-1)
        iou = np.divide(pooled[..., 0], union, out=np.full(union.shape, np.nan), where=union > 0)
        return expected(iou, np.ones(iou.shape[-1]))


def whole_replicates(records: pd.DataFrame) -> pd.DataFrame:
    """Leave out the seeds of a method that lack folds, as in a study that is still running."""
    keys = ["dataset", "backbone"]
    wanted = records.groupby(keys)["fold"].transform("nunique")
    present = records.groupby([*keys, "method", "seed"])["fold"].transform("nunique")
    return records[present == wanted].reset_index(drop=True)


def common_replicates(table: pd.DataFrame) -> pd.DataFrame:
    """Keep the seeds that have most methods of their data set and backbone, if possible all."""
    keys = ["dataset", "backbone"]
    methods = table.groupby([*keys, "seed"])["method"].transform("nunique")
    most = methods.groupby([table[key] for key in keys]).transform("max")
    return table[methods == most].reset_index(drop=True)


def contrast(
    records: pd.DataFrame,
    scenarios: ScenarioSet,
    method: str,
    reference: Sequence[str],
    metric: str,
    prior: Floats | None = None,
    resamples: int = 2000,
) -> dict[str, Any]:
    """Compute the difference of a method to reference methods, with its bootstrap interval.

    Args:
        records: Records of one data set and backbone.
        scenarios: The K scenarios.
        method: Name of the method.
        reference: Names of the methods whose metrics are averaged in every replicate.
        metric: One of `METRICS`.
        prior: Probability of every scenario, [K], for expected_iou; None is uniform.
        resamples: Number of bootstrap resamples.

    Returns:
        replicates, blocks, difference, low and high (95 %, percentiles), standard_error, p
        (two-sided, of the same resamples) and detectable, the smallest true difference that has a
        power of 80 %. Raises `InputError` for fewer than two replicates or blocks.
    """
    counts = Counts.of(records, [method, *reference], scenarios)
    replicates, blocks = len(counts.seeds), len(counts.blocks)
    if replicates < 2 or blocks < 2:
        found = f"{replicates} and {blocks}"
        raise InputError(f"contrast: expected at least 2 replicates and 2 blocks, found {found}")
    if blocks < FEWEST_BLOCKS:
        message = f"{blocks} spatial blocks: intervals of fewer than {FEWEST_BLOCKS} are unreliable"
        warnings.warn(message, stacklevel=2)
    weights = np.full(len(scenarios), 1 / len(scenarios)) if prior is None else prior

    def difference(
        drawn_blocks: NDArray[np.int64], drawn_seeds: NDArray[np.int64], axis: int = -1
    ) -> Floats:
        iou = counts.scenario_iou(_frequencies(drawn_blocks, blocks))
        values = SUMMARIES[metric](iou, weights)  # (R, M, S)
        paired = values[:, 0] - values[:, 1:].mean(axis=1)  # (R, S)
        drawn = _frequencies(drawn_seeds, replicates)
        means = (paired * drawn).sum(axis=1) / drawn.sum(axis=1)
        return means.reshape(drawn_blocks.shape[:-1])

    sample = np.arange(blocks), np.arange(replicates)
    bootstrap = scipy.stats.bootstrap(
        sample, difference, n_resamples=resamples, batch=50, method="percentile", vectorized=True,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    resampled = bootstrap.bootstrap_distribution
    resampled = resampled[np.isfinite(resampled)]  # of rare classes, some have no pixel at all
    low, high = np.percentile(resampled, [2.5, 97.5])
    smaller_side = min((resampled <= 0).sum(), (resampled >= 0).sum())
    p = float(min(1.0, 2 * (smaller_side + 1) / (len(resampled) + 1)))
    error = float(resampled.std(ddof=1))
    return {
        "replicates": replicates, "blocks": blocks, "difference": float(difference(*sample)),
        "low": float(low), "high": float(high),
        "standard_error": error, "p": p, "detectable": DETECTABLE * error,
    }  # fmt: skip


def differences(
    records: pd.DataFrame,
    scenarios: ScenarioSet,
    metrics: Iterable[str] = METRICS,
    prior: Floats | None = None,
    resamples: int = 2000,
    contrasts: str | None = None,
) -> pd.DataFrame:
    """Compute differences between methods, per data set, backbone and metric.

    A difference of methods that share fewer than two replicates or blocks is left out.

    Args:
        records: The columns dataset, backbone, and those of `Counts.of`.
        scenarios: The K scenarios.
        metrics: Some of `METRICS`.
        prior: As in `contrast`.
        resamples: Number of bootstrap resamples.
        contrasts: Pairs of methods that were fixed beforehand, such as "lsgs-uniform, lora-lsgs";
            uniform is the mean of its arms. None compares every method with uniform.

    Returns:
        The columns dataset, backbone, metric, contrast (or, without contrasts, method and
        reference), those of the function `contrast`, and p_holm, corrected over the rows of a data
        set, backbone and metric, except the second uniform arm, whose row is the noise floor.
    """
    pairs = None if contrasts is None else planned_pairs(contrasts)
    rows = []
    for (dataset, backbone), part in records.groupby(["dataset", "backbone"], sort=False):
        seeds = part.groupby("method", sort=False)["seed"].agg(set)
        arms = [name for name in UNIFORM_ARMS if name in seeds]
        others = [name for name in seeds.index if name != UNIFORM_ARMS[0]]
        for metric in metrics:
            table: list[dict[str, Any]] = []
            for method, other in pairs or [(name, "uniform") for name in others]:
                reference = [a for a in arms if a != method] if other == "uniform" else [other]
                shared = set.intersection(*(seeds.get(m, set()) for m in [method, *reference]))
                if not reference or len(shared) < 2 or part["block"].nunique() < 2:
                    continue
                row = {"dataset": dataset, "backbone": backbone, "metric": metric}
                if pairs:
                    row["contrast"] = f"{method} - {other}"
                else:
                    row |= {"method": method, "reference": "+".join(reference)}
                row |= contrast(part, scenarios, method, reference, metric, prior, resamples)
                table.append(row)
            judged = [row for row in table if row.get("method") not in UNIFORM_ARMS]
            for row, p in zip(judged, holm([row["p"] for row in judged]), strict=True):
                row["p_holm"] = p
            rows += table
    return pd.DataFrame(rows)


def planned_pairs(contrasts: str) -> list[tuple[str, str]]:
    """Return the pairs of methods of a text such as "lsgs-uniform", or raise `InputError`."""
    pairs = []
    for part in contrasts.split(","):
        first, hyphen, second = part.strip().partition("-")
        if not hyphen or "-" in second or first == second or (first, second) in pairs:
            raise InputError(
                f"contrasts: expected different ones such as 'lsgs-uniform', found {contrasts!r}"
            )
        try:
            for name in {first, second} - {"pretrained"}:
                find_method(name)
        except InputError as error:
            raise InputError(f"contrasts: {error}") from None
        pairs.append((first, second))
    return pairs


def pooled(differences: Sequence[float], standard_errors: Sequence[float]) -> dict[str, float]:
    """Put the differences of several cases together in a random-effects analysis.

    The true difference of a case is taken for a draw from N(mean, spread^2). The spread is that
    where Cochran's Q equals its expectation (Paule and Mandel 1982), its interval that of the
    Q profile (Viechtbauer 2007), and the interval of the mean that of Hartung and Knapp (2001),
    which allows for few cases. Raises `InputError` for fewer than three, or an error of zero.

    Returns:
        cases, mean, low and high (95 %), spread, spread_low and spread_high, new_low and new_high
        (95 % prediction interval for the difference in a new case), and positive, the number of
        cases with a difference above 0.
    """
    effect, variance = np.array(differences), np.square(standard_errors)
    count = len(effect)
    if count < 3 or not (variance > 0).all():
        raise InputError(f"pooled: expected at least 3 cases with standard errors, found {count}")

    def weighted(spread: float) -> tuple[float, Floats, float]:
        weights = 1 / (variance + spread**2)
        mean = float((weights * effect).sum() / weights.sum())
        return mean, weights, float((weights * np.square(effect - mean)).sum())

    def spread_where(q: float) -> float:
        if weighted(0.0)[2] <= q:  # Q falls with the spread
            return 0.0
        most = float(np.ptp(effect)) + 1e-12
        while weighted(most)[2] > q:
            most *= 2
        return float(scipy.optimize.brentq(lambda spread: weighted(spread)[2] - q, 0.0, most))

    spread = spread_where(count - 1)
    mean, weights, q = weighted(spread)
    error = np.sqrt(max(q / (count - 1), 1.0) / weights.sum())  # never below that of fixed effects
    half = scipy.stats.t.ppf(0.975, count - 1) * error
    new = scipy.stats.t.ppf(0.975, max(1, count - 2)) * np.hypot(error, spread)
    ends = [spread_where(scipy.stats.chi2.ppf(share, count - 1)) for share in (0.975, 0.025)]
    return {
        "cases": count, "mean": mean, "low": mean - half, "high": mean + half,
        "spread": spread, "spread_low": ends[0], "spread_high": ends[1],
        "new_low": mean - new, "new_high": mean + new, "positive": int((effect > 0).sum()),
    }  # fmt: skip


def sensor_values(
    records: pd.DataFrame, scenarios: ScenarioSet, method: str, empty: float, resamples: int = 2000
) -> pd.DataFrame:
    """Compute what each sensor is worth: its Shapley value in the IoU of all subsets.

    The value of modality m is the mean, over all orders in which the modalities can be added, of
    the IoU that m adds (Shapley 1953). All values sum to the IoU with every modality minus that of
    the trivial predictor, `empty`.

    Returns:
        One row per modality: modality, value, low and high (95 %, of resampled blocks and seeds).
    """
    counts = Counts.of(records, [method], scenarios)
    masks, number = scenarios.masks, len(scenarios.modalities)
    size = masks.sum(axis=1)
    # Weight of a subset of n modalities for one that it holds, and for one that it lacks.
    orders = scipy.special.factorial(np.arange(number + 1))
    held = orders[size - 1] * orders[number - size] / orders[number]
    lacking = orders[size] * orders[np.maximum(number - size - 1, 0)] / orders[number]
    weights = np.where(masks, held[:, None], -lacking[:, None])  # [K, M]
    random = np.random.default_rng(0)

    def values(blocks: NDArray[np.int64], seeds: NDArray[np.int64]) -> Floats:
        iou = counts.scenario_iou(_frequencies(blocks, len(counts.blocks)))[:, 0]  # [R, S, K]
        drawn = _frequencies(seeds, len(counts.seeds))[..., None]
        mean = (iou * drawn).sum(axis=1) / drawn.sum(axis=1)
        return mean @ weights - empty / number

    lengths = len(counts.blocks), len(counts.seeds)
    drawn = [random.integers(length, size=(resamples, length)) for length in lengths]
    parts = [slice(first, first + 50) for first in range(0, resamples, 50)]
    resampled = np.concatenate([values(drawn[0][part], drawn[1][part]) for part in parts])
    low, high = np.nanpercentile(resampled, [2.5, 97.5], axis=0)
    [value] = values(*(np.arange(length)[None] for length in lengths))
    columns = {"modality": scenarios.modalities, "value": value, "low": low, "high": high}
    return pd.DataFrame(columns)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values after Holm's step-down correction (Holm 1979), in the same order."""
    order = np.argsort(p_values, kind="stable")
    steps = np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(np.asarray(p_values)[order] * steps))
    return adjusted.tolist()


def rank_correlation(table: pd.DataFrame, column: str) -> float:
    """Return Spearman's correlation of a column with the column lost, as a mean over networks."""
    networks = [rows for _, rows in table.groupby(["fold", "network"])]
    found = (correlation(r[column].to_numpy(), r["lost"].to_numpy(), "spearman") for r in networks)
    return float(np.mean([*found]))


def correlation(
    first: Floats, second: Floats, method: Literal["pearson", "spearman"] = "pearson"
) -> float:
    """Return a correlation, NaN where one of both is constant but for rounding."""
    if min(np.ptp(first), np.ptp(second)) < 1e-12:
        return float("nan")
    return float(pd.Series(first).corr(pd.Series(second), method=method))


def _frequencies(drawn: NDArray[np.int64], count: int) -> Floats:
    """Return how often each of `count` indices was drawn, [R, count], for draws [R, n] or [n]."""
    rows = drawn.reshape(-1, drawn.shape[-1])
    flat = rows + count * np.arange(len(rows))[:, None]
    return np.bincount(flat.ravel(), minlength=count * len(rows)).reshape(-1, count).astype(float)
