"""One run from start to records: resumed when it is done, anew when anything changed."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from study import finetuning as module
from study.artifacts import check
from study.data.manifest import Licence
from study.evaluation import scenario_scores
from study.finetuning import Start, finetune
from study.settings import TrainingSettings
from test_training import Blobs, small

from lsgs_core import ScenarioSet
from lsgs_core.methods import METHODS, Evidence

SCENARIOS = ScenarioSet.of(["A", "B", "C"])
WEIGHTS = small("cmx").state_dict()


class Patches(Blobs):
    """Blobs with what evaluation asks of a data set."""

    classes = ("bright",)
    size = 16
    modalities = SCENARIOS.modalities
    dataset = SimpleNamespace(
        title="Blobs",
        citation="",
        licences=[Licence(covers="all", name="CC0", attribution="nobody")],
    )

    def batches(self, batch_size, order=None):
        return super().batches(batch_size, np.arange(len(self)) if order is None else order)


def build():
    model = small("cmx")
    model.load_state_dict(WEIGHTS)
    return model


@pytest.fixture
def start():
    rng = np.random.default_rng(0)
    distortion = np.array([1.0, 0.8, 0.9, 0.4, 0.5, 0.3, 0.0])
    settings = {"inverse_temperature": 0.5, "mixing": 0.5, "ridge": 1e-3, "lengthscale": 1.0}
    p, shift = np.full(7, 1 / 7), rng.normal(size=(7, 4))
    evidence = Evidence(SCENARIOS, p, distortion, shift, None, settings)
    return Start(
        build=build,
        evidence=replace(evidence, prediction_distortion=distortion**2),
        training=Patches(10),
        validation=Patches(4),
        test=Patches(6),
        settings=TrainingSettings(epochs=2, batch_size=4),
        seed=0,
        lora_learning_rate=1e-2,
        lora_rank=2,
        parameters={"fold": 0},
        inputs={"weights": "0"},
    )


def test_every_method_runs(start, tmp_path):
    """In a single step: what a method asks of the evidence is there, and records are whole."""
    start = replace(start, settings=TrainingSettings(epochs=1, batch_size=10))
    for name in METHODS:
        run = finetune(start, name, tmp_path / name, keep_weights=False)
        assert len(run.records) == 6 * 7
        assert run.probabilities.sum() == pytest.approx(1)
        assert not (tmp_path / name / "weights.safetensors").exists()
        assert not (tmp_path / name / "training_state.pt").exists()
    assert finetune(start, "lora", tmp_path / "lora", False).trained_parameters < sum(
        value.numel() for value in WEIGHTS.values()
    )


def test_a_rate_multiplies_the_learning_rate(start, tmp_path):
    start = replace(start, settings=replace(start.settings, epochs=1, learning_rate=2e-3))
    expected = {"uniform": 2e-3, "uniform@rate=3": 6e-3, "lora@rate=0.5": 5e-3}
    for name, rate in expected.items():
        run = finetune(start, name, tmp_path / name, keep_weights=False)
        assert run.history["learning_rate"].tolist() == [pytest.approx(rate)]


def test_online_measures_the_network_that_is_trained(start, tmp_path):
    asked = []
    first = module._scored_again(start, build())

    def measured(given, model):
        asked.append({k: v.clone() for k, v in model.state_dict().items()})
        return first

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_scored_again", measured)
        finetune(start, "online", tmp_path)
    assert len(asked) == 1  # before the second of two epochs
    assert any(not torch.equal(asked[0][name], WEIGHTS[name]) for name in WEIGHTS)
    assert first.sum() == pytest.approx(1)


def test_a_finished_run_is_read(start, tmp_path, monkeypatch):
    def dates() -> dict:
        return {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    start = replace(start, settings=TrainingSettings(epochs=1, batch_size=10))
    run, before = finetune(start, "lsgs", tmp_path), dates()
    again = finetune(start, "lsgs", tmp_path)
    assert dates() == before
    np.testing.assert_array_equal(run.records["tp"], again.records["tp"])
    for change in (
        {"seed": 1},
        {"inputs": {"weights": "1"}},
        {"parameters": {"fold": 1}},
        {"settings": replace(start.settings, learning_rate=1e-4)},
    ):
        start, before = replace(start, **change), dates()
        finetune(start, "lsgs", tmp_path)
        assert dates() != before
    monkeypatch.setattr(module, "fingerprint", lambda stage: "other code")
    finetune(start, "lsgs", tmp_path)
    assert check(tmp_path / "records.csv")["inputs"]["code"] == "other code"


def test_runs_of_all_methods_see_the_same_order(start, tmp_path):
    """Pairing: with equal probabilities, equal draws and equal weights in the end."""
    uniform = finetune(start, "uniform", tmp_path / "a")
    same = finetune(start, "lsgs", tmp_path / "b")  # whose probabilities are uniform here
    other = finetune(start, "uniform_again", tmp_path / "c")
    np.testing.assert_array_equal(uniform.records["tp"], same.records["tp"])
    np.testing.assert_array_equal(uniform.history["loss"], same.history["loss"])
    assert (uniform.history["loss"] != other.history["loss"]).any()


def test_a_model_card_lies_beside_the_weights(start, tmp_path):
    run = finetune(start, "full_only", tmp_path)
    text = (tmp_path / "model_card.md").read_text()
    for part in ("# network, full_only: Blobs", "CC0. nobody", "10 patches", '"weights": "0"'):
        assert part in text
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in SCENARIOS.names]
    assert [row.split(" | ")[1] for row in rows] == ["0.000"] * 6 + ["1.000"]
    scores = scenario_scores(run.records.assign(model=""), ["model"])
    assert [row.split(" | ")[2] for row in rows] == [f"{iou:.3f}" for iou in scores["iou"]]
