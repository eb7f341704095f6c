"""The fixed distributions p over K scenarios that the methods of the study draw from.

Each function returns p as float64 [K]. `lsgs_core.methods` says which method uses which, and
`lsgs_core.adaptive` has the samplers that change during training.
"""

import numpy as np
import scipy.optimize
import scipy.special
from numpy.typing import ArrayLike

from lsgs_core.errors import Floats, InputError, check_count, check_number, check_type, real_numbers
from lsgs_core.randomness import generator
from lsgs_core.sampling import Probabilities, check_probabilities
from lsgs_core.scenarios import ScenarioSet

COVERAGE_GAP = 1e-6  # largest distance of the coverage objective from its maximum


def bernoulli(scenarios: ScenarioSet, keep: float) -> Probabilities:
    """Return p when each modality is kept independently, until at least one is (ModDrop).

    The method is that of Neverova et al. 2016. It is uniform over the scenarios at a rate of 1/2.
    """
    check_type("scenarios", scenarios, ScenarioSet)
    keep = check_number("keep", keep, lambda x: 2**-53 <= x < 1, "a number between 0 and 1")
    return deployment_prior(scenarios, np.full(len(scenarios.modalities), 1 - keep))


def deployment_prior(scenarios: ScenarioSet, failure_rates: ArrayLike) -> Probabilities:
    """Return p when sensors fail independently, at rates [M], and at least one of them works."""
    check_type("scenarios", scenarios, ScenarioSet)
    rates = real_numbers("failure_rates", failure_rates)
    count = len(scenarios.modalities)
    if rates.shape != (count,) or not ((rates >= 0) & (rates <= 1)).all() or (rates == 1).all():
        expected = f"{count} numbers from 0 to 1, not all 1"
        raise InputError.of("failure_rates", expected, np.round(rates, 6).tolist())
    weights = np.where(scenarios.masks, 1 - rates, rates).prod(axis=1)
    return weights / weights.sum()


def read_failure_rates(text: str, scenarios: ScenarioSet) -> Probabilities | None:
    """Return the deployment prior of failure rates written as "RGB:0.1,SWIR:0.3".

    A sensor without a rate never fails. The prior of an empty text is None.
    """
    check_type("failure_rates", text, str)
    check_type("scenarios", scenarios, ScenarioSet)
    if not text:
        return None
    rates: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = (word.strip() for word in part.partition(":"))
        if name not in scenarios.modalities or name in rates:
            expected = f"some of {list(scenarios.modalities)}, each once"
            raise InputError.of("failure_rates", expected, name)
        try:
            rates[name] = float(number)
        except ValueError:
            raise InputError.of("failure_rates", "name:number", part) from None
    return deployment_prior(scenarios, [rates.get(name, 0.0) for name in scenarios.modalities])


def by_cardinality(scenarios: ScenarioSet, target: ArrayLike) -> Probabilities:
    """Return the distribution nearest to p that depends on the number of missing modalities alone.

    It is proportional to exp(beta * number missing), with beta by maximum likelihood under the
    target p, [K], so that both have the same expected number of missing modalities.
    """
    check_type("scenarios", scenarios, ScenarioSet)
    p = check_probabilities(target, len(scenarios))
    missing = scenarios.missing.astype(np.float64)
    expected = float(p @ missing)

    def excess(beta: float) -> float:
        return float(scipy.special.softmax(beta * missing) @ missing) - expected

    if not excess(-50.0) < 0 < excess(50.0):  # all probability is on one cardinality
        only = missing == round(expected)
        return only / only.sum()
    return scipy.special.softmax(scipy.optimize.brentq(excess, -50.0, 50.0) * missing)


def permuted(
    scenarios: ScenarioSet, target: ArrayLike, seed: int, within_cardinality: bool
) -> Probabilities:
    """Return p, the target, assigned to other scenarios at random: a control for what D says.

    The permutation is never the identity. Within the cardinality, only scenarios with the same
    number of modalities are exchanged.
    """
    check_type("scenarios", scenarios, ScenarioSet)
    check_type("within_cardinality", within_cardinality, bool)
    p = check_probabilities(target, len(scenarios))
    groups = scenarios.missing if within_cardinality else 0 * scenarios.missing
    random = generator("permutation", seed)
    order = np.arange(len(p))
    while (order == np.arange(len(p))).all():
        for group in np.unique(groups):
            members = np.flatnonzero(groups == group)
            order[members] = random.permutation(members)
    return p[order]


def dirichlet(count: int, seed: int, concentration: float) -> Probabilities:
    """Return one draw from a symmetric Dirichlet distribution over the scenarios, float64 [K]."""
    check_count("count", count)
    expected = "a number from 1e-3 to 1e6"
    size = check_number("concentration", concentration, lambda x: 1e-3 <= x <= 1e6, expected)
    return generator("permutation", seed, epoch=1).dirichlet(np.full(count, size))


def coverage(
    utility: ArrayLike, kernel: Floats, mixing: float, prior: ArrayLike | None = None
) -> Probabilities:
    """Return coverage sampling, in which every scenario is near to scenarios that are drawn.

    q maximises the concave sum_i U_i log sum_j K_ij q_j over the simplex, and
    p = (1 - mixing) * prior + mixing * q. With K = I, q is proportional to U; scenarios that are
    alike share their probability. This is the study's successor to LSGS, in which the relations
    between scenarios count. A long lengthscale leaves few scenarios in q, so that mixing matters.

    Args:
        utility: U, such as the distortion, [K], non-negative.
        kernel: Kernel between scenarios, [K, K], such as `rbf_kernel` of their latent shifts.
        mixing: Weight of q, from 0 to 1.
        prior: Distribution that is mixed with q, [K]; None is uniform. A scenario of prior 0 does
            not count. p is the prior where all utilities are 0.
    """
    weights = real_numbers("utility", utility, [None])
    count = len(weights)
    kernel = real_numbers("kernel", kernel, [count, count])
    mixing = check_number("mixing", mixing, lambda x: 0 <= x <= 1, "a number from 0 to 1")
    if not count or (weights < 0).any():
        raise InputError.of("utility", "numbers of at least 0", utility)
    if (kernel < 0).any() or (kernel > 1).any():
        raise InputError("kernel: expected numbers from 0 to 1, found others")
    base = np.full(count, 1 / count) if prior is None else check_probabilities(prior, count)
    possible = np.flatnonzero(base > 0)
    weights = weights[possible]
    if weights.max() <= 0:
        return base
    weights = weights / weights.max()
    q = np.zeros(count)
    q[possible] = _cover(weights / weights.sum(), kernel[np.ix_(possible, possible)])
    return (1 - mixing) * base + mixing * q


def _cover(weights: Probabilities, kernel: Floats) -> Probabilities:
    """Return the q that maximises sum_i w_i log (K q)_i over the simplex.

    Sequential quadratic programming comes first. Where it stops early, the multiplicative update
    q_j <- q_j sum_i w_i K_ij / (K q)_i follows (expectation maximisation for mixture weights),
    which always improves q, but slowly. The largest factor of that update minus 1 bounds the
    distance from the maximum, and so proves the answer.
    """
    positive = weights > 0
    rows, weights = kernel[positive], weights[positive]

    def factors(q: Probabilities) -> Probabilities:
        return rows.T @ (weights / np.maximum(rows @ q, 1e-300))

    def normalised(q: Probabilities) -> Probabilities:
        q = np.maximum(q, 0)
        return q / q.sum()

    count = kernel.shape[1]
    solved = scipy.optimize.minimize(
        lambda q: -float(weights @ np.log(np.maximum(rows @ q, 1e-300))),
        np.full(count, 1 / count),
        jac=lambda q: -factors(q),
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda q: q.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    q = normalised(solved.x)
    for step in range(200_000):
        update = factors(q)
        if update.max() - 1 < COVERAGE_GAP:
            return q
        # The update never changes a 0.
        q = normalised(q * update) if step else (q + 1 / count) / 2
    raise InputError("coverage: the optimisation did not converge; try a shorter lengthscale")
