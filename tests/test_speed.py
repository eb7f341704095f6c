"""What the benchmark measures; times themselves are not tested, only how they are combined."""

import numpy as np
import pandas as pd
import pytest
import torch
from checkout import ROOT
from study.benchmark import speed
from study.benchmark.speed import FORMS, PARTS, Case
from study.data.patches import PatchDataset
from study.figures import speed as speed_figures

from lsgs_core.models import BACKBONES, build_backbone
from lsgs_core.models.cbc import Encoder
from lsgs_core.uncertainty import FEWEST_PATCHES

SMALL = Case(preset="demo", size=32)


def test_every_part_is_a_module():
    names = {name for backbone in BACKBONES
             for name, _ in build_backbone(backbone, "demo").named_children()}  # fmt: skip
    assert names - {"positions"} == {name for group in PARTS.values() for name in group}


@pytest.mark.parametrize("backbone", ["cbc_slp", "cmx"])
@pytest.mark.parametrize("task", ["scoring", "training"])
def test_compare(task, backbone):
    case = Case(task, backbone, "demo", size=32, batch=2)
    timings = speed.compare([case], repeats=2)
    runs = timings.groupby(["form", "repeat"], sort=False)
    assert len(runs) == 4
    expected = {*PARTS, "other"} | ({"backward", "optimiser"} if task == "training" else set())
    assert all(set(run["part"]) == expected for _, run in runs)
    assert (timings["seconds"] >= 0).all()
    used = timings[timings["seconds"] > 0].groupby("form")["part"].agg(set)
    assert {"encoders", "fusion", "decoder"} <= used["plain"]
    assert ("decoder" in used["ours"]) == (task == "training")
    assert ("transformers" in used["ours"]) == (backbone != "cmx")


def test_the_plain_scoring_is_one_pass_per_scenario_and_patch(monkeypatch):
    case = Case(preset="demo", size=32, batch=2, modalities=2)
    passes = []

    def counted(self: torch.nn.Module, images: torch.Tensor, masks: torch.Tensor) -> None:
        assert all(type(encoder) is not Encoder for encoder in self.encoders)
        passes.append((tuple(images.shape[:2]), masks[0].tolist()))

    monkeypatch.setattr("lsgs_core.models.cbc.CBC.heads", counted)
    speed.compare([case], repeats=1)
    # The full scenario stands last, and goes first as the reference.
    wanted = [[True, True], [True, False], [False, True], [True, True]]
    assert passes == [((1, 2), mask) for _ in range(4) for mask in wanted]
    passes.clear()
    speed.compare([case], repeats=1, plain_forwards=3)
    assert passes == [((1, 2), mask) for _ in range(2) for mask in wanted[:3]]


def test_ratios_are_of_medians():
    rows = [
        {**vars(SMALL), "form": form, "repeat": repeat, "part": part, "seconds": seconds * share}
        for form, times in (("plain", [10, 12, 99]), ("ours", [2, 3, 4]))
        for repeat, seconds in enumerate(times)
        for part, share in (("encoders", 0.25), ("other", 0.75))
    ]
    table = speed.ratios(pd.DataFrame(rows))
    assert table[["plain", "ours", "ratio"]].to_numpy().tolist() == [[12, 3, 4]]
    axes = speed_figures.parts_figure(pd.DataFrame(rows)).axes[0]
    assert sum(bar.get_width() for bar in axes.patches) == pytest.approx(100 + 25)


def test_growth():
    cases = speed.growth(Case(size=224))
    assert [case.modalities for case in cases["modalities"]] == [2, 3, 4, 5]
    assert [case.size for case in cases["size"]] == [96, 224, 320]
    assert [case.size for case in speed.growth(SMALL)["size"]] == [32, 64]
    assert all(case.size % 32 == 0 for grown in cases.values() for case in grown)


def test_distortion_error():
    for backbone in BACKBONES:
        assert speed.distortion_error(Case(backbone=backbone, preset="demo", size=64)) < 1e-4


def test_bfloat16_moves_p_by_little(prepared, dataset):
    patches = PatchDataset(prepared, dataset, "land_cover", 0, "training", limit=4)
    weights = ROOT / "results" / "networks" / "demo" / "cmx" / "fold0" / "seed0"
    row = speed.in_bfloat16("cmx", patches, weights / "weights.safetensors", "cpu", batch_size=2)
    assert 1e-7 < row["error of p"] < 0.01
    assert 1e-5 < row["error of D"] < 0.1
    assert min(row["float32, seconds"], row["bfloat16, seconds"]) > 0


def test_peak_memory():
    """Of the processes that are measured, and not of the larger one that started them."""
    large = bytearray(b"x" * 1_500_000_000)
    table = speed.peak_memory([SMALL], threads=1)
    assert len(large) > 1e9
    assert list(table.columns[-3:]) == [*FORMS, "ratio"]
    assert table[[*FORMS]].to_numpy().min() > 0.1  # GB: PyTorch alone takes more
    assert table[[*FORMS]].to_numpy().max() < 1.2
    assert table["ratio"][0] == pytest.approx(table["ours"][0] / table["plain"][0])


def test_many_sensors_are_timed_with_and_without_a_budget():
    cases = speed.growth(SMALL, most=7, budget=15)["modalities"]
    expected = [*((count, 0) for count in range(2, 8)), (5, 15), (6, 15), (7, 15)]
    assert [(case.modalities, case.budget) for case in cases] == expected
    workload = speed._Workload(cases[-1], "cpu")
    assert (len(workload.masks), len(workload.measured)) == (127, 15)
    grown = {"modalities": speed.compare(cases[3:4] + cases[6:7], 1, plain_forwards=1)}
    labels = speed_figures.growth_figure(grown, "").axes[0].get_legend_handles_labels()[1]
    assert labels == ["plain", "ours", "ours, 15 scenarios"]


def test_time_to_probabilities():
    values = np.random.default_rng(0).gamma(2, 1, (300, 7)) * [7, 6, 5, 4, 3, 2, 0]
    passes = speed.stopped_passes(values, 0.01, 900, orders=3)
    assert passes["needed"].between(FEWEST_PATCHES, 800).all()
    assert passes["covered"].mean() > 0.8
    assert passes["difference"].max() < 0.04
    table = pd.DataFrame([{**vars(SMALL), "plain": 8.0, "ours": 2.0, "ratio": 4.0}])
    times = speed.time_to_probabilities(table, {"cbc_slp": values}, 900, 3, (0.01,)).loc[0]
    assert times["published, hours"] == 2
    assert times["ours"] == 0.5
    assert times["ours to ±0.01"] == pytest.approx(passes["needed"].mean() * 2 / 3600)
