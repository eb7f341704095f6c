"""What p depends on: smoothing, settings, and the scored patches; scoring that stops early."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from study.stages.scoring import VARIED, precision_sentence, sensitivity
from test_regression import Sum, to_probabilities

from lsgs_core import Batch, InputError, ScenarioSet, scenario_probabilities, score_scenarios
from lsgs_core.distortion import clustered_standard_error
from lsgs_core.probabilities import standardise
from lsgs_core.uncertainty import (
    FEWEST_PATCHES,
    bootstrap_probabilities,
    smoothing_report,
    stop_when_precise,
    stopping_error,
)

DISTORTION = np.array([1.0, 0.8, 0.9, 0.4, 0.5, 0.3, 0.0])
SETTINGS = {"lengthscale": 1.0, "ridge": 1e-3, "inverse_temperature": 0.5, "mixing": 0.5}


def test_report():
    report = smoothing_report(DISTORTION, SETTINGS)
    assert 0 < report["total_variation_from_unsmoothed"] < 0.0035  # the largest that there is
    from_prior = 0.5 * np.abs(to_probabilities(DISTORTION) - 1 / 7).sum()
    assert report["total_variation_from_prior"] == pytest.approx(from_prior)
    kernel = scenario_probabilities(DISTORTION).kernel
    smoother = kernel @ np.linalg.inv(kernel + 1e-3 * np.eye(7))
    assert report["degrees_of_freedom"] == pytest.approx(np.trace(smoother), rel=1e-6)
    assert report["kernel_condition"] == pytest.approx(np.linalg.cond(kernel + 1e-3 * np.eye(7)))
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
    sums = table.groupby(["setting", "value"])["probability"].sum()
    np.testing.assert_allclose(sums, 1)


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


def test_the_whole_pass_lies_within_two_stated_errors():
    """In random orders of skewed patches whose blocks differ, and without a bias."""

    def to_probabilities(distortion):  # without the smoothing, which takes most of the time
        return 0.5 / 7 + 0.5 * softmax(0.5 * standardise(distortion))

    random, tolerance, count = np.random.default_rng(1), 0.008, 400
    effect = random.gamma(2, 1, size=(20, 1))[np.arange(count) % 20]
    values = DISTORTION * effect * random.gamma(2, 1, size=(count, 7))
    whole, covered, differences, needed = to_probabilities(values.mean(axis=0)), [], [], []
    for _ in range(60):
        ordered = values[random.permutation(count)]
        enough = stop_when_precise(tolerance, to_probabilities, count)
        stop = next(n for n in range(8, count + 1, 8) if enough(ordered[:n], np.arange(n)))
        differences.append(to_probabilities(ordered[:stop].mean(axis=0)) - whole)
        error = stopping_error(ordered[:stop], to_probabilities, count)
        covered.append(np.abs(differences[-1]) <= 2 * error)
        needed.append(stop)
    assert FEWEST_PATCHES < np.mean(needed) < 0.75 * count
    assert np.mean(covered) > 0.9
    assert np.abs(np.mean(differences, axis=0)).max() < tolerance / 2
    np.testing.assert_allclose(stopping_error(values, to_probabilities, count), 0, atol=1e-15)


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
