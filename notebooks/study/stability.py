"""What part of p is signal: how far networks that differ by chance agree on probabilities."""

from collections.abc import Iterator
from itertools import permutations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lsgs_core.errors import InputError
from lsgs_core.probabilities import scenario_probabilities, total_variation

# Scores of a scenario that probabilities can be formed from, with their titles.
SCORES = {
    "distortion": "distortion of the latent (the paper)",
    "prediction_distortion": "distortion of the prediction",
    "missing": "number of missing modalities",
}


def stability(table: pd.DataFrame) -> pd.DataFrame:
    """Compare the probabilities of networks that differ in the seed of their pretraining alone.

    Args:
        table: One row per network and scenario: dataset, backbone, fold, network, scenario,
            missing, the scores, and lost (IoU with all modalities minus that of the scenario on
            test blocks). Every fold has at least two networks, or `InputError` is raised.

    Returns:
        One row per data set, backbone and score, with means over folds: the total variation
        `between` p of two networks, and of p `to_uniform`; the correlation between p of two
        networks `within` a number of missing modalities, whose mean is taken off; the variance over
        scenarios of the mean p, as a share of the mean variance of p (`common`); the rank
        correlation of the score with the IoU that its own network lost (`rank`) and that others
        lost (`rank_others`), and the correlation with that within a number of missing modalities
        (`within_others`). That number itself is the same for all networks: only its ranks matter.
    """
    rows = []
    for (dataset, backbone), part in table.groupby(["dataset", "backbone"], sort=False):
        for score in [name for name in SCORES if name in part]:
            folds = [_of_fold(fold, score) for _, fold in part.groupby("fold")]
            means = pd.DataFrame(folds).mean().to_dict()
            rows.append({"dataset": dataset, "backbone": backbone, "score": score, **means})
    return pd.DataFrame(rows)


def _of_fold(rows: pd.DataFrame, score: str) -> dict[str, float]:
    """Return the numbers of one fold; every table below is [networks, scenarios]."""
    scores, lost, missing = (
        rows.pivot_table(name, index="network", columns="scenario").to_numpy(dtype=float)
        for name in (score, "lost", "missing")
    )
    if len(scores) < 2:
        raise InputError("stability: expected at least two networks of every fold, found one")
    p = np.array([scenario_probabilities(values).probabilities for values in scores])
    groups, degraded = missing[0], missing[0] > 0  # the full scenario loses nothing by definition
    inner, inner_scores, inner_lost = (_within(values, groups) for values in (p, scores, lost))
    pairs = [*permutations(range(len(p)), 2)]
    uniform = np.full(p.shape[1], 1 / p.shape[1])
    return {
        "between": _mean(total_variation(p[i], p[j]) for i, j in pairs),
        "to_uniform": _mean(total_variation(values, uniform) for values in p),
        "within": _mean(_correlation(inner[i], inner[j]) for i, j in pairs),
        "common": float(p.mean(axis=0).var() / p.var(axis=1).mean()),
        "rank": _mean(_rank(scores[i][degraded], lost[i][degraded]) for i in range(len(p))),
        "rank_others": _mean(_rank(scores[i][degraded], lost[j][degraded]) for i, j in pairs),
        "within_others": _mean(_correlation(inner_scores[i], inner_lost[j]) for i, j in pairs),
    }


def _within(values: NDArray[np.float64], groups: NDArray[np.float64]) -> NDArray[np.float64]:
    """Take off the mean of every group of scenarios, in each row."""
    centred = values.copy()
    for group in np.unique(groups):
        centred[:, groups == group] -= values[:, groups == group].mean(axis=1, keepdims=True)
    return centred


def _mean(values: Iterator[float]) -> float:
    numbers = np.fromiter(values, dtype=np.float64)
    return float(numbers[~np.isnan(numbers)].mean()) if np.isfinite(numbers).any() else np.nan


def _correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Return Pearson's correlation, NaN where one of both is constant but for rounding."""
    if min(np.ptp(first), np.ptp(second)) < 1e-12:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def _rank(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Return Spearman's rank correlation."""
    return float(pd.Series(first).corr(pd.Series(second), method="spearman"))
