"""Scenarios: which modalities are present.

A scenario is a non-empty subset of the M modalities; there are K = 2^M - 1 of them. Their order is
the same everywhere (method of arXiv 2605.20372): by the number of modalities present, then as
`itertools.combinations` gives them, so the full scenario is always the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from lsgs_core.errors import InputError

# 2^12 - 1 scenarios already need a 4095 x 4095 kernel; more sensors than that is a typing error.
LARGEST_MODALITY_COUNT = 12


@dataclass(frozen=True)
class ScenarioSet:
    """Every scenario over a list of modalities, in the order of the method.

    Attributes:
        modalities: Modality names, in the order in which models take their images.

    Example:
        >>> scenarios = ScenarioSet.of(["RGB", "NIR", "SWIR"])
        >>> scenarios.names[:4]
        ('RGB', 'NIR', 'SWIR', 'RGB+NIR')
        >>> scenarios.masks[3]
        array([ True,  True, False])
    """

    modalities: tuple[str, ...]

    @classmethod
    def of(cls, modalities: Sequence[str]) -> ScenarioSet:
        """Build the scenarios of `modalities`.

        Raises:
            InputError: Fewer than two modalities, more than twelve, or a repeated or empty name.
        """
        if isinstance(modalities, str) or not all(isinstance(name, str) for name in modalities):
            raise InputError(f"modalities: expected a list of names, found {modalities!r}")
        names = tuple(modalities)
        if not 2 <= len(names) <= LARGEST_MODALITY_COUNT:
            raise InputError(
                f"modalities: expected 2 to {LARGEST_MODALITY_COUNT} of them, found {len(names)}"
            )
        if len(set(names)) != len(names) or "" in names or any("+" in name for name in names):
            raise InputError(
                f"modalities: expected different, non-empty names without '+', found {list(names)}"
            )
        return cls(names)

    @cached_property
    def masks(self) -> NDArray[np.bool_]:
        """Availability mask of every scenario, bool [K, M]."""
        count = len(self.modalities)
        present = [
            chosen
            for number in range(1, count + 1)
            for chosen in combinations(range(count), number)
        ]
        masks = np.zeros((len(present), count), dtype=bool)
        for row, chosen in zip(masks, present, strict=True):
            row[list(chosen)] = True
        masks.setflags(write=False)
        return masks

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names such as 'RGB+NIR', in the order of `masks`."""
        return tuple(
            "+".join(name for name, present in zip(self.modalities, mask, strict=True) if present)
            for mask in self.masks
        )

    def index(self, available: Sequence[bool]) -> int:
        """Index of the scenario with just these modalities.

        Raises:
            InputError: No modality is there, or not one entry per modality.
        """
        wanted = np.asarray(available, dtype=bool)
        if wanted.shape != (len(self.modalities),) or not wanted.any():
            raise InputError(f"available: expected at least one of {list(self.modalities)}")
        return int((self.masks == wanted).all(axis=1).argmax())

    @property
    def full(self) -> int:
        """Index of the scenario in which every modality is present: the last."""
        return len(self) - 1

    @cached_property
    def missing(self) -> NDArray[np.int64]:
        """Number of missing modalities per scenario, int64 [K]."""
        return (~self.masks).sum(axis=1)

    def __len__(self) -> int:
        return 2 ** len(self.modalities) - 1
