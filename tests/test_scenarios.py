"""Scenarios, their probabilities and their draws: the mathematics, without files or networks."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lsgs_core.errors import InputError
from lsgs_core.probabilities import rbf_kernel, scenario_probabilities
from lsgs_core.randomness import generator
from lsgs_core.sampling import draw_scenarios
from lsgs_core.scenarios import ScenarioSet

DISTORTION = np.array([0.9, 0.8, 1.1, 0.4, 0.3, 0.5, 0.0])
SCORED = scenario_probabilities([1.0, 0.8, 0.9, 0.4, 0.5, 0.3, 0.0]).probabilities


def test_order_is_the_methods():
    scenarios = ScenarioSet.of(["RGB", "NIR", "SWIR"])
    written = ["".join(str(int(bit)) for bit in mask) for mask in scenarios.masks]
    assert written == ["100", "010", "001", "110", "101", "011", "111"]
    assert scenarios.names[-1] == "RGB+NIR+SWIR"
    assert scenarios.missing.tolist() == [2, 2, 2, 1, 1, 1, 0]


@pytest.mark.parametrize("count", range(2, 8))
def test_every_subset_once(count):
    scenarios = ScenarioSet.of([f"modality{index}" for index in range(count)])
    assert len(scenarios) == len(scenarios.masks) == len(set(scenarios.names)) == 2**count - 1
    subsets = {*itertools.product([False, True], repeat=count)}
    assert {tuple(mask) for mask in scenarios.masks} == subsets - {(False,) * count}
    assert scenarios.masks[scenarios.full].all()


@pytest.mark.parametrize("name", ["cbc_slp", "cbc", "cmx"])
def test_reference_scoring(name):
    golden = np.load(Path(__file__).parent / "reference" / f"{name}.golden.npz")
    result = scenario_probabilities(golden["D"])
    names = {"kernel": "kernel", "smoothed": "scores", "standardised": "scores_z"}
    names |= {"softmax": "softmax", "probabilities": "probabilities"}
    for ours, theirs in names.items():
        found = getattr(result, ours)
        np.testing.assert_allclose(found, golden[theirs], rtol=0, atol=1e-8, err_msg=theirs)


# In steps of 1e-4: closer ones differ by less than the kernel resolves (`standardise` says so).
steps = arrays(np.float64, st.integers(2, 15), elements=st.integers(0, 50_000))


@given(steps.map(lambda count: count / 1e4), st.floats(0.01, 100), st.floats(0, 3), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_probabilities_are_a_distribution_within_bounds(distortion, scale, tau, gamma):
    settings = {"inverse_temperature": tau, "mixing": gamma}
    p = scenario_probabilities(distortion, direction=scale, **settings).probabilities
    assert p.sum() == pytest.approx(1, abs=1e-12)
    assert (p >= (1 - gamma) / len(distortion) - 1e-12).all()
    # the size of the direction cancels in the standardisation
    unscaled = scenario_probabilities(distortion, **settings).probabilities
    np.testing.assert_allclose(p, unscaled, atol=1e-6)


def test_bounds_for_three_modalities():
    """For K = 7 and the paper's values no distortion takes p out of [0.0906, 0.2766]."""
    extremes = np.eye(7)[0], 1 - np.eye(7)[0]
    found = [scenario_probabilities(d, smooth=False).probabilities for d in extremes]
    assert (np.min(found), np.max(found)) == pytest.approx((0.0906, 0.2766), abs=5e-5)


def test_equal_distortions_give_the_prior():
    assert scenario_probabilities([0.3] * 7).probabilities.tolist() == pytest.approx([1 / 7] * 7)
    prior = np.array([0.5, 0.3, 0.2])
    np.testing.assert_allclose(scenario_probabilities([0.0] * 3, prior=prior).probabilities, prior)


def test_prior_weighs_both_parts():
    prior = [0.7, 0.2, 0.1, 0.0]
    result = scenario_probabilities([1.0, 2.0, 3.0, 4.0], prior=prior, mixing=0.25)
    tilted = np.array(prior) * np.exp(0.5 * result.standardised)
    expected = 0.75 * np.array(prior) + 0.25 * tilted / tilted.sum()
    np.testing.assert_allclose(result.probabilities, expected, atol=1e-12)
    assert result.probabilities[3] == 0


def test_median_lengthscale_and_descriptors():
    descriptors = np.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
    kernel, width = rbf_kernel(descriptors, "median")
    assert width == 5.0  # distances 5, 5, 10
    assert kernel[0, 2] == pytest.approx(np.exp(-2))
    result = scenario_probabilities([1.0, 0.5, 0.0], descriptors=descriptors, lengthscale="median")
    np.testing.assert_allclose(result.kernel, kernel)
    assert rbf_kernel([1.0, 1.0, 1.0], "median")[0].tolist() == np.ones((3, 3)).tolist()


def test_smoothing_against_the_textbook():
    distortion = np.array([0.3, 1.2, 0.1, 0.9])
    result = scenario_probabilities(distortion, ridge=0.5, lengthscale=0.7)
    kernel = np.exp(-((distortion[:, None] - distortion) ** 2) / (2 * 0.7**2))
    textbook = kernel @ np.linalg.inv(kernel + 0.5 * np.eye(4)) @ distortion
    np.testing.assert_allclose(result.smoothed, textbook, atol=1e-12)
    assert scenario_probabilities(distortion, smooth=False).smoothed.tolist() == distortion.tolist()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"prior": [1.0, -1.0]}, "prior"),
        ({"distortion": [[1.0], [1.0, 2.0]]}, "distortion"),
        ({"direction": 1e308}, "direction"),
        ({"direction": 1e-320, "distortion": [1e-10, 1.0]}, "direction"),
        ({"inverse_temperature": 1.7e308, "distortion": [0.0] * 9 + [1.0]}, "inverse_temperature"),
    ],
)
def test_bad_arguments_are_named(arguments, field):
    with pytest.raises(InputError, match=field):
        scenario_probabilities(**{"distortion": [1.0, 2.0], **arguments})


@pytest.mark.parametrize("size", [2.0**-1000, 1e-300, 1e300, 2.0**1000, 1e308])
@pytest.mark.parametrize(
    ("smoothing", "scaled"),
    [
        ({"lengthscale": "median"}, {"lengthscale": "median"}),
        ({"smooth": False}, {"smooth": False}),
        ({"lengthscale": 0.5}, {}),  # times the size
    ],
)
def test_the_size_of_distortions_and_prior_does_not_matter(size, smoothing, scaled):
    """Nothing overflows or underflows, and powers of two change no digit."""
    prior = np.array([1.0, 1.5, 1.0, 0.5, 1.0, 0.0, 1.0])
    expected = scenario_probabilities(DISTORTION, prior=prior, **smoothing)
    scaled = scaled or {"lengthscale": 0.5 * size}
    ours = scenario_probabilities(size * DISTORTION, prior=size * prior, **scaled)
    np.testing.assert_allclose(ours.probabilities, expected.probabilities, rtol=1e-9)
    if np.frexp(size)[0] == 0.5:
        np.testing.assert_array_equal(ours.probabilities, expected.probabilities)
    for values in (ours.utility, ours.smoothed, ours.standardised, ours.softmax):
        assert np.isfinite(values).all()


def test_a_large_ridge_smooths_to_the_kernel_mean_and_not_to_rounding_errors():
    large = scenario_probabilities(DISTORTION, ridge=1e20)
    mean = large.kernel @ DISTORTION
    np.testing.assert_allclose(large.standardised, (mean - mean.mean()) / mean.std(), rtol=1e-9)


def test_draws_follow_the_probabilities():
    drawn = draw_scenarios(SCORED, seed=3, epoch=2, indices=range(7000))
    counts = np.bincount(drawn, minlength=7)
    assert scipy.stats.chisquare(counts, 7000 * SCORED).pvalue > 1e-3


def test_a_draw_depends_on_seed_epoch_and_sample_alone():
    p = np.full(7, 1 / 7)
    whole = draw_scenarios(p, 1, 5, np.arange(64))
    halves = [draw_scenarios(p, 1, 5, part) for part in (np.arange(32), np.arange(32, 64))]
    assert whole.tolist() == np.concatenate(halves).tolist()
    backwards = draw_scenarios(p, 1, 5, np.arange(64)[::-1])
    assert whole.tolist() == backwards[::-1].tolist()
    for other in (draw_scenarios(p, 2, 5, np.arange(64)), draw_scenarios(p, 1, 6, np.arange(64))):
        assert (whole != other).sum() > 0
    # The numbers themselves are part of the promise: runs of other versions stay comparable.
    assert whole[:8].tolist() == [6, 3, 0, 4, 6, 5, 0, 2]
    assert draw_scenarios(p, 0, 0, []).tolist() == []


def test_a_fine_tuning_never_replays_a_pretraining_of_any_seed():
    stages, runs = ("pretraining", "finetuning"), [*itertools.product(range(9), (0, 5))]
    for stream in ("order", "scenario", "augmentation", "dropout"):
        one, other = ({generator(stream, *run, stage=stage).random() for run in runs}
                      for stage in stages)  # fmt: skip
        assert not one & other, stream
    p = np.full(7, 1 / 7)
    one, other = (draw_scenarios(p, 0, 0, range(4000), stage=stage) for stage in stages)
    assert (one == other).mean() < 0.18  # by chance one in seven


def test_large_seeds_are_different_seeds():
    seeds = [2**53, 2**53 + 1, 2**63 + 1, 2**63 + 3, 2**64 - 1]
    assert len({generator("order", seed).random() for seed in seeds}) == len(seeds)
    assert generator("order", np.int64(7)).random() == generator("order", 7).random()


def test_methods_share_their_random_numbers():
    drawn = [draw_scenarios(p, 0, 0, np.arange(4000)) for p in (np.full(7, 1 / 7), SCORED)]
    independent = draw_scenarios(SCORED, 1, 0, np.arange(4000))
    assert (drawn[0] == drawn[1]).mean() > 2 * (drawn[0] == independent).mean()


def test_absent_files_renormalise():
    assert {*draw_scenarios([0, 0.5, 0, 0.5, 0], 0, 0, range(500))} == {1, 3}  # p = 0 never
    servable = np.zeros((500, 3), dtype=bool)
    servable[:, [0, 2]] = True
    drawn = draw_scenarios([0.2, 0.6, 0.2], 0, 0, np.arange(500), servable)
    assert set(drawn.tolist()) == {0, 2}
    assert 0.4 < (drawn == 0).mean() < 0.6
