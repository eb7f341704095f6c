"""Rasters, polygons and folders as users have them: what is taken, and what is refused."""

import copy
import json
import shutil
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import rasterio
import raw_layouts as raw
from rasterio import Affine
from study.data.manifest import Dataset
from study.data.preparation import PreparedScene, prepare
from study.data.raw_files import RawFolder

from lsgs_core import InputError

FILES = ("optical.tif", "radar.tif", "labels.tif", "clouds.tif")
DEGREES = 4.5e-6  # half a metre: a pixel of very high resolution


@pytest.fixture
def pair(tmp_path):
    raw.write_pair(tmp_path / "raw")
    return tmp_path / "raw"


def pair_with(part: str, name: str, **changes: Any) -> Dataset:
    """The data set with other entries of a band or a modality."""
    content = copy.deepcopy(raw.ENTRIES["pair"])
    content[part][name] |= changes
    return Dataset.model_validate(content)


@pytest.mark.parametrize(("shift", "larger"), [(0, 1), (2, 1), (0, 2)])
def test_a_shift_of_pixels_in_degrees_is_a_shift(pair, tmp_path, shift, larger):
    """In degrees a shift of two pixels is a hundred-thousandth of the unit."""
    grid = Affine(DEGREES, 0, 10, 0, -DEGREES, 50)
    for file in FILES:
        raw.rewrite(pair / file, crs="EPSG:4326", transform=grid)
    away = grid * Affine.translation(shift, 0) * Affine.scale(larger)
    raw.rewrite(pair / "optical.tif", transform=away)
    clouds = raw.read_raster(pair / "clouds.tif")[0] == 1
    prepare(raw.dataset("pair", resampling="nearest"), pair, tmp_path / "made")
    row, column = np.mgrid[:96, :96] // larger - [[[0]], [[shift]]]
    known = (column >= 0) & ~clouds
    made = tmp_path / "made/scene/optical.tif"
    np.testing.assert_array_equal(raw.read_mask(made), known)
    given = raw.read_raster(pair / "optical.tif")[0]
    np.testing.assert_array_equal(raw.read_raster(made)[0, known], given[row, column][known])


def test_a_grid_that_is_turned(pair, tmp_path):
    """By a right angle: the sides of a pixel lie in the other elements of the transform."""
    turned = Affine.translation(5e5, 3e6) * Affine.rotation(90) * Affine.scale(10, -10)
    given = {name: raw.read_raster(pair / f"{name}.tif") for name in ("optical", "radar")}
    for file in FILES:
        raw.rewrite(pair / file, transform=turned)
    # The optical bands show the same ground with north up, in pixels of the same size.
    upright = Affine(10, 0, 5e5, 0, -10, 3e6 + 960)
    raw.rewrite(pair / "optical.tif", lambda p: np.rot90(p, axes=(1, 2)), transform=upright)
    prepare(pair_with("modalities", "optical", scale=1), pair, tmp_path / "made")
    for name, pixels in given.items():
        made = tmp_path / f"made/scene/{name}.tif"
        seen = raw.read_mask(made)
        assert seen.sum() == 96**2 - {"optical": 40 * 20, "radar": 4 * 4}[name]
        np.testing.assert_allclose(raw.read_raster(made)[:, seen], pixels[:, seen], rtol=1e-6)


@pytest.mark.parametrize("lost", [False, True])
def test_a_class_that_no_scene_has_is_a_mistake_also_when_some_are_prepared(tmp_path, lost):
    """The class of one scene alone lies under pixels without data; then another scene changes."""
    entry = json.dumps(raw.ENTRIES["pair"]).replace('"file": "', '"file": "${scene}/')
    dataset = Dataset.model_validate(json.loads(entry) | {"scenes": {"north": {}, "south": {}}})
    north, south = folders = [tmp_path / "raw" / name for name in ("north", "south")]
    for folder in folders:
        raw.write_pair(folder)
    high = raw.read_raster(north / "labels.tif") == 2
    for file in ("optical.tif", "radar.tif"):
        raw.rewrite(north / file, lambda p: np.where(high, np.nan, p).astype(np.float32))
    raw.rewrite(south / "labels.tif", np.ones_like)
    prepare(dataset, tmp_path / "raw", tmp_path / "made")
    changed = north if lost else south
    raw.rewrite(changed / "labels.tif", np.ones_like, compress="deflate")
    mistake = pytest.raises(InputError, match=r"'high'. occur in no scene")
    with mistake if lost else nullcontext():
        prepare(dataset, tmp_path / "raw", tmp_path / "made")


@pytest.mark.parametrize(("rows", "fits"), [(16, True), (15, True), (17, True), (14, False)])
def test_a_pixel_more_or_less_is_rounding_along_either_side(pair, tmp_path, rows, fits):
    """A coarse file stretched over a scene six times as wide as high: a row is six columns."""
    for file in ("radar.tif", "labels.tif", "clouds.tif"):
        raw.rewrite(pair / file, lambda p: np.tile(np.nan_to_num(p[:, :32], nan=1), (1, 1, 2)))
    raw.write_raster(pair / "optical.tif", raw.read_raster(pair / "optical.tif")[:, :rows])
    dataset = pair_with("modalities", "optical", placement="extent")
    mistake = pytest.raises(InputError, match="do not have the shape of the")
    with nullcontext() if fits else mistake:
        prepare(dataset, pair, tmp_path / "made")


@pytest.mark.parametrize("column", [[1, 2], [1.0, 2.0], [1, 2, None], ["1", "2"]])
def test_numbers_of_polygons_in_any_type(pair, tmp_path, column):
    raw.draw_fields(pair / "fields.gpkg", column)
    made = prepare(raw.dataset("fields"), pair, tmp_path / "made").scenes["scene"]
    assert made.label_pixels == {"low": 96 * 48 - 16, "high": 96 * 48}


def test_what_belongs_to_a_shapefile_is_looked_at_too(pair, tmp_path):
    labels, made = raw.ENTRIES["fields"]["labels"] | {"file": "fields.shp"}, []
    dataset = raw.dataset("pair", labels=labels)
    for values in ([1, 2], [2, 1]):
        raw.draw_fields(pair / "fields.shp", values)
        made.append(prepare(dataset, pair, tmp_path / "made").scenes["scene"])
    assert made[0].raw["fields.shp"] == made[1].raw["fields.shp"]
    assert [m.label_pixels["low"] for m in made] == [96 * 48 - 16, 96 * 48]


def test_folders_that_are_links(pair, tmp_path):
    (tmp_path / "disk").mkdir()
    shutil.move(pair / "radar.tif", tmp_path / "disk" / "radar.tif")
    (pair / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "round").symlink_to(pair)  # a circle
    made = prepare(raw.dataset("pair"), pair, tmp_path / "made").scenes["scene"]
    assert made.modalities == ["optical", "radar"]
    assert sorted(RawFolder(pair).paths)[-1] == "optical.tif"


@pytest.mark.parametrize(
    ("crs", "pixel", "size", "unit"),
    [
        ("EPSG:32633", 10, 0.01, "km"),
        ("EPSG:2264", 30, 0.009144, "km"),  # in feet
        ("EPSG:4326", 0.5, 0.5, "degrees"),
        (None, 1, 1, "pixels"),
    ],
)
def test_the_unit_of_maps(crs, pixel, size, unit):
    wkt = rasterio.crs.CRS.from_string(crs).to_wkt() if crs else None
    place = {"crs": wkt, "transform": (pixel, 0, 0, 0, -pixel, 0), "width": 1, "height": 1}
    found, name = PreparedScene.model_construct(**place).pixel_size
    assert name == unit
    assert found == pytest.approx(size, rel=1e-4)
