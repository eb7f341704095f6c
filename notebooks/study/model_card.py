"""A page beside every saved checkpoint: what it was trained on and how, and what it scores."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from study.artifacts import Record, save
from study.data.patches import PatchDataset
from study.evaluation import scenario_scores

CARD = "model_card.md"


def save_model_card(
    folder: Path,
    training: PatchDataset,
    history: pd.DataFrame | None,
    records: pd.DataFrame,
    record: Record,
) -> Path:
    """Write `model_card.md` into the folder of a checkpoint.

    Args:
        folder: With weights.safetensors.
        training: The patches it was trained on.
        history: Of `train`; None where a checkpoint was loaded.
        records: Of `evaluate`, on the test patches.
        record: Of the checkpoint.
    """
    dataset, made_with = training.dataset, dict(record.parameters)
    name = made_with.get("model", {}).get("name", "network")
    seen = f"{len(training)} patches of {training.size} × {training.size} pixels"
    lines = [
        f"# {name}, {made_with.get('method', 'pretrained')}: {dataset.title}",
        "",
        f"Segments {', '.join(training.classes)} from any non-empty subset of "
        f"{', '.join(training.modalities)}.",
        "",
        "## Data",
        "",
        f"- {dataset.title}; {seen}, fold {made_with['fold']} held out for testing",
        *[f"- {entry.covers}: {entry.name}. {entry.attribution}" for entry in dataset.licences],
        *([f"- Cite: {dataset.citation}"] if dataset.citation else []),
        "",
        "The weights are derived from these data: see their licences before passing them on.",
        "",
        "## Scenarios",
        "",
        "IoU and F1 are averaged over the classes, on test patches that no training saw.",
        "",
        "| scenario | drawn in training | IoU | F1 |",
        "|---|---|---|---|",
    ]
    scores = scenario_scores(records.assign(model="this"), ["model"])
    for row in scores.itertuples():
        column = f"drawn:{row.scenario}"
        drawn = "" if history is None or column not in history else f"{history[column].mean():.3f}"
        lines.append(f"| {row.scenario} | {drawn} | {row.iou:.3f} | {row.f1:.3f} |")
    lines += ["", "## How it was made", "", "```json"]
    lines += [json.dumps({**made_with, "inputs": dict(record.inputs)}, indent=1), "```", ""]
    lines += [
        f"`weights.safetensors.record.json` has its hash and the environment. Device: "
        f"{record.device}. Not tried on other places, dates or sensors than those above.",
        "",
    ]
    text = "\n".join(lines)
    return save(folder / CARD, lambda to: to.write_text(text, "utf-8"), record)
