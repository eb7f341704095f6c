"""One run in two processes: the same numbers as in one, and what is refused."""

import io
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from checkout import printed
from score_committed import committed_network
from study.data.patches import PatchDataset
from study.provenance.devices import choose_device, in_processes, make_deterministic
from test_training import SETTINGS, run, small

from lsgs_core import InputError, ScenarioSet, score_scenarios


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one and two processes gave under the paper's loss and under ours, by "1 paper" etc."""
    out = tmp_path_factory.mktemp("found")
    variables = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    variables["PYTHONPATH"] = os.pathsep.join(sys.path)
    printed(sys.executable, Path(__file__).with_name("two_processes.py"), out, **variables)
    cases = torch.load(out / "found.pt", weights_only=True)
    return {name: result | {"history": pd.read_csv(io.StringIO(result["history"]))}
            for name, result in cases.items()}  # fmt: skip


def drawn(history: pd.DataFrame) -> pd.DataFrame:
    return history.filter(like="drawn:")


def test_two_processes_train_as_one(found):
    """Each takes half of every batch, under a loss that is a mean over pixels."""
    one, two = found["1 paper"], found["2 paper"]
    np.testing.assert_allclose(two["history"]["loss"], one["history"]["loss"], rtol=1e-9)
    assert drawn(two["history"]).equals(drawn(one["history"]))
    assert one["weights"].keys() == two["weights"].keys()
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-6, atol=1e-8, msg=name)
    torch.testing.assert_close(two["average"], one["average"])
    assert two["count"] == one["count"]  # the sampler of every process saw every loss


def test_two_processes_score_and_evaluate_as_one(found):
    one, two = found["1 paper"], found["2 paper"]
    torch.testing.assert_close(two["D"], one["D"], rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(two["shift"], one["shift"], rtol=1e-5, atol=1e-9)
    assert two["ids"] == one["ids"] == list(range(6))
    assert two["records"] == one["records"]


def test_a_pooled_loss_is_another_computation_in_two_processes(found):
    """The soft Jaccard loss of each share and part of a step is averaged; draws are the same."""
    alone, shared = (found[f"{count} strict"]["history"] for count in (1, 2))
    assert drawn(shared).equals(drawn(alone))
    np.testing.assert_allclose(shared["loss"], alone["loss"], rtol=0.05)
    assert (shared["loss"] != alone["loss"]).all()
    assert shared["loss"].iloc[1] < shared["loss"].iloc[0]


def test_bfloat16_trains_on_a_gpu_alone(tmp_path):
    """And weights stay float32."""
    settings = replace(SETTINGS, precision="bfloat16")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="precision: expected 'float32' on a CPU"):
            run(tmp_path, settings=settings)
        return
    model, history = run(tmp_path, small("cbc_slp").cuda(), settings)
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]
    assert {value.dtype for value in model.parameters()} == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_scores_as_another_processor(prepared, dataset):
    make_deterministic(threads=1)
    patches = PatchDataset(prepared, dataset, "land_cover", 0, "training", limit=8)
    model, scenarios = committed_network("cmx"), ScenarioSet.of(patches.modalities)
    one, two = (score_scenarios(model.to(choose_device(device)), patches.batches(8), scenarios)
                for device in ("cpu", "cuda"))  # fmt: skip
    np.testing.assert_allclose(two.distortion, one.distortion, rtol=1e-4)


def test_too_many_processes(tmp_path, monkeypatch):
    monkeypatch.setattr("study.training.loop.Processes", lambda *_: SimpleNamespace(count=3))
    with pytest.raises(InputError, match="a batch of 2 for 3 processes"):
        run(tmp_path)
    with pytest.raises(InputError, match="processes"):
        in_processes(print, (), 0)


def test_devices():
    torch.backends.cudnn.allow_tf32 = True
    make_deterministic(threads=1)
    assert not torch.backends.cudnn.allow_tf32
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(InputError, match="device"):
        choose_device("abacus")
