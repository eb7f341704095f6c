"""Patches of a prepared data set as batches of tensors, read and normalised when needed."""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

import numpy as np
import pandas as pd
import rasterio
import torch
from numpy.typing import NDArray
from pydantic import FiniteFloat, PositiveFloat, ValidationError, model_validator
from rasterio.windows import Window
from torch.utils.data import DataLoader

from lsgs_core.batch import Batch
from lsgs_core.errors import InputError, check_choice
from study.data.alignment import naming, windows
from study.data.folds import check_separation, coverage, leaks, patch_table, read_patch_table
from study.data.labels import class_membership, membership
from study.data.manifest import Dataset, DiagonalBlocks, Name, Names, Patches, Positive
from study.data.preparation import LABELS, PATCH_TABLE, Prepared, matching_record, open_prepared
from study.provenance.files import file_sha256, written_beside
from study.provenance.schema import Strict, validated

logger = logging.getLogger(__name__)

OPEN_FILES = 64  # per process; well below what systems allow
Split = Literal["training", "validation", "test"]
Normalisation = Literal["standardise", "centre", "none"]


def make_patches(
    dataset: Dataset,
    folder: Path,
    folds: str = "",
    index_file: Path | None = None,
    **overrides: int | float | None,
) -> pd.DataFrame:
    """Write `patches.csv` into a prepared folder and return it; see `folds.patch_table`.

    It is proved here that no pixel is in two parts of a fold, except for shuffled patches, where
    neighbours are: a warning says so.

    Args:
        dataset: Gives the defaults (`patches` and `folds` of the manifest).
        folder: Folder that `prepare` wrote.
        folds: Name of folds of the manifest, "" for the first.
        index_file: For shuffled patches, a permutation of their numbers, one per line.
        **overrides: size, stride, minimum_labelled, or a field of the folds such as block_size;
            None keeps the manifest's value.
    """
    record = matching_record(folder, dataset)
    chosen = dataset.fold_definition(folds)
    settings = [dataset.patches.model_dump(), chosen.model_dump()]
    for name, value in overrides.items():
        if not any(name in part for part in settings):
            names = sorted((settings[0] | settings[1]).keys() - {"kind"})
            raise InputError(f"unknown patch setting {name!r}; expected some of {names}")
        if value is not None:
            settings = [part | {name: value} if name in part else part for part in settings]
    patches = validated(Patches, settings[0], "patches")
    chosen = validated(type(chosen), settings[1], "folds")
    labels = dataset.labels
    rasters, member = _label_rasters(folder, record), membership(labels)
    table = patch_table(rasters, member, labels.names, patches, chosen, index_file)
    if leaks(chosen):
        logger.warning("patches are shuffled: neighbours of test patches are trained on")
    for fold in range(table.filter(regex="^fold_").shape[1]):
        margin = chosen.margin if isinstance(chosen, DiagonalBlocks) else 0
        check_separation(table, fold, margin, {} if leaks(chosen) else record.scenes)
    with written_beside(folder / PATCH_TABLE) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")
    return table


def _label_rasters(folder: Path, record: Prepared) -> Iterator[tuple[str, Any]]:
    """Yield name and label raster of every scene, open until the next scene is asked for."""
    for name in record.scenes:
        with open_prepared(folder / name / f"{LABELS}.tif") as raster:
            yield name, raster


class Statistics(Strict):
    """Mean and population standard deviation per band of each modality, over training pixels."""

    made_from: dict[str, str]  # hashes of the patch table and of the rasters
    means: dict[str, list[float]]
    deviations: dict[str, list[float]]


class Description(Strict):
    """What using a network takes besides its weights."""

    bands: dict[Name, Names]
    classes: Names
    task_kind: Literal["binary", "multilabel", "multiclass"]
    patch_size: Positive  # pixels along a side
    pixel_size: PositiveFloat | None  # metres; None where that is not known
    means: dict[Name, list[FiniteFloat]]  # subtracted from each band
    deviations: dict[Name, list[PositiveFloat]]  # what the rest is divided by

    @model_validator(mode="after")
    def _every_band_is_normalised(self) -> Self:
        parts = self.bands, self.means, self.deviations
        bands, *others = ({name: len(of) for name, of in part.items()} for part in parts)
        if any(other != bands for other in others):
            raise ValueError(f"expected a mean and a deviation for every band of {bands}")
        return self

    def normalise(
        self, modality: str, pixels: NDArray[Any], seen: NDArray[np.bool_], out: NDArray[np.float32]
    ) -> None:
        """Write the normalised bands [D, H, W] of a modality to `out`, 0 where it is not `seen`."""
        moments = np.array([self.means[modality], self.deviations[modality]], dtype=np.float32)
        means, deviations = moments[:, :, None, None]
        np.subtract(pixels, means, out=out, dtype=np.float32, casting="unsafe")
        np.divide(out, deviations, out=out)
        if not seen.all():
            out[:, ~seen] = 0


def fold_statistics(folder: Path, dataset: Dataset, fold: int) -> Statistics:
    """Return the normalisation of a fold, computed once and kept beside the patch table."""
    record = matching_record(folder, dataset)
    made_from = _hashes(folder, record)
    path = folder / f"normalisation_fold_{fold}.json"
    with suppress(OSError, ValidationError):  # does not exist yet, or is not complete
        kept = Statistics.model_validate_json(path.read_bytes())
        if kept.made_from == made_from:
            return kept
    table = read_patch_table(folder / PATCH_TABLE)
    training = table[table[f"fold_{fold}"] == "training"]
    means, deviations = {}, {}
    for modality, bands in dataset.modalities.items():
        mean, deviation = _moments(folder, modality, training, record)
        # Below this part of the mean, float32 images cannot resolve a deviation.
        flat = deviation <= 1e-6 * np.abs(mean)
        if flat.any():
            constant = [band for band, is_flat in zip(bands, flat, strict=True) if is_flat]
            logger.warning("fold %d: bands %s of %s do not vary", fold, constant, modality)
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
        prepared = record.scenes[str(scene)]
        if modality not in prepared.modalities:
            continue
        with open_prepared(folder / str(scene) / f"{modality}.tif") as raster:
            for window in windows(prepared.height, prepared.width):
                covered = coverage(patches, (window.height, window.width), window=window)
                inside = covered & (raster.read_masks(1, window=window) > 0)
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
    return {PATCH_TABLE: file_sha256(folder / PATCH_TABLE)} | rasters


class PatchDataset:
    """The patches of one split of one fold, for one task.

    Only the patch table is held in memory: windows are read from the aligned rasters, and GDAL's
    block cache keeps what is used again. Files are opened once per process and thread, so an
    instance can be pickled and used after a fork.

    Args:
        prepared_folder: Folder with the rasters of `prepare` and the table of `make_patches`.
        dataset: Definition that the folder was prepared from.
        task: Name of a task of the data set.
        fold: Number of a fold, from 0.
        split: "training", "validation" or "test".
        normalisation: "standardise" (subtract the mean, divide by the standard deviation, or by 1
            where a band does not vary, with a warning), "centre" (subtract the mean) or "none".
            Statistics are over all pixels with data in the fold's training windows, each once.
        limit: Keep only this many patches, spread evenly over the split.
        workers: Processes that read batches ahead; 0 reads them when they are asked for.

    Raises `InputError` where a name is unknown, the split is empty, or the folder does not fit.

    Attributes:
        table: The rows of the patch table that belong to the split.
        patch_ids, block_ids: Numbers of patches and blocks, [N] int64.
        modalities, bands: Names in the order of `Batch.images`, and their numbers of bands D_m.
        classes: Names, in the order of the target's channels.
        size: Side of a patch in pixels.
        description: What using a network that was trained on them takes.
        data_sha256, patches_sha256: One hash of the patch table and all rasters, and one of where
            patches lie and of which part of every fold they are.
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
        workers: int = 0,
    ) -> None:
        self.folder, self.workers, self.dataset = Path(prepared_folder), workers, dataset
        definition = dataset.task(task)
        check_choice("split", split, get_args(Split))
        check_choice("normalisation", normalisation, get_args(Normalisation))
        record = matching_record(self.folder, dataset)
        table = read_patch_table(self.folder / PATCH_TABLE)
        folds = range(table.filter(regex="^fold_").shape[1])
        if fold not in folds:
            raise InputError(f"fold: expected one of {[*folds]}, found {fold!r}")
        hashes, self._scenes = _hashes(self.folder, record), record.scenes
        assignment = table.filter(regex="^(scene|row|column|size|fold_.*)$").to_csv(index=False)
        self.patches_sha256 = hashlib.sha256(assignment.encode()).hexdigest()
        all_hashes = json.dumps(hashes, sort_keys=True)
        self.data_sha256 = hashlib.sha256(all_hashes.encode()).hexdigest()
        chosen = table[table[f"fold_{fold}"] == split]
        if chosen.empty:
            raise InputError(f"{self.folder / PATCH_TABLE}: fold {fold} has no {split} patches")
        _expect_prepared(self.folder, record, chosen)
        if limit is not None:
            if limit < 1:
                raise InputError(f"limit: expected at least 1 patch, found {limit}")
            spread = np.linspace(0, len(chosen) - 1, min(limit, len(chosen))).round()
            chosen = chosen.iloc[spread.astype(np.int64)]
        self.table = chosen.reset_index(drop=True)
        self.patch_ids = self.table["patch_id"].to_numpy(np.int64)
        self.block_ids = self.table["block"].to_numpy(np.int64)
        places = self.table[["scene", "row", "column"]].itertuples(index=False, name=None)
        self._places = [(str(scene), int(row), int(column)) for scene, row, column in places]
        self.modalities = tuple(dataset.modalities)
        self.bands = tuple(len(bands) for bands in dataset.modalities.values())
        self.classes = tuple(definition.classes)
        self.task_kind = definition.kind
        self.size = int(self.table["size"].iloc[0])
        # Per label code: whether it belongs to each class, and the first class that it has.
        member = class_membership(dataset, task)
        self._member = member.astype(np.float32)
        self._class_of = np.where(member.any(axis=0), member.argmax(axis=0), -1)
        self._ignore = dataset.labels.ignore
        means = {m: [0.0] * len(bands) for m, bands in dataset.modalities.items()}
        deviations = {m: [1.0] * len(bands) for m, bands in dataset.modalities.items()}
        if normalisation != "none":
            statistics = fold_statistics(self.folder, dataset, fold)
            means = statistics.means
            deviations = statistics.deviations if normalisation == "standardise" else deviations
        pixel_size = next(iter(record.scenes.values())).grid.pixel_size
        self.description = Description(
            bands=dataset.modalities, classes=list(self.classes), task_kind=definition.kind,
            patch_size=self.size, pixel_size=pixel_size, means=means, deviations=deviations,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.table)

    def read(self, index: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Return a patch as it is: bands [D_m, H, W], 0 where absent, and label codes [H, W]."""
        images = {modality: self._read(index, modality)[0] for modality in self.modalities}
        return images, self._read(index, LABELS)[0][0]

    def batch(self, indices: Sequence[int] | np.ndarray | torch.Tensor) -> Batch:
        """Return the patches at these positions (0 … len − 1) as a `Batch`."""
        chosen = [int(index) for index in indices]
        shape = self.size, self.size
        seen = np.empty((len(chosen), len(self.modalities), *shape), dtype=bool)
        images = [np.empty((len(chosen), bands, *shape), np.float32) for bands in self.bands]
        for position, index in enumerate(chosen):
            for number, modality in enumerate(self.modalities):
                pixels, with_data = self._read(index, modality)
                self.description.normalise(modality, pixels, with_data, images[number][position])
                seen[position, number] = with_data
        seen_pixels = torch.from_numpy(seen)
        available = seen_pixels.flatten(start_dim=2).any(dim=2)
        complete = bool((seen_pixels == available[:, :, None, None]).all())
        codes = np.stack([self._read(index, LABELS)[0][0] for index in chosen])
        if self.task_kind == "multiclass":
            target = self._class_of[codes]
            valid = target >= 0  # a labelled pixel of no class has no right answer
            target[~valid] = 0
        else:
            target = np.stack([member[codes] for member in self._member], axis=1)
            valid = codes != self._ignore
        return Batch(
            images=tuple(torch.from_numpy(image) for image in images),
            available=available,
            target=torch.from_numpy(target),
            valid=torch.from_numpy(valid),
            seen=None if complete else seen_pixels,
            patch_ids=torch.from_numpy(self.patch_ids[chosen]),
            block_ids=torch.from_numpy(self.block_ids[chosen]),
        )

    __getitem__ = batch  # what a `DataLoader` asks for whose sampler yields positions

    def batches(
        self, batch_size: int, order: Sequence[int] | np.ndarray | torch.Tensor | None = None
    ) -> Iterator[Batch]:
        """Yield batches of all patches, or of those in `order`; the last may be smaller."""
        order = np.arange(len(self)) if order is None else order
        starts = range(0, len(order), batch_size)
        yield from self.batches_of([order[start : start + batch_size] for start in starts])

    def batches_of(self, parts: Sequence[Any]) -> Iterator[Batch]:
        """Yield a batch for each list of positions (0 … len − 1), in order."""
        batches: Iterable[Batch] = map(self.batch, parts)
        if self.workers:  # one item is a whole batch, made in a worker process; order is kept
            dataset, sampler = cast(Any, self), cast(Any, list(parts))
            # It draws a seed for its workers; from the global generator, training would change.
            own: dict[str, Any] = {"sampler": sampler, "generator": torch.Generator()}
            batches = DataLoader(dataset, None, num_workers=self.workers, **own)
        yield from batches

    def _read(self, index: int, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a patch of a raster [D, H, W], and where it has data [H, W] bool."""
        scene, row, column = self._places[index]
        shape, made = (self.size, self.size), self._scenes[scene]
        if name != LABELS and name not in made.modalities:
            bands = self.bands[self.modalities.index(name)]
            return np.zeros((bands, *shape), np.uint8), np.zeros(shape, dtype=bool)
        file = f"{scene}/{name}.tif"
        raster = _open(self.folder / file, made.outputs[file], os.getpid(), threading.get_ident())
        window = Window(column, row, self.size, self.size)
        with naming(self.folder / file):
            pixels, masks = raster.read(window=window), raster.read_masks(1, window=window)
        if masks.shape != shape:
            raise InputError(f"{self.folder / file}: not the raster that was prepared; do it again")
        return pixels, masks > 0


def _expect_prepared(folder: Path, record: Prepared, table: pd.DataFrame) -> None:
    """Raise `InputError` where patches of one size do not lie in rasters that are there."""
    for name in map(str, table["scene"].unique()):
        patches = table[table["scene"] == name]
        names = record.scenes[name].modalities if name in record.scenes else []
        for file in (f"{name}/{part}.tif" for part in (*names, LABELS)):
            known = name in record.scenes and file in record.scenes[name].outputs
            if not known or not (folder / file).is_file():
                raise InputError(f"{folder / file}: not there; prepare the data again")
        first, size = patches[["row", "column"]], table["size"].iloc[0]
        shape = [record.scenes[name].height, record.scenes[name].width]
        inside = (first >= 0) & (first + size <= shape)
        if not inside.all(axis=None) or (patches["size"] != size).any():
            raise InputError(f"{folder / PATCH_TABLE}: expected patches of one size within {name}")


@lru_cache(OPEN_FILES)
def _open(path: Path, sha256: str, process: int, thread: int) -> Any:
    """Open a raster once per content, process and thread; those used least are closed."""
    with naming(path):
        return rasterio.open(path)
