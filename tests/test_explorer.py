"""The views that notebooks 03 and 05 explore: the same as the study computes, at every setting."""

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scene
import torch
from study.artifacts import Record
from study.data.manifest import Manifest
from study.data.patches import PatchDataset, make_patches
from study.data.preparation import prepare
from study.figures import explorer
from study.figures.explorer import (
    patch_view,
    probability_view,
    show_predictions,
    show_probabilities,
)
from study.figures.predictions import (
    NOTHING,
    UNKNOWN,
    Predictions,
    load_predictions,
    predict_patches,
    richest_patches,
    save_predictions,
    shown_patches,
)
from test_scoring import published  # noqa: F401 - a fixture

from lsgs_core import (
    InputError,
    ScenarioSet,
    build_backbone,
    scenario_probabilities,
)
from lsgs_core.distributions import deployment_prior
from lsgs_core.methods import Evidence

SCENARIOS = ScenarioSet.of(["A", "B", "C"])
DISTORTION = np.array([1.0, 0.8, 0.9, 0.4, 0.5, 0.3, 0.0])


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def values(view: explorer.View) -> dict:
    return {name: control.value for name, control in view.controls.items()}


def drawn_probabilities(figure) -> np.ndarray:
    return np.array([bar.get_height() for bar in figure.axes[2].patches])


def test_settings_beyond_the_usual_are_shown_as_they_are():
    settings = {"inverse_temperature": 9.0, "ridge": 1e3, "lengthscale": 400.0}
    view = probability_view(Evidence(SCENARIOS, np.full(7, 1 / 7), DISTORTION, settings=settings))
    assert view.controls["inverse_temperature"].value == 9.0
    assert view.controls["ridge"].value == pytest.approx(1e3)
    assert view.controls["lengthscale"].value == pytest.approx(1000)  # of the median distance, 0.4


def test_the_first_view_is_the_scoring():
    settings = {"inverse_temperature": 0.7, "mixing": 0.3, "ridge": 0.05, "lengthscale": 0.2}
    prior = deployment_prior(SCENARIOS, [0.1, 0.5, 0.8])
    p = scenario_probabilities(DISTORTION, prior=prior, **settings).probabilities
    view = probability_view(Evidence(SCENARIOS, p, DISTORTION, None, prior, settings))
    # Sliders have steps: 0.2 is not on the lengthscale's, 0.05 not on the ridge's.
    np.testing.assert_allclose(drawn_probabilities(view.draw(**values(view))), p, atol=2e-3)
    exact = values(view) | {"ridge": 0.05, "lengthscale": 0.2 / 0.4}
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
    np.testing.assert_allclose(drawn_probabilities(view.draw(**values(view))), wanted, atol=1e-9)


def test_a_change_draws_anew_and_bad_input_says_so():
    view = probability_view(Evidence(SCENARIOS, np.full(7, 1 / 7), DISTORTION))
    shown = explorer.explore({"one": view}, live=True)
    found = {type(w): w for w in descendants(shown)}
    picture, message = found[widgets.Image], found[widgets.HTML]
    before = bytes(picture.value)
    assert before.startswith(b"\x89PNG")
    view.controls["inverse_temperature"].value = 4.0
    after = bytes(picture.value)
    assert after != before
    for name in SCENARIOS.modalities:
        view.controls[f"fails:{name}"].value = 1.0
    assert "not all 1" in message.value
    view.controls["fails:A"].value = 0.5
    assert message.value == ""
    assert bytes(picture.value) not in (before, after)
    assert not plt.get_fignums()


def test_stands_still_where_nobody_looks_on(published, tmp_path, monkeypatch, capsys):  # noqa: F811
    path, content, _ = published
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert show_probabilities([tmp_path / "absent.json", path], []) is None
    assert "probabilities.json" in capsys.readouterr().out
    np.testing.assert_allclose(drawn_probabilities(plt.gcf()), content["final_probs"], atol=2e-3)
    plt.close("all")
    assert show_probabilities([], [path]) is None  # others' results are not this run's
    assert "nothing to show" in capsys.readouterr().out
    assert not plt.get_fignums()
    monkeypatch.setenv("JPY_SESSION_NAME", "03_scenario_scoring.ipynb")
    assert isinstance(show_probabilities([], [path]), widgets.VBox)
    assert show_probabilities([tmp_path / "absent.json"], []) is None
    path.write_text("{}")
    with pytest.raises(InputError, match="scoring"):
        show_probabilities([path], [])


def descendants(widget: widgets.Widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from descendants(child)


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explorer")
    raw = scene.write_scene(folder / "raw")
    content = scene.manifest_content(raw, scene.write_wheel(raw, folder / "wheel"))
    dataset = Manifest.model_validate(content).dataset("demo")
    prepare(dataset, raw, folder / "prepared")
    make_patches(dataset, folder / "prepared")
    return PatchDataset(folder / "prepared", dataset, "land_cover", 0, "test")


@pytest.fixture(scope="module")
def stored(part):
    torch.manual_seed(0)
    indices = richest_patches(part, 3)
    model = build_backbone("cmx", "demo", part.bands, len(part.classes))
    found = shown_patches(part, indices)
    maps = {"cmx/lsgs": predict_patches(model, part, indices)}
    return model, indices, Predictions(**{**vars(found), "maps": maps})


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
    assert again.classes == predictions.classes
    assert again.modalities == predictions.modalities
    np.testing.assert_array_equal(again.maps["cmx/lsgs"], predictions.maps["cmx/lsgs"])
    np.testing.assert_array_equal(again.pictures, predictions.pictures)
    before = path.read_bytes()
    save_predictions(path, again, Record({}))
    assert path.read_bytes() == before
    whole = before
    for damaged in (whole[:100], whole[: len(whole) // 2], b"", b"\x80\x04K\x01."):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="predictions"):
            load_predictions(path)


def test_objects_that_would_run_code_are_not_read(stored, tmp_path):
    path = tmp_path / "predictions_demo.npz"
    np.savez(path, modalities=np.array([print, len], dtype=object))
    with pytest.raises(InputError, match="predictions"):
        load_predictions(path)


def test_shapes_that_do_not_fit_are_refused(stored):
    _, _, predictions = stored
    with pytest.raises(InputError, match="expected shapes"):
        Predictions(**{**vars(predictions), "maps": {"cmx/lsgs": predictions.truth}})
    with pytest.raises(InputError, match="there are"):
        predictions.of("cmx", "uniform")


def test_sensors_are_switched_off(stored, tmp_path):
    _, _, predictions = stored
    view = patch_view(predictions)
    full = view.draw(**values(view))
    titles = [axes.get_title() for axes in full.axes]
    assert "prediction from RGB+NIR+SWIR" in titles
    view.controls["has:NIR"].value = False
    titles = [axes.get_title() for axes in view.draw(**values(view)).axes]
    assert {"NIR: missing", "prediction from RGB+SWIR"} <= set(titles)
    found = predictions.maps["cmx/lsgs"][0, predictions.scenarios.index([True, False, True])]
    known = (predictions.truth[0] != UNKNOWN) & (found != UNKNOWN)
    share = (found == predictions.truth[0])[known].mean()
    assert any(title.startswith(f"{share:.0%} right") for title in titles)
    paths = [tmp_path / f"predictions_{name}.npz" for name in "ab"]
    for path in paths:
        save_predictions(path, predictions, Record({}))
    shown = show_predictions(paths[:1], paths[1:], live=True)
    boxes = [w for w in descendants(shown) if isinstance(w, widgets.Checkbox)]
    message = next(w for w in descendants(shown) if isinstance(w, widgets.HTML))
    for box in boxes:
        box.value = False
    assert "at least one" in message.value
    choice = shown.children[0]
    choice.value = choice.options[1]  # the other file, with controls of its own
    assert all(w.value for w in descendants(shown) if isinstance(w, widgets.Checkbox))
