"""The labels of a scene as one code per pixel, drawn window by window.

Exclusive labels are uint8: 0 background, 1 … V the label values in the manifest's order, 255
unknown. Overlapping ones are uint16 bit masks: bit i for value i, 0 background, 65535 unknown.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd
import pyogrio
import rasterio
import shapely
from numpy.typing import NDArray
from rasterio.features import rasterize
from rasterio.windows import Window

from lsgs_core.errors import InputError
from study.data import manifest
from study.data.alignment import AlignedRaster, Grid
from study.data.manifest import ColourLabels, IdLabels, Labels
from study.data.raw_files import Scene, read_csv

SHOWN = 8  # how many wrong numbers an error lists
# From a window of the scene's grid to codes [h, w].
Draw = Callable[[Window], NDArray[Any]]
# Single polygons in pixels of the scene's grid, and the index of the label value of each.
Areas = tuple[NDArray[Any], NDArray[np.int64]]


def membership(labels: Labels) -> NDArray[np.bool_]:
    """Return which values a code stands for, bool [codes, values], in the order of `names`."""
    count = len(labels.values)
    codes = np.arange(labels.ignore + 1)
    if labels.overlapping:
        member = (codes[:, None] >> np.arange(count)) & 1 == 1
    else:
        member = codes[:, None] == np.arange(1, count + 1)
    member = np.column_stack([member, codes == 0]) if labels.has_background else member
    member[labels.ignore] = False
    return member


def class_membership(dataset: manifest.Dataset, task: str) -> NDArray[np.bool_]:
    """Return whether a code belongs to each class of a task, bool [C, codes]."""
    member, names = membership(dataset.labels), dataset.labels.names
    groups = dataset.task(task).classes.values()
    columns = [[names.index(value) for value in group] for group in groups]
    return np.stack([member[:, chosen].any(axis=1) for chosen in columns])


@contextmanager
def open_labels(scene: Scene, grid: Grid) -> Iterator[Draw]:
    """Open the labels of a scene, as a function from a window to its codes."""
    labels, path = scene.dataset.labels, scene.label_files[0]
    if isinstance(labels, manifest.PolygonLabels):
        yield _burned(labels, _polygons(labels, scene, grid))
    elif isinstance(labels, manifest.ScaledPolygonLabels):
        yield _burned(labels, _scaled_polygons(labels, scene, grid))
    else:
        colours = isinstance(labels, ColourLabels)
        channels = (1, 2, 3) if isinstance(labels, ColourLabels) else (labels.channel,)
        with ExitStack() as stack:
            raster = AlignedRaster(path, labels, grid, stack, channels, colours=colours)
            if colours and raster.kind != np.uint8:
                raise InputError(f"{path}: expected colours of 8 bits, found {raster.kind}")
            yield _looked_up(labels, raster)


def _looked_up(labels: IdLabels | ColourLabels, raster: AlignedRaster) -> Draw:
    """Return a function that looks up the numbers, or colours, of a raster."""
    has_colours = isinstance(labels, ColourLabels)
    entries = [(_packed(e) if has_colours else e, code) for e, code in labels.entries()]
    listed_numbers, codes = np.array(sorted(entries)).T

    def draw(window: Window) -> NDArray[Any]:
        pixels, seen = raster.read(window)
        if isinstance(labels, ColourLabels):
            if labels.threshold is not None:
                pixels = np.where(pixels > labels.threshold, 255, 0)
            numbers = _packed(pixels.astype(np.int64))
        else:
            numbers = np.where(seen, pixels[0], 0)
            if (numbers != np.round(numbers)).any():
                raise InputError(f"{raster.path}: expected whole numbers as labels")
            numbers = numbers.astype(np.int64)
        place = np.searchsorted(listed_numbers, numbers).clip(max=len(listed_numbers) - 1)
        listed = listed_numbers[place] == numbers
        if labels.unlisted == "error" and not (listed | ~seen).all():
            wrong = np.unique(numbers[seen & ~listed])[:SHOWN].tolist()
            shown = wrong if isinstance(labels, IdLabels) else [f"#{n:06x}" for n in wrong]
            raise InputError(
                f"{raster.path}: holds {shown}, not listed in labels.values, labels.ignored or "
                "labels.background; `unlisted: ignore` takes them for unknown"
            )
        return np.where(listed & seen, codes[place], labels.ignore).astype(np.uint8)

    return draw


def _packed(colour: Any) -> Any:
    """Return red, green and blue as one number each."""
    return (colour[0] << 16) | (colour[1] << 8) | colour[2]


def _burned(labels: manifest.PolygonLabels | manifest.ScaledPolygonLabels, areas: Areas) -> Draw:
    """Return a function that burns polygons: a pixel belongs to one where its centre lies."""
    shapes, values = areas
    tree = shapely.STRtree(shapes)
    outside = 0 if labels.has_background else labels.ignore
    kind = np.uint16 if labels.overlapping else np.uint8

    def draw(window: Window) -> NDArray[Any]:
        (top, bottom), (left, right) = window.toranges()
        near = tree.query(shapely.box(left, top, right, bottom))
        shape = bottom - top, right - left
        offset = rasterio.Affine.translation(left, top)
        codes = np.full(shape, outside, kind)
        for value in np.unique(values[near]):
            chosen = shapes[near[values[near] == value]]
            inside = rasterize(chosen, shape, transform=offset, dtype=np.uint8) > 0
            codes[inside] = codes[inside] | (1 << value) if labels.overlapping else value + 1
        return codes

    return draw


def _value_numbers(labels: Labels) -> dict[str, int]:
    """Return the index of the label value of every entry of the file."""
    return {str(entry): code - 1 for entry, code in labels.entries()}


def _expect_polygons(path: Path, shapes: NDArray[Any]) -> None:
    kinds = set(shapely.get_type_id(shapes[~shapely.is_empty(shapes)]).tolist())
    if others := kinds - {-1, 3, 6, 7}:  # none, polygons, and collections of them
        name = shapely.GeometryType(others.pop()).name
        raise InputError(f"{path}: expected polygons, found a shape of the kind {name}")
    if not np.isfinite(shapely.get_coordinates(shapes)).all():
        raise InputError(f"{path}: holds a polygon with a coordinate that is no finite number")


def _areas(shapes: NDArray[Any], entries: pd.Series, labels: Any) -> Areas:
    """Return single valid polygons (repaired where rings cross themselves) with their values."""
    values = entries.map(_value_numbers(labels)).to_numpy(np.int64)
    valid = shapely.make_valid(shapes, method="structure", keep_collapsed=False)
    parts, origin = shapely.get_parts(valid, return_index=True)
    parts, inner = shapely.get_parts(parts, return_index=True)  # of collections of multi-polygons
    keep = (shapely.get_type_id(parts) == 3) & ~shapely.is_empty(parts)
    return parts[keep], values[origin[inner]][keep]


def _polygons(labels: manifest.PolygonLabels, scene: Scene, grid: Grid) -> Areas:
    """Return the polygons of a vector file."""
    [path] = scene.label_files
    try:
        layers = [name for name, kind in pyogrio.list_layers(path) if kind]
        if len(layers) != 1:
            raise InputError(f"{path}: expected one layer of polygons, found {layers}")
        frame = geopandas.read_file(path)
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError) as error:
        raise InputError(f"{path}: cannot be read as polygons ({error})") from error
    _expect_polygons(path, frame.geometry.to_numpy())
    columns = list(frame.columns.drop("geometry", errors="ignore"))
    if labels.column not in columns:
        raise InputError(f"{path}: expected a column {labels.column!r}, found {columns}")
    if labels.crs:
        frame = frame.set_crs(labels.crs, allow_override=True)
    if grid.georeferenced and grid.crs:
        if frame.crs is None:
            raise InputError(f"{path}: expected a coordinate reference system, found none")
        frame = frame.to_crs(grid.crs)
    entries = frame[labels.column]
    if entries.dtype.kind == "f":  # whole numbers are floats where some row has none
        entries = entries.convert_dtypes()
    entries = entries.astype(str)
    listed = entries.isin(_value_numbers(labels).keys())
    if not listed.any():
        raise InputError(
            f"{path}: column {labels.column!r} has none of labels.values, but "
            f"{sorted(entries.dropna().unique())[:SHOWN]}"
        )
    listed &= ~(frame.geometry.isna() | frame.geometry.is_empty)
    in_pixels = frame.geometry[listed].affine_transform((~grid.transform).to_shapely())
    areas = _areas(in_pixels.to_numpy(), entries[listed], labels)
    if not shapely.intersects(areas[0], shapely.box(0, 0, grid.width, grid.height)).any():
        raise InputError(f"{path}: no polygon of the listed values overlaps the scene")
    return areas


def _scaled_polygons(labels: manifest.ScaledPolygonLabels, scene: Scene, grid: Grid) -> Areas:
    """Return DSTL's polygons of one image."""
    path, extents_path = scene.label_files
    extents = read_csv(extents_path, ["Xmax", "Ymin"])
    own = extents[extents.iloc[:, 0] == scene.name]  # the header of the first column is blank
    if len(own) != 1:
        raise InputError(f"{extents_path}: expected one row for {scene.name}, found {len(own)}")
    rows = read_csv(path, ["ImageId", "ClassType", "MultipolygonWKT"])
    rows = rows[rows["ImageId"] == scene.name]
    if (repeated := rows["ClassType"].duplicated()).any():
        kind = rows.loc[repeated, "ClassType"].iloc[0]
        raise InputError(f"{path}: class {kind} of {scene.name} is listed twice")
    try:
        x_max, y_min = (float(own[name].iloc[0]) for name in ("Xmax", "Ymin"))
    except ValueError as error:
        raise InputError(f"{extents_path}: {scene.name}: expected numbers ({error})") from error
    if not np.isfinite([x_max, y_min]).all() or not x_max > 0 > y_min:
        raise InputError(
            f"{extents_path}: {scene.name}: expected Xmax > 0 > Ymin, found {x_max} and {y_min}"
        )
    across = grid.width * grid.width / (grid.width + 1) / x_max
    down = grid.height * grid.height / (grid.height + 1) / y_min
    if unknown := sorted(set(rows["ClassType"]) - _value_numbers(labels).keys()):
        raise InputError(f"{path}: ClassType {unknown} is not in labels.values")
    try:
        shapes = shapely.from_wkt(rows["MultipolygonWKT"].to_numpy(dtype=object))
    except shapely.errors.GEOSException as error:
        raise InputError(f"{path}: {scene.name}: is not well-known text ({error})") from error
    _expect_polygons(path, shapes)
    scaled = shapely.transform(shapes, lambda points: points * [across, down])
    return _areas(scaled, rows["ClassType"], labels)
