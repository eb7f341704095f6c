"""The parameters of the notebooks: their defaults, and the values that each of them can have.

A tier file and the first cell of every notebook are checked by one model, which is made from the
notebook's `parameters` cell and the table `TYPES`. What the definition of a data set limits, such
as the number of folds, is checked with it, long before a notebook comes to use it.
"""

import ast
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, Field, create_model

from lsgs_core.distributions import read_failure_rates
from lsgs_core.errors import InputError
from lsgs_core.methods import Evidence, find_method, without_evidence
from lsgs_core.models import BACKBONES
from lsgs_core.regression import measured_scenarios
from lsgs_core.scenarios import LARGEST_MODALITY_COUNT, ScenarioSet
from study.data.folds import default_split
from study.data.manifest import Dataset, DiagonalBlocks, Name, load_manifest
from study.data.patches import Normalisation
from study.metrics.statistics import METRICS, planned_pairs
from study.provenance.schema import Strict, read_json, validated
from study.training import settings
from study.training.checkpoints import is_own, own_network
from study.training.settings import Positive, Rate

NOTEBOOK_FOLDER = Path(__file__).parents[2]
FIVE = ScenarioSet.of(["A", "B", "C", "D", "E"])  # for settings whose data set is not known yet
Index = Annotated[int, Field(ge=0, le=2**31)]
Count = Annotated[int, Field(ge=0, le=10**6)]
OrDefault = Annotated[int, Field(ge=-1, le=10**6)]  # -1 is the manifest's value
PRESETS = sorted({name for _, presets in BACKBONES.values() for name in presets})


def _methods(text: str) -> str:
    names = text.split(",")
    for name in names:
        _method(name)
    if len(set(names)) < len(names):
        raise ValueError("expected different methods")
    return text


def check_settings(method: str, scenarios: ScenarioSet) -> None:
    """Raise `InputError` where the settings in a method's name do not fit the scenarios."""
    p = np.full(len(scenarios), 1 / len(scenarios))
    distortion = np.linspace(1, 0, len(scenarios))
    scoring = Evidence(
        scenarios, p, distortion, distortion[:, None], epochs=1, steps=1,
        measure=lambda: p, prediction_distortion=distortion,
    )  # fmt: skip
    find_method(method).sampler(scoring)  # which looks at the settings


def _method(name: str) -> str:
    find_method(name)
    if "@" in name:
        check_settings(name, FIVE)
    return name


def _backbone(name: str) -> str:
    if is_own(name):
        own_network(name)
    elif name not in BACKBONES:
        raise ValueError(f"expected one of {sorted(BACKBONES)}, or such as my_networks:segformer")
    return name


def _folder(text: str) -> str:
    path = Path(text)
    try:
        file = next((part for part in (path, *path.parents) if part.is_file()), None)
    except OSError as error:  # a name that is too long
        raise ValueError(f"expected a folder: {error.strerror}") from error
    if file:
        raise ValueError(f"expected a folder, and {file} is a file")
    return text


def _not_zero(number: float) -> float:
    if number == 0:
        raise ValueError("expected a number other than 0")
    return number


Text = Annotated[str, Field(max_length=2000, pattern=r"^[^\x00]*$")]
Folder = Annotated[Text, AfterValidator(_folder)]
Tuning = Annotated[float, Field(ge=0, le=10**6)]
Backbone = Annotated[str, AfterValidator(_backbone)]
Method = Annotated[str, AfterValidator(_method)]
# The values that a parameter can have, the same in all notebooks that have it. A parameter that is
# not listed can have any value of the type of its default.
TYPES: Mapping[str, Any] = {
    **settings.TYPES,
    **dict.fromkeys(("work", "downloads", "results"), Annotated[Folder, Field(min_length=1)]),
    **dict.fromkeys(("paper_work", "scorings", "raw", "explored", "reference"), Folder),
    **dict.fromkeys(("manifest", "weights", "tiers"), Annotated[Text, Field(min_length=1)]),
    **dict.fromkeys(("scenes", "missing"), Text),
    **dict.fromkeys(("split", "index_file", "probabilities", "failure_rates", "tier"), Text),
    **dict.fromkeys(("dataset", "task"), Name),
    "normalisation": Normalisation,
    "backbone": Backbone,
    **dict.fromkeys(("preset", "growth_preset"), Literal[*PRESETS]),
    **dict.fromkeys(("fold", "shown_fold", "seed"), Index),
    "pretraining_seed": Annotated[int, Field(ge=-1, le=2**31)],  # -1 is the run's own seed
    "drawn_by": Method,
    "tested_on": Literal["test", "validation"],
    "methods": Annotated[Text, AfterValidator(_methods)],
    **dict.fromkeys(("patch_size", "patch_stride", "block_size", "growth_size"), Count),
    **dict.fromkeys(("margin", "validation_blocks"), OrDefault),
    **dict.fromkeys(("training_patches", "evaluation_patches", "shown_patches"), Count),
    **dict.fromkeys(("damaged_patches", "scenario_budget"), Count),
    "lora_learning_rate": Rate,
    "direction": Annotated[float, Field(ge=-(10**6), le=10**6), AfterValidator(_not_zero)],
    "descriptor": Literal["distortion", "latent_shift", "availability"],
    **dict.fromkeys(("lengthscale", "inverse_temperature", "tolerance"), Tuning),
    "ridge": Annotated[float, Field(gt=0, le=10**6)],
    "mixing": Annotated[float, Field(ge=0, le=1)],
    "primary_metric": Literal[*METRICS],
    "contrasts": Annotated[Text, AfterValidator(lambda text: planned_pairs(text) and text)],
    "resamples": Annotated[int, Field(ge=1, le=10**6)],
    **dict.fromkeys(("repeats", "orders", "scored"), Positive),
    "modalities": Annotated[int, Field(ge=2, le=LARGEST_MODALITY_COUNT)],
    "patches": Annotated[int, Field(ge=64, le=10**6)],
    "workers": Annotated[int, Field(ge=0, le=1024)],
    **dict.fromkeys(("processes", "threads", "lora_rank"), Annotated[int, Field(ge=1, le=1024)]),
    "device": Annotated[str, Field(pattern=r"^(auto|cpu|(cuda|mps|xpu)(:\d+)?)$")],
}


def notebook_model(notebook: str, folder: Path, left_out: Collection[str] = ()) -> type[BaseModel]:
    """Return the model that checks the parameters of a notebook, but for those `left_out`."""
    defaults = notebook_parameters(folder / f"{notebook}.ipynb")
    names = [name for name in defaults if name not in left_out]
    fields: dict[str, Any] = {n: (TYPES.get(n, type(defaults[n])), defaults[n]) for n in names}
    return create_model(notebook, __base__=Strict, **fields)


def checked_parameters(notebook: str, names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a notebook from its `globals()`; its first cell calls this.

    Raises `InputError` for a value that a parameter, or the data set's definition, does not allow.
    """
    model = notebook_model(notebook, NOTEBOOK_FOLDER)
    parameters: dict[str, Any] = {name: names.get(name) for name in model.model_fields}
    validated(model, parameters, notebook)
    if "dataset" in parameters:
        dataset = load_manifest(Path(parameters["manifest"])).dataset(parameters["dataset"])
        if "task" in parameters:
            check_against(dataset, parameters)
    return parameters


def check_against(dataset: Dataset, parameters: Mapping[str, Any]) -> None:
    """Check the parameters that the definition of a data set limits, or raise `InputError`."""
    task, get = dataset.task(parameters["task"]), parameters.get
    if get("epochs") and get("protocol") == "paper" and task.kind == "multiclass":
        raise InputError("protocol: 'paper' is for binary and multi-label tasks")
    scenarios = ScenarioSet.of(tuple(dataset.modalities))
    read_failure_rates(get("failure_rates", ""), scenarios)
    measured_scenarios(scenarios, get("scenario_budget", 0))
    if "drawn_by" in parameters:
        method = find_method(parameters["drawn_by"])
        method.sampler(replace(without_evidence(scenarios), steps=1))
        if method.low_rank or method.rate != 1:
            expected = "a method that trains all weights, without a rate"
            raise InputError(f"drawn_by: expected {expected}, found {parameters['drawn_by']!r}")
    if {"backbone", "preset"} <= parameters.keys() and not is_own(parameters["backbone"]):
        presets = BACKBONES[parameters["backbone"]][1]
        if parameters["preset"] not in presets:
            raise InputError(
                f"preset: {parameters['backbone']} has {[*presets]}, found {parameters['preset']!r}"
            )
    folds = [*dataset.folds.values()]  # which of them notebook 01 took is not known elsewhere
    if {"split", "shown_fold"} & parameters.keys():
        split = get("split") or default_split(get("protocol", "strict"))
        folds = [dataset.fold_definition(split)]
    if "block_size" in parameters and isinstance(folds[0], DiagonalBlocks):
        given = {name: parameters[name] for name in ("margin", "validation_blocks")}
        given |= {"block_size": parameters["block_size"] or -1}
        changes = {name: value for name, value in given.items() if value >= 0}
        size = parameters["patch_size"] or dataset.patches.size
        folds[0].model_copy(update=changes).check_fit(size)
    count = max(getattr(kind, "count", 1) for kind in folds)  # an official split is one fold
    for name in ("fold", "shown_fold"):
        if get(name, 0) >= count:
            raise InputError(
                f"{name}: expected less than {count}, the number of folds of the data set, "
                f"found {get(name)}"
            )


def notebook_parameters(path: Path) -> dict[str, Any]:
    """Names and defaults in a notebook's `parameters` cell, which is parsed and never run.

    Every line is `name: type = literal`, perhaps with a comment; else `InputError` is raised.
    """
    # Plain JSON: importing nbformat takes as long as importing torch, in every notebook.
    try:
        cells = read_json(path)["cells"]
        tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
        sources = ["".join(cell["source"]) for cell in tagged]
        lines: list[Any] = [line for source in sources for line in ast.parse(source).body]
    except (KeyError, TypeError, AttributeError, SyntaxError) as error:
        raise InputError(f"{path.name}: expected a notebook of Python: {error!r}") from error
    if len(tagged) != 1:
        raise InputError(f"{path.name}: expected one cell tagged 'parameters', found {len(tagged)}")
    defaults = {}
    for line in lines:
        try:
            name, _ = line.target.id, line.annotation
            defaults[name] = ast.literal_eval(line.value)
        except (AttributeError, ValueError) as error:
            raise InputError(
                f"{path.name}: expected 'name: type = value' in the parameters cell, "
                f"found {ast.unparse(line)!r}"
            ) from error
    return defaults
