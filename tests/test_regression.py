"""Scenarios that are predicted from a budget of measured ones."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from study.figures.scoring import MOST_SHOWN, method_at_a_glance

from lsgs_core import InputError, ScenarioSet, scenario_probabilities, score_scenarios
from lsgs_core.regression import measured_scenarios, regress_scenarios
from lsgs_core.uncertainty import FEWEST_PATCHES, bootstrap_probabilities, stop_when_precise

TEN, SIX = (ScenarioSet.of([f"m{m}" for m in range(count)]) for count in (10, 6))


def interacting(scenarios: ScenarioSet, seed: int) -> np.ndarray:
    """Distortions of modalities of unequal worth, of which two replace each other."""
    random = np.random.default_rng(seed)
    missing = ~scenarios.masks
    worth = random.gamma(1, 1, missing.shape[1])
    both = missing[:, 0] & missing[:, 1]
    damage = missing[:, 2:] @ worth[2:] + 3 * both
    return np.square(damage) * (1 + 0.05 * random.normal(size=len(missing))) / 10


def test_the_design():
    sizes = TEN.masks.sum(axis=1)
    chosen = measured_scenarios(TEN, 60)
    assert len(np.unique(chosen)) == len(chosen) == 60
    assert (np.diff(chosen) > 0).all()
    counts = np.bincount(sizes[chosen])[1:]
    assert counts[[0, 8, 9]].tolist() == [10, 10, 1]
    middle = counts[1:8]
    assert middle.min() >= 3
    assert middle.argmax() in (2, 3, 4)
    # Far from each other: no two of a size in between are neighbours.
    between = TEN.masks[chosen[np.isin(sizes[chosen], (4, 5, 6))]].astype(int)
    apart = (between[:, None] != between).sum(axis=2)
    assert apart[np.triu_indices(len(between), 1)].min() >= 2
    for everything in (0, 63, 100):
        assert measured_scenarios(SIX, everything).tolist() == [*range(63)]
    with pytest.raises(InputError, match="scenario_budget: expected an integer from 13"):
        measured_scenarios(SIX, 12)


@pytest.mark.parametrize("seed", range(3))
def test_held_out_scenarios(seed):
    distortion = interacting(TEN, seed)
    measured = measured_scenarios(TEN, 60)
    others = np.setdiff1d(np.arange(len(TEN)), measured)
    regression = regress_scenarios(TEN.masks, measured, distortion[measured])
    predicted = regression.weights @ distortion[measured]
    np.testing.assert_array_equal(predicted[measured], distortion[measured])
    np.testing.assert_array_equal(np.flatnonzero(regression.error), others)
    deviations = (predicted - distortion)[others] / regression.error[others]
    assert (np.abs(deviations) < 1.96).mean() > 0.85
    assert deviations.std() > 0.3
    by_number = np.array([distortion[measured][TEN.missing[measured] == n].mean()
                          for n in range(10)])[TEN.missing]  # fmt: skip
    assert spearmanr(predicted[others], distortion[others]).statistic > 0.9
    squares = [np.square(guess - distortion)[others].mean() for guess in (predicted, by_number)]
    assert squares[0] < 0.3 * squares[1]


def test_equal_distortions_are_predicted_equal_and_scale_with_the_unit():
    measured = measured_scenarios(SIX, 20)
    flat = regress_scenarios(SIX.masks, measured, np.full(20, 3.0))
    np.testing.assert_allclose(flat.weights @ np.full(20, 3.0), 3.0)
    assert (flat.error == 0).all()
    values = interacting(SIX, 0)[measured]
    small, large = (regress_scenarios(SIX.masks, measured, u * values) for u in (1.0, 2.0**20))
    np.testing.assert_allclose(large.weights, small.weights, atol=1e-12)
    np.testing.assert_allclose(large.error, small.error * 2.0**20)


def to_probabilities(distortion):
    return scenario_probabilities(distortion).probabilities


class Sum(torch.nn.Module):
    """A latent to which modalities contribute unequally; it counts what it computes."""

    computed = 0

    def latent(self, images, available):
        self.computed += 1
        pairs = enumerate(zip(images, available.T, strict=True), 1)
        return sum(image * there.view(-1, 1, 1, 1) * m for m, (image, there) in pairs)


def test_a_scoring_within_a_budget():
    random = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, 6, 1, 4, 4, generator=random) for _ in range(5)]
    model = Sum()
    whole = score_scenarios(model, batches, SIX, progress=False)
    assert model.computed == 5 * 63
    assert not whole.predictive_error.any()
    model.computed = 0
    scores = score_scenarios(model, batches, SIX, progress=False, scenario_budget=30)
    assert model.computed == 5 * 30
    measured = measured_scenarios(SIX, 30)
    for found, expected in (
        (scores.patch_distortion.T, whole.patch_distortion.T),
        (scores.latent_shift, whole.latent_shift),
    ):
        np.testing.assert_allclose(found[measured], expected[measured], rtol=1e-12, atol=1e-15)
    assert set(np.flatnonzero(scores.predictive_error == 0)) == set(measured)
    assert (scores.distortion >= 0).all()
    far = np.abs(scores.distortion - whole.distortion)
    assert (far <= 3 * scores.predictive_error + 1e-12).mean() > 0.9
    p, q = (to_probabilities(s.distortion) for s in (whole, scores))
    assert np.abs(p - q).sum() < 0.25 * np.abs(p - 1 / 63).sum()

    until = stop_when_precise(0.5, to_probabilities, 160)
    stopped = score_scenarios(model, 4 * batches, SIX, None, until, False, 30)
    assert len(stopped.patch_ids) == FEWEST_PATCHES
    drawn = [
        bootstrap_probabilities(scores.patch_distortion, scores.block_ids, to_probabilities, 200,
                                predictive_error=error).std(axis=0)
        for error in (None, scores.predictive_error)
    ]  # fmt: skip
    predicted = scores.predictive_error > 0
    assert drawn[1][predicted].mean() > 1.1 * drawn[0][predicted].mean()


def test_a_figure_of_many_scenarios_says_what_it_leaves_out():
    seven = ScenarioSet.of([f"m{m}" for m in range(7)])
    scores = score_scenarios(Sum(), [torch.ones(2, 7, 1, 2, 2)], seven, None, None, False, 40)
    result = scenario_probabilities(scores.distortion)
    figure = method_at_a_glance(scores, result)
    assert f"{MOST_SHOWN} of 127 scenarios" in figure.get_suptitle()
    assert "predicted" in figure.get_suptitle()
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(names) == MOST_SHOWN
    assert seven.names[int(result.probabilities.argmax())] in names
