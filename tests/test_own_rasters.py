"""Rasters, polygons and folders as users have them: what is taken, and what is refused."""

import copy
import shutil
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pytest
import rasterio
import raw_layouts as raw
import shapely
from study.data.manifest import Dataset, FoundScenes
from study.data.patches import make_patches
from study.data.preparation import PATCH_TABLE, PreparedScene, prepare
from study.data.raw_files import RawFolder, find_scenes

from lsgs_core import InputError

DEGREES = 4.5e-6  # half a metre: a pixel of very high resolution
PAIR = raw.dataset("pair")


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    raw.write_pair(tmp_path / "raw")
    return tmp_path / "raw"


def placed(folder: Path, file: str, **place: Any) -> None:
    raw.write_raster(folder / file, raw.read_raster(folder / file), **place)


def seen(folder: Path, file: str) -> tuple[np.ndarray, np.ndarray]:
    with rasterio.open(folder / "scene" / file) as raster:
        return raster.read(1), raster.read_masks(1) > 0


@pytest.mark.parametrize(("shift", "larger"), [(0, 1), (2, 1), (0, 2)])
def test_a_shift_of_pixels_in_degrees_is_a_shift(
    pair: Path, tmp_path: Path, shift: int, larger: int
) -> None:
    """In degrees a shift of two pixels is a hundred-thousandth of the unit."""
    grid = rasterio.Affine(DEGREES, 0, 10, 0, -DEGREES, 50)
    for file in ("radar.tif", "labels.tif", "clouds.tif"):
        placed(pair, file, crs="EPSG:4326", transform=grid)
    away = grid * rasterio.Affine.translation(shift, 0) * rasterio.Affine.scale(larger)
    placed(pair, "optical.tif", crs="EPSG:4326", transform=away)
    clouds = raw.read_raster(pair / "clouds.tif")[0] == 1
    prepare(raw.dataset("pair", resampling="nearest"), pair, tmp_path / "made")
    pixels, there = seen(tmp_path / "made", "optical.tif")
    row, column = np.mgrid[:96, :96] // larger - [[[0]], [[shift]]]
    known = (column >= 0) & ~clouds
    np.testing.assert_array_equal(there, known)
    given = raw.read_raster(pair / "optical.tif")[0]
    np.testing.assert_array_equal(pixels[known], given[row, column][known])


def test_a_table_of_patches_goes_with_the_rasters_it_was_made_from(
    pair: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    prepare(PAIR, pair, made)
    make_patches(PAIR, made)
    prepare(PAIR, pair, made)
    assert (made / PATCH_TABLE).exists()  # nothing has changed
    raw.write_raster(pair / "labels.tif", 3 - raw.read_raster(pair / "labels.tif"), **raw.ground())
    prepare(PAIR, pair, made)
    assert not (made / PATCH_TABLE).exists()


@pytest.mark.parametrize("lost", [False, True])
def test_a_class_that_no_scene_has_is_a_mistake_also_when_some_are_prepared(
    tmp_path: Path, lost: bool
) -> None:
    """The class of one scene alone lies under pixels without data; then another scene changes."""
    scenes = {"north": {}, "south": {}}
    content = copy.deepcopy(raw.ENTRIES["pair"]) | {"scenes": scenes}
    content["bands"]["VV"]["file"] = "${scene}/radar.tif"
    content["modalities"]["optical"]["file"] = "${scene}/optical.tif"
    content["masks"]["optical"]["file"] = "${scene}/clouds.tif"
    content["labels"]["file"] = "${scene}/labels.tif"
    dataset = Dataset.model_validate(content)
    for name in scenes:
        raw.write_pair(tmp_path / "raw" / name)
    north, south = (tmp_path / "raw" / name / "labels.tif" for name in scenes)
    low = np.ones_like(raw.read_raster(north))
    for file in ("optical.tif", "radar.tif"):
        hidden = raw.read_raster(north.with_name(file)).astype(np.float32)
        hidden[:, raw.read_raster(north)[0] == 2] = np.nan
        raw.write_raster(north.with_name(file), hidden, **raw.ground())
    raw.write_raster(south, low, **raw.ground())
    prepare(dataset, tmp_path / "raw", tmp_path / "made")
    changed = north if lost else south
    raw.write_raster(changed, low, **raw.ground())
    with rasterio.open(changed, "r+") as raster:
        raster.update_tags(changed="yes")
    if lost:
        with pytest.raises(InputError, match=r"'high'. occur in no scene"):
            prepare(dataset, tmp_path / "raw", tmp_path / "made")
    else:
        prepare(dataset, tmp_path / "raw", tmp_path / "made")


@pytest.mark.parametrize(("rows", "fits"), [(16, True), (15, True), (17, True), (14, False)])
def test_a_pixel_more_or_less_is_rounding_along_either_side(
    tmp_path: Path, rows: int, fits: bool
) -> None:
    """A coarse file stretched over a scene six times as wide as high: a row is six columns."""
    raw.write_pair(tmp_path / "raw")
    for file in ("radar.tif", "labels.tif", "clouds.tif"):
        pixels = raw.read_raster(tmp_path / "raw" / file)[:, :32]
        wide = np.tile(np.nan_to_num(pixels, nan=1), (1, 1, 2))
        raw.write_raster(tmp_path / "raw" / file, wide, **raw.ground())
    optical = raw.read_raster(tmp_path / "raw" / "optical.tif")[:, :rows]
    raw.write_raster(tmp_path / "raw" / "optical.tif", optical)
    content = copy.deepcopy(raw.ENTRIES["pair"])
    content["modalities"]["optical"]["placement"] = "extent"
    dataset = Dataset.model_validate(content)
    if fits:
        prepare(dataset, tmp_path / "raw", tmp_path / "made")
    else:
        with pytest.raises(InputError, match="do not have the shape of the"):
            prepare(dataset, tmp_path / "raw", tmp_path / "made")


def polygons(folder: Path, column: list[Any], file: str = "fields.shp", **options: Any) -> Dataset:
    """Half of the scene is of the first value, half of the second."""
    boxes = [shapely.box(x, 3e6 - 960, x + 480, 3e6) for x in (5e5, 5e5 + 480)]
    boxes += [shapely.box(0, 0, 1, 1)] * (len(column) - 2)
    frame = geopandas.GeoDataFrame({"use": column}, geometry=boxes, crs=raw.UTM)
    frame.to_file(folder / file, **options)
    labels = {"kind": "polygons", "file": file, "column": "use", "values": {"low": [1], "high": 2}}
    content = copy.deepcopy(raw.ENTRIES["pair"]) | {"labels": labels}
    return Dataset.model_validate(content)


@pytest.mark.parametrize("column", [[1, 2], [1.0, 2.0], [1, 2, None], ["1", "2"]])
def test_numbers_of_polygons_in_any_type(pair: Path, tmp_path: Path, column: list[Any]) -> None:
    made = prepare(polygons(pair, column), pair, tmp_path / "made").scenes["scene"]
    assert made.label_pixels == {"low": 96 * 48 - 16, "high": 96 * 48}


def test_what_belongs_to_a_shapefile_is_looked_at_too(pair: Path, tmp_path: Path) -> None:
    dataset = polygons(pair, [1, 2])
    first = prepare(dataset, pair, tmp_path / "made").scenes["scene"]
    polygons(pair, [2, 1])
    second = prepare(dataset, pair, tmp_path / "made").scenes["scene"]
    assert first.raw["fields.shp"] == second.raw["fields.shp"]
    assert first.label_pixels["low"] == second.label_pixels["high"]


def without_geometry(folder: Path) -> Dataset:
    dataset = polygons(folder, [1, 2])
    (folder / "fields.csv").write_text("use,area\n1,2\n")
    labels = dataset.labels.model_copy(update={"file": ["fields.csv"]})
    return dataset.model_copy(update={"labels": labels})


def without_numbers(folder: Path) -> Dataset:
    dataset = polygons(folder, [1, 2], "fields.gpkg", driver="GPKG")
    frame = geopandas.read_file(folder / "fields.gpkg")
    corners = np.arange(10)[:, None] == 2
    frame.geometry = shapely.transform(
        frame.geometry.to_numpy(), lambda xy: np.where(corners, np.nan, xy)
    )
    frame.to_file(folder / "fields.gpkg", driver="GPKG")
    return dataset


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (without_numbers, r"fields.gpkg: holds a polygon with a coordinate that is no finite"),
        (without_geometry, r"fields.csv: expected one layer of polygons, found \[\]"),
    ],
)
def test_what_is_refused(pair: Path, tmp_path: Path, damage: Any, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        prepare(damage(pair), pair, tmp_path / "made")


def test_a_grid_that_is_turned(pair: Path, tmp_path: Path) -> None:
    """By a right angle: the sides of a pixel lie in the other elements of the transform."""
    turned = rasterio.Affine.translation(5e5, 3e6) * rasterio.Affine.rotation(90)
    for file in ("optical.tif", "labels.tif", "clouds.tif", "radar.tif"):
        placed(pair, file, crs=raw.UTM, transform=turned * rasterio.Affine.scale(10, -10))
    content = copy.deepcopy(raw.ENTRIES["pair"])
    content["bands"]["VV"]["scale"] = 1
    prepare(Dataset.model_validate(content), pair, tmp_path / "made")


def test_folders_that_are_links(pair: Path, tmp_path: Path) -> None:
    shutil.move(pair / "radar.tif", tmp_path / "elsewhere.tif")
    (tmp_path / "disk").mkdir()
    shutil.move(tmp_path / "elsewhere.tif", tmp_path / "disk" / "radar.tif")
    (pair / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "round").symlink_to(pair)  # a circle
    assert prepare(PAIR, pair, tmp_path / "made").scenes["scene"].modalities == ["optical", "radar"]
    assert sorted(RawFolder(pair).paths)[-1] == "optical.tif"


@pytest.mark.parametrize("name", ["a\x01", "a b"])
def test_a_file_that_gives_no_name_of_a_scene(pair: Path, name: str) -> None:
    found = {"file": "${place}.tif", "name": "${place}"}
    dataset = PAIR.model_copy(update={"scenes": {}, "find_scenes": FoundScenes(**found)})
    (pair / "radar.tif").rename(pair / f"{name}.tif")
    with pytest.raises(InputError, match="name of a scene"):
        find_scenes(dataset, pair)


@pytest.mark.parametrize(
    ("crs", "pixel", "size", "unit"),
    [
        ("EPSG:32633", 10, 0.01, "km"),
        ("EPSG:2264", 30, 0.009144, "km"),  # in feet
        ("EPSG:4326", 0.5, 0.5, "degrees"),
        (None, 1, 1, "pixels"),
    ],
)
def test_the_unit_of_maps(crs: str | None, pixel: float, size: float, unit: str) -> None:
    scene = PreparedScene.model_construct(
        crs=rasterio.crs.CRS.from_string(crs).to_wkt() if crs else None,
        transform=(pixel, 0, 0, 0, -pixel, 0), width=1, height=1,
    )  # fmt: skip
    found, name = scene.pixel_size
    assert name == unit
    assert found == pytest.approx(size, rel=1e-4)
