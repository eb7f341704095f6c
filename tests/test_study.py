"""The launcher: what it clears up, what it refuses, and a study that is killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pandas as pd
import psutil
import pytest
import yaml
from checkout import copy_checkout, environment, printed
from study.artifacts import Record, save_table
from study.commands import MARK, _only_one, end_orphans, main, publish
from study.files import file_sha256
from study.tiers import load_tier

from lsgs_core import InputError

ROOT = Path(__file__).parent.parent


def test_orphans_are_ended_and_others_are_not(tmp_path):
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    ours = subprocess.Popen(sleep, env={**os.environ, MARK: str(tmp_path)})
    others = subprocess.Popen(sleep, env={**os.environ, MARK: str(tmp_path / "other")})
    try:
        time.sleep(0.3)  # until the environment of the new process can be read
        assert end_orphans(tmp_path) == 1
        assert ours.poll() is not None
        assert others.poll() is None
        assert end_orphans(tmp_path) == 0
    finally:
        ours.kill(), others.kill()


def test_one_study_per_folder(tmp_path):
    with _only_one(tmp_path), pytest.raises(InputError, match="already"), _only_one(tmp_path):
        pass
    with _only_one(tmp_path):  # given up when the first one ended
        pass


@pytest.mark.parametrize("arguments", [["run", "dmeo"], ["publish", "nothing"]])
def test_unknown_tier_fails_before_anything_runs(arguments, capsys):
    assert main(arguments) == 2
    assert "expected one of" in capsys.readouterr().err


def test_publishing_replaces_what_was_there(tmp_path, monkeypatch):
    monkeypatch.setattr("study.commands.ROOT", tmp_path)
    tier = load_tier("smoke", ROOT)
    folder = tmp_path / tier.folder.evaluation
    figures = {"mean_iou": [0.4321], "worst_iou": [0.3], "full_iou": [0.5]}
    summary = {"dataset": ["demo"], "backbone": ["cmx"], "method": ["lsgs"], "seed": [0]}
    summary |= figures | {"worst_scenario": ["NIR"]}
    save_table(folder / "summary.csv", pd.DataFrame(summary), Record({"fold": 0}))
    save_table(folder / "records.csv.xz", pd.DataFrame({"tp": [1]}), Record({"fold": 0}))
    (folder / "figure.png").write_bytes(b"png")
    (folder / "predictions_demo.npz").write_bytes(b"npz")
    with pytest.raises(InputError, match=r"evaluation/summary.csv"):
        publish(load_tier("starved", ROOT))
    for seed in (0, 1):
        parameters = {"dataset": "demo", "model": {"name": "cmx"}, "seed": seed}
        path = tmp_path / tier.folder.runs("demo", "cmx", 0, seed) / "lsgs" / "records.csv"
        save_table(path, pd.DataFrame({"tp": [1]}), Record(parameters))
    shutil.copyfile(ROOT / "data_manifest.yaml", tmp_path / "data_manifest.yaml")
    (folder / "weights.safetensors").write_bytes(b"large")
    stale = tmp_path / "results" / "smoke" / "old.csv"
    stale.parent.mkdir(parents=True)
    stale.write_text("old")
    names = {path.relative_to(tmp_path / "results" / "smoke").as_posix() for path in publish(tier)}
    expected = {"summary.csv", "records.csv.xz", "figure.png", "predictions_demo.npz"}
    own = {"provenance.json", "NOTICE.txt", "README.md"}
    assert names == {f"evaluation/{name}" for name in expected} | own
    notice = (tmp_path / "results" / "smoke" / "NOTICE.txt").read_text()
    assert "ODbL" in notice
    assert "© OpenStreetMap contributors" in notice
    page = (tmp_path / "results" / "smoke" / "README.md").read_text()
    assert "| demo | cmx | LSGS | 0.432 | 0.300 NIR | 0.500 |" in page
    assert not stale.exists()
    provenance = json.loads((tmp_path / "results" / "smoke" / "provenance.json").read_text())
    assert provenance["command"] == "make study TIER=smoke"
    assert provenance["evaluation"]["environment"]["date"]
    [runs] = provenance["runs"]
    assert (runs["dataset"], runs["backbone"], runs["runs"]) == ("demo", "cmx", 2)
    assert runs["from"] <= runs["to"]
    assert provenance["tier_sha256"] == tier.sha256


@pytest.fixture
def clone(tmp_path):
    return copy_checkout(tmp_path)


def command(tier: str = "smoke") -> list[str]:
    return [sys.executable, "-m", "study", "run", tier, "--cores", "2"]


def outputs(folder: Path) -> dict[str, str]:
    """Hash of every record, probability and weight of a study."""
    found = {}
    for pattern in ("**/records.csv", "**/probabilities.json", "**/weights.safetensors"):
        for path in (folder / "work" / "smoke").glob(pattern):
            found[path.relative_to(folder).as_posix()] = file_sha256(path)
    return found


@pytest.mark.slow
def test_twenty_kills_of_whatever_runs(clone, tmp_path_factory):
    """kill -9 of the launcher, of a papermill or of a kernel, at moments that chance decides."""
    tier = {
        "grid": {"backbones": ["cmx"], "methods": ["uniform", "lsgs"], "folds": [0], "seeds": 12},
        "02_pretraining_check": {"weights": "train"},
        "04_finetuning": {"epochs": 3},
        "05_evaluation": {"shown_patches": 0, "resamples": 20},
    }
    (clone / "notebooks" / "tiers" / "smoke.yaml").write_text(yaml.safe_dump(tier))
    whole = tmp_path_factory.mktemp("whole")
    shutil.copytree(clone, whole, dirs_exist_ok=True)
    printed(*command(), folder=whole)
    chance = random.Random()
    killed: Counter[str] = Counter()
    while killed.total() < 20:
        # Not through a pipe, which orphans would hold open.
        process = subprocess.Popen(
            command(), cwd=clone, env=environment(clone), stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        time.sleep(chance.uniform(5, 25))
        if process.poll() is not None:
            # Finished already: the rest of the kills hits a study that starts anew.
            shutil.rmtree(clone / "work" / "smoke")
            continue
        kinds = {"launcher": [process.pid], "papermill": [], "ipykernel_launcher": []}
        for found in psutil.process_iter(["cmdline"]):
            line = " ".join(found.info["cmdline"] or [])
            for kind in ("papermill", "ipykernel_launcher"):
                if f"-m {kind}" in line and "bash" not in line and _is_marked(found, clone):
                    kinds[kind].append(found.pid)
        kind = chance.choice([name for name, ids in kinds.items() if ids])
        with suppress(ProcessLookupError):
            os.kill(chance.choice(kinds[kind]), signal.SIGKILL)
            killed[kind] += 1
        if kind != "launcher":  # the others go on: the launcher ends by itself, or is killed next
            time.sleep(chance.uniform(0, 2))
            process.kill()
        process.wait()
    print(f"killed: {dict(killed)}")
    printed(*command(), folder=clone)
    assert set(killed) == {"launcher", "papermill", "ipykernel_launcher"}, killed
    assert not any(_is_marked(process, clone) for process in psutil.process_iter())
    before = outputs(clone)
    assert before == outputs(whole)
    assert len(before) >= 50
    # Nothing is left to do: this is said at once, and nothing changes.
    assert "results/smoke" in printed(*command(), folder=clone)
    assert outputs(clone) == before


def _is_marked(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.environ().get(MARK) == str(folder)
    except psutil.Error:
        return False


@pytest.mark.slow
def test_the_papers_protocol_and_a_deployment_prior(clone):
    """Loss, metric and folds of the paper by one parameter; failure rates in every notebook."""
    tier = {
        "grid": {"backbones": ["cmx"], "methods": ["lsgs", "deployment"], "folds": [1], "seeds": 2},
        "all": {"protocol": "paper", "failure_rates": "RGB:0.1,SWIR:0.5", "batch_size": 4},
        "02_pretraining_check": {"weights": "train"},
    }
    (clone / "notebooks" / "tiers" / "own.yaml").write_text(yaml.safe_dump(tier))
    printed(*command("own"), folder=clone)
    folder = clone / "work" / "own"
    run = folder / "runs" / "demo" / "cmx" / "fold1" / "seed1" / "deployment"
    records = pd.read_csv(run / "records.csv")
    assert {"soft_iou", "soft_f1", "patch"} <= set(records)
    history = pd.read_csv(run / "history.csv")
    never = [name for name in history if name.startswith("drawn:") and "NIR" not in name]
    assert never
    assert (history[never] == 0).all(axis=None)  # NIR never fails
    assert history["loss"].min() > 0.313  # what the published loss cannot go below
    summary = pd.read_csv(folder / "evaluation" / "summary.csv")
    assert (summary["expected_iou"] != summary["mean_iou"]).all()
    parts = pd.read_csv(folder / "prepared" / "demo" / "patches.csv")
    assert parts.filter(like="fold_").shape[1] == 5  # the authors' shuffled folds
    printed(*command("own"), folder=clone)
