"""Checkpoints of other models are refused, and a network that is not fit for scoring is found."""

import pytest
import torch
from study.artifacts import Record, save_weights
from study.checkpoints import load_checkpoint
from study.pretraining import check_network

from lsgs_core import Batch, InputError, ScenarioSet, build_backbone

SCENARIOS = ScenarioSet.of(["A", "B", "C"])


def build(name: str = "cmx", **settings):
    torch.manual_seed(0)
    return build_backbone(name, "demo", (3, 3, 3), 2, **settings)


def batch() -> Batch:
    torch.manual_seed(1)
    return Batch(
        images=tuple(torch.randn(3, 3, 64, 64) for _ in range(3)),
        available=torch.ones(3, 3, dtype=torch.bool),
    )


@pytest.fixture
def checkpoint(tmp_path):
    model = build()
    path = tmp_path / "weights.safetensors"
    save_weights(path, model.state_dict(), Record({"model": model.configuration, "fold": 0}))
    return path, model


def test_our_checkpoint(checkpoint):
    path, model = checkpoint
    other = build()
    with torch.no_grad():
        next(other.parameters()).zero_()
    assert load_checkpoint(other, path, {"fold": 0}) == "ours"
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_other_parameters_and_other_models_are_refused(checkpoint):
    path, _ = checkpoint
    with pytest.raises(InputError, match="fold = 0, expected 1"):
        load_checkpoint(build(), path, {"fold": 1})
    with pytest.raises(InputError, match="model"):
        load_checkpoint(build("cbc"), path, {"model": build("cbc").configuration})
    with pytest.raises(InputError, match="checkpoint of another model"):
        load_checkpoint(build("cbc"), path)
    with pytest.raises(InputError, match=r"expected \(.*found \("):
        load_checkpoint(build(decoder_width=40), path)


@pytest.mark.parametrize("name", ["cbc_slp", "cbc", "cmx"])
def test_a_good_network_passes(name):
    table = check_network(build(name), [batch()], SCENARIOS)
    assert table["passed"].all(), table
    assert len(table) == 4


def test_weights_that_are_not_finite_are_found():
    model = build()
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = float("inf")
    table = check_network(model, [batch()], SCENARIOS).set_index("check")
    assert not table.loc["entries that are not finite", "passed"]


class MixesSamples(torch.nn.Module):
    """Wrong as the published code is: a sample's latent depends on the others of its batch."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def latent(self, images, available):
        latent = self.inner.latent(images, available)
        return latent + latent.mean(dim=0)

    def scenario_latents(self, images, masks):
        return self.inner.scenario_latents(images, masks)

    def forward(self, images, available):
        return self.inner(images, available)


class LooksAtTheAbsent(MixesSamples):
    """Wrong in another way: the pixels of the last modality are read though it is not there."""

    def latent(self, images, available):
        return self.inner.latent(images, available) + images[-1].mean()


def test_pixels_of_any_absent_modality_are_found():
    table = check_network(LooksAtTheAbsent(build()), [batch()], SCENARIOS).set_index("check")
    assert not table.loc["pixels of an absent modality", "passed"]


def test_mixed_samples_are_found():
    table = check_network(MixesSamples(build()), [batch()], SCENARIOS).set_index("check")
    assert not table.loc["a patch alone and in a batch", "passed"]
    assert not table.loc["D of the full scenario", "passed"]
