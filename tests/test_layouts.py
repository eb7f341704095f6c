"""From the raw layouts that users have to training steps, and what hostile files lead to."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
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
from rasterio.warp import transform_bounds
from scipy.ndimage import distance_transform_cdt, map_coordinates

from lsgs_core import InputError, ScenarioSet, build_backbone, score_scenarios
from lsgs_core import alignment, data_check, rasters
from lsgs_core.evaluation import AlwaysPositive, evaluate
from lsgs_core.folds import LabelledScene, _shuffled_parts, leaks, patch_table
from lsgs_core.losses import segmentation_loss
from lsgs_core.manifest import Dataset, OfficialSplit, Patches, ShuffledPatches, load_manifest
from lsgs_core.patches import PatchDataset, make_patches
from lsgs_core.rasters import Prepared, prepare
from lsgs_core.sampling import FixedSampler
from lsgs_core.schema import read_yaml
from lsgs_core.separation import PARTS, Place, check_separation
from lsgs_core.training import TrainingSettings, train

# Rasters without georeference are what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

WRITERS = {"dstl": raw.write_dstl, "potsdam": raw.write_potsdam, "hunan": raw.write_hunan}
WRITERS["dstl_patches"] = raw.write_author_patches
SIZE: dict[str, Any] = {"size": 32, "stride": 32}
BLOCKS = SIZE | {"count": 3, "block_size": 64, "margin": 8, "validation_blocks": 1}
PAIR = Dataset.model_validate(raw.PAIR)
CLOUDLESS = Dataset.model_validate(raw.PAIR | {"masks": {}})


@dataclass(frozen=True)
class Layout:
    dataset: Dataset
    raw: Path
    prepared: Path
    expected: raw.Codes
    record: Prepared


LayoutOf = Callable[[str], Layout]


@pytest.fixture(scope="session")
def layout_of(tmp_path_factory: pytest.TempPathFactory) -> LayoutOf:
    """Each data set of the manifest, written and prepared once."""

    @cache
    def make(name: str) -> Layout:
        folder, prepared = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("prepared")
        expected, dataset = WRITERS[name](folder), raw.dataset(name)
        return Layout(dataset, folder, prepared, expected, prepare(dataset, folder, prepared))

    return make


@pytest.fixture
def copied(layout_of: LayoutOf, tmp_path: Path) -> Callable[[str], Path]:
    """Raw files of a data set that a test may change."""
    return lambda name: Path(shutil.copytree(layout_of(name).raw, tmp_path / "raw"))


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """Raw files of two sensors that a test may change."""
    raw.write_pair(tmp_path / "raw")
    return tmp_path / "raw"


def is_refused(dataset: Dataset, folder: Path, expected: str) -> None:
    """A preparation fails with this message, and writes nothing."""
    with pytest.raises(InputError, match=expected):
        prepare(dataset, folder, folder.parent / "prepared")
    assert not (folder.parent / "prepared").exists()


def mask(path: Path) -> NDArray[np.bool_]:
    with rasterio.open(path) as raster:
        return raster.read_masks(1) > 0


def backbone(patches: PatchDataset) -> Any:
    torch.manual_seed(0)
    return build_backbone("cmx", "demo", patches.bands, len(patches.classes))


def run(
    patches: PatchDataset, folder: Path, p: list[float] | None = None, model: Any = None
) -> Any:
    """Two steps of training."""
    scenarios = ScenarioSet.of(patches.modalities)
    sampler = FixedSampler(p) if p else FixedSampler.uniform(len(scenarios))
    settings = TrainingSettings(epochs=1, batch_size=-(-len(patches) // 2))
    return train(
        model or backbone(patches),
        patches,
        scenarios,
        sampler,
        settings,
        0,
        folder,
        {},
        None,
        False,
    )


def counts(patches: PatchDataset, model: Any) -> pd.DataFrame:
    scenarios, batches = ScenarioSet.of(patches.modalities), patches.batches(4)
    return evaluate(model, batches, scenarios, patches.classes, patches.task_kind)


# --- from raw files to training steps -------------------------------------------------------------


def bits(codes: NDArray[Any]) -> NDArray[Any]:
    return np.stack([codes >> np.uint16(number) & 1 for number in range(10)])


def first_bit(codes: NDArray[Any]) -> NDArray[Any]:
    """Where polygons overlap, the first class of the manifest's list; else background."""
    order = bits(codes)[[9, 8, 0, 1, 2, 3, 7, 6, 4, 5]]
    return np.where(codes > 0, order.argmax(axis=0), 10)


@pytest.mark.parametrize(
    ("name", "task", "folds", "settings", "target"),
    [
        ("dstl", "land_cover", "spatial", BLOCKS, bits),
        ("dstl", "exclusive", "spatial", BLOCKS, first_bit),
        ("dstl", "class_06", "spatial", BLOCKS, lambda codes: bits(codes)[5:6]),
        ("dstl", "background", "spatial", BLOCKS, lambda codes: codes[None] == 0),
        ("dstl_patches", "class_06", "shuffled", {"size": 32}, lambda codes: codes[None] == 1),
        ("potsdam", "land_cover", "official", SIZE, lambda codes: codes - 1),
        ("potsdam", "car", "scenes", SIZE, lambda codes: codes[None] == 5),
        ("hunan", "land_cover", "official", {"size": 64}, lambda codes: codes - 1),
        ("hunan", "forest", "official", {"size": 64}, lambda codes: codes[None] == 2),
    ],
)
def test_it_trains_on_the_raw_layout(
    layout_of: LayoutOf, tmp_path: Path, name: str, task: str, folds: str,
    settings: dict[str, Any], target: Callable[[NDArray[Any]], NDArray[Any]],
) -> None:  # fmt: skip
    layout = layout_of(name)
    make_patches(layout.dataset, layout.prepared, folds, **settings)
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
    history = run(patches, tmp_path)
    assert np.isfinite(history["loss"]).all()
    assert counts(patches, AlwaysPositive(len(patches.classes)))["tp"].sum() > 0


@pytest.mark.parametrize("name", WRITERS)
def test_labels_are_those_of_an_independent_oracle(layout_of: LayoutOf, name: str) -> None:
    layout = layout_of(name)
    assert set(layout.record.scenes) == set(layout.expected)  # DSTL's unlabelled image is left out
    for scene, codes in layout.expected.items():
        found = raw.read_raster(layout.prepared / scene / "labels.tif")[0]
        np.testing.assert_array_equal(found, codes)
    assert min(sum(s.label_pixels[v] for s in layout.record.scenes.values())
               for v in layout.dataset.labels.names) > 0  # fmt: skip


# --- DSTL -----------------------------------------------------------------------------------------


def test_dstl_has_its_traps(layout_of: LayoutOf) -> None:
    layout = layout_of("dstl")
    table = (layout.raw / "train_wkt_v4.csv").read_text()
    assert max(map(len, table.splitlines())) > 131072
    assert "MULTIPOLYGON EMPTY" in table
    crops_and_trees = 1 << 5 | 1 << 4
    assert (layout.expected["6010_0_0"] == crops_and_trees).sum() > 1000
    with rasterio.open(layout.raw / "sixteen_band/6110_3_1_A.tif") as raster:
        assert (raster.height, raster.crs) == (51, None)  # 1300 / 25 are 52


@pytest.mark.parametrize("image", raw.LABELLED)
def test_coarse_bands_are_stretched_over_the_image(layout_of: LayoutOf, image: str) -> None:
    layout = layout_of("dstl")
    for modality, kind, channels in (("NIR", "M", np.s_[5:8]), ("SWIR", "A", np.s_[0:3])):
        coarse = raw.read_raster(layout.raw / f"sixteen_band/{image}_{kind}.tif")[channels]
        fine = raw.read_raster(layout.prepared / image / f"{modality}.tif")
        centres = [
            ((np.arange(long) + 0.5) * short / long - 0.5).clip(0, short - 1)
            for long, short in zip(fine.shape[1:], coarse.shape[1:], strict=True)
        ]
        places = np.meshgrid(*centres, indexing="ij")
        for given, found in zip(coarse.astype(float), fine, strict=True):
            np.testing.assert_allclose(found, map_coordinates(given, places, order=1), atol=0.51)


def swap_m_and_a(folder: Path) -> None:
    for path in list((folder / "sixteen_band").glob("*_M.tif")):
        other = path.with_name(path.name.replace("_M", "_A"))
        coarse, fine = raw.read_raster(other), raw.read_raster(path)
        raw.write_raster(path, coarse)
        raw.write_raster(other, fine)


def edit(file: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new, 1))

    return change


TABLE, EXTENTS = "train_wkt_v4.csv", "grid_sizes.csv"
EMPTY = "6010_0_0,2,"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (swap_m_and_a, "6010_0_0_M.tif: expected pixels 4 times as large .* found 25 × 25"),
        (edit(TABLE, EMPTY, "6010_0_0,6,"), f"{TABLE}: class 6 of 6010_0_0 is there twice"),
        (edit(TABLE, EMPTY, "6010_0_0,11,"), f"{TABLE}: ClassType .'11'. is not in labels.values"),
        (edit(TABLE, 'MULTIPOLYGON EMPTY"', 'NOTHING"'), f"{TABLE}: 6010_0_0: no well-known text"),
        (edit(TABLE, "ClassType", "Class"), f"{TABLE}: expected the columns .'ClassType'."),
        (edit(EXTENTS, "6010_1_2,", "6010_9_9,"), f"{EXTENTS}: expected one row for 6010_1_2"),
        (edit(EXTENTS, "6010_0_0,0.0", "6010_0_0,x"), f"{EXTENTS}: 6010_0_0: expected numbers"),
        (edit(EXTENTS, "6010_0_0,0.0", "6010_0_0,-0.0"), f"{EXTENTS}: 6010_0_0: expected Xmax > 0"),
        (lambda folder: (folder / EXTENTS).unlink(), f"{EXTENTS}: the file is missing"),
    ],
)
def test_bad_dstl_files_are_named(
    copied: Callable[[str], Path], damage: Callable[[Path], None], expected: str
) -> None:
    damage(folder := copied("dstl"))
    is_refused(raw.dataset("dstl"), folder, expected)


def test_what_archives_of_macos_leave_behind_is_no_scene(copied: Callable[[str], Path]) -> None:
    folder = copied("dstl")
    for place in ("__MACOSX/three_band", "three_band"):
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / place / "._6010_0_0.tif").write_bytes(b"Mac OS X")
    record = prepare(raw.dataset("dstl"), folder, folder.parent / "prepared")
    assert list(record.scenes) == list(raw.LABELLED)


# --- Potsdam --------------------------------------------------------------------------------------

POTSDAM_LABELS = raw.entry("potsdam")["labels"]
HEIGHT_FILES = "dsm_potsdam_07_12.tif", "dsm_potsdam_02_13_normalized_lastools.jpg"


def test_the_narrow_tile_lacks_heights_in_its_last_column_only(layout_of: LayoutOf) -> None:
    folder = layout_of("potsdam").prepared / raw.NARROW
    seen = mask(folder / "height.tif")
    assert seen[:, :-1].all()
    assert not seen[:, -1].any()
    assert mask(folder / "RGB.tif")[:, -1].all()


@pytest.mark.parametrize("tile", [raw.NOT_ALPHA, raw.NARROW])
def test_near_infrared_of_0_hides_nothing(layout_of: LayoutOf, tile: str) -> None:
    """Whether GDAL tags the fourth channel as alpha or not."""
    layout = layout_of("potsdam")
    for modality in ("RGB", "NIR"):
        assert mask(layout.prepared / tile / f"{modality}.tif")[raw.DARK].all()


def test_the_official_split_is_that_of_the_contest() -> None:
    codes = np.ones((32, 32), np.uint8)
    rows = {2: range(10, 15), 3: range(10, 15), 4: range(10, 16), 5: range(10, 16)}
    rows |= {6: range(7, 16), 7: range(7, 14)}
    tiles = {f"{row}_{column}" for row, columns in rows.items() for column in columns}
    trained = {f"{row}_{column}" for row in range(2, 8) for column in (10, 11, 12)}
    trained |= {f"{row}_{column}" for row in (6, 7) for column in (7, 8, 9)}
    scenes = [
        LabelledScene(tile, (32, 32), lambda top, bottom: codes[top:bottom]) for tile in tiles
    ]
    member = np.arange(256)[:, None] == [1]
    official = raw.dataset("potsdam").fold_definition("official")
    table = patch_table(scenes, member, ["a"], Patches(size=32), official)
    parts = table.groupby("fold_0")["scene"].agg(set)
    assert (len(tiles), len(trained)) == (38, 24)
    assert parts["training"] | parts["validation"] == trained
    assert parts["test"] == tiles - trained
    assert len(parts["validation"]) == 3


def labels_of_another_size(folder: Path) -> None:
    path = folder / "5_Labels_all_noBoundary/top_potsdam_3_12_label_noBoundary.tif"
    raw.write_raster(path, raw.read_raster(path)[:, :90])


@pytest.mark.parametrize(
    ("labels", "damage", "expected"),
    [
        ({}, labels_of_another_size, "3_12_label_noBoundary.tif: expected 96 × 96 .* 96 × 90"),
        ({}, lambda folder: (folder / "1_DSM" / HEIGHT_FILES[0]).unlink(), HEIGHT_FILES[0]),
        ({"unlisted": "error", "threshold": None}, lambda folder: None, "4_12.*holds .'#0000f"),
    ],
)
def test_bad_potsdam_files_are_named(
    copied: Callable[[str], Path], labels: dict[str, Any],
    damage: Callable[[Path], None], expected: str,
) -> None:  # fmt: skip
    damage(folder := copied("potsdam"))
    is_refused(raw.dataset("potsdam", labels=POTSDAM_LABELS | labels), folder, expected)


def without_heights(folder: Path) -> Dataset:
    """Potsdam with a file of heights missing in a tile for training and in one for test."""
    for file in HEIGHT_FILES:
        next(folder.rglob(file)).unlink()
    dataset = raw.dataset("potsdam", may_be_absent=["height"])
    prepare(dataset, folder, folder.parent / "prepared")
    make_patches(dataset, folder.parent / "prepared", "official", **SIZE)
    return dataset


def test_tiles_may_lack_a_modality(copied: Callable[[str], Path], tmp_path: Path) -> None:
    dataset = without_heights(copied("potsdam"))
    patches = PatchDataset(tmp_path / "prepared", dataset, "land_cover", 0, "training")
    lacking = patches.table["scene"] == "7_12"
    batch = patches.batch(range(len(patches)))
    assert batch.available[:, :2].all()
    assert batch.available[:, 2].tolist() == (~lacking).tolist()
    assert lacking.sum() == 9
    assert not batch.images[2][lacking.to_numpy()].any()
    model, drawn = backbone(patches), []
    model.register_forward_pre_hook(lambda _, given: drawn.append((given[0][2], given[1][:, 2])))
    run(patches, tmp_path / "run", model=model)
    empty = torch.cat([~images.flatten(1).any(dim=1) for images, _ in drawn])
    assert empty.sum() == 9
    assert torch.cat([present for _, present in drawn])[~empty].any()
    assert not torch.cat([present for _, present in drawn])[empty].any()
    scenarios = ScenarioSet.of(patches.modalities)
    scores = score_scenarios(model, patches.batches(8), scenarios, progress=False)
    assert scores.patch_ids.tolist() == patches.patch_ids[~lacking].tolist()


def world_files(folder: Path) -> None:
    for path in folder.rglob("*RGBIR.tif"):
        path.with_suffix(".tfw").write_text("0.05\n0\n0\n-0.05\n366976.525\n5808718.475\n")


def tagged_heights(folder: Path) -> None:
    world_files(folder)
    place = rasterio.Affine(0.05, 0, 366976.5, 0, -0.05, 5808718.5)
    for path in folder.rglob("dsm*.tif"):
        raw.write_raster(path, raw.read_raster(path), crs="EPSG:32633", transform=place)


def no_transform(folder: Path) -> None:
    for path in folder.rglob("*RGBIR.tif"):
        raw.write_raster(path, raw.read_raster(path), crs="EPSG:32633")


@pytest.mark.parametrize("change", [world_files, tagged_heights, no_transform])
def test_half_a_georeference_does_no_harm(
    layout_of: LayoutOf, copied: Callable[[str], Path], tmp_path: Path,
    change: Callable[[Path], None],
) -> None:  # fmt: skip
    layout = layout_of("potsdam")
    change(folder := copied("potsdam"))
    prepare(layout.dataset, folder, tmp_path / "prepared")
    for name in ("labels", "height"):
        one, other = (
            at / "2_10" / f"{name}.tif" for at in (layout.prepared, tmp_path / "prepared")
        )
        np.testing.assert_allclose(raw.read_raster(one), raw.read_raster(other), rtol=1e-4)
    assert len(make_patches(layout.dataset, tmp_path / "prepared", "official", **SIZE)) > 20


# --- Hunan ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scene", ["train_1", "train_2", "val_21", "test_2"]
)  # 13, 12, 12, 13 bands
def test_hunan_bands(layout_of: LayoutOf, scene: str) -> None:
    layout = layout_of("hunan")
    split, name = scene.split("_")
    files = {kind: layout.raw / f"Hunan_Dataset/{split}/{kind}/{kind}_{name}.tif"
             for kind in ("s2", "s1")}  # fmt: skip
    made = {name: raw.read_raster(layout.prepared / scene / f"{name}.tif")
            for name in layout.dataset.modalities}  # fmt: skip
    bands, radar = (raw.read_raster(path) for path in files.values())
    assert len(bands) == (12 if scene in ("train_2", "val_21") else 13)
    chosen = bands[[3, 2, 1, 0, 4, 5, 6, 7, 8, 9, -2, -1]]
    np.testing.assert_array_equal(made["optical"], chosen)
    np.testing.assert_array_equal(made["SAR"], [*radar, radar[0] - radar[1]])
    # An inclined plane: the same slope everywhere, at the edges too.
    slope = np.degrees(np.arctan(np.hypot(raw.PER_COLUMN, raw.PER_ROW) / 10))
    np.testing.assert_allclose(made["terrain"][2], slope, atol=1e-3)


def test_every_raw_number_is_looked_up(layout_of: LayoutOf) -> None:
    layout = layout_of("hunan")
    numbers = raw.read_raster(layout.raw / "Hunan_Dataset/train/lc/lc_1.tif")
    codes = raw.read_raster(layout.prepared / "train_1/labels.tif")
    table = {n: raw.PUBLISHED[12 if n == 255 else n] for n in [*range(13), 255]}
    folded = {n: 255 if value == 255 else min(value, 6) + 1 for n, value in table.items()}
    assert {n: set(codes[numbers == n].tolist()) for n in table} == {n: {folded[n]} for n in table}


def test_the_official_folds_are_the_folders(layout_of: LayoutOf) -> None:
    layout = layout_of("hunan")
    table = make_patches(layout.dataset, layout.prepared, "official", size=64)
    folders = {"train": "training", "val": "validation", "test": "test"}
    assert table["fold_0"].tolist() == table["scene"].str.split("_").str[0].map(folders).tolist()
    assert len(table) == 8


# --- the authors' patches -------------------------------------------------------------------------


def test_patches_are_paired_by_name(layout_of: LayoutOf) -> None:
    layout = layout_of("dstl_patches")
    for scene in layout.expected:
        stack = scipy.io.loadmat(layout.raw / f"all20Ch/{scene}.mat")["inputPatch"]
        for modality, channels in (
            ("RGB", [0, 1, 2]),
            ("NIR", [9, 10, 11]),
            ("SWIR", [12, 13, 14]),
        ):
            made = raw.read_raster(layout.prepared / scene / f"{modality}.tif")
            np.testing.assert_allclose(np.moveaxis(made, 0, -1), stack[..., channels], atol=1)


@pytest.mark.parametrize(("count", "folds"), [(60, 5), (61, 5), (5985, 5)])
def test_the_authors_split(tmp_path: Path, count: int, folds: int) -> None:
    order = np.random.default_rng(3).permutation(count).tolist()
    path = raw.write_index_file(tmp_path / "index.txt", order)
    parts = _shuffled_parts(count, ShuffledPatches(kind="shuffled_patches", count=folds), path)
    assert len(parts) == folds
    share = count // folds
    for fold, found in enumerate(parts):
        places = range(fold * share, (fold + 1) * share)
        rest = [place for place in range(count) if place not in places]
        wanted = {order[place]: "training" for place in rest}
        wanted |= {order[place]: "validation" for place in rest[: int(0.1 * (count - share))]}
        wanted |= {order[place]: "test" for place in places}
        assert dict(enumerate(found.tolist())) == wanted
    if count == 5985:
        assert [(parts[1] == part).sum() for part in PARTS] == [4310, 478, 1197]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("0\n" * 12, "permutation of 0 … 11.* found 12 numbers, 1 different"),
        ("\n".join(map(str, range(11))), "found 11 numbers"),
        ("\n".join(map(str, range(1, 13))), "permutation of 0 … 11"),
        ("first\n" * 12, "expected whole numbers, one a line"),
        (None, "expected whole numbers, one a line"),
    ],
)
def test_bad_index_files_are_named(
    layout_of: LayoutOf, tmp_path: Path, content: str | None, expected: str
) -> None:
    layout, path = layout_of("dstl_patches"), tmp_path / "index.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=f"index.txt: .*{expected}"):
        make_patches(layout.dataset, layout.prepared, index_file=path, size=32)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "the file is missing"),
        (b"no", "cannot be read as a .mat file"),
        (b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(400), "v7.3 files"),
        ({"patch": np.zeros((32, 32, 20))}, "expected a variable inputPatch of numbers"),
        ({"inputPatch": "text"}, "expected a variable inputPatch of numbers"),
        ({"inputPatch": np.zeros((32, 32, 3))}, "has no channel 10, only 3"),
        ({"inputPatch": np.zeros((32, 30, 20))}, "expected 32 × 32 pixels .* found 30 × 32"),
    ],
)
def test_bad_patches_are_named(copied: Callable[[str], Path], content: Any, expected: str) -> None:
    path = copied("dstl_patches") / "all20Ch/6010_5_patch11.mat"
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        scipy.io.savemat(path, content)
    is_refused(raw.dataset("dstl_patches"), path.parents[1], f"6010_5_patch11.mat: .*{expected}")


# --- folds ----------------------------------------------------------------------------------------


def painted(rows: pd.DataFrame, shape: tuple[int, int]) -> NDArray[np.int64]:
    """How many patches each pixel is in."""
    times = np.zeros(shape, dtype=np.int64)
    for top, left, size in rows[["row", "column", "size"]].to_numpy():
        times[top : top + size, left : left + size] += 1
    return times


@pytest.mark.parametrize(
    ("name", "folds", "settings"),
    [
        ("dstl", "spatial", BLOCKS | {"stride": 16}),
        ("dstl", "scenes", {"size": 32, "stride": 16, "count": 3, "validation_scenes": 1}),
        ("dstl", "shuffled", {"size": 32, "stride": 16}),
        ("potsdam", "official", {"size": 32, "stride": 16}),
        ("hunan", "scenes", {"size": 32, "stride": 16, "validation_scenes": 2}),
    ],
)
def test_no_pixel_is_in_two_parts(
    layout_of: LayoutOf, caplog: pytest.LogCaptureFixture,
    name: str, folds: str, settings: dict[str, Any],
) -> None:  # fmt: skip
    layout = layout_of(name)
    table = make_patches(layout.dataset, layout.prepared, folds, **settings)
    columns = [column for column in table if column.startswith("fold_")]
    assert len(columns) == {"official": 1}.get(folds, settings.get("count", 5))
    for scene, made in layout.record.scenes.items():
        tested = np.zeros((made.height, made.width), dtype=np.int64)
        for column in columns:
            rows = table[table["scene"] == scene]
            parts = {p: painted(rows[rows[column] == p], tested.shape) for p in PARTS}
            assert sum((times > 0).astype(int) for times in parts.values()).max() == 1
            assert max(parts["validation"].max(), parts["test"].max()) <= 1  # tiles
            tested += parts["test"]
            for one, other in [("training", "test"), ("training", "validation")] * (
                folds == "spatial" and parts["training"].any()
            ):
                if parts[other].any():
                    away = distance_transform_cdt(parts[other] == 0, metric="chessboard")
                    assert away[parts[one] > 0].min() > settings["margin"]
        assert tested.max() <= 1
    for column in columns:
        assert set(table[column]) >= set(PARTS)
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
        ("EPSG:32649", 0, "test", True),  # the next zone
    ],
)
def test_scenes_that_show_the_same_ground(
    crs: str, metres: float, part: str, refused: bool
) -> None:
    one = Place((50, 50), raw.UTM, raw.ground()["transform"])
    bounds = (5e5 + metres, 3e6 - 500, 5e5 + metres + 500, 3e6)
    bounds = bounds if crs == raw.UTM else transform_bounds(raw.UTM, crs, *bounds)
    other = Place((50, 50), crs, rasterio.transform.from_bounds(*bounds, 50, 50))
    patch = {"row": 0, "column": 0, "size": 50}
    table = pd.DataFrame([patch | {"scene": "a", "fold_0": "training"},
                          patch | {"scene": "b", "fold_0": part}])  # fmt: skip
    check_separation(table, 0, 0)
    if refused:
        with pytest.raises(InputError, match=f"fold 0: 1 training patches of scene a .* {part}"):
            check_separation(table, 0, 0, {"a": one, "b": other})
    else:
        check_separation(table, 0, 0, {"a": one, "b": other})


@pytest.mark.parametrize("size", [64, 2000])
@pytest.mark.parametrize(("start", "margin"), [(-1, 0), (0, 1), (31, 32)])
def test_one_pixel_too_close_is_found(size: int, start: int, margin: int) -> None:
    table = pd.DataFrame({"scene": "a", "row": 0, "column": [0, size + start], "size": size})
    table["fold_0"] = ["training", "test"]
    with pytest.raises(InputError, match=f"fold 0: 1 training patches .* within {margin} pixels"):
        check_separation(table, 0, margin)
    table["column"] += [0, 1]
    check_separation(table, 0, margin)


@pytest.mark.parametrize(("trained", "validation"), [(3, 2), (4, 3), (5, 3)])
def test_as_many_validation_scenes_as_asked_for(trained: int, validation: int) -> None:
    codes, names = np.ones((32, 32), np.uint8), [f"s{n}" for n in range(trained + 1)]
    scenes = [
        LabelledScene(name, (32, 32), lambda top, bottom: codes[top:bottom]) for name in names
    ]
    folds = OfficialSplit(kind="official", training=names[:-1], test=names[-1:],
                          validation_scenes=validation)  # fmt: skip
    member = np.arange(256)[:, None] == [1]
    table = patch_table(scenes, member, ["a"], Patches(size=32), folds)
    assert (table["fold_0"] == "validation").sum() == validation


# --- clouds ---------------------------------------------------------------------------------------


class Flipped(PatchDataset):
    """Another target where clouds hide the optical bands."""

    def batch(self, indices: Any) -> Any:
        batch = super().batch(indices)
        hidden = torch.zeros_like(batch.valid) if batch.seen is None else ~batch.seen[:, 0]
        return replace(batch, target=torch.where(hidden, 1 - batch.target, batch.target))


def test_what_no_present_modality_sees_is_not_counted(pair: Path, tmp_path: Path) -> None:
    prepared = tmp_path / "prepared"
    prepare(PAIR, pair, prepared)
    clouds = raw.read_raster(pair / "clouds.tif")[0] > 0
    np.testing.assert_array_equal(mask(prepared / "scene/optical.tif"), ~clouds)
    assert mask(prepared / "scene/radar.tif").all()
    make_patches(PAIR, prepared)
    for fold, hidden in ((0, 32 * 20), (1, 8 * 20)):  # in the test patches of each
        sorts = [
            kind(prepared, PAIR, "land_cover", fold, "test") for kind in (PatchDataset, Flipped)
        ]
        true, flipped = (counts(patches, AlwaysPositive(2)) for patches in sorts)
        pixels = true.groupby("scenario")[["tp", "fn"]].sum().sum(axis=1).to_dict()
        whole = len(sorts[0]) * 32**2
        assert pixels == {"optical": whole - hidden, "radar": whole, "optical+radar": whole}
        same = (true == flipped).all(axis=1).groupby(true["scenario"]).all().to_dict()
        assert same == {"optical": True, "radar": False, "optical+radar": False}
    sorts = [kind(prepared, PAIR, "land_cover", 0, "training") for kind in (PatchDataset, Flipped)]
    for p, agree in (([1.0, 0, 0], True), ([0, 1.0, 0], False)):
        one, other = (run(s, tmp_path / f"{p}{n}", p)["loss"][0] for n, s in enumerate(sorts))
        assert (one == other) == agree
    batch = sorts[0].batch(range(len(sorts[0])))
    alone, both = (batch.counted(torch.tensor([[True, radar]])) for radar in (False, True))
    assert (both.sum() - alone.sum()).item() == 8 * 20
    loss = segmentation_loss(
        torch.zeros(len(batch.valid), 2, 32, 32), batch.target, alone, "multiclass"
    )
    np.testing.assert_allclose(loss[0], np.log(2), rtol=1e-6)
    scenarios = ScenarioSet.of(PAIR.modalities)
    scores = score_scenarios(backbone(sorts[0]), sorts[0].batches(3), scenarios, progress=False)
    clouded = (sorts[0].table["row"] == 32) & (sorts[0].table["column"] == 0)
    assert clouded.sum() == 1
    assert scores.patch_ids.tolist() == sorts[0].patch_ids[~clouded].tolist()


@pytest.mark.parametrize("why", ["absent", "clouded"])
def test_patches_that_a_scenario_cannot_serve_are_evaluated(
    copied: Callable[[str], Path], tmp_path: Path, why: str
) -> None:
    """Under a scenario of which a patch has nothing, none of its pixels count."""
    if why == "absent":
        dataset, scenario = without_heights(copied("potsdam")), "height"
    else:
        dataset, scenario = PAIR, "optical"
        raw.write_pair(tmp_path / "raw", np.s_[:32, :32])
        prepare(dataset, tmp_path / "raw", tmp_path / "prepared")
        make_patches(dataset, tmp_path / "prepared")
    patches = PatchDataset(tmp_path / "prepared", dataset, "land_cover", 0, "test")
    column = list(dataset.modalities).index(scenario)
    lacking = ~torch.cat([batch.available[:, column] for batch in patches.batches(8)])
    assert 0 < lacking.sum() < len(patches)
    records = counts(patches, backbone(patches))
    blocks = patches.block_ids[lacking.numpy()]
    alone = records[(records["scenario"] == scenario) & records["block"].isin(blocks)]
    assert alone[["tp", "fp", "fn"]].to_numpy().sum() == 0


# --- hostile files --------------------------------------------------------------------------------


def rewrite(name: str, change: Any = lambda pixels: pixels, **profile: Any) -> Any:
    """Write a raster again, its pixels changed, or its profile."""

    def damage(folder: Path) -> None:
        path = folder / f"{name}.tif"
        raw.write_raster(path, change(raw.read_raster(path)), **raw.ground() | profile)

    return damage


def describe(folder: Path) -> None:
    with rasterio.open(folder / "radar.tif", "r+") as raster:
        raster.descriptions = ("VH",)


def cut(folder: Path) -> None:
    (folder / "optical.tif").write_bytes((folder / "optical.tif").read_bytes()[:-9000])


def nested_twice(folder: Path) -> None:
    for place in ("one", "two"):
        shutil.copytree(folder, folder / place, ignore=shutil.ignore_patterns("one", "two"))
    for path in folder.glob("*.tif"):
        path.unlink()


FAR = {"transform": rasterio.Affine(10, 0, 7e5, 0, -10, 3e6)}


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (cut, "optical.tif: is damaged, truncated or no raster"),
        (
            lambda folder: (folder / "radar.tif").write_bytes(b"II*\0" + b"no" * 99),
            "radar.tif: is dam",
        ),
        (rewrite("optical", lambda p: p[:1]), "optical.tif: has no channel 2, only 1"),
        (rewrite("optical", lambda p: p[[0, 1, 1]]), "optical.tif: expected 2 channels, found 3"),
        (describe, "radar.tif: expected 'VV' as channel 1, found 'VH': are bands swapped"),
        (rewrite("labels", lambda p: p + 6), r"labels.tif: holds \[7, 8\], listed neither"),
        (rewrite("labels", lambda p: p / 2), "labels.tif: expected whole numbers as labels"),
        (rewrite("labels", lambda p: p * 0 + 1), r"labels.values: \['high'\] occur in no scene"),
        (rewrite("clouds", crs=None, transform=None), "clouds.tif: .*give `crs`, or .placement"),
        (rewrite("radar", crs=None, transform=None), "radar.tif: .*or for files without georef"),
        (rewrite("optical", **FAR), "optical.tif: does not overlap the reference band"),
        (nested_twice, "optical.tif is there more than once"),
        (lambda folder: (folder / "clouds.tif").unlink(), "clouds.tif: the file is missing"),
    ],
)
def test_hostile_files_are_named(pair: Path, damage: Callable[[Path], None], expected: str) -> None:
    damage(pair)
    is_refused(PAIR, pair, expected)


def test_a_scene_that_is_there_twice(copied: Callable[[str], Path]) -> None:
    folder = copied("hunan")
    shutil.copytree(folder / "Hunan_Dataset/train", folder / "again/train")
    is_refused(raw.dataset("hunan"), folder, "scene train_1 is there twice: .*s2_1.tif and .*s2_1")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"labels": {"file": "../up.tif"}}, "pair.labels.*file.*without '..'"),
        ({"labels": {"file": "/etc/up.tif"}}, "pair.labels.*file.*relative to"),
        ({"masks": {"optical": {"file": "C:\\up.tif"}}}, "pair.masks.optical.file.*relative to"),
        ({"scenes": {"a": {"up": "../b"}}, "labels": {"file": "${up}.tif"}}, "pair: .*without '..'"),
        ({"labels": {"file": "${tile}.tif"}}, "pair: .*needs the name 'tile'"),
        ({"colour": "red"}, "pair.colour: is not known here"),
        ({"tasks": {"roads": {"kind": "binary", "classes": ["road"]}}},
         "tasks.roads.classes.road: no label value .'road'."),
        ({"masks": {"sonar": {}}}, "pair.masks.sonar.file"),
        ({"may_be_absent": ["radar"]}, "may_be_absent: .*reference band"),
    ],
)  # fmt: skip
def test_bad_manifests_name_the_field(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    content = json.loads(json.dumps(raw.PAIR))
    for field, value in changes.items():
        merged = {**content.get(field, {}), **value} if isinstance(value, dict) else value
        content[field] = merged
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"datasets": {"pair": content}}))
    with pytest.raises(InputError, match=f"(?s)m.yaml: .*{expected}"):
        load_manifest(tmp_path / "m.yaml")


def test_keys_that_are_there_twice_are_mistakes_and_merged_ones_are_not(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text("a: {x: 1, y: 2, x: 3}")
    with pytest.raises(InputError, match="m.yaml: .*'x' is there twice"):
        read_yaml(path)
    path.write_text("a: {b: &B {<<: {x: 1}, x: 2}}\nc: {<<: *B, y: 3}")
    assert read_yaml(path) == {"a": {"b": {"x": 2}}, "c": {"x": 2, "y": 3}}


@pytest.mark.parametrize("pixel", [5, 10, 20])
def test_a_hole_in_one_channel_is_a_hole(pair: Path, tmp_path: Path, pixel: int) -> None:
    """Whether the file is resampled or not; what is declared as nodata is never blended."""
    side = 960 // pixel
    bands = np.full((2, side, side), 50, np.uint16)
    bands[0, side // 4 : side // 2, side // 4 : side // 2] = 9
    raw.write_raster(pair / "optical.tif", bands, nodata=9, **raw.ground(pixel))
    prepare(CLOUDLESS, pair, tmp_path / "prepared")
    seen = mask(tmp_path / "prepared/scene/optical.tif")
    made = raw.read_raster(tmp_path / "prepared/scene/optical.tif")
    assert not seen[25:47, 25:47].any()
    assert seen.sum() >= 96**2 - 26**2
    assert set(made[:, seen].flat) == {50}


# --- checks and interruptions ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "state", "problem"),
    [
        (lambda folder: None, "ready", ""),
        (lambda folder: (folder / "radar.tif").unlink(), "missing", "radar.tif"),
        (cut, "damaged", "optical.tif"),
        (rewrite("labels", lambda p: p * 0 + 1), "damaged", "labels.values: ['high']"),
        (shutil.rmtree, "absent", ""),
    ],
)
def test_data_check(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None], state: str, problem: str,
) -> None:  # fmt: skip
    damage(pair)
    report = data_check.check_data(PAIR, pair)
    assert report.state == state
    assert problem in "".join(report.problems)
    assert bool(report.problems) == bool(problem)
    assert state in str(report)
    path = tmp_path / "m.yaml"
    path.write_text(yaml.safe_dump({"datasets": {"pair": raw.PAIR, "other": raw.PAIR}}))
    monkeypatch.chdir(tmp_path)
    by_name = ["data_check", "--manifest", str(path), "--dataset", "pair", "--raw", str(pair)]
    monkeypatch.setattr("sys.argv", by_name)
    assert data_check.main() == int(state != "ready")
    assert f"pair (Two sensors): {state}" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", by_name[:3])  # all of them, in work/downloads
    assert data_check.main() == 0
    assert "other (Two sensors): absent" in capsys.readouterr().out


@pytest.mark.parametrize("name", WRITERS)
def test_the_raw_layouts_are_ready(layout_of: LayoutOf, name: str) -> None:
    layout = layout_of(name)
    report = data_check.check_data(layout.dataset, layout.raw)
    assert (report.state, report.scenes) == ("ready", len(layout.expected))
    assert report.sizes == {scene: codes.shape for scene, codes in layout.expected.items()}
    assert "the whole data set has" in str(report)


def test_a_killed_preparation_goes_on(
    layout_of: LayoutOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, original = layout_of("hunan"), rasters._prepare_scene

    def killed(dataset: Dataset, scene: Any, *rest: Any) -> Any:
        if scene.name == list(layout.record.scenes)[1]:
            raise KeyboardInterrupt
        return original(dataset, scene, *rest)

    monkeypatch.setattr(rasters, "_prepare_scene", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(layout.dataset, layout.raw, tmp_path)
    monkeypatch.undo()
    first = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.tif")}
    assert len(first) == 4
    assert prepare(layout.dataset, layout.raw, tmp_path) == layout.record  # its hashes too
    assert {path: path.stat().st_mtime_ns for path in first} == first
    assert json.loads((tmp_path / "prepared.json").read_text()) == json.loads(
        (layout.prepared / "prepared.json").read_text()
    )


@pytest.mark.parametrize("name", ["hunan", "dstl"])
def test_windows_leave_no_seams(
    layout_of: LayoutOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    layout = layout_of(name)
    monkeypatch.setattr(alignment, "STEP", 61)
    record = prepare(layout.dataset, layout.raw, tmp_path)
    for scene, made in layout.record.scenes.items():
        assert record.scenes[scene].label_pixels == made.label_pixels
        for file in made.outputs:
            paths = layout.prepared / file, tmp_path / file
            np.testing.assert_array_equal(*map(raw.read_raster, paths))
            np.testing.assert_array_equal(*map(mask, paths))
