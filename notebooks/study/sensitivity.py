"""What the probabilities depend on: the settings, the smoothing, and which patches were scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lsgs_core.probabilities import (
    rbf_kernel,
    scenario_probabilities,
    smooth_scores,
    total_variation,
)
from lsgs_core.randomness import generator

# Values that each setting is varied over, one at a time; lengthscales are multiples of the median
# distance between scenarios, since distortions differ by orders of magnitude between backbones.
VARIED: dict[str, tuple[float, ...]] = {
    "inverse_temperature": (0.0, 0.25, 0.5, 1.0, 2.0, 4.0),
    "mixing": (0.0, 0.25, 0.5, 0.75, 1.0),
    "ridge": (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0),
    "lengthscale": (0.01, 0.1, 0.3, 1.0, 3.0, 10.0),
}
FEWEST_BLOCKS = 8  # a standard error over fewer clusters is not to be trusted
ToProbabilities = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def smoothing_report(
    distortion: NDArray[np.float64], settings: Mapping[str, Any]
) -> dict[str, float]:
    """What the smoothing did, in numbers.

    Args:
        distortion: D, [K].
        settings: Of `scenario_probabilities`.

    Returns:
        total_variation_from_unsmoothed: between p and what r = U gives;
        total_variation_from_prior: between p and what it is mixed with;
        effective_scenarios: exp of the entropy of p, from 1 to K;
        degrees_of_freedom: trace of K (K + lambda I)^-1, K (the number) when nothing is smoothed;
        kernel_condition: condition number of K + lambda I.
    """
    result = scenario_probabilities(distortion, **settings)
    unsmoothed = scenario_probabilities(distortion, **{**settings, "smooth": False})
    p, ridge, identity = result.probabilities, settings["ridge"], np.eye(len(distortion))
    positive = p[p > 0]
    kept = (
        smooth_scores(result.kernel, identity, ridge) if settings.get("smooth", True) else identity
    )
    return {
        "total_variation_from_unsmoothed": total_variation(p, unsmoothed.probabilities),
        "total_variation_from_prior": total_variation(p, result.prior),
        "effective_scenarios": float(np.exp(-(positive * np.log(positive)).sum())),
        "degrees_of_freedom": float(np.trace(kept)),
        "kernel_condition": float(np.linalg.cond(result.kernel + ridge * identity)),
    }


def sensitivity(distortion: NDArray[np.float64], settings: Mapping[str, Any]) -> pd.DataFrame:
    """Probabilities when one setting is varied and the others stay; nothing is scored again.

    Args:
        distortion: D, [K].
        settings: Of `scenario_probabilities`, from which each of `VARIED` departs.

    Returns:
        Columns setting, value, scenario (its index), probability. Lengthscales are given as
        multiples of the median distance between scenarios.
    """
    descriptors = settings.get("descriptors")
    _, median = rbf_kernel(distortion if descriptors is None else descriptors, "median")
    rows = []
    for setting, values in VARIED.items():
        for value in values:
            used = value * median if setting == "lengthscale" else value
            result = scenario_probabilities(distortion, **{**settings, setting: used})
            for scenario, p in enumerate(result.probabilities):
                rows.append((setting, value, scenario, p))
    return pd.DataFrame(rows, columns=["setting", "value", "scenario", "probability"])


def bootstrap_probabilities(
    patch_distortion: NDArray[np.float64],
    blocks: NDArray[np.int64],
    probabilities: ToProbabilities,
    resamples: int = 1000,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Probabilities of resampled scorings: whole spatial blocks are drawn with replacement.

    Neighbouring patches overlap, so the block is what is independent. Descriptors other than the
    distortion stay as they were measured.

    Args:
        patch_distortion: d_k(x), [N, K].
        blocks: Block of every patch, [N].
        probabilities: From D [K] to p [K].
        resamples: How many, R.
        seed: Of the draws.

    Returns:
        float64 [R, K]; standard deviations over R are the standard errors of p.
    """
    labels, position = np.unique(blocks, return_inverse=True)
    sums = np.zeros((len(labels), patch_distortion.shape[1]))
    np.add.at(sums, position, patch_distortion)
    sizes = np.bincount(position)
    random = generator("bootstrap", seed)
    share = np.full(len(labels), 1 / len(labels))
    weights = random.multinomial(len(labels), share, size=resamples)
    distortions = (weights @ sums) / (weights @ sizes)[:, None]
    return np.array([probabilities(distortion) for distortion in distortions])


def known_to(
    tolerance: float, probabilities: ToProbabilities
) -> Callable[[NDArray[np.float64], NDArray[np.int64]], bool]:
    """When scoring may stop: the standard error of every p is at most the tolerance.

    For `score_scenarios(..., until=...)`, over patches in random order. Stopping at a look that
    happens to be favourable makes the error a little optimistic.

    Args:
        tolerance: Largest standard error that is allowed.
        probabilities: From D [K] to p [K].
    """

    def enough(patch_distortion: NDArray[np.float64], blocks: NDArray[np.int64]) -> bool:
        if len(np.unique(blocks)) < FEWEST_BLOCKS:
            return False
        drawn = bootstrap_probabilities(patch_distortion, blocks, probabilities, resamples=200)
        return bool((drawn.std(axis=0, ddof=1) <= tolerance).all())

    return enough
