"""Use as a library: anyone's network, and the examples of docstrings and README."""

import doctest
import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import Blobs, small
from torch import nn

from lsgs_core import HookedModel, InputError, ScenarioSet, score_scenarios

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    for path in (ROOT / "lsgs_core").rglob("*.py")
    if ">>>" in path.read_text()
)
SCENARIOS = ScenarioSet.of(["A", "B", "C"])


class Foreign(nn.Module):
    """A network with another call: one tensor of all bands, and a decoder after the latent."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(9, 8, 3, stride=4), nn.ReLU())
        self.decoder = nn.ConvTranspose2d(8, 1, 4, stride=4)
        self.decoded = 0

    def forward(self, bands: torch.Tensor) -> torch.Tensor:
        latent = self.encoder(bands)
        self.decoded += 1
        return self.decoder(latent)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    assert MODULES
    result = doctest.testmod(import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted
    assert not result.failed


def concatenated(network: nn.Module, images: list[torch.Tensor]) -> torch.Tensor:
    return network(torch.cat(images, dim=1))


def test_a_foreign_network_is_scored_by_hand():
    torch.manual_seed(0)
    network = Foreign()
    model = HookedModel(network, "encoder", concatenated)
    batches = list(Blobs(6).batches(4, np.arange(6)))
    scores = score_scenarios(model, batches, SCENARIOS, progress=False)
    images = [torch.cat(parts) for parts in zip(*(batch.images for batch in batches), strict=True)]
    with torch.no_grad():
        full = network.encoder(torch.cat(images, dim=1))
        for k, mask in enumerate(SCENARIOS.masks):
            seen = [i if m else torch.zeros_like(i) for i, m in zip(images, mask, strict=True)]
            latent = network.encoder(torch.cat(seen, dim=1))
            expected = (latent - full).double().square().mean()
            assert scores.distortion[k] == pytest.approx(float(expected), rel=1e-5, abs=1e-12)
    assert network.decoded == 0  # the forward pass ends at the latent
    assert model(images, torch.ones(6, 3, dtype=torch.bool)).shape == (6, 1, 32, 32)
    assert not network.encoder._forward_hooks


def test_ours_hooked_is_ours():
    model = small("cmx").eval()
    batch = next(Blobs(3).batches(3, np.arange(3)))
    available = torch.tensor([[True, True, False], [True, True, True], [False, True, True]])
    last = f"fusions.{len(model.fusions) - 1}"
    hooked = HookedModel(model, last, lambda net, images: net(images, available))
    with torch.no_grad():
        torch.testing.assert_close(
            hooked.latent(batch.images, available), model.latent(batch.images, available)
        )


def test_mistakes():
    network = Foreign()
    with pytest.raises(InputError, match="'encodre' is unknown"):
        HookedModel(network, "encodre")
    images, available = [torch.ones(1, 3, 8, 8)] * 3, torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(InputError, match="does not reach"):
        HookedModel(network, "decoder", lambda net, bands: net.encoder(torch.cat(bands, 1))).latent(
            images, available
        )
    recurrent = nn.Sequential(nn.Flatten(2), nn.LSTM(64, 2))
    with pytest.raises(InputError, match="gives a tuple"):
        HookedModel(recurrent, "1", lambda net, bands: net(torch.cat(bands, 1))).latent(
            images, available
        )


def test_the_readmes_example_runs():
    """Its 15 lines or fewer, with a network and a data loader as a reader might have."""
    text = (ROOT / "README.md").read_text()
    code = re.search(r"## In your own code.*?```python\n(.*?)```", text, flags=re.DOTALL)[1]
    assert len(code.strip().splitlines()) <= 15
    torch.manual_seed(0)
    names = {
        "network": Foreign(),
        "loader": [
            ([torch.randn(2, 3, 16, 16) for _ in range(3)], torch.zeros(2, 1, 16, 16))
            for _ in range(3)
        ],
    }
    exec(code, names)
    assert sum(names["result"].probabilities) == pytest.approx(1)
