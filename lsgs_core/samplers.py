"""The distributions that the samplers of the study draw from, and the samplers that adapt.

Fixed ones are functions that return p over the K scenarios; adaptive ones are `ScenarioSampler`s,
which watch the loss of every sample (or the network itself) and keep what they learnt in their
state. All are numpy alone. Which of them a method uses is said in `lsgs_core.methods`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.optimize
import scipy.special
from numpy.typing import ArrayLike, NDArray

from lsgs_core.errors import InputError
from lsgs_core.sampling import check_probabilities, generator
from lsgs_core.scenarios import ScenarioSet
from lsgs_core.smoothing import standardise

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
        prior: What it is mixed with, [K]; None is uniform.

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
    if weights.max() <= 0:
        return base
    weights = weights / weights.max()
    return (1 - mixing) * base + mixing * _cover(weights / weights.sum(), kernel)


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


class _Adaptive:
    """What the samplers that adapt share: numbers that they keep in their state.

    Subclasses name the attributes in `_kept`; all are arrays over the scenarios or numbers.
    """

    _kept: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""
        return {name: np.asarray(getattr(self, name)).tolist() for name in self._kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            InputError: The state of another sampler, or over other scenarios.
        """
        for name in self._kept:
            found = np.asarray(state.get(name), dtype=np.float64)
            if found.shape != np.shape(getattr(self, name)):
                raise InputError(
                    f"training state: it is not of this sampler: {name} has shape {found.shape}, "
                    f"expected {np.shape(getattr(self, name))}"
                )
            setattr(self, name, found if found.ndim else float(found))


class LossProportional(_Adaptive):
    """Scenarios of high loss more often: p = (1 - mixing) prior + mixing softmax(tau z(loss)).

    It observes the training loss of every sample, and keeps an exponential moving average of it for
    every scenario; z standardises them. A scenario not yet drawn has the mean of the others.

    Args:
        prior: [K].
        inverse_temperature: tau, as in LSGS.
        mixing: gamma, as in LSGS.
        memory: Weight of the past when a loss is observed, 0 to 1.
    """

    _kept = ("average", "count")

    def __init__(
        self, prior: ArrayLike, inverse_temperature: float, mixing: float, memory: float = 0.98
    ) -> None:
        self.prior = check_probabilities(prior)
        self.inverse_temperature, self.mixing, self.memory = inverse_temperature, mixing, memory
        self.average = np.zeros(len(self.prior))
        self.count = np.zeros(len(self.prior))

    def probabilities(self, epoch: int) -> Probabilities:
        """Return p now, float64 [K]."""
        seen = self.count > 0
        if not seen.any():
            return self.prior
        # The average starts at zero; dividing by the weight it has had takes that out again.
        loss = np.where(seen, self.average / np.maximum(1 - self.memory**self.count, 1e-300), 0.0)
        loss = np.where(seen, loss, loss[seen].mean())
        with np.errstate(divide="ignore"):
            q = scipy.special.softmax(
                np.log(self.prior) + self.inverse_temperature * standardise(loss)
            )
        return (1 - self.mixing) * self.prior + self.mixing * q

    def observe(self, scenario: NDArray[np.int64], loss: NDArray[np.float64]) -> None:
        """Take note of the losses, in the order of the batch."""
        for k, value in zip(scenario, loss, strict=True):
            self.average[k] = self.memory * self.average[k] + (1 - self.memory) * value
            self.count[k] += 1


class GroupDRO(_Adaptive):
    """Group distributionally robust sampling: exponentiated gradient ascent on the losses.

    q_k is multiplied by exp(step * loss_k) and normalised (Sagawa et al. 2020, Algorithm 1, with
    scenarios as groups). There the group is drawn uniformly and its loss weighted by q; here it is
    drawn from p = (1 - mixing) prior + mixing q, so that an observed loss is divided by K p_k.

    Args:
        prior: [K].
        step: eta.
        mixing: Weight of q.
    """

    _kept = ("log_weights",)

    def __init__(self, prior: ArrayLike, step: float = 0.01, mixing: float = 0.9) -> None:
        self.prior, self.step, self.mixing = check_probabilities(prior), step, mixing
        self.log_weights = np.zeros(len(self.prior))

    def probabilities(self, epoch: int) -> Probabilities:
        """Return p now, float64 [K]."""
        q = scipy.special.softmax(self.log_weights)
        return (1 - self.mixing) * self.prior + self.mixing * q

    def observe(self, scenario: NDArray[np.int64], loss: NDArray[np.float64]) -> None:
        """Raise the weights of the scenarios in which the loss is high."""
        p = self.probabilities(0)
        for k, value in zip(scenario, loss, strict=True):
            self.log_weights[k] += self.step * value / (len(p) * p[k]) / len(scenario)
        self.log_weights -= self.log_weights.max()  # softmax does not change


class Exp3S(_Adaptive):
    """Exp3.S, a bandit whose rewards change over time, as in automated curriculum learning.

    Formulas of Graves et al. 2017, section 2.2, after Auer et al. 2002. The reward of a sample is
    how far its loss lies below the running average of its scenario's (learning progress), rescaled
    to [-1, 1] by the 20th and 80th percentile of the last rewards.

    Args:
        prior: [K]; the exploration is towards it.
        step: eta.
        exploration: epsilon, the weight of the prior.
        memory: Weight of the past in the running averages.
        window: How many rewards the percentiles are taken of.
    """

    _kept = ("log_weights", "average", "seen", "rewards", "time")

    def __init__(
        self,
        prior: ArrayLike,
        step: float = 0.01,
        exploration: float = 0.2,
        memory: float = 0.9,
        window: int = 256,
    ) -> None:
        self.prior, self.step, self.exploration = check_probabilities(prior), step, exploration
        self.memory = memory
        count = len(self.prior)
        self.log_weights = np.zeros(count)
        self.average = np.zeros(count)
        self.seen = np.zeros(count)
        self.rewards = np.full(window, np.nan)  # a ring; JSON has NaN as null
        self.time = 0.0

    def probabilities(self, epoch: int) -> Probabilities:
        """Return p now, float64 [K]."""
        q = scipy.special.softmax(self.log_weights)
        return (1 - self.exploration) * q + self.exploration * self.prior

    def observe(self, scenario: NDArray[np.int64], loss: NDArray[np.float64]) -> None:
        """Reward the scenarios in which the network is getting better."""
        p = self.probabilities(0)
        for k, value in zip(scenario, loss, strict=True):
            if self.seen[k]:
                self._reward(k, float(self.average[k] - value), float(p[k]))
                self.average[k] = self.memory * self.average[k] + (1 - self.memory) * value
            else:
                self.average[k], self.seen[k] = value, 1.0

    def _reward(self, arm: int, progress: float, probability: float) -> None:
        self.rewards[int(self.time) % len(self.rewards)] = progress
        self.time += 1
        low, high = np.nanpercentile(self.rewards, [20, 80])
        scaled = np.clip(2 * (progress - low) / (high - low) - 1, -1, 1) if high > low else 0.0
        estimate = np.zeros(len(self.prior))
        estimate[arm] = scaled / probability
        grown = np.exp(self.log_weights + self.step * estimate)
        share = 1 / (self.time + 1)
        others = (grown.sum() - grown) / (len(grown) - 1)
        self.log_weights = np.log((1 - share) * grown + share * others)
        self.log_weights -= self.log_weights.max()


class Curriculum(_Adaptive):
    """Easy scenarios first: p proportional to prior * exp(-strength * z(D)), annealed to the prior.

    Args:
        distortion: D, [K]; z standardises it.
        prior: [K].
        epochs: After so many the strength is 0.
        strength: beta in the first epoch.
    """

    def __init__(
        self, distortion: ArrayLike, prior: ArrayLike, epochs: int, strength: float = 1.0
    ) -> None:
        self.standardised = standardise(np.asarray(distortion, dtype=np.float64))
        self.prior, self.epochs, self.strength = check_probabilities(prior), epochs, strength

    def probabilities(self, epoch: int) -> Probabilities:
        """Return p of an epoch, float64 [K]."""
        left = max(0.0, 1 - epoch / max(1, self.epochs))
        with np.errstate(divide="ignore"):
            logits = np.log(self.prior) - self.strength * left * self.standardised
        return scipy.special.softmax(logits)

    def observe(self, scenario: NDArray[np.int64], loss: NDArray[np.float64]) -> None:
        """Nothing to learn."""


class Online(_Adaptive):
    """LSGS whose distortions are measured again every few epochs, on the network as it is then.

    Args:
        probabilities: p from the pretrained network, [K]; used until the first measurement.
        measure: Scores the network that is being trained and returns p, [K].
        every: Epochs between measurements.
    """

    _kept = ("current", "measured")

    def __init__(
        self, probabilities: ArrayLike, measure: Callable[[], Probabilities], every: int
    ) -> None:
        if every < 1:
            raise InputError(f"every: expected at least 1 epoch, found {every}")
        self.current, self.measure, self.every = check_probabilities(probabilities), measure, every
        self.measured = 0.0  # the epoch of the last measurement

    def probabilities(self, epoch: int) -> Probabilities:
        """Return p of an epoch, float64 [K]; measures where the time has come."""
        if epoch >= self.measured + self.every:
            self.current = check_probabilities(self.measure(), len(self.current))
            self.measured = float(epoch)
        return self.current

    def observe(self, scenario: NDArray[np.int64], loss: NDArray[np.float64]) -> None:
        """Nothing to learn from the loss."""
