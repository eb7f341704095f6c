"""The project's own promises: its files agree with each other and with the README."""

import ast
import re
import shutil
import sys
import tomllib
from graphlib import TopologicalSorter

import nbformat
import pandas as pd
import pytest
import yaml
from checkout import ROOT, printed, tracked_files
from study.stages.parameters import notebook_parameters
from study.workflow.pages import tier_page

from lsgs_core.methods import METHODS

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def pins(lines) -> dict[str, str]:
    """Versions by package name, of lines such as `numpy==2.4.6  # why`."""
    found = (re.match(r"([A-Za-z0-9._-]+)==([^\s#]+)", line.strip()) for line in lines)
    return {re.sub(r"[-_.]+", "-", m[1]).lower(): m[2] for m in found if m}


ASKED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
EXTRAS = pins([*ASKED["study"], *ASKED["dev"]])
LOCK = pins((ROOT / "requirements.lock").read_text().splitlines())


def test_environment_extras_and_lock_agree():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(part["pip"] for part in environment["dependencies"] if isinstance(part, dict))
    assert pins(pip) == EXTRAS
    assert "--constraint requirements.lock" in pip
    assert EXTRAS.items() <= LOCK.items()
    python = next(p for p in environment["dependencies"] if str(p).startswith("python="))
    assert tuple(map(int, python.removeprefix("python=").split("."))) >= (3, 11)


@pytest.mark.parametrize(
    "tier", [path.parent.name for path in sorted((ROOT / "results").glob("*/provenance.json"))]
)
def test_pages_of_results_are_those_of_their_tables(tier):
    folder = ROOT / "results" / tier
    assert (folder / "README.md").read_text("utf-8") == tier_page(folder)


@pytest.mark.filterwarnings("error")
def test_a_rank_among_two_scenarios_that_miss_as_many_is_left_out(tmp_path):
    folder = shutil.copytree(ROOT / "results" / "demo", tmp_path / "demo")
    path = folder / "evaluation" / "distortion_against_loss.csv"
    pd.read_csv(path).query("missing < 2").to_csv(path, index=False)
    assert "+nan" not in tier_page(folder)


README = ROOT / "README.md"
DOCUMENTS = {
    ROOT / name: (ROOT / name).read_text("utf-8")
    for name in tracked_files()
    if name.endswith(".md") and not name.endswith("model_card.md")
}


def test_make_commands_that_are_named_exist():
    texts = [*DOCUMENTS.values(), (ROOT / "Snakefile").read_text("utf-8")]
    named = r"`?\bmake ((?:[a-z]+-?)+(?: [A-Z]+=\w+)*)`"
    commands = {command for text in texts for command in re.findall(named, text)}
    steps = {command: printed("make", "--dry-run", *command.split()) for command in commands}
    assert "-p missing none,NIR" in steps["book"]  # which a comma inside of $(if) would cut
    assert {"study", "test", "test-slow", "lab"} <= {*re.findall(named, DOCUMENTS[README])}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_documents_name_are_there(path):
    for named in re.findall(r"\]\((?!http|#)([^)]+)\)", DOCUMENTS[path]):
        assert (path.parent / named.partition("#")[0]).exists(), named


def test_the_methods_that_are_listed_are_those_there_are():
    rows = [
        f"| `{name}` | {method.title} | {method.about.rstrip('.')} |"
        for name, method in METHODS.items()
    ]
    text = (ROOT / "notebooks" / "README.md").read_text()
    assert [line for line in text.splitlines() if line in rows] == rows


def test_the_core_imports_in_no_circle_and_nothing_of_the_study():
    files = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / "lsgs_core").rglob("*.py"))
    names = {".".join(file.parts).removesuffix(".__init__"): file for file in files}
    del names["lsgs_core"]  # imports what is asked for, when it is
    graph = {}
    for name, file in names.items():
        text = (ROOT / file).with_suffix(".py").read_text("utf-8")
        graph[name] = set(re.findall(r"^ *from ([\w.]+) import", text, re.MULTILINE))
        assert not any(other.startswith("study") for other in graph[name])
    TopologicalSorter({name: used & names.keys() for name, used in graph.items()}).prepare()


def test_folders_of_the_study_import_from_those_above_them():
    """In the order of CONTRIBUTING's table."""
    listed = re.findall(r"^\| `(\w+)` \|", DOCUMENTS[ROOT / "CONTRIBUTING.md"], re.MULTILINE)
    paths = [*(ROOT / "notebooks" / "study").glob("*/*.py")]
    assert {path.parent.name for path in paths} == {*listed}
    for path in paths:
        for other in re.findall(r"^ *from study\.(\w+)", path.read_text("utf-8"), re.MULTILINE):
            assert listed.index(other) <= listed.index(path.parent.name), f"{path} imports {other}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_with_the_outputs_alone_that_are_checked(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert "**Purpose.**" in notebook.cells[0].source  # which the book shows
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    checked = ["NBVAL_CHECK_OUTPUT" in cell.source for cell in cells]
    assert any(checked)
    for cell, is_checked in zip(cells, checked, strict=True):
        # Notebooks hold narrative, parameters and calls: what is longer belongs into the study.
        exempt = path.name[0] == "A" or "parameters" in cell.metadata.get("tags", [])
        assert exempt or re.match("from|import", cell.source) or cell.source.count("\n") < 10
        assert is_checked == ("keep_output" in cell.metadata.get("tags", []))
        assert bool(cell.outputs) == is_checked, cell.source
        assert all(output.get("name") == "stdout" for output in cell.outputs)
    for cell in notebook.cells:  # two backslashes end a line, and break a formula
        assert cell.cell_type != "markdown" or "\\\\" not in cell.source, cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_parameter_of_a_notebook_is_used(path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    code = [c.source for c in cells if "parameters" not in c.metadata.get("tags", [])]
    nodes = ast.walk(ast.parse("\n".join(code)))
    used = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    if not used & {"open_run", "open_grid", "plan_maps"}:  # which read them all
        assert set(notebook_parameters(path)) <= used


def test_no_path_of_a_machine_and_no_registry_in_tracked_files():
    bad = re.compile(r"(?<![\w./-])/(?:work|tmp|root|home)/[\w.-]+|index-" r"url|pypi\.org/simple")
    for name in tracked_files():
        path = ROOT / name
        if path.suffix in {".png", ".pdf", ".npz", ".xz", ".safetensors"}:
            continue
        found = bad.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{name}: {found}"


def test_importing_is_cheap():
    code = "import sys, lsgs_core; print([m for m in ('torch', 'pandas') if m in sys.modules])"
    assert printed(sys.executable, "-c", code).startswith("[]")
