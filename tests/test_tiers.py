"""Tier files: what is wrong in one is said before anything runs."""

import shutil
from pathlib import Path

import papermill
import pytest
import yaml
from study.tiers import NOTEBOOKS, StudyFolder, load_tier, notebook_parameters

from lsgs_core import InputError

ROOT = Path(__file__).parent.parent
NOTEBOOK_FOLDER = ROOT / "notebooks"
TIERS = sorted(path.stem for path in (ROOT / "notebooks" / "tiers").glob("*.yaml"))


@pytest.fixture
def project(tmp_path):
    """A copy of the notebooks whose tier `own` a test may write."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copyfile(ROOT / "data_manifest.yaml", tmp_path / "data_manifest.yaml")
    demo = yaml.safe_load((tmp_path / "notebooks" / "tiers" / "demo.yaml").read_text())

    def write(change):
        content = change(demo) or demo
        path = tmp_path / "notebooks" / "tiers" / "own.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return load_tier("own", tmp_path)

    return write


@pytest.mark.parametrize("name", TIERS)
def test_committed_tiers_are_valid(name):
    tier = load_tier(name, ROOT)
    jobs = list(tier.jobs())
    grid = tier.grid
    expected = len(grid.datasets) + 2 * len(grid.starts()) + len(grid.points()) + 1
    assert len(jobs) == len(dict(jobs)) == expected
    for job, parameters in jobs:
        notebook = job.split("-")[0]
        assert (
            parameters.keys() <= notebook_parameters(NOTEBOOK_FOLDER / f"{notebook}.ipynb").keys()
        )


@pytest.mark.parametrize("notebook", NOTEBOOKS.values())
def test_papermill_sees_the_same_parameters(notebook):
    path = ROOT / "notebooks" / f"{notebook}.ipynb"
    seen = papermill.inspect_notebook(str(path))
    ours = notebook_parameters(path)
    assert list(seen) == list(ours)
    for name, entry in seen.items():
        assert entry["inferred_type_name"] == type(ours[name]).__name__
        assert entry["help"], f"{notebook}: {name} has no comment"


def changed(section, **values):
    return lambda tier: tier.setdefault(section, {}).update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("04_finetuning", epoch=3), r"04_finetuning\.epoch: .*not permitted"),
        (changed("04_finetuning", epochs="three"), r"04_finetuning\.epochs: .*integer"),
        (changed("04_finetuning", epochs=True), r"epochs: .*integer"),
        (changed("04_finetuning", augment=1), r"augment: .*boolean"),
        (changed("04_finetuning", methods="lsgs"), r"methods: .*not permitted"),
        (changed("05_evaluation", tier="demo"), r"tier: .*not permitted"),
        (changed("06_more", x=1), "06_more: .*not permitted"),
        (changed("grid", backbones=["cbc", "unet"]), r"grid\.0\.backbones\.1: expected one of"),
        (changed("grid", methods=["magic"]), r"grid\.0\.methods\.0: expected one of"),
        (changed("grid", folds=[0, 0]), r"grid\.0\.folds: expected different"),
        (changed("grid", folds=["a"]), r"grid\.0\.folds\.0"),
        (changed("grid", seeds=10**20), r"grid\.0\.seeds: expected at most 10000"),
        (changed("grid", seeds=[]), r"grid\.0\.seeds"),
        (changed("grid", colours=[1]), r"grid\.0\.colours: .*not permitted"),
        (changed("grid", seeds=0), r"grid\.0\.seeds"),
        (lambda tier: tier | {"grid": []}, "grid"),
        (changed("all", dataset="landsat7"), "all: no notebook has a parameter 'dataset'"),
        (changed("all", epoch=3), "all: no notebook has a parameter 'epoch'"),
        (changed("all", batch_size="8"), r"batch_size: .*integer"),
        (lambda tier: tier | {"all": [1]}, "all: expected parameters"),
        (lambda tier: tier | {"04_finetuning": [1]}, "04_finetuning"),
        (lambda tier: "grid: [", "YAML"),
        (lambda tier: "[1, 2]", "own.yaml"),
    ],
)
def test_mistakes_are_named(project, change, message):
    with pytest.raises(InputError, match=message):
        project(change)


def test_what_is_for_all_is_taken_where_a_notebook_has_it(project):
    def change(tier):
        tier["all"] = {"task": "forest", "batch_size": 4, "threads": 2}
        tier["04_finetuning"] = {"batch_size": 2}

    sections = project(change).sections
    assert {section["task"] for section in sections.values()} == {"forest"}
    sizes = {name: section.get("batch_size") for name, section in sections.items()}
    assert sizes["04_finetuning"] == 2
    assert sizes["03_scenario_scoring"] == 4
    assert sizes["01_data_preparation"] is None


def test_a_network_that_is_not_committed_is_named_before_anything_runs(project):
    def change(tier):
        tier["grid"]["folds"] = 2

    with pytest.raises(InputError, match=r"no committed network.*fold 1.*scratch"):
        project(change)


def test_an_int_is_a_float(project):
    tier = project(changed("04_finetuning", learning_rate=1))
    assert tier.sections["04_finetuning"]["learning_rate"] == 1


def test_unknown_tier():
    with pytest.raises(InputError, match="demo"):
        load_tier("dmeo", ROOT)


def test_parameter_files_keep_their_date(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tier = project(lambda tier: None)
    tier.write_parameter_files()
    files = sorted((tmp_path / "work" / "own" / "parameters").glob("*.yaml"))
    assert len(files) == len(list(tier.jobs()))
    dates = {path: path.stat().st_mtime_ns for path in files}
    tier.write_parameter_files()
    assert dates == {path: path.stat().st_mtime_ns for path in files}
    project(changed("04_finetuning", epochs=99)).write_parameter_files()
    rewritten = {path.stem for path in files if path.stat().st_mtime_ns != dates[path]}
    assert rewritten == {job for job, _ in tier.jobs() if job.startswith("04")}


def test_a_grid_of_several_products(project):
    def change(tier):
        tier["02_pretraining_check"] = {"weights": "train"}
        tier["grid"] = [
            {"backbones": ["cbc"], "methods": ["uniform", "lsgs"], "folds": 2, "seeds": 3},
            {
                "datasets": ["demo", "landsat7"],
                "backbones": ["cbc"],
                "methods": ["lora", "uniform"],
                "folds": [0],
                "seeds": [2],
            },
        ]

    tier = project(change)
    points = tier.grid.points()
    assert len(points) == 2 * 3 + 1
    assert points["demo", "cbc", 0, 2] == ["uniform", "lsgs", "lora"]  # in both, run once
    assert points["demo", "cbc", 1, 2] == ["uniform", "lsgs"]
    assert points["landsat7", "cbc", 0, 2] == ["lora", "uniform"]
    assert tier.grid.starts() == [("demo", "cbc", 0), ("demo", "cbc", 1), ("landsat7", "cbc", 0)]
    jobs = dict(tier.jobs())
    assert jobs["04_finetuning-demo-cbc-fold0-seed2"]["methods"] == "uniform,lsgs,lora"
    assert jobs["04_finetuning-demo-cbc-fold0-seed2"]["work"] == "../work/own"
    assert jobs["02_pretraining_check-landsat7-cbc-fold0"]["dataset"] == "landsat7"
    assert jobs["05_evaluation"]["tier"] == "own"


def test_runs_that_are_there_are_found(tmp_path):
    study = StudyFolder(tmp_path)
    for seed, methods in ((0, ("lora", "uniform")), (11, ("lsgs",))):
        for method in methods:
            run = study.runs("demo", "cbc", 1, seed) / method
            run.mkdir(parents=True)
            (run / "records.csv").touch()
    (study.runs("demo", "cbc", 1, 0) / "lsgs").mkdir()  # not finished
    assert study.points() == {
        ("demo", "cbc", 1, 0): ["uniform", "lora"],
        ("demo", "cbc", 1, 11): ["lsgs"],
    }
