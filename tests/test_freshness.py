"""What makes a stage run again: its own code, and neither prose nor what only draws."""

import shutil
from pathlib import Path

import pytest
from checkout import ROOT
from study.provenance import freshness
from study.provenance.freshness import STAGES
from study.stages.tiers import notebook_sha256


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """Which stages have another fingerprint while a text is replaced in a copy of a file."""
    folder = tmp_path_factory.mktemp("packages")
    packages = {"study": ROOT / "notebooks" / "study", "lsgs_core": ROOT / "lsgs_core"}
    for name, source in packages.items():
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))

    def fingerprints() -> dict[str, str]:
        for cached in (freshness.fingerprint, freshness.imported):
            cached.cache_clear()
        return {stage: freshness.fingerprint(stage) for stage in STAGES}

    def after(file: str, old: str, new: str) -> set[str]:
        path: Path = folder / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        found = fingerprints()
        path.write_text(text)
        return {stage for stage in STAGES if found[stage] != before[stage]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(freshness, "PACKAGES", {name: folder / name for name in packages})
        before = fingerprints()
        yield after
    fingerprints()


TRAINS = {"pretraining", "finetuning"}
OTHER = "\nfrom ", "\nOTHER = 1\nfrom "


@pytest.mark.parametrize(
    ("file", "old", "new", "stages"),
    [
        ("study/training/loop.py", "momentum=0.9", "momentum=0.8", TRAINS),
        ("study/training/loop.py", '"""Train a model in place', '"""Fit a model in place', set()),
        ("lsgs_core/models/cmx.py", "from ", "# Why.\nfrom ", set()),
        ("lsgs_core/models/cmx.py", *OTHER, TRAINS | {"scoring", "evaluation", "mapping"}),
        ("lsgs_core/models/cpu.py", *OTHER, TRAINS | {"scoring", "evaluation", "mapping"}),
        ("study/figures/scoring.py", *OTHER, set()),
        ("study/stages/tiers.py", "10_000", "20_000", {"evaluation"}),
        ("study/metrics/statistics.py", *OTHER, {"evaluation"}),
        ("study/comparison/robustness.py", *OTHER, {"evaluation"}),
        ("study/stages/finetuning.py", "def finetune(", "OTHER = 1\n\n\ndef finetune(",
         {"finetuning"}),
        ("lsgs_core/scenarios.py", *OTHER, {*STAGES}),
    ],
)  # fmt: skip
def test_what_an_edit_makes_run_again(changed, file, old, new, stages):
    assert changed(file, old, new) == stages


def test_cells_of_a_notebook(tmp_path):
    """Prose, outputs and defaults do not count; code does."""
    path = tmp_path / "05.ipynb"
    shutil.copyfile(ROOT / "notebooks" / "05_evaluation.ipynb", path)
    before, text = notebook_sha256(path), path.read_text()
    path.write_text(text.replace("# 05 Evaluation", "# 05 Results"))
    assert notebook_sha256(path) == before
    path.write_text(text.replace("figures.use_style()", "figures.use_style  ()"))
    assert notebook_sha256(path) != before
