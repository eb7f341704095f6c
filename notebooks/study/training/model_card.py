"""A page beside every saved checkpoint: how it was made, from which data, and its scores."""

import json
from pathlib import Path

import pandas as pd

from study.data.patches import PatchDataset
from study.metrics.evaluation import scenario_scores
from study.provenance.artifacts import Record, save

CARD = "model_card.md"


def save_model_card(
    folder: Path,
    training: PatchDataset,
    history: pd.DataFrame | None,
    records: pd.DataFrame,
    record: Record,
) -> Path:
    """Write `model_card.md` into the folder of a checkpoint, whose record is given.

    The history is None where a checkpoint was loaded; records are of the patches it is tested on.
    """
    dataset, made_with = training.dataset, dict(record.parameters)
    # The code's fingerprint stays in the record: an edit is no news about the network.
    inputs = {name: sha256 for name, sha256 in record.inputs.items() if name != "code"}
    name = made_with.get("model", {}).get("name", "network")
    rows = []
    for row in scenario_scores(records.assign(model="this"), ["model"]).itertuples():
        column = f"drawn:{row.scenario}"
        drawn = "" if history is None or column not in history else f"{history[column].mean():.3f}"
        rows.append(f"| {row.scenario} | {drawn} | {row.iou:.3f} | {row.f1:.3f} |")
    modalities, tested_on = made_with.get("modalities", {}), made_with.get("tested_on", "test")
    data = [
        f"{dataset.title}; {len(training)} patches of {training.size} × {training.size} pixels, "
        f"fold {made_with['fold']} held out for testing",
        *[f"{entry.covers}: {entry.name}. {entry.attribution}" for entry in dataset.licences],
        *([f"Cite: {dataset.citation}"] if dataset.citation else []),
    ]
    paragraphs = [
        f"# {name}, {made_with.get('method', 'pretrained')}: {dataset.title}",
        f"Segments {', '.join(training.classes)} from any non-empty subset of "
        f"{', '.join(training.modalities)}.",
        "## Intended use",
        "Research on missing sensors, and maps of scenes with these bands, where sensors may be "
        "missing: `make map` or notebook 06. Not for decisions that concern people or property, "
        "and not tried on other places, dates or sensors than those below.",
        "`study.training.checkpoints.load_network(folder)` gives the network with scenarios, "
        "normalisation and classes, where `folder` holds this page. It takes:",
        "\n".join(f"- {modality}: {', '.join(bands)}" for modality, bands in modalities.items()),
        "## Data",
        "\n".join([f"- {entry}" for entry in data]),
        "The weights are derived from these data: see their licences before passing them on.",
        "## Scenarios",
        f"IoU and F1 are averaged over the classes, on {tested_on} patches that no training saw.",
        "\n".join(["| scenario | drawn in training | IoU | F1 |", "|---|---|---|---|", *rows]),
        "## How it was made",
        f"```json\n{json.dumps({**made_with, 'inputs': inputs}, indent=1)}\n```",
        "`weights.safetensors.record.json` has its hash and the environment. Device: "
        f"{record.device}.",
    ]
    page = "\n\n".join(paragraphs) + "\n"
    return save(folder / CARD, lambda path: path.write_text(page, "utf-8"), record)
