"""Distortion scoring on networks whose answer is known, and the published JSON."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lsgs_core import Batch, InputError, ScenarioSet, scenario_probabilities, score_scenarios
from lsgs_core.distortion import clustered_standard_error
from lsgs_core.methods import find_method
from lsgs_core.scoring_file import published_scoring, read_evidence

SCENARIOS = ScenarioSet.of(["A", "B", "C"])


class SumOfMeans(nn.Module):
    """A foreign model: its latent is the weighted sum of what is present. It has no decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([1.0, 2.0, 4.0]))
        self.calls = 0

    def latent(self, images, available):
        self.calls += 1
        means = torch.stack([image.mean(dim=(2, 3)) for image in images], dim=1)  # (B, M, D)
        return (means * (self.weights * available)[..., None]).sum(dim=1)  # (B, D)


def ones(count: int) -> list[torch.Tensor]:
    return [torch.ones(count, 2, 4, 4) for _ in range(3)]


def test_distortion_of_a_known_latent():
    """All images are 1, so the latent is the sum of the present weights: D is known exactly."""
    scores = score_scenarios(SumOfMeans(), [ones(2), ones(1)], SCENARIOS, progress=False)
    missing = 7 - SCENARIOS.masks @ np.array([1, 2, 4])
    np.testing.assert_allclose(scores.distortion, missing.astype(float) ** 2)
    np.testing.assert_allclose(scores.latent_shift, -missing[:, None].repeat(2, axis=1))
    assert scores.patch_distortion.shape == (3, 7)
    assert scores.distortion[SCENARIOS.full] == 0
    assert scores.patch_ids.tolist() == scores.block_ids.tolist() == [0, 1, 2]
    np.testing.assert_allclose(scores.standard_error, 0, atol=1e-12)


def test_batches_and_their_form_make_no_difference():
    images, model = torch.randn(6, 3, 2, 5, 5), SumOfMeans()
    together = score_scenarios(model, [images], SCENARIOS, progress=False)
    assert model.calls == len(SCENARIOS)  # the full scenario is computed once
    listed = score_scenarios(model, [images.unbind(1)], SCENARIOS, progress=False)
    np.testing.assert_array_equal(together.patch_distortion, listed.patch_distortion)
    parts = score_scenarios(model, images.split(4), SCENARIOS, progress=False)
    np.testing.assert_allclose(together.distortion, parts.distortion, rtol=1e-6)
    np.testing.assert_allclose(together.latent_shift, parts.latent_shift, atol=1e-6)


def batch(available: list[list[bool]], blocks: list[int]) -> Batch:
    count = len(available)
    return Batch(
        images=tuple(torch.randn(count, 2, 4, 4) for _ in range(3)),
        available=torch.tensor(available),
        patch_ids=torch.arange(10, 10 + count),
        block_ids=torch.tensor(blocks),
    )


def test_incomplete_patches_are_left_out():
    whole = [True, True, True]
    given = batch([whole, [True, False, True], whole], [5, 6, 7])
    scores = score_scenarios(SumOfMeans(), [given], SCENARIOS, progress=False)
    assert scores.patch_ids.tolist() == [10, 12]
    assert scores.block_ids.tolist() == [5, 7]
    with pytest.raises(InputError, match="every modality"):
        score_scenarios(
            SumOfMeans(), [batch([[True, False, True]], [1])], SCENARIOS, progress=False
        )


def test_a_latent_that_is_not_finite_names_the_patch():
    given = batch([[True] * 3] * 2, [0, 1])
    given.images[0][1, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match=r"\[11\]"):
        score_scenarios(SumOfMeans(), [given], SCENARIOS, progress=False)


def test_standard_error_of_independent_values_is_the_usual_one():
    values = np.random.default_rng(0).normal(size=(50, 2))
    expected = values.std(axis=0, ddof=1) / np.sqrt(50)
    np.testing.assert_allclose(clustered_standard_error(values, np.arange(50)), expected)


def test_clusters_of_copies_count_once():
    """Ten copies of every value are no more evidence than one of each."""
    values = np.random.default_rng(1).normal(size=(20, 3))
    copies, clusters = values.repeat(10, axis=0), np.arange(20).repeat(10)
    np.testing.assert_allclose(
        clustered_standard_error(copies, clusters), clustered_standard_error(values, np.arange(20))
    )
    assert np.isnan(clustered_standard_error(values, np.zeros(20, dtype=int))).all()


PUBLISHED_FIELDS = {
    *("modelType", "checkpoint_path", "output_json", "alpha", "tau", "gamma_floor", "lambda"),
    *("rbf_sigma", "scenario_names", "mask_array", "meta_info", "D_sh", "U"),
    *("scenario_features_X", "kernel_matrix", "kernel_scores_r", "normalized_kernel_scores"),
    *("softmax_probs", "final_probs"),
}


@pytest.fixture
def published(tmp_path):
    scores = score_scenarios(SumOfMeans(), [ones(2)], SCENARIOS, progress=False)
    settings = {"direction": 1.0, "inverse_temperature": 0.5, "mixing": 0.5, "ridge": 1e-3}
    result = scenario_probabilities(scores.distortion, **settings)
    content = published_scoring(
        scores, result, "distortion", settings, "toy", "in", "out", {"foldNo": 1}
    )
    path = tmp_path / "probabilities.json"
    path.write_text(json.dumps(content))
    return path, content, result


def test_published_fields(published):
    path, content, result = published
    assert set(content) == PUBLISHED_FIELDS | {"latent_shift", "prior", "descriptor"}
    evidence = read_evidence(path, SCENARIOS)
    np.testing.assert_allclose(evidence.probabilities, result.probabilities)
    np.testing.assert_allclose(evidence.distortion, content["D_sh"])
    np.testing.assert_allclose(evidence.scored().probabilities(0), result.probabilities)


@pytest.mark.parametrize("own", [{"smooth": False}, {"lengthscale": "median"}])
def test_settings_beyond_the_published_come_back(tmp_path, own):
    """A scoring without smoothing is not smoothed by the methods that build on it."""
    distortion = np.array([1.0, 0.8, 0.9, 0.4, 0.5, 0.3, 0.0])
    settings = {"direction": 1.0, "inverse_temperature": 0.5, "mixing": 0.5, "ridge": 1.0, **own}
    scores = score_scenarios(SumOfMeans(), [ones(2)], SCENARIOS, progress=False)
    scores = replace(scores, distortion=distortion)
    result = scenario_probabilities(distortion, **settings)
    written = published_scoring(scores, result, "distortion", settings, "toy", "in", "out", {})
    (tmp_path / "own.json").write_text(json.dumps(written))
    evidence = read_evidence(tmp_path / "own.json", SCENARIOS)
    assert evidence.settings | own == evidence.settings
    np.testing.assert_allclose(evidence.scored().probabilities(0), result.probabilities)


def test_the_authors_file_needs_only_the_probabilities(published):
    path, content, result = published
    path.write_text(json.dumps({"final_probs": content["final_probs"]}))
    evidence = read_evidence(path, SCENARIOS)
    np.testing.assert_allclose(
        find_method("lsgs").sampler(evidence).probabilities(0), result.probabilities
    )
    with pytest.raises(InputError, match="distortion, which this method needs"):
        find_method("lsgs_strong").sampler(evidence)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"final_probs": [0.5, 0.5]}, "one per scenario"),
        ({"final_probs": [1.0] * 7}, "sum to 1"),
        ({"final_probs": ["a"] * 7}, "final_probs"),
        ({"mask_array": [[1, 1, 1]] * 7}, "mask_array"),
        ({"D_sh": [1.0, 2.0]}, "D_sh: expected finite numbers for every scenario"),
        ({"latent_shift": [[float("nan")]] * 7}, "latent_shift"),
        ({"tau": "x"}, "probabilities.json"),
    ],
)
def test_foreign_probabilities_are_checked(published, change, message):
    path, content, _ = published
    path.write_text(json.dumps({**content, **change}))
    with pytest.raises(InputError, match=message):
        read_evidence(path, SCENARIOS)


@pytest.mark.parametrize("text", ["[1, 2]", "{}", "no json"])
def test_not_a_scoring(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(InputError, match=r"other\.json"):
        read_evidence(tmp_path / "other.json", SCENARIOS)
