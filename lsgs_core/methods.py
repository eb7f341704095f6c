"""The compared methods by name: what draws the scenarios, and what is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lsgs_core.errors import InputError
from lsgs_core.sampling import FixedSampler, ScenarioSampler
from lsgs_core.scenarios import ScenarioSet

# From the scenarios and the scored probabilities to a sampler.
SamplerFactory = Callable[[ScenarioSet, NDArray[np.float64]], ScenarioSampler]


def uniform(scenarios: ScenarioSet, scored: NDArray[np.float64]) -> ScenarioSampler:
    """Every scenario alike: standard fine-tuning with modality dropout, the paper's baseline."""
    return FixedSampler.uniform(len(scenarios))


def lsgs(scenarios: ScenarioSet, scored: NDArray[np.float64]) -> ScenarioSampler:
    """The probabilities that scoring gave: the paper's method."""
    return FixedSampler(scored)


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        title: For tables and figures.
        sampler: Builds what draws the scenarios.
        low_rank: Train low-rank updates (LoRA) instead of all weights.
    """

    title: str
    sampler: SamplerFactory
    low_rank: bool = False


METHODS = {
    "uniform": Method("uniform", uniform),
    "lsgs": Method("LSGS", lsgs),
    "lora": Method("LoRA", uniform, low_rank=True),
}


def find_method(name: str) -> Method:
    """The method of a name.

    Raises:
        InputError: There is none of that name; the message lists those there are.
    """
    if name not in METHODS:
        raise InputError(f"method: expected one of {sorted(METHODS)}, found {name!r}")
    return METHODS[name]
