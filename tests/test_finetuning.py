"""One run from start to records: resumed when it is done, anew when anything changed."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from study.data.manifest import Licence
from study.metrics.evaluation import scenario_scores
from study.provenance.artifacts import check
from study.stages import finetuning as module
from study.stages import run as run_module
from study.stages.finetuning import finetune
from study.stages.run import NetworkRun
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
    licence = Licence(covers="all", name="CC0", attribution="nobody")
    dataset = SimpleNamespace(title="Blobs", citation="", licences=[licence])

    def batches(self, batch_size, order=None):
        return super().batches(batch_size, np.arange(len(self)) if order is None else order)


class Opened(NetworkRun):
    """A run of a network that no notebook trained."""

    made_with = {"fold": 0}

    def pretrained(self):
        model = small("cmx")
        model.load_state_dict(WEIGHTS)
        return model


PARAMETERS = {
    "epochs": 2, "batch_size": 4, "seed": 0, "lora_learning_rate": 1e-2, "lora_rank": 2,
    "keep_weights": True, "training_patches": 0, "evaluation_patches": 0, "tested_on": "test",
    "processes": 1, "threads": 1, "device": "cpu",
}  # fmt: skip
PATCHES = Patches(10), Patches(4), Patches(6)


def opened(**parameters):
    return Opened("finetuning", PARAMETERS | parameters, None, *PATCHES)


ONE_STEP = {"epochs": 1, "batch_size": 10}


@pytest.fixture
def given():
    rng = np.random.default_rng(0)
    distortion = np.array([1.0, 0.8, 0.9, 0.4, 0.5, 0.3, 0.0])
    settings = {"inverse_temperature": 0.5, "mixing": 0.5, "ridge": 1e-3, "lengthscale": 1.0}
    p, shift = np.full(7, 1 / 7), rng.normal(size=(7, 4))
    evidence = Evidence(SCENARIOS, p, distortion, shift, None, settings)
    return replace(evidence, prediction_distortion=distortion**2), {"weights": "0"}


def test_every_method_runs(given, tmp_path):
    """In a single step: what a method asks of the evidence is there, and records are whole."""
    start = opened(**ONE_STEP, keep_weights=False)
    for name in METHODS:
        run = finetune(start, *given, name, tmp_path / name)
        assert len(run.records) == 6 * 7
        assert run.probabilities.sum() == pytest.approx(1)
        assert not (tmp_path / name / "weights.safetensors").exists()
        assert not (tmp_path / name / "training_state.pt").exists()
    trained = finetune(start, *given, "lora", tmp_path / "lora").trained_parameters
    assert trained < sum(value.numel() for value in WEIGHTS.values())


def test_a_rate_multiplies_the_learning_rate(given, tmp_path):
    start = opened(epochs=1, learning_rate=2e-3, keep_weights=False)
    expected = {"uniform": 2e-3, "uniform@rate=3": 6e-3, "lora": 1e-2, "lora_lsgs@rate=0.5": 5e-3}
    for name, rate in expected.items():
        run = finetune(start, *given, name, tmp_path / name)
        assert run.history["learning_rate"].tolist() == [pytest.approx(rate)]


def test_online_measures_the_network_that_is_trained(given, tmp_path):
    asked = []
    first = module._scored_again(opened(), given[0], opened().pretrained())

    def measured(run, evidence, model):
        asked.append({k: v.clone() for k, v in model.state_dict().items()})
        return first

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_scored_again", measured)
        finetune(opened(), *given, "online", tmp_path)
    assert len(asked) == 1  # before the second of two epochs
    assert any(not torch.equal(asked[0][name], WEIGHTS[name]) for name in WEIGHTS)
    assert first.sum() == pytest.approx(1)


def test_a_finished_run_is_read(given, tmp_path, monkeypatch):
    def dates() -> dict:
        return {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    asked, (evidence, inputs) = ONE_STEP, given
    run, before = finetune(opened(**asked), evidence, inputs, "lsgs", tmp_path), dates()
    again = finetune(opened(**asked), evidence, inputs, "lsgs", tmp_path)
    assert dates() == before
    np.testing.assert_array_equal(run.records["tp"], again.records["tp"])
    for change, other in (
        ({"seed": 1}, {}),
        ({}, {"weights": "1"}),
        ({"evaluation_patches": 1}, {}),
        ({"learning_rate": 1e-4}, {}),
    ):
        asked, inputs, before = asked | change, inputs | other, dates()
        finetune(opened(**asked), evidence, inputs, "lsgs", tmp_path)
        assert dates() != before
    monkeypatch.setattr(run_module, "fingerprint", lambda stage: "other code")
    finetune(opened(**asked), evidence, inputs, "lsgs", tmp_path)
    assert check(tmp_path / "records.csv")["inputs"]["code"] == "other code"


def test_runs_of_all_methods_see_the_same_order(given, tmp_path):
    """Pairing: with equal probabilities, equal draws and equal weights in the end."""
    methods = "uniform", "lsgs", "uniform_again"  # the probabilities of all are uniform here
    uniform, same, other = (finetune(opened(), *given, m, tmp_path / m) for m in methods)
    np.testing.assert_array_equal(uniform.records["tp"], same.records["tp"])
    np.testing.assert_array_equal(uniform.history["loss"], same.history["loss"])
    assert (uniform.history["loss"] != other.history["loss"]).any()


def test_a_model_card_lies_beside_the_weights(given, tmp_path):
    run = finetune(opened(), *given, "full_only", tmp_path)
    text = (tmp_path / "model_card.md").read_text()
    for part in ("# network, full_only: Blobs", "CC0. nobody", "10 patches", '"weights": "0"'):
        assert part in text
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in SCENARIOS.names]
    assert [row.split(" | ")[1] for row in rows] == ["0.000"] * 6 + ["1.000"]
    scores = scenario_scores(run.records.assign(model=""), ["model"])
    assert [row.split(" | ")[2] for row in rows] == [f"{iou:.3f}" for iou in scores["iou"]]
