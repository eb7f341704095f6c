"""From distortions to scenario probabilities: the mathematics of the method, numpy and scipy alone.

Source of the formulas: arXiv 2605.20372, section on scenario scoring. What is added to the paper
is named where it stands: a prior over the scenarios, other descriptors than the distortion, the
median heuristic, and a cutoff relative to the size of the scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.linalg
import scipy.spatial.distance
import scipy.special
from numpy.typing import ArrayLike, NDArray

from lsgs_core.errors import InputError

Lengthscale = float | Literal["median"]

# A spread of the scores below this fraction of their size is rounding, not preference.
RELATIVE_SPREAD_CUTOFF = 1e-12


@dataclass(frozen=True)
class ScenarioProbabilities:
    """The steps from distortion to probability, each float64 over the K scenarios.

    Attributes:
        utility: U = direction * D, [K].
        kernel: RBF kernel between scenarios, [K, K].
        smoothed: Kernel-smoothed scores r, [K]; equal to `utility` without smoothing.
        standardised: r with mean 0 and population standard deviation 1, [K].
        softmax: q, proportional to prior * exp(inverse_temperature * standardised), [K].
        probabilities: p = (1 - mixing) * prior + mixing * q, [K].
        prior: The distribution that p is mixed with, [K]; uniform in the paper.
        lengthscale: The lengthscale used, after the median heuristic if that was asked for.
    """

    utility: NDArray[np.float64]
    kernel: NDArray[np.float64]
    smoothed: NDArray[np.float64]
    standardised: NDArray[np.float64]
    softmax: NDArray[np.float64]
    probabilities: NDArray[np.float64]
    prior: NDArray[np.float64]
    lengthscale: float


def scenario_probabilities(
    distortion: ArrayLike,
    direction: float = 1,
    lengthscale: Lengthscale = 1.0,
    ridge: float = 1e-3,
    inverse_temperature: float = 0.5,
    mixing: float = 0.5,
    prior: ArrayLike | None = None,
    descriptors: ArrayLike | None = None,
    smooth: bool = True,
) -> ScenarioProbabilities:
    """Turn the distortion of every scenario into the probability of drawing it.

    With the defaults these are the paper's values: alpha = 1, sigma = 1, lambda = 1e-3, tau = 0.5,
    gamma = 0.5, and the distortion itself as the descriptor that the kernel compares.

    Args:
        distortion: D, one finite non-negative number per scenario, [K].
        direction: The paper's alpha. Only its sign matters, since the standardisation cancels its
            size: positive prefers scenarios of high distortion, negative those of low.
        lengthscale: Of the RBF kernel, in units of the descriptors; "median" takes the median of
            the non-zero distances between scenarios.
        ridge: Lambda of the kernel ridge regression, positive.
        inverse_temperature: Tau, non-negative: 0 gives q = prior, larger values sharpen q.
        mixing: Gamma in [0, 1]: weight of q against the prior.
        prior: Probability of every scenario in deployment, [K], normalised here; None is uniform,
            the paper's case. A scenario of prior 0 is never drawn.
        descriptors: What the kernel compares, [K] or [K, F]; None takes the distortion (the paper).
        smooth: False skips the smoothing (r = U).

    Returns:
        Every step of the computation; `probabilities` sums to 1.

    Raises:
        InputError: An argument of the wrong shape, not finite, or out of its range.
    """
    distances_from = _vector("distortion", distortion)
    if (distances_from < 0).any():
        raise InputError("distortion: expected no negative number, a mean of squares has none")
    count = distances_from.size
    _check("direction", direction, direction != 0, "a number other than 0")
    _check("ridge", ridge, ridge > 0, "a positive number")
    _check("inverse_temperature", inverse_temperature, inverse_temperature >= 0, "0 or more")
    _check("mixing", mixing, 0 <= mixing <= 1, "a number from 0 to 1")
    base = _distribution(prior, count)

    utility = float(direction) * distances_from
    kernel, width = rbf_kernel(distances_from if descriptors is None else descriptors, lengthscale)
    if kernel.shape[0] != count:
        raise InputError(f"descriptors: expected {count} rows, found {kernel.shape[0]}")
    smoothed = smooth_scores(kernel, utility, ridge) if smooth else utility.copy()
    standardised = standardise(smoothed)
    # exp() of a shifted logit, so that a large inverse temperature cannot overflow
    with np.errstate(divide="ignore"):
        logits = np.log(base) + inverse_temperature * standardised
    softmax = scipy.special.softmax(logits)
    return ScenarioProbabilities(
        utility=utility,
        kernel=kernel,
        smoothed=smoothed,
        standardised=standardised,
        softmax=softmax,
        probabilities=(1 - mixing) * base + mixing * softmax,
        prior=base,
        lengthscale=width,
    )


def scenario_descriptors(
    kind: str,
    masks: NDArray[np.bool_],
    distortion: ArrayLike,
    latent_shift: ArrayLike | None = None,
) -> NDArray[np.float64]:
    """What the kernel compares, by name.

    Args:
        kind: "distortion" (the paper), "latent_shift" or "availability".
        masks: Availability mask of every scenario, [K, M].
        distortion: D, [K].
        latent_shift: Mean shift of the latent per channel, [K, C].

    Returns:
        float64 [K, F].

    Raises:
        InputError: Another kind, or the latent shifts are wanted and not known.
    """
    known = {
        "distortion": np.asarray(distortion, dtype=np.float64)[:, None],
        "availability": masks.astype(np.float64),
    }
    if latent_shift is not None:
        known["latent_shift"] = np.asarray(latent_shift, dtype=np.float64)
    if kind not in known:
        raise InputError(f"descriptor: expected one of {sorted(known)}, found {kind!r}")
    return known[kind]


def rbf_kernel(
    descriptors: ArrayLike, lengthscale: Lengthscale
) -> tuple[NDArray[np.float64], float]:
    """RBF kernel between scenarios, exp(-|x_i - x_j|^2 / (2 lengthscale^2)).

    Args:
        descriptors: One row per scenario, [K] or [K, F].
        lengthscale: A positive number, or "median" for the median of the non-zero distances.

    Returns:
        The kernel, float64 [K, K], and the lengthscale that was used.

    Raises:
        InputError: Descriptors that are not finite, or a lengthscale that is neither.
    """
    rows = np.asarray(descriptors, dtype=np.float64)
    rows = rows[:, None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise InputError(f"descriptors: expected finite [K] or [K, F], found shape {rows.shape}")
    distances = scipy.spatial.distance.squareform(scipy.spatial.distance.pdist(rows))
    if lengthscale == "median":
        apart = distances[distances > 0]
        # All scenarios alike: every lengthscale gives the same kernel of ones.
        width = float(np.median(apart)) if apart.size else 1.0
    elif isinstance(lengthscale, str):
        raise InputError(f"lengthscale: expected a number or 'median', found {lengthscale!r}")
    else:
        _check("lengthscale", lengthscale, lengthscale > 0, "a positive number or 'median'")
        width = float(lengthscale)
    # Divided before squaring: tiny lengthscales would underflow when squared first.
    return np.exp(-0.5 * np.square(distances / width)), width


def smooth_scores(
    kernel: NDArray[np.float64], utility: NDArray[np.float64], ridge: float
) -> NDArray[np.float64]:
    """Kernel ridge regression at its own inputs, r = K (K + ridge I)^-1 U.

    Solved by Cholesky as r = U - ridge (K + ridge I)^-1 U, the same by algebra and without the
    product that loses digits when K is nearly singular.

    Args:
        kernel: Positive semi-definite, [K, K].
        utility: U, [K].
        ridge: Positive.

    Returns:
        r, float64 [K].
    """
    regularised = kernel + ridge * np.eye(len(kernel))
    return utility - ridge * scipy.linalg.cho_solve(scipy.linalg.cho_factor(regularised), utility)


def standardise(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Zero mean and unit population standard deviation over the scenarios.

    All zeros when the spread vanishes. The published cutoff is an absolute 1e-12, which makes p
    uniform for every distortion below about 2e-5; this one is relative to the size of the scores.
    Distortions below about 1e-7 of the lengthscale still end near uniform: their kernel is all ones
    but for rounding.
    """
    centred = scores - scores.mean()
    spread = centred.std()
    if spread <= RELATIVE_SPREAD_CUTOFF * np.abs(scores).max(initial=0.0):
        return np.zeros_like(scores)
    return centred / spread


def total_variation(first: ArrayLike, second: ArrayLike) -> float:
    """Total variation between two distributions over the scenarios, 0 to 1."""
    return 0.5 * float(np.abs(np.asarray(first) - np.asarray(second)).sum())


def _vector(name: str, values: ArrayLike) -> NDArray[np.float64]:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or vector.size < 2:
        raise InputError(f"{name}: expected one number per scenario, found shape {vector.shape}")
    if not np.isfinite(vector).all():
        raise InputError(f"{name}: expected finite numbers, found {vector.tolist()}")
    return vector


def _distribution(prior: ArrayLike | None, count: int) -> NDArray[np.float64]:
    if prior is None:
        return np.full(count, 1 / count)
    weights = _vector("prior", prior)
    if weights.size != count or (weights < 0).any() or weights.sum() <= 0:
        raise InputError(
            f"prior: expected {count} non-negative numbers, not all 0, found {weights.tolist()}"
        )
    return weights / weights.sum()


def _check(name: str, value: float, right: bool, expected: str) -> None:
    if not (np.isfinite(value) and right):
        raise InputError(f"{name}: expected {expected}, found {value!r}")
