"""Tier files: what is wrong in one is said before anything runs."""

import shutil
from pathlib import Path

import papermill
import pytest
import yaml
from study.parameters import checked_parameters, notebook_parameters
from study.tiers import NOTEBOOKS, StudyFolder, load_tier

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
    expected = len(grid.datasets) + 2 * len(tier.networks()) + len(grid.points()) + 1
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
        (changed("grid", methods=["magic"]), r"grid\.0\.methods\.0: .*expected one of"),
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
        (changed("grid", datasets=["x$(touch pwned)"]), "data set .* is unknown"),
        (changed("grid", datasets=["demo", "nowhere"]), "data set 'nowhere' is unknown"),
        (changed("grid", folds=[99]), "fold: expected less than 3"),
        (changed("01_data_preparation", shown_fold=99), "shown_fold: expected less than 3"),
        (changed("01_data_preparation", split="official"), "folds 'official' is unknown"),
        (changed("01_data_preparation", protocol="loose"), r"protocol: .*'strict' or 'paper'"),
        (changed("01_data_preparation", patch_size=-1), "patch_size: "),
        (changed("01_data_preparation", patch_size=10**400), "patch_size: "),
        (changed("all", task="roads"), "task 'roads' is unknown"),
        (changed("all", normalisation="z"), "normalisation: expected one of"),
        (changed("all", preset="huge"), "preset: expected one of"),
        (changed("all", failure_rates="UV:0.1"), "failure_rates: expected some of"),
        (changed("all", failure_rates="NIR:2"), "NIR|from 0 to 1"),
        (changed("all", device="gpu"), "device: "),
        (changed("all", workers=-1), "workers: .*greater than or equal to 0"),
        (changed("all", threads=0), "threads: "),
        (changed("all", processes=0), "processes: "),
        (changed("all", batch_size=0), "batch_size: "),
        (changed("02_pretraining_check", optimiser="adamw"), r"optimiser: .*'adam' or 'sgd'"),
        (changed("02_pretraining_check", drawn_by="magic"), "drawn_by: .*expected one of"),
        (changed("02_pretraining_check", drawn_by="coverage"), "scoring: expected one with"),
        (changed("02_pretraining_check", precision="float8"), "precision: "),
        (changed("03_scenario_scoring", descriptor="colour"), "descriptor: "),
        (changed("03_scenario_scoring", tolerance=float("nan")), "tolerance: "),
        (changed("03_scenario_scoring", ridge=0.0), "ridge: "),
        (changed("03_scenario_scoring", direction=0.0), "direction: expected a number other"),
        (changed("03_scenario_scoring", lengthscale=float("inf")), "lengthscale: "),
        (changed("02_pretraining_check", weights=""), "weights: "),
        (changed("02_pretraining_check", weights="a.safetensors"), "weights: expected a file"),
        (changed("04_finetuning", probabilities="a.json"), "probabilities: expected a file"),
        (changed("01_data_preparation", index_file="a\0b"), "index_file: "),
        (changed("01_data_preparation", raw="a" * 999), "raw: expected a folder: .*too long"),
        (changed("03_scenario_scoring", mixing=1.5), "mixing: "),
        (changed("04_finetuning", epochs=0), "epochs: "),
        (changed("04_finetuning", epochs=-3), "epochs: "),
        (changed("04_finetuning", epochs=10**21), "epochs: "),
        (changed("04_finetuning", learning_rate=float("nan")), "learning_rate: "),
        (changed("04_finetuning", learning_rate=float("inf")), "learning_rate: "),
        (changed("04_finetuning", rate_decay=-0.5), "rate_decay: "),
        (changed("04_finetuning", lora_rank=0), "lora_rank: "),
        (changed("05_evaluation", primary_metric="accuracy"), "primary_metric: expected one of"),
        (changed("05_evaluation", contrasts="lsgs"), "contrasts: expected different ones"),
        (changed("05_evaluation", contrasts="lsgs-magic"), "contrasts: .*found 'magic'"),
        (changed("05_evaluation", contrasts="lsgs-uniform"), "at least two seeds"),
        (changed("05_evaluation", resamples=0), "resamples: "),
        (lambda tier: "grid: 2024-13-45", "YAML"),
        (lambda tier: f"grid: {'9' * 5000}", "YAML"),
        (lambda tier: "[" * 100_000, "YAML"),
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


def test_planned_contrasts_with_two_seeds_are_taken(project):
    def change(tier):
        tier["grid"] |= {"methods": ["uniform_again", "lsgs"], "seeds": 2}
        tier["05_evaluation"] = {"contrasts": "lsgs-uniform, lsgs-pretrained"}

    assert project(change).setting("evaluation", "contrasts").startswith("lsgs-uniform")


def test_an_int_is_a_float(project):
    tier = project(changed("04_finetuning", learning_rate=1))
    assert tier.sections["04_finetuning"]["learning_rate"] == 1


@pytest.mark.parametrize("name", ["dmeo", "../tiers/smoke", "sub/smoke", "", "downloads", "a b"])
def test_names_that_are_no_tier(project, tmp_path, name):
    project(lambda tier: None)
    tiers = tmp_path / "notebooks" / "tiers"
    (tiers / "sub").mkdir()
    for other in ("sub/smoke", "downloads", "a b"):
        shutil.copyfile(tiers / "smoke.yaml", tiers / f"{other}.yaml")
    with pytest.raises(InputError, match="tier: "):
        load_tier(name, tmp_path)


def test_the_paper_s_loss_needs_no_data_to_be_refused(project):

    def change(tier):
        tier["grid"]["datasets"] = ["landsat7"]
        tier["02_pretraining_check"] = {"weights": "train", "protocol": "paper"}
        tier["all"] = {"task": "all_classes"}

    with pytest.raises(InputError, match="binary and multi-label"):
        project(change)


@pytest.mark.parametrize("notebook", sorted(path.stem for path in NOTEBOOK_FOLDER.glob("*.ipynb")))
def test_notebooks_check_their_parameters(notebook, monkeypatch, tmp_path):
    """Defaults are accepted, and every parameter refuses a value of another type."""
    monkeypatch.chdir(NOTEBOOK_FOLDER)
    path = NOTEBOOK_FOLDER / f"{notebook}.ipynb"
    defaults = notebook_parameters(path)
    assert checked_parameters(notebook, defaults | {"other": 1}) == defaults
    for name in defaults:
        with pytest.raises(InputError, match=name):
            checked_parameters(notebook, defaults | {name: [1]})
    (tmp_path / "file").touch()
    for name, wrong in {
        "work": str(tmp_path / "file" / "work"),
        "dataset": "nowhere",
        "task": "roads",
        "shown_fold": 99,
        "learning_rate": float("nan"),
        "epochs": 0,
        "manifest": "nowhere.yaml",
    }.items():
        if name in defaults and not (notebook.startswith("05") and name in ("task", "manifest")):
            with pytest.raises(InputError, match=name.replace("dataset", "data set") + "|nowhere"):
                checked_parameters(notebook, defaults | {name: wrong})
    source = path.read_text("utf-8")
    assert f'checked_parameters(\\"{notebook}\\", globals())' in source or "open_run(" in source


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
    assert tier.networks() == [
        ("demo", "cbc", 0, 0),
        ("demo", "cbc", 1, 0),
        ("landsat7", "cbc", 0, 0),
    ]
    jobs = dict(tier.jobs())
    assert jobs["04_finetuning-demo-cbc-fold0-seed2"]["methods"] == "uniform,lsgs,lora"
    assert jobs["04_finetuning-demo-cbc-fold0-seed2"]["work"] == "../work/own"
    assert jobs["02_pretraining_check-landsat7-cbc-fold0-network0"]["dataset"] == "landsat7"
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
