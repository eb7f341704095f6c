"""Distortion scoring on networks whose answer is known, and the published JSON."""

import json
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event

import numpy as np
import pytest
import torch
from torch import nn

from lsgs_core import (
    Batch,
    HookedModel,
    InputError,
    ScenarioSet,
    build_backbone,
    scenario_probabilities,
    score_scenarios,
)
from lsgs_core.distortion import clustered_standard_error
from lsgs_core.methods import find_method
from lsgs_core.models.adapter import PredictionModel
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


def score(model, batches):
    return score_scenarios(model, batches, SCENARIOS, progress=False)


def ones(count: int) -> list[torch.Tensor]:
    return [torch.ones(count, 2, 4, 4) for _ in range(3)]


def test_distortion_of_a_known_latent():
    """All images are 1, so the latent is the sum of the present weights: D is known exactly."""
    scores = score(SumOfMeans(), [ones(2), ones(1)])
    missing = 7 - SCENARIOS.masks @ np.array([1, 2, 4])
    np.testing.assert_allclose(scores.distortion, missing.astype(float) ** 2)
    np.testing.assert_allclose(scores.latent_shift, -missing[:, None].repeat(2, axis=1))
    assert scores.patch_distortion.shape == (3, 7)
    assert scores.distortion[SCENARIOS.full] == 0
    assert scores.patch_ids.tolist() == scores.block_ids.tolist() == [0, 1, 2]
    np.testing.assert_allclose(scores.standard_error, 0, atol=1e-12)


def test_batches_and_their_form_make_no_difference():
    images, model = torch.randn(6, 3, 2, 5, 5), SumOfMeans()
    together = score(model, [images])
    assert model.calls == len(SCENARIOS)  # the full scenario is computed once
    listed = score(model, [images.unbind(1)])
    np.testing.assert_array_equal(together.patch_distortion, listed.patch_distortion)
    parts = score(model, images.split(4))
    np.testing.assert_allclose(together.distortion, parts.distortion, rtol=1e-6)
    np.testing.assert_allclose(together.latent_shift, parts.latent_shift, atol=1e-6)


def batch(available: list[list[bool]]) -> Batch:
    """Patches 10, 11, ... of blocks 5, 6, ..."""
    images, numbers = torch.randn(3, len(available), 2, 4, 4), torch.arange(len(available))
    ids = {"patch_ids": numbers + 10, "block_ids": numbers + 5}
    return Batch(tuple(images), torch.tensor(available), **ids)


def test_incomplete_patches_are_left_out():
    whole = [True, True, True]
    scores = score(SumOfMeans(), [batch([whole, [True, False, True], whole])])
    assert scores.patch_ids.tolist() == [10, 12]
    assert scores.block_ids.tolist() == [5, 7]
    with pytest.raises(InputError, match="every modality"):
        score(SumOfMeans(), [batch([[True, False, True]])])


def test_a_latent_that_is_not_finite_names_the_patch():
    given = batch([[True] * 3] * 2)
    given.images[0][1, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match=r"\[11\]"):
        score(SumOfMeans(), [given])


def test_patches_without_identifiers_are_counted_with_those_left_out():
    images = [tuple(ones(2))] * 2
    batches = [Batch(images[0], torch.tensor([[True, False, True], [True] * 3])), *images[1:]]
    assert score(SumOfMeans(), batches).patch_ids.tolist() == [1, 2, 3]


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_scoring_leaves_the_mode_of_every_module(training, error):
    """A frozen batch normalisation stays frozen, a network in evaluation mode stays so."""
    network = nn.Sequential(nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    network.train(training)
    network[1].eval()
    modes, seen = [module.training for module in network.modules()], []

    def call(net, images):
        seen.extend(module.training for module in net.modules())
        return net(torch.cat(images, 1) / (0 if error else 1))

    scored = HookedModel(network, "2", call)
    if error:
        with pytest.raises(InputError, match="finite"):
            score(scored, [ones(2)])
    else:
        first = score(scored, [ones(2)])
        np.testing.assert_array_equal(first.distortion, score(scored, [ones(2)]).distortion)
    assert [module.training for module in network.modules()] == modes
    assert scored.training
    assert not any(seen)


def test_two_threads_on_one_network_are_refused_and_on_one_backbone_right():
    class Waiting(SumOfMeans):
        def latent(self, images, available):
            started.set()
            assert going_on.wait(60)
            return super().latent(images, available)

    started, going_on, model = Event(), Event(), Waiting()
    backbone, images = build_backbone("cmx", "demo"), torch.randn(2, 3, 3, 64, 64)
    expected = score(backbone, [images])
    with ThreadPoolExecutor() as threads:
        first = threads.submit(score, model, [ones(1)])
        assert started.wait(60)
        for same in (model, HookedModel(nn.ModuleDict({"inner": model}), "inner")):
            with pytest.raises(InputError, match="no other thread"):
                score(same, [ones(1)])
        score(SumOfMeans(), [ones(1)])  # another network
        going_on.set()
        assert first.result().distortion[0] == 36
        assert model.training
        assert score(model, [ones(1)]).distortion[0] == 36
        for scores in threads.map(lambda _: score(backbone, [images]), range(3)):
            np.testing.assert_array_equal(scores.distortion, expected.distortion)
    backbone.eval().fusions[0].train()
    modes = [module.training for module in backbone.modules()]
    score(backbone, [images])
    assert [module.training for module in backbone.modules()] == modes


IMAGES = torch.ones(2, 3, 2, 4, 4)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (IMAGES, "a list of batches, found Tensor"),  # the outer list is missing
        (ones(2), r"in each, found torch.float32 \[2, 2, 4, 4\]"),  # here too
        (Batch(tuple(ones(2)), torch.ones(2, 3, dtype=torch.bool)), "found Batch"),
        ({"images": IMAGES}, "found dict"),
        ([[image.numpy() for image in ones(2)]], "found a list of a ndarray"),
        ([(IMAGES, torch.ones(2), None)], "found a tuple of"),  # images and target
        ([[*ones(2)[:2], torch.ones(2, 2, 4)]], r"found .*float32 \[2, 2, 4\]"),
        ([[*ones(2)[:2], *ones(3)[:1]]], r"found .*\[3, 2, 4, 4\]"),
        ([ones(2)[:2]], "expected 3 tensors"),
        ([IMAGES.double()], "of torch.float32 in each, found .*torch.float64"),
        ([IMAGES.to(torch.uint8)], "found .*torch.uint8"),
    ],
)
def test_batches_of_another_form_are_refused(batches, message):
    with pytest.raises(InputError, match=f"batches: .*({message})"):
        score(SumOfMeans(), batches)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda latent: latent[:, 0], r"found torch.float32 \[2\]"),
        (lambda latent: latent[:1], r"float32 \[1, 2\]"),
        (lambda latent: latent.mean(), r"float32 \[\]"),
        (lambda latent: (latent, latent), "found a tuple"),
        (lambda latent: latent.to(torch.complex64), "complex64"),
        (lambda latent: latent.long(), "int64"),
        (lambda latent: latent.repeat(1, 1 + int(latent[0, 0])), "in all scenarios"),
    ],
)
def test_latents_of_another_form_are_refused(change, message):
    model = SumOfMeans()
    latent = model.latent
    model.latent = lambda images, available: change(latent(images, available))
    with pytest.raises(InputError, match=f"latent: .*{message}"):
        score(model, [ones(2)])


@pytest.mark.parametrize(
    ("name", "modalities", "exclusive"),
    [("cbc_slp", 3, True), ("cbc", 2, False), ("cmx", 3, False), ("cmx", 2, True)],
)
def test_predictions_are_those_of_a_forward_pass_for_each_scenario(
    name, modalities, exclusive, monkeypatch
):
    """Also with patches and pixels that a modality does not observe, and of several parts."""
    monkeypatch.setattr("lsgs_core.distortion.SCENARIOS_AT_A_TIME", 2)
    torch.manual_seed(0)
    scenarios = ScenarioSet.of([*"ABC"][:modalities])
    model = build_backbone(name, "demo", bands=[2, 3, 1][:modalities], classes=2)
    model = model.double().eval()
    available = torch.ones(4, modalities, dtype=torch.bool)
    available[1, 0] = False
    seen = torch.ones(4, modalities, 32, 32, dtype=torch.bool)
    seen[2, 1, :9] = False  # one modality alone: the patch has no full scenario
    seen[3, :, :9] = False
    images = [torch.randn(4, bands, 32, 32, dtype=torch.float64) for bands in model.bands]
    batch = Batch(tuple(images), available, seen=seen)
    scored = PredictionModel(model, exclusive)
    scores = score_scenarios(scored, [batch], scenarios, progress=False)
    assert scores.patch_ids.tolist() == [0, 3]

    kept, masks = [image[[0, 3]] for image in images], torch.tensor(scenarios.masks)
    with torch.inference_mode():
        logits = torch.stack([model(kept, mask.expand(2, -1)) for mask in masks])
    predicted = logits.softmax(2) if exclusive else logits.sigmoid()
    difference = (predicted - predicted[-1]).numpy()
    expected = np.square(difference).mean(axis=(2, 3, 4)).T
    assert (expected[:, :-1] > 0).all()
    np.testing.assert_allclose(scores.patch_distortion, expected, rtol=1e-9, atol=1e-18)
    shift = difference.mean(axis=(1, 3, 4))
    np.testing.assert_allclose(scores.latent_shift, shift, rtol=1e-7, atol=1e-12)


def test_predictions_of_an_own_network_take_a_forward_pass_for_each_scenario():
    class Network(nn.Module):
        def forward(self, images, available):
            absent = (~available).to(images[0].dtype)
            return images[0][:, :1] * absent.sum(dim=1)[:, None, None, None]

    scores = score(PredictionModel(Network()), [ones(2)])
    expected = (torch.tensor(SCENARIOS.missing).sigmoid() - 0.5).square()
    np.testing.assert_allclose(scores.distortion, expected, rtol=1e-6)


def test_few_latents_exist_at_a_time():
    many = ScenarioSet.of([*"ABCDEFG"])
    images = torch.ones(1, 7, 1, 2, 2)
    alive: set[int] = set()
    most = []

    class Latent(nn.Module):
        def latent(self, images, available):
            latent = available.float()
            alive.add(id(latent))
            weakref.finalize(latent, alive.discard, id(latent))
            most.append(len(alive))
            return latent

    class Shared(Latent):
        def scenario_latents(self, images, masks):
            return torch.stack([self.latent(images, mask[None]) for mask in masks])

    kinds = Latent(), Shared()
    one, shared = (score_scenarios(kind, [images], many, progress=False) for kind in kinds)
    np.testing.assert_array_equal(one.distortion, shared.distortion)
    np.testing.assert_allclose(one.distortion, many.missing / 7)
    assert max(most[: len(many)]) <= 4
    assert max(most) <= 40


def test_the_standard_error_is_the_usual_one_and_copies_in_a_cluster_count_once():
    values = np.random.default_rng(0).normal(size=(50, 2))
    expected = values.std(axis=0, ddof=1) / np.sqrt(50)
    found = clustered_standard_error(values, np.arange(50))
    copied = clustered_standard_error(values.repeat(10, axis=0), np.arange(50).repeat(10))
    np.testing.assert_allclose([found, copied], [expected] * 2)
    assert np.isnan(clustered_standard_error(values, np.zeros(50, dtype=int))).all()


PUBLISHED_FIELDS = {
    *("modelType", "checkpoint_path", "output_json", "alpha", "tau", "gamma_floor", "lambda"),
    *("rbf_sigma", "scenario_names", "mask_array", "meta_info", "D_sh", "U"),
    *("scenario_features_X", "kernel_matrix", "kernel_scores_r", "normalized_kernel_scores"),
    *("softmax_probs", "final_probs"),
}


def write(path, scores, **own):
    """Write a scoring; return what is written, and the result."""
    settings = {"direction": 1.0, "inverse_temperature": 0.5, "mixing": 0.5, "ridge": 1.0, **own}
    result = scenario_probabilities(scores.distortion, **settings)
    notes = "distortion", settings, "toy", "in", "out", {"foldNo": 1}
    content = published_scoring(scores, result, *notes)
    path.write_text(json.dumps(content))
    return content, result


@pytest.fixture
def published(tmp_path):
    path = tmp_path / "probabilities.json"
    return path, *write(path, score(SumOfMeans(), [ones(2)]))


def test_published_fields(published):
    path, content, result = published
    assert set(content) == PUBLISHED_FIELDS | {"latent_shift", "prior", "descriptor"}
    evidence = read_evidence(path, SCENARIOS)
    np.testing.assert_allclose(evidence.probabilities, result.probabilities)
    np.testing.assert_allclose(evidence.distortion, content["D_sh"])


@pytest.mark.parametrize("own", [{}, {"smooth": False}, {"lengthscale": "median"}])
def test_settings_come_back_also_beyond_the_published(tmp_path, own):
    """A scoring without smoothing is not smoothed by the methods that build on it."""
    distortion = np.array([1.0, 0.8, 0.9, 0.4, 0.5, 0.3, 0.0])
    scores = replace(score(SumOfMeans(), [ones(2)]), distortion=distortion)
    _, result = write(tmp_path / "own.json", scores, **own)
    evidence = read_evidence(tmp_path / "own.json", SCENARIOS)
    assert evidence.settings | own == evidence.settings
    np.testing.assert_allclose(evidence.scored().probabilities(0), result.probabilities)


def test_the_authors_file_needs_only_the_probabilities(published):
    path, content, result = published
    path.write_text(json.dumps({"final_probs": content["final_probs"]}))
    evidence = read_evidence(path, SCENARIOS)
    drawn = find_method("lsgs").sampler(evidence).probabilities(0)
    np.testing.assert_allclose(drawn, result.probabilities)
    with pytest.raises(InputError, match="distortion: expected a value from the scoring"):
        find_method("lsgs_strong").sampler(evidence)


def test_a_file_without_expected_scenarios_has_its_own(published):
    path, content, _ = published
    assert read_evidence(path).scenarios == SCENARIOS
    for names in (None, ["A", 1], ["A"], ["A", "B", "C", "A+B"]):
        path.write_text(json.dumps({**content, "scenario_names": names}))
        with pytest.raises(InputError, match=r"probabilities\.json: (scenario_names|modalities)"):
            read_evidence(path)
