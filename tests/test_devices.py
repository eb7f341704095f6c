"""One run in two processes: the same numbers as in one, and what is refused."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from study.devices import Processes, choose_device, make_deterministic, processes_of
from study.training import _check_shares
from test_training import SETTINGS, run, small

from lsgs_core import InputError

SCRIPT = Path(__file__).with_name("two_processes.py")
# Standalone: a free port of its own, where a fixed one may be taken.
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def launch(
    out: Path, processes: int = 1, accumulation: int = 1, precision: str = "float32"
) -> Path:
    """Train, score and evaluate in one process, or in two."""
    out.mkdir()
    start = TWO if processes == 2 else []
    subprocess.run(
        [sys.executable, *start, SCRIPT, out, str(accumulation), precision],
        check=True,
        capture_output=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        cwd=SCRIPT.parent,
    )
    return out


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("one") / "run")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("two") / "run", processes=2)


def load(folder: Path, name: str):
    return torch.load(folder / name, weights_only=True)


def test_two_processes_train_as_one(one, two):
    """Each takes half of every batch; loss, draws, weights and statistics are those of one."""
    alone, shared = (pd.read_csv(folder / "history.csv") for folder in (one, two))
    np.testing.assert_allclose(shared["loss"], alone["loss"], rtol=1e-9)
    drawn = [name for name in alone if name.startswith("drawn:")]
    assert shared[drawn].equals(alone[drawn])
    first, second = load(one, "weights.pt"), load(two, "weights.pt")
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-6, atol=1e-8, msg=name)
    learnt, other = load(one, "sampler.pt"), load(two, "sampler.pt")
    np.testing.assert_allclose(other["average"], learnt["average"])
    assert other["count"] == learnt["count"]  # every loss was seen by the sampler of every process


def test_two_processes_score_and_evaluate_as_one(one, two):
    first, second = load(one, "scores.pt"), load(two, "scores.pt")
    torch.testing.assert_close(second["D"], first["D"], rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(second["shift"], first["shift"], rtol=1e-5, atol=1e-9)
    assert second["ids"].tolist() == first["ids"].tolist() == list(range(10))
    assert (one / "records.csv").read_text() == (two / "records.csv").read_text()


def test_accumulation_in_two_processes_runs(tmp_path):
    history = pd.read_csv(launch(tmp_path / "run", processes=2, accumulation=2) / "history.csv")
    np.testing.assert_allclose(history.filter(like="drawn:").sum(axis=1), 1)
    assert history["loss"].iloc[1] < history["loss"].iloc[0]


@pytest.mark.parametrize("processes", [1, 2])
def test_bfloat16_trains(tmp_path, processes):
    """And evaluates in float32, in one process or two."""
    folder = launch(tmp_path / "run", processes=processes, precision="bfloat16")
    history = pd.read_csv(folder / "history.csv")
    assert history["loss"].iloc[1] < history["loss"].iloc[0]
    assert load(folder, "weights.pt")["decoder.head.bias"].dtype == torch.float32


def test_accumulation_needs_no_other_draws(tmp_path):
    """A step in parts is near the whole step: the loss is the mean of the parts' losses."""
    settings = replace(SETTINGS, epochs=1, learning_rate=1e-6)
    _, whole = run(tmp_path / "a", small("cbc_slp"), settings)
    _, parts = run(tmp_path / "b", small("cbc_slp"), replace(settings, accumulation=2))
    drawn = whole.filter(like="drawn:")
    assert drawn.equals(parts.filter(like="drawn:"))
    assert parts["loss"].item() == pytest.approx(whole["loss"].item(), rel=0.05)
    assert parts["loss"].item() != whole["loss"].item()


def test_too_many_processes():
    _check_shares(10, SETTINGS, 2)
    with pytest.raises(InputError, match="a batch of 2 for 3 processes"):
        _check_shares(10, SETTINGS, 3)
    with pytest.raises(InputError, match="accumulation"):
        replace(SETTINGS, accumulation=0)
    with pytest.raises(InputError, match="precision"):
        processes_of(torch.device("cpu"), "float16")


def test_one_process_needs_nothing():
    alone = processes_of(torch.device("cpu"))
    assert type(alone) is Processes
    assert alone.mine(np.arange(3)).tolist() == [0, 1, 2]
    assert alone.gather("a") == ["a"]
    value = torch.ones(2, requires_grad=True)
    assert alone.total(value) is value


def test_devices_and_threads():
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(InputError, match="device"):
        choose_device("abacus")
    with pytest.raises(InputError, match="threads"):
        make_deterministic(0)
