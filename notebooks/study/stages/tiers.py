"""Tiers: one parameter file for the five notebooks, and where each of their runs writes.

A tier file (`notebooks/tiers/<tier>.yaml`) has a section `grid`, a product of data sets, backbones,
methods, folds and seeds or a list of them, one section per notebook with the parameters that differ
from its defaults, and perhaps a section `all` for those of several. Everything is checked against
the notebooks' `parameters` cells and the manifest before anything runs (`study.stages.parameters`).
"""

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, create_model

from lsgs_core.errors import InputError
from lsgs_core.methods import METHODS
from lsgs_core.scenarios import ScenarioSet
from study.data.folds import default_split
from study.data.manifest import NAME, Manifest, load_manifest
from study.metrics.statistics import UNIFORM_ARMS, planned_pairs
from study.provenance.files import file_sha256, make_folder, written_beside
from study.provenance.schema import Strict, read_json, read_yaml, validated
from study.stages.parameters import (
    Backbone,
    Index,
    Method,
    check_against,
    check_settings,
    notebook_model,
)

NOTEBOOKS = {
    "data": "01_data_preparation",
    "pretraining": "02_pretraining_check",
    "scoring": "03_scenario_scoring",
    "finetuning": "04_finetuning",
    "evaluation": "05_evaluation",
}
MOST_COUNTED = 10_000  # folds or seeds; more is a typing error that would fill the memory
# Parameters that can name a file, by stage.
FILES = {"data": "index_file", "pretraining": "weights", "finetuning": "probabilities"}
# Parameters of notebook 04 on which notebook 05 would find its runs to be others, hours later.
READ_AGAIN = ("task", "normalisation", "evaluation_patches", "tested_on")
# What names a network and a run, and how the names of jobs say it.
NETWORK = ("dataset", "backbone", "fold", "pretraining_seed")
RUN = ("dataset", "backbone", "fold", "seed")
LABELS = {"fold": "fold", "pretraining_seed": "network", "seed": "seed"}
# Folders of other things in `work` and `results`.
RESERVED = {"bench", "benchmarks", "benchmarks_gpu", "downloads"}
RESERVED |= {"lock", "networks", "reproduction"}
# Set per job from the grid and the folder, so a tier file must not set them.
SET_BY_GRID = {"work", "dataset", "backbone", "fold", "seed", "methods", "tier"}


def _different(values: list[Any]) -> list[Any]:
    if len(set(values)) != len(values):
        raise ValueError("expected different entries")
    return values


def _counted(value: Any) -> Any:
    """Write a number of folds or seeds out: 3 is [0, 1, 2]."""
    if type(value) is not int:
        return value
    if value > MOST_COUNTED:
        raise ValueError(f"expected at most {MOST_COUNTED}, found {value}")
    return [*range(value)]


Entries = Field(min_length=1), AfterValidator(_different)
Indices = Annotated[list[Index], *Entries, BeforeValidator(_counted)]  # or their number


class Runs(Strict):
    """The product of all five: one part of a grid."""

    datasets: Annotated[list[str], *Entries] = ["demo"]
    backbones: Annotated[list[Backbone], *Entries]
    methods: Annotated[list[Method], *Entries]
    folds: Indices
    seeds: Indices


@dataclass(frozen=True)
class StudyFolder:
    """Where the runs of one tier write, such as `work/demo`; notebooks and workflow ask here."""

    root: Path

    def prepared(self, dataset: str) -> Path:
        """Aligned rasters and patch table of a data set."""
        return self.root / "prepared" / dataset

    def pretrained(self, dataset: str, backbone: str, fold: int | str, seed: int | str) -> Path:
        """Pretrained weights."""
        return self.root / "pretrained" / dataset / backbone / f"fold{fold}" / f"seed{seed}"

    def scores(self, dataset: str, backbone: str, fold: int | str, seed: int | str) -> Path:
        """Distortions and probabilities of a pretrained network."""
        return self.root / "scores" / dataset / backbone / f"fold{fold}" / f"seed{seed}"

    def runs(self, dataset: str, backbone: str, fold: int | str, seed: int | str) -> Path:
        """The runs of all methods: a folder each, with weights, history and records."""
        return self.root / "runs" / dataset / backbone / f"fold{fold}" / f"seed{seed}"

    def points(self) -> dict[tuple[str, str, int, int], list[str]]:
        """Methods of every (dataset, backbone, fold, seed) that has records in this folder."""
        found: dict[tuple[str, str, int, int], list[str]] = {}
        for path in sorted(self.root.glob("runs/*/*/fold*/seed*/*/records.csv")):
            dataset, backbone, fold, seed, method = path.relative_to(self.root).parts[1:-1]
            point = dataset, backbone, int(fold[len("fold") :]), int(seed[len("seed") :])
            found.setdefault(point, []).append(method)
        order = {name: number for number, name in enumerate(METHODS)}

        def place(method: str) -> tuple[int, str]:
            return order.get(method.partition("@")[0], len(order)), method

        return {point: sorted(found[point], key=place) for point in sorted(found)}

    @property
    def evaluation(self) -> Path:
        """Tables and figures over all runs."""
        return self.root / "evaluation"

    def parameter_file(self, job: str) -> Path:
        """What papermill injects into the notebook of a job."""
        return self.root / "parameters" / f"{job}.yaml"

    def executed_notebook(self, job: str) -> Path:
        """Where papermill writes the executed copy."""
        return self.root / "notebooks" / f"{job}.ipynb"


@dataclass(frozen=True)
class Tier:
    """A tier file that was checked."""

    name: str
    grid: list[Runs]  # products that are put together; what is in several is run once
    sections: Mapping[str, Mapping[str, Any]]  # parameters per notebook
    manifest: Manifest  # that notebook 01 takes its data sets from
    sha256: str  # of the file
    folder: StudyFolder  # where it writes, seen from the project's root

    def points(self) -> dict[tuple[str, str, int, int], list[str]]:
        """Methods of every (dataset, backbone, fold, seed)."""
        found: dict[tuple[str, str, int, int], list[str]] = {}
        for part in self.grid:
            for point in product(part.datasets, part.backbones, part.folds, part.seeds):
                known = found.setdefault(point, [])
                known += [method for method in part.methods if method not in known]
        return found

    @property
    def datasets(self) -> list[str]:
        """Every data set."""
        return list(dict.fromkeys(name for name, *_ in self.points()))

    def setting(self, stage: str, name: str) -> Any:
        """The value of a notebook's parameter in this tier."""
        return self.sections[NOTEBOOKS[stage]][name]

    @property
    def pretraining_seed(self) -> int:
        """Random seed of the networks that all runs start from; see `network_seed`."""
        return int(self.setting("finetuning", "pretraining_seed"))

    def networks(self) -> list[tuple[str, str, int, int]]:
        """Every (dataset, backbone, fold, pretraining seed), which is trained and scored once."""
        points, seed = self.points(), self.pretraining_seed
        return list(dict.fromkeys((*point[:3], network_seed(seed, point[3])) for point in points))

    def gpus_of(self, stage: str) -> int:
        """Number of GPUs that a notebook of a stage uses."""
        on_gpu = str(self.setting(stage, "device")).startswith("cuda")
        return int(self.setting(stage, "processes")) if on_gpu else 0

    @property
    def gpus(self) -> int:
        """Number of GPUs that the largest job uses, at least 1."""
        return max(1, *map(self.gpus_of, ("pretraining", "scoring", "finetuning")))

    def jobs(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name and parameters of every notebook run, in an order in which they can run."""
        for dataset in self.datasets:
            yield self._job("data", dataset=dataset)
        for stage in ("pretraining", "scoring"):
            for network in self.networks():
                yield self._job(stage, **dict(zip(NETWORK, network, strict=True)))
        for (*start, seed), methods in self.points().items():
            job, parameters = self._job("finetuning", **dict(zip(RUN, (*start, seed), strict=True)))
            parameters["pretraining_seed"] = network_seed(self.pretraining_seed, seed)
            yield job, parameters | {"methods": ",".join(methods)}
        job, parameters = self._job("evaluation")
        yield job, parameters | {"tier": self.name}

    def _job(self, stage: str, **point: Any) -> tuple[str, dict[str, Any]]:
        parts = [f"{LABELS[k]}{v}" if k in LABELS else v for k, v in point.items()]
        # Notebooks run in their own folder, so the path starts from there.
        parameters = {**self.sections[NOTEBOOKS[stage]], "work": f"../{self.folder.root}", **point}
        return "-".join([NOTEBOOKS[stage], *parts]), parameters

    def only(self, run: str) -> Self:
        """Return the tier with a single run in its grid; raise `InputError` if it has no such run.

        It is named by dataset/backbone/method/fold/seed, such as demo/cmx/lsgs/0/0.
        """
        runs = {
            f"{dataset}/{backbone}/{method}/{fold}/{seed}": (dataset, backbone, method, fold, seed)
            for (dataset, backbone, fold, seed), methods in self.points().items()
            for method in methods
        }
        if run not in runs:
            raise InputError(f"run: tier {self.name} has {len(runs)}, such as {next(iter(runs))}")
        single: dict[str, Any] = {
            name: [one] for name, one in zip(Runs.model_fields, runs[run], strict=True)
        }
        return replace(self, grid=[Runs(**single)])

    def write_parameter_files(self) -> None:
        """Write every job's parameters; a file that says the same already keeps its date."""
        for job, parameters in self.jobs():
            path = self.folder.parameter_file(job)
            text = yaml.safe_dump(parameters)
            if not path.is_file() or path.read_text() != text:
                make_folder(path.parent)
                with written_beside(path) as temporary:
                    temporary.write_text(text)


def network_seed(pretraining_seed: int, seed: int) -> int:
    """Return the pretraining seed of the network that a run of a seed starts from.

    A negative `pretraining_seed` gives each run a network of its own, which has the run's seed.
    """
    return seed if pretraining_seed < 0 else pretraining_seed


def load_tier(name: str, root: Path, work: Path = Path("work")) -> Tier:
    """Read `notebooks/tiers/<name>.yaml` and check it against the notebooks and the manifest.

    Raises `InputError` for a wrong name, section, parameter, value, data set, task, fold or
    network, and for a planned contrast without two replicates.
    """
    folder = root / "notebooks"
    path = folder / "tiers" / f"{name}.yaml"
    tiers = sorted(file.stem for file in path.parent.glob("*.yaml"))
    if name not in tiers:
        raise InputError(f"tier: expected one of {tiers}, found {name!r}")
    if name in RESERVED or not re.fullmatch(NAME, name):
        raise InputError(f"tier: {name!r} cannot be the name of a tier; rename its file")
    content = read_yaml(path)
    sections: dict[str, Any] = {}
    shared = content.pop("all", {}) if isinstance(content, dict) else {}
    if not isinstance(shared, dict):
        raise InputError(f"{path.name}: all: expected parameters with their values")
    unused = set(shared)
    for notebook in NOTEBOOKS.values():
        section = notebook_model(notebook, folder, SET_BY_GRID)
        sections[notebook] = (section, section())
        common = {name: value for name, value in shared.items() if name in section.model_fields}
        unused -= common.keys()
        if common and isinstance(content.setdefault(notebook, {}), dict):
            content[notebook] = common | content[notebook]
    if unused:
        raise InputError(f"{path.name}: all: no notebook has a parameter {sorted(unused)[0]!r}")
    if isinstance(content, dict) and isinstance(content.get("grid"), dict):
        content["grid"] = [content["grid"]]
    grid = Annotated[list[Runs], Field(min_length=1)]
    schema = create_model("TierFile", __base__=Strict, grid=(grid, ...), **sections)
    checked: Any = validated(schema, content, path.name)
    values = checked.model_dump(exclude={"grid"})
    folder_of_tier = StudyFolder(work / name)
    manifest = load_manifest(folder / values[NOTEBOOKS["data"]]["manifest"])
    tier = Tier(name, checked.grid, values, manifest, file_sha256(path), folder_of_tier)
    try:
        _check_grid(tier)
        for stage, setting in FILES.items():
            file = tier.setting(stage, setting)
            if file not in ("", "committed", "train") and not (folder / file).is_file():
                raise InputError(f"{setting}: expected a file, seen from notebooks, found {file!r}")
        for name in READ_AGAIN:
            made, read = (tier.setting(stage, name) for stage in ("finetuning", "evaluation"))
            if made != read:
                where = f"{NOTEBOOKS['evaluation']}.{name}"
                raise InputError(f"{where}: expected {made!r} as in notebook 04, found {read!r}")
        if "contrasts" in (content.get(NOTEBOOKS["evaluation"]) or {}):
            _check_replicates(tier)
    except InputError as error:
        raise InputError(f"{path.name}: {error}") from error
    return tier


def _check_grid(tier: Tier) -> None:
    """Check every start of the grid against the manifest, which knows data sets and networks."""
    sensors = {"+".join(tier.manifest.dataset(name).modalities) for name in tier.datasets}
    if len(sensors) > 1:  # notebook 05 compares scenarios, hours later
        expected = "the same modalities in all data sets of a tier"
        raise InputError(f"datasets: expected {expected}, found {sorted(sensors)}")
    for (dataset, *_), methods in tier.points().items():
        scenarios = ScenarioSet.of(tuple(tier.manifest.dataset(dataset).modalities))
        for method in methods:
            if "@" in method:
                check_settings(method, scenarios)
    for dataset, backbone, fold, pretraining_seed in tier.networks():
        definition = tier.manifest.dataset(dataset)
        split = tier.setting("data", "split") or default_split(tier.setting("data", "protocol"))
        start = {"split": split or next(iter(definition.folds)), "fold": fold, "backbone": backbone}
        for section in tier.sections.values():
            check_against(definition, {**section, **start})
        if tier.setting("pretraining", "weights") == "committed":
            tier.manifest.network(dataset, backbone, fold, pretraining_seed)


def _check_replicates(tier: Tier) -> None:
    """Raise `InputError` where a planned contrast has no data set and backbone with two seeds."""
    compared: defaultdict[tuple[str, str, int], set[str]] = defaultdict(set)
    before = {"pretrained"} if tier.setting("evaluation", "tested_on") == "test" else set()
    for (dataset, backbone, _, seed), methods in tier.points().items():
        uniform = {"uniform"} if {*UNIFORM_ARMS} & {*methods} else set()
        compared[dataset, backbone, seed] |= {*methods, *before, *uniform}
    for first, second in planned_pairs(tier.setting("evaluation", "contrasts")):
        shared = Counter(place[:2] for place, names in compared.items() if {first, second} <= names)
        if max(shared.values(), default=0) < 2:
            raise InputError(
                f"contrasts: {first}-{second} needs both methods in the grid, with at least two "
                "seeds of one data set and backbone"
            )


def notebook_sha256(path: Path) -> str:
    """SHA-256 over a notebook's code cells but for its `parameters` cell."""
    cells = [cell for cell in read_json(path)["cells"] if cell["cell_type"] == "code"]
    tags = [cell["metadata"].get("tags", []) for cell in cells]
    code = [c["source"] for c, of in zip(cells, tags, strict=True) if "parameters" not in of]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()
