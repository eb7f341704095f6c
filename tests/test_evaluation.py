"""Losses and metrics, with PyTorch and torchmetrics as the oracles, or of a known answer."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from checkout import ROOT
from study.comparison.collection import open_grid
from study.data.patches import PatchDataset
from study.metrics.evaluation import (
    AlwaysPositive,
    calibration_errors,
    class_map,
    class_scores,
    evaluate,
    lowest_quarter,
    predict,
    scenario_scores,
    summary,
    validation_scores,
)
from study.metrics.losses import paper_loss, segmentation_loss
from study.metrics.statistics import Counts
from study.provenance.artifacts import Record, save_table
from study.stages.parameters import notebook_parameters
from study.stages.tiers import READ_AGAIN, StudyFolder
from torch.optim.swa_utils import AveragedModel
from torchmetrics.functional import f1_score, jaccard_index

from lsgs_core import Batch, InputError, ScenarioSet
from lsgs_core.models import build_backbone

SCENARIOS = ScenarioSet.of(["A", "B"])
KINDS = ["binary", "multilabel", "multiclass"]


def random_batch(kind: str, classes: int, count: int = 6, size: int = 8) -> Batch:
    torch.manual_seed(0)
    if kind == "multiclass":
        target = torch.randint(classes, (count, size, size))
    else:
        target = (torch.rand(count, classes, size, size) < 0.3).float()
    return Batch(
        images=tuple(torch.randn(count, classes, size, size) for _ in range(2)),
        available=torch.ones(count, 2, dtype=torch.bool),
        target=target,
        valid=torch.rand(count, size, size) < 0.7,
        patch_ids=torch.arange(count),
        block_ids=torch.arange(count) // 2,
    )


class SumOfImages(torch.nn.Module):
    """Its logits are the sum of the available images."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))  # says on which device the network is

    def forward(self, images, available):
        return sum(i * a[:, None, None, None] for i, a in zip(images, available.T, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_counts_agree_with_torchmetrics(kind):
    classes = 1 if kind == "binary" else 4
    names = tuple(f"class{index}" for index in range(classes))
    batch = random_batch(kind, classes)
    records = evaluate(SumOfImages(), [batch], SCENARIOS, names, kind)
    assert list(records.columns) == ["block", "scenario", "class", "tp", "fp", "fn"]
    assert len(records) == 3 * len(SCENARIOS) * classes
    logits = batch.images[0]  # scenario A
    if kind == "multiclass":
        predicted, target = logits, torch.where(batch.valid, batch.target, -1)
    else:
        predicted = logits.sigmoid()
        target = torch.where(batch.valid[:, None], batch.target, -1).long()
    options = {"task": kind, "num_classes": classes, "num_labels": classes}
    ours = class_scores(records, ["scenario"]).query("scenario == 'A'")
    for name, oracle in (("iou", jaccard_index), ("f1", f1_score)):
        expected = oracle(predicted, target, average="none", ignore_index=-1, **options)
        np.testing.assert_allclose(ours[name], np.atleast_1d(expected), atol=1e-6)


def test_pooling_over_batches_blocks_and_folds_is_adding():
    batch = random_batch("multilabel", 2)
    names = ("x", "y")
    whole = evaluate(SumOfImages(), [batch], SCENARIOS, names, "multilabel")
    fields = ("available", "target", "valid", "patch_ids", "block_ids")
    tensors = [*batch.images, *(getattr(batch, field) for field in fields)]
    pieces = zip(*(tensor.split(1) for tensor in tensors), strict=True)
    singles = [Batch(tuple(one[:2]), *one[2:]) for one in pieces]
    parts = evaluate(SumOfImages(), singles, SCENARIOS, names, "multilabel")
    pd.testing.assert_frame_equal(whole, parts)


def counted(scenarios, classes, tp, fp, fn) -> pd.DataFrame:
    names = {"block": 0, "method": "m", "scenario": scenarios, "class": classes}
    return pd.DataFrame({**names, "tp": tp, "fp": fp, "fn": fn})


@pytest.mark.parametrize("kind", KINDS)
def test_soft_scores_are_the_authors(kind):
    """Per patch, never thresholded; where the mask is empty both are inverted first."""
    classes = 1 if kind == "binary" else 3
    names = tuple(f"class{index}" for index in range(classes))
    batch = random_batch(kind, classes)
    batch.target[0] = 0  # empty in the first patch; of several classes, all but the first
    records = evaluate(SumOfImages(), [batch], SCENARIOS, names, kind, protocol="paper")
    assert len(records) == 6 * len(SCENARIOS) * classes
    assert list(records.columns)[:4] == ["patch", "block", "scenario", "class"]
    logits = batch.images[0].double()
    probability = logits.softmax(dim=1) if kind == "multiclass" else logits.sigmoid()
    truth = batch.target
    if kind == "multiclass":
        truth = F.one_hot(truth, classes).movedim(-1, 1)
    for row in records.query("scenario == 'A'").itertuples():
        number = names.index(row[4])
        valid = batch.valid[row.patch]
        p = probability[row.patch, number][valid]
        y = truth[row.patch, number][valid].double()
        if not y.any():
            p, y = 1 - p, 1 - y
        shared = float((p * y).sum())
        assert row.soft_iou == pytest.approx(shared / float(p.sum() + y.sum() - shared))
        assert row.soft_f1 == pytest.approx(2 * shared / float(p.sum() + y.sum()))
    means = class_scores(records, ["scenario"]).query("scenario == 'A'")
    expected = records.query("scenario == 'A'").groupby("class")["soft_iou"].mean()
    np.testing.assert_allclose(means.set_index("class")["iou"], expected)
    assert summary(records.assign(m=1), SCENARIOS, ["m"])["worst_iou"].notna().all()


def test_soft_scores_are_averaged_over_the_patches_that_have_pixels():
    batch = random_batch("binary", 1)
    batch.valid[0] = False
    records = evaluate(SumOfImages(), [batch], SCENARIOS, ("x",), "binary", protocol="paper")
    assert records.query("patch == 0")["soft_iou"].isna().all()
    table = class_scores(records, ["scenario"]).set_index("scenario")
    soft = records.query("patch > 0 and scenario == 'B'")["soft_iou"]
    assert table.loc["B", "iou"] == pytest.approx(soft.mean())
    assert table.loc["B", "iou_deviation"] == pytest.approx(np.std(soft, ddof=1))


def test_expected_iou_weighs_scenarios_by_the_prior():
    batch = random_batch("binary", 1)
    records = evaluate(SumOfImages(), [batch], SCENARIOS, ("x",), "binary").assign(m=1)
    prior = np.array([0.2, 0.3, 0.5])
    iou = scenario_scores(records, ["m"]).set_index("scenario")["iou"][list(SCENARIOS.names)]
    found = summary(records, SCENARIOS, ["m"], prior).iloc[0]
    assert found["expected_iou"] == pytest.approx(float(iou.to_numpy() @ prior))
    alike = summary(records, SCENARIOS, ["m"])["expected_iou"].item()
    assert alike == pytest.approx(found["mean_iou"])


def test_summary_finds_the_worst_scenario():
    records = counted(["A", "B", "A+B"], "x", [30, 10, 50], 0, [70, 90, 50])
    row = summary(records, SCENARIOS, ["method"]).iloc[0]
    assert row["worst_scenario"] == "B"
    found = row[["worst_iou", "mean_iou", "full_iou", "drop"]].tolist()
    assert found == pytest.approx([0.1, 0.3, 0.5, 0.2])


def test_the_lowest_quarter_is_rounded_up_and_skips_what_is_undefined():
    scores = np.array([[0.5, 0.1, np.nan, 0.4, 0.3, 0.2, 0.9, 0.8], [np.nan] * 8])
    np.testing.assert_allclose(lowest_quarter(scores), [0.15, np.nan])  # two of seven; none


def test_predictions_and_class_maps():
    logits = torch.tensor([[[[2.0, -1.0]], [[3.0, -2.0]]]])  # (1, 2, 1, 2)
    assert predict(logits, "multilabel").tolist() == [[[[True, False]], [[True, False]]]]
    assert predict(logits, "multiclass").tolist() == [[[[False, True]], [[True, False]]]]
    assert class_map(logits, "multilabel").tolist() == [[[1, -1]]]
    assert class_map(logits, "multiclass").tolist() == [[[1, 0]]]


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_probabilities_that_are_true_in_part_only(kind):
    """Of .8, .6 and both together; the second of two classes is predicted."""
    images = [torch.logit(torch.full((2, 1, 10, 10), p)) for p in (0.8, 0.6)]
    target, valid = torch.zeros(2, 1, 10, 10), torch.ones(2, 10, 10, dtype=torch.bool)
    target[:, :, :7] = 1  # 70 % of the pixels
    if kind == "multiclass":
        images, target = [F.pad(i, (0, 0, 0, 0, 1, 0)) for i in images], target[:, 0].long()
    whole = torch.ones(2, 2, dtype=torch.bool)
    batch = Batch(tuple(images), whole, target=target, valid=valid)
    for rows, errors in ((10, [0.1, 0.1, 6 / 7 - 0.7]), (7, [0.2, 0.4, 1 / 7]), (0, [np.nan] * 3)):
        valid[:, rows:] = False  # of the first seven all are true
        found = calibration_errors(SumOfImages(), [batch] * 2, SCENARIOS, kind)
        assert found["scenario"].tolist() == ["A", "B", "A+B"]
        np.testing.assert_allclose(found["calibration_error"], errors, atol=1e-6)


@pytest.mark.parametrize("lacking", [False, True])
@pytest.mark.parametrize("backbone", ["cbc_slp", "cmx"])
def test_sharing_between_scenarios_changes_no_count(backbone, lacking, monkeypatch):
    torch.manual_seed(0)
    network = build_backbone(backbone, "demo", (3, 3), 3)
    batch = random_batch("multilabel", 3, size=32)
    batch.available[0, 1] = not lacking
    shared, kind, whole = [], type(network), type(network).scenario_logits
    monkeypatch.setattr(kind, "scenario_logits", lambda *a: shared.append(1) or whole(*a))
    tables = [
        evaluate(model, [batch], SCENARIOS, ("a", "b", "c"), "multilabel")
        for model in (network, AveragedModel(network))  # the second is as any other module
    ]
    pd.testing.assert_frame_equal(*tables)
    assert tables[0]["tp"].sum() > 0
    assert len(shared) == (not lacking)


def test_no_batch():
    with pytest.raises(InputError, match="at least one"):
        evaluate(SumOfImages(), [], SCENARIOS, ("x",), "binary")


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_pytorchs_over_valid_pixels(kind):
    classes = 1 if kind == "binary" else 3
    batch = random_batch(kind, classes)
    logits = torch.randn(6, classes, 8, 8, requires_grad=True)
    loss, per_sample = segmentation_loss(logits, batch.target, batch.valid, kind)
    if kind == "multiclass":
        expected = F.cross_entropy(logits, torch.where(batch.valid, batch.target, -100))
        truth = F.one_hot(batch.target, classes).movedim(-1, 1).float()
        probability = logits.softmax(dim=1)
    else:
        chosen = batch.valid[:, None].expand_as(logits)
        expected = F.binary_cross_entropy_with_logits(logits[chosen], batch.target[chosen])
        truth, probability = batch.target, logits.sigmoid()
    valid = batch.valid[:, None].float()
    shared = (probability * truth * valid).sum(dim=(0, 2, 3))
    both = ((probability + truth) * valid).sum(dim=(0, 2, 3))
    jaccard = (1 - (shared + 1) / (both - shared + 1)).mean()
    torch.testing.assert_close(loss, expected + jaccard)
    assert per_sample.shape == (6,)
    weight = batch.valid.sum(dim=(1, 2))
    torch.testing.assert_close((per_sample * weight).sum() / weight.sum(), expected.detach())
    loss.backward()
    assert (logits.grad * ~batch.valid[:, None] == 0).all()
    assert logits.grad.isfinite().all()
    # whatever the ignored pixels hold
    target = batch.target.clone()
    target[~batch.valid if kind == "multiclass" else ~batch.valid[:, None].expand_as(target)] = 255
    torch.testing.assert_close(segmentation_loss(logits, target, batch.valid, kind)[0], loss)


def test_a_batch_without_labels_has_no_loss():
    logits = torch.randn(2, 1, 4, 4, requires_grad=True)
    nothing = torch.zeros(2, 4, 4, dtype=torch.bool)
    loss, per_sample = segmentation_loss(logits, torch.zeros(2, 1, 4, 4), nothing, "binary")
    loss.backward()
    assert loss.item() == 0
    assert per_sample.isnan().all()  # what a sampler must not take for an easy scenario
    assert logits.grad.abs().sum() == 0


def test_paper_loss_is_the_sigmoid_twice():
    heads = torch.randn(2, 3, 1, 4, 4)
    target, valid = (torch.rand(2, 1, 4, 4) < 0.5).float(), torch.ones(2, 4, 4, dtype=torch.bool)
    twice = heads.sigmoid()
    expected = F.binary_cross_entropy_with_logits(twice, target[:, None].expand_as(twice))
    torch.testing.assert_close(paper_loss(heads, target, valid)[0], expected)
    perfect = (40 * (2 * target - 1))[:, None].expand_as(heads)
    floor = target.mean() * np.log1p(np.exp(-1)) + (1 - target.mean()) * np.log(2)
    torch.testing.assert_close(paper_loss(perfect, target, valid)[0], floor.float())


def test_nothing_in_truth_or_prediction_is_no_score_and_no_crash():
    class Never(torch.nn.Module):
        def forward(self, images, available):
            return torch.full((len(available), 1, 8, 8), -9.0)

    batch = random_batch("binary", 1)
    batch = replace(batch, target=torch.zeros_like(batch.target))
    found = validation_scores(Never(), [batch], SCENARIOS, ("x",), "binary")
    assert np.isnan(list(found.values())).all()
    records = evaluate(Never(), [batch], SCENARIOS, ("x",), "binary").assign(m=1)
    assert summary(records, SCENARIOS, ["m"])["worst_scenario"].item() == ""


@pytest.mark.parametrize("tested_on", ["test", "validation"])
def test_runs_are_compared_on_the_blocks_that_they_were_tested_on(
    prepared, dataset, manifest, tmp_path, monkeypatch, tested_on
):
    """Networks before fine-tuning have test blocks alone, and are left out with other ones."""
    monkeypatch.chdir(ROOT / "notebooks")
    study = StudyFolder(tmp_path / "work")
    study.prepared("demo").parent.mkdir(parents=True)
    study.prepared("demo").symlink_to(prepared)
    notebook = notebook_parameters(ROOT / "notebooks" / "05_evaluation.ipynb")
    notebook |= {"work": str(study.root), "manifest": str(manifest), "tested_on": tested_on}
    notebook |= {"evaluation_patches": 0, "pretraining_seed": -1}
    for seed in (0, 1):
        folder = study.runs("demo", "cmx", 0, seed)
        places = {study.pretrained("demo", "cmx", 0, seed): "test"}
        places |= {folder / method: tested_on for method in ("uniform", "lsgs")}
        for place, split in places.items():
            patches = PatchDataset(prepared, dataset, "land_cover", 0, split)
            scenarios = ScenarioSet.of(patches.modalities)
            classes, kind = patches.classes, patches.task_kind
            model = AlwaysPositive(len(classes))
            records = evaluate(model, patches.batches(8), scenarios, classes, kind)
            made_with = {name: notebook[name] for name in READ_AGAIN}
            if place.parent != folder:
                del made_with["tested_on"]
            made_with |= {"dataset": "demo", "fold": 0, "data_sha256": patches.data_sha256}
            save_table(place / "records.csv", records, Record(made_with))
            save_table(place / "history.csv", pd.DataFrame({"epoch": [0]}), Record(made_with))
    grid = open_grid(notebook)
    assert (grid.before["method"] == "pretrained").all()
    assert len(grid.before) > 0
    methods = list(grid.records["method"].unique())
    assert methods == ["pretrained", "uniform", "lsgs"][tested_on != "test" :]
    Counts.of(grid.records, methods, grid.scenarios)  # raises where blocks differ
    task = dataset.task("land_cover").model_copy(update={"kind": "multiclass"})
    exclusive = dataset.model_copy(update={"tasks": {"land_cover": task}})
    tests = {("demo", 0): PatchDataset(prepared, exclusive, "land_cover", 0, tested_on)}
    iou = grid.trivial()["iou"]  # some pixels have no class, which a multiclass task leaves out
    np.testing.assert_allclose(replace(grid, tests=tests).trivial()["iou"], iou / iou.sum())
