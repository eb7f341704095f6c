"""A prepared scene at a glance: every modality, the labels and the parts of one fold."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lsgs_core.data.labels import code_names, single_codes
from lsgs_core.data.manifest import Dataset
from lsgs_core.data.prepared import LABELS, matching_record, open_prepared
from lsgs_core.data.separation import split_roles
from lsgs_core.figures import composite, scene_overview


def first_scene(dataset: Dataset, prepared_folder: Path, table: pd.DataFrame, fold: int) -> Figure:
    """Draw the first scene of a prepared folder; large ones are read at the size that is shown.

    Args:
        dataset: The definition that the folder was prepared from.
        prepared_folder: Where `rasters.prepare` wrote.
        table: Of patches.
        fold: Whose parts are shown.
    """
    scene, made = next(iter(matching_record(prepared_folder, dataset).scenes.items()))
    folder = Path(prepared_folder) / scene
    codes, _, factor = read_overview(folder / f"{LABELS}.tif")
    pictures = {}
    for modality in made.modalities:
        bands, seen, _ = read_overview(folder / f"{modality}.tif")
        pictures[modality] = composite(bands, seen)
    roles, role_names = split_roles(table[table["scene"] == scene], fold, codes[0].shape, factor)
    pixel_size, unit = made.pixel_size
    return scene_overview(
        pictures,
        single_codes(dataset.labels, codes[0]),
        code_names(dataset.labels),
        roles,
        role_names,
        pixel_size * factor,
        unit,
    )


def read_overview(path: Path, largest: int = 1000) -> tuple[np.ndarray, np.ndarray, float]:
    """Return a prepared raster made small, by nearest neighbours so that label codes stay codes.

    Args:
        path: Of the raster.
        largest: Longer side of what is returned, in pixels, where the raster is larger.

    Returns:
        Bands [D, h, w], where there are data [h, w] bool, and pixels of the raster along one here.
    """
    with open_prepared(path) as raster:
        factor = max(1.0, max(raster.shape) / largest)
        shape = tuple(max(1, round(length / factor)) for length in raster.shape)
        bands = raster.read(out_shape=(raster.count, *shape))
        return bands, raster.read_masks(1, out_shape=shape) > 0, factor
