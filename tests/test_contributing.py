"""CONTRIBUTING.md's three recipes, followed word by word in a copy of this checkout."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from checkout import ROOT, copy_checkout, printed
from rasterio.transform import from_origin
from scene import write_raster

RECIPES = (ROOT / "CONTRIBUTING.md").read_text().split("\n## ")[1:4]


def code_of(recipe: str) -> str:
    """The code block of a recipe."""
    return re.search(r"```(?:python|yaml)\n(.*?)```", recipe, re.S)[1]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy in which all three recipes were followed."""
    folder = copy_checkout(tmp_path_factory.mktemp("clone"))
    sampler, backbone, dataset = map(code_of, RECIPES)
    methods = folder / "lsgs_core" / "methods.py"
    methods.write_text(methods.read_text() + "\n\n" + sampler)
    models = folder / "lsgs_core" / "models"
    (models / "unet2.py").write_text(backbone)
    [line] = re.findall(r'after its\s+import,\s+`("unet2".*?)`', RECIPES[1])
    text = (models / "__init__.py").read_text()
    text = text.replace('\n    "cmx": (', f'\n    {line}\n    "cmx": (')
    imported = "from lsgs_core.models.unet2 import UNET2_PRESETS, UNet2"
    text = text.replace("from lsgs_core.models.cmx", f"{imported}\nfrom lsgs_core.models.cmx")
    (models / "__init__.py").write_text(text)
    manifest = folder / "data_manifest.yaml"
    text = manifest.read_text().replace("\ndatasets:\n", f"\ndatasets:\n{dataset}", 1)
    manifest.write_text(text)
    write_scene(folder / "work" / "downloads" / "my_scene")
    return folder


def write_scene(folder: Path) -> None:
    """Rasters as the recipe names them, radar at half the resolution."""
    rng = np.random.default_rng(0)
    for name, bands, side, kind in (
        ("optical", 4, 512, "uint16"),
        ("sentinel1", 2, 256, "float32"),
        ("landcover", 1, 512, "uint8"),
    ):
        pixels = 5120 / side
        pattern = rng.integers(0, 4, size=(bands, 16, 16)).repeat(side // 16, 1)
        place = {"crs": "EPSG:32632", "transform": from_origin(5e5, 5e6, pixels, pixels)}
        write_raster(folder / f"{name}.tif", pattern.repeat(side // 16, 2).astype(kind), **place)


@pytest.mark.slow
def test_the_three_recipes_make_a_study(clone):
    """The data set is checked and prepared, the backbone trained, the sampler drawn from."""
    check = sys.executable, "-m", "study.data.check", "--dataset", "my_scene"
    assert "my_scene" in printed(*check, folder=clone)
    tier = {
        "grid": {"datasets": ["my_scene"], "backbones": ["unet2"], "methods": ["full_twice"]}
        | {"folds": [0], "seeds": [0]},
        "02_pretraining_check": {"weights": "train"},
        "05_evaluation": {"shown_patches": 0},
    }
    (clone / "notebooks" / "tiers" / "mine.yaml").write_text(yaml.safe_dump(tier))
    printed(sys.executable, "-m", "study", "run", "mine", "--cores", 2, folder=clone)
    summary = (clone / "results" / "mine" / "evaluation" / "summary.csv").read_text()
    assert "my_scene,unet2,full_twice" in summary
