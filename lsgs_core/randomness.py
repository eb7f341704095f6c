"""Random numbers that depend on stage, purpose, seed, epoch and sample, in any order of drawing."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lsgs_core.errors import Floats, InputError, check_choice, check_count

Stage = Literal["pretraining", "finetuning"]

# Pretraining and fine-tuning share no random number, whatever their seeds: fine-tuning that repeats
# the order and the scenarios of its pretraining would see little that is new.
STAGES: dict[Stage, int] = {"finetuning": 0, "pretraining": 1}
# By purpose, so that the scenario of a sample is independent of its augmentation.
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
    """Return the counter-based generator (Philox) of one stage, purpose, epoch and sample.

    The stream, a name in `STREAMS`, is the purpose of the numbers. Seed, epoch and the index of the
    sample in its data set are from 0 to 2^64 - 1.
    """
    most = 2**64 - 1
    seed, epoch = check_count("seed", seed, 0, most), check_count("epoch", epoch, 0, most)
    index = check_count("index", index, 0, most)
    check_choice("stream", stream, STREAMS)
    check_choice("stage", stage, STAGES)
    # The lowest word of the counter counts the blocks that are drawn; the others separate streams.
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
) -> Floats:
    """Return one number in [0, 1) for each of B sample indices, float64 [B]; see `generator`."""
    if not isinstance(indices, Sequence) and getattr(indices, "ndim", 0) != 1:
        raise InputError.of("indices", "a list of integers", indices)
    return np.array([generator(stream, seed, epoch, index, stage).random() for index in indices])
