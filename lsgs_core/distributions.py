"""The distributions that the methods of the study draw from: functions that return p.

All are numpy and scipy alone. Which of them a method uses is said in `lsgs_core.methods`; samplers
that change during training are in `lsgs_core.adaptive`.
"""

from __future__ import annotations

import numpy as np
import scipy.optimize
import scipy.special
from numpy.typing import ArrayLike, NDArray

from lsgs_core.errors import InputError
from lsgs_core.randomness import generator
from lsgs_core.sampling import check_probabilities
from lsgs_core.scenarios import ScenarioSet

Probabilities = NDArray[np.float64]
COVERAGE_GAP = 1e-6  # how far the objective of coverage sampling may be from its maximum


def bernoulli(scenarios: ScenarioSet, keep: float) -> Probabilities:
    """Every modality kept independently, drawn again where none is: ModDrop (Neverova et al. 2016).

    At a rate of 1/2 this is the uniform distribution over the scenarios.

    Args:
        scenarios: Of K scenarios over M modalities.
        keep: Probability that a modality is kept, between 0 and 1.

    Returns:
        float64 [K].

    Raises:
        InputError: `keep` is not between 0 and 1.
    """
    if not 0 < keep < 1:
        raise InputError(f"keep: expected a number between 0 and 1, found {keep}")
    return deployment_prior(scenarios, np.full(len(scenarios.modalities), 1 - keep))


def deployment_prior(scenarios: ScenarioSet, failure_rates: ArrayLike) -> Probabilities:
    """Probability of every scenario when sensors fail independently, given that one is left.

    Args:
        scenarios: Of K scenarios over M modalities.
        failure_rates: Of every modality, [M], 0 to 1.

    Returns:
        float64 [K].

    Raises:
        InputError: Another number of rates, a rate outside of 0 to 1, or all of them 1.
    """
    rates = np.asarray(failure_rates, dtype=np.float64)
    count = len(scenarios.modalities)
    if rates.shape != (count,) or not ((rates >= 0) & (rates <= 1)).all() or (rates == 1).all():
        raise InputError(
            f"failure_rates: expected {count} numbers from 0 to 1, not all 1, "
            f"found {np.round(rates, 6).tolist()}"
        )
    weights = np.where(scenarios.masks, 1 - rates, rates).prod(axis=1)
    return weights / weights.sum()


def read_failure_rates(text: str, scenarios: ScenarioSet) -> Probabilities | None:
    """The deployment prior of failure rates written as "RGB:0.1,SWIR:0.3".

    Args:
        text: Sensors that are not named never fail; "" is no prior.
        scenarios: Of K scenarios.

    Returns:
        float64 [K], or None without a prior.

    Raises:
        InputError: A modality that there is not, or what is no number from 0 to 1.
    """
    if not text:
        return None
    rates = dict.fromkeys(scenarios.modalities, 0.0)
    for part in text.split(","):
        name, _, number = part.partition(":")
        try:
            rates[name.strip()] = float(number)
        except ValueError:
            raise InputError(f"failure_rates: expected name:number, found {part!r}") from None
    if unknown := rates.keys() - set(scenarios.modalities):
        raise InputError(
            f"failure_rates: expected some of {list(scenarios.modalities)}, found {sorted(unknown)}"
        )
    return deployment_prior(scenarios, list(rates.values()))


def by_cardinality(scenarios: ScenarioSet, target: ArrayLike) -> Probabilities:
    """The distribution nearest to p that knows only how many modalities are missing.

    p_k is proportional to exp(beta * number missing), with beta by maximum likelihood under the
    target: both have the same expected number of missing modalities.

    Args:
        scenarios: Of K scenarios.
        target: The probabilities to come near to, [K].

    Returns:
        float64 [K].
    """
    p = check_probabilities(target, len(scenarios))
    missing = scenarios.missing.astype(np.float64)
    wanted = float(p @ missing)

    def excess(beta: float) -> float:
        return float(scipy.special.softmax(beta * missing) @ missing) - wanted

    bound = 50.0
    if not excess(-bound) < 0 < excess(bound):  # all mass on one cardinality
        return np.where(missing == round(wanted), 1.0, 0.0) / (missing == round(wanted)).sum()
    return scipy.special.softmax(scipy.optimize.brentq(excess, -bound, bound) * missing)


def permuted(
    scenarios: ScenarioSet, target: ArrayLike, seed: int, within_cardinality: bool
) -> Probabilities:
    """The same probabilities given to other scenarios, at random: the control for what D says.

    Args:
        scenarios: Of K scenarios.
        target: Probabilities, [K].
        seed: Decides the permutation, which is never the identity.
        within_cardinality: Only among scenarios with as many modalities.

    Returns:
        float64 [K].
    """
    p = check_probabilities(target, len(scenarios))
    groups = scenarios.missing if within_cardinality else np.zeros(len(scenarios), dtype=np.int64)
    random = generator("permutation", seed)
    order = np.arange(len(p))
    while (order == np.arange(len(p))).all():
        for group in np.unique(groups):
            members = np.flatnonzero(groups == group)
            order[members] = random.permutation(members)
    return p[order]


def dirichlet(count: int, seed: int, concentration: float) -> Probabilities:
    """One draw from a symmetric Dirichlet distribution over the scenarios, the same all the run."""
    return generator("permutation", seed, epoch=1).dirichlet(np.full(count, concentration))


def coverage(
    utility: ArrayLike,
    kernel: NDArray[np.float64],
    mixing: float,
    prior: ArrayLike | None = None,
) -> Probabilities:
    """Coverage sampling: every scenario is to be near something that is drawn.

    q maximises sum_i U_i log sum_j K_ij q_j over the simplex, which is concave; then
    p = (1 - mixing) * prior + mixing * q. With K = I, q is proportional to U; scenarios that are
    alike share their mass. This study's successor to LSGS, in which relations between scenarios
    count. Long lengthscales leave q on few scenarios, so the mixing matters.

    Args:
        utility: U, such as the distortion, [K], none negative.
        kernel: Between scenarios, [K, K], such as `rbf_kernel` of their latent shifts.
        mixing: Weight of q, 0 to 1.
        prior: What it is mixed with, [K]; None is uniform. Scenarios of prior 0 do not count.

    Returns:
        p, float64 [K]; the prior where all utilities are 0. Where scenarios are exactly alike, one
        of several equally good answers.

    Raises:
        InputError: Utilities that are negative or not finite, or a problem that was not solved.
    """
    weights = np.asarray(utility, dtype=np.float64)
    count = len(weights)
    if weights.shape != (len(kernel),) or not np.isfinite(weights).all() or (weights < 0).any():
        raise InputError(
            f"utility: expected {len(kernel)} finite numbers of at least 0, found {weights}"
        )
    base = np.full(count, 1 / count) if prior is None else check_probabilities(prior, count)
    possible = np.flatnonzero(base > 0)
    weights = weights[possible]
    if weights.max() <= 0:
        return base
    weights = weights / weights.max()
    q = np.zeros(count)
    q[possible] = _cover(weights / weights.sum(), kernel[np.ix_(possible, possible)])
    return (1 - mixing) * base + mixing * q


def _cover(weights: Probabilities, kernel: NDArray[np.float64]) -> Probabilities:
    """Maximise sum_i w_i log (K q)_i over the simplex.

    Sequential quadratic programming, and where that stops early the multiplicative update
    q_j <- q_j sum_i w_i K_ij / (K q)_i (expectation maximisation for mixture weights), which always
    gains but slowly. The largest gain minus 1 bounds what is left to win: the proof of the answer.
    """
    used = weights > 0
    rows, weights = kernel[used], weights[used]

    def gain(q: Probabilities) -> Probabilities:
        return rows.T @ (weights / np.maximum(rows @ q, 1e-300))

    def normalised(q: Probabilities) -> Probabilities:
        q = np.maximum(q, 0)
        return q / q.sum()

    count = kernel.shape[1]
    solved = scipy.optimize.minimize(
        lambda q: -float(weights @ np.log(np.maximum(rows @ q, 1e-300))),
        np.full(count, 1 / count),
        jac=lambda q: -gain(q),
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda q: q.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    q = normalised(solved.x)
    if gain(q).max() - 1 < COVERAGE_GAP:
        return q
    q = (q + 1 / count) / 2  # a scenario at 0 would stay there
    for _ in range(200_000):
        growth = gain(q)
        if growth.max() - 1 < COVERAGE_GAP:
            return q
        q = normalised(q * growth)
    raise InputError("coverage: the sampling problem was not solved; try a shorter lengthscale")
