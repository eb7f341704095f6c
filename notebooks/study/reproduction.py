"""Runs one committed result again, from the download on, and compares the records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd

from lsgs_core.errors import InputError
from study.evaluation import COUNTS, class_scores
from study.tiers import Grid, Runs, Tier

KEYS = ["method", "block", "scenario", "class"]


def only(tier: Tier, run: str) -> Tier:
    """The tier with a single run in its grid.

    Args:
        tier: With that run.
        run: Written dataset/backbone/method/fold/seed, such as demo/cmx/lsgs/0/0.

    Raises:
        InputError: The tier has no such run.
    """
    parts = run.split("/")
    known = {
        f"{dataset}/{backbone}/{method}/{fold}/{seed}": (dataset, backbone, method, fold, seed)
        for (dataset, backbone, fold, seed), methods in tier.grid.points().items()
        for method in methods
    }
    if len(parts) != 5 or run not in known:
        raise InputError(f"run: tier {tier.name} has {len(known)}, such as {next(iter(known))}")
    dataset, backbone, method, fold, seed = known[run]
    part = Runs(
        datasets=[dataset], backbones=[backbone], methods=[method], folds=[fold], seeds=[seed]
    )
    return replace(tier, grid=Grid([part]))


def compare(tier: Tier, published: Path) -> tuple[bool, str]:
    """Compare the records of a tier's single run, and of its pretrained network, with published.

    Args:
        tier: Of `only`, after its run.
        published: The committed `records.csv.xz`.

    Returns:
        Whether every count is the same, and a sentence that says so, or how far the IoUs differ.

    Raises:
        InputError: The run is not among the published.
    """
    [((dataset, backbone, fold, seed), [method])] = tier.grid.points().items()
    start = tier.folder.pretrained(dataset, backbone, fold, tier.pretraining_seed)
    folders = {
        "pretrained": start,
        method: tier.folder.runs(dataset, backbone, fold, seed) / method,
    }
    table = pd.read_csv(published)
    kept = (table["dataset"] == dataset) & (table["backbone"] == backbone)
    kept &= (table["fold"] == fold) & (table["seed"] == seed) & table["method"].isin(list(folders))
    committed = table[kept]
    if not len(committed):
        raise InputError(f"{published}: holds no such run; publish the tier first")
    again = pd.concat(
        pd.read_csv(folder / "records.csv").assign(method=name) for name, folder in folders.items()
    )
    tables = [part[[*KEYS, *COUNTS]].sort_values(KEYS) for part in (committed, again)]
    first, second = (part.reset_index(drop=True) for part in tables)
    if first.equals(second):
        return True, f"the same: all {len(first)} rows of counts"
    by = ["method", "scenario"]
    iou = class_scores(first, by).merge(class_scores(second, by), on=[*by, "class"], how="outer")
    largest = (iou["iou_x"] - iou["iou_y"]).abs().max()
    return False, (
        f"not the same: the IoU of a class and scenario differs by up to {largest:.4f}. Another "
        "processor, PyTorch or number of threads rounds differently; results/*/provenance.json "
        "says what the committed run had"
    )
