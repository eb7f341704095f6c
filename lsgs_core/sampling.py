"""Drawing the scenario of every training sample.

A draw is a pure function of (seed, epoch, sample index): a counter-based generator gives one number
in [0, 1) for each, and the inverse of the cumulative probabilities turns it into a scenario. So
batch size, the number of processes and a resumed run change nothing, and two methods with the same
seed share their random numbers: where their probabilities agree, so do their draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lsgs_core.errors import InputError
from lsgs_core.randomness import Stage, uniform_numbers


def draw_scenarios(
    probabilities: ArrayLike,
    seed: int,
    epoch: int,
    indices: Sequence[int] | NDArray[np.int64],
    servable: NDArray[np.bool_] | None = None,
    stream: str = "scenario",
    stage: Stage = "finetuning",
) -> NDArray[np.int64]:
    """Draw one scenario per sample by inverse CDF.

    Args:
        probabilities: p over the scenarios, [K], summing to 1.
        seed: Of the run.
        epoch: From 0.
        indices: Index of every sample in its data set, [B]; not its position in the batch.
        servable: Scenarios that each sample can serve, bool [B, K], where files are absent: p is
            renormalised over them. None: every sample serves every scenario.
        stream: Which random numbers; arms that are to differ by chance alone take another one.
        stage: What is trained; pretraining and fine-tuning share no random number.

    Returns:
        Scenario index per sample, int64 [B].

    Raises:
        InputError: p is not a distribution, or a sample can serve no scenario of positive p.
    """
    p = check_probabilities(probabilities)
    numbers = uniform_numbers(stream, seed, epoch, indices, stage)
    if servable is None:
        rows = np.broadcast_to(p, (len(numbers), p.size))
    else:
        rows = np.where(servable, p, 0.0)
        if (rows.sum(axis=1) <= 0).any():
            stuck = np.asarray(indices)[rows.sum(axis=1) <= 0]
            raise InputError(f"samples {stuck.tolist()}: no scenario that they serve has p > 0")
    cumulative = np.cumsum(rows, axis=1)
    # Scaled by the last sum, not by 1: rounding must not leave a gap above the last scenario.
    drawn = (cumulative <= (numbers * cumulative[:, -1])[:, None]).sum(axis=1)
    return drawn.astype(np.int64)


def check_probabilities(probabilities: ArrayLike, count: int | None = None) -> NDArray[np.float64]:
    """Return p as float64 [K], or raise InputError when it is not a distribution (over `count`)."""
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim != 1 or not np.isfinite(p).all() or (p < 0).any() or abs(p.sum() - 1) > 1e-6:
        raise InputError(
            "probabilities: expected non-negative numbers that sum to 1, one per scenario, "
            f"found {np.round(p, 6).tolist()}"
        )
    if count is not None and p.size != count:
        raise InputError(f"probabilities: expected one per scenario ({count}), found {p.size}")
    return p


class ScenarioSampler:
    """What training asks of a sampler. Adding a sampler means a subclass with `probabilities`.

    One that adapts watches the losses through `observe`, and names the attributes that it learns in
    `_kept`: arrays over the scenarios, or numbers. They are its state, which is saved with the
    training state.
    """

    _kept: tuple[str, ...] = ()

    def probabilities(self, epoch: int) -> NDArray[np.float64]:
        """Probabilities of the scenarios now, float64 [K]."""
        raise NotImplementedError

    def observe(self, scenario: NDArray[np.int64], loss: NDArray[np.float64]) -> None:
        """Take note of the loss of every sample of a step, both [B]; by default not."""

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


class FixedSampler(ScenarioSampler):
    """The same probabilities throughout: the paper's LSGS, and uniform sampling.

    Args:
        probabilities: p over the scenarios, [K].
    """

    def __init__(self, probabilities: ArrayLike) -> None:
        self._probabilities = check_probabilities(probabilities)

    @classmethod
    def uniform(cls, count: int) -> FixedSampler:
        """Uniform over `count` scenarios: standard modality dropout."""
        return cls(np.full(count, 1 / count))

    def probabilities(self, epoch: int) -> NDArray[np.float64]:
        """The same in every epoch, float64 [K]."""
        return self._probabilities

    def state_dict(self) -> dict[str, Any]:
        """No state but the probabilities."""
        return {"probabilities": self._probabilities.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the saved run drew from the same probabilities.

        Raises:
            InputError: It drew from others.
        """
        if state != self.state_dict():
            raise InputError("training state: it was made with other scenario probabilities")
