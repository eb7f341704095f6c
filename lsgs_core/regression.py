"""Scenarios that are not measured: Gaussian-process regression of D over the scenarios.

Of many modalities, only a designed subset of the 2^M - 1 scenarios is measured. The rest is
predicted by the kernel regression of the method's smoothing, K (K + ridge I)^-1, with a kernel on
availability: K_ij = exp(-sum of w_m over the modalities in which i and j differ), an RBF kernel
with a lengthscale for each modality, so that modalities of similar content count for little.
"""

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.spatial.distance import cdist

from lsgs_core.errors import Floats, array_of, check_count, check_type, real_numbers
from lsgs_core.scenarios import ScenarioSet


@dataclass(frozen=True)
class ScenarioRegression:
    """How the K scenarios follow from the S measured ones, which keep their values.

    Anything linear in D, such as d_k(x), is weights @ its S measured values.
    """

    weights: Floats  # [K, S]
    error: Floats  # standard deviation of the predicted D, [K]; 0 where measured


def measured_scenarios(scenarios: ScenarioSet, budget: int) -> NDArray[np.int64]:
    """Return which scenarios are measured, ascending indices, int64 [S].

    They are all with one modality, with all but one, and the full one. The others are shared out
    over the sizes in between, by the square root of how many each has, far from those taken so far.
    The budget S is at least 2 M + 1; 0, or as many as there are, takes all.
    """
    check_type("scenarios", scenarios, ScenarioSet)
    masks, sizes = scenarios.masks, scenarios.masks.sum(axis=1)
    modalities = masks.shape[1]
    if not check_count("scenario_budget", budget, 0) or budget >= len(masks):
        return np.arange(len(masks))
    check_count("scenario_budget", budget, 2 * modalities + 1)
    taken = np.isin(sizes, (1, modalities - 1, modalities))
    totals = np.bincount(sizes)

    def closeness(others: NDArray[np.bool_]) -> Floats:
        # Powers of two have exact sums, so that every machine takes the same scenarios.
        return (0.5 ** cdist(masks, others, "cityblock")).sum(axis=1)

    close = closeness(masks[taken])
    while taken.sum() < budget:
        counts = np.bincount(sizes[taken], minlength=len(totals))
        shares = np.where(counts < totals, (counts + 1) / np.sqrt(np.maximum(totals, 1)), np.inf)
        candidates = np.flatnonzero((sizes == shares.argmin()) & ~taken)
        chosen = candidates[close[candidates].argmin()]
        taken[chosen] = True
        close += closeness(masks[[chosen]])
    return np.flatnonzero(taken)


def regress_scenarios(
    masks: NDArray[np.bool_], measured: NDArray[np.int64], distortion: Floats
) -> ScenarioRegression:
    """Predict the scenarios that were not measured, with the likeliest kernel and ridge.

    D is taken for a sample of N(mean, s^2 (K + ridge I)) with the measured mean, and w and the
    ridge are those under which it is likeliest, with the likeliest s for each (Rasmussen and
    Williams 2006, chapters 2 and 5). As few scenarios say little of a single w, its logarithm has
    a normal prior with mean log(1 / M) and variance 1/2. The distortion is D of the measured
    scenarios, [S], of which at least two are different.
    """
    masks = array_of("masks", masks, "b", [None, None])
    measured = array_of("measured", measured, "iu", [None])
    check_count("measured", len(np.unique(measured)), 2, len(masks))
    for index in (measured.min(), measured.max()):
        check_count("measured", int(index), 0, len(masks) - 1)
    values = real_numbers("distortion", distortion, [len(measured)])
    count, modalities = len(values), masks.shape[1]
    differs = (masks[measured, None] != masks[measured]).astype(np.float64)  # (S, S, M)
    spread = values.std()
    centred = (values - values.mean()) / (spread or 1.0)
    usual = -np.log(modalities)

    def cost(logarithms: Floats) -> tuple[float, Floats]:
        """Return the negative logarithm of the likelihood and the prior, and its gradient."""
        weights, ridge = np.exp(logarithms[:-1]), np.exp(logarithms[-1])
        kernel = np.exp(-differs @ weights)
        inverse = np.linalg.inv(kernel + ridge * np.eye(count))
        solved = inverse @ centred
        variance = max(centred @ solved / count, np.finfo(np.float64).tiny)
        by_matrix = 0.5 * (inverse - np.outer(solved, solved) / variance)
        by_weight = -np.einsum("ij,ijm->m", by_matrix * kernel, differs) * weights
        far = logarithms[:-1] - usual
        likelihood = 0.5 * (count * np.log(variance) - np.linalg.slogdet(inverse)[1])
        by_ridge = np.trace(by_matrix) * ridge
        return likelihood + far @ far, np.append(by_weight + 2 * far, by_ridge)

    start = np.append(np.full(modalities, usual), np.log(0.01))
    bounds = [(-6.0, 1.0)] * modalities + [(-9.0, 3.0)]  # of logarithms
    best = np.exp(minimize(cost, start, jac=True, method="L-BFGS-B", bounds=bounds).x)
    scaled = masks * best[:-1]
    kernel = np.exp(-cdist(scaled, scaled[measured], "cityblock"))  # (K, S)
    factor = scipy.linalg.cho_factor(kernel[measured] + best[-1] * np.eye(count))
    weights = scipy.linalg.cho_solve(factor, kernel.T).T
    variance = centred @ scipy.linalg.cho_solve(factor, centred) / (count - 1)
    unexplained = 1 + best[-1] - (weights * kernel).sum(axis=1)
    error = spread * np.sqrt(variance * np.maximum(unexplained, 0.0))
    weights += (1 - weights.sum(axis=1, keepdims=True)) / count  # of the mean
    weights[measured], error[measured] = np.eye(count), 0.0
    return ScenarioRegression(weights, error)
