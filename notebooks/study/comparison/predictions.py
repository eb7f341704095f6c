"""Predictions for a few patches under every scenario, stored in 8 bits per pixel.

They are small enough to be committed, and are shown without networks and data.
"""

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from lsgs_core.errors import InputError
from lsgs_core.models import Backbone
from lsgs_core.scenarios import ScenarioSet
from study.comparison.collection import Collected
from study.data.colours import class_colours
from study.data.patches import PatchDataset
from study.metrics.evaluation import class_map, scenario_logits
from study.provenance.artifacts import Record, save
from study.stages.tiers import network_seed
from study.training.checkpoints import build_network, load_checkpoint

NOTHING, UNKNOWN = 254, 255  # none of the classes; no label, or nothing to predict from
NAMES = ("modalities", "bands", "classes", "colours")
MAP = "map/"  # prefix of the predictions in a file


@dataclass(frozen=True)
class Predictions:
    """P patches with their pictures, their truth, and the predictions of several networks."""

    modalities: tuple[str, ...]  # names of the M modalities
    bands: tuple[str, ...]  # what their pictures show, such as "B04, B03, B02"
    classes: tuple[str, ...]  # names of the C classes, at most 254
    colours: tuple[str, ...]  # their colours, "#RRGGBB"
    pixel_size: float  # side of a pixel in metres; NaN where that is not known
    patch_ids: NDArray[np.int64]  # [P]
    pictures: NDArray[np.uint8]  # colour picture of every modality, [P, M, H, W, 3]
    truth: NDArray[np.uint8]  # class of every pixel, `NOTHING` or `UNKNOWN`, [P, H, W]
    # predicted classes in each of the K scenarios, [P, K, H, W], by "backbone/method"
    maps: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise `InputError` when the shapes do not fit together."""
        count, *size = self.truth.shape
        found = {"patches": self.patch_ids.shape, "pictures": self.pictures.shape}
        found |= {name: array.shape for name, array in self.maps.items()}
        expected = {"patches": (count,), "pictures": (count, len(self.modalities), *size, 3)}
        expected |= {name: (count, len(self.scenarios), *size) for name in self.maps}
        found |= {"colours": (len(self.colours),), "bands": (len(self.bands),)}
        expected |= {"colours": (len(self.classes),), "bands": (len(self.modalities),)}
        if len(size) != 2 or found != expected:
            raise InputError(f"predictions: expected shapes {expected}, found {found}")

    @property
    def scenarios(self) -> ScenarioSet:
        """The K scenarios of the maps, in their order."""
        return ScenarioSet.of(self.modalities)

    def of(self, backbone: str, method: str) -> NDArray[np.uint8]:
        """Return the predictions of a network, uint8 [P, K, H, W], or raise `InputError`."""
        name = f"{backbone}/{method}"
        if name not in self.maps:
            raise InputError(f"predictions: none of {name}; there are {list(self.maps)}")
        return self.maps[name]

    def agreement(self, patch: int, predicted: NDArray[np.uint8]) -> tuple[float, float]:
        """Return the share of a patch's pixels that are right, and the mean IoU of its classes."""
        truth = self.truth[patch]
        counted = (truth != UNKNOWN) & (predicted != UNKNOWN)
        truth, predicted = truth[counted], predicted[counted]
        present = np.union1d(truth, predicted)
        pairs = [(truth == c, predicted == c) for c in present[present < NOTHING]]
        ious = pd.Series([(true & said).sum() / (true | said).sum() for true, said in pairs])
        return float(pd.Series(truth == predicted).mean()), float(ious.mean())


def shown_bands(bands: Sequence[str]) -> str:
    """Return the names of the bands that `composite` draws, as red, green and blue or in grey."""
    return ", ".join(bands[: 3 if len(bands) > 2 else 1])


def composite(bands: NDArray[Any], seen: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """Return a colour picture of three bands (grey, of fewer), each stretched from 2 to 98 %.

    Args:
        bands: [D, H, W]; the first three are red, green and blue.
        seen: Pixels with data, [H, W]; the others are white.

    Returns:
        float64 [H, W, 3], from 0 to 1.
    """
    shown = np.asarray(bands, dtype=np.float64)[:3]
    shown = np.repeat(shown[:1], 3, axis=0) if len(shown) < 3 else shown
    inside = np.ones(shown.shape[1:], dtype=bool) if seen is None else seen
    if not inside.any():
        return np.ones((*inside.shape, 3))
    limits = np.percentile(shown[:, inside], [2, 98], axis=1)[..., None, None]
    stretched = np.clip((shown - limits[0]) / np.maximum(np.ptp(limits, axis=0), 1e-12), 0, 1)
    stretched[:, ~inside] = 1
    return stretched.transpose(1, 2, 0)


def richest_patches(dataset: PatchDataset, count: int) -> list[int]:
    """Return the positions of the patches with most label values, from as many blocks as possible.

    Among patches with equally many values, one with more labelled pixels comes first.
    """
    pixels = dataset.table.filter(like="pixels_")
    order = pd.DataFrame({"values": (pixels > 0).sum(axis=1), "labelled": pixels.sum(axis=1)})
    order = order.sort_values(["values", "labelled"], ascending=False, kind="stable")
    # The best of every block first, then the second best of every block, and so on.
    order["turn"] = order.groupby(dataset.table["block"]).cumcount()
    return order.sort_values("turn", kind="stable").index[:count].tolist()


def shown_patches(dataset: PatchDataset, indices: Sequence[int]) -> Predictions:
    """Return the pictures and the truth of the patches at some positions, without predictions."""
    pictures, truth = [], []
    for index in indices:
        batch = dataset.batch([index])
        assert batch.target is not None
        assert batch.valid is not None
        bands, _ = dataset.read(index)
        seen = [None] * len(bands) if batch.seen is None else batch.seen[0].numpy()
        pictures.append([composite(*pair) for pair in zip(bands.values(), seen, strict=True)])
        if dataset.task_kind == "multiclass":
            classes = batch.target[0]
        else:  # targets of 0 and 1 as logits of -1 and 1
            classes = class_map(2 * batch.target - 1, dataset.task_kind)[0]
        truth.append(torch.where(batch.valid[0], _coded(classes), UNKNOWN).numpy())
    return Predictions(
        modalities=tuple(dataset.modalities),
        bands=tuple(map(shown_bands, dataset.description.bands.values())),
        pixel_size=dataset.description.pixel_size or np.nan,
        classes=tuple(dataset.classes),
        colours=tuple(class_colours(dataset.classes, dataset.dataset.colours)),
        patch_ids=dataset.patch_ids[list(indices)],
        pictures=np.round(255 * np.array(pictures)).astype(np.uint8),
        truth=np.array(truth).astype(np.uint8),
    )


def predict_patches(
    model: Backbone, dataset: PatchDataset, indices: Sequence[int]
) -> NDArray[np.uint8]:
    """Predict the patches at some positions under every scenario, uint8 [P, K, H, W].

    The network is left in evaluation mode.
    """
    model.eval()
    device, scenarios = next(model.parameters()).device, ScenarioSet.of(dataset.modalities)
    predicted = []
    for index in indices:
        batch = dataset.batch([index]).to(device)
        maps = torch.full((len(scenarios), *batch.images[0].shape[2:]), UNKNOWN)
        for scenario, _, logits, _ in scenario_logits(model, batch, scenarios):
            maps[scenario] = _coded(class_map(logits, dataset.task_kind)[0]).cpu()
        predicted.append(maps.numpy())
    return np.array(predicted).astype(np.uint8)


def networks_of(
    grid: Collected, most: int | None = None
) -> Iterator[tuple[str, str, PatchDataset, Backbone]]:
    """Yield the networks of the first fold and seed of every data set, of at most so many methods.

    Those before fine-tuning are method "pretrained". A checkpoint that is missing, or was made with
    other parameters, raises `InputError`.

    Yields:
        The data set, "backbone/method", the test patches, and the network in evaluation mode.
    """
    asked, first = grid.parameters, dict[str, tuple[int, int]]()
    for (dataset, backbone, fold, seed), methods in grid.points.items():
        if first.setdefault(dataset, (fold, seed)) != (fold, seed):
            continue
        test = grid.tests[dataset, fold]
        model = build_network(backbone, asked["preset"], test, grid.device)
        network = network_seed(asked["pretraining_seed"], seed)
        folders = {"pretrained": grid.study.pretrained(dataset, backbone, fold, network)}
        folders |= {n: grid.study.runs(dataset, backbone, fold, seed) / n for n in methods[:most]}
        for method, folder in folders.items():
            made_with = {"model": model.configuration, "dataset": dataset, "fold": fold}
            made_with |= {} if method == "pretrained" else {"method": method, "seed": seed}
            load_checkpoint(model, folder / "weights.safetensors", made_with)
            yield dataset, f"{backbone}/{method}", test, model.eval()


def predictions_of_runs(grid: Collected) -> dict[str, Predictions]:
    """Predict the richest patches of every data set with the networks of `networks_of`."""
    by_dataset: dict[str, Predictions] = {}
    for dataset, name, test, model in networks_of(grid):
        indices = richest_patches(test, grid.parameters["shown_patches"])
        before = by_dataset.get(dataset) or shown_patches(test, indices)
        maps = {**before.maps, name: predict_patches(model, test, indices)}
        by_dataset[dataset] = replace(before, maps=maps)
    return by_dataset


def save_predictions(path: Path, predictions: Predictions, record: Record) -> Path:
    """Write predictions as a compressed .npz; equal predictions give equal bytes."""
    arrays: dict[str, Any] = {**vars(predictions)}
    arrays |= {MAP + name: values for name, values in arrays.pop("maps").items()}
    return save(path, lambda to: np.savez_compressed(to, **arrays), record)


def load_predictions(path: Path) -> Predictions:
    """Read predictions that `save_predictions` wrote; another file raises `InputError`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            fields: dict[str, Any] = {name: file[name] for name in file.files}
        fields |= {name: tuple(fields[name].tolist()) for name in NAMES}
        fields["pixel_size"] = float(fields["pixel_size"])
        names = [name for name in fields if name.startswith(MAP)]
        maps = {name.removeprefix(MAP): fields.pop(name) for name in names}
        return Predictions(**fields, maps=maps)
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: expected the predictions of notebook 05: {error}") from error


def _coded(classes: torch.Tensor) -> torch.Tensor:
    return torch.where(classes < 0, NOTHING, classes)
