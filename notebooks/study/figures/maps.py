"""Maps: a prepared scene at a glance, and the predictions for single patches."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import rasterio
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar
from numpy.typing import NDArray
from rasterio import DatasetReader
from rasterio.windows import Window

from study.comparison.predictions import NOTHING, UNKNOWN, Predictions, composite, shown_bands
from study.data.alignment import ENVIRONMENT, Grid
from study.data.colours import GREY, PALETTE, class_colours
from study.data.folds import PARTS, split_roles
from study.data.labels import class_membership
from study.data.manifest import Dataset
from study.data.preparation import LABELS, matching_record, open_modalities, open_prepared
from study.data.raw_files import Scene
from study.figures import backbone_title
from study.metrics.statistics import method_title

LARGEST = 1000  # height or width of a picture, pixels
LARGEST_PICTURE = 4_000_000  # pixels of a scene that is read as a whole
Extent = tuple[float, float, float, float]  # left, right, bottom, top


def category_map(
    axes: Axes,
    ids: NDArray[np.integer],
    colours: Mapping[int, Any],
    title: str = "",
    extent: Extent | None = None,
) -> None:
    """Draw a map of ids [H, W], each in its colour; other ids stay white.

    The extent is in the units of the axes; without it, these are pixels.
    """
    picture = np.zeros((*ids.shape, 4))
    for key, colour in colours.items():
        picture[ids == key] = to_rgba(colour)
    axes.imshow(picture, extent=extent)
    axes.set_title(title)


def first_scene(
    dataset: Dataset, prepared_folder: Path, table: pd.DataFrame, task: str, fold: int
) -> Figure:
    """Draw every modality of the first scene, its labels, and the parts of one fold.

    Where several classes of the task overlap, the first is shown.
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
    roles = split_roles(table[table["scene"] == scene], fold, classes.shape, factor)
    pixel_size, unit = made.pixel_size
    height, width = classes.shape
    extent = (0.0, width * pixel_size * factor, height * pixel_size * factor, 0.0)
    rows = -(-(len(pictures) + 3) // 3)
    row_height = 13 / 3 * height / width + 0.6
    figure, axes = plt.subplots(
        rows, 3, figsize=(13, rows * row_height), sharex=True, sharey=True, squeeze=False
    )
    panels = list(axes.flat)
    for panel, (name, picture) in zip(panels, pictures.items(), strict=False):
        panel.imshow(picture, extent=extent)
        panel.set_title(f"{name}: {shown_bands(dataset.modalities[name])}")
    label_panel, part_panel, *empty = panels[len(pictures) :]
    colours = [*class_colours(names, dataset.colours), GREY]
    part_colours = [PALETTE[index] for index in (4, 1, 5)]
    of_parts = dict(enumerate(part_colours, start=1))
    category_map(label_panel, classes, dict(enumerate(colours)), f"Labels for {task}", extent)
    category_map(part_panel, roles, of_parts, f"Parts of fold {fold}", extent)
    named = _patches(colours, [*names, "none of these"])
    parts = _patches(part_colours, PARTS)
    for panel in empty:
        panel.axis("off")
    first = empty[0].legend(handles=named, title="classes (white: unknown)", loc="upper left")
    empty[0].legend(handles=parts, title="parts", loc="upper right")
    empty[0].add_artist(first)
    for panel in panels[::3]:
        panel.set_ylabel(unit)
    for panel in panels[: len(pictures) + 2][-3:]:  # the last of every column
        panel.set_xlabel(unit)
        panel.tick_params(labelbottom=True)
    return figure


def read_overview(path: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """Read a prepared raster at a reduced size, by nearest neighbours, which keep label codes.

    Returns:
        The bands [D, h, w], the pixels with data as bool [h, w], and the factor of the reduction.
    """
    with open_prepared(path) as raster:
        factor, shape = _reduction(raster)
        bands = raster.read(out_shape=(raster.count, *shape))
        return bands, raster.read_masks(1, out_shape=shape) > 0, factor


def _reduction(raster: DatasetReader) -> tuple[float, tuple[int, int]]:
    """Return the factor by which a raster is too large for a picture, and the height and width."""
    factor = max(1.0, max(raster.shape) / LARGEST)
    height, width = (max(1, round(length / factor)) for length in raster.shape)
    return factor, (height, width)


def scene_pictures(scene: Scene, grid: Grid) -> dict[str, NDArray[np.float64]]:
    """Return a colour picture [H, W, 3] of what each sensor sees, if the scene is a small one."""
    if grid.height * grid.width > LARGEST_PICTURE:
        return {}
    whole = Window(0, 0, grid.width, grid.height)
    with rasterio.Env(**ENVIRONMENT), open_modalities(scene, grid) as modalities:
        return {name: composite(*modality.read(whole)) for name, modality in modalities.items()}


def class_maps(paths: Mapping[str, Path], pictures: Mapping[str, NDArray[np.float64]]) -> Figure:
    """Draw colour pictures of a scene, and beside them maps of it in the colours that they carry.

    Maps, by the titles of their panels, are GeoTIFFs of classes with a colour table and tags
    `id_<value>` (see `study.stages.mapping`).
    """
    shown: dict[int, Patch] = {}
    count = len(pictures) + len(paths)
    columns = min(3, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(13, 0.6), squeeze=False)
    for panel in axes.flat:
        panel.axis("off")
    for panel, (title, image) in zip(axes.flat, pictures.items(), strict=False):
        panel.imshow(image)
        panel.set_title(title)
    for panel, (title, path) in zip(axes.flat[len(pictures) :], paths.items(), strict=False):
        with rasterio.open(path) as raster:
            factor, shape = _reduction(raster)
            values = raster.read(1, out_shape=shape)
            names, colours, nodata = raster.tags(), raster.colormap(1), raster.nodata
            grid = Grid(raster.crs, raster.transform, raster.width, raster.height)
            figure.set_figheight(rows * (13 / columns * raster.height / raster.width + 0.4) + 0.5)
        there = set(np.unique(values).tolist()) - {nodata}
        found = {v: tuple(part / 255 for part in colours[v]) for v in sorted(there)}
        category_map(panel, values, found, title)
        if panel is axes.flat[count - 1]:
            _scale_bar(panel, values.shape[1], factor * (grid.pixel_size or np.nan))
        shown |= {v: Patch(color=of, label=names[f"id_{v}"]) for v, of in found.items()}
    handles = [shown[value] for value in sorted(shown)]
    figure.legend(handles=handles, loc="outside lower center", ncols=6)
    return figure


def prediction_maps(predictions: Predictions, patch: int) -> Figure:
    """Draw one patch: what every modality shows, the truth, and what every network predicts.

    There is a row for each method and a group of columns for each backbone: its predictions from
    each modality alone, and from all. Pixels without a label are pale.
    """
    names = [name.split("/") for name in predictions.maps]
    backbones, methods = (list(dict.fromkeys(column)) for column in zip(*names, strict=True))
    scenarios, truth = predictions.scenarios, predictions.truth[patch]
    shown = [*np.flatnonzero(scenarios.masks.sum(axis=1) == 1), scenarios.full]
    width = max(len(shown) * len(backbones), len(predictions.modalities) + 1)
    size = 1.1 * width + 1.2, 1.15 * len(methods) + 2
    figure, axes = plt.subplots(len(methods) + 1, width, figsize=size, squeeze=False)
    for panel, name, picture in zip(
        axes[0], predictions.modalities, predictions.pictures[patch], strict=False
    ):
        panel.imshow(picture)
        panel.set_title(name)
    _draw_classes(axes[0, len(predictions.modalities)], truth, predictions, "truth")
    _scale_bar(axes[0, 0], truth.shape[-1], predictions.pixel_size)
    for row, method in zip(axes[1:], methods, strict=True):
        row[0].set_ylabel(method_title(method), rotation=0, ha="right", va="center")
        for column, (backbone, index) in enumerate(product(backbones, shown)):
            predicted = predictions.maps.get(f"{backbone}/{method}")
            if predicted is not None:
                classes = predicted[patch, index]
                _draw_classes(row[column], classes, predictions, pale=truth == UNKNOWN)
    for panel, (backbone, index) in zip(axes[1], product(backbones, shown), strict=False):
        sensors = "all" if index == scenarios.full else scenarios.names[index]
        panel.set_title(f"{backbone_title(backbone)}\n{sensors}")
    _finish(figure, predictions)
    return figure


def prediction_view(
    predictions: Predictions, patch: int, backbone: str, method: str, available: Sequence[bool]
) -> Figure:
    """Draw one patch: its modalities, the truth, and predictions from all and from some of them.

    Errors carry the share of the patch that is right and its mean IoU. Of the modalities, at least
    one must be `available`, [M].
    """
    scenarios, names = predictions.scenarios, predictions.modalities
    scenario, truth = scenarios.index(available), predictions.truth[patch]
    every = predictions.of(backbone, method)[patch]
    columns = max(4, len(names) + 1)
    figure, axes = plt.subplots(2, columns, figsize=(2.8 * columns, 6.2))
    for panel, name, bands, picture, is_available in zip(
        axes[0], names, predictions.bands, predictions.pictures[patch], available, strict=False
    ):
        if is_available:
            panel.imshow(picture)
        panel.set(box_aspect=1, title=f"{name}: {bands if is_available else 'missing'}")
        panel.patch.set(hatch="" if is_available else "//", edgecolor=GREY)
    _draw_classes(axes[0, len(names)], truth, predictions, "truth (white: no label)")
    _scale_bar(axes[0, len(names)], truth.shape[-1], predictions.pixel_size)
    verdicts = {0: PALETTE[5], 1: PALETTE[4]}
    for panels, shown in ((axes[1, :2], scenarios.full), (axes[1, 2:4], scenario)):
        title = f"from {scenarios.names[shown]}"
        _draw_classes(panels[0], every[shown], predictions, title, truth == UNKNOWN)
        errors = np.where(every[shown] == truth, 1, 0)
        errors[(truth == UNKNOWN) | (every[shown] == UNKNOWN)] = -1
        right, iou = predictions.agreement(patch, every[shown])
        category_map(panels[1], errors, verdicts, f"{right:.0%} right, IoU {iou:.2f}")
    for panel in [*axes[0, len(names) + 1 :], *axes[1, 4:]]:
        panel.axis("off")
    _finish(figure, predictions, _patches(verdicts.values(), ("wrong", "right")))
    return figure


def _scale_bar(panel: Axes, columns: int, pixel_size: float) -> None:
    """Draw a bar of a round number of metres below a map, if the size of its pixels is known."""
    width = columns * pixel_size
    if np.isfinite(width):
        decade = 10 ** np.floor(np.log10(width / 2))
        metres = decade * max(n for n in (1, 2, 5) if n * decade <= width / 2)
        length, below = metres / pixel_size, {"bbox_transform": panel.transAxes}
        bar = AnchoredSizeBar(
            panel.transData, length, f"{metres:g} m", "upper left", frameon=False, pad=0,
            bbox_to_anchor=(0, -0.03), size_vertical=length / 20, **below,
        )  # fmt: skip
        panel.add_artist(bar)


def _draw_classes(
    panel: Axes,
    classes: NDArray[np.uint8],
    predictions: Predictions,
    title: str = "",
    pale: NDArray[np.bool_] | None = None,
) -> None:
    """Draw a map of classes, grey where there is none of them, and pale where `pale` is True."""
    category_map(panel, classes, {**dict(enumerate(predictions.colours)), NOTHING: GREY}, title)
    if pale is not None:
        panel.imshow(np.dstack([np.ones((*pale.shape, 3)), pale * 0.6]))


def _patches(colours: Iterable[str], names: Iterable[str]) -> list[Patch]:
    """Return the handles of a legend."""
    return [Patch(color=c, label=name) for c, name in zip(colours, names, strict=True)]


def _finish(figure: Figure, predictions: Predictions, further: Sequence[Patch] = ()) -> None:
    """Remove ticks and frames, and put a legend of the classes, and of what else, below."""
    for panel in figure.axes:
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    names, colours = [*predictions.classes, "none of these"], [*predictions.colours, GREY]
    handles = [*_patches(colours, names), *further]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=int(figure.get_figwidth() / 1.4)
    )
