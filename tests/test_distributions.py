"""The samplers of the study: their distributions, what they learn, and that their state goes on."""

import json

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from lsgs_core import adaptive, distributions
from lsgs_core.errors import InputError
from lsgs_core.probabilities import rbf_kernel, scenario_probabilities
from lsgs_core.sampling import FixedSampler, ScenarioSampler
from lsgs_core.scenarios import ScenarioSet

THREE = ScenarioSet.of(["RGB", "NIR", "SWIR"])
UNIFORM = np.full(7, 1 / 7)
SCORED = scenario_probabilities([1.0, 0.8, 0.9, 0.4, 0.5, 0.3, 0.0]).probabilities


def test_bernoulli():
    np.testing.assert_allclose(distributions.bernoulli(THREE, 0.5), UNIFORM)
    p = distributions.bernoulli(THREE, 0.8)
    random = np.random.default_rng(0)
    kept = random.random((200_000, 3)) < 0.8
    kept = kept[kept.any(axis=1)]
    drawn = [(kept == mask).all(axis=1).mean() for mask in THREE.masks]
    np.testing.assert_allclose(p, drawn, atol=0.004)


def test_deployment_prior():
    p = distributions.deployment_prior(THREE, [0.0, 0.5, 1.0])  # RGB always there, SWIR never
    np.testing.assert_allclose(p, [0.5, 0, 0, 0.5, 0, 0, 0])
    np.testing.assert_allclose(distributions.deployment_prior(THREE, [0, 0, 0]), np.eye(7)[6])


def test_cardinality_is_the_nearest_that_knows_only_the_number_missing():
    p = distributions.by_cardinality(THREE, SCORED)
    for missing in range(3):
        assert np.ptp(p[THREE.missing == missing]) == pytest.approx(0, abs=1e-12)
    assert p @ THREE.missing == pytest.approx(SCORED @ THREE.missing)

    def cross_entropy(beta: float) -> float:
        weights = np.exp(beta * THREE.missing)
        return float(-SCORED @ np.log(weights / weights.sum()))

    best = scipy.optimize.minimize_scalar(cross_entropy, bounds=(-5, 5), method="bounded").x
    np.testing.assert_allclose(np.diff(np.log(p[[6, 3, 0]])), best, atol=1e-4)
    np.testing.assert_allclose(distributions.by_cardinality(THREE, UNIFORM), UNIFORM)
    np.testing.assert_allclose(distributions.by_cardinality(THREE, np.eye(7)[6]), np.eye(7)[6])


@pytest.mark.parametrize("within", [True, False])
def test_permuted(within):
    seen = set()
    for seed in range(40):
        p = distributions.permuted(THREE, SCORED, seed, within)
        assert np.array_equal(p, distributions.permuted(THREE, SCORED, seed, within))
        assert not np.array_equal(p, SCORED)
        np.testing.assert_array_equal(np.sort(p), np.sort(SCORED))
        if within:
            for missing in range(3):
                group = THREE.missing == missing
                np.testing.assert_array_equal(np.sort(p[group]), np.sort(SCORED[group]))
        seen.add(tuple(p))
    assert len(seen) > 20 if not within else 15 < len(seen) <= 35


def test_dirichlet():
    draws = np.array([distributions.dirichlet(7, seed, 5.0) for seed in range(4000)])
    np.testing.assert_allclose(draws.sum(axis=1), 1)
    np.testing.assert_allclose(draws.mean(axis=0), UNIFORM, atol=0.006)
    np.testing.assert_allclose(draws.var(axis=0), (1 / 7) * (6 / 7) / 36, rtol=0.1)


def test_coverage_without_relations_is_proportional_to_utility():
    utility = np.array([3.0, 1.0, 0.0, 2.0])
    never = [0.0, 0.5, 0.25, 0.25]  # what never happens does not count
    for mixing, prior, expected in (
        (1, None, utility / 6),
        (0.5, None, 0.125 + utility / 12),
        (1, never, [0, 1 / 3, 0, 2 / 3]),
    ):
        p = distributions.coverage(utility, np.eye(4), mixing, prior)
        np.testing.assert_allclose(p, expected, atol=2e-4 * mixing)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(0, 5), min_size=5, max_size=5),
    st.lists(st.floats(-3, 3), min_size=5, max_size=5),
)
def test_coverage_is_the_maximum(utility, places):
    kernel, _ = rbf_kernel(places, 1.0)
    q = distributions.coverage(utility, kernel, mixing=1)
    assert q.sum() == pytest.approx(1)
    if max(utility) == 0:
        np.testing.assert_allclose(q, 0.2)
        return
    weights = np.array(utility) / max(utility)
    weights /= weights.sum()
    # First-order condition of a concave maximum on the simplex: no direction gains.
    gain = kernel.T @ (weights / (kernel @ q))
    assert gain.max() < 1 + 2e-6


def adapting(name: str, prior: np.ndarray = UNIFORM) -> ScenarioSampler:
    if name == "loss":
        return adaptive.LossProportional(prior, 2.0, 0.8)
    if name == "group_dro":
        return adaptive.GroupDRO(prior, step=0.05)
    return adaptive.Exp3S(prior, step=0.02, window=32)


def test_kernel_group_dro_shares_losses_between_scenarios_that_are_alike():
    kernel = np.eye(7)
    kernel[0, 1] = kernel[1, 0] = 0.99
    sampler = adaptive.KernelGroupDRO(UNIFORM, UNIFORM, kernel, step=0.5)
    for _ in range(20):  # the second scenario is never drawn
        sampler.observe(np.array([0, 2, 3, 4, 5, 6]), np.array([2.0, 1, 1, 1, 1, 1]))
    p = sampler.probabilities(1)
    assert p[0] > p[1] > p[2] == pytest.approx(p[6])
    freedom = np.trace(kernel @ np.linalg.inv(kernel + sampler.ridge * np.eye(7)))
    assert sampler.report() == {"degrees_of_freedom": pytest.approx(freedom)}
    assert sampler.ridge != 1


@pytest.mark.parametrize("name", ["loss", "group_dro", "exp3s"])
def test_state_goes_on(name):
    random = np.random.default_rng(1)
    first, second = adapting(name), adapting(name)
    for _ in range(60):
        k = random.integers(7, size=8)
        first.observe(k, 0.1 * k + random.random(8))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for _ in range(20):
        k = random.integers(7, size=8)
        loss = 0.1 * k + random.random(8)
        first.observe(k, loss)
        second.observe(k, loss)
        np.testing.assert_array_equal(first.probabilities(1), second.probabilities(1))
    for wrong in ({}, {"log_weights": [0.0], "average": [0.0], "count": [0.0]}):
        with pytest.raises(InputError, match="state: expected"):
            second.load_state_dict(wrong)


@pytest.mark.parametrize("name", ["loss", "group_dro"])
def test_high_losses_are_drawn_more_often(name):
    sampler, random = adapting(name), np.random.default_rng(2)
    for _ in range(200):
        k = random.choice(7, size=8, p=sampler.probabilities(0))
        sampler.observe(k, 0.2 * k + 0.05 * random.random(8))
    assert (np.diff(sampler.probabilities(0)) > 0).all()


def test_exp3s_draws_where_the_loss_falls():
    sampler, random = adapting("exp3s"), np.random.default_rng(3)
    level = np.full(7, 2.0)
    for _ in range(400):
        k = random.choice(7, size=4, p=sampler.probabilities(0))
        sampler.observe(k, level[k] + 0.02 * random.standard_normal(4))
        level[3] *= 0.995  # only here is anything learnt
    assert sampler.probabilities(0).argmax() == 3


def test_loss_proportional_formula():
    sampler = adaptive.LossProportional(UNIFORM, 0.5, 0.5, memory=0.5)
    sampler.observe(np.array([0, 0, 1]), np.array([1.0, 3.0, 5.0]))
    # Averages with the bias of the start taken out: (0.25 * 1 + 0.5 * 3) / 0.75 and 5.
    loss = np.array([7 / 3, 5, *[(7 / 3 + 5) / 2] * 5])
    z = (loss - loss.mean()) / loss.std()
    q = np.exp(0.5 * z) / np.exp(0.5 * z).sum()
    np.testing.assert_allclose(sampler.probabilities(0), 0.5 / 7 + 0.5 * q)


def test_curriculum():
    distortion = [1.0, 0.8, 0.9, 0.4, 0.5, 0.3, 0.0]
    sampler = adaptive.Curriculum(distortion, UNIFORM, epochs=4, strength=2.0)
    spans = [np.ptp(sampler.probabilities(epoch)) for epoch in range(5)]
    assert spans == sorted(spans, reverse=True)
    assert sampler.probabilities(0).argmax() == 6
    np.testing.assert_allclose(sampler.probabilities(4), UNIFORM)
    np.testing.assert_allclose(sampler.probabilities(9), UNIFORM)


def test_online_measures_when_it_is_time():
    calls = []

    def measure() -> np.ndarray:
        calls.append(len(calls))
        return np.roll(SCORED, len(calls))

    sampler = adaptive.Online(SCORED, measure, every=2)
    p = [sampler.probabilities(epoch) for epoch in (0, 0, 1, 2, 2, 3)]
    assert len(calls) == 1
    np.testing.assert_array_equal(p[2], SCORED)
    np.testing.assert_array_equal(p[3], np.roll(SCORED, 1))
    again = adaptive.Online(SCORED, measure, every=2)
    again.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    np.testing.assert_array_equal(again.probabilities(3), p[5])
    assert len(calls) == 1
    again.probabilities(4)
    assert len(calls) == 2


def test_failure_rates_from_text():
    assert distributions.read_failure_rates("", THREE) is None
    expected = distributions.deployment_prior(THREE, [0.2, 0.0, 0.5])
    found = distributions.read_failure_rates("SWIR:0.5, RGB:0.2", THREE)
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("name", ["loss", "group_dro", "exp3s"])
def test_adapting_samplers_start_at_the_prior_and_never_leave_it(name):
    """A scenario that deployment never has is never drawn, whatever the losses."""
    prior = np.array([0.0, 0.4, 0.0, 0.1, 0.2, 0.0, 0.3])
    sampler, random = adapting(name, prior), np.random.default_rng(4)
    np.testing.assert_allclose(sampler.probabilities(0), prior)
    for _ in range(100):
        k = random.choice(7, size=8, p=sampler.probabilities(0))
        sampler.observe(k, 0.2 * k + random.random(8))
        p = sampler.probabilities(0)
        assert p.sum() == pytest.approx(1)
        np.testing.assert_array_equal(np.sign(p), np.sign(prior))


def test_a_fixed_sampler_takes_its_own_state_alone():
    sampler = FixedSampler([0.5, 0.5])
    for same in ([0.5, 0.5], np.array([0.5, 0.5])):
        sampler.load_state_dict({"probabilities": same})
    for other in ({"probabilities": np.array([0.4, 0.6])}, {"probabilities": "half"}, {}):
        with pytest.raises(InputError, match="expected the same scenario probabilities"):
            sampler.load_state_dict(other)
