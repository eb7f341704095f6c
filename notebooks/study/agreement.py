"""A run at hand beside the committed results: what has to be equal, and what may vary.

From the same pretrained networks distortions, probabilities and pretrained IoUs are deterministic:
another processor rounds otherwise, and that is all. Fine-tuning amplifies rounding as it does a
seed, so a fine-tuned IoU is compared with what further seeds give.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats

from lsgs_core.errors import InputError
from study.pages import NOT_COMPARED
from study.tiers import NOTEBOOKS, Tier

# Largest differences that rounding makes in float32: of D relative to itself, of p, and of an IoU.
DISTORTION, PROBABILITY, IOU = 1e-4, 1e-4, 1e-3
METRICS = ("mean_iou", "worst_iou", "full_iou")
CONFIDENCE = 0.95  # that all fine-tuned figures together lie within their ranges
# Of a scoring: what decides its numbers, besides the network and the data.
DECISIVE = [
    *("scenario_names", "mask_array", "alpha", "tau", "gamma_floor", "lambda"),
    *("smooth", "lengthscale", "descriptor", "prior"),
]
# Parameters of a tier that change no figure that is compared.
INDIFFERENT = {"manifest", "downloads", "raw", "shown_fold", "workers", "device", "threads"}
INDIFFERENT |= {"keep_weights", "explored", "reference", "primary_metric", "contrasts"}
INDIFFERENT |= {"resamples", "shown_patches"}


def scoring_difference(here: Path, committed: Path) -> tuple[float, float]:
    """How far a scoring is from the committed one of the same settings.

    Args:
        here: A probabilities.json.
        committed: Another.

    Returns:
        The largest difference of D, relative to the committed D, and that of p.

    Raises:
        InputError: A file that is no scoring, or other scenarios, settings or numbers of patches.
    """
    first, second = (_scoring(path) for path in (here, committed))
    for name in DECISIVE:
        if first.get(name) != second.get(name):
            raise InputError(f"{here}: {name} is {first.get(name)}, {second.get(name)} committed")
    counts = [content["meta_info"].get("num_scored") for content in (first, second)]
    if counts[0] != counts[1]:
        raise InputError(f"{here}: {counts[0]} patches were scored, {counts[1]} committed")
    d, p = (
        np.array([content[name] for content in (first, second)], dtype=np.float64)
        for name in ("D_sh", "final_probs")
    )
    measured = d[1] > 0  # D of the full scenario is 0
    relative = np.abs(d[0] - d[1])[measured] / d[1][measured]
    return float(relative.max(initial=0)), float(np.abs(p[0] - p[1]).max())


def scoring_sentence(here: Path, committed: Path) -> str:
    """Say in a sentence how far a scoring is from the committed one of the same network."""
    if not committed.is_file():
        return f"{NOT_COMPARED}, which have no such scoring"
    networks = [_scoring(path)["meta_info"].get("weights_sha256") for path in (here, committed)]
    if networks[0] != networks[1]:
        return f"{NOT_COMPARED}: those are of another network"
    try:
        d, p = scoring_difference(here, committed)
    except InputError as error:
        return f"{NOT_COMPARED}: {error}"
    equal = d <= DISTORTION and p <= PROBABILITY
    return (
        f"{'equal to' if equal else 'DIFFERENT from'} the committed scoring: D differs by up to "
        f"{d:.1e} of itself (allowed: {DISTORTION:.0e}), p by up to {p:.1e} ({PROBABILITY:.0e})"
    )


def why_not_compared(tier: Tier, reference: Path) -> str:
    """Why a tier cannot be set against committed results; "" where it can.

    Args:
        tier: Of the run at hand.
        reference: Folder of a published tier.
    """
    try:
        made_with = json.loads((reference / "provenance.json").read_text())["parameters"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{reference}: no published results: {error}"
    for notebook in NOTEBOOKS.values():
        for name, value in tier.sections[notebook].items():
            committed = made_with.get(notebook, {}).get(name)
            if name not in INDIFFERENT and value != committed:
                return f"{notebook}: {name} is {value!r} here and {committed!r} there"
    return ""


def compared_with_committed(
    whole: pd.DataFrame, by_scenario: pd.DataFrame, tier: Tier | None, work: Path, reference: str
) -> tuple[pd.DataFrame, str]:
    """Set a run beside committed results, and say in a sentence what was found.

    Args:
        whole: As in `compare_with_committed`, like `by_scenario` and `work`.
        by_scenario: Likewise.
        tier: Of the run at hand; None where notebooks were run one by one.
        work: Folder of the tier.
        reference: Folder of the published tier; "" compares with nothing.

    Returns:
        The table of `compare_with_committed`, empty where nothing can be compared, and the
        sentence, which then says why.
    """
    if not reference or tier is None:
        return pd.DataFrame(), f"{NOT_COMPARED}: {'no reference' if tier else 'no tier'} is named"
    if reason := why_not_compared(tier, Path(reference)):
        return pd.DataFrame(), f"{NOT_COMPARED}: {reason}"
    table = compare_with_committed(whole, by_scenario, tier, work, Path(reference))
    return table, agreement_sentence(table)


def compare_with_committed(
    whole: pd.DataFrame, by_scenario: pd.DataFrame, tier: Tier, work: Path, reference: Path
) -> pd.DataFrame:
    """Set a run against committed results of the same tier settings and other seeds.

    Args:
        whole: Figures per dataset, backbone, method and seed, as `evaluation.summary` gives them.
        by_scenario: dataset, backbone, method, scenario, iou.
        tier: Of the run at hand.
        work: Its folder.
        reference: Folder of the published tier.

    Returns:
        One row per comparison that both sides allow: part ("distortion", "probabilities",
        "pretrained IoU", "fine-tuned"), dataset, backbone, method, metric, here, low, high and
        agrees. Of the first three parts `here` is the largest difference and `high` what rounding
        may make of it. Of a fine-tuned figure, low and high are the ends of prediction intervals
        for one more seed (normal, from the committed seeds; the blocks are the same in both), which
        hold for all rows together with a probability of `CONFIDENCE` (Bonferroni).
    """
    keys = ["dataset", "backbone"]
    known = pd.read_csv(reference / "evaluation" / "summary.csv")
    fixed: list[dict[str, Any]] = []
    for dataset, backbone, fold in tier.grid.starts():
        place = Path("scores", dataset, backbone, f"fold{fold}", f"seed{tier.pretraining_seed}")
        committed = reference / place / "probabilities.json"
        if not committed.is_file():
            continue
        try:
            found = scoring_difference(work / place / "probabilities.json", committed)
        except InputError:  # the tiers' settings are the same, so these are other data
            found = np.inf, np.inf
        row = {"dataset": dataset, "backbone": backbone, "method": "pretrained", "low": 0.0}
        fixed += [
            {**row, "part": "distortion", "metric": "D", "here": found[0], "high": DISTORTION},
            {**row, "part": "probabilities", "metric": "p", "here": found[1], "high": PROBABILITY},
        ]
    pretrained = [
        table[table["method"] == "pretrained"]
        for table in (by_scenario, pd.read_csv(reference / "evaluation" / "iou_per_scenario.csv"))
    ]
    both = pretrained[0].merge(pretrained[1], on=[*keys, "method", "scenario"])
    largest = both.assign(difference=(both["iou_x"] - both["iou_y"]).abs()).groupby(keys)
    for dataset, backbone, difference in largest["difference"].max().reset_index().to_numpy():
        row = {"dataset": dataset, "backbone": backbone, "method": "pretrained", "low": 0.0}
        row |= {"metric": "IoU of every scenario", "here": difference, "high": IOU}
        fixed.append({**row, "part": "pretrained IoU"})
    rows = [*fixed, *_fine_tuned(whole, known)]
    columns = ["part", *keys, "method", "metric", "here", "low", "high"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(agrees=table["here"].between(table["low"], table["high"]))


def _scoring(path: Path) -> dict[str, Any]:
    """The content of a probabilities.json of this study."""
    try:
        content = json.loads(path.read_text())
        if {"D_sh", "final_probs", "meta_info"} <= content.keys():
            return content
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: expected the JSON of a scoring: {error}") from error
    raise InputError(f"{path}: expected the JSON of a scoring, with D_sh and final_probs")


def _fine_tuned(whole: pd.DataFrame, known: pd.DataFrame) -> list[dict[str, Any]]:
    """Figures of the fine-tuned arms, each with the range that further seeds predict for it."""
    keys = ["dataset", "backbone", "method"]
    seeds = known[known["method"] != "pretrained"].groupby(keys)
    ranges = seeds[list(METRICS)].agg(["mean", "std", "count"])
    here = [
        (tuple(row), row, metric)
        for row in whole[[*keys, *METRICS]].itertuples(index=False)
        for metric in METRICS
    ]
    compared = [(part[:3], row, metric) for part, row, metric in here if part[:3] in ranges.index]
    rows = []
    for point, row, metric in compared:
        mean, deviation, count = ranges.loc[point, metric]
        chance = (1 - CONFIDENCE) / len(compared)
        quantile = scipy.stats.t.ppf(1 - chance / 2, count - 1) if count > 1 else np.inf
        reach = quantile * deviation * np.sqrt(1 + 1 / count)
        ends = {"low": mean - reach, "high": mean + reach}
        rows.append(
            {**dict(zip(keys, point, strict=True)), "part": "fine-tuned", "metric": metric}
            | {"here": getattr(row, metric), **ends}
        )
    return rows


def agreement_sentence(table: pd.DataFrame) -> str:
    """What `compare_with_committed` found, in one sentence."""
    if table.empty:
        return f"{NOT_COMPARED}: they have no run of these data sets and backbones"
    said = []
    parts = {str(name): rows for name, rows in table.groupby("part", sort=False)}
    for name in ("distortion", "probabilities", "pretrained IoU"):
        if name in parts:
            largest, equal = parts[name]["here"].max(), bool(parts[name]["agrees"].all())
            digits = " to 4 digits" if name == "probabilities" else ""
            verdict = f"equal{digits}" if equal else "DIFFERENT"
            said.append(f"{name}: {verdict} (largest difference {largest:.1e})")
    if "fine-tuned" in parts:
        agrees = parts["fine-tuned"]["agrees"]
        said.append(f"fine-tuned: {agrees.sum()} of {len(agrees)} within the committed range")
    return "; ".join(said)
