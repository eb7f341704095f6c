"""Fixtures that more than one test file uses."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import scene
import torch
import yaml
from checkout import ROOT, copy_checkout
from study.data.manifest import Dataset, load_manifest
from study.data.patches import make_patches
from study.data.preparation import prepare
from study.data.raw_files import fetch

torch.set_num_threads(1)  # what the notebooks use; more threads give other roundings


@pytest.fixture(scope="session")
def prepared_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real demo scene, downloaded into the cache that the notebooks use, with its patches."""
    definition = load_manifest(ROOT / "data_manifest.yaml").dataset("demo")
    folder = tmp_path_factory.mktemp("work") / "prepared" / "demo"
    prepare(definition, fetch(definition.source, ROOT / "work" / "downloads" / "demo"), folder)
    make_patches(definition, folder)
    return folder


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A fresh clone of this checkout."""
    return copy_checkout(tmp_path)


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny scene of `scene`, in the raw layout of the demo."""
    return scene.write_scene(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="session")
def wheel(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scene.write_wheel(raw, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def manifest(raw: Path, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of the tiny scene, a file."""
    path = tmp_path_factory.mktemp("manifest") / "data_manifest.yaml"
    path.write_text(yaml.safe_dump(scene.manifest_content(raw, wheel), sort_keys=False), "utf-8")
    return path


@pytest.fixture(scope="session")
def dataset(manifest: Path) -> Dataset:
    return load_manifest(manifest).dataset("demo")


@pytest.fixture(scope="session")
def prepared(raw: Path, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare(dataset, raw, folder)
    make_patches(dataset, folder)
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A file system of its own, of so many bytes."""
    place = tmp_path / "disk"
    place.mkdir()

    def mounted(size: int) -> Path:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("a file system can only be mounted by root")
        return place

    yield mounted
    subprocess.run(["umount", str(place)], capture_output=True, check=False)
