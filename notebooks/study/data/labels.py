"""The labels of a scene as one code per pixel, drawn window by window.

Exclusive labels are uint8: 0 background, 1 … V the label values in the manifest's order, 255
unknown. Overlapping ones are uint16 bit masks: bit i for value i, 0 background, 65535 unknown.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyogrio
import pyproj
import rasterio
import shapely
from numpy.typing import NDArray
from rasterio.features import rasterize
from rasterio.windows import Window

from lsgs_core.errors import InputError
from study.data.alignment import AlignedRaster, Grid
from study.data.label_kinds import (
    BACKGROUND,
    ColourLabels,
    IdLabels,
    Labels,
    PolygonLabels,
    ScaledPolygonLabels,
)
from study.data.manifest import Dataset
from study.data.raw_files import Scene, read_csv

SHOWN = 8  # how many wrong numbers an error lists
# From a window of the scene's grid to codes [h, w].
Draw = Callable[[Window], NDArray[Any]]


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


def code_names(labels: Labels) -> dict[int, str]:
    """Return the name of every code; of overlapping labels, those of a single value."""
    numbers = range(len(labels.values))
    codes = [1 << n if labels.overlapping else n + 1 for n in numbers]
    return dict(zip([*codes, *[0] * labels.has_background], labels.names, strict=True))


def class_membership(dataset: Dataset, task: str) -> NDArray[np.bool_]:
    """Return whether a code belongs to each class of a task, bool [C, codes]."""
    member, names = membership(dataset.labels), dataset.labels.names
    groups = dataset.task(task).classes.values()
    columns = [[names.index(value) for value in group] for group in groups]
    return np.stack([member[:, chosen].any(axis=1) for chosen in columns])


@contextmanager
def open_labels(labels: Labels, scene: Scene, grid: Grid) -> Iterator[Draw]:
    """Open the labels of a scene.

    Yields:
        A function from a window to its codes.

    Raises:
        InputError: The file is damaged, lies elsewhere, or lacks what the manifest says.
    """
    if isinstance(labels, PolygonLabels):
        yield _draw_exclusive(labels, *_polygons(labels, scene.labels, grid))
    elif isinstance(labels, ScaledPolygonLabels):
        yield _draw_overlapping(labels, *_scaled_polygons(labels, scene, grid))
    else:
        colours = isinstance(labels, ColourLabels)
        channels = (1, 2, 3) if isinstance(labels, ColourLabels) else (labels.channel,)
        with AlignedRaster(scene.labels, labels, grid, channels, colours=colours) as raster:
            if colours and raster.kind != np.uint8:
                raise InputError(f"{scene.labels}: expected colours of 8 bits, found {raster.kind}")
            yield _looked_up(labels, raster)


def _looked_up(labels: IdLabels | ColourLabels, raster: AlignedRaster) -> Draw:
    """Return a function that looks up the numbers, or colours, of a raster."""
    if isinstance(labels, IdLabels):
        groups = list(labels.values.values())
        background, ignored = labels.background, labels.ignored
    else:
        groups = [[_packed(colour)] for colour in labels.values.values()]
        background, ignored = [], [_packed(colour) for colour in labels.ignored]
    table = {number: index for index, group in enumerate(groups, start=1) for number in group}
    table |= dict.fromkeys(background, 0) | dict.fromkeys(ignored, labels.ignore)
    known = np.array(sorted(table))
    codes = np.array([table[number] for number in known.tolist()], dtype=np.uint8)

    def draw(window: Window) -> NDArray[Any]:
        pixels, seen = raster.read(window)
        if isinstance(labels, ColourLabels):
            colours = pixels.astype(np.int64)
            if labels.threshold is not None:
                colours = np.where(colours > labels.threshold, 255, 0)
            numbers = (colours[0] << 16) | (colours[1] << 8) | colours[2]
        else:
            numbers = np.where(seen, pixels[0], 0)
            if (numbers != np.round(numbers)).any():
                raise InputError(f"{raster.path}: expected whole numbers as labels")
            numbers = numbers.astype(np.int64)
        place = np.searchsorted(known, numbers).clip(max=len(known) - 1)
        listed = known[place] == numbers
        if labels.unlisted == "error" and not (listed | ~seen).all():
            wrong = np.unique(numbers[seen & ~listed])[:SHOWN].tolist()
            shown = wrong if isinstance(labels, IdLabels) else [f"#{n:06x}" for n in wrong]
            raise InputError(
                f"{raster.path}: holds {shown}, not listed in labels.values, labels.ignored or "
                "labels.background; `unlisted: ignore` takes them for unknown"
            )
        return np.where(listed & seen, codes[place], np.uint8(labels.ignore))

    return draw


def _packed(colour: Sequence[int]) -> int:
    return (colour[0] << 16) | (colour[1] << 8) | colour[2]


def _draw_exclusive(labels: PolygonLabels, shapes: NDArray[Any], numbers: NDArray[Any]) -> Draw:
    """Return a function that burns shapes (in pixels), later values over earlier ones."""
    order = np.argsort(numbers, kind="stable")
    shapes, numbers = shapes[order], numbers[order]
    tree = shapely.STRtree(shapes)
    outside = 0 if labels.outside == BACKGROUND else labels.ignore

    def draw(window: Window) -> NDArray[Any]:
        codes = np.full((window.height, window.width), outside, dtype=np.uint8)
        inside = np.sort(tree.query(_box(window)))
        _burn(shapes[inside], numbers[inside] + 1, window, codes)
        return codes

    return draw


def _draw_overlapping(
    labels: ScaledPolygonLabels, shapes: NDArray[Any], numbers: NDArray[Any]
) -> Draw:
    """Return a function that burns every value's shapes (in pixels) into a bit of its own."""
    tree = shapely.STRtree(shapes)

    def draw(window: Window) -> NDArray[Any]:
        codes = np.zeros((window.height, window.width), dtype=np.uint16)
        inside = tree.query(_box(window))
        for number in np.unique(numbers[inside]):
            bit = np.zeros(codes.shape, dtype=np.uint8)
            chosen = inside[numbers[inside] == number]
            _burn(shapes[chosen], np.ones(len(chosen), dtype=int), window, bit)
            codes |= bit.astype(np.uint16) << np.uint16(number)
        return codes

    return draw


def _burn(shapes: NDArray[Any], codes: NDArray[Any], window: Window, out: NDArray[Any]) -> None:
    """Burn shapes into the window: a pixel belongs where its centre lies."""
    if len(shapes):
        offset = rasterio.Affine.translation(window.col_off, window.row_off)
        rasterize(zip(shapes, codes.tolist(), strict=True), out=out, transform=offset)


def _box(window: Window) -> shapely.Polygon:
    left, top = window.col_off, window.row_off
    return shapely.box(left, top, left + window.width, top + window.height)


def _areas(shapes: NDArray[Any], numbers: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return single valid polygons with their numbers; repaired where rings cross themselves."""
    valid = shapely.make_valid(shapes, method="structure", keep_collapsed=False)
    parts, origin = shapely.get_parts(valid, return_index=True)
    parts, inner = shapely.get_parts(parts, return_index=True)  # of collections of multi-polygons
    keep = (shapely.get_type_id(parts) == 3) & ~shapely.is_empty(parts)
    return parts[keep], numbers[origin[inner]][keep]


def _polygons(
    labels: PolygonLabels, path: Path, grid: Grid
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return polygons in pixels of the grid, and the index of the value of each."""
    try:
        layers = [name for name, kind in pyogrio.list_layers(path) if kind]
        if len(layers) != 1:
            raise InputError(f"{path}: expected one layer of polygons, found {layers}")
        frame = geopandas.read_file(path)
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError) as error:
        raise InputError(f"{path}: cannot be read as polygons ({error})") from error
    columns = list(frame.columns.drop("geometry", errors="ignore"))
    if labels.column not in columns:
        raise InputError(f"{path}: expected a column {labels.column!r}, found {columns}")
    if labels.crs:
        try:
            frame = frame.set_crs(labels.crs, allow_override=True)
        except pyproj.exceptions.CRSError as error:
            raise InputError(f"labels.crs: {labels.crs!r} is not known ({error})") from error
    if grid.georeferenced and grid.crs:
        if frame.crs is None:
            raise InputError(f"{path}: expected a coordinate reference system, found none")
        frame = frame.to_crs(grid.crs)
    table = {str(entry): n for n, group in enumerate(labels.values.values()) for entry in group}
    given = frame[labels.column]
    if given.dtype.kind == "f":  # so are whole numbers where some row has none
        given = given.convert_dtypes()
    given = given.astype(str)
    numbers = given.map(table)
    if numbers.isna().all():
        found_there = sorted(given.dropna().unique())[:SHOWN]
        raise InputError(
            f"{path}: column {labels.column!r} has none of labels.values, but {found_there}"
        )
    listed = frame[numbers.notna() & ~(frame.geometry.isna() | frame.geometry.is_empty)]
    backwards = ~grid.transform
    shapes, found = _areas(
        listed.geometry.affine_transform(backwards.to_shapely()).to_numpy(),
        numbers[listed.index].to_numpy(np.int64),
    )
    if not len(shapes) or not shapely.STRtree(shapes).query(
        _box(Window(0, 0, grid.width, grid.height)), predicate="intersects"
    ).size:  # fmt: skip
        raise InputError(f"{path}: no polygon of the listed values overlaps the scene")
    return shapes, found


def _scaled_polygons(
    labels: ScaledPolygonLabels, scene: Scene, grid: Grid
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return DSTL's polygons of one image in its pixels, and the index of the value of each."""
    assert scene.extents is not None
    extents = read_csv(scene.extents, ["Xmax", "Ymin"])
    own = extents[extents.iloc[:, 0] == scene.name]  # the header of the first column is blank
    if len(own) != 1:
        raise InputError(f"{scene.extents}: expected one row for {scene.name}, found {len(own)}")
    rows = read_csv(scene.labels, ["ImageId", "ClassType", "MultipolygonWKT"])
    rows = rows[rows["ImageId"] == scene.name]
    if (twice := rows["ClassType"].duplicated()).any():
        classes = rows.loc[twice, "ClassType"].tolist()
        raise InputError(f"{scene.labels}: class {classes[0]} of {scene.name} is there twice")
    try:
        x_max, y_min = (float(own[name].iloc[0]) for name in ("Xmax", "Ymin"))
    except ValueError as error:
        raise InputError(f"{scene.extents}: {scene.name}: expected numbers ({error})") from error
    if not np.isfinite([x_max, y_min]).all() or not x_max > 0 > y_min:
        raise InputError(
            f"{scene.extents}: {scene.name}: expected Xmax > 0 > Ymin, found {x_max} and {y_min}"
        )
    across = grid.width * grid.width / (grid.width + 1) / x_max
    down = grid.height * grid.height / (grid.height + 1) / y_min
    table = {str(entry): n for n, group in enumerate(labels.values.values()) for entry in group}
    if unknown := sorted(set(rows["ClassType"]) - table.keys()):
        raise InputError(f"{scene.labels}: ClassType {unknown} is not in labels.values")
    try:
        shapes = shapely.from_wkt(rows["MultipolygonWKT"].to_numpy(dtype=object))
    except shapely.errors.GEOSException as error:
        raise InputError(f"{scene.labels}: {scene.name}: no well-known text ({error})") from error
    scaled = shapely.transform(shapes, lambda points: points * [across, down])
    return _areas(scaled, rows["ClassType"].map(table).to_numpy(np.int64))
