"""The table of methods: what each of them draws from."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from study.figures import FAMILY_COLOURS
from study.figures.study import method_curves

from lsgs_core import Evidence, InputError, ScenarioSet, find_method
from lsgs_core.methods import FAMILIES, METHODS, method
from lsgs_core.probabilities import scenario_probabilities
from lsgs_core.sampling import draw_scenarios

THREE = ScenarioSet.of(["RGB", "NIR", "SWIR"])
DISTORTION = np.array([1.0, 0.8, 0.9, 0.4, 0.5, 0.3, 0.0])
SETTINGS = {"direction": 1.0, "lengthscale": 1.0, "ridge": 1e-3}
SETTINGS |= {"inverse_temperature": 0.5, "mixing": 0.5}
SHIFT = np.random.default_rng(0).normal(size=(7, 5)) * DISTORTION[:, None]
SCORED = scenario_probabilities(DISTORTION, **SETTINGS).probabilities
EVIDENCE = Evidence(
    THREE, SCORED, DISTORTION, SHIFT, None, SETTINGS, seed=3, epochs=4, steps=50,
    measure=lambda: np.eye(7)[0], prediction_distortion=DISTORTION**2,
)  # fmt: skip


def p(name: str, evidence: Evidence = EVIDENCE, epoch: int = 0) -> np.ndarray:
    return find_method(name).sampler(evidence).probabilities(epoch)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_a_distribution_and_says_what_it_is(name):
    found = p(name)
    assert found.shape == (7,)
    assert found.min() >= 0
    assert found.sum() == pytest.approx(1)
    assert METHODS[name].title
    assert METHODS[name].about.endswith(".")
    sampler = find_method(name).sampler(EVIDENCE)
    sampler.observe(np.array([0, 6]), np.array([0.5, 0.2]))
    other = find_method(name).sampler(EVIDENCE)
    other.load_state_dict(sampler.state_dict())
    np.testing.assert_array_equal(other.probabilities(1), sampler.probabilities(1))


def test_what_is_drawn_from():
    np.testing.assert_allclose(p("uniform"), 1 / 7)
    np.testing.assert_allclose(p("uniform_again"), 1 / 7)
    np.testing.assert_allclose(p("lsgs"), SCORED)
    np.testing.assert_allclose(p("full_only"), np.eye(7)[6], atol=1e-15)
    servable = np.array([[True] * 7, [True, True, False, True, False, False, False]])
    drawn = draw_scenarios(p("full_only"), 0, 0, [0, 1], servable)
    assert drawn.tolist() == [6, 3]  # all three; the two that the second sample has
    unsmoothed = scenario_probabilities(DISTORTION, **SETTINGS, smooth=False).probabilities
    np.testing.assert_allclose(p("lsgs_unsmoothed"), unsmoothed)
    # high distortion is drawn most, and least the other way round
    for most, least in (("lsgs", "inverse"), ("lsgs_strong", "inverse_strong")):
        assert p(most).argmax() == p(least).argmin() == DISTORTION.argmax()
        assert p(most).argmin() == p(least).argmax() == THREE.full
    assert np.ptp(p("lsgs_strong")) > 2 * np.ptp(p("lsgs"))
    np.testing.assert_allclose(p("cardinality") @ THREE.missing, SCORED @ THREE.missing)
    groups = THREE.missing
    for strength in ("", "@mixing=1@inverse_temperature=1"):
        predicted, permuted = p(f"lsgs_prediction{strength}"), p(f"permuted_prediction{strength}")
        counted = p(f"cardinality_prediction{strength}")
        np.testing.assert_allclose(counted @ groups, predicted @ groups)
        for missing in range(3):  # the same probabilities, of other scenarios
            own, exchanged = (np.sort(v[groups == missing]) for v in (predicted, permuted))
            np.testing.assert_array_equal(own, exchanged)
    assert p("coverage").min() >= 0.5 / 7 - 1e-9  # mixed with uniform
    assert p("bernoulli").argmax() == THREE.full
    assert p("curriculum").argmax() == THREE.full
    np.testing.assert_allclose(p("curriculum", epoch=4), 1 / 7)
    np.testing.assert_allclose(p("online", epoch=0), SCORED)
    np.testing.assert_allclose(p("online", epoch=1), np.eye(7)[0])


def test_methods_that_draw_depend_on_the_seed_alone():
    for name in ("permuted", "permuted_within", "permuted_prediction", "dirichlet"):
        np.testing.assert_array_equal(p(name), p(name))
        drawn = {tuple(p(name, replace(EVIDENCE, seed=seed))) for seed in range(6)}
        assert len(drawn) > 3


def test_a_prior_replaces_uniform_where_a_method_mixes():
    prior = np.array([0.3, 0.0, 0.1, 0.2, 0.1, 0.0, 0.3])
    evidence = replace(EVIDENCE, prior=prior)
    np.testing.assert_allclose(p("deployment", evidence), prior)
    for name in ("lsgs_unsmoothed", "lsgs_strong", "inverse", "loss_proportional"):
        assert p(name, evidence)[[1, 5]].max() == 0  # never drawn


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        *(("lsgs_strong", "distortion"), ("lsgs_latent_shift", "distortion")),
        *(("coverage", "latent_shift"), ("curriculum", "distortion"), ("curriculum", "epochs")),
        *(("group_dro", "steps"), ("kernel_group_dro", "steps")),
    ],
)
def test_what_a_method_needs_is_said(name, needed):
    known = {} if needed == "distortion" else {"distortion": DISTORTION}
    with pytest.raises(InputError, match=f"evidence.{needed}: .* which this method needs"):
        p(name, Evidence(THREE, SCORED, **known))


def test_a_method_says_what_it_is():
    with pytest.raises(InputError, match="p: expected a docstring"):
        method("silent", "control")(p)
    assert "p" not in METHODS
    assert len({method.title for method in METHODS.values()}) == len(METHODS)
    assert set(FAMILIES) == set(FAMILY_COLOURS)


def test_a_figure_tells_settings_apart_and_draws_them_alike_in_all_panels():
    methods = ["lora@rate=3", "lora", "lora@rate=2"]
    methods += ["smoothed_loss@mixing=1", "smoothed_loss", "kernel_group_dro"]
    rows = [("d", "cbc", method) for method in methods] + [("d", "cmx", m) for m in methods[::-1]]
    table = pd.DataFrame(rows, columns=["dataset", "backbone", "method"])
    figure = method_curves(table.assign(epoch=0, validation_mean_iou=0.5))
    looks = [
        {line.get_label(): (line.get_color(), line.get_marker()) for line in panel.lines}
        for panel in figure.axes
    ]
    assert looks[0] == looks[1]
    assert len({*looks[0].values()}) == len(methods)
    plt.close(figure)
