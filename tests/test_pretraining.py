"""Checkpoints of other models are refused, and a network that is not fit for scoring is found."""

import pytest
import torch
from study.artifacts import Record, save_weights
from study.checkpoints import load_checkpoint
from study.pretraining import check_network
from test_training import same

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
    assert same(model, other)


def test_other_parameters_and_other_models_are_refused(checkpoint):
    path, _ = checkpoint
    with pytest.raises(InputError, match="fold = 0, expected 1"):
        load_checkpoint(build(), path, {"fold": 1})
    with pytest.raises(InputError, match="model"):
        load_checkpoint(build("cbc"), path, {"model": build("cbc").configuration})
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


@pytest.mark.parametrize(
    ("kind", "checks"),
    [
        (LooksAtTheAbsent, ["pixels of an absent modality"]),
        (MixesSamples, ["a patch alone and in a batch", "D of the full scenario"]),
    ],
)
def test_what_a_network_does_wrong_is_found(kind, checks):
    table = check_network(kind(build()), [batch()], SCENARIOS).set_index("check")
    assert not table.loc[checks, "passed"].any()
