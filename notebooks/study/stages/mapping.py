"""Maps of whole scenes as Cloud Optimized GeoTIFFs, in memory that does not grow with the scene.

A network sees overlapping windows of the size of its training patches, each with the modalities
that see any pixel of it, as in training. Probabilities are averaged with weights that fall towards
the edge of a window. A scene is mapped in blocks of `STEP` pixels, each with all the windows that
touch it; windows on the edge between blocks are predicted for each of them.
"""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import quoteattr

import numpy as np
import pandas as pd
import rasterio
import rasterio.shutil
import torch
from affine import Affine
from matplotlib.colors import to_rgba
from numpy.typing import NDArray
from rasterio.windows import Window
from torch import Tensor
from tqdm.auto import tqdm

from lsgs_core.errors import InputError, check_shape
from study.data.alignment import ENVIRONMENT, SCALE_TOLERANCE, STEP, Grid, grid_of, windows
from study.data.colours import GREY, category_colours, class_colours
from study.data.manifest import Slope, load_manifest
from study.data.preparation import AlignedModality, create_raster, open_modalities
from study.data.raw_files import Scene, fetch, find_scenes
from study.metrics.evaluation import THRESHOLD, scenario_scores
from study.provenance.artifacts import Record, is_made, save, save_json, save_table
from study.provenance.devices import choose_device, make_deterministic
from study.provenance.files import explaining_a_full_disk, file_sha256, make_folder
from study.provenance.freshness import fingerprint
from study.provenance.schema import read_json
from study.training.checkpoints import TrainedNetwork, load_network

# A raster, its COG with overviews, and the overviews alone, which GDAL writes first.
DISK_FACTOR = 1 + 4 / 3 + 1 / 3


class Layer(NamedTuple):
    """A raster of a map."""

    name: str
    kind: Any
    nodata: float
    bands: tuple[str, ...]
    categories: Mapping[int, tuple[str, str]]  # name and colour of each


@dataclass(frozen=True)
class MapPlan:
    """A map that is to be made; everything is checked that can be known before."""

    network: TrainedNetwork
    scene: Scene  # with the modalities that are there
    grid: Grid
    folder: Path
    size: int  # side of a window
    stride: int  # pixels from one window to the next
    batch_size: int  # windows that are predicted together
    colours: Mapping[str, str]  # of classes, by name
    record: Record  # what the map is made with and from

    @property
    def layers(self) -> tuple[Layer, Layer, Layer]:
        """Return the rasters of the map."""
        kind, classes = self.network.description.task_kind, tuple(self.network.description.classes)
        colours = zip(classes, class_colours(classes, self.colours), strict=True)
        values = {} if kind == "multiclass" else {0: ("none of the classes", GREY)}
        values |= dict(enumerate(colours, start=1))
        masked = kind == "multilabel"
        bands = ("likeliest class", *["bit mask of the classes from .5, first is 1"] * masked)
        type_of_class = np.uint16 if masked and len(classes) > 7 else np.uint8
        names, masks = self.network.scenarios.names, self.network.scenarios.masks
        sensors = (masks << np.arange(masks.shape[1])).sum(axis=1).tolist()
        shown = zip(names, category_colours(len(names)), strict=True)
        scenarios = dict(zip(sensors, shown, strict=True))
        type_of_scenario = np.uint16 if masks.shape[1] > 8 else np.uint8
        served = ("bit mask of sensors, first is 1",)
        return (
            Layer("classes", type_of_class, np.iinfo(type_of_class).max, bands, values),
            Layer("probabilities", np.float32, np.nan, classes, {}),
            Layer("scenarios", type_of_scenario, 0, served, scenarios),
        )

    def path(self, layer: Layer, finished: bool = True) -> Path:
        """Return the file of a raster, or the one that grows until it is copied to it."""
        return self.folder / f"{'' if finished else 'unfinished_'}{layer.name}.tif"

    def windows(self, block: Window) -> list[tuple[int, int]]:
        """Return row and column of the windows that touch a block; the last end with the scene."""
        rows = self.grid.height, block.row_off, block.height
        sides = []
        for length, start, count in (rows, (self.grid.width, block.col_off, block.width)):
            places = [*range(0, length - self.size, self.stride), length - self.size]
            sides.append([p for p in places if start - self.size < p < start + count])
        return [*product(*sides)]


def plan_maps(parameters: Mapping[str, Any], without: str = "") -> list[MapPlan]:
    """Check what the maps of a data set need, before long work, and return a plan for each scene.

    Parameters are those of notebook 06; `without` names modalities that are taken to be missing,
    joined by "+".

    Raises `InputError` where a name is unknown, weights or files are missing or damaged, the bands
    are not those of the network, or a scene has another pixel size or is smaller than a window.
    """
    name, raw = parameters["dataset"], parameters["raw"]
    dataset = load_manifest(Path(parameters["manifest"])).dataset(name)
    make_deterministic(parameters["threads"])
    device = choose_device(parameters["device"])
    network = load_network(parameters["weights"], device=device)
    description = network.description
    bands = {modality: dataset.modalities.get(modality, []) for modality in description.bands}
    if bands != description.bands:
        raise InputError(f"weights: need the bands {description.bands}, {name} has {bands}")
    if description.task_kind == "multilabel" and len(description.classes) > 15:
        raise InputError("weights: a multi-label map has room for 15 classes")
    size = parameters["patch_size"] or description.patch_size
    stride = parameters["patch_stride"] or -(-size // 2)
    if stride > size:
        raise InputError(f"patch_stride: expected at most the patch size {size}, found {stride}")
    gone = set(filter(None, without.split("+")))
    if gone - bands.keys():
        raise InputError(f"missing: expected some of {[*bands]}, found {without!r}")
    download = Path(parameters["downloads"]) / name
    folder = Path(raw) if raw else fetch(dataset.source, download)
    scenes = {scene.name: scene for scene in find_scenes(dataset, folder, complete=False)}
    plans = []
    for chosen in parameters["scenes"].split(",") if parameters["scenes"] else scenes:
        if chosen not in scenes:
            raise InputError(f"scenes: expected some of {[*scenes]}, found {chosen!r}")
        there = scenes[chosen].modalities
        kept = [modality for modality in bands if modality in there and modality not in gone]
        if not kept:
            expected = "expected a sensor with its files that is not in `missing`"
            raise InputError(f"scene {chosen}: {expected}, found {there} without {without!r}")
        scene = replace(scenes[chosen], modalities=kept)
        grid = _grid(network, scene, size, parameters["resample"])
        inputs = {file.relative_to(folder).as_posix(): file_sha256(file) for file in scene.files}
        inputs |= {"weights": network.sha256}
        # Maps of other files or by other weights lie beside each other.
        key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:8]
        made_with = {"scene": chosen, "modalities": kept, "patch_size": size, "stride": stride}
        made_with |= {"pixel_size": grid.pixel_size, "threads": parameters["threads"]}
        own = f"{chosen}-{key}-without-{without}" if without else f"{chosen}-{key}"
        target = Path(parameters["work"], "maps", name, own)
        record = Record(made_with, inputs | {"code": fingerprint("mapping")}, str(device))
        how = size, stride, parameters["batch_size"], dataset.colours, record
        plans.append(MapPlan(network, scene, grid, target, *how))
    return plans


def _grid(network: TrainedNetwork, scene: Scene, size: int, resample: bool) -> Grid:
    """Return the grid of a map, after checking the scene."""
    path, grid = scene.reference_file, grid_of(scene.reference_file, scene.reference)
    wanted, found = network.description.pixel_size, grid.pixel_size
    if wanted and found and abs(found / wanted - 1) > SCALE_TOLERANCE:
        if not resample:
            raise InputError(
                f"{path}: expected pixels of {wanted:.4g} m, on which the network was trained, "
                f"found {found:.4g} m; set `resample` to bring the scene to them"
            )
        used = (band for m in scene.modalities for band in scene.dataset.modalities[m])
        if any(isinstance(scene.dataset.bands[band], Slope) for band in used):
            raise InputError(f"resample: {scene.name} has slopes, defined at its own pixel size")
        height, width = (round(side * found / wanted) for side in (grid.height, grid.width))
        scale = Affine.scale(grid.width / width, grid.height / height)
        grid = Grid(grid.crs, grid.transform * scale, width, height)
    if min(grid.height, grid.width) < size:
        raise InputError(
            f"{path}: expected at least the {size} × {size} pixels of a window, found "
            f"{grid.height} × {grid.width}"
        )
    with open_modalities(scene, grid):
        return grid


def make_map(plan: MapPlan) -> pd.DataFrame:
    """Make a map, or finish one that was interrupted, and return what served how much of it.

    Returns:
        A row per scenario that served a pixel, and one for what no modality sees ("no data"):
        scenario, pixels, share of the scene, and iou, which evaluation found where the records of
        the network lie beside its weights (else NaN).

    Raises `InputError` where the disk has no room, a file is damaged, or logits are not finite or
    not [B, C, H, W], and `OSError` for a full disk; the next call goes on.
    """
    print("writes to:", make_folder(plan.folder))
    if not all(is_made(plan.path(layer), plan.record) for layer in plan.layers):
        depth = sum(np.dtype(layer.kind).itemsize * len(layer.bands) for layer in plan.layers)
        needed = DISK_FACTOR * depth * plan.grid.width * plan.grid.height
        free = shutil.disk_usage(plan.folder).free
        free += sum(path.stat().st_size for path in plan.folder.glob("*.tif"))
        if needed > free:
            raise InputError(f"{plan.folder}: expected {needed:.2g} free bytes, found {free:.2g}")
        with rasterio.Env(**ENVIRONMENT):
            _predict_scene(plan)
            for layer in plan.layers:
                save(plan.path(layer), partial(_copy, plan, layer), plan.record)
    for path in plan.folder.glob("unfinished*"):
        path.unlink()
    table = _served(plan)
    save_table(plan.folder / "served.csv", table, plan.record)
    return table


def sentence(plan: MapPlan, table: pd.DataFrame) -> str:
    """Return the table of `make_map` as a sentence that begins with the name of the folder."""
    scores = [f" (IoU {iou:.3f} in evaluation)" if iou == iou else "" for iou in table["iou"]]
    rows = zip(table["share"], table["scenario"], scores, strict=True)
    parts = [f"{share:.1%} from {scenario}{score}" for share, scenario, score in rows]
    return f"{plan.folder.name}: {table['pixels'].sum():,} pixels were mapped: {', '.join(parts)}."


def _predict_scene(plan: MapPlan) -> None:
    """Write the rasters of a map; of an interrupted one, the rows of blocks that are missing."""
    state, blocks = plan.folder / "unfinished.json", windows(plan.grid.height, plan.grid.width)
    done = read_json(state)["rows"] if is_made(state, plan.record) else 0
    paths = [plan.path(layer, finished=False) for layer in plan.layers]
    for path, layer in zip(paths, plan.layers, strict=True) if not done else ():
        _create(path, plan.grid, layer)
    counts = {block: len(plan.windows(block)) for block in blocks}
    before = sum(count for block, count in counts.items() if block.row_off < done)
    with (
        open_modalities(plan.scene, plan.grid) as modalities,
        explaining_a_full_disk(state, "what is mapped is kept, and the next run goes on"),
        tqdm(total=sum(counts.values()), initial=before, unit="patch") as bar,
    ):
        for row in range(done, plan.grid.height, STEP):
            with ExitStack() as stack:  # closed after every row, so that a kill loses no more
                rasters = [stack.enter_context(rasterio.open(path, "r+")) for path in paths]
                for block in blocks:
                    if block.row_off == row:
                        values = _values(plan, *_map_block(plan, modalities, block, bar.update))
                        for raster, bands in zip(rasters, values, strict=True):
                            raster.write(bands, window=block)
            save_json(state, {"rows": row + STEP}, plan.record)


def _map_block(
    plan: MapPlan,
    modalities: Mapping[str, AlignedModality],
    block: Window,
    progress: Callable[[int], object],
) -> tuple[Tensor, Tensor]:
    """Return the probabilities in a block [C, h, w], and which modalities see it [M, h, w]."""
    description, size, places = plan.network.description, plan.size, plan.windows(block)
    (top, left), (bottom, right) = places[0], places[-1]
    height, width = bottom + size - top, right + size - left
    images, seen = [], torch.zeros(len(description.bands), height, width, dtype=torch.bool)
    for number, (name, bands) in enumerate(description.bands.items()):
        image = np.zeros((len(bands), height, width), np.float32)
        if name in modalities:
            pixels, with_data = modalities[name].read(Window(left, top, width, height))
            description.normalise(name, pixels, with_data, image)
            seen[number] = torch.from_numpy(with_data)
        images.append(torch.from_numpy(image))
    ramp = torch.hann_window(size + 2, periodic=False)[1:-1]
    weight = ramp[:, None] * ramp
    total, mass = torch.zeros(len(description.classes), height, width), torch.zeros(height, width)
    cuts = [
        (..., *Window(column - left, row - top, size, size).toslices()) for row, column in places
    ]
    for start in range(0, len(cuts), plan.batch_size):
        part = cuts[start : start + plan.batch_size]
        available = torch.stack([seen[cut].flatten(1).any(dim=1) for cut in part])
        served = available.any(dim=1)  # what no modality sees is not predicted
        if bool(served.any()):
            shown = [cut for cut, is_served in zip(part, served, strict=True) if is_served]
            patches = [torch.stack([image[cut] for cut in shown]) for image in images]
            predicted = _predict(plan.network, patches, available[served])
            for cut, probability in zip(shown, predicted, strict=True):
                total[cut] += weight * probability
                mass[cut] += weight
        progress(len(part))
    place = block.col_off - left, block.row_off - top
    inner = ..., *Window(*place, block.width, block.height).toslices()
    return (total / mass)[inner], seen[inner]


@torch.inference_mode()
def _predict(network: TrainedNetwork, images: list[Tensor], available: Tensor) -> Tensor:
    """Return the probabilities of patches on the CPU, [B, C, H, W]."""
    device = next(network.model.parameters()).device
    logits = network.model([image.to(device) for image in images], available.to(device))
    expected = [len(available), len(network.description.classes), *images[0].shape[2:]]
    check_shape(f"logits of {network.weights}", logits, expected)
    if not bool(torch.isfinite(logits).all()):
        raise InputError(f"logits of {network.weights}: expected finite numbers")
    exclusive = network.description.task_kind == "multiclass"
    return (logits.softmax(dim=1) if exclusive else logits.sigmoid()).float().cpu()


def _values(plan: MapPlan, probabilities: Tensor, seen: Tensor) -> list[NDArray[Any]]:
    """Return what the rasters hold in a block, each [bands, h, w]."""
    kind, visible = plan.network.description.task_kind, seen.any(dim=0)
    reached, likeliest = probabilities >= THRESHOLD, probabilities.argmax(dim=0) + 1
    classes = [likeliest if kind == "multiclass" else likeliest * reached.any(dim=0)]
    classes += [_bits(reached)] * (kind == "multilabel")
    rasters = torch.stack(classes), probabilities, _bits(seen)[None]
    return [
        bands.where(visible, layer.nodata).numpy().astype(layer.kind)
        for bands, layer in zip(rasters, plan.layers, strict=True)
    ]


def _bits(masks: Tensor) -> Tensor:
    """Return bool [n, h, w] as one integer per pixel; the first mask is 1, the next 2."""
    return (masks << torch.arange(len(masks))[:, None, None]).sum(dim=0)


def _create(path: Path, grid: Grid, layer: Layer) -> None:
    """Make an empty raster of a map, with names and colours of its values.

    All its bytes are written now: what comes later is written over them, needs no more room, and
    leaves a readable file wherever it is interrupted.
    """
    plain = {"nodata": layer.nodata, "compress": "NONE", "predictor": 1, "sparse_ok": False}
    with create_raster(path, grid, layer.bands, np.dtype(layer.kind), **plain) as raster:
        raster.update_tags(**{f"id_{value}": name for value, (name, _) in layer.categories.items()})
        colours = {value: to_rgba(colour) for value, (_, colour) in layer.categories.items()}
        if colours:
            table = {value: tuple(round(255 * c) for c in rgba) for value, rgba in colours.items()}
            raster.write_colormap(1, {**table, int(layer.nodata): (0, 0, 0, 0)})
    with path.open("rb+") as file:  # GDAL leaves holes where all is zero
        while part := file.read(1 << 20):
            file.seek(-len(part), os.SEEK_CUR)
            file.write(part)


def _copy(plan: MapPlan, layer: Layer, target: Path) -> None:
    """Copy a raster of a map to a COG, and write a style for QGIS beside it."""
    measured = {"overview_resampling": "AVERAGE", "predictor": "YES"}
    options = {"overview_resampling": "NEAREST"} if layer.categories else measured
    source = plan.path(layer, finished=False)
    rasterio.shutil.copy(source, target, driver="COG", compress="DEFLATE", bigtiff="YES", **options)
    if not layer.categories:
        return
    _make_opaque(target)
    entries = "".join(
        f"<paletteEntry value='{value}' color='{colour}' label={quoteattr(name)} alpha='255'/>"
        for value, (name, colour) in layer.categories.items()
    )
    plan.path(layer).with_suffix(".qml").write_text(
        "<qgis><pipe><rasterrenderer type='paletted' band='1' opacity='1' alphaBand='-1'>"
        f"<colorPalette>{entries}</colorPalette></rasterrenderer></pipe></qgis>\n",
        "utf-8",
    )


def _make_opaque(path: Path) -> None:
    """Take back that the second band of a BigTIFF is transparency.

    GDAL says so of any band beside one with a colour table: tag 338, also of overviews.
    """
    with path.open("rb+") as file:
        [offset] = struct.unpack("<8xQ", file.read(16))
        while offset:
            file.seek(offset)
            [count] = struct.unpack("<Q", file.read(8))
            entries = file.read(20 * count + 8)
            for place in range(0, 20 * count, 20):
                if struct.unpack_from("<H", entries, place) == (338,):
                    file.seek(offset + 8 + place + 12)
                    file.write(bytes(2))
            [offset] = struct.unpack_from("<Q", entries, 20 * count)


def _served(plan: MapPlan) -> pd.DataFrame:
    """Return which scenario served how many pixels of a map, as `make_map` does."""
    layer = plan.layers[2]
    counts = np.zeros(max(layer.categories) + 1, dtype=np.int64)
    with rasterio.open(plan.path(layer)) as raster:
        for window in windows(*raster.shape):
            counts += np.bincount(raster.read(1, window=window).ravel(), minlength=len(counts))
    names = {value: name for value, (name, _) in layer.categories.items()} | {0: "no data"}
    rows = [(name, counts[value]) for value, name in names.items() if counts[value]]
    table = pd.DataFrame(rows, columns=["scenario", "pixels"])
    table["share"] = table["pixels"] / counts.sum()
    if (records := plan.network.records()) is None:
        return table.assign(iou=np.nan)
    scores = scenario_scores(records.assign(network=""), ["network"])
    return table.merge(scores[["scenario", "iou"]], how="left")
