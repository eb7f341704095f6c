"""What networks predict for a few patches under every scenario, kept in 8 bits per pixel.

Small enough to be committed, so that predictions can be looked at without networks and data.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from lsgs_core.errors import InputError
from lsgs_core.models import Backbone, build_backbone
from lsgs_core.scenarios import ScenarioSet
from study.artifacts import Record, save
from study.checkpoints import load_checkpoint
from study.data.patches import PatchDataset
from study.evaluation import class_map
from study.figures import composite
from study.tiers import StudyFolder

NOTHING, UNKNOWN = 254, 255  # none of the classes; no label, or nothing to predict from
MAP = "map/"  # in front of the names of predictions in a file


@dataclass(frozen=True)
class Predictions:
    """Patches with their pictures, truth, and the predictions of several networks.

    Attributes:
        modalities: Names, M of them.
        classes: Names, C of them, at most 254.
        patch_ids: int64 [P].
        pictures: Colours per modality, uint8 [P, M, H, W, 3].
        truth: Class per pixel, `NOTHING` or `UNKNOWN`, uint8 [P, H, W].
        maps: The same of what is predicted in each of the K scenarios, uint8 [P, K, H, W], by
            "backbone/method".
    """

    modalities: tuple[str, ...]
    classes: tuple[str, ...]
    patch_ids: NDArray[np.int64]
    pictures: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    maps: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that everything fits together. Raises `InputError`."""
        count, *size = self.truth.shape
        wanted = {"patches": (count,), "truth": (count, *size)}
        found = {"patches": self.patch_ids.shape, "truth": self.truth.shape}
        wanted["pictures"] = (count, len(self.modalities), *size, 3)
        found["pictures"] = self.pictures.shape
        for name, values in self.maps.items():
            wanted[name] = (count, len(self.scenarios), *size)
            found[name] = values.shape
        if len(size) != 2 or found != wanted:
            raise InputError(f"predictions: expected shapes {wanted}, found {found}")

    @property
    def scenarios(self) -> ScenarioSet:
        """The scenarios that were predicted, in their order."""
        return ScenarioSet.of(self.modalities)

    def of(self, backbone: str, method: str) -> NDArray[np.uint8]:
        """Predictions [P, K, H, W] of a network. Raises `InputError` where there are none."""
        name = f"{backbone}/{method}"
        if name not in self.maps:
            raise InputError(f"predictions: none of {name}; there are {list(self.maps)}")
        return self.maps[name]


def richest_patches(dataset: PatchDataset, count: int) -> list[int]:
    """Positions of the patches with most label values, from different blocks while there are any.

    Of two with as many values, the one with more labelled pixels comes first.
    """
    pixels = dataset.table.filter(like="pixels_")
    order = pd.DataFrame({"values": (pixels > 0).sum(axis=1), "labelled": pixels.sum(axis=1)})
    order["block"] = dataset.block_ids
    order = order.sort_values(["values", "labelled"], ascending=False, kind="stable")
    # The best of every block first, then the second best of every block, and so on.
    order["turn"] = order.groupby("block").cumcount()
    return order.sort_values("turn", kind="stable").index[:count].tolist()


def shown_patches(dataset: PatchDataset, indices: Sequence[int]) -> Predictions:
    """Pictures and truth of patches, without predictions yet.

    Args:
        dataset: With labels.
        indices: Positions in the data set, at least one.
    """
    pictures, truth = [], []
    for index in indices:
        batch = dataset.batch([index])
        assert batch.target is not None
        assert batch.valid is not None
        seen = np.ones(batch.available.shape + tuple(batch.valid.shape[1:]), dtype=bool)
        if batch.seen is not None:
            seen = batch.seen.numpy()
        raw, _ = dataset.read(index)
        pictures.append([composite(raw[m], s) for m, s in zip(raw, seen[0], strict=True)])
        if dataset.task_kind == "multiclass":
            classes = batch.target[0]
        else:  # logits of ±1, so that the truth is read off as predictions are
            classes = class_map(2 * batch.target - 1, dataset.task_kind)[0]
        truth.append(torch.where(batch.valid[0], _coded(classes), UNKNOWN).numpy())
    return Predictions(
        modalities=tuple(dataset.modalities),
        classes=tuple(dataset.classes),
        patch_ids=dataset.patch_ids[list(indices)],
        pictures=np.round(255 * np.array(pictures)).astype(np.uint8),
        truth=np.array(truth).astype(np.uint8),
    )


def predict_patches(
    model: Backbone, dataset: PatchDataset, indices: Sequence[int]
) -> NDArray[np.uint8]:
    """What a network makes of patches under every scenario, uint8 [P, K, H, W].

    Args:
        model: In evaluation mode afterwards.
        dataset: Where the patches come from.
        indices: Positions in the data set.
    """
    model.eval()
    device = next(model.parameters()).device
    masks = torch.tensor(ScenarioSet.of(dataset.modalities).masks, device=device)
    found = []
    for index in indices:
        batch = dataset.batch([index]).to(device)
        present = batch.available & masks  # [K, M]: every scenario of the one patch
        maps = torch.full((len(masks), *batch.images[0].shape[2:]), UNKNOWN)
        with torch.inference_mode():
            for scenario in torch.nonzero(present.any(dim=1)).flatten().tolist():
                logits = model(batch.images, present[scenario : scenario + 1])
                maps[scenario] = _coded(class_map(logits, dataset.task_kind)[0]).cpu()
        found.append(maps.numpy())
    return np.array(found).astype(np.uint8)


def predictions_of_runs(
    study: StudyFolder,
    points: Mapping[tuple[str, str, int, int], Sequence[str]],
    tests: Mapping[tuple[str, int], PatchDataset],
    preset: str,
    pretraining_seed: int,
    count: int,
    device: torch.device | str = "cpu",
) -> dict[str, Predictions]:
    """What the runs of the first fold and seed of every data set predict for its richest patches.

    Args:
        study: Where the runs are, with their weights.
        points: Methods of every (dataset, backbone, fold, seed).
        tests: Test patches of every (dataset, fold).
        preset: Size of the backbones.
        pretraining_seed: Of the networks before fine-tuning, which are method "pretrained".
        count: Patches per data set.
        device: To predict on.

    Returns:
        By data set.

    Raises:
        InputError: A checkpoint is not there, or is another one.
    """
    first: dict[str, tuple[int, int]] = {}
    found: dict[str, Predictions] = {}
    for (dataset, backbone, fold, seed), methods in points.items():
        if first.setdefault(dataset, (fold, seed)) != (fold, seed):
            continue
        part = tests[dataset, fold]
        chosen = richest_patches(part, count)
        model = build_backbone(backbone, preset, part.bands, len(part.classes)).to(device)
        folders = {"pretrained": study.pretrained(dataset, backbone, fold, pretraining_seed)}
        folders |= {name: study.runs(dataset, backbone, fold, seed) / name for name in methods}
        maps = {}
        for method, folder in folders.items():
            wanted = {"model": model.configuration, "dataset": dataset, "fold": fold}
            wanted |= {} if method == "pretrained" else {"method": method, "seed": seed}
            load_checkpoint(model, folder / "weights.safetensors", wanted)
            maps[f"{backbone}/{method}"] = predict_patches(model, part, chosen)
        before = found.get(dataset) or shown_patches(part, chosen)
        found[dataset] = replace(before, maps={**before.maps, **maps})
    return found


def save_predictions(path: Path, predictions: Predictions, record: Record) -> Path:
    """Write predictions as a compressed .npz; equal predictions give equal bytes."""
    arrays: dict[str, Any] = {
        "modalities": np.array(predictions.modalities),
        "classes": np.array(predictions.classes),
        "patch_ids": predictions.patch_ids,
        "pictures": predictions.pictures,
        "truth": predictions.truth,
        **{MAP + name: values for name, values in predictions.maps.items()},
    }

    def write(to: Path) -> None:
        with to.open("wb") as file:
            np.savez_compressed(file, **arrays)

    return save(path, write, record)


def load_predictions(path: Path) -> Predictions:
    """Read what `save_predictions` wrote. Raises `InputError` where it is something else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        pixels = {name: arrays[name].astype(np.uint8) for name in ("pictures", "truth")}
        return Predictions(
            modalities=tuple(arrays["modalities"].tolist()),
            classes=tuple(arrays["classes"].tolist()),
            patch_ids=arrays["patch_ids"],
            maps={n.removeprefix(MAP): a for n, a in arrays.items() if n.startswith(MAP)},
            **pixels,
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: expected the predictions of notebook 05: {error}") from error


def _coded(classes: torch.Tensor) -> torch.Tensor:
    return torch.where(classes < 0, NOTHING, classes)
