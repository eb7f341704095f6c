"""From the raw layouts and rasters that users have to training steps; hostile.yaml has others."""

import copy
import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import rasterio
import raw_layouts as raw
import scipy.io
import torch
import yaml
from numpy.typing import NDArray
from rasterio.enums import ColorInterp
from rasterio.warp import transform_bounds
from scene import label_raster
from scipy.ndimage import distance_transform_cdt, map_coordinates
from study.data import alignment, preparation
from study.data.check import check_data, main
from study.data.folds import PARTS, check_separation, leaks, patch_table, shuffled_parts
from study.data.manifest import Dataset, OfficialSplit, Patches, ShuffledPatches
from study.data.patches import PatchDataset, make_patches
from study.data.preparation import PreparedScene, prepare
from study.data.raw_files import RawFolder
from study.metrics.evaluation import AlwaysPositive, evaluate
from study.provenance.schema import read_yaml
from study.training.loop import train
from study.training.settings import TrainingSettings

from lsgs_core import InputError, ScenarioSet, build_backbone, score_scenarios
from lsgs_core.sampling import FixedSampler

LAYOUTS = ["dstl", "dstl_patches", "potsdam", "hunan", "pair"]
SLIDING: dict[str, Any] = {"size": 32, "stride": 16}
BLOCKS = SLIDING | {"count": 3, "block_size": 64, "margin": 8, "validation_blocks": 1}
PAIR = raw.dataset("pair")
Damage = Callable[[Path], Any]


@pytest.fixture(scope="session")
def layout_of(tmp_path_factory):
    """Each data set, written and prepared once."""

    @cache
    def make(name: str) -> SimpleNamespace:
        folder, prepared = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("prepared")
        made = SimpleNamespace(raw=folder, prepared=prepared, dataset=raw.dataset(name))
        made.expected = getattr(raw, f"write_{name}")(folder)
        made.record = prepare(made.dataset, folder, prepared)
        return made

    return make


@pytest.fixture
def copied(layout_of, tmp_path):
    """Raw files of a data set that a test may change."""
    return lambda name: Path(shutil.copytree(layout_of(name).raw, tmp_path / "raw"))


def on(pattern: str, change: Damage) -> Damage:
    """Change files of a folder."""
    return lambda folder: [change(path) for path in list(folder.rglob(pattern))]


def rewrite(pattern: str, *change: Any, **place: Any) -> Damage:
    """Write rasters again with other pixels, or at other places."""
    return on(pattern, lambda path: raw.rewrite(path, *change, **place))


def backbone(patches: PatchDataset) -> Any:
    torch.manual_seed(0)
    return build_backbone("cmx", "demo", patches.bands, len(patches.classes))


def run(patches: PatchDataset, folder: Path, model: Any, *p: float) -> float:
    """The loss of two steps of training."""
    names = ScenarioSet.of(patches.modalities)
    sampler = FixedSampler(p) if p else FixedSampler.uniform(len(names))
    settings = TrainingSettings(epochs=1, batch_size=-(-len(patches) // 2))
    history = train(model, patches, names, sampler, settings, 0, folder, {})
    return history["loss"].item()


def counts(patches: PatchDataset, model: Any) -> pd.DataFrame:
    names, batches = ScenarioSet.of(patches.modalities), patches.batches(4)
    return evaluate(model, batches, names, patches.classes, patches.task_kind)


def scored(patches: PatchDataset) -> list[int]:
    """Patches that scoring uses."""
    names, batches = ScenarioSet.of(patches.modalities), patches.batches(4)
    return score_scenarios(backbone(patches), batches, names, progress=False).patch_ids.tolist()


def bits(codes: NDArray[Any]) -> NDArray[Any]:
    return np.stack([codes >> np.uint16(number) & 1 for number in range(10)])


def first_bit(codes: NDArray[Any]) -> NDArray[Any]:
    """Where polygons overlap, the first class of the manifest's list; else background."""
    return np.where(codes > 0, bits(codes)[[9, 8, 0, 1, 2, 3, 7, 6, 4, 5]].argmax(axis=0), 10)


@pytest.mark.parametrize(
    ("name", "task", "folds", "target"),
    [
        ("dstl", "land_cover", ("spatial", BLOCKS), bits),
        ("dstl", "exclusive", ("spatial", BLOCKS), first_bit),
        ("dstl", "class_06", ("spatial", BLOCKS), lambda codes: bits(codes)[5:6]),
        ("dstl", "background", ("spatial", BLOCKS), lambda codes: codes[None] == 0),
        ("dstl_patches", "class_06", ("shuffled", {"size": 32}), lambda codes: codes[None] == 1),
        ("potsdam", "land_cover", ("official", SLIDING), lambda codes: codes - 1),
        ("potsdam", "car", ("scenes", SLIDING), lambda codes: codes[None] == 5),
        ("hunan", "land_cover", ("official", {"size": 64}), lambda codes: codes - 1),
        ("hunan", "forest", ("official", {"size": 64}), lambda codes: codes[None] == 2),
    ],
)
def test_it_trains_on_the_raw_layout(layout_of, tmp_path, name, task, folds, target):
    layout = layout_of(name)
    make_patches(layout.dataset, layout.prepared, folds[0], **folds[1])
    patches = PatchDataset(layout.prepared, layout.dataset, task, 0, "training", limit=8)
    assert patches.bands == {"hunan": (12, 3, 3), "potsdam": (3, 1, 2)}.get(name, (3, 3, 3))
    batch, size = patches.batch(range(len(patches))), patches.size
    for index, row in enumerate(patches.table.itertuples()):
        window = np.s_[row.row : row.row + size, row.column : row.column + size]
        codes = layout.expected[row.scene][window]
        valid = codes != layout.dataset.labels.ignore
        np.testing.assert_array_equal(batch.valid[index], valid)
        wanted = np.where(valid, target(codes), 0)
        np.testing.assert_array_equal(np.where(valid, batch.target[index], 0), wanted)
    assert np.isfinite(run(patches, tmp_path, backbone(patches)))


@pytest.mark.parametrize("name", LAYOUTS)
def test_data_check_finds_nothing_wrong(layout_of, name):
    report = check_data(layout_of(name).dataset, layout_of(name).raw)
    assert (report.state, report.problems) == ("ready", [])


@pytest.mark.parametrize("image", raw.LABELLED)
def test_coarse_bands_are_stretched_over_the_image(layout_of, image):
    layout = layout_of("dstl")
    for modality, kind, channels in (("NIR", "M", np.s_[5:8]), ("SWIR", "A", np.s_[0:3])):
        coarse = raw.read_raster(layout.raw / f"sixteen_band/{image}_{kind}.tif")[channels]
        fine = raw.read_raster(layout.prepared / image / f"{modality}.tif")
        sides = zip(fine.shape[1:], coarse.shape[1:], strict=True)
        centres = [((np.arange(m) + 0.5) * n / m - 0.5).clip(0, n - 1) for m, n in sides]
        for given, found in zip(coarse.astype(float), fine, strict=True):
            wanted = map_coordinates(given, np.meshgrid(*centres, indexing="ij"), order=1)
            np.testing.assert_allclose(found, wanted, atol=0.51)


def test_a_narrower_file_leaves_its_last_column_unseen(layout_of):
    heights = raw.read_mask(layout_of("potsdam").prepared / raw.NARROW / "height.tif")
    assert heights.all(axis=0).tolist() == [True] * 95 + [False]


def parts_of(names: list[str], folds: OfficialSplit) -> pd.Series:
    """The scenes of every part."""
    codes = np.ones((32, 32), np.uint8)
    scenes = [(name, label_raster(codes)) for name in names]
    table = patch_table(scenes, np.arange(256)[:, None] == [1], ["a"], Patches(size=32), folds)
    return table.groupby("fold_0")["scene"].agg(set)


def test_the_official_split_is_that_of_the_contest():
    rows = {2: range(10, 15), 3: range(10, 15), 4: range(10, 16), 5: range(10, 16)}
    rows |= {6: range(7, 16), 7: range(7, 14)}
    tiles = {f"{row}_{column}" for row, columns in rows.items() for column in columns}
    trained = {f"{row}_{column}" for row in range(2, 8) for column in (10, 11, 12)}
    trained |= {f"{row}_{column}" for row in (6, 7) for column in (7, 8, 9)}
    parts = parts_of(sorted(tiles), raw.dataset("potsdam").fold_definition("official"))
    assert (len(tiles), len(trained), len(parts["validation"])) == (38, 24, 3)
    assert (parts["training"] | parts["validation"], parts["test"]) == (trained, tiles - trained)
    with pytest.raises(InputError, match="scene 8_1 is in no part"):
        parts_of([*tiles, "8_1"], raw.dataset("potsdam").fold_definition("official"))


@pytest.mark.parametrize(("trained", "validation"), [(3, 2), (4, 3), (5, 3)])
def test_as_many_validation_scenes_as_asked_for(trained, validation):
    names = [f"s{number}" for number in range(trained + 1)]
    split: dict[str, Any] = {"training": names[:-1], "test": names[-1:]}
    folds = OfficialSplit(kind="official", validation_scenes=validation, **split)
    assert len(parts_of(names, folds)["validation"]) == validation


def without_heights(folder: Path) -> Dataset:
    """Potsdam with a file of heights missing in a tile for training and in one for test."""
    for file in ("dsm_potsdam_07_12.tif", "dsm_potsdam_02_13_normalized_lastools.jpg"):
        next(folder.rglob(file)).unlink()
    dataset = raw.dataset("potsdam", may_be_absent=["height"])
    prepare(dataset, folder, folder.parent / "prepared")
    settings = {"size": 32, "stride": 32, "validation_scenes": 0}
    make_patches(dataset, folder.parent / "prepared", "official", **settings)
    return dataset


def test_tiles_may_lack_a_modality(copied, tmp_path):
    dataset = without_heights(copied("potsdam"))
    patches = PatchDataset(tmp_path / "prepared", dataset, "land_cover", 0, "training")
    lacking, model = patches.table["scene"] == "7_12", backbone(patches)
    available = patches.batch(range(len(patches))).available
    assert lacking.sum() == 9
    assert available.tolist() == [[True, True, not lacks] for lacks in lacking]
    drawn: list[Any] = []  # images and scenarios that the network is given
    model.register_forward_pre_hook(lambda _, given: drawn.append(given))
    run(patches, tmp_path / "run", model)
    absent = torch.cat([~images[2].flatten(1).any(dim=1) for images, _ in drawn])
    present = torch.cat([scenario[:, 2] for _, scenario in drawn])
    assert (absent.sum(), (absent & present).sum()) == (9, 0)
    assert present.any()
    assert scored(patches) == patches.patch_ids[~lacking].tolist()


UTM33 = {"transform": rasterio.Affine(0.05, 0, 366976.5, 0, -0.05, 5808718.5)}
TAGGED = UTM33 | {"crs": "EPSG:32633"}


@pytest.mark.parametrize(
    "places",
    [{"*IR.tif": UTM33}, {"*IR.tif": UTM33, "dsm*.tif": TAGGED}, {"*IR.tif": {"crs": raw.UTM}}],
)
def test_half_a_georeference_does_no_harm(layout_of, copied, tmp_path, places):
    """World files alone, beside files with a reference system, and a system without a place."""
    layout, folder = layout_of("potsdam"), copied("potsdam")
    for pattern, profile in places.items():
        rewrite(pattern, **profile)(folder)
    prepare(layout.dataset, folder, tmp_path)
    for name in ("labels", "height"):
        made = [raw.read_raster(at / f"2_10/{name}.tif") for at in (layout.prepared, tmp_path)]
        np.testing.assert_allclose(*made, rtol=1e-4)
    assert len(make_patches(layout.dataset, tmp_path, "official", **SLIDING)) > 20


@pytest.mark.parametrize("scene", ["train_1", "train_2", "val_21", "test_2"])
def test_hunan_bands(layout_of, scene):
    (split, name), layout = scene.split("_"), layout_of("hunan")
    folder = layout.raw / "Hunan_Dataset" / split
    bands, radar = (raw.read_raster(folder / f"{k}/{k}_{name}.tif") for k in ("s2", "s1"))
    files = [layout.prepared / scene / f"{m}.tif" for m in ("optical", "SAR", "terrain")]
    optical, sar, terrain = map(raw.read_raster, files)
    assert len(bands) == (12 if scene in ("train_2", "val_21") else 13)
    np.testing.assert_array_equal(optical, bands[[3, 2, 1, 0, 4, 5, 6, 7, 8, 9, -2, -1]])
    np.testing.assert_array_equal(sar, [*radar, radar[0] - radar[1]])
    # An inclined plane: the same slope everywhere, at the edges too.
    slope = np.degrees(np.arctan(np.hypot(raw.PER_COLUMN, raw.PER_ROW) / 10))
    np.testing.assert_allclose(terrain[2], slope, atol=1e-3)
    # The hole in the heights of train_10, and the four pixels beside it.
    assert (~raw.read_mask(layout.prepared / "train_10/terrain.tif")).sum() == 5


def test_patches_are_paired_by_name(layout_of):
    layout = layout_of("dstl_patches")
    for scene in layout.expected:
        stack = scipy.io.loadmat(layout.raw / f"all20Ch/{scene}.mat")["inputPatch"]
        for modality, first in (("RGB", 0), ("NIR", 9), ("SWIR", 12)):
            made = np.moveaxis(raw.read_raster(layout.prepared / scene / f"{modality}.tif"), 0, -1)
            np.testing.assert_allclose(made, stack[..., first : first + 3], atol=1)


@pytest.mark.parametrize("count", [60, 61, 5985])
def test_the_authors_split(tmp_path, count):
    order = np.random.default_rng(3).permutation(count).tolist()
    raw.write_index_file(path := tmp_path / "index.txt", order)
    parts = shuffled_parts(count, ShuffledPatches(kind="shuffled_patches", count=5), path)
    share = count // 5
    for fold, found in enumerate(parts):
        places = range(fold * share, (fold + 1) * share)
        rest = [place for place in range(count) if place not in places]
        wanted = {order[place]: "training" for place in rest}
        wanted |= {order[place]: "validation" for place in rest[: int(0.1 * (count - share))]}
        wanted |= {order[place]: "test" for place in places}
        assert dict(enumerate(found.tolist())) == wanted
    if count == 5985:
        assert [(parts[1] == part).sum() for part in PARTS] == [4310, 478, 1197]


def painted(rows: pd.DataFrame, shape: tuple[int, int]) -> NDArray[np.int64]:
    """How many patches each pixel is in."""
    times = np.zeros(shape, dtype=np.int64)
    for top, left, size in rows[["row", "column", "size"]].to_numpy():
        times[top : top + size, left : left + size] += 1
    return times


@pytest.mark.parametrize(
    ("name", "folds", "settings"),
    [
        ("dstl", "spatial", BLOCKS),
        ("dstl", "scenes", SLIDING | {"count": 3, "validation_scenes": 1}),
        ("dstl", "shuffled", SLIDING),
        ("potsdam", "official", SLIDING),
        ("hunan", "scenes", SLIDING | {"validation_scenes": 2}),
    ],
)
def test_no_pixel_is_in_two_parts(layout_of, caplog, name, folds, settings):
    layout, margin = layout_of(name), settings.get("margin", 0)
    table = make_patches(layout.dataset, layout.prepared, folds, **settings)
    columns = [column for column in table if column.startswith("fold_")]
    assert len(columns) == (1 if folds == "official" else settings.get("count", 5))
    assert all(set(table[column]) >= set(PARTS) for column in columns)
    for scene, made in layout.record.scenes.items():
        rows, tested = table[table["scene"] == scene], np.zeros((made.height, made.width), int)
        for column in columns:
            parts = {p: painted(rows[rows[column] == p], tested.shape) for p in PARTS}
            assert sum((times > 0).astype(int) for times in parts.values()).max() == 1
            assert max(parts["validation"].max(), parts["test"].max()) <= 1  # tiles
            tested += parts["test"]
            for judged in (parts["validation"], parts["test"]):
                if margin and judged.any() and parts["training"].any():
                    away = distance_transform_cdt(judged == 0, metric="chessboard")
                    assert away[parts["training"] > 0].min() > margin
        assert tested.max() <= 1
    assert table["block"].is_unique == leaks(layout.dataset.fold_definition(folds))
    assert leaks(layout.dataset.fold_definition(folds)) == (folds == "shuffled")
    assert ("neighbours of test patches" in caplog.text) == (folds == "shuffled")


@pytest.mark.parametrize(
    ("crs", "metres", "part", "refused"),
    [
        (raw.UTM, 0, "test", True),
        (raw.UTM, 490, "test", True),  # one pixel
        (raw.UTM, 500, "test", False),
        (raw.UTM, 0, "training", False),
        ("EPSG:4326", 0, "validation", True),
        ("EPSG:4326", 5000, "test", False),
        ("EPSG:32649", 0, "test", True),  # the zone beside it
    ],
)
def test_scenes_that_show_the_same_ground(crs, metres, part, refused):
    bounds = transform_bounds(raw.UTM, crs, 5e5 + metres, 3e6 - 500, 5e5 + metres + 500, 3e6)
    transforms = [raw.ground()["transform"], rasterio.transform.from_bounds(*bounds, 50, 50)]
    scenes = {
        name: PreparedScene.model_construct(height=50, width=50, crs=system, transform=place[:6])
        for name, system, place in zip("ab", (raw.UTM, crs), transforms, strict=True)
    }
    table = pd.DataFrame({"scene": ["a", "b"], "row": 0, "column": 0, "size": 50})
    table["fold_0"] = ["training", part]
    check_separation(table, 0, 0)  # two scenes of unknown places
    sentence = f"fold 0: 1 training patches of scene a .* {part}"
    with pytest.raises(InputError, match=sentence) if refused else nullcontext():
        check_separation(table, 0, 0, scenes)


def test_patches_of_scenes_that_overlap_are_refused(copied, tmp_path):
    dataset, folder = raw.dataset("hunan"), copied("hunan")
    rewrite("val/s2/s2_1.tif", **raw.ground(left=6e5 + 630))(folder)  # a pixel of train_1
    prepare(dataset, folder, tmp_path)
    with pytest.raises(InputError, match=r"scene train_1 show ground .* of scene val_1 show too"):
        make_patches(dataset, tmp_path, "official", size=64)


@pytest.mark.parametrize("size", [64, 2000])
@pytest.mark.parametrize(("start", "margin"), [(-1, 0), (0, 1), (31, 32)])
def test_one_pixel_too_close_is_found(size, start, margin):
    table = pd.DataFrame({"scene": "a", "row": 0, "column": [0, size + start], "size": size})
    table["fold_0"] = ["training", "test"]
    check_separation(table.assign(column=table["column"] + [0, 1]), 0, margin)
    with pytest.raises(InputError, match=f"fold 0: 1 training patches .* within {margin} pixels"):
        check_separation(table, 0, margin)


class Flipped(PatchDataset):
    """Another target where clouds hide the optical bands."""

    def batch(self, indices: Any) -> Any:
        batch = super().batch(indices)
        hidden = torch.zeros_like(batch.valid) if batch.seen is None else ~batch.seen[:, 0]
        return replace(batch, target=torch.where(hidden, 1 - batch.target, batch.target))


def test_what_no_present_modality_sees_is_not_counted(layout_of, tmp_path):
    prepared, kinds = layout_of("pair").prepared, (PatchDataset, Flipped)
    clouds = raw.read_raster(layout_of("pair").raw / "clouds.tif")[0] > 0
    np.testing.assert_array_equal(raw.read_mask(prepared / "scene/optical.tif"), ~clouds)
    assert (~raw.read_mask(prepared / "scene/radar.tif")).sum() == 16
    make_patches(PAIR, prepared)
    for fold, hidden, corner in ((0, 32 * 20, 16), (1, 8 * 20, 0)):  # in the test patches of each
        both = [kind(prepared, PAIR, "land_cover", fold, "test") for kind in kinds]
        true, flipped = (counts(patches, AlwaysPositive(2)) for patches in both)
        pixels = true[["tp", "fn"]].sum(axis=1).groupby(true["scenario"]).sum().to_dict()
        whole = len(both[0]) * 32**2
        found = [whole - pixels[name] for name in ("optical", "radar", "optical+radar")]
        assert found == [hidden, corner, corner]
        same = (true == flipped).all(axis=1).groupby(true["scenario"]).all().to_dict()
        assert same == {"optical": True, "radar": False, "optical+radar": False}
    both = [kind(prepared, PAIR, "land_cover", 0, "training") for kind in kinds]
    for p in ((1.0, 0, 0), (0, 1.0, 0)):
        true, flipped = (run(s, tmp_path / f"{p}{type(s)}", backbone(s), *p) for s in both)
        assert (true == flipped) == (p[0] == 1)
    clear = (both[0].table[["row", "column"]] != [32, 0]).any(axis=1)
    assert (~clear).sum() == 1
    assert scored(both[0]) == both[0].patch_ids[clear].tolist()


@pytest.mark.parametrize("why", ["absent", "clouded"])
def test_patches_that_a_scenario_cannot_serve_are_evaluated(copied, tmp_path, why):
    """Under a scenario of which a patch has nothing, none of its pixels count."""
    if why == "absent":
        dataset, column = without_heights(copied("potsdam")), 2
    else:
        dataset, column = PAIR, 0
        raw.write_pair(tmp_path / "raw", np.s_[:32, :32])
        prepare(dataset, tmp_path / "raw", tmp_path / "prepared")
        make_patches(dataset, tmp_path / "prepared")
    patches = PatchDataset(tmp_path / "prepared", dataset, "land_cover", 0, "test")
    lacking = ~patches.batch(range(len(patches))).available[:, column].numpy()
    assert 0 < lacking.sum() < len(patches)
    records = counts(patches, backbone(patches))
    alone = records[records["scenario"] == patches.modalities[column]]
    found = alone.groupby("block")[["tp", "fp", "fn"]].sum().sum(axis=1) > 0
    assert found.to_dict() == dict(zip(patches.block_ids, ~lacking, strict=True))


@pytest.mark.parametrize("pixel", [5, 10, 20])
def test_a_hole_in_one_channel_is_a_hole(copied, tmp_path, pixel):
    """Whether the file is resampled or not; what is declared as nodata is never blended."""
    side, folder = 960 // pixel, copied("pair")
    bands = np.full((2, side, side), 50, np.uint16)
    bands[0, side // 4 : side // 2, side // 4 : side // 2] = 9
    raw.write_raster(folder / "optical.tif", bands, nodata=9, **raw.ground(pixel))
    prepare(raw.dataset("pair", masks={}), folder, tmp_path)
    seen = raw.read_mask(tmp_path / "scene/optical.tif")
    assert not seen[25:47, 25:47].any()
    assert seen.sum() >= 96**2 - 26**2
    assert set(raw.read_raster(tmp_path / "scene/optical.tif")[:, seen].flat) == {50}


@pytest.mark.parametrize(
    ("others", "hidden"),
    [
        ({}, np.s_[:30]),
        # A band that a modality takes from the file, however that is spelt, is no mask.
        ({"nir": {"file": "optical.tif", "channels": [3]}}, np.s_[24:30]),
        ({"nir": {"file": ["nir.tif", "optical.tif"], "channels": [-1]}}, np.s_[24:30]),
    ],
)
def test_nodata_and_an_alpha_channel_both_hide_pixels(copied, tmp_path, others, hidden):
    bands = np.full((3, 96, 96), 50, np.uint8)
    bands[2, :24], bands[0, 24:30] = 0, 9
    raw.write_raster((folder := copied("pair")) / "optical.tif", bands, nodata=9, **raw.ground())
    with rasterio.open(folder / "optical.tif", "r+") as raster:
        raster.colorinterp = [ColorInterp.gray, ColorInterp.undefined, ColorInterp.alpha]
    optical = {"file": "optical.tif", "channels": [1, 2]}
    changes = {"modalities": {"optical": optical, "radar": ["VV"], **others}, "masks": {}}
    prepare(raw.dataset("pair", **changes), folder, tmp_path)
    seen = raw.read_mask(tmp_path / "scene/optical.tif")
    right = np.ones_like(seen)
    right[hidden] = False
    np.testing.assert_array_equal(seen, right)


def test_keys_that_are_merged_may_be_there_twice(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text("a: {b: &B {<<: {x: 1}, x: 2}}\nc: {<<: *B, y: 3}")
    assert read_yaml(path) == {"a": {"b": {"x": 2}}, "c": {"x": 2, "y": 3}}


@pytest.mark.parametrize(
    ("damage", "state", "problem"),
    [
        (lambda _: None, "ready", ""),
        (on("radar.tif", Path.unlink), "missing", "radar.tif"),
        (on("optical.tif", lambda path: os.truncate(path, 9000)), "damaged", "optical.tif"),
        (rewrite("labels.tif", np.ones_like), "damaged", "labels.values.high: has no pixel"),
        (rewrite("radar.tif", lambda p: p * np.nan), "damaged", "modalities.radar: has no pixel"),
        (rewrite("clouds.tif", np.zeros_like), "ready", "clouds.tif: masks.optical: has no pixel"),
        (rewrite("radar.tif", np.ones_like), "ready", "radar.tif: VV: every pixel is 1"),
        (
            rewrite("radar.tif", lambda pixels: np.nan_to_num(pixels, nan=-9999)),
            "ready",
            "radar.tif: VV: many pixels are -9999, far from all others",
        ),
        (shutil.rmtree, "absent", ""),
    ],
)
def test_data_check(copied, tmp_path, monkeypatch, capsys, damage, state, problem):
    damage(copied("pair"))
    report = check_data(PAIR, tmp_path / "raw")
    assert report.state == state
    said = report.notes if state == "ready" else report.problems
    assert [problem in text for text in said] == [True] * bool(problem)
    entries = {"datasets": dict.fromkeys(["pair", "other"], raw.ENTRIES["pair"])}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(entries))
    monkeypatch.chdir(tmp_path)
    for arguments, status, shown in (
        ("--dataset pair --raw raw", int(state != "ready"), f"pair (Two sensors): {state}"),
        ("", 0, "other (Two sensors): absent"),  # all of them, in work/downloads
        ("--raw raw", 1, "expected a --dataset"),
    ):
        monkeypatch.setattr("sys.argv", ["", "--manifest", "m.yaml", *arguments.split()])
        assert main() == status
        assert shown in "".join(capsys.readouterr())


def test_a_killed_preparation_resumes(layout_of, tmp_path, monkeypatch):
    layout, original = layout_of("hunan"), preparation._write_scene
    one, _, third, *_ = layout.record.scenes

    def killed(scene: Any, *more: Any) -> Any:
        if scene.name == third:
            raise KeyboardInterrupt
        return original(scene, *more)

    monkeypatch.setattr(preparation, "_write_scene", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(layout.dataset, layout.raw, tmp_path)
    monkeypatch.undo()
    with pytest.raises(InputError, match="its preparation was interrupted"):
        make_patches(layout.dataset, tmp_path)
    # The record is written every ten seconds: here it holds the first scene alone.
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / one).glob("*.tif")}
    assert len(first) == 4
    assert prepare(layout.dataset, layout.raw, tmp_path) == layout.record  # with all hashes
    assert {path: path.stat().st_mtime_ns for path in first} == first
    records = [folder / "prepared.json" for folder in (tmp_path, layout.prepared)]
    assert records[0].read_bytes() == records[1].read_bytes()
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("name", ["hunan", "dstl"])
def test_windows_leave_no_seams(layout_of, tmp_path, monkeypatch, name):
    layout = layout_of(name)
    monkeypatch.setattr(alignment, "STEP", 61)
    prepare(layout.dataset, layout.raw, tmp_path)
    for file in (file for made in layout.record.scenes.values() for file in made.outputs):
        paths = layout.prepared / file, tmp_path / file
        np.testing.assert_array_equal(*map(raw.read_raster, paths))
        np.testing.assert_array_equal(*map(raw.read_mask, paths))


# Rasters, polygons and folders of a pair of sensors: what is taken, and what is refused.


FILES = ("optical.tif", "radar.tif", "labels.tif", "clouds.tif")
DEGREES = 4.5e-6  # half a metre: a pixel of very high resolution


@pytest.fixture
def pair(copied):
    return copied("pair")


def pair_with(part: str, name: str, **changes: Any) -> Dataset:
    """The data set with other entries of a band or a modality."""
    content = copy.deepcopy(raw.ENTRIES["pair"])
    content[part][name] |= changes
    return Dataset.model_validate(content)


@pytest.mark.parametrize(("shift", "larger"), [(0, 1), (2, 1), (0, 2)])
def test_a_shift_of_pixels_in_degrees_is_a_shift(pair, tmp_path, shift, larger):
    """In degrees a shift of two pixels is a hundred-thousandth of the unit."""
    grid = rasterio.Affine(DEGREES, 0, 10, 0, -DEGREES, 50)
    for file in FILES:
        raw.rewrite(pair / file, crs="EPSG:4326", transform=grid)
    away = grid * rasterio.Affine.translation(shift, 0) * rasterio.Affine.scale(larger)
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
    turned = (
        rasterio.Affine.translation(5e5, 3e6)
        * rasterio.Affine.rotation(90)
        * rasterio.Affine.scale(10, -10)
    )
    given = {name: raw.read_raster(pair / f"{name}.tif") for name in ("optical", "radar")}
    for file in FILES:
        raw.rewrite(pair / file, transform=turned)
    # The optical bands show the same ground with north up, in pixels of the same size.
    upright = rasterio.Affine(10, 0, 5e5, 0, -10, 3e6 + 960)
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
    for angle in (0, 30):
        place = rasterio.Affine.rotation(angle) * rasterio.Affine.scale(pixel, -pixel)
        made = PreparedScene.model_construct(crs=wkt, transform=place[:6], width=1, height=1)
        assert made.pixel_size == (pytest.approx(size, rel=1e-4), unit)
