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
from study.devices import choose_device, in_processes
from test_training import SETTINGS, run, small

from lsgs_core import InputError

SCRIPT = Path(__file__).with_name("two_processes.py")


def launch(out: Path, processes: int = 1, accumulation: int = 1, protocol: str = "paper") -> dict:
    """Train in one process, or in two; under the paper's loss, score and evaluate too.

    In an interpreter of its own: a fork hangs where a backward pass ran with two threads before.
    """
    out.mkdir()
    variables = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    variables["PYTHONPATH"] = os.pathsep.join(sys.path)
    printed(sys.executable, SCRIPT, out, processes, accumulation, protocol, **variables)
    result = torch.load(out / "result.pt", weights_only=True)
    return result | {"history": pd.read_csv(io.StringIO(result["history"]))}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("one") / "run")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("two") / "run", processes=2)


def drawn(history: pd.DataFrame) -> pd.DataFrame:
    return history.filter(like="drawn:")


def test_two_processes_train_as_one(one, two):
    """Each takes half of every batch, under a loss that is a mean over pixels."""
    np.testing.assert_allclose(two["history"]["loss"], one["history"]["loss"], rtol=1e-9)
    assert drawn(two["history"]).equals(drawn(one["history"]))
    assert one["weights"].keys() == two["weights"].keys()
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-6, atol=1e-8, msg=name)
    torch.testing.assert_close(two["average"], one["average"])
    assert two["count"] == one["count"]  # the sampler of every process saw every loss


def test_two_processes_score_and_evaluate_as_one(one, two):
    torch.testing.assert_close(two["D"], one["D"], rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(two["shift"], one["shift"], rtol=1e-5, atol=1e-9)
    assert two["ids"] == one["ids"] == list(range(6))
    assert two["records"] == one["records"]


def test_a_pooled_loss_is_another_computation_in_two_processes(tmp_path):
    """The soft Jaccard loss of each share and part of a step is averaged; draws are the same."""
    alone = launch(tmp_path / "one", protocol="strict")["history"]
    shared = launch(tmp_path / "two", 2, accumulation=2, protocol="strict")["history"]
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


def test_accumulation_needs_no_other_draws(tmp_path):
    """A step in parts is near the whole step: the loss is the mean of the parts' losses."""
    settings = replace(SETTINGS, epochs=1, learning_rate=1e-6)
    _, whole = run(tmp_path / "a", small("cbc_slp"), settings)
    _, parts = run(tmp_path / "b", small("cbc_slp"), replace(settings, accumulation=2))
    assert drawn(whole).equals(drawn(parts))
    assert parts["loss"].item() == pytest.approx(whole["loss"].item(), rel=0.05)
    assert parts["loss"].item() != whole["loss"].item()


def test_too_many_processes(tmp_path, monkeypatch):
    monkeypatch.setattr("study.training.Processes", lambda *_: SimpleNamespace(count=3))
    with pytest.raises(InputError, match="a batch of 2 for 3 processes"):
        run(tmp_path)
    with pytest.raises(InputError, match="processes"):
        in_processes(print, (), 0)


def test_devices():
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(InputError, match="device"):
        choose_device("abacus")
