"""The published tiers put together: every data set and backbone is a case of the same question.

One of them is what part of p is signal: how far networks that differ by chance agree on it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
import pandas as pd

from lsgs_core.errors import InputError
from lsgs_core.probabilities import scenario_probabilities, total_variation
from lsgs_core.scenarios import ScenarioSet
from study.metrics.statistics import UNIFORM_ARMS, correlation, pooled, sensor_values
from study.training.checkpoints import TrainedNetwork

# Scores of a scenario that probabilities can be formed from, with their titles.
SCORES = {
    "distortion": "distortion of the latent (the paper)",
    "prediction_distortion": "distortion of the prediction",
    "missing": "number of missing modalities",
}


@dataclass(frozen=True)
class Case:
    """What notebook 05 wrote about one data set and backbone."""

    dataset: str
    backbone: str
    scenarios: ScenarioSet
    records: pd.DataFrame  # counts of pixels of every run on test blocks
    networks: pd.DataFrame  # scores and lost IoU of every scenario, by pretrained network
    trivial: float  # IoU of the predictor that says yes everywhere


def read_cases(results: Path, tiers: Sequence[str]) -> list[Case]:
    """Read the tables of published tiers. Raises `InputError` when one is not published."""
    cases = []
    for tier in tiers:
        folder = results / tier / "evaluation"
        if not folder.is_dir():
            raise InputError(f"{folder}: the folder is missing; run make study TIER={tier} first")
        records = pd.read_csv(folder / "records.csv.xz")
        networks = pd.read_csv(folder / "distortion_against_loss.csv")
        trivial = pd.read_csv(folder / "trivial.csv").groupby("dataset")["iou"].mean().to_dict()
        of_case = dict([*networks.groupby(["dataset", "backbone"])])
        for (dataset, backbone), rows in records.groupby(["dataset", "backbone"], sort=False):
            own = of_case[dataset, backbone]
            full = max(rows["scenario"].unique(), key=lambda name: name.count("+"))
            scenarios, iou = ScenarioSet.of(full.split("+")), float(trivial[dataset])
            cases.append(Case(str(dataset), str(backbone), scenarios, rows, own, iou))
    return cases


def pooled_differences(table: pd.DataFrame) -> pd.DataFrame:
    """Return the random-effects analysis of `differences` where three cases are there."""
    rows = []
    for (metric, method), cases in table.groupby(["metric", "method"], sort=False):
        if len(cases) > 2:
            effects = pooled(cases["difference"].tolist(), cases["standard_error"].tolist())
            rows.append({"metric": metric, "method": method, **effects})
    return pd.DataFrame(rows)


def worth_of_sensors(cases: Sequence[Case], resamples: int) -> pd.DataFrame:
    """Return what each sensor is worth in every case, after fine-tuning with uniform scenarios."""
    tables = []
    for case in cases:
        method = UNIFORM_ARMS[0]
        table = sensor_values(case.records, case.scenarios, method, case.trivial, resamples)
        tables.append(table.assign(dataset=case.dataset, backbone=case.backbone))
    return pd.concat(tables, ignore_index=True)


def worth_to_network(network: TrainedNetwork) -> pd.DataFrame:
    """Return `sensor_values` of one network from its records, with an IoU of 0 for no map at all.

    Records hold no true negatives, so that the IoU of the trivial predictor, from which
    `worth_of_sensors` starts, is not known. Without counts beside the weights, the table is empty.
    """
    if (records := network.records()) is None or "tp" not in records:
        return pd.DataFrame()
    records = records.assign(method="network", seed=0)
    return sensor_values(records, network.scenarios, "network", empty=0.0)


def stability(table: pd.DataFrame) -> pd.DataFrame:
    """Compare the probabilities of networks that differ in the seed of their pretraining alone.

    Args:
        table: One row per network and scenario: dataset, backbone, fold, network, scenario,
            missing, the scores, and lost (IoU with all modalities minus that of the scenario on
            test blocks). Every fold has at least two networks, or `InputError` is raised.

    Returns:
        One row per data set, backbone and score, with means over folds: the total variation
        `between` p of two networks, and of p `to_uniform`; the correlation between p of two
        networks `within` a number of missing modalities, whose mean is taken off; the variance over
        scenarios of the mean p, as a share of the mean variance of p (`common`); the rank
        correlation of the score with the IoU that its own network lost (`rank`) and that others
        lost (`rank_others`), and the correlation with that within a number of missing modalities
        (`within_others`). That number itself is the same for all networks: only its ranks matter.
    """
    rows = []
    for (dataset, backbone), part in table.groupby(["dataset", "backbone"], sort=False):
        for score in [name for name in SCORES if name in part]:
            folds = [_of_fold(fold, score) for _, fold in part.groupby("fold")]
            means = pd.DataFrame(folds).mean().to_dict()
            rows.append({"dataset": dataset, "backbone": backbone, "score": score, **means})
    return pd.DataFrame(rows)


def _of_fold(rows: pd.DataFrame, score: str) -> dict[str, float]:
    """Return the numbers of one fold; every table below is [networks, scenarios]."""
    scores, lost, missing = (
        rows.pivot_table(name, index="network", columns="scenario").to_numpy(dtype=float)
        for name in (score, "lost", "missing")
    )
    if len(scores) < 2:
        raise InputError("stability: expected at least two networks of every fold, found one")
    p = np.array([scenario_probabilities(values).probabilities for values in scores])
    groups, degraded = missing[0], missing[0] > 0  # the full scenario loses nothing by definition
    tables = [pd.DataFrame(values.T) for values in (p, scores, lost)]
    inner, inner_scores, inner_lost = (  # without the mean of every number of missing modalities
        (table - table.groupby(groups).transform("mean")).to_numpy().T for table in tables
    )
    scores, lost = scores[:, degraded], lost[:, degraded]
    pairs = [*permutations(range(len(p)), 2)]
    uniform = np.full(p.shape[1], 1 / p.shape[1])
    numbers: dict[str, Iterable[float]] = {
        "between": (total_variation(p[i], p[j]) for i, j in pairs),
        "to_uniform": (total_variation(values, uniform) for values in p),
        "within": (correlation(inner[i], inner[j]) for i, j in pairs),
        "common": [p.mean(axis=0).var() / p.var(axis=1).mean()],
        "rank": (correlation(*pair, "spearman") for pair in zip(scores, lost, strict=True)),
        "rank_others": (correlation(scores[i], lost[j], "spearman") for i, j in pairs),
        "within_others": (correlation(inner_scores[i], inner_lost[j]) for i, j in pairs),
    }
    return {name: float(pd.Series([*values]).mean()) for name, values in numbers.items()}
