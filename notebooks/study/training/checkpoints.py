"""Networks and their pretrained weights: committed, of one's own, or the authors'.

With `make study NETWORKS=my_networks.py`, a tier or a notebook can have the backbone
`my_networks:segformer`: a function of that file that returns, for the numbers of bands D_m and of
classes, a `Backbone` or what `AdaptedBackbone` makes one of. Weights, records, manifests and tiers
hold the name at most, which imports nothing by itself.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import torch
from torch import nn

from lsgs_core.errors import InputError, check_type
from lsgs_core.models import Backbone, build_backbone, load_author_weights
from lsgs_core.models.adapter import AdaptedBackbone
from lsgs_core.models.cpu import accelerate_on_cpu
from lsgs_core.scenarios import ScenarioSet
from study.data.manifest import load_manifest
from study.data.patches import Description, PatchDataset
from study.provenance.artifacts import (
    check,
    check_parameters,
    load_table,
    load_weights,
    sidecar_path,
)
from study.provenance.files import file_sha256
from study.provenance.freshness import code_without_prose
from study.provenance.schema import validated

# What any weights of ours must have been made for, and what committed ones in addition.
OWN: tuple[str, ...] = ("model", "modalities", "classes")
COMMITTED = (*OWN, "dataset", "task", "fold", "normalisation", "pretraining_seed")
WEIGHTS = "weights.safetensors"
# The variable with the path of the file of one's own networks, which the command line sets.
NETWORKS = "LSGS_NETWORKS"
ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Pretrained:
    """Where the weights of a network were taken from."""

    path: Path
    origin: str  # in words
    trained_with: Mapping[str, Any]  # settings of the training; empty where they are not known
    history: pd.DataFrame | None  # of the training, as `train` returns it; None where not known


def load_pretrained(
    model: Backbone, weights: str, manifest: Path, made_with: Mapping[str, Any]
) -> Pretrained:
    """Load the weights that a study starts from, after making sure that they are the wanted ones.

    Args:
        model: Changed in place.
        weights: "committed" takes the network that the manifest lists; anything else is a file:
            the user's own weights with their record, or the authors' checkpoint.
        manifest: Path of data_manifest.yaml, to which the paths of networks are relative.
        made_with: What the weights must have been made with: model, modalities, classes, dataset,
            task, fold, normalisation, pretraining_seed and patches_sha256. Only the first three
            are looked at in the user's own weights.

    Raises `InputError` for no such network or file, or for weights of another network.
    """
    if weights != "committed":
        path, origin, names = Path(weights), "a checkpoint of this study", OWN
        if not path.is_file():
            accepted = "'committed', 'train' or the path of a checkpoint"
            raise InputError(f"weights: no such file: {weights!r}; expected {accepted}")
    else:
        point = made_with["dataset"], made_with["model"]["name"], made_with["fold"]
        network = load_manifest(manifest).network(*point, made_with["pretraining_seed"])
        path, origin = manifest.parent / network.weights, f"committed: {network.origin}"
        names = COMMITTED
        again = f"`git checkout -- {network.weights}` brings it, `make networks` trains it anew"
        if not path.is_file():
            raise InputError(f"{path}: not there (a clone without large files?); {again}")
        if (found := file_sha256(path)) != network.sha256:
            raise InputError(
                f"{path}: its sha256 is {found}, expected {network.sha256} as in {manifest.name}; "
                + again
            )
        if check(path)["parameters"].get("patches_sha256") != made_with["patches_sha256"]:
            raise InputError(
                f"{path}: trained on another patch table than the one here, whose test patches it "
                "may have seen; prepare the data with the manifest's patches and folds, or set "
                "weights to 'train'"
            )
    made = load_checkpoint(model, path, {name: made_with[name] for name in names})
    if made is None:
        return Pretrained(path, "the authors' checkpoint", {}, None)
    trained_with = made["parameters"].get("trained_with", {})
    history = path.with_name("history.csv")
    seen = load_table(history) if sidecar_path(history).is_file() else None
    return Pretrained(path, origin, trained_with, seen)


def build_network(
    backbone: str, preset: str, patches: PatchDataset, device: torch.device | str = "cpu"
) -> Backbone:
    """Return a network with fresh weights for the bands and classes of patches, in fast form."""
    sizes = patches.bands, len(patches.classes)
    if is_own(backbone):
        return build_own(backbone, *sizes).to(device)
    return accelerate_on_cpu(build_backbone(backbone, preset, *sizes)).to(device)


def network_configuration(backbone: str, preset: str, patches: PatchDataset) -> dict[str, Any]:
    """Return the configuration of the network that `build_network` would build."""
    sizes = patches.bands, len(patches.classes)
    if is_own(backbone):
        return own_configuration(backbone, *sizes)
    with torch.device("meta"):
        return build_backbone(backbone, preset, *sizes).configuration


def load_checkpoint(
    model: Backbone, path: Path, expected: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """Load pretrained weights: ours, known by the record beside them, or the authors'.

    Returns the record of ours, else None. Raises `InputError` for weights of another model, damaged
    ones, or ours where they were made with other parameters than `expected`.
    """
    if path.is_file() and not sidecar_path(path).is_file():
        load_author_weights(model, path)
        return None
    weights, record = load_weights(path, expected)
    _fill(model, weights, path)
    return record


def _fill(model: Backbone, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Give a model the weights of a file, after making sure that they are whole and fit."""
    targets = model.state_dict()
    wanted, found = ({n: tuple(t.shape) for n, t in of.items()} for of in (targets, weights))
    if wrong := sorted(name for name in wanted | found if wanted.get(name) != found.get(name)):
        raise InputError(
            f"{path}: a checkpoint of another model: {len(wrong)} entries differ, the first is "
            f"{wrong[0]}: expected {wanted.get(wrong[0])}, found {found.get(wrong[0])}"
        )
    if bad := [name for name, value in weights.items() if not _fits(value, targets[name])]:
        raise InputError(
            f"{path}: {len(bad)} entries are not finite or of another kind, the first is {bad[0]}"
        )
    model.load_state_dict(weights)


def _fits(value: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether a weight stays what it is in the type of the model."""
    same = value.is_floating_point() == target.is_floating_point() and not value.is_complex()
    return same and bool(value.to(target.dtype).isfinite().all())


@dataclass(frozen=True)
class TrainedNetwork:
    """A network with all that using it takes."""

    model: nn.Module  # in evaluation mode: `model(images, available)` returns logits [B, C, H, W]
    scenarios: ScenarioSet  # of its modalities, in the order of the images
    description: Description  # bands, classes and normalisation
    weights: Path
    sha256: str  # of the file of the weights

    def records(self) -> pd.DataFrame | None:
        """Return the records of its evaluation, None where none lie beside the weights."""
        path = self.weights.with_name("records.csv")
        return load_table(path) if sidecar_path(path).is_file() else None


def load_network(weights: Path | str, device: torch.device | str = "cpu") -> TrainedNetwork:
    """Load a network that this study saved, with its scenarios, normalisation and classes.

    It is the backbone that the record names, one of the paper's or one whose file the command line
    names.

    Args:
        weights: File of the weights, with its record beside it, or the folder of both.
        device: Where the network computes.

    Raises `InputError` where weights or record are missing, damaged, or of another network.
    """
    path = Path(weights) / WEIGHTS if Path(weights).is_dir() else Path(weights)
    values, record = load_weights(path)
    made_with = record["parameters"]
    if "description" not in made_with:
        raise InputError(f"{path}: its record has no normalisation; run notebook 02 with it")
    where = f"{sidecar_path(path)}: description"
    check_type(f"{sidecar_path(path)}: model", made_with.get("model", {}), dict)
    description = validated(Description, made_with["description"], where)
    bands, classes = [*map(len, description.bands.values())], len(description.classes)
    settings = {"name": "", **made_with.get("model", {}), "bands": bands, "classes": classes}
    if is_own(str(settings["name"])):
        model = build_own(settings["name"], bands, classes)
        check_parameters(path, made_with, {"model": model.configuration})
    else:
        model = accelerate_on_cpu(build_backbone(**settings))
    _fill(model, values, path)
    scenarios = ScenarioSet.of(description.bands)
    return TrainedNetwork(model.to(device).eval(), scenarios, description, path, record["sha256"])


def is_own(backbone: str) -> bool:
    """Return True for the name of a network of one's own, with a file and a function."""
    return ":" in backbone


def own_network(name: str) -> tuple[Callable[[list[int], int], Any], str]:
    """Import the file that the command line names; return a function of it, and the code's hash.

    Raises `InputError` where it is not that of a name such as "my_networks:segformer", or fails.
    """
    stem, _, function = name.partition(":")
    path = ROOT / os.environ.get(NETWORKS, "")
    if path == ROOT or not stem.isidentifier():
        raise InputError(
            f"backbone: {name!r} is code, which runs only where the command line names its file, "
            "as in make study NETWORKS=my_networks.py"
        )
    if path.name != f"{stem}.py" or not path.is_file():
        raise InputError(f"NETWORKS: expected a file {stem}.py for {name!r}, found {path}")
    with errors_named(str(path)):
        code = hashlib.sha256(code_without_prose(path.read_text("utf-8")).encode()).hexdigest()
        module = _imported(path, code)
    found = getattr(module, function, None)
    if not callable(found) or getattr(found, "__module__", None) != module.__name__:
        raise InputError(f"backbone: expected a function {function!r} in {path}, found none")
    return found, code


def own_code(backbone: str) -> str:
    """Return the hash of the code of a network of one's own, "" for a backbone of the paper's."""
    return own_network(backbone)[1] if is_own(backbone) else ""


def own_configuration(name: str, bands: Sequence[int], classes: int) -> dict[str, Any]:
    """Return what identifies the network: its name, sizes and code."""
    return {"name": name, "bands": [*bands], "classes": classes, "code": own_code(name)}


def build_own(name: str, bands: Sequence[int], classes: int) -> Backbone:
    """Return a network of one's own with fresh weights."""
    build, _ = own_network(name)
    with errors_named(f"backbone {name}"):
        network = build([*bands], classes)
        if not isinstance(network, Backbone):
            network = AdaptedBackbone(network, bands, classes)
    network.configuration = own_configuration(name, bands, classes)
    return network


@contextmanager
def errors_named(place: str) -> Iterator[None]:
    """Turn whatever code of one's own raises into an `InputError` that says where it was."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        raise InputError(f"{place}: {kind}{' '.join(str(error).split())}") from error


@lru_cache
def _imported(path: Path, code: str) -> ModuleType:
    """Return the module, imported once for every version of its code."""
    # Compiled here: Python's cache of byte code overlooks an edit within the same second.
    module = ModuleType(f"networks_of_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    exec(compile(path.read_bytes(), path, "exec"), vars(module))
    return module
