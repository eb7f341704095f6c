"""Random numbers by stage, purpose, seed, epoch and sample, in whatever order they are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lsgs_core.errors import InputError

Stage = Literal["pretraining", "finetuning"]

# Pretraining and fine-tuning share no random number, whatever their seeds: a fine-tuning that draws
# the order and the scenarios of its pretraining again would see little that is new.
STAGES: dict[Stage, int] = {"finetuning": 0, "pretraining": 1}
# One stream per purpose, so that the scenario of a sample is independent of its augmentation.
STREAMS = {
    "scenario": 0,
    "order": 1,
    "augmentation": 2,
    "weights": 3,
    "dropout": 4,
    "permutation": 5,
    "second_scenario": 6,
    "bootstrap": 7,
}


def generator(
    stream: str, seed: int, epoch: int = 0, index: int = 0, stage: Stage = "finetuning"
) -> np.random.Generator:
    """Counter-based generator (Philox) of one stage, purpose, epoch and sample.

    Args:
        stream: A name in `STREAMS`.
        seed: Non-negative, below 2^64.
        epoch: Non-negative.
        index: Sample index, non-negative.
        stage: What is trained with the numbers.

    Raises:
        InputError: A negative seed, epoch or index, or a seed that is too large.
    """
    if min(seed, epoch, index) < 0 or seed >= 2**64:
        raise InputError(
            f"seed, epoch, index: expected 0 or more, seed below 2^64, found {(seed, epoch, index)}"
        )
    # The lowest counter word counts the blocks that are drawn; the others tell streams apart.
    counter = [0, index, epoch, STREAMS[stream]]
    return np.random.Generator(
        np.random.Philox(key=np.array([seed, STAGES[stage]], dtype=np.uint64), counter=counter)
    )


def uniform_numbers(
    stream: str,
    seed: int,
    epoch: int,
    indices: Sequence[int] | NDArray[np.int64],
    stage: Stage = "finetuning",
) -> NDArray[np.float64]:
    """One number in [0, 1) for every sample index, float64 [B]."""
    return np.array(
        [generator(stream, seed, epoch, int(index), stage).random() for index in indices]
    )
