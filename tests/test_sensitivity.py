"""What p depends on: smoothing, settings, and the scored patches; scoring that stops early."""

import numpy as np
import pytest
import torch
from study.sensitivity import VARIED, sensitivity

from lsgs_core import Batch, ScenarioSet, scenario_probabilities, score_scenarios
from lsgs_core.distortion import clustered_standard_error
from lsgs_core.uncertainty import bootstrap_probabilities, smoothing_report, stop_when_precise

DISTORTION = np.array([1.0, 0.8, 0.9, 0.4, 0.5, 0.3, 0.0])
SETTINGS = {"lengthscale": 1.0, "ridge": 1e-3, "inverse_temperature": 0.5, "mixing": 0.5}


def test_report():
    report = smoothing_report(DISTORTION, SETTINGS)
    assert 0 < report["total_variation_from_unsmoothed"] < 0.0035  # the largest that there is
    assert report["total_variation_from_prior"] == pytest.approx(
        0.5 * np.abs(scenario_probabilities(DISTORTION).probabilities - 1 / 7).sum()
    )
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
    in_use = scenario_probabilities(DISTORTION).probabilities
    for setting in ("inverse_temperature", "mixing", "ridge"):
        rows = table[(table["setting"] == setting) & (table["value"] == SETTINGS[setting])]
        np.testing.assert_allclose(rows["probability"], in_use)
    np.testing.assert_allclose(
        table.query("setting == 'mixing' and value == 0")["probability"], 1 / 7
    )
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
    assert (drawn.std(axis=0) > 0).all()
    assert (drawn.std(axis=0) < 0.02).all()


def to_probabilities(distortion):
    return scenario_probabilities(distortion).probabilities


class Latent(torch.nn.Module):
    """Its latent is the sum of the images that are there."""

    def latent(self, images, available):
        return sum(i * a[:, None, None, None] for i, a in zip(images, available.T, strict=True))


def batches(count: int):
    generator = torch.Generator().manual_seed(0)
    for index in range(count):
        images = tuple(
            torch.randn(4, 1, 4, 4, generator=generator) * size for size in (1.0, 2.0, 3.0)
        )
        yield Batch(
            images,
            torch.ones(4, 3, dtype=torch.bool),
            patch_ids=torch.arange(4) + 4 * index,
            block_ids=torch.full((4,), index),
        )


def test_scoring_stops_when_p_is_known():
    scenarios = ScenarioSet.of(["A", "B", "C"])

    def scored(tolerance):
        until = stop_when_precise(tolerance, to_probabilities) if tolerance else None
        return score_scenarios(Latent(), batches(40), scenarios, until=until, progress=False)

    whole, coarse, fine = scored(0), scored(0.01), scored(0.004)
    assert len(whole.patch_ids) == 160
    assert 8 * 4 <= len(coarse.patch_ids) < len(fine.patch_ids) < 160
    for found, tolerance in ((coarse, 0.01), (fine, 0.004)):
        difference = to_probabilities(found.distortion) - to_probabilities(whole.distortion)
        assert np.abs(difference).max() < 4 * tolerance
