"""Prepare a data set: every band and the labels of a scene on one grid.

Written per scene: `<scene>/<modality>.tif`, with its bands in the manifest's order, in the type of
the source and with an internal mask of valid pixels, and `<scene>/labels.tif`. `prepared.json`
beside them records what they were made from, so that whole scenes are never made twice.
"""

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
from lsgs_core.manifest import IGNORE, Dataset, Strict

RECORD = "prepared.json"
LABELS = "labels"
STEP = 1024  # side of the windows that are worked on, in pixels: bounds the memory
PROFILE = {"driver": "GTiff", "tiled": True, "blockxsize": 256, "blockysize": 256}
PROFILE |= {"compress": "deflate", "BIGTIFF": "IF_SAFER"}
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

    def overlaps(self, bounds: tuple[float, ...]) -> bool:
        """Return whether left, bottom, right, top in the grid's units share area with it."""
        own = rasterio.transform.array_bounds(self.height, self.width, self.transform)
        return bool(shapely.box(*own).intersection(shapely.box(*bounds)).area > 0)


def windows(height: int, width: int) -> Iterator[Window]:
    """Yield windows of at most `STEP` × `STEP` pixels that cover a raster."""
    for row in range(0, height, STEP):
        for column in range(0, width, STEP):
            yield Window(column, row, min(STEP, width - column), min(STEP, height - row))


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
    previous = load_prepared(prepared_folder) or Prepared(scenes={})
    done: dict[str, PreparedScene] = {}
    hashes: dict[str, dict[str, str]] = {}
    for scene in dataset.scenes:
        hashes[scene] = {name: _sha256(raw_folder / name) for name in dataset.files(scene)}
        if missing := [name for name, sha256 in hashes[scene].items() if not sha256]:
            raise InputError(f"{raw_folder / missing[0]}: the file is missing")
        known = previous.scenes.get(scene)
        if (
            known
            and known.definition == dataset.raster_definition(scene)
            and known.raw == hashes[scene]
            and all(_sha256(prepared_folder / n) == sha for n, sha in known.outputs.items())
        ):
            done[scene] = known
    pending = [scene for scene in dataset.scenes if scene not in done]
    with rasterio.Env(**ENVIRONMENT):
        grids = {scene: _check_scene(dataset, scene, raw_folder) for scene in pending}
        for scene in pending:
            # Before and after each scene: a killed preparation goes on with the scene that it was
            # working on, whose files nobody takes for whole until then.
            _write_record(Prepared(scenes=done), prepared_folder)
            done[scene] = _prepare_scene(
                dataset, scene, raw_folder, prepared_folder, grids[scene], hashes[scene]
            )
            _write_record(Prepared(scenes=done), prepared_folder)
    return Prepared(scenes=done)


def read_labels(dataset: Dataset, prepared_folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (scene, label ids uint8 [H, W]) of all prepared scenes, in the manifest's order."""
    for scene in dataset.scenes:
        try:
            with rasterio.open(Path(prepared_folder) / scene / f"{LABELS}.tif") as raster:
                yield scene, raster.read(1)
        except RasterioError as error:
            raise InputError(f"{prepared_folder}: {scene} is not prepared: {error}") from error


def _sha256(path: Path) -> str:
    """Return the hash of a file, "" when there is none."""
    return file_sha256(path) if path.is_file() else ""


def _write_record(record: Prepared, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with written_beside(folder / RECORD) as path:
        path.write_text(record.model_dump_json(indent=1) + "\n", "utf-8")


def _check_scene(dataset: Dataset, scene: str, raw_folder: Path) -> Grid:
    """Read all raw files of a scene once and return its grid. Raises `InputError`."""
    grid = None
    names = dict.fromkeys([dataset.reference_band, *dataset.bands])  # the reference first
    for band in tqdm([dataset.bands[n] for n in names], desc=f"check {scene}", unit="band"):
        path = raw_folder / dataset.file(band.file, scene)
        try:
            with rasterio.open(path) as raster:
                if raster.crs is None:
                    raise InputError(f"{path}: expected a coordinate reference system, found none")
                if band.channel > raster.count:
                    raise InputError(f"{path}: has no channel {band.channel}, only {raster.count}")
                grid = grid or Grid(raster.crs, raster.transform, raster.width, raster.height)
                if not grid.overlaps(transform_bounds(raster.crs, grid.crs, *raster.bounds)):
                    raise InputError(f"{path}: does not overlap the band {dataset.reference_band}")
                for window in windows(raster.height, raster.width):
                    raster.read(band.channel, window=window)
        except RasterioError as error:
            problem = error.__cause__ or error
            raise InputError(f"{path}: is damaged, truncated or no raster ({problem})") from error
    assert grid is not None
    _burnt_labels(dataset, scene, raw_folder, grid)
    return grid


def _burnt_labels(dataset: Dataset, scene: str, raw_folder: Path, grid: Grid) -> np.ndarray:
    """Return the label ids of a scene [H, W] uint8: a pixel belongs where its centre lies."""
    labels = dataset.labels
    path = raw_folder / dataset.file(labels.file, scene)
    try:
        frame = geopandas.read_file(path)
    except pyogrio.errors.DataSourceError as error:
        raise InputError(f"{path}: cannot be read as polygons ({error})") from error
    columns = list(frame.columns.drop("geometry", errors="ignore"))
    if labels.column not in columns:
        raise InputError(f"{path}: expected a column {labels.column!r}, found {columns}")
    if frame.crs is None:
        raise InputError(f"{path}: expected a coordinate reference system, found none")
    frame["id"] = frame[labels.column].map(labels.ids)
    frame = frame[frame["id"].notna() & ~(frame.geometry.isna() | frame.geometry.is_empty)]
    # Later ones are burned over earlier ones.
    frame = frame.to_crs(grid.crs).sort_values("id", kind="stable")
    if frame.empty or not grid.overlaps(tuple(frame.total_bounds)):
        raise InputError(f"{path}: no polygon of the listed values overlaps {scene}")
    ids: np.ndarray = np.full((grid.height, grid.width), IGNORE, dtype=np.uint8)
    shapes = zip(frame.geometry.make_valid(), frame["id"].astype(int), strict=True)
    rasterize(shapes, out=ids, transform=grid.transform)
    return ids


def _prepare_scene(
    dataset: Dataset,
    scene: str,
    raw_folder: Path,
    prepared_folder: Path,
    grid: Grid,
    hashes: dict[str, str],
) -> PreparedScene:
    """Write all rasters of one scene and return its record."""
    (prepared_folder / scene).mkdir(parents=True, exist_ok=True)
    files = {name: f"{scene}/{name}.tif" for name in [*dataset.modalities, LABELS]}
    ids = _burnt_labels(dataset, scene, raw_folder, grid)
    invalid = {}
    for name, bands in dataset.modalities.items():
        used = [dataset.bands[band] for band in bands]
        sources = [(raw_folder / dataset.file(b.file, scene), b.channel) for b in used]
        with written_beside(prepared_folder / files[name]) as path:
            valid = _write_bands(path, name, grid, bands, sources, dataset.resampling)
        ids[~valid] = IGNORE
        invalid[name] = int((~valid).sum())
    values = dataset.labels.ids
    with (
        written_beside(prepared_folder / files[LABELS]) as path,
        _create(path, grid, ["label id"], np.dtype(np.uint8), nodata=IGNORE) as raster,
    ):
        names = {index: value for value, index in values.items()} | {IGNORE: "ignore"}
        raster.update_tags(**{f"id_{index}": name for index, name in names.items()})
        for window in windows(grid.height, grid.width):
            raster.write(ids[window.toslices()], 1, window=window)
    return PreparedScene(
        definition=dataset.raster_definition(scene),
        raw=hashes,
        outputs={file: file_sha256(prepared_folder / file) for file in files.values()},
        height=grid.height,
        width=grid.width,
        label_pixels={value: int((ids == index).sum()) for value, index in values.items()},
        invalid_pixels=invalid,
    )


def _write_bands(
    path: Path,
    modality: str,
    grid: Grid,
    names: list[str],
    sources: list[tuple[Path, int]],
    resampling: str,
) -> np.ndarray:
    """Write bands, given as (file, channel), on the grid; return where all have data [H, W]."""
    valid: np.ndarray = np.empty((grid.height, grid.width), dtype=bool)
    with ExitStack() as stack:
        views = []
        for file, channel in sources:
            raw = stack.enter_context(rasterio.open(file))
            # The alpha band, its last, is 0 where there is no data.
            view = WarpedVRT(raw, **vars(grid), resampling=Resampling[resampling], add_alpha=True)
            views.append((stack.enter_context(view), channel))
        kind = np.result_type(*(view.dtypes[channel - 1] for view, channel in views))
        output = stack.enter_context(_create(path, grid, names, kind))
        parts = list(windows(grid.height, grid.width))
        for window in tqdm(parts, desc=f"align {modality}", unit="window"):
            pixels = np.stack([view.read(channel, window=window) for view, channel in views])
            inside = np.isfinite(pixels).all(axis=0)
            for view, _ in views:
                inside &= view.read(view.count, window=window) > 0
            pixels[:, ~inside] = 0
            output.write(pixels, window=window)
            output.write_mask(inside, window=window)
            valid[window.toslices()] = inside
    return valid


def _create(path: Path, grid: Grid, bands: list[str], kind: np.dtype, **options: Any) -> Any:
    """Open a tiled, compressed GeoTIFF on the grid for writing, its bands named."""
    options |= PROFILE | vars(grid) | {"count": len(bands), "dtype": kind}
    predictor = 3 if np.issubdtype(kind, np.floating) else 2
    raster = rasterio.open(path, "w", predictor=predictor, **options)
    raster.descriptions = bands
    return raster
