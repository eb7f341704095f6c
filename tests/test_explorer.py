"""The explorers of notebooks 03 and 05 show what the study computes, at every setting."""

from dataclasses import replace

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.text import Text
from study.comparison.predictions import (
    NOTHING,
    UNKNOWN,
    load_predictions,
    predict_patches,
    richest_patches,
    save_predictions,
    shown_patches,
)
from study.data.patches import PatchDataset
from study.figures import explorer
from study.figures.explorer import (
    prediction_explorer,
    probability_view,
    show_predictions,
    show_probabilities,
)
from study.provenance.artifacts import Record
from study.stages.tiers import StudyFolder
from test_scoring import published  # noqa: F401 - a fixture
from torchmetrics.functional.classification import multiclass_jaccard_index

from lsgs_core import InputError, ScenarioSet, build_backbone, scenario_probabilities
from lsgs_core.distributions import deployment_prior
from lsgs_core.methods import Evidence

SCENARIOS = ScenarioSet.of(["A", "B", "C"])
DISTORTION = np.array([1.0, 0.8, 0.9, 0.4, 0.5, 0.3, 0.0])


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def drawn_probabilities(figure) -> np.ndarray:
    return np.array([bar.get_width() for bar in figure.axes[2].patches])


def test_settings_beyond_the_usual_are_shown_as_they_are():
    settings = {"inverse_temperature": 9.0, "ridge": 1e3, "lengthscale": 400.0}
    view = probability_view(Evidence(SCENARIOS, np.full(7, 1 / 7), DISTORTION, settings=settings))
    shown = {name: view.controls[name].value for name in settings}
    assert shown == pytest.approx(settings | {"lengthscale": 1000})  # of the median distance, 0.4


def test_the_first_view_is_the_scoring():
    settings = {"inverse_temperature": 0.7, "mixing": 0.3, "ridge": 0.05, "lengthscale": 0.2}
    prior = deployment_prior(SCENARIOS, [0.1, 0.5, 0.8])
    p = scenario_probabilities(DISTORTION, prior=prior, **settings).probabilities
    view = probability_view(Evidence(SCENARIOS, p, DISTORTION, None, prior, settings))
    # Sliders have steps: 0.2 is not on the lengthscale's, 0.05 not on the ridge's.
    np.testing.assert_allclose(drawn_probabilities(view.draw(**view.values())), p, atol=2e-3)
    exact = view.values() | {"ridge": 0.05, "lengthscale": 0.2 / 0.4}
    np.testing.assert_allclose(drawn_probabilities(view.draw(**exact)), p, atol=1e-9)


@pytest.mark.parametrize(
    ("control", "value", "settings"),
    [
        ("inverse_temperature", 2.0, {"inverse_temperature": 2.0}),
        ("mixing", 1.0, {"mixing": 1.0}),
        ("ridge", 10.0, {"ridge": 10.0}),
        ("lengthscale", 2.0, {"lengthscale": 0.8}),  # of the median distance, 0.4
        ("direction", -1.0, {"direction": -1.0}),
        ("smooth", False, {"smooth": False}),
        ("fails:B", 0.0, {"prior": deployment_prior(SCENARIOS, [0.5, 0.0, 0.5])}),
    ],
)
def test_every_control_does_what_it_says(control, value, settings):
    view = probability_view(Evidence(SCENARIOS, np.full(7, 1 / 7), DISTORTION))
    base = {"lengthscale": 0.4} | settings  # a scoring that does not tell has the median
    wanted = scenario_probabilities(DISTORTION, **base).probabilities
    view.controls[control].value = value
    np.testing.assert_allclose(drawn_probabilities(view.draw(**view.values())), wanted, atol=1e-9)


def test_a_control_draws_the_figure_again_and_bad_input_says_so(capsys):
    view = probability_view(Evidence(SCENARIOS, np.full(7, 1 / 7), DISTORTION))
    view.panel()
    before = drawn_probabilities(plt.gcf())
    view.controls["inverse_temperature"].value = 4.0
    assert not np.allclose(drawn_probabilities(plt.gcf()), before)
    capsys.readouterr()
    for name in SCENARIOS.modalities:
        view.controls[f"fails:{name}"].value = 1.0
    assert "not all 1" in capsys.readouterr().out
    view.controls["fails:A"].value = 0.5
    assert "not all 1" not in capsys.readouterr().out


def test_a_static_version_shows_the_own_run_alone(published, tmp_path, monkeypatch, capsys):  # noqa: F811
    path, content, _ = published
    folder = StudyFolder(tmp_path).scores("demo", "cbc_slp", 0, 0)
    folder.mkdir(parents=True)
    path = path.rename(folder / path.name)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert show_probabilities([tmp_path / "absent.json", path], []) is None
    assert "shown: demo, CBC-SLP, fold 0" in capsys.readouterr().out
    np.testing.assert_allclose(drawn_probabilities(plt.gcf()), content["final_probs"], atol=2e-3)
    plt.close("all")
    assert show_probabilities([], [path]) is None
    assert "nothing to show" in capsys.readouterr().out
    assert not plt.get_fignums()
    monkeypatch.setenv("JPY_SESSION_NAME", "03_scenario_scoring.ipynb")
    assert isinstance(show_probabilities([], [path]), widgets.VBox)
    assert show_probabilities([tmp_path / "absent.json"], []) is None
    path.write_text("{}")
    with pytest.raises(InputError, match="scoring"):
        show_probabilities([path], [])


@pytest.fixture(scope="module")
def part(prepared, dataset):
    return PatchDataset(prepared, dataset, "land_cover", 0, "test")


@pytest.fixture(scope="module")
def stored(part):
    torch.manual_seed(0)
    indices = richest_patches(part, 3)
    model = build_backbone("cmx", "demo", part.bands, len(part.classes))
    maps = {"cmx/lsgs": predict_patches(model, part, indices)}
    return model, indices, replace(shown_patches(part, indices), maps=maps)


def test_predictions_are_those_of_the_network(part, stored):
    model, indices, predictions = stored
    assert predictions.maps["cmx/lsgs"].shape == (3, 7, part.size, part.size)
    for row, index in enumerate(indices):
        batch = part.batch([index])
        for number, mask in enumerate(predictions.scenarios.masks):
            with torch.inference_mode():
                probability = model(batch.images, torch.tensor(mask)[None])[0].sigmoid()
            best, wanted = (values.numpy() for values in probability.max(dim=0))
            found = predictions.maps["cmx/lsgs"][row, number]
            np.testing.assert_array_equal(found, np.where(best >= 0.5, wanted, NOTHING))
        known = batch.valid[0].numpy()
        np.testing.assert_array_equal(predictions.truth[row] == UNKNOWN, ~known)
        target = batch.target[0].numpy()
        wanted = np.where(target.any(axis=0), target.argmax(axis=0), NOTHING)
        np.testing.assert_array_equal(predictions.truth[row][known], wanted[known])


def test_stored_predictions_are_read_back(stored, tmp_path):
    _, _, predictions = stored
    path = save_predictions(tmp_path / "predictions_demo.npz", predictions, Record({}))
    again = load_predictions(path)
    np.testing.assert_equal(vars(again), vars(predictions))
    assert again.pixel_size == 10
    before = path.read_bytes()
    save_predictions(path, again, Record({}))
    assert path.read_bytes() == before
    np.savez(path, modalities=np.array([print, len], dtype=object))  # would run code
    for damaged in (before[:100], before[: len(before) // 2], b"", path.read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="predictions"):
            load_predictions(path)
    with pytest.raises(InputError, match="expected shapes"):
        replace(predictions, maps={"cmx/lsgs": predictions.truth})
    with pytest.raises(InputError, match="there are"):
        predictions.of("cmx", "uniform")


def test_modalities_are_switched_off(stored):
    _, _, predictions = stored
    view = prediction_explorer(predictions)
    titles = [axes.get_title() for axes in view.draw(**view.values()).axes]
    assert titles.count("from RGB+NIR+SWIR") == 2
    assert "NIR: B06, B08, B8A" in titles
    view.controls["has:NIR"].value = False
    figure = view.draw(**view.values())
    titles = [axes.get_title() for axes in figure.axes]
    assert {"NIR: missing", "from RGB+NIR+SWIR", "from RGB+SWIR"} <= {*titles}
    predicted = predictions.maps["cmx/lsgs"][0, predictions.scenarios.index([True, False, True])]
    compared = (predictions.truth[0] != UNKNOWN) & (predicted != UNKNOWN)
    pair = [torch.from_numpy(ids[compared]).long() for ids in (predicted, predictions.truth[0])]
    present = [c for c in torch.cat(pair).unique().tolist() if c != NOTHING]
    iou = multiclass_jaccard_index(*pair, num_classes=256, average="none")[present].mean()
    assert f"{(pair[0] == pair[1]).float().mean():.0%} right, IoU {iou:.2f}" in titles
    without = replace(predictions, pixel_size=np.nan)
    other = prediction_explorer(without).draw(**view.values())
    for drawn, bars in ((figure, 1), (other, 0)):
        assert [text.get_text() for text in drawn.findobj(Text)].count("100 m") == bars


def test_every_file_has_controls_of_its_own(stored, tmp_path, monkeypatch, capsys):
    _, _, predictions = stored
    paths = [tmp_path / f"predictions_{name}.npz" for name in "ab"]
    for path in paths:
        save_predictions(path, predictions, Record({}))
    panels: list[widgets.Widget] = []
    monkeypatch.setattr(explorer, "display", panels.append)
    monkeypatch.setenv("JPY_SESSION_NAME", "05_evaluation.ipynb")
    choice = show_predictions(paths[:1], paths[1:]).children[0]
    for box in check_boxes(panels[0]):
        box.value = False
    assert "at least one" in capsys.readouterr().out
    choice.value = choice.options[1]
    assert len(panels) == 2
    assert all(box.value for box in check_boxes(panels[1]))
    choice.value = choice.options[0]
    assert panels[2] is panels[0]  # with the settings that were made


def check_boxes(panel: widgets.Widget) -> list[widgets.Checkbox]:
    boxes = [widget for column in panel.children[0].children for widget in column.children]
    return [widget for widget in boxes if isinstance(widget, widgets.Checkbox)]
