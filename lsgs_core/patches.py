"""Patches of a prepared data set, read when they are needed, as batches of tensors."""

import hashlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import pandas as pd
import rasterio
import torch
from pydantic import ValidationError
from rasterio.windows import Window

from lsgs_core.errors import InputError
from lsgs_core.files import file_sha256, written_beside
from lsgs_core.folds import coverage, patch_table, read_patch_table, write_patch_table
from lsgs_core.manifest import IGNORE, Dataset, Strict
from lsgs_core.rasters import LABELS, Grid, Prepared, load_prepared, read_labels

logger = logging.getLogger(__name__)

TABLE = "patches.csv"
OPEN_FILES = 64  # per process; well below what systems allow
Split = Literal["training", "validation", "test"]
Normalisation = Literal["standardise", "centre", "none"]


@dataclass(frozen=True)
class Batch:
    """B patches with M modalities of D_m bands each.

    Attributes:
        images: M tensors [B, D_m, H, W] float32, normalised; 0 where a modality has no data.
        available: [B, M] bool, whether a modality has data in the patch.
        target: binary [B, 1, H, W] float32, multilabel [B, C, H, W] float32, both 0 or 1;
            multiclass [B, H, W] int64, the index of the class. 0 where `valid` is False.
        valid: [B, H, W] bool, the pixels that loss and metrics count.
        patch_ids: [B] int64, as in the patch table.
        block_ids: [B] int64, the spatial block of each patch.
    """

    images: tuple[torch.Tensor, ...]
    available: torch.Tensor
    target: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    patch_ids: torch.Tensor | None = None
    block_ids: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> Self:
        """Return the batch with all its tensors on `device`."""

        def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device)

        rest = (self.target, self.valid, self.patch_ids, self.block_ids)
        images = tuple(image.to(device) for image in self.images)
        return type(self)(images, self.available.to(device), *map(moved, rest))


class Statistics(Strict):
    """Mean and population standard deviation per band of each modality, over training pixels."""

    made_from: dict[str, str]  # hashes of the patch table and of the rasters
    means: dict[str, list[float]]
    deviations: dict[str, list[float]]


def make_patches(
    dataset: Dataset, prepared_folder: Path, **overrides: int | float | None
) -> pd.DataFrame:
    """Write `patches.csv` into a prepared folder and return it; see `folds.patch_table`.

    Args:
        dataset: gives the defaults (`patches` and `folds` of the manifest).
        prepared_folder: where `rasters.prepare` wrote.
        **overrides: size, stride, minimum_labelled, count, block_size, margin or
            validation_blocks; None keeps the default.

    Raises:
        InputError: an unknown override, lengths that do not fit, or a scene is not prepared.
    """
    settings: dict[str, Any] = dataset.patches.model_dump()
    settings |= dataset.folds.model_dump(exclude={"kind"})
    if unknown := sorted(set(overrides) - set(settings)):
        raise InputError(f"unknown patch setting {unknown}; expected some of {sorted(settings)}")
    settings |= {name: value for name, value in overrides.items() if value is not None}
    table = patch_table(read_labels(dataset, prepared_folder), dataset.labels.values, **settings)
    write_patch_table(table, Path(prepared_folder) / TABLE)
    return table


class PatchDataset:
    """The patches of one split of one fold, for one task.

    Nothing but the patch table is held in memory: windows are read from the aligned rasters, and
    GDAL's block cache keeps what is used again. Files are opened once per process, so an instance
    can be pickled and used after a fork; it must not be shared between threads.

    Args:
        prepared_folder: with the rasters of `rasters.prepare` and the table of `make_patches`.
        dataset: the definition that the folder was prepared from.
        task: name of a task of the data set.
        fold: number of a fold, from 0.
        split: "training", "validation" or "test".
        normalisation: "standardise" (subtract the mean, divide by the standard deviation; a band
            that does not vary is divided by 1, with a warning), "centre" (subtract the mean) or
            "none". Means and deviations are those of the pixels with data that the fold's
            training windows cover, each pixel once, whatever the split.
        limit: keep only this many patches, spread evenly over the split.

    Raises:
        InputError: a name or number is unknown, the split is empty, or the folder is not prepared
            from this definition.

    Attributes:
        table: the rows of the patch table that belong to the split.
        patch_ids: [N] int64.
        block_ids: [N] int64.
        modalities: names, in the order of `Batch.images`.
        bands: number of bands D_m per modality.
        classes: names, in the order of the target's channels.
        task_kind: "binary", "multilabel" or "multiclass".
        size: side of a patch in pixels.
        data_sha256: one hash of the patch table and of all rasters.
    """

    def __init__(
        self,
        prepared_folder: Path,
        dataset: Dataset,
        task: str,
        fold: int,
        split: Split,
        normalisation: Normalisation = "standardise",
        limit: int | None = None,
    ) -> None:
        self.folder = Path(prepared_folder)
        definition = dataset.task(task)
        _expect("split", split, get_args(Split))
        _expect("normalisation", normalisation, get_args(Normalisation))
        record = _matching_record(self.folder, dataset)
        hashes = json.dumps(_hashes(self.folder, record), sort_keys=True)
        self.data_sha256 = hashlib.sha256(hashes.encode()).hexdigest()
        table = read_patch_table(self.folder / TABLE)
        _expect("fold", fold, _folds(table))
        chosen = table[table[f"fold_{fold}"] == split]
        if chosen.empty:
            raise InputError(f"{self.folder / TABLE}: fold {fold} has no {split} patches")
        if limit is not None:
            if limit < 1:
                raise InputError(f"limit: expected at least 1 patch, found {limit}")
            spread = np.linspace(0, len(chosen) - 1, min(limit, len(chosen))).round()
            chosen = chosen.iloc[spread.astype(np.int64)]
        self.table = chosen.reset_index(drop=True)
        self.patch_ids = self.table["patch_id"].to_numpy(np.int64)
        self.block_ids = self.table["block"].to_numpy(np.int64)
        self.modalities = tuple(dataset.modalities)
        self.bands = tuple(len(bands) for bands in dataset.modalities.values())
        self.classes = tuple(definition.classes)
        self.task_kind = definition.kind
        self.size = int(self.table["size"].iloc[0])
        # Without invalid pixels the masks need not be read.
        self._masked = {
            (scene, name)
            for scene, s in record.scenes.items()
            for name, n in s.invalid_pixels.items()
            if n
        }
        # membership[id] says per class whether a pixel with that label id belongs to it.
        ids = dataset.labels.ids
        membership: np.ndarray = np.zeros((IGNORE + 1, len(self.classes)), dtype=bool)
        for index, group in enumerate(definition.classes.values()):
            membership[[ids[value] for value in group], index] = True
        self._membership = membership
        self._files: OrderedDict[Path, Any] = OrderedDict()
        self._process = os.getpid()
        self._shift: dict[str, np.ndarray] = {}
        self._scale: dict[str, np.ndarray] = {}
        if normalisation != "none":
            statistics = fold_statistics(self.folder, dataset, fold)
            self._shift = {m: _column(mean) for m, mean in statistics.means.items()}
            if normalisation == "standardise":
                self._scale = {m: _column(spread) for m, spread in statistics.deviations.items()}

    def __len__(self) -> int:
        return len(self.table)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": OrderedDict()}

    def read(self, index: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Return one patch as it is, for display.

        Returns:
            The bands [D_m, H, W] per modality in the type of the source, and the label ids [H, W]
            uint8 (index in the manifest's list + 1; 255 is unlabelled).
        """
        scene, window = self._place(index)
        images = {m: self._open(scene, m).read(window=window) for m in self.modalities}
        return images, self._open(scene, LABELS).read(1, window=window)

    def batch(self, indices: Sequence[int] | np.ndarray | torch.Tensor) -> Batch:
        """Return the patches at these positions (0 … len − 1) as a `Batch`."""
        places = [self._place(int(index)) for index in indices]
        chosen = [int(index) for index in indices]
        count, size = len(places), self.size
        available: np.ndarray = np.ones((count, len(self.modalities)), dtype=bool)
        images = []
        for m, modality in enumerate(self.modalities):
            pixels: np.ndarray = np.empty((count, self.bands[m], size, size), dtype=np.float32)
            for b, (scene, window) in enumerate(places):
                raster = self._open(scene, modality)
                raster.read(window=window, out=pixels[b])
                pixels[b] = (pixels[b] - self._shift.get(modality, 0)) / self._scale.get(
                    modality, 1
                )
                if (scene, modality) in self._masked:
                    with_data = raster.read_masks(1, window=window) > 0
                    pixels[b][:, ~with_data] = 0
                    available[b, m] = with_data.any()
            images.append(torch.from_numpy(pixels))
        ids: np.ndarray = np.empty((count, size, size), dtype=np.uint8)
        for b, (scene, window) in enumerate(places):
            self._open(scene, LABELS).read(1, window=window, out=ids[b])
        valid = ids != IGNORE
        member = self._membership[ids]  # [B, H, W, C]
        if self.task_kind == "multiclass":
            valid &= member.any(axis=-1)  # a labelled pixel of no class has no right answer
            target = torch.from_numpy(member.argmax(axis=-1).astype(np.int64))
        else:
            target = torch.from_numpy(np.moveaxis(member, -1, 1).astype(np.float32))
        return Batch(
            images=tuple(images),
            available=torch.from_numpy(available),
            target=target,
            valid=torch.from_numpy(valid),
            patch_ids=torch.from_numpy(self.patch_ids[chosen]),
            block_ids=torch.from_numpy(self.block_ids[chosen]),
        )

    def batches(
        self, batch_size: int, order: Sequence[int] | np.ndarray | torch.Tensor | None = None
    ) -> Iterator[Batch]:
        """Yield batches of all patches, or of those in `order`; the last may be smaller."""
        if batch_size < 1:
            raise InputError(f"batch_size: expected at least 1, found {batch_size}")
        order = np.arange(len(self)) if order is None else order
        for start in range(0, len(order), batch_size):
            yield self.batch(order[start : start + batch_size])

    def _place(self, index: int) -> tuple[str, Window]:
        row = self.table.iloc[index]
        return row["scene"], Window(row["column"], row["row"], self.size, self.size)

    def _open(self, scene: str, name: str) -> Any:
        """Return an open raster; handles of another process (before a fork) are not used."""
        if self._process != os.getpid():
            self._files, self._process = OrderedDict(), os.getpid()
        path = self.folder / scene / f"{name}.tif"
        if path not in self._files:
            if len(self._files) >= OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[path] = rasterio.open(path)
        self._files.move_to_end(path)
        return self._files[path]


def fold_statistics(prepared_folder: Path, dataset: Dataset, fold: int) -> Statistics:
    """Return the normalisation of a fold, computed once and kept beside the patch table.

    Raises:
        InputError: a band has no pixel with data in the training windows.
    """
    folder = Path(prepared_folder)
    record = _matching_record(folder, dataset)
    made_from = _hashes(folder, record)
    path = folder / f"normalisation_fold_{fold}.json"
    try:
        known = Statistics.model_validate_json(path.read_bytes())
        if known.made_from == made_from:
            return known
    except (OSError, ValidationError):
        pass  # not there yet, or not whole: it is made now
    table = read_patch_table(folder / TABLE)
    training = table[table[f"fold_{fold}"] == "training"]
    means: dict[str, list[float]] = {}
    deviations: dict[str, list[float]] = {}
    for modality, bands in dataset.modalities.items():
        mean, deviation = _moments(folder, modality, training, record)
        # Below this part of the mean, float32 images cannot resolve a deviation.
        flat = deviation <= 1e-6 * np.abs(mean)
        if flat.any():
            logger.warning("fold %d: of %s %s, %s do not vary", fold, modality, bands, flat)
        means[modality] = mean.tolist()
        deviations[modality] = np.where(flat, 1.0, deviation).tolist()
    statistics = Statistics(made_from=made_from, means=means, deviations=deviations)
    with written_beside(path) as temporary:
        temporary.write_text(statistics.model_dump_json(indent=1) + "\n", "utf-8")
    return statistics


def _moments(
    folder: Path, modality: str, training: pd.DataFrame, record: Prepared
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation [D], float64, of the pixels that the patches cover."""
    count, total, squares = 0, np.zeros(1), np.zeros(1)
    for scene, patches in training.groupby("scene", sort=False):
        made = record.scenes[str(scene)]
        covered = coverage(patches, (made.height, made.width))
        with rasterio.open(folder / str(scene) / f"{modality}.tif") as raster:
            for window in Grid(None, None, made.width, made.height).windows():
                inside = covered[window.toslices()] & (raster.read_masks(1, window=window) > 0)
                pixels = raster.read(window=window)[:, inside].astype(np.float64)
                count += pixels.shape[1]
                total = total + pixels.sum(axis=1)
                squares = squares + (pixels**2).sum(axis=1)
    if not count:
        raise InputError(f"{folder}: {modality} has no pixel with data in the training windows")
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 0))


def _hashes(folder: Path, record: Prepared) -> dict[str, str]:
    """Return the hash of the patch table and of every raster, by path."""
    hashes = {TABLE: file_sha256(folder / TABLE)}
    for scene in record.scenes.values():
        hashes |= scene.outputs
    return hashes


def _matching_record(folder: Path, dataset: Dataset) -> Prepared:
    """Return the record of a folder that was prepared from this definition."""
    record = load_prepared(folder)
    if record is None:
        raise InputError(f"{folder}: is not a prepared folder")
    for scene in dataset.scenes:
        made = record.scenes.get(scene)
        if made is None or made.definition != dataset.raster_definition(scene):
            raise InputError(f"{folder}: scene {scene} was prepared differently; prepare it again")
    return record


def _column(values: list[float]) -> np.ndarray:
    """Return one number per band as [D, 1, 1] float32."""
    return np.array(values, dtype=np.float32)[:, None, None]


def _folds(table: pd.DataFrame) -> list[int]:
    return list(range(sum(str(name).startswith("fold_") for name in table)))


def _expect(name: str, value: object, known: Sequence[object]) -> None:
    if value not in known:
        raise InputError(f"{name}: expected one of {list(known)}, found {value!r}")
