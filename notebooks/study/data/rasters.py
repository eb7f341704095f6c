"""Prepare a data set: every band and the labels of a scene on one grid.

Written per scene: `<scene>/<modality>.tif`, with its bands in the manifest's order, in the type of
the source and with an internal mask of the pixels that the modality sees, and `<scene>/labels.tif`.
`prepared.json` beside them records what they were made from, so that no scene is made twice.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.windows import Window, intersection
from tqdm.auto import tqdm

from lsgs_core.errors import InputError
from study.data.alignment import ENVIRONMENT, AlignedRaster, Grid, grid_of
from study.data.folds import TABLE
from study.data.labels import code_names, membership, open_labels
from study.data.manifest import Dataset, Difference, FileBand, Slope
from study.data.prepared import LABELS, Prepared, PreparedScene, load_prepared, write_record
from study.data.raw_files import Scene, find_scenes
from study.files import file_sha256, written_beside

# A patch of 224 pixels reads half as much of small tiles; Zstandard is as small as deflate here and
# three times as fast to write, and twice to read.
PROFILE = {"driver": "GTiff", "tiled": True, "blockxsize": 128, "blockysize": 128}
PROFILE |= {"compress": "zstd", "zstd_level": 1, "BIGTIFF": "IF_SAFER"}


def prepare(dataset: Dataset, raw_folder: Path, prepared_folder: Path) -> Prepared:
    """Make the aligned rasters of all scenes that are not there yet, and return the record.

    A scene is kept when the definition, its raw files and its outputs are unchanged (by hash). Of
    the others every raw file is read before the first is worked on. A pixel that a modality does
    not see (nodata or NaN in any of its bands, or hidden by its mask) is 0 and masked in that
    modality; one that no modality sees is unknown in the labels.

    Raises:
        InputError: A raw file is missing, damaged, lies elsewhere than the reference band, or does
            not hold what the manifest says.
    """
    raw_folder, prepared_folder = Path(raw_folder), Path(prepared_folder)
    scenes = {scene.name: scene for scene in find_scenes(dataset, raw_folder)}
    files = sorted({file for scene in scenes.values() for file in scene.files})
    print(f"{len(scenes)} scenes, {len(files)} files; writes to {prepared_folder}")
    hashes = {f: file_sha256(f) for f in tqdm(files, desc="hash raw files", unit="file")}
    raw = {
        name: {file.relative_to(raw_folder).as_posix(): hashes[file] for file in scene.files}
        for name, scene in scenes.items()
    }
    definition = dataset.raster_definition()
    previous = load_prepared(prepared_folder)
    done = {
        name: made
        for name, made in (previous.scenes if previous else {}).items()
        if previous
        and previous.definition == definition
        and made.raw == raw.get(name)
        and all(_sha256(prepared_folder / n) == sha for n, sha in made.outputs.items())
    }
    pending = [scene for name, scene in scenes.items() if name not in done]
    with rasterio.Env(**ENVIRONMENT):
        grids, held = {}, dict[str, list[str]]()
        found = {v for made in done.values() for v, n in made.label_pixels.items() if n}
        found |= {value for made in done.values() for value in made.label_values}
        for scene in tqdm(pending, desc="check", unit="scene"):
            grids[scene.name], values = check_scene(dataset, scene)
            held[scene.name] = sorted(values)
            found |= values
        if pending and (absent := dataset.labels.not_in(found)):
            raise InputError(f"labels.values: {absent} occur in no scene of {raw_folder}")
        if pending:
            begun = Prepared(definition=definition, scenes=done, complete=False)
            write_record(begun, prepared_folder)
            (prepared_folder / TABLE).unlink(missing_ok=True)  # its patches are of other rasters
        total = sum(len(grids[scene.name].windows()) for scene in pending)
        with tqdm(total=total, desc="align", unit="window") as bar:
            written = 0.0
            for scene in pending:
                bar.set_postfix(scene=scene.name, refresh=False)
                done[scene.name] = _prepare_scene(
                    dataset, scene, prepared_folder, grids[scene.name], raw[scene.name], bar
                ).model_copy(update={"label_values": held[scene.name]})
                # A killed preparation goes on from here. With thousands of small scenes the record
                # is written every ten seconds, or the writing would take most of the time.
                if time.monotonic() - written > 10:
                    write_record(begun.model_copy(update={"scenes": done}), prepared_folder)
                    written = time.monotonic()
    ordered = {name: done[name] for name in scenes}
    unchanged = previous and previous.complete and list(ordered) == list(previous.scenes)
    if pending or not unchanged:
        write_record(Prepared(definition=definition, scenes=ordered), prepared_folder)
    return Prepared(definition=definition, scenes=ordered)


def check_scene(dataset: Dataset, scene: Scene) -> tuple[Grid, set[str]]:
    """Read all raw files of a scene once; return its grid and the label values that it has.

    Raises:
        InputError: As `prepare`.
    """
    reference = dataset.file_band(dataset.reference_band)
    grid = grid_of(scene.bands[dataset.reference_band], reference)
    with ExitStack() as stack:
        sources = {m: _Modality(dataset, scene, m, grid, stack) for m in scene.modalities(dataset)}
        for raster in {r.path: r for s in sources.values() for r in s.rasters}.values():
            raster.check()
        draw = stack.enter_context(open_labels(dataset.labels, scene, grid))
        member = membership(dataset.labels)
        found = np.zeros(member.shape[1], dtype=bool)
        for window in grid.windows():
            found |= member[np.unique(draw(window))].any(axis=0)
    names = dataset.labels.names
    return grid, {name for name, there in zip(names, found, strict=True) if there}


def _sha256(path: Path) -> str:
    """Return the hash of a file, "" when there is none."""
    return file_sha256(path) if path.is_file() else ""


class _Modality:
    """The bands of one modality of one scene, with those that are derived and its mask."""

    def __init__(
        self, dataset: Dataset, scene: Scene, name: str, grid: Grid, stack: ExitStack
    ) -> None:
        self.grid = grid
        self.bands = {band: dataset.bands[band] for band in dataset.modalities[name]}
        sources = dict.fromkeys(s for b in self.bands for s in dataset.sources(b))
        # One opening per file and way of placing it: its channels are read together.
        groups: dict[Any, list[str]] = {}
        for source in sources:
            band = dataset.file_band(source)
            how = band.model_dump_json(exclude={"channel", "description"})
            groups.setdefault((scene.bands[source], how), []).append(source)
        self.rasters, self.order = [], []
        in_files = [b for b in dataset.bands.values() if isinstance(b, FileBand)]
        for (path, _), names in groups.items():
            used = [dataset.file_band(band) for band in names]
            channels = [band.channel for band in used]
            known = [band.channel for band in in_files if band.file == used[0].file]
            raster = AlignedRaster(
                path, used[0], grid, channels, dataset.resampling, used[0].nodata, known
            )
            self.rasters.append(stack.enter_context(raster))
            self.order += names
            wanted = used[0].channel_count
            if wanted and raster.raw.count != wanted:
                raise InputError(f"{path}: expected {wanted} channels, found {raster.raw.count}")
            for band, channel in zip(used, raster.channels, strict=True):
                told = raster.raw.descriptions[channel - 1]
                if band.description and told and told != band.description:
                    raise InputError(
                        f"{path}: expected {band.description!r} as channel {channel}, "
                        f"found {told!r}: are bands swapped?"
                    )
        self.unseen: list[int] = []
        if name in scene.masks:
            mask = dataset.masks[name]
            self.unseen = mask.unseen
            raster = AlignedRaster(scene.masks[name], mask, grid, [mask.channel])
            self.rasters.append(stack.enter_context(raster))
        self.halo = int(any(isinstance(band, Slope) for band in self.bands.values()))
        derived = any(not isinstance(band, FileBand) for band in self.bands.values())
        kinds = [raster.kind for raster in self.rasters[: len(groups)]]
        self.kind = np.result_type(*kinds, *([np.float32] if derived else []))

    def read(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """Return the bands [D, h, w], 0 where not seen, and where all are seen [h, w]."""
        wide, inner = _widened(window, self.halo, self.grid)
        parts = [raster.read(wide) for raster in self.rasters]
        if self.unseen:
            mask, known = parts.pop()
            hidden = np.isin(mask[0], self.unseen) | ~known
        else:
            hidden = np.zeros(parts[0][1].shape, dtype=bool)
        seen = np.logical_and.reduce([inside for _, inside in parts]) & ~hidden
        pixels = dict(zip(self.order, (b for bands, _ in parts for b in bands), strict=True))
        made = []
        for name, band in self.bands.items():
            if isinstance(band, Difference):
                first, second = (pixels[source].astype(np.float32) for source in band.difference)
                made.append(first - second)
            elif isinstance(band, Slope):
                heights = np.where(seen, pixels[band.slope], np.nan).astype(np.float32)
                down, across = np.gradient(heights, band.pixel_size)
                made.append(np.degrees(np.arctan(np.hypot(down, across))))
            else:
                made.append(pixels[name])
        stacked = np.stack(made).astype(self.kind)[(slice(None), *inner)]
        seen = seen[inner] & np.isfinite(stacked).all(axis=0)  # no slope beside a hole
        stacked[:, ~seen] = 0
        return stacked, seen


def _widened(window: Window, halo: int, grid: Grid) -> tuple[Window, tuple[slice, slice]]:
    """Return a window with a halo, cut at the grid's edge, and where the inner one lies in it."""
    top, left = window.row_off - halo, window.col_off - halo
    around = Window(left, top, window.width + 2 * halo, window.height + 2 * halo)
    wide = intersection(around, Window(0, 0, grid.width, grid.height))
    row, column = window.row_off - wide.row_off, window.col_off - wide.col_off
    inner = slice(row, row + window.height), slice(column, column + window.width)
    return wide, inner


def _prepare_scene(
    dataset: Dataset,
    scene: Scene,
    folder: Path,
    grid: Grid,
    hashes: dict[str, str],
    bar: Any,
) -> PreparedScene:
    """Write all rasters of one scene and return its record."""
    (folder / scene.name).mkdir(parents=True, exist_ok=True)
    labels, present = dataset.labels, scene.modalities(dataset)
    files = {name: f"{scene.name}/{name}.tif" for name in [*present, LABELS]}
    member = membership(labels)
    counts = np.zeros(member.shape[1], dtype=np.int64)
    labelled = 0
    unseen = dict.fromkeys(present, 0)
    with ExitStack() as stack:
        sources = {m: _Modality(dataset, scene, m, grid, stack) for m in present}
        draw = stack.enter_context(open_labels(labels, scene, grid))
        written = {
            name: stack.enter_context(written_beside(folder / file)) for name, file in files.items()
        }
        with ExitStack() as opened:
            outputs = {
                m: opened.enter_context(_create(written[m], grid, list(s.bands), s.kind))
                for m, s in sources.items()
            }
            kind = np.dtype(np.uint16 if labels.overlapping else np.uint8)
            output = opened.enter_context(
                _create(written[LABELS], grid, ["label id"], kind, nodata=labels.ignore)
            )
            output.update_tags(**{f"id_{code}": name for code, name in code_names(labels).items()})
            for window in grid.windows():
                codes = draw(window)
                anywhere = np.zeros(codes.shape, dtype=bool)
                for modality, source in sources.items():
                    pixels, seen = source.read(window)
                    outputs[modality].write(pixels, window=window)
                    outputs[modality].write_mask(seen, window=window)
                    anywhere |= seen
                    unseen[modality] += int((~seen).sum())
                codes[~anywhere] = labels.ignore
                output.write(codes, 1, window=window)
                present_codes, number = np.unique(codes, return_counts=True)
                labelled += int((codes != labels.ignore).sum())
                counts += number @ member[present_codes].astype(np.int64)
                bar.update()
    return PreparedScene(
        raw=hashes,
        outputs={file: file_sha256(folder / file) for file in files.values()},
        height=grid.height,
        width=grid.width,
        crs=grid.crs.to_wkt() if grid.crs else None,
        transform=tuple(grid.transform)[:6],
        modalities=present,
        labelled_pixels=labelled,
        label_pixels=dict(zip(labels.names, counts.tolist(), strict=True)),
        unseen_pixels=unseen,
    )


def _create(path: Path, grid: Grid, bands: Sequence[str], kind: np.dtype, **options: Any) -> Any:
    """Open a tiled, compressed GeoTIFF on the grid for writing, its bands named."""
    place: Mapping[str, Any] = {"width": grid.width, "height": grid.height}
    if grid.georeferenced:
        place = {**place, "transform": grid.transform, "crs": grid.crs}
    predictor = 3 if np.issubdtype(kind, np.floating) else 2
    options |= {"count": len(bands), "dtype": kind, "predictor": predictor} | PROFILE
    raster = rasterio.open(path, "w", **place, **options)
    raster.descriptions = tuple(bands)
    return raster
