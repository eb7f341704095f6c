"""Tier files: what is wrong in one is said before anything runs."""

import shutil
from pathlib import Path

import papermill
import pytest
import yaml

from lsgs_core import InputError
from lsgs_core.models import BACKBONES
from lsgs_core.tiers import NOTEBOOKS, Grid, load_tier, notebook_parameters

ROOT = Path(__file__).parent.parent
TIERS = sorted(path.stem for path in (ROOT / "notebooks" / "tiers").glob("*.yaml"))


@pytest.fixture
def project(tmp_path):
    """A copy of the notebooks whose tier `own` a test may write."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    demo = yaml.safe_load((tmp_path / "notebooks" / "tiers" / "demo.yaml").read_text())

    def write(change):
        content = change(demo) or demo
        path = tmp_path / "notebooks" / "tiers" / "own.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return load_tier("own", tmp_path)

    return write


def test_the_tiers_that_the_readme_names_are_there():
    assert {"smoke", "demo", "paper"} <= set(TIERS)


@pytest.mark.parametrize("name", TIERS)
def test_committed_tiers_are_valid(name):
    tier = load_tier(name, ROOT)
    jobs = list(tier.jobs())
    grid = tier.grid
    points = len(grid.backbones) * len(grid.folds) * len(grid.seeds)
    assert len(jobs) == len({job.name for job in jobs}) == 2 + points * (2 + len(grid.methods))
    for job in jobs:
        defaults = notebook_parameters(ROOT / "notebooks" / f"{job.notebook}.ipynb")
        assert set(job.parameters) <= set(defaults)


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
        (changed("04_finetuning", epoch=3), "no parameter 'epoch'"),
        (changed("04_finetuning", epochs="three"), "epochs: expected int"),
        (changed("04_finetuning", epochs=True), "epochs: expected int"),
        (changed("04_finetuning", augment=1), "augment: expected bool"),
        (changed("04_finetuning", method="lsgs"), "set from the grid"),
        (changed("06_more", x=1), "unknown section '06_more'"),
        (changed("grid", backbones=["cbc", "unet"]), "unknown 'unet'"),
        (changed("grid", methods=["magic"]), "unknown 'magic'"),
        (changed("grid", folds=[0, 0]), "different"),
        (changed("grid", folds=["a"]), "folds"),
        (changed("grid", seeds=[]), "seeds"),
        (changed("grid", colours=[1]), "grid: expected"),
        (lambda tier: "grid: [", "not YAML"),
        (lambda tier: "[1, 2]", "section 'grid'"),
    ],
)
def test_mistakes_are_named(project, change, message):
    with pytest.raises(InputError, match=message):
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
    assert rewritten == {job.name for job in tier.jobs() if job.notebook == "04_finetuning"}


def test_grids_from_text():
    grid = Grid.parse("cbc, cmx", "lsgs", "0,1", "3")
    assert grid == Grid(("cbc", "cmx"), ("lsgs",), (0, 1), (3,))
    assert len(grid.points()) == 4
    for arguments in [("", "lsgs", "0", "0"), ("cbc", "lsgs", "a", "0"), ("cbc", "x", "0", "0")]:
        with pytest.raises(InputError):
            Grid.parse(*arguments)


def test_backbones_of_the_grid_are_those_that_can_be_built():
    assert set(BACKBONES) == {"cbc_slp", "cbc", "cmx"}
