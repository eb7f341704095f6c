"""Damaged sensors: what is lost, where, and what a network is given of it."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from study.comparison import robustness
from study.comparison.robustness import DAMAGES, SQUARE, Damaged, lose_values
from study.data.patches import PatchDataset
from study.provenance.devices import seed_weights
from study.training.checkpoints import build_network
from torch import Generator

from lsgs_core import ScenarioSet

IMAGES = torch.randn(4, 3, 32, 44, generator=Generator().manual_seed(1))
MASK = torch.tensor([[True, False]]).repeat(4, 1)


def shown(images, available):
    """In place of a network: what it is given."""
    pairs = zip(images, available.T, strict=True)
    return torch.cat([image * there[:, None, None, None] for image, there in pairs])


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged(name):
    damaged = DAMAGES[name](IMAGES, Generator().manual_seed(0))
    change, amount = damaged - IMAGES, float(name.split()[-1])
    if name.startswith("RMM"):
        assert (damaged == 0).float().mean() == pytest.approx(amount, abs=0.03)
    elif name.startswith("squares"):
        lost = (damaged == 0).all(dim=1)
        assert lost.float().mean() == pytest.approx(amount, abs=0.15)
        squares = lost[:, :, :40].unfold(1, SQUARE, SQUARE).unfold(2, SQUARE, SQUARE)
        assert torch.equal(squares.any(dim=(3, 4)), squares.all(dim=(3, 4)))
    elif "salt" in name:
        assert (change != 0).any(dim=1).float().mean() == pytest.approx(amount, abs=0.03)
        assert damaged.amax() == IMAGES.amax()
    else:
        assert change.std() == pytest.approx(amount, rel=0.05)


@pytest.mark.parametrize("name", DAMAGES)
def test_only_what_the_scenario_lacks_is_damaged(name):
    first, second = Damaged(shown, DAMAGES[name])([IMAGES, IMAGES], MASK).split(4)
    assert torch.equal(first, IMAGES)
    assert not torch.equal(second, IMAGES)
    again = Damaged(shown, DAMAGES[name])([IMAGES, IMAGES], MASK).split(4)
    assert torch.equal(second, again[1])  # the same numbers every time
    whole = Damaged(shown, DAMAGES[name])([IMAGES, IMAGES], torch.ones_like(MASK))
    assert torch.equal(whole, torch.cat([IMAGES, IMAGES]))
    nothing = torch.zeros_like(IMAGES)  # a sensor without data stays without
    assert not Damaged(shown, DAMAGES[name])([IMAGES, nothing], MASK)[4:].any()


def test_a_sensor_that_lost_everything_is_missing():
    everything = partial(lose_values, share=1.0)
    given = Damaged(lambda images, available: available, everything)([IMAGES, IMAGES], MASK)
    assert torch.equal(given, MASK)


def test_the_table_of_a_network(prepared, dataset, monkeypatch):
    """Sensors that lost everything are missing ones; rates of 0 and 1/2 are known cases."""
    patches = PatchDataset(prepared, dataset, "land_cover", 0, "test")
    seed_weights(0, "pretraining")
    model = build_network("cmx", "demo", patches).eval()
    found = [("demo", "cmx/uniform", patches, model)]
    monkeypatch.setattr(robustness, "networks_of", lambda grid, most: iter(found))
    monkeypatch.setattr(robustness, "DAMAGES", {"all": partial(lose_values, share=1.0)})
    monkeypatch.setattr(robustness, "RATES", (0.0, 0.5))
    scenarios = ScenarioSet.of(patches.modalities)
    parameters = {"batch_size": 2, "damaged_patches": 3}
    table = robustness.robustness(SimpleNamespace(scenarios=scenarios, parameters=parameters))
    missing, lost = (row for _, row in table.set_index("protocol").iterrows())
    assert table["protocol"].tolist() == ["EMM", "all"]
    values = ["average", "fail 0.0", "fail 0.5"]
    assert missing[values].tolist() == pytest.approx(lost[values].tolist())
    assert missing["fail 0.5"] == pytest.approx(missing["average"])  # all scenarios alike
    batches = patches.batches(2, sorted({0, (len(patches) - 1) // 2, len(patches) - 1}))
    records = robustness.evaluate(model, batches, scenarios, patches.classes, patches.task_kind)
    full = records[records["scenario"] == scenarios.names[-1]].groupby("class")[["tp", "fp", "fn"]]
    counts = full.sum()
    iou = (counts["tp"] / counts.sum(axis=1).where(lambda pixels: pixels > 0)).mean()
    assert missing["fail 0.0"] == pytest.approx(iou)  # no sensor ever fails
    assert 0 < missing["calibration_error"] < 1
