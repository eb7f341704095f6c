"""What scoring takes for granted of a network; test_own_network.py has networks that lack it."""

import pytest
import torch
from study.stages.pretraining import check_network

from lsgs_core import Batch, ScenarioSet, build_backbone


@pytest.mark.parametrize("name", ["cbc_slp", "cbc", "cmx"])
def test_a_good_network_passes_and_one_that_is_not_finite_does_not(name):
    torch.manual_seed(0)
    model, scenarios = build_backbone(name, "demo", (3, 3, 3), 2), ScenarioSet.of([*"ABC"])
    images = tuple(torch.randn(3, 3, 3, 64, 64).unbind())
    batch = Batch(images, torch.ones(3, 3, dtype=torch.bool))
    table = check_network(model, [batch], scenarios)
    assert table["passed"].tolist() == [True] * 4, table
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = float("inf")
    table = check_network(model, [batch], scenarios).set_index("check")
    assert not table.loc["entries that are not finite", "passed"]
