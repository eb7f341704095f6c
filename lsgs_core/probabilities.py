"""From distortions to scenario probabilities: the mathematics of the method, in numpy and scipy.

The formulas are those of arXiv 2605.20372, section on scenario scoring. The additions to the paper
are documented where they appear: a prior over the scenarios, descriptors other than the
distortion, the median heuristic, and a cutoff relative to the size of the scores.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.linalg
import scipy.spatial.distance
import scipy.special
from numpy.typing import ArrayLike, NDArray

from lsgs_core.errors import Floats, InputError, array_of, check_choice, check_number, real_numbers

Lengthscale = float | Literal["median"]

# A spread of scores below this fraction of their size is rounding error, not preference.
RELATIVE_SPREAD_CUTOFF = 1e-12
LARGE_RIDGE = 1e3  # from here on, the usual formula of the smoothing loses digits


@dataclass(frozen=True)
class ScenarioProbabilities:
    """Every step from distortion to probability, float64 arrays over the K scenarios.

    Attributes:
        utility: U = direction * D, [K].
        kernel: RBF kernel between scenarios, [K, K].
        smoothed: Kernel-smoothed scores r, [K]; equal to `utility` without smoothing.
        standardised: r with mean 0 and population standard deviation 1, [K].
        softmax: q, proportional to prior * exp(inverse_temperature * standardised), [K].
        probabilities: p = (1 - mixing) * prior + mixing * q, [K].
        prior: Distribution that is mixed with q, [K]; uniform in the paper.
        lengthscale: Lengthscale of the kernel, also where the median heuristic determined it.
    """

    utility: Floats
    kernel: Floats
    smoothed: Floats
    standardised: Floats
    softmax: Floats
    probabilities: Floats
    prior: Floats
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
    """Turn the distortion of each scenario into the probability of drawing it.

    The defaults are the paper's values: alpha = 1, sigma = 1, lambda = 1e-3, tau = 0.5,
    gamma = 0.5, and the distortion itself as the descriptor that the kernel compares.

    Args:
        distortion: D, one finite non-negative number per scenario, [K].
        direction: The paper's alpha. Its size cancels in the standardisation; a positive sign
            prefers scenarios of high distortion, a negative sign those of low distortion.
        lengthscale: As in `rbf_kernel`.
        ridge: The paper's lambda, the ridge of the kernel regression; positive.
        inverse_temperature: The paper's tau, non-negative. It is 0 for q = prior, and larger
            values concentrate q.
        mixing: The paper's gamma, the weight of q against the prior, from 0 to 1.
        prior: Probability of each scenario in deployment, [K], normalised here; None is the
            paper's uniform prior. A scenario of prior 0 is never drawn.
        descriptors: Features that the kernel compares, [K] or [K, F]; None takes the distortion.
        smooth: False skips the smoothing, so that r = U.
    """
    D = _scenario_numbers("distortion", distortion)
    count = D.size
    direction = check_number("direction", direction, lambda x: x != 0, "a number other than 0")
    tau = check_number("inverse_temperature", inverse_temperature, lambda x: x >= 0, "0 or more")
    mixing = check_number("mixing", mixing, lambda x: 0 <= x <= 1, "a number from 0 to 1")
    ridge = check_number("ridge", ridge, lambda x: x > 0, "a positive number")
    if not isinstance(smooth, bool | np.bool_):
        raise InputError.of("smooth", "True or False", smooth)
    weights = np.ones(count) if prior is None else _scenario_numbers("prior", prior)
    if weights.size != count or not weights.any():
        raise InputError.of("prior", f"{count} numbers, not all 0", prior)
    weights = weights / _unit(weights)
    base = weights / weights.sum()

    with np.errstate(over="ignore"):
        utility = direction * D
    if not np.isfinite(utility).all() or ((utility == 0) != (D == 0)).any():
        raise InputError(f"direction: its product with the distortion is out of range: {direction}")
    kernel, width = rbf_kernel(D if descriptors is None else descriptors, lengthscale)
    if kernel.shape[0] != count:
        raise InputError(f"descriptors: expected {count} rows, found {kernel.shape[0]}")
    smoothed = smooth_scores(kernel, utility, ridge) if smooth else utility.copy()
    standardised = standardise(smoothed)
    with np.errstate(divide="ignore", over="ignore"):  # the logarithm of a prior of 0
        logits = np.log(base) + tau * standardised
        if not (logits < np.inf).all():
            raise InputError(f"inverse_temperature: expected less than {tau!r}")
        softmax = scipy.special.softmax(logits)
    p = (1 - mixing) * base + mixing * softmax
    return ScenarioProbabilities(utility, kernel, smoothed, standardised, softmax, p, base, width)


def scenario_descriptors(
    kind: str,
    masks: NDArray[np.bool_],
    distortion: ArrayLike,
    latent_shift: ArrayLike | None = None,
) -> Floats:
    """Return the features that the kernel compares, float64 [K, F].

    Their kind is "distortion" (D, [K], as in the paper), "latent_shift" (the mean shift of the
    latent per channel, [K, C]; None where it is unknown) or "availability" (the masks, [K, M]).
    """
    count = len(array_of("masks", masks, "b", [None, None]))
    features = {
        "distortion": real_numbers("distortion", distortion, [count])[:, None],
        "availability": np.array(masks, dtype=np.float64),
    }
    if latent_shift is not None:
        features["latent_shift"] = real_numbers("latent_shift", latent_shift, [count, None])
    check_choice("descriptor", kind, features)
    return features[kind]


def rbf_kernel(descriptors: ArrayLike, lengthscale: Lengthscale) -> tuple[Floats, float]:
    """Return the RBF kernel between scenarios, exp(-|x_i - x_j|^2 / (2 lengthscale^2)).

    Args:
        descriptors: One row per scenario, [K] or [K, F].
        lengthscale: A positive number in units of the descriptors, or "median" for the median of
            the non-zero distances between scenarios.

    Returns:
        The kernel, float64 [K, K], and its lengthscale as a number.
    """
    rows = real_numbers("descriptors", descriptors)
    rows = rows[:, None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or not rows.size:
        raise InputError(f"descriptors: expected shape [K] or [K, F], found {list(rows.shape)}")
    unit = _unit(rows)
    distances = scipy.spatial.distance.squareform(scipy.spatial.distance.pdist(rows / unit))
    if isinstance(lengthscale, str) and lengthscale == "median":
        apart = distances[distances > 0]
        # Where all scenarios are alike, every lengthscale gives the same kernel of ones.
        width = float(np.median(apart)) * unit if apart.size else 1.0
    else:
        expected = "a positive number or 'median'"
        width = check_number("lengthscale", lengthscale, lambda x: x > 0, expected)
    with np.errstate(over="ignore", under="ignore"):
        # The division comes first, because the square of a tiny lengthscale is 0.
        scaled = distances / max(width / unit, np.finfo(np.float64).smallest_subnormal)
        return np.exp(-0.5 * np.square(scaled)), width


def smooth_scores(kernel: Floats, utility: Floats, ridge: float) -> Floats:
    """Return the kernel ridge regression at its own inputs, r = K (K + ridge I)^-1 U.

    It is computed by Cholesky decomposition as r = U - ridge (K + ridge I)^-1 U, which is equal and
    avoids a product that loses digits when K is nearly singular.

    Args:
        kernel: Positive semi-definite K, [K, K].
        utility: U, [K], or several columns of it, [K, F]; r has the same shape.
        ridge: Positive number.

    Raises:
        InputError: The ridge is too small for a singular kernel.
    """
    utility = real_numbers("utility", utility)
    count = utility.shape[0] if utility.ndim in (1, 2) else 0
    kernel = real_numbers("kernel", kernel, [count, count])
    ridge = check_number("ridge", ridge, lambda x: x > 0, "a positive number")
    if not utility.size:
        raise InputError("utility: expected one score per scenario, found none")
    regularised = kernel + ridge * np.eye(len(kernel))
    unit = _unit(utility)
    scaled = utility / unit
    try:
        solved = scipy.linalg.cho_solve(scipy.linalg.cho_factor(regularised), scaled)
    except ValueError as error:  # singular, or not finite
        raise InputError(f"ridge: expected more than {ridge!r} for this kernel: {error}") from error
    # The difference of a large ridge would consist of rounding errors alone.
    smoothed = kernel @ solved if ridge > LARGE_RIDGE else scaled - ridge * solved
    if not np.isfinite(smoothed * unit).all():
        raise InputError("distortion: expected smaller numbers, found some that overflow smoothed")
    return smoothed * unit


def likeliest_ridge(eigenvalues: Floats, eigenvectors: Floats, utility: Floats) -> float:
    """Return the ridge under which scores are likeliest, among 25 from 1e-3 to 1e3.

    The scores (the utility, [K], with mean 0) are taken for a sample of N(0, s^2 (K + ridge I)),
    with the likeliest s for each ridge (Rasmussen and Williams 2006, equation 5.8). Eigenvalues and
    eigenvectors of the kernel K are those that `numpy.linalg.eigh` returns, [K] and [K, K].
    """
    values = real_numbers("eigenvalues", eigenvalues, [None])
    scores = real_numbers("utility", utility, [len(values)])
    vectors = real_numbers("eigenvectors", eigenvectors, [len(values)] * 2)
    turned = vectors.T @ (scores / _unit(scores))
    if not turned.any():
        return 1.0
    ridges = np.logspace(-3, 3, 25)
    spectrum = np.maximum(values, 0.0) + ridges[:, None]
    cost = len(values) * np.log((np.square(turned) / spectrum).sum(axis=1))
    return float(ridges[np.argmin(cost + np.log(spectrum).sum(axis=1))])


def standardise(scores: Floats) -> Floats:
    """Return scores [K] with mean 0 and population standard deviation 1.

    The result is 0 where the spread vanishes. The published cutoff is an absolute 1e-12, which
    makes p uniform for all distortions below about 2e-5; this one is relative to the size of the
    scores. Distortions below about 1e-7 of the lengthscale still give a nearly uniform p, because
    their kernel is 1 everywhere but for rounding.
    """
    scores = real_numbers("scores", scores, [None])
    scaled = scores / _unit(scores)
    centred = scaled - scaled.mean()
    spread = centred.std()
    if spread <= RELATIVE_SPREAD_CUTOFF * np.abs(scaled).max(initial=0.0):
        return np.zeros_like(scores)
    return centred / spread


def total_variation(first: ArrayLike, second: ArrayLike) -> float:
    """Return the total variation distance of two distributions over the scenarios, 0 to 1."""
    p = real_numbers("first", first, [None])
    q = real_numbers("second", second, [len(p)])
    if not (np.abs([p, q]) <= 1).all():
        raise InputError("first, second: expected probabilities, found larger numbers")
    return 0.5 * float(np.abs(p - q).sum())


def _scenario_numbers(name: str, values: ArrayLike) -> Floats:
    numbers = real_numbers(name, values)
    if numbers.ndim != 1 or numbers.size < 2 or (numbers < 0).any():
        raise InputError.of(name, "one non-negative number per scenario", values)
    return numbers


def _unit(values: Floats) -> float:
    """Return the power of two below the largest absolute value.

    Values divided by it neither overflow nor underflow in squares and sums, and the division is
    exact, so that it changes no digit of a result.
    """
    return float(np.ldexp(1.0, np.frexp(np.abs(values).max(initial=0.0))[1] - 1))
