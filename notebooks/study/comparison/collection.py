"""All runs of a grid put together, as notebook 05 compares them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from lsgs_core.distributions import read_failure_rates
from lsgs_core.errors import InputError
from lsgs_core.scenarios import ScenarioSet
from study.data.manifest import load_manifest
from study.data.patches import PatchDataset
from study.metrics.evaluation import AlwaysPositive, class_scores, evaluate, scenario_scores
from study.metrics.statistics import whole_replicates
from study.provenance.artifacts import Record, load_table
from study.provenance.devices import choose_device, make_deterministic
from study.stages.parameters import checked_parameters
from study.stages.tiers import READ_AGAIN, StudyFolder, Tier, load_tier, network_seed

NETWORK = ["dataset", "backbone", "fold", "network"]
RUN = ["dataset", "backbone", "fold", "seed", "method"]


@dataclass(frozen=True)
class Collected:
    """The runs of a grid with what they were tested on."""

    study: StudyFolder
    tier: Tier | None  # None if notebooks were run one by one
    # methods of (dataset, backbone, fold, seed)
    points: Mapping[tuple[str, str, int, int], Sequence[str]]
    tests: Mapping[tuple[str, int], PatchDataset]  # patches of every (dataset, fold) tested on
    scenarios: ScenarioSet
    prior: NDArray[np.float64] | None  # of each scenario in deployment, [K]; None is uniform
    records: pd.DataFrame  # of whole replicates, see `collect`
    before: pd.DataFrame  # those of the pretrained networks, on test blocks whatever runs had
    histories: pd.DataFrame  # learning curves, likewise
    left_out: int  # number of rows of replicates that lack folds
    parameters: Mapping[str, Any]  # of the notebook
    record: Record  # what the results are made with
    device: torch.device  # where networks compute

    def trivial(self) -> pd.DataFrame:
        """Return the IoU of the predictor that says yes everywhere, by data set and class."""
        protocol, size = self.parameters["protocol"], self.parameters["batch_size"]
        counted = []
        for (dataset, _), test in self.tests.items():
            of_test = test.batches(size), self.scenarios, test.classes
            # Whatever the task: the likeliest class, of a multiclass one, would be the first.
            records = evaluate(AlwaysPositive(len(test.classes)), *of_test, "multilabel", protocol)
            counted.append(records.assign(dataset=dataset))
        return class_scores(pd.concat(counted), ["dataset"])

    def scores(self) -> pd.DataFrame:
        """Return distortions and probabilities of every network and scenario."""
        seed = self.parameters["pretraining_seed"]
        networks = dict.fromkeys((*run[:3], network_seed(seed, run[3])) for run in self.points)
        tables = {one: load_table(self.study.scores(*one) / "distortion.csv") for one in networks}
        return pd.concat(tables, names=NETWORK).reset_index(NETWORK).reset_index(drop=True)

    def lost(self, scores: pd.DataFrame) -> pd.DataFrame:
        """Add to `scores` what each network lost in each scenario before fine-tuning, in IoU."""
        seed = self.parameters["pretraining_seed"]
        network = self.before["seed"].map(lambda own: network_seed(seed, own))
        before = scenario_scores(self.before.assign(network=network), NETWORK)
        full = before[before["scenario"] == self.scenarios.names[self.scenarios.full]]
        before = before.merge(full, on=NETWORK, suffixes=("", "_full"))
        before["lost"] = before["iou_full"] - before["iou"]
        columns = [*NETWORK, "scenario"]
        return scores.merge(before[[*columns, "lost"]], on=columns)


def open_grid(notebook: Mapping[str, Any]) -> Collected:
    """Open all runs of a tier, or all that are there, from `globals()` of notebook 05."""
    parameters = checked_parameters("05_evaluation", notebook)
    make_deterministic(parameters["threads"])
    device = choose_device(parameters["device"])
    study = StudyFolder(Path(parameters["work"]))
    tier = load_tier(parameters["tier"], Path("..")) if parameters["tier"] else None
    points = tier.points() if tier else study.points()
    known, limit = load_manifest(Path(parameters["manifest"])), parameters["evaluation_patches"]
    task, normalisation = parameters["task"], parameters["normalisation"]
    tests, tested_on = {}, parameters["tested_on"]
    for dataset, fold in sorted({(dataset, fold) for dataset, _, fold, _ in points}):
        source = study.prepared(dataset), known.dataset(dataset), task, fold
        tests[dataset, fold] = PatchDataset(*source, tested_on, normalisation, limit or None)
    if not tests:
        raise InputError(f"{study.root}/runs: no run is there; has notebook 04 been run?")
    scenarios = ScenarioSet.of(next(iter(tests.values())).modalities)
    common = {name: parameters[name] for name in READ_AGAIN}
    expected = {
        dataset: {**common, "dataset": dataset, "data_sha256": test.data_sha256}
        for (dataset, _), test in tests.items()
    }
    names = ["tier", "pretraining_seed", "protocol", "failure_rates", "primary_metric"]
    names += ["contrasts", "resamples", "threads"]
    made_with = common | {name: parameters[name] for name in names}
    made_with["tier_sha256"] = tier.sha256 if tier else ""
    found = collect(study, points, "records.csv", expected, parameters["pretraining_seed"])
    records = whole_replicates(found)
    pretrained = records["method"] == "pretrained"
    compared = records if tested_on == "test" else records[~pretrained]
    return Collected(
        study, tier, points, tests, scenarios,
        read_failure_rates(parameters["failure_rates"], scenarios), compared, records[pretrained],
        whole_replicates(collect(study, points, "history.csv", expected)),
        len(found) - len(records), parameters, Record(made_with, device=str(device)), device,
    )  # fmt: skip


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
        points: Methods of every (dataset, backbone, fold, seed).
        name: Name of the table in the folder of a run.
        expected: Parameters that every run of a data set must have been made with.
        pretraining_seed: Also read the table of the pretrained network, as method "pretrained", for
            every seed that started from it (see `network_seed`); None: do not.
    """
    tables = {}
    for (dataset, backbone, fold, seed), methods in points.items():
        folder, paths = study.runs(dataset, backbone, fold, seed), {}
        if pretraining_seed is not None:
            network = network_seed(pretraining_seed, seed)
            paths["pretrained"] = study.pretrained(dataset, backbone, fold, network)
        paths |= {method: folder / method for method in methods}
        for method, path in paths.items():
            made_with = {**expected[dataset], "fold": fold}
            if method == "pretrained":  # whose network is always tested on test blocks
                del made_with["tested_on"]
            point = dataset, backbone, fold, seed, method
            tables[point] = load_table(path / name, made_with)
    return pd.concat(tables, names=RUN).reset_index(RUN).reset_index(drop=True)
