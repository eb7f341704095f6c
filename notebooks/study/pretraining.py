"""The network before fine-tuning: where its weights come from, and what is checked of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from lsgs_core.batch import Batch
from lsgs_core.errors import InputError
from lsgs_core.models import Backbone, load_author_weights
from lsgs_core.scenarios import ScenarioSet
from study.artifacts import check, load_table, load_weights, sidecar_path
from study.data.manifest import load_manifest
from study.files import file_sha256

# Differences below this, relative to the size of the latent, are float32 rounding.
TOLERANCE = 1e-4
CHECKED_PATCHES = 3
# What any weights of ours must have been made for, and what committed ones in addition.
OWN = ("model", "modalities", "classes")
COMMITTED = (*OWN, "dataset", "task", "fold", "normalisation", "pretraining_seed")


@dataclass(frozen=True)
class Pretrained:
    """Where the weights of a network were taken from.

    Attributes:
        path: Their file.
        origin: What they are, in words.
        trained_with: Settings of their training, from their record; empty where that is not known.
        history: Of their training, as `train` returns it; None where that is not known.
    """

    path: Path
    origin: str
    trained_with: Mapping[str, Any]
    history: pd.DataFrame | None


def load_pretrained(
    model: Backbone, weights: str, manifest: Path, made_with: Mapping[str, Any]
) -> Pretrained | None:
    """Load the weights that a study starts from, after making sure that they are the wanted ones.

    Args:
        model: Changed in place.
        weights: "committed" takes the network that the manifest lists; "train" none; anything else
            is a file: the user's own weights with their record, or the authors' checkpoint.
        manifest: Path of data_manifest.yaml, to which the paths of networks are relative.
        made_with: What the weights must have been made with: model, modalities, classes, dataset,
            task, fold, normalisation, pretraining_seed and patches_sha256. Of the user's own only
            the first three are looked at.

    Returns:
        Where the weights come from; None where the network is to be trained.

    Raises:
        InputError: No such network or file, another hash than the manifest lists, weights of
            another model, band order, class list or fold, or a file that is no plain tensors.
    """
    if weights == "train":
        return None
    if weights != "committed":
        path, origin = Path(weights), "a checkpoint of this study"
        expected = {name: made_with[name] for name in OWN}
        if not path.is_file():
            known = "'committed', 'train' or the path of a checkpoint"
            raise InputError(f"weights: no such file: {weights!r}; expected {known}")
    else:
        names = ("dataset", "backbone", "fold", "pretraining_seed")
        wanted = {**made_with, "backbone": made_with["model"]["name"]}
        network = load_manifest(manifest).network(*(wanted[name] for name in names))
        path, origin = manifest.parent / network.weights, f"committed: {network.origin}"
        expected = {name: made_with[name] for name in COMMITTED}
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
    if load_checkpoint(model, path, expected) == "authors":
        return Pretrained(path, "the authors' checkpoint", {}, None)
    trained_with = check(path)["parameters"].get("trained_with", {})
    history = path.with_name("history.csv")
    seen = load_table(history) if sidecar_path(history).is_file() else None
    return Pretrained(path, origin, trained_with, seen)


def load_checkpoint(model: Backbone, path: Path, expected: Mapping[str, Any] | None = None) -> str:
    """Load pretrained weights: ours, known by the record beside them, or the authors'.

    Args:
        model: Changed in place.
        path: The checkpoint.
        expected: Parameters that a checkpoint of ours must have been made with.

    Returns:
        "ours" or "authors".

    Raises:
        InputError: It is the checkpoint of another model, or damaged, or made with other
            parameters.
    """
    if not sidecar_path(path).is_file():
        load_author_weights(model, path)
        return "authors"
    weights, _ = load_weights(path, expected)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if wrong := sorted(name for name in wanted | found if wanted.get(name) != found.get(name)):
        raise InputError(
            f"{path}: a checkpoint of another model: {len(wrong)} entries differ, the first is "
            f"{wrong[0]}: expected {wanted.get(wrong[0])}, found {found.get(wrong[0])}"
        )
    if bad := [name for name, value in weights.items() if not bool(torch.isfinite(value).all())]:
        raise InputError(f"{path}: {len(bad)} entries are not finite, the first is {bad[0]}")
    model.load_state_dict(weights)
    return "ours"


def check_network(
    model: Backbone, batches: Iterable[Batch], scenarios: ScenarioSet
) -> pd.DataFrame:
    """Make sure of what scoring takes for granted.

    Args:
        model: Left in evaluation mode.
        batches: The first complete patches of these are used.
        scenarios: For the model's modalities.

    Returns:
        One row per check: check, found (largest relative difference, or count), allowed, passed.

    Raises:
        InputError: No patch has every modality.
    """
    model.eval()
    device = next(model.parameters()).device
    images = [image.to(device) for image in _complete_images(batches)]
    masks = torch.tensor(scenarios.masks, device=device)
    full = torch.ones(len(images[0]), len(images), dtype=torch.bool, device=device)
    with torch.inference_mode():
        shared = model.scenario_latents(images, masks)
        together = model.latent(images, full)
        alone = torch.cat(
            [
                model.latent([image[i : i + 1] for image in images], full[i : i + 1])
                for i in range(len(full))
            ]
        )
        absent = [_latents_without(model, images, gone) for gone in range(len(images))]
    not_finite = sum(not bool(torch.isfinite(value).all()) for value in model.state_dict().values())
    differences = {
        "entries that are not finite": (float(not_finite), 0.0),
        "D of the full scenario": (_difference(shared[scenarios.full], together), TOLERANCE),
        "a patch alone and in a batch": (_difference(alone, together), TOLERANCE),
        "pixels of an absent modality": (max(_difference(*pair) for pair in absent), 0.0),
    }
    rows = [
        {"check": name, "found": found, "allowed": allowed, "passed": found <= allowed}
        for name, (found, allowed) in differences.items()
    ]
    return pd.DataFrame(rows)


def _complete_images(batches: Iterable[Batch]) -> list[torch.Tensor]:
    """Images of the first complete patches, one tensor per modality."""
    found: list[list[torch.Tensor]] = []
    count = 0
    for batch in batches:
        found.append([image[batch.complete] for image in batch.images])
        count += int(batch.complete.sum())
        if count >= CHECKED_PATCHES:
            break
    if not count:
        raise InputError("expected a patch that every modality sees, found none")
    joined = [torch.cat(parts) for parts in zip(*found, strict=True)]
    return [images[:CHECKED_PATCHES] for images in joined]


def _latents_without(
    model: Backbone, images: list[torch.Tensor], gone: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents when a modality is not there, with its pixels as they are and with others."""
    available = (
        torch.arange(len(images), device=images[0].device).ne(gone).expand(len(images[0]), -1)
    )
    others = [torch.full_like(i, 1e3) if m == gone else i for m, i in enumerate(images)]
    return model.latent(images, available), model.latent(others, available)


def _difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """Largest difference relative to the root mean square of the second."""
    return float((first - second).abs().max() / second.square().mean().sqrt().clamp(min=1e-12))
