"""What makes a stage run again: its own code, and neither prose nor what only draws."""

import shutil
from pathlib import Path

import pytest
from checkout import ROOT
from study import freshness
from study.freshness import STAGES
from study.tiers import notebook_sha256


def clear_caches() -> None:
    for cached in (freshness.fingerprint, freshness.imported, freshness._written):
        cached.cache_clear()


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """Which stages have another fingerprint after a text was replaced in a copy of a file."""
    packages = {"study": ROOT / "notebooks" / "study", "lsgs_core": ROOT / "lsgs_core"}
    monkeypatch.setattr(freshness, "PACKAGES", {name: tmp_path / name for name in packages})
    for name, source in packages.items():
        shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))

    def fingerprints() -> dict[str, str]:
        clear_caches()
        return {stage: freshness.fingerprint(stage) for stage in STAGES}

    def after(file: str, old: str, new: str) -> set[str]:
        path: Path = tmp_path / file
        before, text = fingerprints(), path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        return {stage for stage, value in fingerprints().items() if value != before[stage]}

    yield after
    clear_caches()


TRAINS = {"pretraining", "finetuning"}
OTHER = "\nfrom ", "\nOTHER = 1\nfrom "


@pytest.mark.parametrize(
    ("file", "old", "new", "stages"),
    [
        ("study/training.py", "momentum=0.9", "momentum=0.8", TRAINS),
        ("study/training.py", '"""Train a model in place', '"""Fit a model in place', set()),
        ("lsgs_core/models/cmx.py", "from ", "# Why.\nfrom ", set()),
        ("lsgs_core/models/cmx.py", *OTHER, TRAINS | {"scoring", "evaluation", "mapping"}),
        ("lsgs_core/models/cpu.py", *OTHER, TRAINS | {"scoring", "evaluation", "mapping"}),
        ("study/figures/scoring.py", *OTHER, set()),
        ("study/tiers.py", "10_000", "20_000", {"evaluation"}),
        ("study/statistics.py", *OTHER, {"evaluation"}),
        ("study/finetuning.py", "def finetune(", "def _other():\n    pass\n\n\ndef finetune(",
         {"finetuning"}),
    ],
)  # fmt: skip
def test_what_an_edit_makes_run_again(changed, file, old, new, stages):
    assert changed(file, old, new) == stages


def test_scenarios_matter_everywhere(changed):
    edit = "lsgs_core/scenarios.py", *OTHER
    assert TRAINS | {"scoring", "evaluation", "mapping"} <= changed(*edit)


def test_cells_of_a_notebook(tmp_path):
    """Prose, outputs and defaults do not count; code does."""
    path = tmp_path / "05.ipynb"
    shutil.copyfile(ROOT / "notebooks" / "05_evaluation.ipynb", path)
    before, text = notebook_sha256(path), path.read_text()
    path.write_text(text.replace("# 05 Evaluation", "# 05 Results"))
    assert notebook_sha256(path) == before
    path.write_text(text.replace("figures.use_style()", "figures.use_style  ()"))
    assert notebook_sha256(path) != before
