"""Prepare a data set: every band and the labels of a scene on one grid.

Written per scene: `<scene>/<modality>.tif`, with its bands in the manifest's order, in the type of
the source and with an internal mask of valid pixels, and `<scene>/labels.tif`. `prepared.json`
beside them records what they were made from, so that whole scenes are never made twice.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyogrio
import rasterio
import shapely
from pydantic import ValidationError
from rasterio.enums import Resampling
from rasterio.errors import RasterioError
from rasterio.features import rasterize
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform_bounds
from rasterio.windows import Window
from tqdm.auto import tqdm

from lsgs_core.errors import InputError
from lsgs_core.files import file_sha256, written_beside
from lsgs_core.manifest import IGNORE, Dataset, PolygonLabels, Strict

RECORD = "prepared.json"
LABELS = "labels"
STEP = 1024  # side of the windows that are worked on, in pixels: bounds the memory
PROFILE = {
    "driver": "GTiff",
    "tiled": True,
    "blockxsize": 256,
    "blockysize": 256,
    "compress": "deflate",
    "BIGTIFF": "IF_SAFER",
}
# With several threads GDAL hands out a truncated JPEG 2000 file without raising anything. The mask
# is kept inside the GeoTIFF: a scene is then one file per modality.
ENVIRONMENT = {"GDAL_NUM_THREADS": "1", "GDAL_TIFF_INTERNAL_MASK": True}


class PreparedScene(Strict):
    """What one scene was made from and what came out; hashes by path relative to its folder."""

    definition: dict[str, Any]
    raw: dict[str, str]
    outputs: dict[str, str]
    height: int
    width: int
    label_pixels: dict[str, int]  # pixels per label value
    invalid_pixels: dict[str, int]  # pixels without data, per modality


class Prepared(Strict):
    """The content of `prepared.json`."""

    scenes: dict[str, PreparedScene]


@dataclass(frozen=True)
class Grid:
    """The grid that all rasters of a scene share."""

    crs: Any
    transform: Any
    width: int
    height: int

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Return left, bottom, right, top in the units of the coordinate reference system."""
        bounds: tuple[float, float, float, float] = rasterio.transform.array_bounds(
            self.height, self.width, self.transform
        )
        return bounds

    def windows(self) -> Iterator[Window]:
        """Yield windows of at most `STEP` × `STEP` pixels that cover the grid."""
        for row in range(0, self.height, STEP):
            for column in range(0, self.width, STEP):
                height, width = min(STEP, self.height - row), min(STEP, self.width - column)
                yield Window(column, row, width, height)


def load_prepared(folder: Path) -> Prepared | None:
    """Return the record of a prepared folder, None when there is no readable one."""
    try:
        return Prepared.model_validate_json((Path(folder) / RECORD).read_bytes())
    except (OSError, ValidationError):
        return None


def prepare(dataset: Dataset, raw_folder: Path, prepared_folder: Path) -> Prepared:
    """Make the aligned rasters of all scenes that are not there yet, and return the record.

    A scene is kept when its definition, its raw files and its outputs are unchanged (by hash). Of
    the others every raw file is read before the first is worked on. A pixel where any band of any
    modality is nodata or NaN is 0 and masked in that modality, and `IGNORE` in the labels.
    Labels are uint8: index of the value in the manifest's list + 1, `IGNORE` where unlabelled.

    Raises:
        InputError: a raw file is missing, damaged, has no coordinate reference system, lies
            elsewhere than the reference band, or has no such channel or column.
    """
    raw_folder, prepared_folder = Path(raw_folder), Path(prepared_folder)
    previous = load_prepared(prepared_folder)
    done: dict[str, PreparedScene] = {}
    hashes: dict[str, dict[str, str]] = {}
    for scene in dataset.scenes:
        hashes[scene] = {name: _raw_sha256(raw_folder / name) for name in dataset.files(scene)}
        known = previous.scenes.get(scene) if previous else None
        if (
            known
            and known.definition == dataset.raster_definition(scene)
            and known.raw == hashes[scene]
            and all(_is_whole(prepared_folder / n, sha) for n, sha in known.outputs.items())
        ):
            done[scene] = known
    pending = [scene for scene in dataset.scenes if scene not in done]
    with rasterio.Env(**ENVIRONMENT):
        grids = {scene: _check_scene(dataset, scene, raw_folder) for scene in pending}
        for scene in pending:
            done[scene] = _prepare_scene(
                dataset, scene, raw_folder, prepared_folder, grids[scene], hashes[scene]
            )
            # Written after each scene: a killed preparation goes on with the next one.
            record = Prepared(scenes={name: done[name] for name in dataset.scenes if name in done})
            with written_beside(prepared_folder / RECORD) as path:
                path.write_text(json.dumps(record.model_dump(), indent=1) + "\n", "utf-8")
    return Prepared(scenes={name: done[name] for name in dataset.scenes})


def read_labels(dataset: Dataset, prepared_folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (scene, label ids uint8 [H, W]) of all prepared scenes, in the manifest's order."""
    for scene in dataset.scenes:
        try:
            with rasterio.open(Path(prepared_folder) / scene / f"{LABELS}.tif") as raster:
                yield scene, raster.read(1)
        except RasterioError as error:
            raise InputError(
                f"{prepared_folder}: scene {scene} is not prepared: {error}"
            ) from error


def _raw_sha256(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"{path}: the file is missing")
    return file_sha256(path)


def _is_whole(path: Path, sha256: str) -> bool:
    return path.is_file() and file_sha256(path) == sha256


def _check_scene(dataset: Dataset, scene: str, raw_folder: Path) -> Grid:
    """Read all raw files of a scene once and return its grid. Raises `InputError`."""
    reference = dataset.bands[dataset.reference_band]
    with _open(raw_folder / dataset.file(reference.file, scene)) as raster:
        grid = Grid(raster.crs, raster.transform, raster.width, raster.height)
    channels: dict[Path, int] = {}
    for band in dataset.bands.values():
        path = raw_folder / dataset.file(band.file, scene)
        channels[path] = max(channels.get(path, 1), band.channel)
    for path, channel in tqdm(channels.items(), desc=f"check {scene}", unit="file"):
        with _open(path) as raster:
            if channel > raster.count:
                raise InputError(f"{path}: has no channel {channel}, only {raster.count}")
            bounds = transform_bounds(raster.crs, grid.crs, *raster.bounds)
            if not _overlap(bounds, grid.bounds):
                raise InputError(f"{path}: does not overlap the band {dataset.reference_band}")
            for window in Grid(None, None, raster.width, raster.height).windows():
                try:
                    raster.read(window=window)
                except RasterioError as error:
                    raise InputError(
                        f"{path}: is damaged or truncated ({error.__cause__ or error})"
                    ) from error
    polygons = _polygons(
        dataset.labels, raw_folder / dataset.file(dataset.labels.file, scene), grid
    )
    if not len(polygons) or not _overlap(tuple(polygons.total_bounds), grid.bounds):
        raise InputError(f"{dataset.labels.file}: no polygon of the listed values overlaps {scene}")
    return grid


def _open(path: Path) -> Any:
    """Open a raster that has a place on Earth. Raises `InputError`."""
    try:
        raster = rasterio.open(path)
    except RasterioError as error:
        raise InputError(f"{path}: cannot be opened as a raster ({error})") from error
    if raster.crs is None:
        raster.close()
        raise InputError(f"{path}: expected a coordinate reference system, found none")
    return raster


def _overlap(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    return bool(shapely.box(*first).intersection(shapely.box(*second)).area > 0)


def _polygons(labels: PolygonLabels, path: Path, grid: Grid) -> geopandas.GeoDataFrame:
    """Return the listed polygons on the grid's reference system, in burning order, with `id`."""
    try:
        columns = list(pyogrio.read_info(path)["fields"])
        if labels.column not in columns:
            raise InputError(f"{path}: expected a column {labels.column!r}, found {columns}")
        frame = geopandas.read_file(path, columns=[labels.column])
    except pyogrio.errors.DataSourceError as error:
        raise InputError(f"{path}: cannot be read as polygons ({error})") from error
    if frame.crs is None:
        raise InputError(f"{path}: expected a coordinate reference system, found none")
    frame["id"] = frame[labels.column].map(labels.ids)
    shapes = frame.geometry.to_numpy()
    frame = frame[frame["id"].notna() & ~(shapely.is_missing(shapes) | shapely.is_empty(shapes))]
    frame = frame.to_crs(grid.crs)
    frame.geometry = shapely.make_valid(frame.geometry.to_numpy())
    return frame.sort_values("id", kind="stable")


def _aligned(raster: Any, grid: Grid, resampling: str) -> WarpedVRT:
    """Return a view of a raster on the grid; its last band is 0 where there is no data."""
    return WarpedVRT(
        raster,
        crs=grid.crs,
        transform=grid.transform,
        width=grid.width,
        height=grid.height,
        resampling=Resampling[resampling],
        add_alpha=True,
    )


def _prepare_scene(
    dataset: Dataset,
    scene: str,
    raw_folder: Path,
    prepared_folder: Path,
    grid: Grid,
    hashes: dict[str, str],
) -> PreparedScene:
    """Write all rasters of one scene and return its record."""
    folder = prepared_folder / scene
    folder.mkdir(parents=True, exist_ok=True)
    labels = dataset.labels
    polygons = _polygons(labels, raw_folder / dataset.file(labels.file, scene), grid)
    counts = np.zeros(IGNORE + 1, dtype=np.int64)
    invalid = dict.fromkeys(dataset.modalities, 0)
    names = {name: f"{scene}/{name}.tif" for name in [*dataset.modalities, LABELS]}
    with ExitStack() as outputs:  # its files are renamed last, when all are closed
        paths = {n: outputs.enter_context(written_beside(folder / f"{n}.tif")) for n in names}
        with ExitStack() as stack:
            views: dict[str, list[tuple[WarpedVRT, int]]] = {}
            rasters: dict[str, Any] = {}
            for name, bands in dataset.modalities.items():
                views[name] = []
                for band in (dataset.bands[b] for b in bands):
                    raw = stack.enter_context(_open(raw_folder / dataset.file(band.file, scene)))
                    view = stack.enter_context(_aligned(raw, grid, dataset.resampling))
                    views[name].append((view, band.channel))
                kind = np.result_type(*(view.dtypes[channel - 1] for view, channel in views[name]))
                rasters[name] = stack.enter_context(_create(paths[name], grid, bands, kind))
            rasters[LABELS] = stack.enter_context(
                _create(paths[LABELS], grid, ["label id"], np.dtype(np.uint8), nodata=IGNORE)
            )
            rasters[LABELS].update_tags(
                **{f"id_{index}": value for value, index in labels.ids.items()},
                **{f"id_{IGNORE}": "ignore"},
            )
            for window in tqdm(list(grid.windows()), desc=f"prepare {scene}", unit="window"):
                target = _burn(polygons, grid, window)
                for name, bands_of in views.items():
                    pixels, valid = _read(bands_of, window)
                    rasters[name].write(pixels, window=window)
                    rasters[name].write_mask(valid, window=window)
                    invalid[name] += int((~valid).sum())
                    target[~valid] = IGNORE
                rasters[LABELS].write(target, 1, window=window)
                counts += np.bincount(target.ravel(), minlength=IGNORE + 1)
        sums = {names[name]: file_sha256(path) for name, path in paths.items()}
    return PreparedScene(
        definition=dataset.raster_definition(scene),
        raw=hashes,
        outputs=sums,
        height=grid.height,
        width=grid.width,
        label_pixels={value: int(counts[index]) for value, index in labels.ids.items()},
        invalid_pixels=invalid,
    )


def _create(path: Path, grid: Grid, bands: list[str], kind: np.dtype, **options: Any) -> Any:
    """Open a tiled, compressed GeoTIFF on the grid for writing, its bands named."""
    size = {"width": grid.width, "height": grid.height, "count": len(bands)}
    place = {"crs": grid.crs, "transform": grid.transform}
    predictor = 3 if np.issubdtype(kind, np.floating) else 2
    raster = rasterio.open(
        path, "w", dtype=kind, predictor=predictor, **PROFILE, **size, **place, **options
    )
    raster.descriptions = bands
    return raster


def _read(views: list[tuple[WarpedVRT, int]], window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Return the bands [D, h, w], 0 where any has no data, and where all have data [h, w] bool."""
    pixels = np.stack([view.read(channel, window=window) for view, channel in views])
    valid = np.isfinite(pixels).all(axis=0)
    for view, _ in views:
        valid &= view.read(view.count, window=window) > 0
    pixels[:, ~valid] = 0
    return pixels, valid


def _burn(polygons: geopandas.GeoDataFrame, grid: Grid, window: Window) -> np.ndarray:
    """Return the label ids of a window, uint8 [h, w]: a pixel belongs where its centre lies."""
    bounds = rasterio.windows.bounds(window, grid.transform)
    near = np.sort(polygons.sindex.query(shapely.box(*bounds)))  # sorted: keeps the burning order
    shapes = zip(polygons.geometry.iloc[near], polygons["id"].iloc[near].astype(int), strict=True)
    target: np.ndarray = np.full((window.height, window.width), IGNORE, dtype=np.uint8)
    if len(near):
        rasterize(shapes, out=target, transform=rasterio.windows.transform(window, grid.transform))
    return target
