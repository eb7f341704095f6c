"""All runs of a grid put together, and what their networks predict for chosen patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from lsgs_core.artifacts import load_table
from lsgs_core.errors import InputError
from lsgs_core.evaluation import class_map
from lsgs_core.figures import PredictedPatch, composite
from lsgs_core.models import Backbone
from lsgs_core.patches import PatchDataset
from lsgs_core.scenarios import ScenarioSet
from lsgs_core.tiers import StudyFolder


def collect(
    study: StudyFolder,
    points: Mapping[tuple[str, str, int, int], Sequence[str]],
    name: str,
    expected: Mapping[str, Mapping[str, Any]],
    pretraining_seed: int | None = None,
) -> pd.DataFrame:
    """Read one table of every run.

    Args:
        study: Where the runs are.
        points: Methods of every (dataset, backbone, fold, seed), as `Grid.points` gives them.
        name: Of the table in the folder of a run.
        expected: Parameters that every run of a data set must have been made with.
        pretraining_seed: Also read the table of the pretrained network, as method "pretrained", for
            every seed that started from it; None: do not.

    Returns:
        The tables one below the other, with columns dataset, backbone, fold, seed and method in
        front.

    Raises:
        InputError: A run is not there, is damaged, or was made with other parameters; or there is
            none at all.
    """
    tables = []
    for (dataset, backbone, fold, seed), methods in points.items():
        folder = study.runs(dataset, backbone, fold, seed)
        paths = {method: folder / method for method in methods}
        if pretraining_seed is not None:
            start = study.pretrained(dataset, backbone, fold, pretraining_seed)
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


def richest_patches(dataset: PatchDataset, count: int) -> list[int]:
    """Positions of the patches with most label values, from different blocks while there are any.

    Of two with as many values, the one with more labelled pixels comes first.
    """
    pixels = dataset.table.filter(like="pixels_")
    order = pd.DataFrame({"values": (pixels > 0).sum(axis=1), "labelled": pixels.sum(axis=1)})
    order["block"] = dataset.block_ids
    order = order.sort_values(["values", "labelled"], ascending=False, kind="stable")
    # The best of every block first, then the second best of every block, and so on.
    order["turn"] = order.groupby("block").cumcount()
    return order.sort_values("turn", kind="stable").index[:count].tolist()


def predicted_patches(
    model: Backbone, dataset: PatchDataset, indices: Sequence[int], scenarios: ScenarioSet
) -> list[PredictedPatch]:
    """What a model makes of patches under every single modality and under all of them.

    Args:
        model: In evaluation mode afterwards.
        dataset: Where the patches come from; the first modality is shown as the picture.
        indices: Positions in the data set.
        scenarios: For the modalities of the data set.
    """
    model.eval()
    device = next(model.parameters()).device
    masks = torch.tensor(scenarios.masks, device=device)
    shown = [*np.flatnonzero(scenarios.masks.sum(axis=1) == 1), scenarios.full]
    patches = []
    for index in indices:
        batch = dataset.batch([index]).to(device)
        assert batch.target is not None
        assert batch.valid is not None
        predictions = {}
        with torch.inference_mode():
            for scenario in shown:
                present = batch.available & masks[scenario]
                title = scenarios.names[scenario] if scenario != scenarios.full else "all"
                if not bool(present.any()):  # the patch has no file of this modality
                    predictions[title] = np.full(batch.valid.shape[1:], -1)
                    continue
                logits = model(batch.images, present)
                predictions[title] = class_map(logits, dataset.task_kind)[0].cpu().numpy()
        raw, _ = dataset.read(index)
        if dataset.task_kind == "multiclass":
            truth = batch.target[0]
        else:  # logits of ±1, so that the truth is read off as predictions are
            truth = class_map(2 * batch.target - 1, dataset.task_kind)[0]
        patches.append(
            PredictedPatch(
                picture=composite(next(iter(raw.values()))),
                truth=truth.cpu().numpy(),
                known=batch.valid[0].cpu().numpy(),
                predictions=predictions,
            )
        )
    return patches
