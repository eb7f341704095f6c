"""Pages of results, written from the tables beside them: no figure in them is typed."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from lsgs_core.methods import METHODS

AGREEMENT = "agreement.txt"  # the sentence of notebook 05 ...
NOT_COMPARED = "not compared with the committed results"  # ... and how it starts where it could not
PICTURES = {
    "data/{dataset}/scene.png": "The scene, its labels, and one fold",
    "evaluation/iou_per_scenario.png": "IoU per method and scenario",
    "evaluation/differences_worst_iou.png": "Differences to uniform in the worst scenario",
}
RANKS = (
    "Before fine-tuning: rank correlations with the IoU that is lost in every scenario but the full"
    " one, means over folds."
)
METRIC_TITLES = {
    "worst_iou": "worst scenario",
    "mean_iou": "mean over scenarios",
    "full_iou": "all modalities",
    "expected_iou": "expected in deployment",
}


def tier_page(folder: Path) -> str:
    """The page of a published tier, from its own tables.

    Args:
        folder: With provenance.json and the tables and figures of notebook 05 in `evaluation`.

    Returns:
        Markdown.
    """
    provenance = json.loads((folder / "provenance.json").read_text())
    environment = provenance["evaluation"]["environment"]
    tables = folder / "evaluation"
    summary = pd.read_csv(tables / "summary.csv")
    device = environment.get("processor", environment["machine"])
    if environment["device"] != "cpu":
        device = environment["device"]
    counts = ", ".join(
        f"{backbone} on {dataset}: {len(part['seed'].unique())}"
        for (dataset, backbone), part in summary.groupby(["dataset", "backbone"], sort=False)
    )
    lines = [
        f"# Results of `{provenance['command']}`",
        "",
        _prose(
            f"{device}, {environment['threads']} thread a run, PyTorch "
            f"{environment['packages']['torch']}, {environment['date'][:10]}; "
            f"[provenance.json](provenance.json) has every parameter. Number of seeds: {counts}."
        ),
        "",
    ]
    said = (tables / AGREEMENT).read_text().strip() if (tables / AGREEMENT).is_file() else ""
    if said and not said.startswith(NOT_COMPARED):
        lines += [_prose(f"Beside [ten further seeds](../reference/README.md): {said}."), ""]
    lines += [
        _prose(
            "IoU, averaged over the classes, on held-out blocks: mean and, in brackets, standard "
            "deviation over seeds. Worst scenario: the one that most seeds have."
        ),
        "",
        *_summary_table(summary),
        "",
    ]
    if (tables / "trivial.csv").is_file():
        trivial = pd.read_csv(tables / "trivial.csv").groupby("dataset", sort=False)["iou"].mean()
        said = ", ".join(f"{iou:.3f} on {dataset}" for dataset, iou in trivial.items())
        lines += [f"The predictor that says yes everywhere has {said}.", ""]
    for name, title in (
        ("planned_contrasts", "Contrasts that were fixed beforehand"),
        ("differences", "Every method against uniform"),
    ):
        if (tables / f"{name}.csv").is_file():
            lines += [f"## {title}", "", *_contrast_table(pd.read_csv(tables / f"{name}.csv")), ""]
    if (tables / "distortion_against_loss.csv").is_file():
        lines += ["## Does the distortion predict what a missing modality costs?", ""]
        lines += [_prose(RANKS), "", *_rank_table(tables / "distortion_against_loss.csv"), ""]
    for pattern, title in PICTURES.items():
        for dataset in summary["dataset"].unique():
            picture = pattern.format(dataset=dataset)
            if (folder / picture).is_file() and f"![{title}]({picture})" not in lines:
                lines += [f"![{title}]({picture})", ""]
    return "\n".join(lines)


def benchmark_page(folder: Path) -> str:
    """The page of the benchmark, from the tables of notebook A2.

    Args:
        folder: With ratios.csv, memory.csv and the record of the first.

    Returns:
        Markdown.
    """
    record = json.loads((folder / "ratios.csv.record.json").read_text())
    made_with, environment = record["parameters"], record["environment"]
    ratios = pd.read_csv(folder / "ratios.csv")
    memory = pd.read_csv(folder / "memory.csv")
    kinds = ["task", "backbone", "preset", "modalities", "size", "batch"]
    lines = [
        "# Results of `make bench`",
        "",
        _prose(
            f"{made_with['processor']}, {environment['threads']} threads, PyTorch "
            f"{environment['packages']['torch']}, {environment['date'][:10]}. Medians in seconds, "
            "the two forms measured in turns: *plain* is the form that defines the networks, "
            "*ours* what runs. Distortions, outputs and gradients are the same up to rounding."
        ),
        "",
        *_table(
            [*kinds, "plain, seconds", "ours, seconds", "times as fast"],
            (
                [*row[:6], f"{row.plain:.2f}", f"{row.ours:.2f}", f"{row.ratio:.1f}"]
                for row in ratios.itertuples(index=False)
            ),
        ),
        "",
        "Memory that a training step adds, in GB:",
        "",
        *_table(
            [*kinds, "plain", "ours", "ours of plain"],
            (
                [*row[:6], f"{row.plain:.1f}", f"{row.ours:.1f}", f"{row.ratio:.0%}"]
                for row in memory.itertuples(index=False)
            ),
        ),
        "",
        "![Where the time goes](speed_by_part.png)",
        "",
    ]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table."""
    body = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *body]


def _prose(text: str) -> str:
    """A paragraph in lines of at most 100 characters."""
    return "\n".join(textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False))


def _rank_table(path: Path) -> list[str]:
    lost = pd.read_csv(path).query("missing > 0")
    rows = []
    for (dataset, backbone), part in lost.groupby(["dataset", "backbone"], sort=False):
        folds = [fold for _, fold in part.groupby("fold")]
        ranks = [
            pd.Series([fold[by].corr(fold["lost"], method="spearman") for fold in folds]).mean()
            for by in ("distortion", "missing")
        ]
        rows.append([dataset, backbone, *(f"{rank:+.2f}" for rank in ranks)])
    return _table(["data set", "backbone", "with D", "with the number missing"], rows)


def _title(method: str) -> str:
    if method == "pretrained":
        return "before fine-tuning"
    return METHODS[method].title if method in METHODS else method


def _summary_table(summary: pd.DataFrame) -> list[str]:
    metrics = ["mean_iou", "worst_iou", "full_iou"]
    rows = []
    for (dataset, backbone, method), part in summary.groupby(
        ["dataset", "backbone", "method"], sort=False
    ):
        varies = len(part) > 1 and method != "pretrained"
        cells = [
            f"{part[metric].mean():.3f}" + (f" ({part[metric].std():.3f})" if varies else "")
            for metric in metrics
        ]
        worst = part["worst_scenario"].mode()[0]
        rows.append([dataset, backbone, _title(str(method)), cells[0], f"{cells[1]} {worst}"])
        rows[-1] += [cells[2]]
    head = ["data set", "backbone", "method", *(METRIC_TITLES[metric] for metric in metrics)]
    return _table(head, rows)


def _contrast_table(table: pd.DataFrame) -> list[str]:
    """Differences of IoU in the mean over scenarios and in the worst one."""
    shown = table[table["metric"].isin(["worst_iou", "mean_iou"])]
    name = "contrast" if "contrast" in shown else "method"
    head = ["data set", "backbone", "metric", name, "difference", "95 % interval", "p (Holm)"]
    rows = [
        [
            row["dataset"],
            row["backbone"],
            METRIC_TITLES[str(row["metric"])],
            row[name],
            f"{row['difference']:+.4f}",
            f"{row['low']:+.4f} to {row['high']:+.4f}",
            "" if pd.isna(row["p_holm"]) else f"{row['p_holm']:.3f}",
            row["replicates"],
        ]
        for row in shown.to_dict("records")
    ]
    return _table([*head, "replicates"], rows)
