"""The backbones against numbers that the published models gave on the same weights and images."""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lsgs_core.models import Backbone, build_backbone, load_author_weights
from lsgs_core.models.cpu import accelerate_on_cpu
from lsgs_core.probabilities import scenario_probabilities
from lsgs_core.scenarios import ScenarioSet

REFERENCE = Path(__file__).parent / "reference"
NAMES = ("cbc_slp", "cbc", "cmx")
SCENARIOS = torch.tensor(ScenarioSet.of(["A", "B", "C"]).masks)


def formula_weights(name: str) -> dict[str, torch.Tensor]:
    """The weights of `tests/reference`: drawn from each entry's name."""
    shapes = json.loads((REFERENCE / f"{name}.state_dict.json").read_text())
    weights = {}
    for key, entry in shapes.items():
        shape, leaf = tuple(entry["shape"]), key.rsplit(".", 1)[-1]
        if leaf == "num_batches_tracked":
            weights[key] = torch.zeros(shape, dtype=torch.int64)
            continue
        generator = np.random.Generator(np.random.Philox(key=zlib.crc32(key.encode())))
        noise = generator.standard_normal(shape).astype(np.float32)
        if leaf == "running_var":
            noise = 1 + np.float32(0.2) * np.abs(noise)
        elif leaf == "running_mean" or (len(shape) == 1 and leaf != "weight"):
            noise = np.float32(0.1) * noise
        elif len(shape) == 1:
            noise = 1 + np.float32(0.1) * noise
        else:
            noise = noise * np.float32(1 / np.sqrt(np.prod(shape[1:])))
        weights[key] = torch.from_numpy(noise)
    return weights


def formula_image(seed: int) -> torch.Tensor:
    """One image [1, 3, 3, 224, 224]."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    coarse = torch.from_numpy(generator.standard_normal((3, 3, 14, 14)).astype(np.float32))
    smooth = F.interpolate(coarse, (224, 224), mode="bilinear", align_corners=False)
    noise = (0.1 * generator.standard_normal((3, 3, 224, 224))).astype(np.float32)
    return (smooth + torch.from_numpy(noise))[None]


@dataclass
class Case:
    model: Backbone
    golden: dict[str, np.ndarray]
    images: list[torch.Tensor]
    latents: list[torch.Tensor]  # per image (K, 1, C, ...)


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    model = build_backbone(request.param, "paper").eval()
    load_author_weights(model, formula_weights(request.param))
    golden = dict(np.load(REFERENCE / f"{request.param}.golden.npz"))
    images = [formula_image(int(seed)) for seed in golden["image_seeds"]]
    with torch.inference_mode():
        latents = [model.scenario_latents(image, SCENARIOS) for image in images]
    return Case(model, golden, images, latents)


def test_latents(case: Case) -> None:
    for k, latent in enumerate(case.latents[0]):
        found = latent.flatten().double().numpy()
        expected = case.golden[f"latent_{k}"]
        error = np.linalg.norm(found[::16] - expected) / np.linalg.norm(expected)
        assert error < 1e-4, k
        sums = case.golden[f"latent_sum_{k}"]
        # The plain sum nearly cancels, so its error is measured on the scale of its terms.
        assert abs(found.sum() - sums[0]) < 1e-4 * np.abs(found).sum(), k
        np.testing.assert_allclose((found**2).sum(), sums[1], rtol=1e-4)


def test_distortion(case: Case) -> None:
    latents = torch.stack(case.latents).double()  # (images, K, 1, C, ...)
    squared = (latents - latents[:, -1:]).square()
    distortion = squared.flatten(2).mean(dim=2).numpy()
    np.testing.assert_allclose(distortion, case.golden["distortion_per_image"], rtol=1e-5)
    np.testing.assert_allclose(distortion.mean(axis=0), case.golden["D"], rtol=1e-5)
    p = scenario_probabilities(distortion.mean(axis=0)).probabilities
    np.testing.assert_allclose(p, case.golden["probabilities"], rtol=0, atol=1e-6)


def test_predictions(case: Case) -> None:
    """In three scenarios, of which each modality is in two, in the plain form and the fast one."""
    images, fast = case.images[0], accelerate_on_cpu(case.model)
    with torch.inference_mode():
        for k, model in ((1, case.model), (4, fast), (6, fast)):
            heads = model.heads(images, SCENARIOS[k : k + 1])
            assert heads.shape == (1, 3, 1, 224, 224)
            found = heads.sigmoid()[0, :, 0, ::4, ::4].numpy()
            np.testing.assert_allclose(found, case.golden[f"pred_{k}"], rtol=0, atol=1e-4)
