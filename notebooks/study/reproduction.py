"""Repeat one committed run, from the download on, and compare its records."""

from dataclasses import replace
from pathlib import Path

import pandas as pd

from lsgs_core.errors import InputError
from study.evaluation import COUNTS, class_scores
from study.tiers import Grid, Runs, Tier

KEYS = ["method", "block", "scenario", "class"]


def only(tier: Tier, run: str) -> Tier:
    """Return the tier with a single run in its grid; raise `InputError` where it has no such run.

    It is named by dataset/backbone/method/fold/seed, such as demo/cmx/lsgs/0/0.
    """
    runs = {
        f"{dataset}/{backbone}/{method}/{fold}/{seed}": Runs(
            datasets=[dataset], backbones=[backbone], methods=[method], folds=[fold], seeds=[seed]
        )
        for (dataset, backbone, fold, seed), methods in tier.grid.points().items()
        for method in methods
    }
    if run not in runs:
        raise InputError(f"run: tier {tier.name} has {len(runs)}, such as {next(iter(runs))}")
    return replace(tier, grid=Grid([runs[run]]))


def compare(tier: Tier, published: Path) -> tuple[bool, str]:
    """Compare the records of a single run and of its pretrained network with the published ones.

    Returns whether all counts are equal, and a sentence that says so, or how far the IoUs differ.
    Raises `InputError` where the run is not among the published ones.
    """
    [((dataset, backbone, fold, seed), [method])] = tier.grid.points().items()
    folders = {
        "pretrained": tier.folder.pretrained(*tier.networks()[0]),
        method: tier.folder.runs(dataset, backbone, fold, seed) / method,
    }
    point = {"dataset": dataset, "backbone": backbone, "fold": fold, "seed": seed}
    table = pd.read_csv(published)
    committed = table[(table[[*point]] == point).all(axis=1) & table["method"].isin([*folders])]
    if committed.empty:
        raise InputError(f"{published}: holds no such run; publish the tier first")
    tables = {name: pd.read_csv(folder / "records.csv") for name, folder in folders.items()}
    again = pd.concat(table.assign(method=name) for name, table in tables.items())
    both, columns = (committed, again), [*KEYS, *COUNTS]
    first, second = (part[columns].sort_values(KEYS, ignore_index=True) for part in both)
    if first.equals(second):
        return True, f"the same: all {len(first)} rows of counts"
    keys = ["method", "scenario", "class"]
    scores = [class_scores(part, keys[:-1]) for part in (first, second)]
    iou = scores[0].merge(scores[1], on=keys, how="outer")
    largest = (iou["iou_x"] - iou["iou_y"]).abs().max()
    return False, (
        f"not the same: the IoU of a class and scenario differs by up to {largest:.4f}. Another "
        "processor, PyTorch or number of threads rounds differently; results/*/provenance.json "
        "describes the committed run"
    )
