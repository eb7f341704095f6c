"""Mean and standard deviation of every band over the training windows of a fold."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import ValidationError

from lsgs_core.errors import InputError
from study.data.alignment import windows
from study.data.folds import TABLE, read_patch_table
from study.data.manifest import Dataset
from study.data.prepared import Prepared, matching_record, open_prepared
from study.data.schema import Strict
from study.data.separation import coverage
from study.files import file_sha256, written_beside

logger = logging.getLogger(__name__)


class Statistics(Strict):
    """Mean and population standard deviation per band of each modality, over training pixels."""

    made_from: dict[str, str]  # hashes of the patch table and of the rasters
    means: dict[str, list[float]]
    deviations: dict[str, list[float]]


def fold_statistics(prepared_folder: Path, dataset: Dataset, fold: int) -> Statistics:
    """Return the normalisation of a fold, computed once and kept beside the patch table.

    Raises:
        InputError: a band has no pixel with data in the training windows.
    """
    folder = Path(prepared_folder)
    record = matching_record(folder, dataset)
    made_from = data_hashes(folder, record)
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
            same = [band for band, is_flat in zip(bands, flat, strict=True) if is_flat]
            logger.warning("fold %d: bands %s of %s do not vary", fold, same, modality)
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
        if modality not in made.modalities:
            continue
        with open_prepared(folder / str(scene) / f"{modality}.tif") as raster:
            for window in windows(made.height, made.width):
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


def data_hashes(folder: Path, record: Prepared) -> dict[str, str]:
    """Return the hash of the patch table and of every raster, by path."""
    rasters = {name: sha for scene in record.scenes.values() for name, sha in scene.outputs.items()}
    return {TABLE: file_sha256(folder / TABLE)} | rasters
