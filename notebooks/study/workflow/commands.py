"""Runs a tier from one command, on top of Snakemake: `python -m study run demo`.

What Snakemake leaves to its caller after a `kill -9` is done here: processes of the earlier run
that still write are ended, and incomplete outputs are made again.
"""

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

from lsgs_core.errors import InputError
from study.data.manifest import ManualSource
from study.data.raw_files import find_scenes
from study.metrics.evaluation import COUNTS, SOFT, class_scores
from study.provenance.artifacts import check, sidecar_path
from study.provenance.files import TEMPORARY, file_sha256, make_folder, written_beside
from study.provenance.schema import read_json
from study.stages.agreement import AGREEMENT
from study.stages.tiers import Tier, load_tier
from study.workflow.durations import durations, estimate, executed, read_executed
from study.workflow.pages import tier_page

ROOT = Path(__file__).resolve().parents[3]
# Every process of a run carries this variable, so that those a kill orphaned can be found.
MARK = "LSGS_STUDY_ROOT"
TABLES, FIGURES = {".csv", ".xz", ".json", ".npz", ".md", ".txt"}, {".png", ".pdf"}
NETWORKS = ROOT / "results" / "networks"
DOWNLOADS = ROOT / "work" / "downloads"
NETWORK_FILES = ("weights.safetensors", "model_card.md", "history.csv", "records.csv")
MOST_DRAWN = 4  # of more networks, tables are published, without figures and those of patches


def run(tier: Tier, cores: int, dry_run: bool = False, profile: str = "") -> int:
    """Run what is missing or out of date of a tier, and return Snakemake's exit status.

    A dry run lists what would run, and changes nothing but the files of parameters. A workflow
    profile, such as the folder profiles/slurm, says how to run jobs elsewhere.
    """
    if profile and not (ROOT / profile).is_dir():
        raise InputError(f"profile: expected a folder such as profiles/slurm, found {profile!r}")
    _expect_files(tier, dry_run)
    print(estimate(tier, cores, ROOT), flush=True)
    if dry_run:
        return _snakemake(tier, ["--cores", str(cores), "--dry-run"])
    here = ["--cores", str(cores), "--resources", f"gpu={tier.gpus}"]
    options = ["--workflow-profile", profile] if profile else here
    status = _make(tier, [*options, "--keep-going"])
    if status == 0:
        print(f"tables and figures: results/{tier.name}\nnotebooks: {tier.folder.root}/notebooks")
        print((ROOT / tier.folder.evaluation / AGREEMENT).read_text().strip())
    return status


def reproduce(tier: Tier, run: str, cores: int) -> int:
    """Run one committed result again in a folder of its own, and say whether it is the same.

    The run is such as demo/cmx/lsgs/0/0; "" takes the last seed of the last backbone. Returns 0
    where it is the same, 1 where it is not or did not finish.
    """
    again = load_tier(tier.name, ROOT, Path("work") / "reproduction")
    if not run:
        (dataset, backbone, fold, seed), methods = [*tier.points().items()][-1]
        run = f"{dataset}/{backbone}/{methods[0]}/{fold}/{seed}"
    single = again.only(run)
    published = ROOT / "results" / tier.name / "evaluation" / "records.csv.xz"
    if not published.is_file():
        raise InputError(f"results/{tier.name}: nothing is published; run make study first")
    done = ROOT / single.folder.root / "compared.txt"
    if done.is_file():  # an earlier one was finished; one that was killed goes on
        shutil.rmtree(done.parent)
    [point] = single.points()
    target = str(single.folder.runs(*point) / "scores.csv")
    if _make(single, ["--cores", str(cores)], [f"only={run}"], [target]):
        return 1
    same, sentence = compare(single, published)
    done.write_text(f"{run}: {sentence}\n")
    print(f"{run}: {sentence}")
    return 0 if same else 1


def compare(tier: Tier, published: Path) -> tuple[bool, str]:
    """Compare the records of a single run and of its pretrained network with the published ones.

    Returns whether all counts are equal, and a sentence that says so, or how far the IoUs differ.
    Raises `InputError` where the run is not among the published ones.
    """
    [((dataset, backbone, fold, seed), [method])] = tier.points().items()
    folders = {
        "pretrained": tier.folder.pretrained(*tier.networks()[0]),
        method: tier.folder.runs(dataset, backbone, fold, seed) / method,
    }
    point = {"dataset": dataset, "backbone": backbone, "fold": fold, "seed": seed}
    table = pd.read_csv(published)
    committed = table[(table[[*point]] == point).all(axis=1) & table["method"].isin([*folders])]
    if committed.empty:
        raise InputError(f"{published}: holds no such run; publish the tier first")
    tables = {name: pd.read_csv(ROOT / folder / "records.csv") for name, folder in folders.items()}
    again = pd.concat(table.assign(method=name) for name, table in tables.items())
    unit, measured = ("block", COUNTS) if "tp" in table else ("patch", SOFT)
    keys = ["method", unit, "scenario", "class"]
    both, columns = (committed, again), [*keys, *measured]
    first, second = (part[columns].sort_values(keys, ignore_index=True) for part in both)
    if first.equals(second):
        return True, f"the same: all {len(first)} rows"
    keys.remove(unit)
    scores = [class_scores(part, keys[:-1]) for part in (first, second)]
    iou = scores[0].merge(scores[1], on=keys, how="outer")
    largest = (iou["iou_x"] - iou["iou_y"]).abs().max()
    return False, (
        f"not the same: the IoU of a class and scenario differs by up to {largest:.4f}. Another "
        "processor, PyTorch or number of threads rounds differently; results/*/provenance.json "
        "describes the committed run"
    )


def make_networks(tier: Tier, cores: int) -> int:
    """Pretrain the networks of a tier, such as scratch, and put them into `results/networks`.

    Nothing else writes there. What is said is whether a network is the one that the manifest lists,
    or else its hash. Returns the exit status of Snakemake.
    """
    folders = [tier.folder.pretrained(*network) for network in tier.networks()]
    targets = [str(folder / NETWORK_FILES[0]) for folder in folders]
    if status := _make(tier, ["--cores", str(cores)], (), targets):
        return status
    listed = {network.weights: network.sha256 for network in tier.manifest.networks}
    for folder in folders:
        target = NETWORKS / folder.relative_to(tier.folder.root / "pretrained")
        make_folder(target)
        for name in NETWORK_FILES:
            for path in (ROOT / folder / name, sidecar_path(ROOT / folder / name)):
                with written_beside(target / path.name) as temporary:
                    shutil.copyfile(path, temporary)
        weights = (target / NETWORK_FILES[0]).relative_to(ROOT).as_posix()
        sha256 = file_sha256(ROOT / weights)
        same = "the one that" if listed.get(weights) == sha256 else f"sha256 {sha256}, not what"
        print(f"{weights}: {same} the manifest lists")
    return 0


def _expect_files(tier: Tier, dry_run: bool) -> None:
    """Raise `InputError` where a run could not write its last files, or read its first."""
    for path in (tier.folder.root / "parameters", tier.folder.root / "notebooks", Path("results")):
        if not os.access(make_folder(ROOT / path), os.W_OK):
            raise InputError(f"{path}: expected a folder that can be written to")
    if (ROOT / "results" / tier.name).is_file():
        raise InputError(f"results/{tier.name}: expected a folder, found a file")
    for name in () if dry_run else tier.datasets:
        dataset, made = tier.manifest.dataset(name), tier.folder.prepared(name) / "patches.csv"
        if isinstance(dataset.source, ManualSource) and not (ROOT / made).is_file():
            raw = tier.setting("data", "raw") or f"{tier.setting('data', 'downloads')}/{name}"
            find_scenes(dataset, (ROOT / "notebooks" / raw).resolve())


def _make(
    tier: Tier, options: Sequence[str], config: Sequence[str] = (), targets: Sequence[str] = ()
) -> int:
    """Make targets of a tier as the only study of this checkout; return Snakemake's exit status.

    What a killed run left behind is cleared up first: its processes and, unless a profile has jobs
    that may be running elsewhere, its temporary files. Said at the end is how long every stage
    took, and what failed.
    """
    root = ROOT / tier.folder.root
    with _only_one(ROOT):
        if ended := end_orphans(ROOT):
            print(f"ended {ended} processes that an earlier run had left behind", flush=True)
        for folder in () if "--workflow-profile" in options else (root, DOWNLOADS, NETWORKS):
            sweep(folder)
        for log in root.rglob("*.failed"):  # with what an earlier run executed
            log.with_suffix("").unlink(missing_ok=True)
            log.unlink()
        before = executed(tier, ROOT)
        status = _snakemake(tier, options, config, targets)
    for line in durations(before, executed(tier, ROOT)):
        print(line, flush=True)
    if status:
        _say_what_failed(tier)
    return status


def sweep(folder: Path) -> None:
    """Delete the temporary files below a folder whose process has ended."""
    for path in [*folder.rglob(".*")]:
        match = TEMPORARY.fullmatch(path.name)
        if match and not psutil.pid_exists(int(match[2])):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _say_what_failed(tier: Tier) -> None:
    """Print, as the last lines of all, why each notebook failed and in which cell."""
    print(f"the study did not finish; executed notebooks: {tier.folder.root}/notebooks", flush=True)
    jobs = [(job, tier.folder.executed_notebook(job)) for job, _ in tier.jobs()]
    for job, path in [*jobs, ("publish", tier.folder.root / "published.txt")]:
        log = ROOT / f"{path}.failed"
        if log.is_file():
            print(_why(job, ROOT / path, log), file=sys.stderr, flush=True)


def _why(job: str, notebook: Path, log: Path) -> str:
    """Return a sentence that says in which cell a notebook failed, or what was said last."""
    for cell in read_executed(notebook).get("cells", []):
        for output in cell.get("outputs", []):
            if output["output_type"] == "error":
                place = f"notebooks/{job.partition('-')[0]}.ipynb, cell [{cell['execution_count']}]"
                kind = "" if output["ename"] == "InputError" else f"{output['ename']}: "
                return f"error: {job}: {place}: {kind}{output['evalue']}"
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"error: {job}: {lines[-1].removeprefix('error: ') if lines else 'was ended'}"


def _snakemake(
    tier: Tier, options: Sequence[str], config: Sequence[str] = (), targets: Sequence[str] = ()
) -> int:
    """Run Snakemake on a tier, and return its exit status."""
    command = [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")),
        # `_only_one` is the lock, which no kill leaves behind.
        *("--directory", str(ROOT), "--rerun-incomplete", "--nolock"),
        # A tier that grew by a seed has other inputs of its evaluation, none of which is newer.
        *("--rerun-triggers", "mtime", "params", "input"),
        # What is newer by a clock that was set back, and has the same content, is not newer.
        *("--max-checksum-file-size", "1GB"),
        *([] if "--dry-run" in options else ["--quiet", "rules", "host"]),
        *options,
        *("--config", f"tier={tier.name}", f"work={tier.folder.root.parent}", *config),
        *(("--", *targets) if targets else ()),
    ]
    mark = {} if "--dry-run" in options else {MARK: str(ROOT)}
    return subprocess.run(command, env={**os.environ, **mark}, check=False).returncode


def publish(tier: Tier) -> list[Path]:
    """Copy tables and figures of a finished tier into `results/<tier>`, in place of older ones.

    All of it or nothing: a folder beside, which git ignores, is renamed when it is whole. One file,
    `provenance.json`, has dates and versions, so that `git diff results` shows changed figures.
    """
    record = check(ROOT / tier.folder.evaluation / "summary.csv")
    target = ROOT / "results" / tier.name
    beside, old = (target.with_name(f".{tier.name}.{part}") for part in ("new", "old"))
    if old.is_dir() and not target.exists():  # killed between the two renames below
        old.replace(target)
    for leftover in (beside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    sources = {
        **{f"data/{name}": tier.folder.prepared(name) / "figures" for name in tier.datasets},
        "evaluation": tier.folder.evaluation,
    }
    for network in tier.networks():  # a folder may hold others, of an earlier grid
        for folder in (tier.folder.pretrained(*network), tier.folder.scores(*network)):
            sources[folder.relative_to(tier.folder.root).as_posix()] = folder
    many = len(tier.networks()) > MOST_DRAWN
    for name, source in sources.items():
        kinds = TABLES if many and name.startswith(("pretrained", "scores")) else TABLES | FIGURES
        for path in sorted((ROOT / source).rglob("*")):
            hidden = any(part.startswith(".") for part in path.relative_to(ROOT / source).parts)
            hidden |= many and path.name == "patch_distortion.csv"
            if name == "evaluation" and (beside_it := sidecar_path(path)).is_file():
                # A table or figure that an earlier grid had, and this one has not.
                hidden |= read_json(beside_it)["parameters"] != record["parameters"]
            if path.suffix in kinds and not hidden and not path.name.endswith(".record.json"):
                copy = beside / name / path.relative_to(ROOT / source)
                make_folder(copy.parent)
                shutil.copyfile(path, copy)
    provenance = {
        "command": f"make study TIER={tier.name}",
        "parameters": {name: dict(section) for name, section in tier.sections.items()},
        "grid": [part.model_dump() for part in tier.grid],
        "tier_sha256": tier.sha256,
        "evaluation": {"parameters": record["parameters"], "environment": record["environment"]},
        "runs": _runs_by_commit(tier),
    }
    (beside / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
    (beside / "NOTICE.txt").write_text(_notice(tier), "utf-8")
    (beside / "README.md").write_text(tier_page(beside), "utf-8")
    if target.is_dir():
        target.replace(old)
    beside.replace(target)
    shutil.rmtree(old, ignore_errors=True)
    return sorted(path for path in target.rglob("*") if path.is_file())


def _runs_by_commit(tier: Tier) -> list[dict[str, Any]]:
    """How many runs there are of every data set and backbone, of which commit and date."""
    found: dict[tuple[str, ...], list[str]] = {}
    runs = [(tier.folder.runs(*point) / method / "records.csv")
            for point, methods in tier.points().items() for method in methods]  # fmt: skip
    for path in sorted(ROOT / run for run in runs if (ROOT / run).is_file()):  # a part, by hand
        record = check(path)
        parameters, environment = record["parameters"], record["environment"]
        keys = parameters["dataset"], parameters["model"]["name"], str(environment["commit"])
        found.setdefault(keys, []).append(environment["date"])
    names = "dataset", "backbone", "commit", "runs", "from", "to"
    rows = [(*keys, len(dates), min(dates), max(dates)) for keys, dates in found.items()]
    return [dict(zip(names, row, strict=True)) for row in rows]


def _notice(tier: Tier) -> str:
    """Under which licences pictures, labels and predictions of a tier's data sets are."""
    lines = ["Pictures, labels, predictions and networks here are derived from these data,"]
    lines += ["and are passed on under their licences.", ""]
    for name in tier.datasets:
        dataset = tier.manifest.dataset(name)
        lines.append(f"{name}: {dataset.title}")
        lines += [f"  {of.covers}: {of.name}. {of.attribution}." for of in dataset.licences]
    return "\n".join([*lines, ""])


def end_orphans(root: Path) -> int:
    """End the processes that an earlier run of this checkout left behind; return their number."""
    own = {os.getpid(), *(process.pid for process in psutil.Process().parents())}
    orphans = [
        process
        for process in psutil.process_iter(["environ"])  # which is None where it is not shown
        if process.pid not in own and (process.info["environ"] or {}).get(MARK) == str(root)
    ]
    for process in orphans:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(orphans, timeout=10)
    return len(orphans)


@contextmanager
def _only_one(root: Path) -> Iterator[None]:
    """Hold the checkout's lock, which a killed process gives up by itself."""
    lock = root / "work" / "study.lock"
    make_folder(lock.parent)
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{root}: a study is running here already") from error
        yield


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m study", description=__doc__)
    parser.add_argument("action", choices=["run", "publish", "reproduce", "networks"])
    parser.add_argument("tier", help="a file in notebooks/tiers, such as demo")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dry-run", action="store_true", help="list what would run")
    parser.add_argument("--run", default="", help="of reproduce, such as demo/cmx/lsgs/0/0")
    parser.add_argument("--profile", default="", help="a workflow profile: profiles/slurm")
    options = parser.parse_args(arguments)
    try:
        if options.cores < 1:
            raise InputError(f"--cores: expected 1 or more, found {options.cores}")
        tier = load_tier(options.tier, ROOT)
        if options.action == "run":
            return run(tier, options.cores, options.dry_run, options.profile)
        if options.action == "reproduce":
            return reproduce(tier, options.run, options.cores)
        if options.action == "networks":
            return make_networks(tier, options.cores)
        print(f"published {len(publish(tier))} files in results/{tier.name}")
        return 0
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
