"""Scenarios: the sets of modalities that may be available.

A scenario is a non-empty subset of the M modalities, so there are K = 2^M - 1 of them. They have
the same order everywhere (method of arXiv 2605.20372): by the number of available modalities, and
then as `itertools.combinations` returns them. The full scenario is therefore always the last.
"""

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, compress, islice
from typing import Self

import numpy as np
from numpy.typing import NDArray

from lsgs_core.errors import InputError, array_of

# The 2^12 - 1 scenarios of twelve modalities already need a kernel of 4095 x 4095 numbers.
LARGEST_MODALITY_COUNT = 12


@dataclass(frozen=True)
class ScenarioSet:
    """All scenarios of a list of modalities, in the order of the method.

    Attributes:
        modalities: Names of the modalities, in the order in which a network takes their images.

    Raises:
        InputError: There are fewer than two or more than twelve modalities, or a name is empty,
            repeated, or contains "+".

    Example:
        >>> scenarios = ScenarioSet.of(["RGB", "NIR", "SWIR"])
        >>> scenarios.names[:4]
        ('RGB', 'NIR', 'SWIR', 'RGB+NIR')
        >>> scenarios.masks[3]
        array([ True,  True, False])
    """

    modalities: tuple[str, ...]

    def __post_init__(self) -> None:
        names = self.modalities
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise InputError.of("modalities", "a list of names", names)
        if not 2 <= len(names) <= LARGEST_MODALITY_COUNT:
            raise InputError.of("modalities", f"2 to {LARGEST_MODALITY_COUNT} names", len(names))
        if len(set(names)) != len(names) or "" in names or any("+" in name for name in names):
            expected = "different, non-empty names without '+'"
            raise InputError(f"modalities: expected {expected}, found {list(names)}")

    @classmethod
    def of(cls, modalities: Iterable[str]) -> Self:
        """Return the scenarios of names in any ordered iterable; errors are those of the class."""
        scalar = not isinstance(modalities, Iterable) or getattr(modalities, "ndim", 1) == 0
        if scalar or isinstance(modalities, str | Set):
            raise InputError.of("modalities", "a list of names", modalities)
        return cls(tuple(islice(modalities, LARGEST_MODALITY_COUNT + 1)))

    @cached_property
    def masks(self) -> NDArray[np.bool_]:
        """Availability mask of each scenario, bool [K, M]; read-only."""
        places = range(len(self.modalities))
        subsets = (subset for size in places for subset in combinations(places, size + 1))
        masks = np.array([[place in subset for place in places] for subset in subsets])
        masks.setflags(write=False)
        return masks

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names such as 'RGB+NIR', in the order of `masks`."""
        return tuple("+".join(compress(self.modalities, mask)) for mask in self.masks)

    def index(self, available: Sequence[bool]) -> int:
        """Return the index of the scenario in which exactly these modalities are available.

        There must be one boolean per modality, at least one of them True; else raise `InputError`.
        """
        wanted = array_of("available", available, "b", [len(self.modalities)])
        if not wanted.any():
            raise InputError(f"available: expected at least one of {list(self.modalities)}")
        return int((self.masks == wanted).all(axis=1).argmax())

    @property
    def full(self) -> int:
        """Index of the scenario in which every modality is available: the last one."""
        return len(self) - 1

    @cached_property
    def missing(self) -> NDArray[np.int64]:
        """Number of missing modalities in each scenario, int64 [K]."""
        return (~self.masks).sum(axis=1)

    def __len__(self) -> int:
        return 2 ** len(self.modalities) - 1
