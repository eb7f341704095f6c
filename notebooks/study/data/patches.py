"""Patches of a prepared data set, read when they are needed, as batches of tensors."""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import pandas as pd
import rasterio
import torch
from rasterio.windows import Window
from torch.utils.data import DataLoader

from lsgs_core.batch import Batch
from lsgs_core.errors import InputError
from study.data.fold_kinds import DiagonalBlocks, Patches
from study.data.folds import (
    TABLE,
    LabelledScene,
    leaks,
    patch_table,
    read_patch_table,
    write_patch_table,
)
from study.data.labels import class_membership, membership
from study.data.manifest import Dataset
from study.data.normalisation import data_hashes, fold_statistics
from study.data.prepared import (
    LABELS,
    PreparedScene,
    matching_record,
    open_prepared,
)
from study.data.schema import validated
from study.data.separation import check_separation

logger = logging.getLogger(__name__)

OPEN_FILES = 64  # per process; well below what systems allow
Split = Literal["training", "validation", "test"]
Normalisation = Literal["standardise", "centre", "none"]


def make_patches(
    dataset: Dataset,
    prepared_folder: Path,
    folds: str = "",
    index_file: Path | None = None,
    **overrides: int | float | None,
) -> pd.DataFrame:
    """Write `patches.csv` into a prepared folder and return it; see `folds.patch_table`.

    No pixel is in two parts of a fold, which is proved here, but for shuffled patches, whose
    neighbours are: a warning says so.

    Args:
        dataset: gives the defaults (`patches` and `folds` of the manifest).
        prepared_folder: where `rasters.prepare` wrote.
        folds: name of folds of the manifest, "" for the first.
        index_file: for shuffled patches, a permutation of their numbers, one a line.
        **overrides: size, stride, minimum_labelled, or a field of the folds such as block_size;
            None keeps the manifest's value.

    Raises:
        InputError: an unknown override, lengths that do not fit, or a scene is not prepared.
    """
    folder = Path(prepared_folder)
    record = matching_record(folder, dataset)
    chosen = dataset.fold_definition(folds)
    settings = [dataset.patches.model_dump(), chosen.model_dump()]
    for name, value in overrides.items():
        if not any(name in part for part in settings):
            known = sorted((settings[0] | settings[1]).keys() - {"kind"})
            raise InputError(f"unknown patch setting {name!r}; expected some of {known}")
        if value is not None:
            settings = [part | {name: value} if name in part else part for part in settings]
    patches = validated(Patches, settings[0], "patches")
    chosen = validated(type(chosen), settings[1], "folds")
    labels = dataset.labels
    with ExitStack() as stack:
        scenes = (_labelled(folder, name, made, stack) for name, made in record.scenes.items())
        table = patch_table(scenes, membership(labels), labels.names, patches, chosen, index_file)
    if leaks(chosen):
        logger.warning("patches are shuffled: neighbours of test patches are trained on")
    places = {name: made.place for name, made in record.scenes.items()}
    for fold in range(table.filter(regex="^fold_").shape[1]):
        margin = chosen.margin if isinstance(chosen, DiagonalBlocks) else 0
        check_separation(table, fold, margin, {} if leaks(chosen) else places)
    write_patch_table(table, folder / TABLE)
    return table


def _labelled(folder: Path, name: str, made: PreparedScene, stack: ExitStack) -> LabelledScene:
    """Return the labels of a prepared scene, open until the next scene's are."""
    stack.close()
    raster = stack.enter_context(open_prepared(folder / name / f"{LABELS}.tif"))

    def rows(top: int, bottom: int) -> np.ndarray:
        return raster.read(1, window=Window(0, top, made.width, bottom - top))

    return LabelledScene(name, (made.height, made.width), rows)


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
        workers: processes that read batches ahead; 0 reads them when they are asked for.

    Raises:
        InputError: a name or number is unknown, the split is empty, or the folder is not prepared
            from this definition.

    Attributes:
        dataset: the definition.
        table: the rows of the patch table that belong to the split.
        patch_ids, block_ids: [N] int64.
        modalities: names, in the order of `Batch.images`.
        bands: number of bands D_m per modality.
        classes: names, in the order of the target's channels.
        task_kind: "binary", "multilabel" or "multiclass".
        size: side of a patch in pixels.
        data_sha256: one hash of the patch table and of all rasters.
        patches_sha256: hash of where all patches lie, and of which part of every fold they are.
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
        self.folder, self.workers = Path(prepared_folder), workers
        self.dataset = dataset
        definition = dataset.task(task)
        _expect("split", split, get_args(Split))
        _expect("normalisation", normalisation, get_args(Normalisation))
        record = matching_record(self.folder, dataset)
        table = read_patch_table(self.folder / TABLE)
        _expect("fold", fold, range(table.filter(regex="^fold_").shape[1]))
        self._hashes = data_hashes(self.folder, record)
        assignment = table.filter(regex="^(scene|row|column|size|fold_.*)$").to_csv(index=False)
        self.patches_sha256 = hashlib.sha256(assignment.encode()).hexdigest()
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
        self._present = {name: set(made.modalities) for name, made in record.scenes.items()}
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
            The bands [D_m, H, W] per modality in the type of the source, zeros for an absent one,
            and the label codes [H, W] (see `study.data.labels`).
        """
        images = {modality: self._read(index, modality)[0] for modality in self.modalities}
        return images, self._read(index, LABELS)[0][0]

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        """Return a whole batch: what a `DataLoader` asks for whose sampler yields positions."""
        return self.batch(indices)

    def batch(self, indices: Sequence[int] | np.ndarray | torch.Tensor) -> Batch:
        """Return the patches at these positions (0 … len − 1) as a `Batch`."""
        chosen = [int(index) for index in indices]
        shape = len(chosen), self.size, self.size
        seen = np.empty((len(chosen), len(self.modalities), *shape[1:]), dtype=bool)
        images = [np.empty((len(chosen), bands, *shape[1:]), np.float32) for bands in self.bands]
        for position, index in enumerate(chosen):
            for number, modality in enumerate(self.modalities):
                image = images[number][position]
                seen[position, number] = self._fill(image, index, modality)
        sight = torch.from_numpy(seen)
        available = sight.flatten(start_dim=2).any(dim=2)
        whole = bool((sight == available[:, :, None, None]).all())
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
            seen=None if whole else sight,
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
        starts = range(0, len(order), batch_size)
        yield from self.batches_of([order[start : start + batch_size] for start in starts])

    def batches_of(self, parts: Sequence[Any]) -> Iterator[Batch]:
        """Yield a batch for each list of positions (0 … len − 1), in order."""
        if not self.workers:
            yield from map(self.batch, parts)
            return
        # One item is a whole batch, made in a worker process; their order is kept.
        yield from DataLoader(
            cast(Any, self),
            sampler=cast(Any, list(parts)),
            batch_size=None,
            num_workers=self.workers,
        )

    def _read(self, index: int, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a patch of a raster [D, H, W], and where it has data [H, W] bool."""
        scene, row, column = self._places[index]
        shape = self.size, self.size
        if name != LABELS and name not in self._present[scene]:
            absent = np.zeros(shape, dtype=bool)
            return np.zeros((self.bands[self.modalities.index(name)], *shape), np.uint8), absent
        file = f"{scene}/{name}.tif"
        raster = _open(self.folder / file, self._hashes[file], os.getpid(), threading.get_ident())
        window = Window(column, row, self.size, self.size)
        return raster.read(window=window), raster.read_masks(1, window=window) > 0

    def _fill(self, image: np.ndarray, index: int, modality: str) -> np.ndarray:
        """Write the normalised bands of a patch, and return the pixels with data [H, W]."""
        pixels, with_data = self._read(index, modality)
        np.subtract(pixels, self._shift[modality], out=image, dtype=np.float32, casting="unsafe")
        np.divide(image, self._scale[modality], out=image)
        if not with_data.all():
            image[:, ~with_data] = 0
        return with_data


@lru_cache(OPEN_FILES)
def _open(path: Path, sha256: str, process: int, thread: int) -> Any:
    """Open a raster once per content, process and thread; those used least are closed."""
    return rasterio.open(path)


def _column(values: list[float]) -> np.ndarray:
    """Return one number per band as [D, 1, 1] float32."""
    return np.array(values, dtype=np.float32)[:, None, None]


def _expect(name: str, value: object, known: Sequence[object]) -> None:
    if value not in known:
        raise InputError(f"{name}: expected one of {list(known)}, found {value!r}")
