"""A prepared scene at a glance: every modality, the labels and the parts of one fold."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from study.data.folds import split_roles
from study.data.labels import class_membership
from study.data.manifest import Dataset
from study.data.preparation import LABELS, matching_record, open_prepared
from study.figures import NO_CLASS, category_colours, category_map, composite


def first_scene(
    dataset: Dataset, prepared_folder: Path, table: pd.DataFrame, task: str, fold: int
) -> Figure:
    """Draw the first scene of a prepared folder; large ones are read at the size that is shown.

    Args:
        dataset: The definition that the folder was prepared from.
        prepared_folder: Folder that `prepare` wrote.
        table: Of patches.
        task: Whose classes are shown, in the colours that maps of predictions have; where several
            overlap, the first.
        fold: Whose parts are shown.
    """
    scene, made = next(iter(matching_record(prepared_folder, dataset).scenes.items()))
    folder = Path(prepared_folder) / scene
    codes, _, factor = read_overview(folder / f"{LABELS}.tif")
    pictures = {}
    for modality in made.modalities:
        bands, seen, _ = read_overview(folder / f"{modality}.tif")
        pictures[modality] = composite(bands, seen)
    names = list(dataset.task(task).classes)
    member = class_membership(dataset, task)
    class_of = np.where(member.any(axis=0), member.argmax(axis=0), len(names))
    class_of[dataset.labels.ignore] = -1
    classes = class_of[codes[0]]
    roles, role_names = split_roles(table[table["scene"] == scene], fold, classes.shape, factor)
    pixel_size, unit = made.pixel_size
    pixel_size *= factor
    height, width = classes.shape
    extent = (0.0, width * pixel_size, height * pixel_size, 0.0)
    columns = 2 if width > 1.5 * height else 3
    rows = -(-(len(pictures) + 2) // columns)
    cell = 13 / columns
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(13, rows * (cell * 0.72 * height / width + 0.6)),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    panels = list(axes.flat)
    for panel, (name, picture) in zip(panels, pictures.items(), strict=False):
        panel.imshow(picture, extent=extent)
        panel.set_title(f"{name} (2 to 98 % stretch)")
    labels, parts, *empty = panels[len(pictures) :]
    shown = [*category_colours(len(names)), NO_CLASS]
    titles = dict(enumerate([*names, "none of these"]))
    category_map(labels, classes, titles, f"{task} (white: unknown, ignored)", shown, extent)
    role_colours = ("#56B4E9", "#E69F00", "#D55E00")
    category_map(parts, roles, role_names, f"Parts of fold {fold}", role_colours, extent)
    for panel in empty:
        panel.axis("off")
    for panel in panels[::columns]:
        panel.set_ylabel(unit)
    for panel in panels[: len(pictures) + 2][-columns:]:  # the last of every column
        panel.set_xlabel(unit)
        panel.tick_params(labelbottom=True)
    return figure


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
