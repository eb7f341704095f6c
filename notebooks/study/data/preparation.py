"""Prepare a data set: every band and the labels of a scene on one grid.

Written per scene: `<scene>/<modality>.tif`, with its bands in the manifest's order, in the type of
the source and with an internal mask of the pixels that the modality sees, and `<scene>/labels.tif`.
`prepared.json` beside them records what they were made from, so that no scene is made twice.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import rasterio
from affine import Affine
from pydantic import ValidationError
from rasterio.windows import Window, intersection
from tqdm.auto import tqdm

from lsgs_core.errors import InputError
from study.data.alignment import ENVIRONMENT, AlignedRaster, Grid, grid_of, naming, windows
from study.data.labels import Draw, membership, open_labels
from study.data.manifest import Dataset, Difference, FileBand, Slope
from study.data.raw_files import Scene, find_scenes
from study.provenance.files import file_sha256, make_folder, written_beside
from study.provenance.schema import Strict

RECORD = "prepared.json"
PATCH_TABLE = "patches.csv"
LABELS = "labels"
# A patch of 224 pixels reads half as much from small tiles. Files are as small with Zstandard as
# with deflate, and three times as fast to write and twice as fast to read.
PROFILE = {"driver": "GTiff", "tiled": True, "blockxsize": 128, "blockysize": 128}
PROFILE |= {"compress": "zstd", "zstd_level": 1, "BIGTIFF": "IF_SAFER"}


class PreparedScene(Strict):
    """What one scene was made from and what was written; hashes by path relative to the folder."""

    raw: dict[str, str]
    outputs: dict[str, str]
    height: int
    width: int
    crs: str | None
    transform: tuple[float, float, float, float, float, float]  # from pixels to the ground
    modalities: list[str]  # that are not absent
    labelled_pixels: int
    label_pixels: dict[str, int]  # more in total than labelled where values overlap
    label_values: list[str]  # of the raw labels, also where no modality sees a pixel
    unseen_pixels: dict[str, int]  # without data, per modality

    @property
    def grid(self) -> Grid:
        """Return the grid of the scene."""
        crs = rasterio.crs.CRS.from_wkt(self.crs) if self.crs else None
        return Grid(crs, Affine(*self.transform), self.width, self.height)

    @property
    def pixel_size(self) -> tuple[float, str]:
        """Return the width of a pixel and its unit, as maps show it."""
        crs, width = self.grid.crs, math.hypot(self.transform[0], self.transform[3])
        if crs is None:
            return 1.0, "pixels"
        if crs.is_geographic:
            return width, "degrees"
        return width * crs.linear_units_factor[1] / 1000, "km"


class Prepared(Strict):
    """The content of `prepared.json`; `complete` is false while scenes are still missing."""

    definition: dict[str, Any]
    scenes: dict[str, PreparedScene]
    complete: bool = True

    def summary(self) -> pd.DataFrame:
        """Return a row per scene: its size, and the shares that are labelled and that are seen."""
        rows = []
        for name, scene in self.scenes.items():
            pixels = scene.height * scene.width
            row = {"scene": name, "rows": scene.height, "columns": scene.width}
            row |= {"labelled": scene.labelled_pixels / pixels}
            rows.append(row | {f"{m} sees": 1 - n / pixels for m, n in scene.unseen_pixels.items()})
        return pd.DataFrame(rows)


def load_prepared(folder: Path) -> Prepared | None:
    """Return the record of a prepared folder, None when there is no readable one."""
    try:
        return Prepared.model_validate_json((folder / RECORD).read_bytes())
    except (OSError, ValidationError):
        return None


def matching_record(folder: Path, dataset: Dataset) -> Prepared:
    """Return the record of a prepared folder that is complete and of this definition."""
    record = load_prepared(folder)
    if record is None:
        raise InputError(f"{folder}: is not a prepared folder")
    if record.definition != dataset.raster_definition():
        raise InputError(f"{folder}: was prepared from another definition; prepare it again")
    if not record.complete:
        raise InputError(f"{folder}: its preparation was interrupted; prepare it again to resume")
    return record


@contextmanager
def open_prepared(path: Path) -> Iterator[Any]:
    """Open a prepared raster. Raises `InputError` when it is not there or cannot be read."""
    with rasterio.Env(**ENVIRONMENT), naming(path), rasterio.open(path) as raster:
        yield raster


def prepare(dataset: Dataset, raw_folder: Path, prepared_folder: Path) -> Prepared:
    """Make the aligned rasters of all scenes that do not exist yet, and return the record.

    A scene is kept when the definition, its raw files and its outputs are unchanged (by hash). All
    raw files of the other scenes are read before the first of these is written. A pixel that a
    modality does not see (nodata or NaN in any of its bands, or hidden by its mask) is 0 and masked
    in that modality; one that no modality sees is unknown in the labels.

    Raises `InputError` for a raw file that is missing, damaged, elsewhere than the reference band,
    or not what the manifest says.
    """
    scenes = {scene.name: scene for scene in find_scenes(dataset, raw_folder)}
    files = sorted({file for scene in scenes.values() for file in scene.files})
    print(f"{len(scenes)} scenes, {len(files)} files; writes to {prepared_folder}")
    hashes = {file: file_sha256(file) for file in tqdm(files, desc="hash raw files", unit="file")}
    raw = {
        name: {file.relative_to(raw_folder).as_posix(): hashes[file] for file in scene.files}
        for name, scene in scenes.items()
    }
    definition, previous = dataset.raster_definition(), load_prepared(prepared_folder)
    done: dict[str, PreparedScene] = {}
    if previous and previous.definition == definition:
        done = {
            name: scene
            for name, scene in previous.scenes.items()
            if scene.raw == raw.get(name)
            and all((prepared_folder / file).is_file() for file in scene.outputs)
            and all(file_sha256(prepared_folder / f) == sha for f, sha in scene.outputs.items())
        }
    pending = [scene for name, scene in scenes.items() if name not in done]
    with rasterio.Env(**ENVIRONMENT):
        values = {name: set(scene.label_values) for name, scene in done.items()}
        for scene in tqdm(pending, desc="check", unit="scene"):
            values[scene.name], _ = check_scene(scene)
        missing = set(dataset.labels.values) - set().union(*values.values())
        if pending and missing:
            raise InputError(f"labels.values: {sorted(missing)} occur in no scene of {raw_folder}")
        if pending:
            begun = Prepared(definition=definition, scenes=done, complete=False)
            write_record(begun, prepared_folder)
            # Its patches are of other rasters.
            (prepared_folder / PATCH_TABLE).unlink(missing_ok=True)
        last_written = 0.0
        for scene in tqdm(pending, desc="align", unit="scene"):
            known = raw[scene.name], sorted(values[scene.name])
            done[scene.name] = _write_scene(scene, prepared_folder, *known)
            # A killed preparation resumes from here. With thousands of small scenes, the record
            # is written every ten seconds, or the writing would take most of the time.
            if time.monotonic() - last_written > 10:
                write_record(begun.model_copy(update={"scenes": done}), prepared_folder)
                last_written = time.monotonic()
    record = Prepared(definition=definition, scenes={name: done[name] for name in scenes})
    if pending or not previous or record.model_dump_json() != previous.model_dump_json():
        write_record(record, prepared_folder)
    return record


def write_record(record: Prepared, folder: Path) -> None:
    """Write the record of a prepared folder, beside and renamed."""
    make_folder(folder)
    with written_beside(folder / RECORD) as path:
        path.write_text(record.model_dump_json(indent=1) + "\n", "utf-8")


def check_scene(scene: Scene) -> tuple[set[str], set[str]]:
    """Read all raw files of a scene once; return its label values, and what else it has pixels of.

    That are `modalities.<name>` with data, and `masks.<name>` that hide some.
    """
    with open_scene(scene) as (grid, modalities, draw):
        rasters = [r for source in modalities.values() for r in (*source.rasters, source.mask) if r]
        for raster in {raster.path: raster for raster in rasters}.values():
            for window in windows(raster.raw.height, raster.raw.width):
                with naming(raster.path):
                    raster.raw.read(window=window)
        member = membership(scene.dataset.labels)
        occurs = np.zeros(member.shape[1], dtype=bool)
        others, steps = set[str](), windows(grid.height, grid.width)
        for window in steps:
            occurs |= member[np.unique(draw(window))].any(axis=0)
            others |= {f"masks.{n}" for n, m in modalities.items() if m.hidden(window).any()}
        for name, modality in modalities.items():
            if any(modality.read(window)[1].any() for window in steps):
                others.add(f"modalities.{name}")
    return set(np.array(scene.dataset.labels.names)[occurs].tolist()), others


@contextmanager
def open_scene(scene: Scene) -> Iterator[tuple[Grid, dict[str, "AlignedModality"], Draw]]:
    """Open a scene: its grid, modalities and labels."""
    grid = grid_of(scene.reference_file, scene.reference)
    with open_modalities(scene, grid) as modalities, open_labels(scene, grid) as draw:
        yield grid, modalities, draw


@contextmanager
def open_modalities(scene: Scene, grid: Grid) -> Iterator[dict[str, "AlignedModality"]]:
    """Open the modalities that a scene has, on a grid."""
    with ExitStack() as stack:
        yield {name: AlignedModality(scene, name, grid, stack) for name in scene.modalities}


class AlignedModality:
    """The bands of one modality on the grid of a scene, with derived bands and the mask.

    The `stack` keeps the files open. `rasters` are those of the bands, `kind` is their data type;
    `mask` is the raster of the mask, if there is one.
    """

    def __init__(self, scene: Scene, name: str, grid: Grid, stack: ExitStack) -> None:
        dataset, file_bands = scene.dataset, scene.dataset.file_bands
        self.grid, self.rasters = grid, list[AlignedRaster]()
        self.bands = {band: dataset.bands[band] for band in dataset.modalities[name]}
        # One opening per file and way of placing it: its channels are read together.
        sources: dict[tuple[Path, str], list[str]] = {}
        for source in dict.fromkeys(dataset.sources(self.bands)):
            way = file_bands[source].model_dump_json(exclude={"channel", "description"})
            sources.setdefault((scene.band_files[source], way), []).append(source)
        self._sources = [source for together in sources.values() for source in together]
        for (path, _), together in sources.items():
            bands = [file_bands[source] for source in together]
            placed, channels = bands[0], [band.channel for band in bands]
            # What any band of the manifest takes from the file is data, whatever its tags say.
            same = {n for n, band in file_bands.items() if band.file == placed.file}
            same |= {n for n, file in scene.band_files.items() if file == path}
            used = [file_bands[name].channel for name in same]
            more = dataset.resampling, placed.nodata, used
            raster = AlignedRaster(path, placed, grid, stack, channels, *more)
            self.rasters.append(raster)
            count = raster.raw.count
            if placed.channel_count not in (None, count):
                wanted = placed.channel_count
                raise InputError(f"{path}: expected {wanted} channels, found {count}")
            for band, channel in zip(bands, raster.channels, strict=True):
                description = raster.raw.descriptions[channel - 1]
                if band.description and description and description != band.description:
                    raise InputError(
                        f"{path}: expected {band.description!r} as channel {channel}, "
                        f"found {description!r}: are bands swapped?"
                    )
        derived = [b for b in self.bands.values() if not isinstance(b, FileBand)]
        self._halo = int(any(isinstance(band, Slope) for band in derived))
        kinds = [raster.kind for raster in self.rasters]
        self.kind = np.result_type(*kinds, *[np.float32] * bool(derived))
        self.mask: AlignedRaster | None = None
        if mask := dataset.masks.get(name):
            path, self._unseen = scene.mask_files[name], mask.unseen
            self.mask = AlignedRaster(path, mask, grid, stack, [mask.channel])

    def hidden(self, window: Window) -> np.ndarray:
        """Return which pixels the mask hides or lacks, bool [h, w]. Raises `InputError`."""
        if self.mask is None:
            return np.zeros((window.height, window.width), dtype=bool)
        (mask,), with_data = self.mask.read(window)
        if (mask != np.round(mask))[with_data].any():
            raise InputError(f"{self.mask.path}: expected whole numbers as a mask")
        return np.isin(mask, self._unseen) | ~with_data

    def read(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """Return the bands [D, h, w], 0 where not seen, and where all are seen [h, w]."""
        wide, inner = _widened(window, self._halo, self.grid)
        parts = [raster.read(wide) for raster in self.rasters]
        seen = np.logical_and.reduce([~self.hidden(wide), *(with_data for _, with_data in parts)])
        channels = [channel for pixels, _ in parts for channel in pixels]
        pixels = dict(zip(self._sources, channels, strict=True))
        bands = []
        for name, band in self.bands.items():
            if isinstance(band, Difference):
                first, second = (pixels[source].astype(np.float32) for source in band.difference)
                bands.append(first - second)
            elif isinstance(band, Slope):
                heights = np.where(seen, pixels[band.slope], np.nan).astype(np.float32)
                down, across = np.gradient(heights, band.pixel_size)
                bands.append(np.degrees(np.arctan(np.hypot(down, across))))
            else:
                bands.append(pixels[name])
        stacked = np.stack(bands).astype(self.kind)[(slice(None), *inner)]
        seen = seen[inner] & np.isfinite(stacked).all(axis=0)  # no slope beside a hole
        stacked[:, ~seen] = 0
        return stacked, seen


def _widened(window: Window, halo: int, grid: Grid) -> tuple[Window, tuple[slice, slice]]:
    """Return a window with a halo, cut at the grid's edge, and where the inner one lies in it."""
    top, left = window.row_off - halo, window.col_off - halo
    around = Window(left, top, window.width + 2 * halo, window.height + 2 * halo)
    wide = intersection(around, Window(0, 0, grid.width, grid.height))
    place = window.col_off - wide.col_off, window.row_off - wide.row_off
    return wide, Window(*place, window.width, window.height).toslices()


def _write_scene(
    scene: Scene, folder: Path, raw: dict[str, str], label_values: list[str]
) -> PreparedScene:
    """Write all rasters of one scene and return its record."""
    make_folder(folder / scene.name)
    labels, member = scene.dataset.labels, membership(scene.dataset.labels)
    files = {name: f"{scene.name}/{name}.tif" for name in (*scene.modalities, LABELS)}
    pixels_of = np.zeros(len(member), dtype=np.int64)  # every code
    unseen = dict.fromkeys(scene.modalities, 0)
    with open_scene(scene) as (grid, modalities, draw), ExitStack() as stack:
        # Left in reverse: rasters are closed, and then renamed.
        enter = stack.enter_context
        paths = {name: enter(written_beside(folder / file)) for name, file in files.items()}
        outputs = {
            name: enter(create_raster(paths[name], grid, [*source.bands], source.kind))
            for name, source in modalities.items()
        }
        kind = np.dtype(np.uint16 if labels.overlapping else np.uint8)
        coded = create_raster(paths[LABELS], grid, ["label id"], kind, nodata=labels.ignore)
        first = zip(member.argmax(axis=0), labels.names, strict=True)  # code of a value alone
        enter(coded).update_tags(**{f"id_{code}": name for code, name in first})
        steps = windows(grid.height, grid.width)
        quiet = len(steps) == 1
        for window in tqdm(steps, scene.name, leave=False, unit="window", disable=quiet):
            codes = draw(window)
            seen_at_all = np.zeros(codes.shape, dtype=bool)
            for modality, source in modalities.items():
                pixels, seen = source.read(window)
                outputs[modality].write(pixels, window=window)
                outputs[modality].write_mask(seen, window=window)
                seen_at_all |= seen
                unseen[modality] += int((~seen).sum())
            codes[~seen_at_all] = labels.ignore
            coded.write(codes, 1, window=window)
            pixels_of += np.bincount(codes.ravel(), minlength=len(member))
    hashes = {file: file_sha256(folder / file) for file in files.values()}
    crs = grid.crs.to_wkt() if grid.crs else None
    label_pixels = dict(zip(labels.names, (pixels_of @ member).tolist(), strict=True))
    return PreparedScene(
        raw=raw, outputs=hashes, height=grid.height, width=grid.width, crs=crs,
        transform=tuple(grid.transform)[:6], modalities=scene.modalities,
        labelled_pixels=int(pixels_of[: labels.ignore].sum()), label_pixels=label_pixels,
        label_values=label_values, unseen_pixels=unseen,
    )  # fmt: skip


def create_raster(
    path: Path, grid: Grid, bands: Sequence[str], kind: np.dtype, **options: Any
) -> Any:
    """Open a tiled GeoTIFF on the grid for writing, with named bands; compressed by default."""
    if grid.georeferenced:
        options |= {"transform": grid.transform, "crs": grid.crs}
    default = {"predictor": 3 if np.issubdtype(kind, np.floating) else 2, **PROFILE}
    shape = {"width": grid.width, "height": grid.height, "count": len(bands), "dtype": kind}
    raster = rasterio.open(path, "w", **shape, **{**default, **options})
    raster.descriptions = tuple(bands)
    return raster
