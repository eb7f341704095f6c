"""Pages of results, written from the tables beside them, so that no number in them is typed."""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from study.metrics.statistics import METRICS, method_title, rank_correlation
from study.provenance.schema import read_json
from study.stages.agreement import AGREEMENT, NOT_COMPARED
from study.stages.agreement import METRICS as SUMMARISED

PICTURES = {
    "data/{dataset}/scene.png": "The scene, its labels, and one fold",
    "evaluation/iou_per_scenario.png": "IoU per method and scenario",
    "evaluation/differences_worst_iou.png": "Differences to uniform in the worst scenario",
}


def tier_page(folder: Path) -> str:
    """Return the page of a published tier in Markdown, from provenance.json and `evaluation`."""
    provenance = read_json(folder / "provenance.json")
    environment = provenance["evaluation"]["environment"]
    tables = folder / "evaluation"
    summary = pd.read_csv(tables / "summary.csv")
    device = environment["device"]
    if device == "cpu":
        device = environment.get("processor", environment["machine"])
    counts = ", ".join(
        f"{backbone} on {dataset}: {part['seed'].nunique()}"
        for (dataset, backbone), part in summary.groupby(["dataset", "backbone"], sort=False)
    )
    lines = [f"# Results of `{provenance['command']}`", ""]
    lines += _prose(
        f"{device}, {environment['threads']} thread a run, PyTorch "
        f"{environment['packages']['torch']}, {environment['date'][:10]}; "
        f"[provenance.json](provenance.json) has every parameter. Number of seeds: {counts}."
    )
    if (tables / AGREEMENT).is_file():
        agreement = (tables / AGREEMENT).read_text().strip()
        if agreement and not agreement.startswith(NOT_COMPARED):
            lines += _prose(f"Beside [ten further seeds](../reference/README.md): {agreement}.")
    finetuning = provenance["parameters"]["04_finetuning"]
    if finetuning["pretraining_seed"] >= 0:
        lines += _prose(
            "All seeds of a fold fine-tune the same pretrained network: intervals and p-values "
            "hold for that network, and say nothing about another one."
        )
    tested_on = finetuning["tested_on"]
    blocks = "held-out blocks" if tested_on == "test" else f"{tested_on} blocks"
    lines += _prose(
        f"IoU, averaged over the classes, on {blocks}: mean and, in brackets, standard deviation "
        "over seeds. The scenario named is the worst one for most seeds."
    )
    lines += _summary_table(summary)
    if (tables / "trivial.csv").is_file():
        trivial = pd.read_csv(tables / "trivial.csv").groupby("dataset", sort=False)["iou"].mean()
        scores = ", ".join(f"{iou:.3f} on {dataset}" for dataset, iou in trivial.items())
        lines += _prose(
            f"A predictor that marks every pixel as every class has an IoU of {scores}."
        )
    for name, title in (
        ("planned_contrasts", "Contrasts that were fixed beforehand"),
        ("differences", "Every method against uniform"),
    ):
        if (tables / f"{name}.csv").is_file():
            lines += [f"## {title}", "", *_contrast_table(pd.read_csv(tables / f"{name}.csv"))]
    if (tables / "distortion_against_loss.csv").is_file():
        lines += ["## Does the distortion predict what a missing modality costs?", ""]
        lines += _prose(
            "Before fine-tuning: rank correlations with the IoU that is lost in every scenario but "
            "the full one, means over folds."
        )
        lines += _rank_table(pd.read_csv(tables / "distortion_against_loss.csv"))
    for pattern, title in PICTURES.items():
        for picture in dict.fromkeys(pattern.format(dataset=d) for d in summary["dataset"]):
            if (folder / picture).is_file():
                lines += [f"![{title}]({picture})", ""]
    return "\n".join(lines)


def benchmark_page(folder: Path) -> str:
    """Return the page of the benchmark in Markdown, from three tables of A2."""
    record = read_json(folder / "ratios.csv.record.json")
    environment = record["environment"]
    on_gpu = environment["device"] != "cpu"
    measured = environment["device"] if on_gpu else record["parameters"]["processor"]
    ratios = pd.read_csv(folder / "ratios.csv").itertuples(index=False)
    memory = pd.read_csv(folder / "memory.csv").itertuples(index=False)
    times = pd.read_csv(folder / "time_to_probabilities.csv").round(3)
    case = ["task", "backbone", "preset", "modalities", "size", "batch"]
    lines = _prose(
        f"{measured}, threads: {environment['threads']}, PyTorch "
        f"{environment['packages']['torch']}, {environment['date'][:10]}. Medians in seconds, "
        "the two forms measured in turns: *plain* is the published form, *ours* the faster "
        "one that is used. Distortions, outputs and gradients are the same up to rounding."
    )
    lines += [f"Hours until p is known, for {record['parameters']['patches']} patches:", ""]
    lines += _table([*times], times.itertuples(index=False))
    lines += _table(
        [*case, "plain, seconds", "ours, seconds", "times as fast"],
        ([*r[:6], f"{r.plain:.2f}", f"{r.ours:.2f}", f"{r.ratio:.1f}"] for r in ratios),
    )
    memory_of = "memory of a GPU" if on_gpu else "resident memory of a process"
    lines += [f"Largest {memory_of} that trains, in GB:", ""]
    lines += _table(
        [*case, "plain", "ours", "ours of plain"],
        ([*r[:6], f"{r.plain:.1f}", f"{r.ours:.1f}", f"{r.ratio:.0%}"] for r in memory),
    )
    ending = ["![Where the time goes](speed_by_part.png)", ""]
    return "\n".join(["# Results of `make bench`", "", *lines, *ending])


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Return the lines of a Markdown table, and an empty one."""
    body = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *body, ""]


def _prose(text: str) -> list[str]:
    """Return a paragraph in lines of at most 100 characters, and an empty one."""
    return [*textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False), ""]


def _rank_table(table: pd.DataFrame) -> list[str]:
    """Return a row of rank correlations per data set and backbone."""
    rows = []
    for place, part in table.query("missing > 0").groupby(["dataset", "backbone"], sort=False):
        ranks = [rank_correlation(part, column) for column in ("distortion", "missing")]
        # With two sensors, all scenarios miss as many.
        rows.append([*place, *("" if pd.isna(rank) else f"{rank:+.2f}" for rank in ranks)])
    return _table(["data set", "backbone", "with D", "with the number missing"], rows)


def _summary_table(summary: pd.DataFrame) -> list[str]:
    """Return a row of metrics per data set, backbone and method."""
    keys, rows = ["dataset", "backbone", "method"], []
    for (dataset, backbone, method), part in summary.groupby(keys, sort=False):
        varies = len(part) > 1 and method != "pretrained"
        mean, worst, full = (
            f"{part[metric].mean():.3f}" + (f" ({part[metric].std():.3f})" if varies else "")
            for metric in SUMMARISED
        )
        worst += " " + next(iter(part["worst_scenario"].mode()), "")
        rows.append([dataset, backbone, method_title(str(method)), mean, worst, full])
    return _table(["data set", "backbone", "method", *(METRICS[name] for name in SUMMARISED)], rows)


def _contrast_table(table: pd.DataFrame) -> list[str]:
    """Return the differences of IoU in the mean over scenarios and in the worst one."""
    shown = table[table["metric"].isin(["worst_iou", "mean_iou"])]
    name = "contrast" if "contrast" in shown else "method"
    head = ["data set", "backbone", "metric", name, "difference", "95 % interval", "p (Holm)"]
    rows = []
    for _, row in shown.iterrows():
        interval = f"{row['low']:+.4f} to {row['high']:+.4f}"
        p = "" if pd.isna(row["p_holm"]) else f"{row['p_holm']:.3f}"
        place = row["dataset"], row["backbone"], METRICS[row["metric"]], row[name]
        rows.append([*place, f"{row['difference']:+.4f}", interval, p, row["replicates"]])
    return _table([*head, "replicates"], rows)
