"""Tiers: one parameter file for the five notebooks, and where each of their runs writes.

A tier file (`notebooks/tiers/<tier>.yaml`) has a section `grid` (which backbones, folds, seeds and
methods) and one section per notebook with the parameters that differ from the notebook's own
defaults. Everything is checked against the notebooks' `parameters` cells before anything runs,
since papermill itself only warns about a parameter that a notebook does not have.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import yaml

from lsgs_core.errors import InputError
from lsgs_core.files import written_beside
from lsgs_core.methods import METHODS
from lsgs_core.models import BACKBONES

NOTEBOOKS = {
    "data": "01_data_preparation",
    "pretraining": "02_pretraining_check",
    "scoring": "03_scenario_scoring",
    "finetuning": "04_finetuning",
    "evaluation": "05_evaluation",
}
# Set per job from the grid and the folder, so a tier file must not set them.
SET_BY_GRID = {"work", "backbone", "fold", "seed", "method", "backbones", "methods"}


@dataclass(frozen=True)
class StudyFolder:
    """Where the runs of one tier write; the notebooks and the workflow both ask here.

    Attributes:
        root: Such as `work/demo`.
    """

    root: Path

    def prepared(self, dataset: str) -> Path:
        """Aligned rasters and patch table of a data set."""
        return self.root / "prepared" / dataset

    def pretrained(self, backbone: str, fold: int, seed: int) -> Path:
        """Pretrained weights."""
        return self.root / "pretrained" / backbone / f"fold{fold}" / f"seed{seed}"

    def scores(self, backbone: str, fold: int, seed: int) -> Path:
        """Distortions and probabilities."""
        return self.root / "scores" / backbone / f"fold{fold}" / f"seed{seed}"

    def run(self, backbone: str, method: str, fold: int, seed: int) -> Path:
        """Fine-tuned weights, history and records of one run."""
        return self.root / "runs" / backbone / method / f"fold{fold}" / f"seed{seed}"

    @property
    def evaluation(self) -> Path:
        """Tables and figures over all runs."""
        return self.root / "evaluation"


@dataclass(frozen=True)
class Grid:
    """Which runs a tier consists of: the product of all four."""

    backbones: tuple[str, ...]
    methods: tuple[str, ...]
    folds: tuple[int, ...]
    seeds: tuple[int, ...]

    @classmethod
    def parse(cls, backbones: str, methods: str, folds: str, seeds: str) -> Grid:
        """Read lists separated by commas, the form in which a notebook gets them.

        Raises:
            InputError: An empty list, an unknown name, or a fold or seed that is no number.
        """
        try:
            numbers = [[int(part) for part in text.split(",")] for text in (folds, seeds)]
        except ValueError as error:
            raise InputError(
                f"folds, seeds: expected numbers separated by commas: {error}"
            ) from None
        names = [[part.strip() for part in text.split(",")] for text in (backbones, methods)]
        axes = dict(
            zip(("backbones", "methods", "folds", "seeds"), [*names, *numbers], strict=True)
        )
        return _grid("parameters", axes)

    def points(self) -> list[dict[str, Any]]:
        """Every combination of backbone, fold and seed."""
        return [
            {"backbone": backbone, "fold": fold, "seed": seed}
            for backbone in self.backbones
            for fold in self.folds
            for seed in self.seeds
        ]


@dataclass(frozen=True)
class Job:
    """One notebook run.

    Attributes:
        name: Unique within the tier, such as `04_finetuning-cmx-lsgs-fold0-seed0`.
        notebook: File name without ending.
        parameters: What papermill injects.
    """

    name: str
    notebook: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Tier:
    """A tier file that was checked.

    Attributes:
        name: Of the tier.
        grid: Its runs.
        sections: Parameters per notebook.
        folder: Where it writes, relative to the project's root.
    """

    name: str
    grid: Grid
    sections: Mapping[str, Mapping[str, Any]]
    folder: StudyFolder

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return self.sections[NOTEBOOKS["data"]]["dataset"]

    @property
    def threads(self) -> int:
        """CPU threads of one notebook run."""
        return self.sections[NOTEBOOKS["finetuning"]]["threads"]

    @property
    def gpu(self) -> int:
        """GPUs that one notebook run holds: 1 where the tier insists on one, else 0."""
        return int(str(self.sections[NOTEBOOKS["finetuning"]]["device"]).startswith("cuda"))

    def job(self, stage: str, **of_grid: Any) -> Job:
        """The job of a stage (a key of NOTEBOOKS), for one point of the grid."""
        notebook = NOTEBOOKS[stage]
        point = [
            f"{key}{value}" if key in ("fold", "seed") else str(value)
            for key, value in of_grid.items()
        ]
        # Notebooks run in their own folder, so the path starts from there.
        parameters = {**self.sections[notebook], "work": f"../{self.folder.root}", **of_grid}
        if stage == "evaluation":
            parameters["backbones"] = ",".join(self.grid.backbones)
            parameters["methods"] = ",".join(self.grid.methods)
            parameters["folds"] = ",".join(map(str, self.grid.folds))
            parameters["seeds"] = ",".join(map(str, self.grid.seeds))
        return Job("-".join([notebook, *point]), notebook, parameters)

    def jobs(self) -> Iterator[Job]:
        """Every job of the tier, in an order in which they can run."""
        grid = self.grid
        yield self.job("data")
        points = grid.points()
        for stage in ("pretraining", "scoring"):
            for point in points:
                yield self.job(stage, **point)
        for point in points:
            for method in grid.methods:
                yield self.job("finetuning", **finetuning_point(method=method, **point))
        yield self.job("evaluation")

    def parameter_file(self, job: str) -> Path:
        """Where a job's parameters are written."""
        return self.folder.root / "parameters" / f"{job}.yaml"

    def executed_notebook(self, job: str) -> Path:
        """Where papermill writes the executed copy."""
        return self.folder.root / "notebooks" / f"{job}.ipynb"

    def write_parameter_files(self) -> None:
        """Write every job's parameters; a file that says the same already keeps its date.

        So the workflow runs again just those jobs whose parameters changed.
        """
        for job in self.jobs():
            path = self.parameter_file(job.name)
            text = yaml.safe_dump(dict(job.parameters), sort_keys=True)
            if path.is_file() and path.read_text() == text:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_beside(path) as temporary:
                temporary.write_text(text)


def finetuning_point(backbone: str, method: str, fold: int, seed: int) -> dict[str, Any]:
    """One point of the grid, in the order in which names are made of it."""
    return {"backbone": backbone, "method": method, "fold": fold, "seed": seed}


def load_tier(name: str, root: Path, work: Path = Path("work")) -> Tier:
    """Read `notebooks/tiers/<name>.yaml` and check it against the notebooks.

    Args:
        name: Of the tier.
        root: The project's root.
        work: Where tiers write, relative to the root.

    Raises:
        InputError: No such tier, or an unknown section or parameter, or a value of another type
            than the notebook's default.
    """
    folder = root / "notebooks" / "tiers"
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in folder.glob("*.yaml"))
        raise InputError(f"tier: expected one of {known}, found {name!r}")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise InputError(f"{path.name}: not YAML: {error}") from error
    if not isinstance(content, dict) or "grid" not in content:
        raise InputError(f"{path.name}: expected a section 'grid' and one per notebook")
    unknown = sorted(set(content) - {"grid", *NOTEBOOKS.values()})
    if unknown:
        raise InputError(
            f"{path.name}: unknown section {unknown[0]!r}; known: grid, "
            + ", ".join(NOTEBOOKS.values())
        )
    sections = {}
    for notebook in NOTEBOOKS.values():
        defaults = notebook_parameters(root / "notebooks" / f"{notebook}.ipynb")
        given = content.get(notebook) or {}
        _check_parameters(f"{path.name}: {notebook}", given, defaults)
        sections[notebook] = {
            key: value
            for key, value in {**defaults, **given}.items()
            if key not in SET_BY_GRID | {"folds", "seeds"}
        }
    grid = _grid(path.name, content["grid"])
    return Tier(name, grid, sections, StudyFolder(work / name))


def notebook_parameters(path: Path) -> dict[str, Any]:
    """Names and default values in a notebook's `parameters` cell.

    The cell is parsed, never run: every line is `name: type = literal`, perhaps with a comment.

    Raises:
        InputError: No such cell, or a line in it that is something else.
    """
    cells = nbformat.read(path, as_version=4).cells
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise InputError(f"{path.name}: expected one cell tagged 'parameters', found {len(tagged)}")
    defaults = {}
    for statement in ast.parse(tagged[0].source).body:
        if not (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and statement.value is not None
        ):
            raise InputError(
                f"{path.name}: expected 'name: type = value' in the parameters cell, "
                f"found {ast.unparse(statement)!r}"
            )
        defaults[statement.target.id] = ast.literal_eval(statement.value)
    return defaults


def _check_parameters(where: str, given: Any, defaults: Mapping[str, Any]) -> None:
    if not isinstance(given, dict):
        raise InputError(f"{where}: expected parameters by name, found {given!r}")
    for key, value in given.items():
        if key not in defaults:
            raise InputError(
                f"{where}: the notebook has no parameter {key!r}; it has {sorted(defaults)}"
            )
        if key in SET_BY_GRID:
            raise InputError(f"{where}: {key!r} is set from the grid, not here")
        default = defaults[key]
        accepted = (int, float) if isinstance(default, float) else (type(default),)
        if isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, accepted):
            raise InputError(f"{where}: {key}: expected {type(default).__name__}, found {value!r}")


def _grid(where: str, content: Any) -> Grid:
    axes = {"backbones": str, "methods": str, "folds": int, "seeds": int}
    if not isinstance(content, dict) or set(content) != set(axes):
        raise InputError(f"{where}: grid: expected {', '.join(axes)}, found {content!r}")
    for axis, kind in axes.items():
        values = content[axis]
        if (
            not isinstance(values, list)
            or not values
            or any(isinstance(value, bool) or not isinstance(value, kind) for value in values)
            or len(set(values)) != len(values)
        ):
            raise InputError(
                f"{where}: grid: {axis}: expected a list of different {kind.__name__}s, "
                f"found {values!r}"
            )
    for axis, known in (("backbones", BACKBONES), ("methods", METHODS)):
        strange = [value for value in content[axis] if value not in known]
        if strange:
            raise InputError(
                f"{where}: grid: {axis}: unknown {strange[0]!r}; known: {sorted(known)}"
            )
    return Grid(**{axis: tuple(content[axis]) for axis in axes})
