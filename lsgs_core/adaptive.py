"""Samplers that adapt: they watch the loss of every sample, or the network itself.

What they learn is kept in their state, which is saved with the training state. All are numpy and
scipy alone. The loss that they see is the cross-entropy, averaged over those pixels of a
sample that count.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.special
from numpy.typing import ArrayLike, NDArray

from lsgs_core.distributions import Probabilities
from lsgs_core.errors import InputError
from lsgs_core.probabilities import standardise
from lsgs_core.sampling import ScenarioSampler, check_probabilities


def _logarithm(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Natural logarithm, minus infinity of 0: what is never drawn never will be."""
    return np.log(weights, out=np.full(len(weights), -np.inf), where=weights > 0)


class LossProportional(ScenarioSampler):
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
        q = scipy.special.softmax(
            _logarithm(self.prior) + self.inverse_temperature * standardise(loss)
        )
        return (1 - self.mixing) * self.prior + self.mixing * q

    def observe(self, scenario: NDArray[np.int64], loss: NDArray[np.float64]) -> None:
        """Take note of the losses, in the order of the batch."""
        for k, value in zip(scenario, loss, strict=True):
            self.average[k] = self.memory * self.average[k] + (1 - self.memory) * value
            self.count[k] += 1


class GroupDRO(ScenarioSampler):
    """Group distributionally robust sampling: exponentiated gradient ascent on the losses.

    q starts as the prior; q_k is multiplied by exp(step * loss_k) and normalised (Sagawa et al.
    2020, Algorithm 1, with scenarios as groups). There the group is drawn uniformly and its loss
    weighted by q; here it is drawn from p = (1 - mixing) prior + mixing q, so that an observed loss
    is divided by K p_k.

    Args:
        prior: [K].
        step: eta.
        mixing: Weight of q.
    """

    _kept = ("log_weights",)

    def __init__(self, prior: ArrayLike, step: float = 0.01, mixing: float = 0.9) -> None:
        self.prior, self.step, self.mixing = check_probabilities(prior), step, mixing
        self.log_weights = _logarithm(self.prior)

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


class Exp3S(ScenarioSampler):
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
        self.log_weights = _logarithm(self.prior)
        self.average = np.zeros(count)
        self.seen = np.zeros(count)
        self.rewards = np.full(window, np.nan)  # a ring
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
        possible = self.prior > 0
        others = (grown.sum() - grown) / max(1, possible.sum() - 1)
        self.log_weights = _logarithm(np.where(possible, (1 - share) * grown + share * others, 0))
        self.log_weights -= self.log_weights.max()


class Curriculum(ScenarioSampler):
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
        logits = _logarithm(self.prior) - self.strength * left * self.standardised
        return scipy.special.softmax(logits)


class Online(ScenarioSampler):
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
