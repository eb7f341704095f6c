"""What p depends on: settings, scored patches, and scenarios that are predicted from others."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from study.figures.scoring import MOST_SHOWN, method_at_a_glance
from study.stages.scoring import VARIED, precision_sentence, sensitivity

from lsgs_core import Batch, InputError, ScenarioSet, scenario_probabilities, score_scenarios
from lsgs_core.distortion import clustered_standard_error
from lsgs_core.regression import measured_scenarios, regress_scenarios
from lsgs_core.uncertainty import (
    FEWEST_PATCHES,
    bootstrap_probabilities,
    smoothing_report,
    stop_when_precise,
    stopping_error,
)

DISTORTION = np.array([1.0, 0.8, 0.9, 0.4, 0.5, 0.3, 0.0])
TEN, SIX = (ScenarioSet.of([f"m{m}" for m in range(count)]) for count in (10, 6))
SETTINGS = {"lengthscale": 1.0, "ridge": 1e-3, "inverse_temperature": 0.5, "mixing": 0.5}


def to_probabilities(distortion):
    return scenario_probabilities(distortion).probabilities


class Sum(torch.nn.Module):
    """A latent to which modalities contribute unequally; it counts what it computes."""

    computed = 0

    def latent(self, images, available):
        self.computed += 1
        pairs = enumerate(zip(images, available.T, strict=True), 1)
        return sum(image * there.view(-1, 1, 1, 1) * m for m, (image, there) in pairs)


def test_report():
    report = smoothing_report(DISTORTION, SETTINGS)
    assert 0 < report["total_variation_from_unsmoothed"] < 0.0035  # the largest that there is
    from_prior = 0.5 * np.abs(to_probabilities(DISTORTION) - 1 / 7).sum()
    assert report["total_variation_from_prior"] == pytest.approx(from_prior)
    kernel = scenario_probabilities(DISTORTION).kernel
    smoother = kernel @ np.linalg.inv(kernel + 1e-3 * np.eye(7))
    assert report["degrees_of_freedom"] == pytest.approx(np.trace(smoother), rel=1e-6)
    uniform = smoothing_report(DISTORTION, {**SETTINGS, "mixing": 0.0})
    assert uniform["effective_scenarios"] == pytest.approx(7)
    identity = smoothing_report(DISTORTION, {**SETTINGS, "lengthscale": 1e-3})
    assert identity["degrees_of_freedom"] == pytest.approx(7 / 1.001)
    assert identity["total_variation_from_unsmoothed"] == pytest.approx(0, abs=1e-12)
    unsmoothed = smoothing_report(DISTORTION, {**SETTINGS, "smooth": False})
    assert unsmoothed["degrees_of_freedom"] == 7


def test_sweep_varies_one_setting():
    table = sensitivity(DISTORTION, SETTINGS)
    assert set(table["setting"]) == set(VARIED)
    in_use = to_probabilities(DISTORTION)
    for setting in ("inverse_temperature", "mixing", "ridge"):
        rows = table[(table["setting"] == setting) & (table["value"] == SETTINGS[setting])]
        np.testing.assert_allclose(rows["probability"], in_use)
    unmixed = table.query("setting == 'mixing' and value == 0")["probability"]
    np.testing.assert_allclose(unmixed, 1 / 7)


def draws(count: int, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    block = np.repeat(np.arange(blocks), count // blocks)
    effect = random.normal(1, 0.2, size=(blocks, 1))
    return DISTORTION * effect[block] * random.normal(1, 0.05, size=(count, 7)), block


def test_bootstrap_of_the_mean_has_the_clustered_standard_error():
    values, blocks = draws(400, 40)
    drawn = bootstrap_probabilities(values, blocks, lambda distortion: distortion, 4000)
    expected = clustered_standard_error(values, blocks)
    np.testing.assert_allclose(drawn.std(axis=0), expected, rtol=0.08, atol=1e-12)
    np.testing.assert_allclose(drawn.mean(axis=0), values.mean(axis=0), rtol=0.02, atol=1e-12)
    again = bootstrap_probabilities(values, blocks, lambda distortion: distortion, 4000)
    np.testing.assert_array_equal(drawn, again)
    drawn = bootstrap_probabilities(values, blocks, to_probabilities, 200)
    np.testing.assert_allclose(drawn.sum(axis=1), 1)
    assert 0 < drawn.std(axis=0).min() < drawn.std(axis=0).max() < 0.02


def batches(count: int):
    """Patches of 40 blocks in random order, which differ more between blocks than within."""
    generator = torch.Generator().manual_seed(0)
    blocks = (torch.randperm(4 * count, generator=generator) % 40).split(4)
    for index, block in enumerate(blocks):
        effect = (1 + block / 40)[:, None, None, None]
        noise = torch.randn(3, 4, 1, 4, 4, generator=generator)
        images = tuple(one * effect for one in noise)
        ids = torch.arange(4) + 4 * index
        available = torch.ones(4, 3, dtype=torch.bool)
        yield Batch(images, available, patch_ids=ids, block_ids=block)


def test_scoring_stops_when_p_is_known():
    scenarios = ScenarioSet.of(["A", "B", "C"])

    def scored(tolerance):
        until = stop_when_precise(tolerance, to_probabilities, 400) if tolerance else None
        return score_scenarios(Sum(), batches(100), scenarios, until=until, progress=False)

    whole, coarse, fine = scored(0), scored(0.008), scored(0.002)
    assert len(whole.patch_ids) == 400
    assert FEWEST_PATCHES <= len(coarse.patch_ids) < len(fine.patch_ids) < 400
    for found, tolerance in ((coarse, 0.008), (fine, 0.002)):
        difference = to_probabilities(found.distortion) - to_probabilities(whole.distortion)
        assert np.abs(difference).max() < 3 * tolerance
        error = stopping_error(found.patch_distortion, to_probabilities, 400)
        assert 0 < error.max() <= tolerance
    with pytest.raises(InputError, match="patch_distortion: expected an integer from 2 to 399"):
        stopping_error(whole.patch_distortion, to_probabilities, 399)


def test_the_stopping_error_is_the_jackknife_of_the_pass_and_the_largest_change():
    calls, values = [], np.random.default_rng(0).gamma(2, 1, (50, 2)) * [1, 0]
    far = np.square(values[:, 0] - values[:, 0].mean())
    variance = (1 - 50 / 80) * (far.sum() / 50 / 49 + 4 * far.max() / 49**2)
    squared = np.square(stopping_error(values, np.asarray, 80))
    np.testing.assert_allclose(squared, [variance, variance / 2])
    np.testing.assert_allclose(stopping_error(values, np.asarray, 50), 0, atol=1e-15)
    rule = stop_when_precise(1e-9, lambda d: calls.append(count) or d, 400)
    for count in range(FEWEST_PATCHES - 5, 192):
        rule(np.ones((count, 2)), np.arange(count))
    assert list(dict.fromkeys(calls)) == [128, 141, 156, 172, 190]


def test_what_is_said_of_the_precision():
    scores = score_scenarios(Sum(), batches(10), ScenarioSet.of([*"ABC"]), progress=False)
    scene = np.full(7, 0.02)

    def said(patches, tolerance):
        return precision_sentence(scores, patches, tolerance, to_probabilities, scene)

    assert said(40, 0.0).startswith("40 of 40 patches scored; 40 blocks of another place would")
    assert "too few to stop before the end" in said(40, 0.01)
    assert "more than the tolerance" in said(40, 0.01)
    error = stopping_error(scores.patch_distortion, to_probabilities, 90).max()
    assert f"known to {error:.4f}, against the whole pass" in said(90, 0.1)
    assert "more than the tolerance" not in said(90, 0.1)


# Scenarios that are predicted from a budget of measured ones.


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
