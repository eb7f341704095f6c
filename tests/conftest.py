"""Fixtures that more than one test file uses."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from study.data.manifest import load_manifest
from study.data.patches import make_patches
from study.data.preparation import prepare
from study.data.raw_files import fetch

torch.set_num_threads(1)  # what the notebooks use; more threads give other roundings

REFERENCE = Path(__file__).parent / "reference"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def prepared_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real demo scene, downloaded into the cache that the notebooks use, with its patches."""
    definition = load_manifest(ROOT / "data_manifest.yaml").dataset("demo")
    folder = tmp_path_factory.mktemp("work") / "prepared" / "demo"
    prepare(definition, fetch(definition.source, ROOT / "work" / "downloads" / "demo"), folder)
    make_patches(definition, folder)
    return folder


@pytest.fixture
def reference() -> Callable[[str], Mapping[str, np.ndarray]]:
    """Numbers that a backbone and its scoring must give, by the backbone's name."""
    return lambda name: np.load(REFERENCE / f"{name}.golden.npz")
