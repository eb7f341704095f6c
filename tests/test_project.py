"""The project's own promises: its files agree with each other and with the README."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import architecture
import nbformat
import pandas as pd
import pytest
import yaml

from lsgs_core.methods import METHODS
from lsgs_core.published import read_evidence
from lsgs_core.samplers import by_cardinality
from lsgs_core.study.tiers import notebook_parameters

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def pins(lines) -> dict[str, str]:
    """Versions by package name, of lines such as `numpy==2.4.6  # why`."""
    found = (re.match(r"([A-Za-z0-9._-]+)==([^\s#]+)", line.strip()) for line in lines)
    return {re.sub(r"[-_.]+", "-", m[1]).lower(): m[2] for m in found if m}


def test_environment_and_lock_agree():
    lock = pins((ROOT / "requirements.lock").read_text().splitlines())
    direct = pins((ROOT / "requirements.in").read_text().splitlines())
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(part["pip"] for part in environment["dependencies"] if isinstance(part, dict))
    assert pins(pip) == direct
    assert "--constraint requirements.lock" in pip
    assert direct.items() <= lock.items()
    python = next(p for p in environment["dependencies"] if str(p).startswith("python="))
    assert tuple(map(int, python.removeprefix("python=").split("."))) >= (3, 11)


def test_the_lock_holds_what_is_installed_and_no_torchvision():
    from importlib.metadata import version

    lock = pins((ROOT / "requirements.lock").read_text().splitlines())
    assert lock["torch"] == "2.13.0"
    assert "torchvision" not in lock
    direct = pins((ROOT / "requirements.in").read_text().splitlines())
    for name, pinned in direct.items():
        assert version(name).split("+")[0] == pinned, name


def make(*arguments: str) -> str:
    done = subprocess.run(
        ["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return done.stdout


DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "results/README.md",
    "results/FINDINGS.md",
    "profiles/slurm/README.md",
]


@pytest.mark.parametrize("document", [*DOCUMENTS, "Snakefile"])
def test_make_commands_that_are_named_exist(document):
    text = (ROOT / document).read_text()
    commands = set(re.findall(r"`?\bmake ((?:[a-z]+-?)+(?: [A-Z]+=\w+)*)`", text))
    for command in commands:
        make(*command.split())
    if document == "README.md":
        assert {"study", "test", "test-slow", "lab"} <= commands


def test_ci_runs_the_readmes_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert "```sh\nmake study\nmake test\n```" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_documents_name_are_there(document):
    path = ROOT / document
    for named in re.findall(r"\]\((?!http|#)([^)]+)\)", path.read_text()):
        assert (path.parent / named).exists(), named


def test_the_readmes_methods_are_those_there_are():
    rows = [
        f"| `{name}` | {method.title} | {method.about.rstrip('.')} |"
        for name, method in METHODS.items()
    ]
    text = (ROOT / "README.md").read_text()
    assert [line for line in text.splitlines() if line in rows] == rows


def test_the_readmes_diagram_is_that_of_the_imports():
    """And there is no circle: data flows one way (`diagram` raises otherwise)."""
    assert architecture.modules() == set(architecture.GROUP_OF)
    assert architecture.in_readme() == architecture.diagram()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_as_they_should_be(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.cells[0].cell_type == "markdown"
    assert "**Purpose.**" in notebook.cells[0].source
    checked = 0
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        is_checked = "NBVAL_CHECK_OUTPUT" in cell.source
        assert is_checked == ("keep_output" in cell.metadata.get("tags", []))
        assert bool(cell.outputs) == is_checked, cell.source
        checked += is_checked
        assert all(output.output_type == "stream" for output in cell.outputs)
        assert all(output.name == "stdout" for output in cell.outputs)
    assert checked >= 1
    for cell in notebook.cells:  # two backslashes end a line, and break a formula
        assert cell.cell_type != "markdown" or "\\\\" not in cell.source, cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_parameter_of_a_notebook_is_used(path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    used = {
        node.id
        for cell in cells
        if "parameters" not in cell.metadata.get("tags", [])
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    assert set(notebook_parameters(path)) <= used


def test_no_path_of_a_machine_and_no_registry_in_tracked_files():
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    bad = re.compile(r"(?<![\w./-])/(?:work|tmp|root|home)/[\w.-]+|index-" r"url|pypi\.org/simple")
    for name in filter(None, listed):
        path = ROOT / name
        if not path.is_file() or path.suffix in {".png", ".pdf", ".npz", ".xz", ".safetensors"}:
            continue
        found = bad.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{name}: {found}"


def test_importing_is_cheap():
    code = "import sys, lsgs_core; print([m for m in ('torch', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_mathematics_knows_nothing_of_files_or_torch():
    for name in ("scenarios", "smoothing", "sampling", "samplers", "adaptive", "sensitivity"):
        text = (ROOT / "lsgs_core" / f"{name}.py").read_text()
        imported = re.findall(r"^(?:from|import) ([\w.]+)", text, flags=re.MULTILINE)
        forbidden = {"torch", "pathlib", "rasterio", "lsgs_core.data.patches"}
        assert not forbidden & set(imported), name
    for path in (ROOT / "lsgs_core" / "models").glob("*.py"):
        text = path.read_text()
        assert not re.search(r"lsgs_core\.(data|study)\b", text), path.name


def test_the_tables_figures_are_the_committed_results():
    folder = ROOT / "results" / "demo" / "evaluation"
    summary = pd.read_csv(folder / "summary.csv")
    text = (ROOT / "results" / "README.md").read_text()
    rows = re.findall(
        r"^\| (\w+) \| ([\w -]+) \| ([\d.]+) \| ([\d.]+) \((\S+)\) \| ([\d.]+) \|", text, re.M
    )
    written = [(backbone, *map(float, (mean, worst, full)), name)
               for backbone, _, mean, worst, name, full in rows]  # fmt: skip
    columns = ["backbone", "mean_iou", "worst_iou", "full_iou", "worst_scenario"]
    assert written == [tuple(row) for row in summary[columns].round(3).itertuples(index=False)]
    trivial = pd.read_csv(folder / "trivial.csv")["iou"].mean()
    assert f"says yes everywhere has {trivial:.3f}" in text


def test_the_tables_times_are_the_committed_benchmark():
    folder = ROOT / "results" / "benchmarks"
    table = pd.read_csv(folder / "ratios.csv")
    text = (ROOT / "results" / "README.md").read_text()
    rows = re.findall(
        r"^\| (scoring|training) \| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", text, re.M
    )
    measured = table[(table["preset"] == "paper") & (table["batch"] == 1)]
    expected = [
        (row.task, row.backbone, f"{row.plain:.2f}", f"{row.ours:.2f}", f"{row.ratio:.1f}")
        for row in measured.itertuples()
    ]
    assert rows == expected
    memory = pd.read_csv(folder / "memory.csv")["ratio"]
    assert f"takes {memory[0]:.0%} of the plain form's memory" in text
    record = json.loads((folder / "ratios.csv.record.json").read_text())
    assert record["parameters"]["processor"] in text


def test_the_findings_are_the_committed_results():
    """Every row of a table in FINDINGS.md is a row of the tables of the tiers study and starved."""
    tables = []
    for tier in ("study", "starved"):
        folder = ROOT / "results" / tier / "evaluation"
        compared = pd.read_csv(folder / "differences.csv")
        compared["contrast"] = compared["method"] + " - uniform"
        tables += [pd.read_csv(folder / "planned_contrasts.csv"), compared]
    titles = {"worst_iou": "worst scenario", "mean_iou": "mean"}
    known = {
        (
            row.dataset,
            row.backbone,
            titles.get(row.metric, row.metric),
            row.contrast,
            f"{row.difference:+.4f}",
            f"{row.low:+.4f} to {row.high:+.4f}",
            str(row.replicates),
        )
        for row in pd.concat(tables).itertuples()
    }
    text = (ROOT / "results" / "FINDINGS.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith(("| demo", "| landsat7"))
    ]
    assert rows
    for row in rows:
        assert tuple(row) in known, row


def test_the_findings_other_numbers_are_those_of_the_committed_tables():
    """Rank correlations, how steeply p rises, and in how many replicates LSGS is above uniform."""
    text = (ROOT / "results" / "FINDINGS.md").read_text()
    folder = ROOT / "results" / "study"
    lost = pd.read_csv(folder / "evaluation" / "distortion_against_loss.csv").query("missing > 0")
    scenes = {"Sentinel-2": "demo", "Landsat-7": "landsat7"}
    backbones = {"CBC-SLP": "cbc_slp", "CBC": "cbc", "CMX": "cmx"}
    rows = re.findall(r"^\| ([\w-]+) \| ([\w-]+) \| (\.\d\d) \| (\.\d\d) \|$", text, re.M)
    assert len(rows) == 6
    for scene, backbone, *written in rows:
        chosen = (lost["dataset"] == scenes[scene]) & (lost["backbone"] == backbones[backbone])
        folds = [fold for _, fold in lost[chosen].groupby("fold")]
        for by, number in zip(("distortion", "missing"), written, strict=True):
            found = [fold[by].corr(fold["lost"], method="spearman") for fold in folds]
            assert sum(found) / len(found) == pytest.approx(float(number), abs=0.0051)
    factors = []
    for path in (folder / "scores").glob("*/*/*/*/probabilities.json"):
        evidence = read_evidence(path)
        p = by_cardinality(evidence.scenarios, evidence.probabilities)
        factors.append(p[evidence.scenarios.missing == 1][0] / p[evidence.scenarios.full])
    least, *others = sorted(factors)
    assert len(factors) == 18
    assert f"{others[0]:.2f} to {others[-1]:.2f} per missing modality for 17 of the 18" in text
    assert f"{least:.2f} for the other" in text
    whole = pd.read_csv(folder / "evaluation" / "summary.csv").query(
        "dataset == 'demo' and backbone == 'cmx'"
    )
    scores = whole.pivot_table(index="seed", columns="method", values="worst_iou")
    gain = scores["lsgs"] - scores[["uniform", "uniform_again"]].mean(axis=1)
    assert f"positive in {(gain > 0).sum()} of {len(gain)} replicates" in text
    means = [f"{gain[gain.index < seeds].mean():.4f}".removeprefix("0") for seeds in (5, 6)]
    assert f"first 5 seeds the gain was {means[0]},\nwith the first 6 {means[1]}:" in text
