"""The expected calibration error, on probabilities whose error is known."""

import numpy as np
import pytest
import torch
from study.metrics.evaluation import calibration_errors

from lsgs_core import ScenarioSet
from lsgs_core.batch import Batch

SCENARIOS = ScenarioSet.of(["A", "B"])


class Promising(torch.nn.Module):
    """Says .8 where the first sensor is there, and .6 otherwise; of two classes, the second."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images, available):
        probability = torch.where(available[:, 0], 0.8, 0.6)[:, None, None, None]
        logit = torch.logit(probability).expand(-1, 1, *images[0].shape[2:])
        return logit if self.classes == 1 else torch.cat((torch.zeros_like(logit), logit), dim=1)


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_promises_that_are_kept_in_part(kind):
    target = torch.zeros(2, 10, 10)
    target[:, :7] = 1  # 70 % of the pixels
    valid = torch.ones(2, 10, 10, dtype=torch.bool)
    images = torch.ones(2, 1, 10, 10), torch.ones(2, 1, 10, 10)
    whole = torch.ones(2, 2, dtype=torch.bool)
    target = target[:, None] if kind == "binary" else target.long()
    batch = Batch(images, whole, target=target, valid=valid, block_ids=torch.zeros(2).long())
    for rows, errors in ((10, [0.1, 0.1, 0.1]), (7, [0.2, 0.4, 0.2]), (0, [np.nan] * 3)):
        valid[:, rows:] = False  # of the first seven all are true
        found = calibration_errors(Promising(1 + (kind != "binary")), [batch] * 2, SCENARIOS, kind)
        assert found["scenario"].tolist() == ["A", "B", "A+B"]
        np.testing.assert_allclose(found["calibration_error"], errors, atol=1e-6)
