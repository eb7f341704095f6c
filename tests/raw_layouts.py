"""Tiny data sets in the exact raw layouts of DSTL, Potsdam, Hunan and the authors' patches.

Each has the traps of the real one and a signal of each class in each modality. Writers return the
label codes that preparation has to give per scene, made without any of the project's code.
"""

from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import rasterio
import scipy.io
import shapely
import yaml
from numpy.typing import NDArray
from scene import MANIFEST, write_raster
from study.data.manifest import Dataset

ENTRIES: dict[str, Any] = yaml.safe_load(MANIFEST.read_text("utf-8"))["datasets"]
UTM = "EPSG:32650"
Codes = dict[str, NDArray[Any]]
Ring = list[tuple[float, float]]


def dataset(name: str, **changes: Any) -> Dataset:
    """A data set of the project's manifest, with some of its fields replaced."""
    return Dataset.model_validate(ENTRIES[name] | changes)


def read_raster(path: Path) -> NDArray[Any]:
    with rasterio.open(path) as raster:
        return raster.read()


def rewrite(path: Path, change: Any = lambda pixels: pixels, **place: Any) -> None:
    """Write a raster again with other pixels, or at another place."""
    with rasterio.open(path) as raster:
        profile = {"crs": raster.crs, "transform": raster.transform} | place
        pixels = raster.read()
    write_raster(path, np.ascontiguousarray(change(pixels)), **profile)


def read_mask(path: Path) -> NDArray[np.bool_]:
    """Where the first channel has data, [H, W]."""
    with rasterio.open(path) as raster:
        return raster.read_masks(1) > 0


def cells(shape: tuple[int, int], values: Any, side: int) -> NDArray[np.uint8]:
    """Squares that go through the values, [H, W]."""
    row, column = np.indices(shape) // side
    return np.asarray(values, np.uint8)[(row * -(-shape[1] // side) + column) % len(values)]


def signal(codes: NDArray[Any], bands: int, seed: int, level: float = 100) -> NDArray[Any]:
    """Bands [D, H, W] in which every code has a level of its own, with noise of 3."""
    height = np.random.default_rng(1).uniform(level, level + 60, (bands, 65536))
    return height[:, codes] + np.random.default_rng(seed).normal(0, 3, (bands, *codes.shape))


LABELLED = {"6010_0_0": (200, 225), "6010_1_2": (225, 200), "6110_3_1": (1300, 100)}
DSTL_SHAPES = LABELLED | {"6120_2_2": (200, 200)}
SWIR_ROWS = {"6110_3_1": 51}  # and not 52: as 133 and 134 in the real data
EXTENTS = {name: (0.0091 + 3e-5 * n, -0.0089 - 5e-5 * n) for n, name in enumerate(DSTL_SHAPES)}


def box(left: float, top: float, right: float, bottom: float) -> Ring:
    return [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]


BOW_TIE = [(21.3, 120.2), (61.4, 171.9), (61.4, 120.2), (21.3, 171.9), (21.3, 120.2)]
TRACK = [(5.2, 215.9), (190.4, 100.3), (195.1, 108.6), (9.7, 223.2), (5.2, 215.9)]
MANY = [(x, y) for y in range(0, 1300, 8) for x in range(50, 100, 10)]  # too long for Python's csv
# Image, class and polygons (an outer ring, then holes) in pixels. Trees and crops overlap.
POLYGONS: list[tuple[str, int, list[list[Ring]]]] = [
    ("6010_0_0", 1, [[box(8.2, 12.7, 60.4, 70.1), box(20.7, 30.3, 35.9, 44.2)]]),
    ("6010_0_0", 3, [[BOW_TIE]]),
    ("6010_0_0", 5, [[box(100.3, 20.2, 223.3, 90.8)], [box(180.7, 150.1, 223.6, 198.6)]]),
    ("6010_0_0", 6, [[box(80.6, 60.3, 160.7, 150.4)]]),
    ("6010_1_2", 2, [[box(10.3, 10.2, 70.8, 60.9)]]),
    ("6010_1_2", 4, [[TRACK]]),
    ("6010_1_2", 6, [[box(90.2, 20.1, 197.9, 140.3)]]),
    ("6010_1_2", 7, [[box(10.3, 80.2, 70.8, 130.9)]]),
    ("6010_1_2", 8, [[box(110.4, 160.2, 190.8, 222.7)]]),
    ("6110_3_1", 6, [[box(-3.5, 200.2, 40.3, 420.7)], [box(2.1, 900.3, 40.3, 1310.2)]]),
    ("6110_3_1", 9, [[box(10.2, 20.4, 40.1, 90.3)], [box(5.3, 600.2, 40.4, 700.3)]]),
    ("6110_3_1", 10, [[box(x + 0.21, y + 0.37, x + 4.83, y + 5.71)] for x, y in MANY]),
]


def well_known_text(image: str, shapes: shapely.MultiPolygon) -> str:
    """Polygons in the coordinates of DSTL's table."""
    height, width = DSTL_SHAPES[image]
    scale = EXTENTS[image] * np.array([(n + 1) / n**2 for n in (width, height)])
    scaled = shapely.transform(shapes, lambda pixels: pixels * scale)
    return shapely.to_wkt(scaled, rounding_precision=-1)


def write_dstl(folder: Path) -> Codes:
    """Three labelled images and one that the table does not name."""
    expected, rows = {}, ["ImageId,ClassType,MultipolygonWKT"]
    polygons = {(image, kind): shapes for image, kind, shapes in POLYGONS}
    for number, (image, shape) in enumerate(DSTL_SHAPES.items()):
        codes = np.zeros(shape, dtype=np.uint16)
        y, x = np.indices(shape) + 0.5  # centres of the pixels
        for kind in range(1, 11) if image in LABELLED else []:
            rings = polygons.get((image, kind), [])
            drawn = shapely.MultiPolygon([(outer, holes) for outer, *holes in rings])
            rows.append(f'{image},{kind},"{well_known_text(image, drawn)}"')
            codes[shapely.contains_xy(drawn, x, y)] |= np.uint16(1 << (kind - 1))
            expected[image] = codes
        files = {"three_band/{}.tif": (3, 1), "sixteen_band/{}_P.tif": (1, 1)}
        files |= {"sixteen_band/{}_M.tif": (8, 4), "sixteen_band/{}_A.tif": (8, 25)}
        for file, (bands, step) in files.items():
            down, across = (round(length / step) for length in shape)
            down = SWIR_ROWS.get(image, down) if step == 25 else down
            row = ((np.arange(down) + 0.5) * shape[0] / down).astype(int)[:, None]
            column = ((np.arange(across) + 0.5) * shape[1] / across).astype(int)
            pixels = signal(codes[row, column], bands, 10 * number + bands, 300 + 40 * step)
            write_raster(folder / file.format(image), pixels.round().astype(np.uint16))
    (folder / "train_wkt_v4.csv").write_text("\n".join(rows) + "\n", "utf-8")
    extents = [",Xmax,Ymin", *(f"{image},{x},{y}" for image, (x, y) in EXTENTS.items())]
    (folder / "grid_sizes.csv").write_text("\n".join(extents) + "\n", "utf-8")
    return expected


TILES = ["2_10", "2_11", "3_12", "4_12", "6_7", "7_12", "2_13", "3_13", "6_14", "7_13"]
NARROW, LOSSY, OWN_APPROACH, NESTED, NOT_ALPHA = "3_13", ["4_12", "6_7"], "2_11", "2_10", "7_12"
COLOURS = ["000000", "ffffff", "0000ff", "00ffff", "00ff00", "ffff00", "ff0000"]
DARK = np.s_[40:48, 8:20]  # where near infrared is 0


def write_potsdam(folder: Path) -> Codes:
    """Ten tiles of both lists of the contest."""
    expected, palette = {}, np.array([list(bytes.fromhex(c)) for c in COLOURS], dtype=np.int64)
    for number, tile in enumerate(TILES):
        codes = np.roll(cells((96, 96), range(1, 7), 16), 16 * number, axis=1)
        codes[::16], codes[:, ::16] = 0, 0  # boundaries
        labels = np.moveaxis(palette[codes], -1, 0)
        if tile in LOSSY:
            labels = abs(labels - np.random.default_rng(number).integers(0, 8, labels.shape))
        labels = labels.astype(np.uint8)
        image = signal(codes, 4, number).round().astype(np.uint8)
        image[3][DARK] = 0
        height, elevation = signal(codes, 2, number + 20)[:, None]
        if tile == NARROW:
            height, elevation = height[..., :-1], elevation[..., :-1]
        padded = "dsm_potsdam_{:02}_{:02}".format(*map(int, tile.split("_")))
        method = "ownapproach" if tile == OWN_APPROACH else "lastools"
        for where, name, pixels in (
            ("4_Ortho_RGBIR", f"top_potsdam_{tile}_RGBIR.tif", image),
            ("1_DSM", f"{padded}.tif", elevation.astype(np.float32)),
            ("1_DSM_normalisation", f"{padded}_normalized_{method}.jpg", height.astype(np.uint8)),
            ("5_Labels_all_noBoundary", f"top_potsdam_{tile}_label_noBoundary.tif", labels),
        ):
            # GDAL tags the last of four bands of 8 bits as alpha; other writers do not.
            plain = {"photometric": "MINISBLACK"} if tile == NOT_ALPHA and len(pixels) == 4 else {}
            inside = f"{where}/{where}" if tile == NESTED else where
            driver = "JPEG" if name.endswith("jpg") else "GTiff"
            write_raster(folder / inside / name, pixels, driver, **plain)
        expected[tile] = np.where(codes > 0, codes, 255)
    return expected


HUNAN = {"train": ["1", "2", "3", "10"], "val": ["1", "21"], "test": ["2", "31"]}
PUBLISHED = [255, 0, 1, 2, 1, 3, 4, 6, 6, 5, 6, 7, 255]  # for 0 … 12; 255 counts as 12
RAW_VALUES = [*range(13), 255]
PER_COLUMN, PER_ROW = 3.0, -4.0  # metres of height per pixel of 10 m


def write_hunan(folder: Path) -> Codes:
    """Eight patches in three splits; the training split is georeferenced, the others are not."""
    expected: Codes = {}
    for split, number, name in ((s, n, i) for s, ids in HUNAN.items() for n, i in enumerate(ids)):
        raw = np.roll(cells((64, 64), RAW_VALUES, 8), 8 * number, axis=1)
        looked_up = np.take(PUBLISHED, np.where(raw == 255, 12, raw))
        codes = np.where(looked_up == 255, 255, looked_up.clip(max=6) + 1).astype(np.uint8)
        optical = signal(codes, 12, len(expected), 1000).astype(np.uint16)
        if number % 2 == 0:  # with the cirrus band between the first ten and the last two
            optical = np.insert(optical, 10, 7, axis=0)
        row, column = np.indices(codes.shape)
        topo = np.array([200 + PER_COLUMN * column + PER_ROW * row, signal(codes, 1, number)[0]])
        if name == "10":  # bent, and with a hole
            topo[0] += column**2 / 9
            topo[0, 20, 20] = np.nan
        rasters = {"s2": optical, "s1": signal(codes, 2, len(expected), -90).astype(np.float32)}
        rasters |= {"topo": topo.astype(np.float32), "lc": raw[None]}
        for kind, pixels in rasters.items():
            file = f"{name}.tif" if (kind, number) == ("lc", 1) else f"{kind}_{name}.tif"
            place = ground(left=6e5 + 1e4 * number) if split == "train" else {}
            write_raster(folder / "Hunan_Dataset" / split / kind / file, pixels, **place)
        expected[f"{split}_{name}"] = codes
    return expected


def write_dstl_patches(folder: Path, count: int = 12) -> Codes:
    """Patches whose files are written in another order in every folder."""
    codes = [cells((32, 32), [0, 1, 1, 0, 1], 8 + n) for n in range(count)]
    stacks = [np.moveaxis(signal(c, 20, n) + 500 * n, 0, -1) for n, c in enumerate(codes)]
    names = [f"6010_{n}_patch{n * 7 % count}" for n in range(count)]
    arrays = {"RGBs": [s[..., :3].astype(np.uint16) for s in stacks], "all20Ch": stacks}
    for seed, (kind, patches) in enumerate((arrays | {"class06_mats": codes}).items()):
        (folder / kind).mkdir(parents=True)
        for n in np.random.default_rng(seed).permutation(count).tolist():
            scipy.io.savemat(folder / kind / f"{names[n]}.mat", {"inputPatch": patches[n]})
    return dict(zip(names, codes, strict=True))


def write_index_file(path: Path, numbers: Any) -> None:
    path.write_text("".join(f"{number}\n" for number in numbers), "utf-8")


BLOCKS = {"kind": "diagonal_blocks", "count": 2, "block_size": 32, "margin": 0}
ENTRIES["pair"] = {
    "title": "Two sensors",
    "bands": {"VV": {"file": "radar.tif", "description": "VV"}},
    "modalities": {
        "optical": {"file": "optical.tif", "channels": [1, 2], "channel_count": 2},
        "radar": ["VV"],
    },
    "masks": {"optical": {"file": "clouds.tif", "unseen": [1]}},
    "labels": {"kind": "ids", "file": "labels.tif", "values": {"low": 1, "high": 2}},
    "patches": {"size": 32},
    "folds": {
        "spatial": BLOCKS | {"validation_blocks": 0},
        "shuffled": {"kind": "shuffled_patches", "count": 2},
    },
}


def ground(pixel: float = 10, left: float = 5e5, crs: str = UTM) -> dict[str, Any]:
    return {"crs": crs, "transform": rasterio.Affine(pixel, 0, left, 0, -pixel, 3e6)}


FIELDS = {"kind": "polygons", "file": "fields.gpkg", "column": "use"}
ENTRIES["fields"] = ENTRIES["pair"] | {"labels": FIELDS | {"values": {"low": [1], "high": 2}}}


def write_pair(folder: Path, clouded: tuple[slice, slice] = np.s_[:40, :20]) -> Codes:
    """One scene with clouds over a part of two patches, a corner of which radar lacks too."""
    ids = cells((96, 96), [1, 2, 2], 8)
    clouds, radar = np.zeros_like(ids), signal(ids, 1, 1).astype(np.float32)
    clouds[clouded], radar[0, :4, :4] = 1, np.nan
    rasters = {"optical": signal(ids, 2, 0).astype(np.uint16), "labels": ids[None].copy()}
    for name, pixels in (rasters | {"radar": radar, "clouds": clouds[None]}).items():
        write_raster(folder / f"{name}.tif", pixels, **ground())
    ids[:4, :4] = 255
    return {"scene": ids}


def write_fields(folder: Path) -> Codes:
    """The same with polygons as labels: half of the scene is of one value, half of another."""
    write_pair(folder)
    draw_fields(folder / "fields.gpkg")
    codes = np.repeat([[1] * 48 + [2] * 48], 96, axis=0)
    codes[:4, :4] = 255
    return {"scene": codes}


def draw_fields(
    path: Path,
    values: Any = (1, 2),
    column: str = "use",
    crs: str | None = UTM,
    shift: float = 0,
    corner: float = 0,
    kind: str = "geometry",
    **options: Any,
) -> None:
    """Write polygons, or what GeoPandas makes of them; those after the second lie elsewhere."""
    shapes = []
    for left in (5e5, 5e5 + 480, *[0] * (len(values) - 2)):
        (west, south), (east, north) = (left + shift, 3e6 - 960), (left + shift + 480, 3e6)
        edge = [(west, north), (west, south), (east + corner, south), (east, north)]
        shapes.append(shapely.Polygon(edge))
    frame = geopandas.GeoDataFrame({column: values}, geometry=shapes, crs=crs)
    frame.geometry = getattr(frame, kind)
    frame.to_file(path, **options)
