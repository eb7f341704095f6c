"""The published tiers put together: every data set and backbone is a case of the same question."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lsgs_core.errors import InputError
from lsgs_core.scenarios import ScenarioSet
from study.artifacts import load_table, sidecar_path
from study.checkpoints import TrainedNetwork
from study.statistics import UNIFORM_ARMS, differences, pooled, sensor_values


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
        points = records[["dataset", "backbone"]].drop_duplicates()
        for dataset, backbone in points.itertuples(index=False, name=None):
            rows, own = (
                table[(table["dataset"] == dataset) & (table["backbone"] == backbone)]
                for table in (records, networks)
            )
            full = max(rows["scenario"].unique(), key=lambda name: name.count("+"))
            scenarios, iou = ScenarioSet.of(full.split("+")), float(trivial[dataset])
            cases.append(Case(dataset, backbone, scenarios, rows, own, iou))
    return cases


def differences_of_cases(
    cases: Sequence[Case], metrics: Sequence[str], resamples: int
) -> pd.DataFrame:
    """Return the differences of every method to uniform in every case; see `differences`."""
    tables = (differences(of.records, of.scenarios, metrics, resamples=resamples) for of in cases)
    return pd.concat(tables, ignore_index=True)


def pooled_differences(table: pd.DataFrame) -> pd.DataFrame:
    """Return the random-effects analysis of `differences_of_cases` where three are there."""
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

    Without records beside the weights, the table is empty.
    """
    path = network.weights.with_name("records.csv")
    if not sidecar_path(path).is_file():
        return pd.DataFrame()
    records = load_table(path).assign(method="network", seed=0)
    return sensor_values(records, network.scenarios, "network", empty=0.0)
