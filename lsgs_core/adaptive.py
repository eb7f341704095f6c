"""Samplers that adapt to the loss of each sample, or to the network itself.

The loss of a sample is its cross-entropy, averaged over the pixels that count. What a sampler
learns is its state, which is saved with the training state. Arguments that several samplers have:

- `prior`: Prior probabilities of the scenarios, [K].
- `mixing`: gamma as in LSGS, the weight of q in p = (1 - mixing) prior + mixing q, from 0 to 1.
- `step`: Step size eta of the updates, from 0 to 100,000.
- `memory`: Weight of the past in running averages, from 0 to 1.
- `kernel`: Kernel between scenarios, [K, K].
"""

from collections.abc import Callable, Iterator

import numpy as np
import scipy.special
from numpy.typing import ArrayLike, NDArray

from lsgs_core.errors import Floats, array_of, check_count, check_number, check_type, real_numbers
from lsgs_core.probabilities import likeliest_ridge, smooth_scores, standardise
from lsgs_core.sampling import Probabilities, ScenarioSampler, check_probabilities

LARGEST_EXPONENT = 700.0  # of e without an overflow
LARGEST_STEP = 1e5  # far beyond any that serves; runs of few steps have large ones
LARGEST = 1e300  # size of a loss or a factor, with which no sum overflows


def _logarithm(weights: Floats) -> Floats:
    """Return the natural logarithm, minus infinity for 0: such a scenario is never drawn."""
    return np.log(weights, out=np.full(len(weights), -np.inf), where=weights > 0)


def _range(field: str, value: float, least: float, most: float) -> float:
    expected = f"a number from {least:g} to {most:g}"
    return check_number(field, value, lambda x: least <= x <= most, expected)


def _observed(
    scenario: NDArray[np.int64], loss: Floats, p: Probabilities
) -> Iterator[tuple[int, float]]:
    """Return scenario and loss of each sample, in their order."""
    indices = array_of("scenario", scenario, "iu", [None])
    losses = real_numbers("loss", loss, [len(indices)])
    for k, value in zip(indices, losses, strict=True):
        check_count("scenario", k, 0, len(p) - 1)
        check_number("probability of the scenario", p[k], lambda x: x > 0, "a positive number")
        _range("loss", value, -LARGEST, LARGEST)
    return zip(indices, losses, strict=True)


class LossProportional(ScenarioSampler):
    """Scenarios of high loss more often: q is proportional to prior exp(tau z(loss)).

    The loss of a scenario is the exponential moving average of the training losses of its samples;
    z standardises it over the scenarios. A scenario without a sample has the mean of the others.
    A kernel smooths the losses around their mean with that ridge, as LSGS smooths its scores; tau
    is the inverse temperature.
    """

    _kept: tuple[str, ...] = ("average", "count")

    def __init__(
        self,
        prior: ArrayLike,
        inverse_temperature: float,
        mixing: float,
        memory: float = 0.98,
        kernel: Floats | None = None,
        ridge: float = 0.3,
    ) -> None:
        self.prior = check_probabilities(prior)
        self.inverse_temperature = _range("inverse_temperature", inverse_temperature, 0, LARGEST)
        self.mixing, self.memory = _range("mixing", mixing, 0, 1), _range("memory", memory, 0, 1)
        self.average = np.zeros(len(self.prior))
        self.count = np.zeros(len(self.prior))
        self.kernel, self.ridge = kernel, _range("ridge", ridge, 1e-9, LARGEST)
        if kernel is not None:
            self.kernel = real_numbers("kernel", kernel, [len(self.prior)] * 2)

    @property
    def losses(self) -> Floats:
        """Running mean of the loss of each scenario, [K]; the mean of the others if never seen."""
        seen = self.count > 0
        if not seen.any():
            return np.zeros(len(self.prior))
        # The average starts at 0; dividing by the weight of all losses so far corrects for that.
        loss = np.where(seen, self.average / np.maximum(1 - self.memory**self.count, 1e-300), 0.0)
        return np.where(seen, loss, loss[seen].mean())

    def probabilities(self, epoch: int) -> Probabilities:
        """Return the present p, float64 [K]."""
        loss = self.losses
        if not self.count.any():
            return self.prior
        if self.kernel is not None:
            loss = smooth_scores(self.kernel, loss - loss.mean(), self.ridge)
        logits = _logarithm(self.prior) + self.inverse_temperature * standardise(loss)
        return (1 - self.mixing) * self.prior + self.mixing * scipy.special.softmax(logits)

    def observe(self, scenario: NDArray[np.int64], loss: Floats) -> None:
        """Update the averages in the order of the batch."""
        for k, value in _observed(scenario, loss, self.prior):
            self.average[k] = self.memory * self.average[k] + (1 - self.memory) * value
            self.count[k] += 1


class GroupDRO(ScenarioSampler):
    """Group distributionally robust optimisation: exponentiated gradient ascent on the losses.

    q starts as the prior, and q_k is multiplied by exp(step * loss_k) and normalised (Sagawa et al.
    2020, Algorithm 1, with scenarios as groups). Their group is drawn uniformly and its loss is
    weighted by q; here it is drawn from p, so that an observed loss is divided by K p_k. Only
    some scenarios serve a sample that lacks modalities; those are drawn more often than p says, and
    gain weight by it.
    """

    _kept = ("log_weights",)

    def __init__(self, prior: ArrayLike, step: float = 0.01, mixing: float = 0.9) -> None:
        self.prior = check_probabilities(prior)
        self.step = _range("step", step, 0, LARGEST_STEP)
        self.mixing = _range("mixing", mixing, 0, 1)
        self.log_weights = _logarithm(self.prior)

    def probabilities(self, epoch: int) -> Probabilities:
        """Return the present p, float64 [K]."""
        q = scipy.special.softmax(self.log_weights)
        return (1 - self.mixing) * self.prior + self.mixing * q

    def observe(self, scenario: NDArray[np.int64], loss: Floats) -> None:
        """Increase the weights of scenarios with a high loss."""
        p = self.probabilities(0)
        for k, value in _observed(scenario, loss, p):
            with np.errstate(over="ignore"):
                gain = self.step * value / (len(p) * p[k]) / len(scenario)
            self.log_weights[k] += np.clip(gain, -LARGEST, LARGEST)
        self.log_weights -= self.log_weights.max()  # the softmax stays the same


class KernelGroupDRO(LossProportional):
    """Group DRO on losses that are denoised over the scenarios, exponentiated from a given start.

    With many scenarios each is drawn seldom, and its loss is known badly. The running means of the
    losses are therefore smoothed by kernel ridge regression, K (K + ridge I)^-1, around their mean;
    the ridge is the likeliest one for the losses so far (`probabilities.likeliest_ridge`). Every
    step then multiplies q_k by exp(step * smoothed loss_k / K) for all scenarios. The first q is
    `start`, such as p of LSGS, [K].
    """

    _kept = ("average", "count", "log_weights", "ridge")

    def __init__(
        self,
        prior: ArrayLike,
        start: ArrayLike,
        kernel: Floats,
        step: float,
        mixing: float = 0.9,
        memory: float = 0.98,
    ) -> None:
        super().__init__(prior, 1.0, mixing, memory, ridge=1.0)
        start = check_probabilities(start, len(self.prior), "start")
        never = start[self.prior == 0].sum()
        check_number("start", never, lambda share: share == 0, "0 where the prior is 0")
        self.log_weights = _logarithm(start)
        self.step = _range("step", step, 0, LARGEST_STEP)
        self.smoother = real_numbers("kernel", kernel, [len(self.prior)] * 2)
        self.eigen = np.linalg.eigh(self.smoother)

    def probabilities(self, epoch: int) -> Probabilities:
        """Return the present p, float64 [K]."""
        q = scipy.special.softmax(self.log_weights)
        return (1 - self.mixing) * self.prior + self.mixing * q

    def observe(self, scenario: NDArray[np.int64], loss: Floats) -> None:
        """Update the running means, and increase the weights where the smoothed loss is high."""
        super().observe(scenario, loss)
        losses = self.losses
        self.ridge = likeliest_ridge(*self.eigen, losses - losses.mean())
        smoothed = smooth_scores(self.smoother, losses - losses.mean(), self.ridge)
        self.log_weights = self.log_weights + self.step * smoothed / len(smoothed)
        self.log_weights -= self.log_weights.max()

    def report(self) -> dict[str, float]:
        """Return the degrees of freedom of the smoothing, the trace of K (K + ridge I)^-1.

        They are near 1 where all scenarios share one loss, and near K where each keeps its own.
        """
        return {"degrees_of_freedom": float((self.eigen[0] / (self.eigen[0] + self.ridge)).sum())}


class Exp3S(ScenarioSampler):
    """Exp3.S, a bandit whose rewards change over time, as in automated curriculum learning.

    The formulas are those of Graves et al. 2017, section 2.2, after Auer et al. 2002. The reward of
    a sample is its learning progress: the running average of its scenario's loss minus its loss,
    rescaled to [-1, 1] by the 20th and 80th percentile of the latest rewards, of which there are
    `window`. The weight of the prior is epsilon, the exploration.
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
        self.prior, self.step = check_probabilities(prior), _range("step", step, 0, LARGEST_STEP)
        self.exploration = _range("exploration", exploration, 0, 1)
        self.memory = _range("memory", memory, 0, 1)
        self.log_weights = _logarithm(self.prior)
        self.average = np.zeros(len(self.prior))
        self.seen = np.zeros(len(self.prior))
        self.rewards = np.zeros(check_count("window", window))  # a ring buffer
        self.time = 0.0

    def probabilities(self, epoch: int) -> Probabilities:
        """Return the present p, float64 [K]."""
        q = scipy.special.softmax(self.log_weights)
        return (1 - self.exploration) * q + self.exploration * self.prior

    def observe(self, scenario: NDArray[np.int64], loss: Floats) -> None:
        """Reward the scenarios in which the network improves."""
        p = self.probabilities(0)
        for k, value in _observed(scenario, loss, p):
            if self.seen[k]:
                self._reward(k, float(self.average[k] - value), float(p[k]))
                self.average[k] = self.memory * self.average[k] + (1 - self.memory) * value
            else:
                self.average[k], self.seen[k] = value, 1.0

    def _reward(self, arm: int, progress: float, probability: float) -> None:
        self.rewards[int(self.time) % len(self.rewards)] = progress
        self.time += 1
        low, high = np.percentile(self.rewards[: int(self.time)], [20, 80])
        scaled = np.clip(2 * (progress - low) / (high - low) - 1, -1, 1) if high > low else 0.0
        estimate = np.zeros(len(self.prior))
        with np.errstate(over="ignore"):
            estimate[arm] = scaled / probability
        weights = np.exp(np.minimum(self.log_weights + self.step * estimate, LARGEST_EXPONENT))
        share = 1 / (self.time + 1)
        possible = self.prior > 0
        others = (weights.sum() - weights) / max(1, possible.sum() - 1)
        mixed = (1 - share) * weights + share * others
        self.log_weights = _logarithm(np.where(possible, mixed, 0))
        self.log_weights -= self.log_weights.max()


class Curriculum(ScenarioSampler):
    """Easy scenarios first: p is proportional to prior * exp(-beta * z(D)), then to the prior.

    z standardises the distortion D, [K]. beta is the strength in the first epoch, and decreases
    linearly to 0 in this number of epochs.
    """

    def __init__(
        self, distortion: ArrayLike, prior: ArrayLike, epochs: int, strength: float = 1.0
    ) -> None:
        self.prior = check_probabilities(prior)
        self.standardised = standardise(real_numbers("distortion", distortion, self.prior.shape))
        self.epochs = check_count("epochs", epochs, 0)
        self.strength = _range("strength", strength, -LARGEST, LARGEST)

    def probabilities(self, epoch: int) -> Probabilities:
        """Return p in an epoch, float64 [K]."""
        left = max(0.0, 1 - _range("epoch", epoch, 0, LARGEST) / max(1, self.epochs))
        logits = _logarithm(self.prior) - self.strength * left * self.standardised
        return scipy.special.softmax(logits)


class Online(ScenarioSampler):
    """LSGS whose distortions are measured again every few epochs, on the network of that time.

    Args:
        probabilities: p of the pretrained network, [K], used until the first measurement.
        measure: Scores the network that is being trained and returns p, [K].
        every: Number of epochs between two measurements.
    """

    _kept = ("current", "measured")

    def __init__(
        self, probabilities: ArrayLike, measure: Callable[[], Probabilities], every: int
    ) -> None:
        check_type("measure", measure, Callable)
        self.current, self.measure = check_probabilities(probabilities), measure
        self.every = check_count("every", every)
        self.measured = 0.0  # the epoch of the last measurement

    def probabilities(self, epoch: int) -> Probabilities:
        """Return p in an epoch, float64 [K], after a measurement where one is due."""
        if _range("epoch", epoch, 0, LARGEST) >= self.measured + self.every:
            self.current = check_probabilities(self.measure(), len(self.current))
            self.measured = float(epoch)
        return self.current
