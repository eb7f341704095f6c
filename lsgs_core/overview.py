"""A prepared scene at a glance: every modality, the labels and the parts of one fold."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from lsgs_core.figures import composite, scene_overview
from lsgs_core.labels import code_names, single_codes
from lsgs_core.manifest import Dataset
from lsgs_core.rasters import LABELS, matching_record, read_overview
from lsgs_core.separation import split_roles


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
