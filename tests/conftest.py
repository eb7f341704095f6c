"""Fixtures that more than one test file uses."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # what the notebooks use; more threads give other roundings

REFERENCE = Path(__file__).parent / "reference"
ROOT = Path(__file__).parent.parent


@pytest.fixture
def reference() -> Callable[[str], Mapping[str, np.ndarray]]:
    """Numbers that a backbone and its scoring must give, by the backbone's name."""
    return lambda name: np.load(REFERENCE / f"{name}.golden.npz")
