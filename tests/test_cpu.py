"""The fast CPU forms against the published ones, in float64: outputs and gradients."""

from typing import Any

import pytest
import torch
from study.benchmark.published_form import as_published
from torch import Tensor, nn

from lsgs_core.models import Backbone, build_backbone, cpu
from lsgs_core.models.cpu import accelerate_on_cpu, attention_with_dropout
from lsgs_core.models.lora import add_lora

SIZES: dict[str, dict[str, Any]] = {
    "demo": {},
    # The paper's shape: four levels, each twice as deep, the last as deep as it is wide.
    "cube": {"decoder_channels": (32, 16, 12, 8, 4), "decoder_depths": (4, 8, 16, 32)},
    "odd": {"decoder_channels": (16, 12, 8), "decoder_depths": (5, 3), "latent_grid": (3, 3, 5)},
}


def network(name: str, size: str, **settings: Any) -> Backbone:
    torch.manual_seed(0)
    model = build_backbone(name, "demo", **SIZES[size], **settings).double()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # no bias or scale that is the same everywhere hides a mistake
            nn.init.normal_(parameter, 0.5, 0.2)
    return model


def results(model: Backbone, images: list[Tensor], available: Tensor) -> dict[str, Tensor]:
    """All heads, and the gradients of a random sum of them, by name."""
    for image in images:
        image.requires_grad_().grad = None
    model.zero_grad()
    heads = model.heads(images, available)
    heads.backward(torch.randn(heads.shape, generator=torch.Generator().manual_seed(2)).double())
    found = {"heads": heads.detach()}
    named = dict(model.named_parameters()) | {f"image {i}": x for i, x in enumerate(images)}
    return found | {name: x.grad.clone() for name, x in named.items() if x.grad is not None}


def same_results(model: Backbone, images: list[Tensor], available: Tensor) -> dict[str, Tensor]:
    """What the fast form gives, after a comparison with the published one."""
    found = results(accelerate_on_cpu(model), images, available)
    expected = results(as_published(model), images, available)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # Sums over a volume cancel to zero for what a normalisation takes out again.
        scale = max(1e-3, value.abs().max().item())
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-9 * scale, msg=key)
    return found


# All at once, and in many small slabs; PyTorch has kernels of its own for one sample.
@pytest.mark.parametrize(
    ("name", "size", "slab", "batch"),
    [
        *(("cbc_slp", "demo", 2**20, 1), ("cbc_slp", "demo", 1500, 2)),
        *(("cbc", "demo", 2**20, 2), ("cbc", "demo", 1500, 1)),
        *(("cbc_slp", "odd", 2**20, 2), ("cbc_slp", "odd", 1500, 1)),
        *(("cbc", "odd", 2**20, 1), ("cbc", "odd", 1500, 2)),
        *(("cbc_slp", "cube", 6000, 2), ("cbc", "cube", 2**20, 1)),
    ],
)
def test_outputs_and_gradients(name, size, slab, batch, monkeypatch):
    monkeypatch.setattr(cpu, "SLAB", slab)
    monkeypatch.setattr(cpu, "SMALLEST", 0)
    model = network(name, size, bands=(2, 3, 1), classes=2)
    shape = (64, 96) if size == "odd" else (64, 64)
    images = [torch.randn(batch, bands, *shape, dtype=torch.float64) for bands in (2, 3, 1)]
    available = torch.tensor([[True, True, True], [False, True, False]])[-batch:]
    assert len(same_results(model, images, available)) == 1 + len([*model.parameters()]) + 3


def test_only_what_is_trained_gets_a_gradient(monkeypatch):
    monkeypatch.setattr(cpu, "SMALLEST", 0)
    model = network("cbc_slp", "demo")
    add_lora(model, rank=2)
    images = [torch.randn(1, 3, 64, 64, dtype=torch.float64) for _ in range(3)]
    found = same_results(model, images, torch.tensor([[True, False, True]]))
    assert not any(name.startswith("decoder") for name in found)


def test_one_sample_has_the_gradients_of_two_equal_ones(monkeypatch):
    """PyTorch's own instance normalisation fails this for channels-last gradients."""
    monkeypatch.setattr(cpu, "SMALLEST", 0)
    model = accelerate_on_cpu(network("cbc_slp", "demo")).eval()
    images = [torch.randn(1, 3, 64, 64, dtype=torch.float64) for _ in range(3)]
    available = torch.tensor([[True, False, True]])
    found = []
    for count in (1, 2):
        model.zero_grad()
        repeated = [image.expand(count, -1, -1, -1) for image in images]
        heads = model.heads(repeated, available.expand(count, -1))
        (heads.square().sum() / count).backward()
        found.append({name: x.grad for name, x in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("tokens", [7, 16])  # 49 numbers do not fill 64-bit words
def test_attention_with_dropout(tokens):
    inputs = torch.randn(3, 2, 3, tokens, tokens, dtype=torch.float64, requires_grad=True)
    query, key, value = inputs
    torch.manual_seed(5)
    found = attention_with_dropout(query, key, value, 0.25)
    torch.manual_seed(5)  # with values that show the weights, those that are kept are not 0
    shown = torch.eye(tokens, dtype=torch.float64).expand_as(value)
    keep = attention_with_dropout(query, key, shown, 0.25) != 0
    logits = query @ key.transpose(2, 3) / tokens**0.5
    expected = logits.softmax(dim=3) * keep / 0.75 @ value
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(found)
    ours, definition = (torch.autograd.grad(r, inputs, gradient) for r in (found, expected))
    torch.testing.assert_close(ours, definition)


def test_dropout_of_attention_is_random_and_seeded():
    query = torch.randn(4, 8, 256, 8)
    ones = torch.ones_like(query)
    torch.manual_seed(1)
    first = attention_with_dropout(query, query, ones, 0.1)
    second = attention_with_dropout(query, query, ones, 0.1)
    torch.manual_seed(1)
    assert torch.equal(first, attention_with_dropout(query, query, ones, 0.1))
    assert not torch.equal(first, second)
    # With values of 1 the mean of the result is the share that was kept, scaled back.
    assert first.mean().item() == pytest.approx(1, abs=0.005)
    flat = torch.zeros_like(query)  # equal weights: a result is the number of kept of 256
    kept = attention_with_dropout(flat, flat, ones, 0.1)[..., 0] * 0.9
    assert kept.std().item() == pytest.approx((0.1 * 0.9 / 256) ** 0.5, rel=0.05)
    heads = kept - kept.mean(dim=2, keepdim=True)
    assert abs((heads[0, 0] * heads[0, 1]).mean().item()) < 0.3 * heads.var().item()


def test_only_large_volumes_go_in_slabs():
    for preset, expected in (("paper", True), ("demo", False)):
        model = build_backbone("cbc", preset)
        shape = model.configuration["latent_grid"]
        decoder = accelerate_on_cpu(model).get_submodule("decoder")
        assert isinstance(decoder, cpu.SlabDecoder)
        assert decoder.is_worthwhile(torch.zeros(1, 1, *shape)) is expected


def test_training_uses_it(monkeypatch):
    calls = []
    instead = lambda query, key, value, rate: calls.append(rate) or value  # noqa: E731
    monkeypatch.setattr(cpu, "attention_with_dropout", instead)
    model = accelerate_on_cpu(network("cbc", "demo", attention_dropout=0.3))
    images = torch.randn(1, 3, 3, 64, 64, dtype=torch.float64)
    available = torch.ones(1, 3, dtype=torch.bool)
    model.train().heads(images, available)
    assert calls == [0.3] * 4
    model.eval().heads(images, available)
    assert calls == [0.3] * 4
    query = torch.randn(1, 2, 16, 4)
    for rate in (1 - 1e-9, 1.0):  # as PyTorch: all weights are dropped
        assert not model.get_submodule("multimodal").attend(query, query, query, rate).any()
