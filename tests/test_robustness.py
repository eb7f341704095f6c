"""Damaged sensors: what is lost, where, and what a network is given of it."""

import pytest
import torch
from study.robustness import DAMAGES, SQUARE, Damaged, lose_values
from torch import Generator

IMAGES = torch.randn(4, 3, 32, 44, generator=Generator().manual_seed(1))
MASK = torch.tensor([[True, False]]).repeat(4, 1)


def shown(images, available):
    """In place of a network: what it is given."""
    return torch.cat(
        [image * a[:, None, None, None] for image, a in zip(images, available.T, strict=True)]
    )


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
    given = []
    network = Damaged(
        lambda images, available: given.append(available), lambda i, n: lose_values(i, n, 1.0)
    )
    network([IMAGES, IMAGES], MASK)
    assert torch.equal(given[0], MASK)
