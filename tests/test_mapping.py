"""Maps of whole scenes: what they carry, which sensors served them, and that they have no seams."""

import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import rasterio
import scene
import torch
from checkout import ROOT
from raw_layouts import read_raster as read
from rio_cogeo.cogeo import cog_validate
from study.comparison.cases import worth_to_network
from study.data import alignment
from study.data.patches import PatchDataset
from study.figures.maps import class_maps, scene_pictures
from study.provenance.artifacts import Record, load_weights, save_weights
from study.provenance.devices import seed_weights
from study.stages import mapping
from study.stages.mapping import make_map, plan_maps, sentence
from study.stages.parameters import notebook_parameters
from study.training.checkpoints import build_network

from lsgs_core import InputError


@pytest.fixture(scope="module")
def weights(prepared, dataset, tmp_path_factory):
    """A network with fresh weights and the record that one of this study has."""
    patches = PatchDataset(prepared, dataset, "land_cover", 0, "training")
    seed_weights(0, "pretraining")
    model = build_network("cmx", "demo", patches)
    made_with = {"model": model.configuration, "description": patches.description.model_dump()}
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    return save_weights(path, model.state_dict(), Record(made_with))


@pytest.fixture
def parameters(weights, manifest, raw, tmp_path):
    defaults = notebook_parameters(ROOT / "notebooks" / "06_mapping.ipynb")
    own = {"work": tmp_path, "manifest": manifest, "raw": raw, "weights": weights, "device": "cpu"}
    return defaults | {name: str(value) for name, value in own.items()}


def test_a_map_carries_what_a_reader_needs(parameters):
    [plan] = plan_maps(parameters)
    table = make_map(plan)
    assert table[["scenario", "share"]].to_numpy().tolist() == [["RGB+NIR+SWIR", 1.0]]
    assert f"{plan.folder.name}: 73,728 pixels were mapped: 100.0%" in sentence(plan, table)
    assert worth_to_network(plan.network).empty  # there are no records
    for layer in plan.layers:
        assert cog_validate(plan.path(layer), strict=True, quiet=True)[0], layer.name
    with rasterio.open(plan.path(plan.layers[0])) as raster:
        assert raster.crs == scene.CRS
        assert raster.transform == rasterio.Affine(10, 0, scene.LEFT, 0, -10, scene.TOP)
        assert raster.shape == (scene.HEIGHT, scene.WIDTH)
        assert raster.descriptions[0] == "likeliest class"
        assert raster.tags()["id_3"] == "forest"
        assert raster.colormap(1)[3] == (0x11, 0x77, 0x33, 255)  # that of the manifest
        classes, bits = raster.read()
    probabilities = read(plan.path(plan.layers[1]))
    likeliest = probabilities.argmax(axis=0) + 1
    np.testing.assert_array_equal(classes, likeliest * (probabilities >= 0.5).any(axis=0))
    np.testing.assert_array_equal(bits & 1, probabilities[0] >= 0.5)
    figure = class_maps({"whole": plan.path(plan.layers[0])}, scene_pictures(plan.scene, plan.grid))
    assert [panel.get_title() for panel in figure.axes[:4]] == ["RGB", "NIR", "SWIR", "whole"]


def test_a_missing_file_is_a_missing_sensor(parameters, raw, tmp_path):
    """It gives the map that leaving the sensor out by choice gives."""
    [chosen] = plan_maps(parameters, without="SWIR")
    assert make_map(chosen)["scenario"].tolist() == ["RGB+NIR"]
    poorer = shutil.copytree(raw, tmp_path / "poorer")
    (poorer / scene.band_path("B11")).unlink()
    (poorer / scene.POLYGONS).unlink()  # a map needs no labels
    [forced] = plan_maps(parameters | {"raw": str(poorer)})
    assert [plan.folder.name.count(plan.scene.name) for plan in (chosen, forced)] == [1, 1]
    [whole] = plan_maps(parameters)
    assert len({plan.folder for plan in (chosen, forced, whole)}) == 3  # none overwrites another
    assert make_map(forced)["scenario"].tolist() == ["RGB+NIR"]
    for layer in chosen.layers:
        np.testing.assert_array_equal(read(chosen.path(layer)), read(forced.path(layer)))


def test_pixels_that_no_sensor_sees_stay_empty(parameters, raw, tmp_path):
    holed = shutil.copytree(raw, tmp_path / "holed")
    for band in ("B02", "B03", "B04"):
        pixels = read(raw / scene.band_path(band))[0]
        pixels[:, :96] = 0
        scene.write_band(holed / scene.band_path(band), pixels, "GTiff", nodata=0)
    changed = parameters | {"raw": str(holed)}
    [plan] = plan_maps(changed, without="NIR+SWIR")
    table = make_map(plan).set_index("scenario")["share"]
    assert table["no data"] == pytest.approx(0.25)
    assert table["RGB"] == pytest.approx(0.75)
    empty = read(plan.path(plan.layers[2]))[0] == 0
    assert empty[:, :96].all()
    assert np.isnan(read(plan.path(plan.layers[1]))[:, empty]).all()
    [whole] = plan_maps(changed)  # the others see what RGB does not
    served = make_map(whole).set_index("scenario")["share"]
    assert served["NIR+SWIR"] == pytest.approx(0.25)


class Local(torch.nn.Module):
    """A network that looks two pixels far, and beyond the edge of its window at zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 5, 5, padding=2)

    def forward(self, images: list[torch.Tensor], available: torch.Tensor) -> torch.Tensor:
        return self.convolution(images[0])


def test_a_map_has_no_seams(parameters):
    """Where windows fall shows only through what a network cannot see beyond their edges."""
    seed_weights(0, "pretraining")
    model, maps = Local(), []
    for stride in (16, 10):  # windows have 32 pixels
        place = f"{parameters['work']}/{stride}"
        [plan] = plan_maps(parameters | {"patch_stride": stride, "work": place})
        make_map(replace(plan, network=replace(plan.network, model=model)))
        maps.append(read(plan.path(plan.layers[1]))[:, 64:-64, 64:-64])
    assert np.ptp(maps[0]) > 0.2
    assert np.abs(maps[0] - maps[1]).max() < 0.03  # 0.64 without overlap


def test_a_map_that_was_interrupted_goes_on(parameters, monkeypatch, tmp_path):
    for module in (mapping, alignment):
        monkeypatch.setattr(module, "STEP", 64)
    [whole] = plan_maps(parameters | {"work": str(tmp_path / "whole")})
    make_map(whole)
    [plan] = plan_maps(parameters)
    blocks, right = [], mapping._map_block

    def stopping(*arguments: Any) -> Any:
        blocks.append(arguments)
        if len(blocks) == 8:
            raise KeyboardInterrupt
        return right(*arguments)

    monkeypatch.setattr(mapping, "_map_block", stopping)
    with pytest.raises(KeyboardInterrupt):
        make_map(plan)
    make_map(plan)
    assert len(blocks) == 8 + 18 - 6  # the first row of six blocks is kept
    for layer in plan.layers:
        assert plan.path(layer).read_bytes() == whole.path(layer).read_bytes()
    (plan.folder / "unfinished.tif").touch()  # killed after the last copy
    make_map(plan)
    assert not [*plan.folder.glob("unfinished*")]


def test_a_disk_that_fills_in_the_middle_loses_nothing(parameters, monkeypatch, disk):
    """Its rasters have their room from the start; only their copies do not fit any more."""
    for module in (mapping, alignment):
        monkeypatch.setattr(module, "STEP", 64)
    [whole] = plan_maps(parameters)
    make_map(whole)
    [plan] = plan_maps(parameters | {"work": str(disk(16_000_000))})
    blocks, right, filler = [], mapping._map_block, plan.folder / "of_somebody_else"

    def filling(*arguments: Any) -> Any:
        blocks.append(arguments)
        if len(blocks) == 8:
            filler.write_bytes(bytes(shutil.disk_usage(plan.folder).free - 16_384))
        return right(*arguments)

    monkeypatch.setattr(mapping, "_map_block", filling)
    with pytest.raises(OSError, match=r"the disk is full; \w+\.tif was not written"):
        make_map(plan)
    filler.unlink()
    predicted = len(blocks)
    make_map(plan)
    assert len(blocks) == predicted
    for layer in plan.layers:
        assert plan.path(layer).read_bytes() == whole.path(layer).read_bytes()


@pytest.mark.parametrize(
    ("changed", "without", "message"),
    [
        ({"weights": "nowhere.safetensors"}, "", "nowhere.safetensors"),
        ({"patch_size": 512}, "", "expected at least the 512 × 512 pixels"),
        ({"patch_stride": 65}, "", "patch_stride: expected at most"),
        ({"scenes": "elsewhere"}, "", "scenes: expected some of"),
        ({}, "radar", "missing: expected some of"),
        ({}, "RGB+NIR+SWIR", "a sensor with its files that is not in `missing`"),
    ],
)
def test_mistakes_are_named_before_long_work(parameters, changed, without, message):
    with pytest.raises(InputError, match=message):
        plan_maps(parameters | changed, without)


def test_another_pixel_size_is_said_and_resampled_when_asked(parameters, weights, tmp_path):
    state, record = load_weights(weights)
    record["parameters"]["description"]["pixel_size"] = 20.0
    state = {name: torch.zeros_like(values) for name, values in state.items()}
    path = save_weights(tmp_path / "weights.safetensors", state, Record(record["parameters"]))
    with pytest.raises(InputError, match="expected pixels of 20 m"):
        plan_maps(parameters | {"weights": str(path)})
    [plan] = plan_maps(parameters | {"weights": str(path), "resample": True})
    assert plan.folder != plan_maps(parameters)[0].folder
    assert (plan.grid.height, plan.grid.width) == (scene.HEIGHT // 2, scene.WIDTH // 2)


def test_a_disk_without_room_is_said_first(parameters, monkeypatch):
    [plan] = plan_maps(parameters)
    usage = shutil.disk_usage(parameters["work"])
    monkeypatch.setattr(mapping.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(InputError, match="free bytes"):
        make_map(plan)
