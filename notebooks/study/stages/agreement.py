"""Compare a run with the committed results: what must be equal, and what may vary.

With the same pretrained networks, distortions, probabilities and pretrained IoUs are deterministic:
another processor changes them at rounding level only. Fine-tuning amplifies rounding as it does a
change of seed, so a fine-tuned IoU is compared with the range of further seeds.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats

from lsgs_core.errors import InputError, real_numbers
from study.provenance.schema import read_json
from study.stages.tiers import NOTEBOOKS, StudyFolder, Tier

AGREEMENT = "agreement.txt"  # the sentence of notebook 05 ...
NOT_COMPARED = "not compared with the committed results"  # ... which may start like this
# Largest differences due to rounding in float32: of D (relative), of p, and of an IoU.
DISTORTION, PROBABILITY, IOU = 1e-4, 1e-4, 1e-3
METRICS = ("mean_iou", "worst_iou", "full_iou")
CONFIDENCE = 0.95  # that all fine-tuned metrics together lie within their ranges
# Entries of a scoring that decide its numbers, besides the network and the data.
DECISIVE = [
    *("scenario_names", "mask_array", "alpha", "tau", "gamma_floor", "lambda"),
    *("smooth", "lengthscale", "descriptor", "prior"),
]
# Parameters of a tier that change no number that is compared.
INDIFFERENT = {"manifest", "downloads", "raw", "shown_fold", "workers", "device", "threads"}
INDIFFERENT |= {"keep_weights", "explored", "reference", "primary_metric", "contrasts"}
INDIFFERENT |= {"resamples", "shown_patches", "damaged_patches", "predictions"}
# Values of parameters that committed results may lack because they are older.
BEFORE = {"processes": 1, "scenario_budget": 0, "tested_on": "test"}


def scoring_difference(here: Path, committed: Path) -> tuple[float, float]:
    """Return the largest differences of D, relative to the committed D, and of p of two scorings.

    Raises `InputError` where a file is no scoring, or scenarios, settings or patches differ.
    """
    first, second = _scoring(here), _scoring(committed)
    for name in DECISIVE:
        if first.get(name) != second.get(name):
            raise InputError(f"{here}: {name} is {first.get(name)}, {second.get(name)} committed")
    counts = [content["meta_info"].get("num_scored") for content in (first, second)]
    if counts[0] != counts[1]:
        raise InputError(f"{here}: {counts[0]} patches were scored, {counts[1]} committed")
    shape = [len(second["D_sh"])]
    d, p = (
        [real_numbers(f"{here}: {name}", content[name], shape) for content in (first, second)]
        for name in ("D_sh", "final_probs")
    )
    measured = d[1] > 0  # D of the full scenario is 0
    relative = np.abs(d[0] - d[1])[measured] / d[1][measured]
    return float(relative.max(initial=0)), float(np.abs(p[0] - p[1]).max())


def scoring_sentence(here: Path, committed: Path) -> str:
    """Say in a sentence how far a scoring is from the committed one of the same network."""
    if not committed.is_file():
        return f"{NOT_COMPARED}, which have no such scoring"
    try:
        first, second = (_scoring(path)["meta_info"] for path in (here, committed))
        if first.get("weights_sha256") != second.get("weights_sha256"):
            return f"{NOT_COMPARED}: those are of another network"
        d, p = scoring_difference(here, committed)
    except InputError as error:
        return f"{NOT_COMPARED}: {error}"
    equal = d <= DISTORTION and p <= PROBABILITY
    return (
        f"{'equal to' if equal else 'DIFFERENT from'} the committed scoring: D differs by up to "
        f"{d:.1e} of itself (allowed: {DISTORTION:.0e}), p by up to {p:.1e} ({PROBABILITY:.0e})"
    )


def why_not_compared(tier: Tier, reference: Path) -> str:
    """Say why a tier cannot be compared with the folder of a published one; "" if it can."""
    try:
        provenance = read_json(reference / "provenance.json")
        made_with, grid = provenance["parameters"], provenance["grid"]
    except (InputError, KeyError, TypeError) as error:
        return f"{reference}: no published results: {error}"
    if not {name for part in grid for name in part["datasets"]} & {*tier.datasets}:
        return f"they have no run of {', '.join(tier.datasets)}"
    for notebook in NOTEBOOKS.values():
        for name, value in tier.sections[notebook].items():
            committed = made_with.get(notebook, {}).get(name, BEFORE.get(name))
            if name not in INDIFFERENT and value != committed:
                return f"{notebook}: {name} is {value!r} here and {committed!r} there"
    return ""


def compared_with_committed(
    summary: pd.DataFrame, by_scenario: pd.DataFrame, tier: Tier | None, work: Path, reference: str
) -> tuple[pd.DataFrame, str]:
    """Compare a run with committed results of the same settings and other seeds.

    Args:
        summary: Table of `evaluation.summary` per dataset, backbone, method and seed.
        by_scenario: The columns dataset, backbone, method, scenario and iou.
        tier: Tier of this run; None if notebooks were run one by one.
        work: Folder of the tier.
        reference: Folder of the published tier; "" for none.

    Returns:
        A table and a sentence that says what the comparison gave, or why the table is empty. It has
        one row per comparison that both sides allow: part ("distortion", "probabilities",
        "pretrained IoU", "fine-tuned"), dataset, backbone, method, metric, here, low, high, agrees.
        In the first three parts, `here` is the largest difference and `high` what rounding allows.
        For a fine-tuned metric, low and high are the ends of a prediction interval for one more
        seed (normal, from the committed seeds, on the same blocks), which hold for all rows
        together with a probability of `CONFIDENCE` (Bonferroni).
    """
    if not reference or tier is None:
        return pd.DataFrame(), f"{NOT_COMPARED}: {'no reference' if tier else 'no tier'} is named"
    committed = Path(reference)
    if reason := why_not_compared(tier, committed):
        return pd.DataFrame(), f"{NOT_COMPARED}: {reason}"
    keys = ["dataset", "backbone"]
    rows: list[list[Any]] = []
    for network in tier.networks():
        own, theirs = (
            StudyFolder(root).scores(*network) / "probabilities.json" for root in (work, committed)
        )
        if not theirs.is_file():
            continue
        try:
            d, p = scoring_difference(own, theirs)
        except InputError:  # the settings of the tiers are equal, so the data differ
            d = p = np.inf
        place = *network[:2], "pretrained"
        rows.append(["distortion", *place, "D", d, 0.0, DISTORTION])
        rows.append(["probabilities", *place, "p", p, 0.0, PROBABILITY])
    tables = [by_scenario, pd.read_csv(committed / "evaluation" / "iou_per_scenario.csv")]
    pretrained = [table[table["method"] == "pretrained"] for table in tables]
    both = pretrained[0].merge(pretrained[1], on=[*keys, "scenario"])
    both["difference"] = (both["iou_x"] - both["iou_y"]).abs()
    largest = both.groupby(keys, as_index=False)["difference"].max()
    for dataset, backbone, value in largest.itertuples(index=False, name=None):
        place = dataset, backbone, "pretrained"
        rows.append(["pretrained IoU", *place, "IoU of every scenario", value, 0.0, IOU])
    fine_tuned = _fine_tuned(summary, pd.read_csv(committed / "evaluation" / "summary.csv"))
    columns = ["part", *keys, "method", "metric", "here", "low", "high"]
    table = pd.DataFrame([*rows, *fine_tuned[columns].to_numpy().tolist()], columns=columns)
    table = table.assign(agrees=table["here"].between(table["low"], table["high"]))
    return table, _sentence(table)


def _scoring(path: Path) -> dict[str, Any]:
    """Return the content of a probabilities.json of this study."""
    content = read_json(path)
    fields = content if isinstance(content, dict) else {}
    found = [type(fields.get(name)) for name in ("D_sh", "final_probs", "meta_info")]
    if found == [list, list, dict]:
        return fields
    raise InputError(f"{path}: expected a scoring with D_sh, final_probs and meta_info")


def _fine_tuned(summary: pd.DataFrame, committed: pd.DataFrame) -> pd.DataFrame:
    """Compare the metrics of fine-tuned methods with the ranges of further seeds."""
    keys = ["dataset", "backbone", "method"]
    fine_tuned = committed[committed["method"] != "pretrained"]
    seeds = fine_tuned.melt(keys, METRICS, "metric", "committed")
    ranges = seeds.groupby([*keys, "metric"])["committed"].agg(["mean", "std", "count"])
    ranges = ranges[ranges["count"] > 1]  # one seed shows no range
    rows = summary[[*keys, *METRICS]].reset_index()
    here = rows.melt(["index", *keys], METRICS, "metric", "here")
    table = here.sort_values("index", kind="stable").join(ranges, [*keys, "metric"], how="inner")
    chance = (1 - CONFIDENCE) / max(1, len(table))
    quantile = scipy.stats.t.ppf(1 - chance / 2, table["count"] - 1)
    reach = quantile * table["std"] * np.sqrt(1 + 1 / table["count"])
    return table.assign(part="fine-tuned", low=table["mean"] - reach, high=table["mean"] + reach)


def _sentence(table: pd.DataFrame) -> str:
    """Say in a sentence what the comparison gave."""
    if table.empty:
        return f"{NOT_COMPARED}: they have no run of these data sets and backbones"
    clauses = []
    for part, rows in table.groupby("part", sort=False):
        if part == "fine-tuned":
            agreeing = f"{rows['agrees'].sum()} of {len(rows)}"
            clauses.append(f"fine-tuned: {agreeing} within the committed range")
        else:
            digits = " to 4 digits" if part == "probabilities" else ""
            verdict = f"equal{digits}" if rows["agrees"].all() else "DIFFERENT"
            clauses.append(f"{part}: {verdict} (largest difference {rows['here'].max():.1e})")
    return "; ".join(clauses)
