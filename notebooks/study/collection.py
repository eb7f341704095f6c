"""All runs of a grid put together."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from lsgs_core.errors import InputError
from study.artifacts import load_table
from study.tiers import StudyFolder, network_seed


def collect(
    study: StudyFolder,
    points: Mapping[tuple[str, str, int, int], Sequence[str]],
    name: str,
    expected: Mapping[str, Mapping[str, Any]],
    pretraining_seed: int | None = None,
) -> pd.DataFrame:
    """Read one table of every run; dataset, backbone, fold, seed and method are its first columns.

    Args:
        study: Where the runs are.
        points: Methods of every (dataset, backbone, fold, seed), as `Grid.points` gives them.
        name: Name of the table in the folder of a run.
        expected: Parameters that every run of a data set must have been made with.
        pretraining_seed: Also read the table of the pretrained network, as method "pretrained", for
            every seed that started from it (see `network_seed`); None: do not.

    Raises:
        InputError: A run does not exist, is damaged, or was made with other parameters; or there
            is none at all.
    """
    tables = []
    for (dataset, backbone, fold, seed), methods in points.items():
        folder = study.runs(dataset, backbone, fold, seed)
        paths = {method: folder / method for method in methods}
        if pretraining_seed is not None:
            network = network_seed(pretraining_seed, seed)
            start = study.pretrained(dataset, backbone, fold, network)
            paths = {"pretrained": start, **paths}
        for method, folder in paths.items():
            table = load_table(folder / name, {**expected[dataset], "fold": fold})
            keys: dict[str, Any] = {"dataset": dataset, "backbone": backbone}
            keys |= {"fold": fold, "seed": seed, "method": method}
            table = table.assign(**keys)
            tables.append(table[[*keys, *table.columns.difference(list(keys), sort=False)]])
    if not tables:
        raise InputError(f"{study.root}/runs: no run is there; has notebook 04 been run?")
    return pd.concat(tables, ignore_index=True)
