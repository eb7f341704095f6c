"""Patches of a prepared data set, read when they are needed, as batches of tensors."""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
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
from lsgs_core.rasters import LABELS, Prepared, load_prepared, read_labels, windows

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
        tensors = {n: t.to(device) for n, t in vars(self).items() if isinstance(t, torch.Tensor)}
        return replace(self, images=tuple(image.to(device) for image in self.images), **tensors)


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
    GDAL's block cache keeps what is used again. Files are opened once per process and thread, so
    an instance can be pickled and used after a fork.

    Args:
        prepared_folder: with the rasters of `rasters.prepare` and the table of `make_patches`.
        dataset: the definition that the folder was prepared from.
        task: name of a task of the data set.
        fold: number of a fold, from 0.
        split: "training", "validation" or "test".
        normalisation: "standardise" (subtract the mean, divide by the standard deviation, or by 1
            where a band does not vary, with a warning), "centre" (subtract the mean) or "none".
            Statistics are over all pixels with data in the fold's training windows, each once.
        limit: keep only this many patches, spread evenly over the split.

    Raises:
        InputError: a name or number is unknown, the split is empty, or the folder is not prepared
            from this definition.

    Attributes:
        table: the rows of the patch table that belong to the split.
        patch_ids, block_ids: [N] int64.
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
        table = read_patch_table(self.folder / TABLE)
        _expect("fold", fold, range(table.filter(regex="^fold_").shape[1]))
        self._hashes = _hashes(self.folder, record)
        whole = json.dumps(self._hashes, sort_keys=True)
        self.data_sha256 = hashlib.sha256(whole.encode()).hexdigest()
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
        # membership[id] says per class whether a pixel with that label id belongs to it.
        ids = dataset.labels.ids
        self._membership = np.zeros((IGNORE + 1, len(self.classes)), dtype=bool)
        for index, group in enumerate(definition.classes.values()):
            self._membership[[ids[value] for value in group], index] = True
        self._shift: dict[str, Any] = dict.fromkeys(self.modalities, 0)
        self._scale: dict[str, Any] = dict.fromkeys(self.modalities, 1)
        if normalisation != "none":
            statistics = fold_statistics(self.folder, dataset, fold)
            self._shift = {m: _column(mean) for m, mean in statistics.means.items()}
            if normalisation == "standardise":
                self._scale = {m: _column(spread) for m, spread in statistics.deviations.items()}

    def __len__(self) -> int:
        return len(self.table)

    def read(self, index: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Return one patch as it is, for display.

        Returns:
            The bands [D_m, H, W] per modality in the type of the source, and the label ids [H, W]
            uint8 (index in the manifest's list + 1; 255 is unlabelled).
        """
        images = {modality: self._read(index, modality)[0] for modality in self.modalities}
        return images, self._read(index, LABELS)[0][0]

    def batch(self, indices: Sequence[int] | np.ndarray | torch.Tensor) -> Batch:
        """Return the patches at these positions (0 … len − 1) as a `Batch`."""
        chosen = [int(index) for index in indices]
        images, available = [], []
        for modality in self.modalities:
            pixels, has_data = zip(*(self._image(i, modality) for i in chosen), strict=True)
            images.append(torch.from_numpy(np.stack(pixels)))
            available.append(torch.tensor(has_data))
        ids = np.stack([self._read(index, LABELS)[0][0] for index in chosen])
        valid = ids != IGNORE
        member = self._membership[ids]  # [B, H, W, C]
        if self.task_kind == "multiclass":
            valid &= member.any(axis=-1)  # a labelled pixel of no class has no right answer
            target = torch.from_numpy(member.argmax(axis=-1).astype(np.int64))
        else:
            target = torch.from_numpy(np.moveaxis(member, -1, 1).astype(np.float32))
        return Batch(
            images=tuple(images),
            available=torch.stack(available, dim=1),
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

    def _read(self, index: int, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a patch of a raster [D, H, W], and where it has data [H, W] bool."""
        row = self.table.iloc[index]
        file = f"{row['scene']}/{name}.tif"
        raster = _open(self.folder / file, self._hashes[file], os.getpid(), threading.get_ident())
        window = Window(row["column"], row["row"], self.size, self.size)
        return raster.read(window=window), raster.read_masks(1, window=window) > 0

    def _image(self, index: int, modality: str) -> tuple[np.ndarray, bool]:
        """Return the normalised bands of a patch, and whether any pixel of them has data."""
        pixels, with_data = self._read(index, modality)
        image = (pixels.astype(np.float32) - self._shift[modality]) / self._scale[modality]
        image[:, ~with_data] = 0
        return image, bool(with_data.any())


@lru_cache(OPEN_FILES)
def _open(path: Path, sha256: str, process: int, thread: int) -> Any:
    """Open a raster once per content, process and thread; those used least are closed."""
    return rasterio.open(path)


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
    means, deviations = {}, {}
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
            for window in windows(made.height, made.width):
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
    rasters = {name: sha for scene in record.scenes.values() for name, sha in scene.outputs.items()}
    return {TABLE: file_sha256(folder / TABLE)} | rasters


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


def _expect(name: str, value: object, known: Sequence[object]) -> None:
    if value not in known:
        raise InputError(f"{name}: expected one of {list(known)}, found {value!r}")
