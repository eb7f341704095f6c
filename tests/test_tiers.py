"""Tier files: what is wrong in one is said before anything runs."""

import shutil

import papermill
import pytest
import yaml
from checkout import ROOT
from study.stages.parameters import checked_parameters, notebook_parameters
from study.stages.tiers import NOTEBOOKS, StudyFolder, load_tier

from lsgs_core import InputError

NOTEBOOK_FOLDER = ROOT / "notebooks"
TIERS = sorted(path.stem for path in (NOTEBOOK_FOLDER / "tiers").glob("*.yaml"))


@pytest.fixture
def project(tmp_path):
    """A copy of the notebooks whose tier `own` a test may write."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copyfile(ROOT / "data_manifest.yaml", tmp_path / "data_manifest.yaml")
    tiers = tmp_path / "notebooks" / "tiers"
    demo = yaml.safe_load((tiers / "demo.yaml").read_text())

    def write(sections):
        content = demo | sections
        (tiers / "own.yaml").write_text(yaml.safe_dump(content))
        return load_tier("own", tmp_path)

    return write


@pytest.mark.parametrize("name", TIERS)
def test_committed_tiers_are_valid(name):
    tier = load_tier(name, ROOT)
    jobs = list(tier.jobs())
    expected = len(tier.datasets) + 2 * len(tier.networks()) + len(tier.points()) + 1
    assert len(jobs) == len(dict(jobs)) == expected
    known = {path.stem: notebook_parameters(path) for path in NOTEBOOK_FOLDER.glob("*.ipynb")}
    assert all(parameters.keys() <= known[job.split("-")[0]].keys() for job, parameters in jobs)


@pytest.mark.parametrize("notebook", NOTEBOOKS.values())
def test_papermill_sees_the_same_parameters(notebook):
    path = NOTEBOOK_FOLDER / f"{notebook}.ipynb"
    seen = papermill.inspect_notebook(str(path))
    ours = notebook_parameters(path)
    assert list(seen) == list(ours)
    for name, entry in seen.items():
        assert entry["inferred_type_name"] == type(ours[name]).__name__
        assert entry["help"], f"{notebook}: {name} has no comment"


def test_what_is_for_all_is_taken_where_a_notebook_has_it(project):
    of_all = {"task": "forest", "batch_size": 4, "threads": 2}
    sections = project({"all": of_all, "04_finetuning": {"batch_size": 2}}).sections
    assert {section["task"] for section in sections.values()} == {"forest"}
    names = "04_finetuning", "03_scenario_scoring", "01_data_preparation"
    assert [sections[name].get("batch_size") for name in names] == [2, 4, None]


@pytest.mark.parametrize("notebook", sorted(path.stem for path in NOTEBOOK_FOLDER.glob("*.ipynb")))
def test_notebooks_check_their_parameters(notebook, monkeypatch):
    """Defaults are accepted; every parameter refuses another type, and hostile.yaml has values."""
    monkeypatch.chdir(NOTEBOOK_FOLDER)
    path = NOTEBOOK_FOLDER / f"{notebook}.ipynb"
    defaults = notebook_parameters(path)
    assert checked_parameters(notebook, defaults | {"other": 1}) == defaults
    for name in defaults:
        with pytest.raises(InputError, match=name):
            checked_parameters(notebook, defaults | {name: [1]})
    source = path.read_text("utf-8")
    opened = "open_run(" in source or "open_grid(" in source
    assert opened or f'checked_parameters(\\"{notebook}\\", globals())' in source


def test_parameter_files_keep_their_date(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tier = project({})
    tier.write_parameter_files()
    files = sorted((tmp_path / "work" / "own" / "parameters").glob("*.yaml"))
    assert len(files) == len(list(tier.jobs()))
    dates = {path: path.stat().st_mtime_ns for path in files}
    tier.write_parameter_files()
    assert dates == {path: path.stat().st_mtime_ns for path in files}
    longer = {"04_finetuning": tier.sections["04_finetuning"] | {"epochs": 99}}
    project(longer).write_parameter_files()
    rewritten = {path.stem for path in files if path.stat().st_mtime_ns != dates[path]}
    assert rewritten == {job for job, _ in tier.jobs() if job.startswith("04")}


def test_a_grid_of_several_products(project):
    many = {"backbones": ["cbc"], "methods": ["uniform", "lsgs"], "folds": 2, "seeds": 3}
    few = {"backbones": ["cbc"], "methods": ["lora", "uniform"], "folds": [0], "seeds": [2]}
    grid = [many, few | {"datasets": ["demo", "landsat7"]}]
    tier = project({"02_pretraining_check": {"weights": "train"}, "grid": grid})
    points = tier.points()
    assert len(points) == 2 * 3 + 1
    assert points["demo", "cbc", 0, 2] == ["uniform", "lsgs", "lora"]  # in both, run once
    assert points["demo", "cbc", 1, 2] == ["uniform", "lsgs"]
    assert points["landsat7", "cbc", 0, 2] == ["lora", "uniform"]
    starts = [("demo", "cbc", 0, 0), ("demo", "cbc", 1, 0), ("landsat7", "cbc", 0, 0)]
    assert tier.networks() == starts
    jobs = dict(tier.jobs())
    assert jobs["04_finetuning-demo-cbc-fold0-seed2"]["methods"] == "uniform,lsgs,lora"
    assert jobs["04_finetuning-demo-cbc-fold0-seed2"]["work"] == "../work/own"
    assert jobs["02_pretraining_check-landsat7-cbc-fold0-network0"]["dataset"] == "landsat7"
    assert jobs["05_evaluation"]["tier"] == "own"


def test_one_run_of_a_grid():
    tier = load_tier("demo", ROOT)
    single = tier.only("demo/cmx/lsgs/0/0")
    assert single.points() == {("demo", "cmx", 0, 0): ["lsgs"]}
    assert [job for job, _ in single.jobs()] == [
        "01_data_preparation-demo",
        "02_pretraining_check-demo-cmx-fold0-network0",
        "03_scenario_scoring-demo-cmx-fold0-network0",
        "04_finetuning-demo-cmx-fold0-seed0",
        "05_evaluation",
    ]
    for wrong in ("demo/cmx/lsgs/0/7", "cmx", "demo/cmx/magic/0/0", ""):
        with pytest.raises(InputError, match="such as demo/cbc_slp/uniform/0/0"):
            tier.only(wrong)


def test_runs_that_are_there_are_found(tmp_path):
    study = StudyFolder(tmp_path)
    for seed, methods in ((0, ("lora", "uniform")), (11, ("lsgs",))):
        for method in methods:
            run = study.runs("demo", "cbc", 1, seed) / method
            run.mkdir(parents=True)
            (run / "records.csv").touch()
    (study.runs("demo", "cbc", 1, 0) / "lsgs").mkdir()  # not finished
    first, second = ("demo", "cbc", 1, 0), ("demo", "cbc", 1, 11)
    assert study.points() == {first: ["uniform", "lora"], second: ["lsgs"]}
