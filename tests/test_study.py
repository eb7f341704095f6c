"""The launcher: what it clears up, what it refuses, and a study that is killed."""

import json
import os
import random
import re
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
from checkout import ROOT, environment, printed
from statistics_records import records_of
from study.provenance.artifacts import Record, save_table
from study.provenance.files import TEMPORARY, file_sha256
from study.stages.tiers import load_tier
from study.workflow import commands
from study.workflow.commands import MARK, compare, end_orphans, publish, sweep
from study.workflow.durations import durations, estimate, executed

from lsgs_core import InputError

KILLS = 50


def write_tier(folder: Path, content: dict, name: str = "own") -> None:
    (folder / "notebooks" / "tiers" / f"{name}.yaml").write_text(yaml.safe_dump(content))


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


def test_publishing_replaces_what_was_there(tmp_path, monkeypatch):
    monkeypatch.setattr("study.workflow.commands.ROOT", tmp_path)
    tier = load_tier("smoke", ROOT)
    folder = tmp_path / tier.folder.evaluation
    summary = {"dataset": "demo", "backbone": "cmx", "method": "lsgs", "seed": 0}
    summary |= {"mean_iou": 0.4321, "worst_iou": 0.3, "full_iou": 0.5, "worst_scenario": "NIR"}
    save_table(folder / "summary.csv", pd.DataFrame([summary]), Record({"fold": 0}))
    save_table(folder / "records.csv.xz", pd.DataFrame({"tp": [1]}), Record({"fold": 0}))
    table = pd.DataFrame({"a": [1]})
    save_table(folder / "differences.csv", table, Record({"fold": 1}))  # of an earlier grid
    save_table(tmp_path / tier.folder.scores("demo", "cbc", 0, 0) / "a.csv", table, Record({}))
    (folder / "figure.png").write_bytes(b"png")
    (folder / "predictions_demo.npz").write_bytes(b"npz")
    with pytest.raises(InputError, match=r"evaluation/summary.csv"):
        publish(load_tier("study_flood", ROOT))
    outside = {("demo", "cmx", 0, 7): ["lsgs"]}  # the grid was larger once
    for point, methods in {**tier.points(), **outside}.items():
        parameters = {"dataset": point[0], "model": {"name": point[1]}}
        for method in methods:
            path = tmp_path / tier.folder.runs(*point) / method / "records.csv"
            save_table(path, pd.DataFrame({"tp": [1]}), Record(parameters))
    (tmp_path / tier.folder.runs("demo", "cbc_slp", 0, 0) / "lora" / "records.csv").unlink()
    shutil.copyfile(ROOT / "data_manifest.yaml", tmp_path / "data_manifest.yaml")
    (folder / "weights.safetensors").write_bytes(b"large")
    (folder / ".scene.17907.pdf").write_bytes(b"%PDF")  # a kill left it
    (tmp_path / "results" / ".smoke.new").mkdir(parents=True)
    results = tmp_path / "results" / "smoke"
    results.mkdir(parents=True)
    (results / "old.csv").write_text("old")
    names = {path.relative_to(results).as_posix() for path in publish(tier)}
    expected = {"summary.csv", "records.csv.xz", "figure.png", "predictions_demo.npz"}
    own = {"provenance.json", "NOTICE.txt", "README.md"}
    assert names == {f"evaluation/{name}" for name in expected} | own
    notice = (results / "NOTICE.txt").read_text()
    assert "ODbL" in notice
    assert "© OpenStreetMap contributors" in notice
    row = "| demo | cmx | LSGS | 0.432 | 0.300 NIR | 0.500 |"
    assert row in (results / "README.md").read_text()
    assert not (results / "old.csv").exists()
    assert [path.name for path in results.parent.iterdir()] == ["smoke"]  # and nothing beside it
    provenance = json.loads((results / "provenance.json").read_text())
    found = [(runs["dataset"], runs["backbone"], runs["runs"]) for runs in provenance["runs"]]
    assert found == [("demo", "cbc_slp", 2), ("demo", "cmx", 3)]  # one of CBC-SLP is not there
    assert all(runs["from"] <= runs["to"] for runs in provenance["runs"])
    assert provenance["tier_sha256"] == tier.sha256


def test_a_publish_that_is_killed_is_all_or_nothing(tmp_path, monkeypatch):
    """Killed between its two renames, it leaves the older results, which the next one takes."""
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    tier = load_tier("smoke", ROOT)
    (tmp_path / "results" / ".smoke.old").mkdir(parents=True)
    (tmp_path / "results" / ".smoke.old" / "table.csv").write_text("old")
    save_table(tmp_path / tier.folder.evaluation / "summary.csv", pd.DataFrame({"a": [1]}),
               Record({}))  # fmt: skip
    monkeypatch.setattr(commands, "_runs_by_commit", lambda tier: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        publish(tier)
    assert (tmp_path / "results" / "smoke" / "table.csv").read_text() == "old"
    command = ["git", "check-ignore", "--no-index"]
    for path in ("results/.smoke.new", "results/a/.x.12.csv"):
        assert subprocess.run([*command, path], cwd=ROOT, check=False).returncode == 0


def test_temporary_files_of_ended_processes_are_swept(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = [f".scene.{ended.pid}.pdf", f"a/.records.csv.{ended.pid}.xz", f".lock.{ended.pid}"]
    kept = [f".scene.{os.getpid()}.pdf", ".hidden", "a/scene.12.pdf", ".git/x.1.y"]
    for name in left + kept:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / f".download.{ended.pid}.xyz").mkdir()
    sweep(tmp_path)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert files == {*kept, "a", ".git"}


def test_a_shell_runs_nothing_of_a_name():
    """And hostile.yaml has names that are refused."""
    text = (ROOT / "Snakefile").read_text()
    assert not re.findall(r"\{(?:params|log|output|input)[^}:]*\}", text)  # all are quoted: `:q`


ERROR = {"output_type": "error", "ename": "InputError", "evalue": "x: expected y"}
FAILED_CELL = {"cell_type": "code", "execution_count": 3, "outputs": [ERROR]}


@pytest.mark.parametrize(
    ("cells", "said", "sentence"),
    [
        ([FAILED_CELL], "Traceback", "notebooks/04_finetuning.ipynb, cell [3]: x: expected y"),
        ([], "a\nOSError: [Errno 28] No space left", "OSError: [Errno 28] No space left"),
        (None, "a\nDeadKernelError: Kernel died\n", "DeadKernelError: Kernel died"),
        (None, "", "was ended"),
        ("half", "OSError: [Errno 28] No space left", "OSError: [Errno 28] No space left"),
    ],
)
def test_the_reason_of_a_failure_comes_last(tmp_path, monkeypatch, capsys, cells, said, sentence):
    tier, job = load_tier("smoke", ROOT), "04_finetuning-demo-cmx-fold0-seed0"
    path = tmp_path / tier.folder.executed_notebook(job)

    def fails(tier, options, *_):
        """In place of Snakemake: a notebook fails."""
        if "--dry-run" in options:
            return 0
        with pytest.raises(InputError, match="already"):  # one study per folder
            commands.run(tier, 1)
        assert commands.run(tier, 1, dry_run=True) == 0  # which may stand beside a run
        path.parent.mkdir(parents=True, exist_ok=True)
        if cells is not None:
            text = json.dumps({"cells": cells, "metadata": {}})
            path.write_text(text[:-5] if cells == "half" else text)
        Path(f"{path}.failed").write_text(said)
        return 1

    monkeypatch.setattr(commands, "ROOT", tmp_path)
    monkeypatch.setattr(commands, "_snakemake", fails)
    for _ in range(2):  # the folder is given up when a run has ended
        assert commands.run(tier, 1) == 1
        assert capsys.readouterr().err == f"error: {job}: {sentence}\n"


def test_how_long_it_takes_is_said(tmp_path):
    tier = load_tier("demo", ROOT)
    said = [estimate(tier, cores, ROOT) for cores in (1, 2)]
    one, two = (int(re.search(r"(\d+) minutes", text)[1]) for text in said)
    assert 5 <= two < one <= 60
    assert "11 notebooks" in said[0]
    assert "preset 'demo' of cbc" in estimate(load_tier("paper", ROOT), 1, ROOT)
    path = tmp_path / tier.folder.executed_notebook("05_evaluation")
    path.parent.mkdir(parents=True)
    before = executed(tier, tmp_path)
    path.write_text(json.dumps({"metadata": {"papermill": {"duration": 61.3}}}))
    after = executed(tier, tmp_path)
    assert list(durations(before, after)) == ["evaluation: 61 seconds in 1 notebook"]
    assert not list(durations(after, after))


def test_a_run_beside_its_published_records(tmp_path):
    tier = load_tier("demo", ROOT, tmp_path)
    single = tier.only("demo/cmx/lsgs/0/0")
    records = records_of({"pretrained": 0.0, "lsgs": 0.05}, seeds=1)
    published = tmp_path / "records.csv.xz"
    records.assign(dataset="demo", backbone="cmx").to_csv(published, index=False)
    run = tier.folder.runs("demo", "cmx", 0, 0) / "lsgs"
    places = {"pretrained": tier.folder.pretrained("demo", "cmx", 0, 0), "lsgs": run}
    for method, place in places.items():
        place.mkdir(parents=True)
        rows = records[records["method"] == method].drop(columns=["method", "seed", "fold"])
        rows.sample(frac=1, random_state=0).to_csv(place / "records.csv", index=False)
    same, sentence = compare(single, published)
    assert same
    assert f"all {len(records)} rows" in sentence
    changed = pd.read_csv(run / "records.csv")
    changed.loc[0, "tp"] += 200
    changed.to_csv(run / "records.csv", index=False)
    same, sentence = compare(single, published)
    assert not same
    assert "differs by up to 0.0" in sentence
    with pytest.raises(InputError, match="no such run"):
        compare(tier.only("demo/cbc/lsgs/0/0"), published)


def command(tier: str = "smoke") -> list[str]:
    return [sys.executable, "-m", "study", "run", tier, "--cores", "2"]


def outputs(folder: Path) -> dict[str, str]:
    """Hash of every record, probability and weight of a study, and of all that is published."""
    patterns = ("work/smoke/**/records.csv", "work/smoke/**/probabilities.json")
    patterns += ("work/smoke/**/weights.safetensors", "results/smoke/*/**/*.*")
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in found}


@pytest.mark.slow
def test_a_finished_tier_that_grows_goes_on(clone):
    tier = {"grid": {"backbones": ["cmx"], "methods": ["lsgs"], "folds": [0], "seeds": 1}}
    write_tier(clone, tier)
    snakemake = sys.executable, "-m", "snakemake", "--config", "tier=own", "--cores", "1"
    listed = printed(*snakemake, "--quiet", "all", "--summary", folder=clone)
    for line in listed.splitlines():
        if line.startswith("work/"):
            path = clone / line.split("\t")[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("size,fold_0\n32,training\n")
    printed(*snakemake, "--touch", folder=clone)
    assert "Nothing to be done" in printed(*command("own"), "--dry-run", folder=clone)
    tier["grid"]["seeds"] = 2
    write_tier(clone, tier)
    grown = printed(*command("own"), "--dry-run", folder=clone)
    assert re.search(r"^finetuning +1$", grown, re.MULTILINE), grown
    assert re.search(r"^evaluation +1$", grown, re.MULTILINE), grown


@pytest.mark.slow
def test_files_that_are_not_there_are_said_before_any_notebook_runs(clone):
    """No traceback and no dump of a command: a sentence, and where the files come from."""
    grid = {"backbones": ["cmx"], "methods": ["uniform"], "folds": [0], "seeds": [0]}
    grid["datasets"] = ["potsdam"]  # whose files nobody can download freely
    write_tier(clone, {"grid": grid, "02_pretraining_check": {"weights": "train"}})
    done = subprocess.run(
        command("own"), cwd=clone, env=environment(clone), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 2
    assert re.search(r"^error: .*potsdam: the folder is missing$", done.stdout, re.MULTILINE)
    assert "Traceback" not in done.stdout
    assert not [*(clone / "work" / "own" / "notebooks").iterdir()]


@pytest.mark.slow
def test_fifty_kills_of_whatever_runs(clone, tmp_path_factory):
    """kill -9 of any process of the tree, when chance decides; then a clock that is set back."""
    tier = {
        "grid": {"backbones": ["cmx"], "methods": ["uniform", "lsgs"], "folds": [0], "seeds": 6},
        "02_pretraining_check": {"weights": "train"},
        "04_finetuning": {"epochs": 3},
        "05_evaluation": {"shown_patches": 0, "resamples": 20},
    }
    write_tier(clone, tier, "smoke")
    whole = tmp_path_factory.mktemp("whole")
    shutil.copytree(clone, whole, dirs_exist_ok=True)
    printed(*command(), folder=whole)
    chance = random.Random()
    kinds = ["launcher", "snakemake", "papermill", "ipykernel_launcher"]
    killed: Counter[str] = Counter()
    while killed.total() < KILLS:
        # Not through a pipe, which orphans would hold open.
        process = subprocess.Popen(
            command(), cwd=clone, env=environment(clone), stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        kind, tree = chance.choice(kinds), {process.pid: "launcher"}
        while kind not in tree.values() and process.poll() is None:
            time.sleep(0.5)  # until one of this kind runs, however slow the machine is
            tree |= _tree(clone)
        time.sleep(chance.uniform(0, 20))
        tree = {process.pid: "launcher"} | _tree(clone)
        if process.poll() is not None:
            # Finished already: the rest of the kills hits a study that starts anew.
            shutil.rmtree(clone / "work" / "smoke")
            continue
        kind = kind if kind in tree.values() else "launcher"
        with suppress(ProcessLookupError):
            os.kill(chance.choice([pid for pid in tree if tree[pid] == kind]), signal.SIGKILL)
            killed[kind] += 1
        if kind != "launcher":  # the others go on: the launcher ends by itself, or is killed next
            time.sleep(chance.uniform(0, 5))
            process.kill()
        process.wait()
        if killed.total() == KILLS // 2:
            written_tomorrow(clone / "work" / "smoke")
    print(f"killed: {dict(killed)}")
    printed(*command(), folder=clone)
    assert {*kinds} <= set(killed), killed
    assert not _tree(clone)
    assert not [*(clone / ".snakemake" / "locks").glob("*")]
    for path in (path for part in ("work", "results") for path in (clone / part).rglob("*")):
        assert path.suffix != ".failed"
        assert not TEMPORARY.fullmatch(path.name), path
    assert {path.name for path in (clone / "results").iterdir()} == {"networks", "smoke"}
    before = outputs(clone)
    assert before == outputs(whole)
    assert len(before) >= 40
    # Nothing is left to do, also where inputs are newer than what was made from them: this is said
    # at once, no notebook is executed again, and nothing changes.
    for part in ("prepared", "pretrained", "scores"):
        written_tomorrow(clone / "work" / "smoke" / part)
    said = printed(*command(), folder=clone)
    assert "results/smoke" in said
    assert not re.search(r"\w+: .* in \d+ notebook", said), said
    assert outputs(clone) == before


def written_tomorrow(folder: Path) -> None:
    """As if the clock had been a day ahead, and was set back."""
    for path in folder.rglob("*"):
        os.utime(path, (time.time() + 86_400,) * 2)


def _tree(folder: Path) -> dict[int, str]:
    """The modules, or the programs, that the processes of a study run, but for the launcher."""
    tree = {}
    for found in psutil.process_iter(["environ", "cmdline"]):  # which are None where not shown
        if (found.info["environ"] or {}).get(MARK) == str(folder):
            words = found.info["cmdline"] or ["ended"]
            module = words[words.index("-m") + 1] if "-m" in words else Path(words[0]).name
            tree[found.pid] = module
    return tree


@pytest.mark.slow
def test_the_papers_protocol_and_a_deployment_prior(clone):
    """Loss, metric and folds of the paper by one parameter; failure rates in every notebook."""
    tier = {
        "grid": {"backbones": ["cmx"], "methods": ["lsgs", "deployment"], "folds": [1], "seeds": 2},
        "all": {"protocol": "paper", "failure_rates": "RGB:0.1,SWIR:0.5", "batch_size": 4},
        "02_pretraining_check": {"weights": "train"},
    }
    write_tier(clone, tier)
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


# The same study through SLURM, on a SLURM of one node that the test starts on this machine.
SCRIPT = Path(__file__).parent / "start_slurm.sh"
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")
CAN_START = os.geteuid() == 0 and all(shutil.which(name) for name in NEEDED)


@pytest.fixture
def slurm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run(["bash", SCRIPT, "start", folder], check=True, timeout=60)
    yield
    subprocess.run(["bash", SCRIPT, "stop", folder], check=True, timeout=60)


@pytest.mark.slow
@pytest.mark.skipif(not CAN_START, reason="needs root, and SLURM from Debian's packages")
def test_the_smoke_grid_on_slurm(clone, slurm):
    study = sys.executable, "-m", "study", "run", "smoke", "--profile", "profiles/slurm"
    assert "submitted with SLURM jobid" in printed(*study, folder=clone)
    assert len(outputs(clone)) >= 10
    assert (clone / "results" / "smoke" / "evaluation" / "summary.csv").is_file()
