"""The backbones: shapes, contracts and checks of input, and numbers of the published models."""

import json
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from lsgs_core.errors import InputError
from lsgs_core.models import BACKBONES, Backbone, build_backbone, load_author_weights
from lsgs_core.models.cbc import Refinement
from lsgs_core.models.cpu import accelerate_on_cpu
from lsgs_core.models.lora import add_lora
from lsgs_core.probabilities import scenario_probabilities
from lsgs_core.scenarios import ScenarioSet

REFERENCE = Path(__file__).parent / "reference"
NAMES = tuple(BACKBONES)
SCENARIOS = torch.tensor(ScenarioSet.of(["A", "B", "C"]).masks)


def demo(name: str, **settings: Any) -> Backbone:
    torch.manual_seed(0)
    model = build_backbone(name, "demo", **settings)
    for module in model.modules():
        # Statistics of a trained model, so that no layer is blind to its scale.
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
    return model.double().eval()


@pytest.fixture(params=NAMES)
def model(request):
    return demo(request.param)


def patches(batch: int, bands: tuple[int, ...], size: int = 64) -> list[Tensor]:
    options: Any = {"generator": torch.Generator().manual_seed(batch), "dtype": torch.float64}
    return [torch.randn(batch, count, size, size, **options) for count in bands]


@pytest.mark.parametrize(
    ("bands", "classes", "size"),
    [((3, 3, 3), 5, 32), ((2, 4), 1, 64), ((3, 1, 2), 2, 64), ((4, 3, 1, 2), 1, 96)],
)
@pytest.mark.parametrize("name", NAMES)
def test_shapes(name, bands, classes, size):
    model = demo(name, bands=bands, classes=classes)
    images, available = patches(2, bands, size), torch.ones(2, len(bands), dtype=torch.bool)
    available[1, 0] = False
    with torch.inference_mode():
        heads = model.heads(images, available)
        logits = model(images, available)
        latent = model.latent(images, available)
    assert heads.shape == (2, 3, classes, size, size)
    assert torch.equal(logits, heads[:, 0])
    assert logits.min() < 0  # not through a sigmoid
    if name == "cmx":
        assert latent.shape == (2, 96, size // 32, size // 32)
        assert torch.equal(heads[:, 0], heads[:, 2])
    else:
        assert latent.shape == (2, 16 * len(bands), 2, 4, 4)
        assert not torch.allclose(heads[:, 0], heads[:, 2])


def test_a_sample_depends_neither_on_its_batch_nor_on_the_form_of_the_images(model):
    images, available = patches(3, (3, 3, 3)), SCENARIOS[[6, 1, 4]]
    for function in (model.heads, model.latent):
        together = function(images, available)
        assert torch.equal(function(torch.stack(images, dim=1), available), together)
        for index in range(3):
            one = slice(index, index + 1)
            alone = function([image[one] for image in images], available[one])
            torch.testing.assert_close(together[one], alone, rtol=1e-9, atol=1e-10)


def test_scenario_latents_are_the_loop_over_latent(model):
    images = patches(2, (3, 3, 3))
    found = model.scenario_latents(images, SCENARIOS)
    expected = torch.stack([model.latent(images, mask.expand(2, -1)) for mask in SCENARIOS])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    default = Backbone.scenario_latents(model, images, SCENARIOS)  # of a backbone without its own
    torch.testing.assert_close(default, expected, rtol=0, atol=0)
    assert found.shape[:2] == (7, 2)
    for first in range(7):  # and every scenario differs from every other
        for second in range(first):
            assert not torch.allclose(found[first], found[second], rtol=1e-3)


def test_the_copy_for_scoring(model):
    images = patches(2, (3, 3, 3))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    copied = model.for_scoring()
    assert model.training
    assert not copied.training
    expected = model.eval().scenario_latents(images, SCENARIOS)
    found = copied.scenario_latents(images, SCENARIOS)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    found, expected = (network.heads(images, SCENARIOS[[4, 6]]) for network in (copied, model))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    norms = [x for x in copied.modules() if isinstance(x, nn.BatchNorm2d)]
    assert len(norms) < len([x for x in model.modules() if isinstance(x, nn.BatchNorm2d)]) / 2
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    add_lora(model, rank=2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    found = model.for_scoring().scenario_latents(images, SCENARIOS)
    expected = model.scenario_latents(images, SCENARIOS)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cbc", {"encoders.0": 1, "encoders.2": 1, "blocks.0": 2, "blocks.2": 2}),
        ("cmx", {"starts.0": 2, "starts.1": 4}),  # once per state of a stream
    ],
)
def test_scenarios_share_what_they_have_in_common(name, expected):
    model, calls = demo(name), Counter()
    for part in (*expected, "decoder"):
        model.get_submodule(part).register_forward_hook(lambda *_, p=part: calls.update([p]))
    model.scenario_latents(patches(2, (3, 3, 3)), SCENARIOS)
    assert calls == expected
    assert len([*model.scenario_logits(patches(2, (3, 3, 3)), SCENARIOS)]) == 7
    assert calls == {part: 2 * count for part, count in expected.items()} | {"decoder": 7}


@pytest.mark.parametrize("value", [1e4, float("nan")])
def test_absent_pixels_have_no_influence(model, value):
    images, available = patches(2, (3, 3, 3)), SCENARIOS[[4, 1]]
    changed = [image.clone() for image in images]
    for sample, modality in (~available).nonzero().tolist():
        changed[modality][sample] = value
    for function in (model.heads, model.latent):
        assert torch.equal(function(images, available), function(changed, available))
    changed[0][0] = 2.0  # an available one has
    assert not torch.allclose(model(images, available)[0], model(changed, available)[0])


@pytest.mark.parametrize("name", NAMES)
def test_every_band_has_influence(name):
    bands = (3, 1, 2)
    model, images = demo(name, bands=bands), patches(1, bands)
    for image in images:
        image.requires_grad_()
    model(images, torch.ones(1, 3, dtype=torch.bool)).square().sum().backward()
    for image in images:
        assert (image.grad.abs().amax(dim=(0, 2, 3)) > 0).all()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in model.parameters())


def test_configuration_builds_the_same_model_again():
    for name in NAMES:
        model = build_backbone(name, "demo", bands=[3, 1], classes=2, dropout=0.25)
        configuration = json.loads(json.dumps(model.configuration))
        assert (configuration["name"], configuration["bands"]) == (name, [3, 1])
        again = build_backbone(**configuration)
        assert again.configuration == model.configuration
        again.load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_low_rank_layers(name):
    model = build_backbone(name, "demo")
    layers = model.low_rank_layers()
    assert all(model.get_submodule(key) is layer for key, layer in layers.items())
    if name == "cmx":
        kinds = nn.Linear | nn.Conv2d
        every = {key for key, module in model.named_modules() if isinstance(module, kinds)}
        wanted = {key for key in every if not key.startswith("decoder")}
    else:
        wanted = {"multimodal.qkv", "multimodal.proj"}
        wanted |= {f"fusions.level{level}.conv" for level in (2, 3, 4, 6)}
    assert set(layers) == wanted


def test_initialisation():
    model = build_backbone("cbc_slp", "demo")
    refinement = next(part for part in model.modules() if isinstance(part, Refinement))
    stem = model.encoders[0].stages.level1[0]
    for layer in (refinement[1].conv, stem, model.between[0], model.to_latent):
        fan_in = layer.weight[0].numel()
        assert layer.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1)
    assert all(not position.any() for position in model.positions)
    fusion = build_backbone("cmx", "demo").fusions[3]
    assert fusion.stream1.channel_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert fusion.merge[1].weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.15)


GOOD = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("images", "available", "message"),
    [
        (torch.zeros(2, 3, 64, 64), GOOD, r"\[B, M, D, H, W\]"),
        (torch.zeros(2, 3, 4, 64, 64), GOOD, r"modality 0: .*found \[2, 4, 64, 64\]"),
        ([torch.zeros(2, 3, 64, 64)] * 2 + [torch.zeros(2, 3, 32, 32)], GOOD, "modality 2"),
        (torch.zeros(2, 3, 3, 0, 64), GOOD, "above 0"),
        (torch.zeros(2, 3, 3, 64, 64, dtype=torch.uint8), GOOD, "torch.uint8"),
        (torch.zeros(2, 3, 3, 64, 64), GOOD[:, :2], r"available.*\[2, 2\]"),
        (torch.zeros(2, 3, 3, 64, 64), GOOD.float(), r"available.*torch.float32"),
        (torch.zeros(2, 3, 3, 64, 64), GOOD & torch.tensor([[True], [False]]), "in each row"),
    ],
)
def test_wrong_input(images, available, message):
    for name in ("cbc_slp", "cmx"):
        model = build_backbone(name, "demo")
        for function in (model.forward, model.heads, model.latent):
            with pytest.raises(InputError, match=message):
                function(images, available)


@pytest.mark.parametrize("masks", [GOOD[0], GOOD[:, :2], GOOD[:0], GOOD.int(), ~GOOD])
@pytest.mark.parametrize("name", ["cbc_slp", "cmx"])
def test_wrong_masks(name, masks):
    with pytest.raises(InputError, match="masks"):
        build_backbone(name, "demo").scenario_latents(torch.zeros(2, 3, 3, 64, 64), masks)


# The loader, on CMX of the paper's size, whose author names are the quickest to fill.


@pytest.fixture(scope="module")
def cmx():
    return build_backbone("cmx", "paper")


@pytest.fixture
def state():
    """Entries of 0.5, or of 0 where they are integers."""
    shapes = json.loads((REFERENCE / "cmx.state_dict.json").read_text()).items()
    dtypes = {key: getattr(torch, entry["dtype"]) for key, entry in shapes}
    return {key: torch.full(entry["shape"], 0.5).to(dtypes[key]) for key, entry in shapes}


@pytest.mark.parametrize("form", ["plain", "state_dict", "model", "module.", ".pt", ".safetensors"])
def test_author_weights_in_every_form(form, cmx, state, tmp_path):
    for parameter in cmx.parameters():
        nn.init.zeros_(parameter)
    weights: Any = state
    if form in {"state_dict", "model"}:
        weights = {form: state, "epoch": 3}
    elif form == "module.":
        weights = {f"module.{key}": value for key, value in state.items()}
    elif form == ".pt":
        weights = tmp_path / "weights.pt"
        torch.save({"state_dict": state}, weights)
    elif form == ".safetensors":
        weights = str(tmp_path / "weights.safetensors")
        save_file(state, weights)
    load_author_weights(cmx, weights)
    assert all((parameter == 0.5).all() for parameter in cmx.parameters())


def test_author_weights_that_do_not_fit(cmx, state, tmp_path):
    """Nothing is loaded of them; hostile.yaml has further ones."""
    before = cmx.state_dict()["starts.1.0.weight"].clone()
    (tmp_path / "a.safetensors").write_bytes(b"hello")
    of_cbc_slp = {"RGB_pos": torch.zeros(1), "shared_conv.bias": torch.zeros(1)}
    for weights, message in (
        (state | {"core.decode_head.linear_pred.bias": torch.ones(1) * 1j}, "dtype torch.complex"),
        (state | {f"core.x{i}": torch.zeros(1) for i in range(9)}, "core.x4 is.* and 4 more"),
        (of_cbc_slp, "expected weights of cmx, found those of cbc_slp"),
        ({3: torch.zeros(1)}, "expected a state dict"),
        (tmp_path / "a.safetensors", "a.safetensors: expected a file of plain tensors"),
    ):
        with pytest.raises(InputError, match=message):
            load_author_weights(cmx, weights)
    assert torch.equal(cmx.state_dict()["starts.1.0.weight"], before)


# Against numbers that the published models gave on the same weights and images.


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


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    """A network, its golden numbers, images, and of each image the latents [K, 1, C, ...]."""
    model = build_backbone(request.param, "paper").eval()
    load_author_weights(model, formula_weights(request.param))
    golden = dict(np.load(REFERENCE / f"{request.param}.golden.npz"))
    images = [formula_image(int(seed)) for seed in golden["image_seeds"]]
    with torch.inference_mode():
        latents = [model.scenario_latents(image, SCENARIOS) for image in images]
    return SimpleNamespace(model=model, golden=golden, images=images, latents=latents)


def test_latents(case):
    for k, latent in enumerate(case.latents[0]):
        found = latent.flatten().double().numpy()
        expected = case.golden[f"latent_{k}"]
        error = np.linalg.norm(found[::16] - expected) / np.linalg.norm(expected)
        assert error < 1e-4, k
        sums = case.golden[f"latent_sum_{k}"]
        # The plain sum nearly cancels, so its error is measured on the scale of its terms.
        assert abs(found.sum() - sums[0]) < 1e-4 * np.abs(found).sum(), k
        np.testing.assert_allclose((found**2).sum(), sums[1], rtol=1e-4)


def test_distortion(case):
    latents = torch.stack(case.latents).double()  # (images, K, 1, C, ...)
    squared = (latents - latents[:, -1:]).square()
    distortion = squared.flatten(2).mean(dim=2).numpy()
    np.testing.assert_allclose(distortion, case.golden["distortion_per_image"], rtol=1e-5)
    np.testing.assert_allclose(distortion.mean(axis=0), case.golden["D"], rtol=1e-5)
    p = scenario_probabilities(distortion.mean(axis=0)).probabilities
    np.testing.assert_allclose(p, case.golden["probabilities"], rtol=0, atol=1e-6)


def test_predictions(case):
    """In three scenarios, of which each modality is in two, in the plain form and the fast one."""
    images, fast = case.images[0], accelerate_on_cpu(case.model)
    with torch.inference_mode():
        for k, model in ((1, case.model), (4, fast), (6, fast)):
            heads = model.heads(images, SCENARIOS[k : k + 1])
            assert heads.shape == (1, 3, 1, 224, 224)
            found = heads.sigmoid()[0, :, 0, ::4, ::4].numpy()
            np.testing.assert_allclose(found, case.golden[f"pred_{k}"], rtol=0, atol=1e-4)
