"""A run beside committed results: rounding is no difference, a mistake is, a seed may vary."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from checkout import ROOT
from score_committed import committed_network
from study.data.manifest import load_manifest
from study.data.patches import PatchDataset
from study.metrics.evaluation import evaluate, scenario_scores
from study.stages.agreement import (
    METRICS,
    NOT_COMPARED,
    compared_with_committed,
    scoring_sentence,
    why_not_compared,
)
from study.stages.tiers import load_tier

from lsgs_core import Batch, ScenarioSet, scenario_probabilities, score_scenarios
from lsgs_core.scoring_file import published_scoring

NAMES = ["RGB", "NIR", "SWIR"]
SCENARIOS = ScenarioSet.of(NAMES)
SETTINGS = {"direction": 1.0, "ridge": 1e-3, "inverse_temperature": 0.5, "mixing": 0.5}
PLACE = Path("scores", "demo", "cmx", "fold0", "seed0", "probabilities.json")


@pytest.fixture(scope="module")
def tier():
    """The demo tier with CMX alone."""
    return load_tier("demo", ROOT).only("demo/cmx/uniform/0/0")


def scoring(distortion, scored: int = 10, weights: str = "w", **changes) -> dict:
    """A probabilities.json of invented distortions."""
    result = scenario_probabilities(distortion, **SETTINGS)
    return {
        "scenario_names": list(SCENARIOS.names),
        "mask_array": SCENARIOS.masks.astype(int).tolist(),
        "D_sh": list(distortion),
        "final_probs": result.probabilities.tolist(),
        "meta_info": {"num_scored": scored, "weights_sha256": weights},
        **changes,
    }


D = np.array([1.0, 0.8, 0.9, 0.4, 0.5, 0.3, 0.0])


@pytest.mark.parametrize(
    ("here", "said"),
    [
        (scoring(D * (1 + 1e-6)), "equal to the committed scoring: D differs by up to 1.0e-06"),
        (scoring(D * (1 + 1e-3)), "DIFFERENT from the committed scoring"),
        (scoring(D, scored=9), f"{NOT_COMPARED}.*9 patches were scored, 10 committed"),
        (scoring(D, weights="x"), f"{NOT_COMPARED}: those are of another network"),
    ],
)
def test_scorings(tmp_path, here, said):
    paths = [tmp_path / "here.json", tmp_path / "committed.json"]
    for path, content in zip(paths, (here, scoring(D)), strict=True):
        path.write_text(json.dumps(content))
    assert re.search(said, scoring_sentence(*paths))
    assert "no such scoring" in scoring_sentence(paths[0], tmp_path / "nothing.json")


def published(folder: Path, tier, seeds: int = 10, draw: int = 0) -> pd.DataFrame:
    """An invented published tier; returns what one more seed gave."""
    random = np.random.default_rng(draw)
    (folder / "evaluation").mkdir(parents=True)
    (folder / PLACE).parent.mkdir(parents=True)
    (folder / PLACE).write_text(json.dumps(scoring(D)))
    sections = {name: dict(section) for name, section in tier.sections.items()}
    provenance = {"parameters": sections, "grid": [{"datasets": ["demo"]}]}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    rows = [
        {"dataset": "demo", "backbone": "cmx", "method": method, "seed": seed}
        | {metric: random.normal(0.4, 0.02) for metric in METRICS}
        for method in ("pretrained", "uniform", "lsgs", "lora")
        for seed in range(seeds + 1)
    ]
    whole = pd.DataFrame(rows)
    last = whole["seed"] == seeds
    whole[~last].to_csv(folder / "evaluation" / "summary.csv", index=False)
    by_scenario().to_csv(folder / "evaluation" / "iou_per_scenario.csv", index=False)
    return whole[last]


def by_scenario(changed: float = 0.0) -> pd.DataFrame:
    rows = [("demo", "cmx", "pretrained", name, 0.3 + changed) for name in SCENARIOS.names]
    return pd.DataFrame(rows, columns=["dataset", "backbone", "method", "scenario", "iou"])


def test_one_more_seed_and_rounding_agree(tmp_path, tier):
    whole = published(tmp_path / "reference", tier)
    work = tmp_path / "work"
    (work / PLACE).parent.mkdir(parents=True)
    (work / PLACE).write_text(json.dumps(scoring(D * (1 + 1e-7))))
    reference = str(tmp_path / "reference")
    table, said = compared_with_committed(whole, by_scenario(1e-4), tier, work, reference)
    assert said.startswith("distortion: equal (largest difference 1.0e-07); probabilities: equal")
    assert said.endswith("difference 1.0e-04); fine-tuned: 9 of 9 within the committed range")
    assert table["agrees"].all()
    (work / PLACE).write_text(json.dumps(scoring(D * [1, 1, 1.01, 1, 1, 1, 1], scored=9)))
    whole.loc[whole["method"] == "lora", "worst_iou"] = 0.1
    _, said = compared_with_committed(whole, by_scenario(0.01), tier, work, reference)
    assert "distortion: DIFFERENT" in said
    assert "pretrained IoU: DIFFERENT" in said
    assert "fine-tuned: 8 of 9" in said
    published(tmp_path / "one", tier, seeds=1)  # which shows no range
    arguments = whole, by_scenario(), tier, work, str(tmp_path / "one")
    assert "fine-tuned" not in compared_with_committed(*arguments)[1]


def test_the_ranges_hold_together(tmp_path, tier):
    """Of further seeds from the same distribution, all nine figures lie within in 95 %."""
    held = []
    for draw in range(60):
        folder = tmp_path / str(draw)
        whole = published(folder, tier, seeds=10, draw=draw)
        table, _ = compared_with_committed(whole, by_scenario(), tier, folder, str(folder))
        held.append(table[table["part"] == "fine-tuned"]["agrees"].all())
    assert np.mean(held) >= 0.9


def test_what_cannot_be_compared_says_why(tmp_path, tier):
    whole = published(tmp_path, tier)
    assert why_not_compared(tier, tmp_path) == ""
    changed = dict(tier.sections)
    changed["04_finetuning"] = {**changed["04_finetuning"], "epochs": 7, "threads": 2}
    other = replace(tier, sections=changed)
    assert why_not_compared(other, tmp_path) == "04_finetuning: epochs is 7 here and 3 there"
    arguments = whole, by_scenario(), other, tmp_path
    assert "epochs is 7" in compared_with_committed(*arguments, str(tmp_path))[1]
    assert "no published results" in compared_with_committed(*arguments, "nowhere")[1]
    assert "no reference" in compared_with_committed(*arguments, "")[1]
    for name, said in (("dataset", "no run of another"), ("backbone", "no run of these")):
        grid = [tier.grid[0].model_copy(update={f"{name}s": ["another"]})]
        others = whole.assign(**{name: "another"}), by_scenario().assign(**{name: "another"})
        arguments = *others, replace(other if name == "dataset" else tier, grid=grid), tmp_path
        assert said in compared_with_committed(*arguments, str(tmp_path))[1]


def shifted_labels(batch: Batch) -> Batch:
    target, valid = (tensor.roll(8, dims=-1) for tensor in (batch.target, batch.valid))
    return replace(batch, target=target, valid=valid)


def without_second_modality(batch: Batch) -> Batch:
    first, second, third = batch.images
    return replace(batch, images=(first, torch.zeros_like(second), third))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda batch: batch, [True, True, True]),
        (shifted_labels, [True, True, False]),  # D and p know no labels
        (without_second_modality, [False, False, False]),
    ],
)
def test_the_committed_network_agrees_on_the_right_data_alone(
    prepared_demo, tmp_path, tier, change, expected
):
    definition = load_manifest(ROOT / "data_manifest.yaml").dataset("demo")
    model = committed_network("cmx")
    training, test = (
        PatchDataset(prepared_demo, definition, "land_cover", 0, part)
        for part in ("training", "test")
    )
    batches = map(change, training.batches(8))
    scores = score_scenarios(model, batches, SCENARIOS, progress=False)
    (tmp_path / PLACE).parent.mkdir(parents=True)
    result = scenario_probabilities(scores.distortion, **SETTINGS)
    settings, counted = SETTINGS | {"smooth": True, "lengthscale": 1.0}, len(scores.patch_ids)
    notes = "distortion", settings, "cmx", "", "", {"num_scored": counted}
    content = published_scoring(scores, result, *notes)
    (tmp_path / PLACE).write_text(json.dumps(content))
    batches = map(change, test.batches(8))
    records = evaluate(model, batches, SCENARIOS, test.classes, test.task_kind)
    keys = {"dataset": "demo", "backbone": "cmx", "method": "pretrained"}
    scored = scenario_scores(records.assign(**keys), [*keys])
    none = pd.DataFrame(columns=[*keys, *METRICS])
    reference = str(ROOT / "results" / "reference")
    table, _ = compared_with_committed(none, scored, tier, tmp_path, reference)
    assert table["part"].tolist() == ["distortion", "probabilities", "pretrained IoU"]
    assert table["agrees"].tolist() == expected
