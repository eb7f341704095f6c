"""Drawing the scenario of each training sample.

A draw depends on seed, epoch and sample index alone: a counter-based generator gives one number in
[0, 1) for each sample, and the inverse of the cumulative probabilities turns it into a scenario.
The batch size, the number of processes and an interruption of the run therefore change nothing.
Two methods with the same seed and stream share their random numbers, so that their draws agree as
far as their probabilities do.
"""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lsgs_core.errors import Floats, InputError, array_of, check_count, check_type, real_numbers
from lsgs_core.randomness import Stage, uniform_numbers

Probabilities = Floats


def draw_scenarios(
    probabilities: ArrayLike,
    seed: int,
    epoch: int,
    indices: Sequence[int] | NDArray[np.int64],
    servable: NDArray[np.bool_] | None = None,
    stream: str = "scenario",
    stage: Stage = "finetuning",
) -> NDArray[np.int64]:
    """Draw one scenario for each sample, and return their indices, int64 [B].

    Args:
        probabilities: Probabilities p of the scenarios, [K], with a sum of 1.
        seed: Random seed of the run.
        epoch: Epoch, counted from 0.
        indices: Index of each sample in its data set (not its position in the batch), [B].
        servable: bool [B, K], the scenarios for which a sample has all files; p is renormalised
            over them. None means that every sample has every file.
        stream: Purpose of the random numbers; methods that should differ by chance alone take
            different ones.
        stage: The stage of training; pretraining and fine-tuning share no random number.

    Raises:
        InputError: p is not a distribution, or a sample can serve no scenario with p > 0.
    """
    p = check_probabilities(probabilities)
    numbers = uniform_numbers(stream, seed, epoch, indices, stage)
    rows = np.broadcast_to(p, (len(numbers), p.size))
    if servable is not None:
        rows = np.where(array_of("servable", servable, "b", rows.shape), p, 0.0)
        impossible = np.asarray(indices)[rows.sum(axis=1) <= 0].tolist()
        if impossible:
            expected = "files for a scenario with p > 0"
            raise InputError(f"samples {impossible}: expected {expected}, found no scenario")
    cumulative = np.cumsum(rows, axis=1)
    # Scaled by the last sum and not by 1: rounding must not leave a gap above the last scenario.
    drawn = (cumulative <= (numbers * cumulative[:, -1])[:, None]).sum(axis=1)
    return drawn.astype(np.int64)


def check_probabilities(
    probabilities: ArrayLike, count: int | None = None, name: str = "probabilities"
) -> Probabilities:
    """Return a distribution over `count` scenarios as float64 [K]; else raise `InputError`."""
    p = real_numbers(name, probabilities)
    if p.ndim != 1 or (p < 0).any() or abs(p.sum() - 1) > 1e-6:
        expected = "non-negative numbers that sum to 1, one per scenario"
        raise InputError.of(name, expected, np.round(p, 6).tolist())
    if count is not None and p.size != count:
        raise InputError(f"{name}: expected one per scenario ({count}), found {p.size}")
    return p


class ScenarioSampler:
    """What training needs from a sampler; a new sampler is a subclass with `probabilities`.

    A sampler that adapts receives the losses through `observe` and lists in `_kept` the attributes
    that it learns: arrays over the scenarios, or numbers. They are saved with the training state.
    """

    _kept: tuple[str, ...] = ()

    def probabilities(self, epoch: int) -> Probabilities:
        """Return the probabilities of the scenarios in an epoch, float64 [K]."""
        raise NotImplementedError

    def observe(self, scenario: NDArray[np.int64], loss: Floats) -> None:
        """Learn from the scenario and the loss of each sample of a step, [B] each."""

    def report(self) -> dict[str, float]:
        """Return what the history of a run says of the sampler after each epoch, by column."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state, a dictionary for JSON."""
        return {name: np.asarray(getattr(self, name)).tolist() for name in self._kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state; raise `InputError` where it is that of another sampler."""
        check_type("training state", state, dict)
        if surplus := state.keys() - {*self._kept}:
            raise InputError.of("training state", f"{self._kept} alone", surplus)
        restored: dict[str, Any] = {}
        for name in self._kept:
            field, shape = f"{name} of the training state", np.shape(getattr(self, name))
            values = array_of(field, state.get(name), "iuf", shape)
            if np.isnan(values).any():  # minus infinity is the logarithm of a weight of 0
                raise InputError.of(field, "numbers", values.tolist())
            restored[name] = values.astype(np.float64) if values.ndim else float(values)
        vars(self).update(restored)


class FixedSampler(ScenarioSampler):
    """The same probabilities in every epoch, as in uniform sampling and in the paper's LSGS."""

    def __init__(self, probabilities: ArrayLike) -> None:
        self._probabilities = check_probabilities(probabilities)

    @classmethod
    def uniform(cls, count: int) -> Self:
        """Return uniform sampling of `count` scenarios, the standard modality dropout."""
        return cls(np.full(check_count("count", count), 1 / count))

    def probabilities(self, epoch: int) -> Probabilities:
        """Return the same p in every epoch, float64 [K]."""
        return self._probabilities

    def state_dict(self) -> dict[str, Any]:
        """Return the probabilities, with which a restored run is compared."""
        return {"probabilities": self._probabilities.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raise `InputError` where the saved run drew from other probabilities."""
        check_type("training state", state, dict)
        saved: Any = state.get("probabilities")
        if len(state) != 1 or not np.array_equal(saved, self._probabilities):
            raise InputError("training state: expected the same scenario probabilities")
