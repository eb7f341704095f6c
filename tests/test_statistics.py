"""Differences between methods: what the bootstrap resamples, and that it finds what is there."""

import numpy as np
import pandas as pd
import pytest
from statistics_records import SCENARIOS, records_of
from study.comparison.cases import stability
from study.figures.study import forest, score_heatmaps
from study.metrics.evaluation import SUMMARIES, scenario_scores, summary
from study.metrics.statistics import (
    METRICS,
    Counts,
    contrast,
    differences,
    holm,
    pooled,
    sensor_values,
    whole_replicates,
)

from lsgs_core import InputError


@pytest.mark.parametrize(("column", "name"), [("", ""), ("scenario", "A"), ("class", "x")])
def test_metrics_are_those_of_the_summary(column, name):
    """The array form and the table form are two computations, also where a part has no pixels."""
    records = records_of({"uniform": 0.0, "lsgs": 0.05}, seeds=3)
    if column:
        records.loc[records[column] == name, ["tp", "fp", "fn"]] = 0
    prior = np.array([0.5, 0.3, 0.2])
    counts = Counts.of(records, ["uniform", "lsgs"], SCENARIOS)
    weights = np.ones((1, len(counts.blocks)))
    table = summary(records, SCENARIOS, ["method", "seed"], prior).set_index(["method", "seed"])
    for metric in METRICS:
        found = SUMMARIES[metric](counts.scenario_iou(weights), prior)[0]
        assert (found > 0.3).all()
        wanted = [table.loc[method, metric] for method in ("uniform", "lsgs")]
        np.testing.assert_allclose(found, wanted)


def test_block_weights_are_repeated_blocks():
    records = records_of({"uniform": 0.0}, seeds=2)
    counts = Counts.of(records, ["uniform"], SCENARIOS)
    weights = np.zeros((1, len(counts.blocks)))
    weights[0, :3] = [2, 0, 1]
    chosen = [counts.blocks[0], counts.blocks[0], counts.blocks[2]]
    repeated = pd.concat([records[records["block"] == block] for block in chosen])
    table = summary(repeated, SCENARIOS, ["seed"])
    found = SUMMARIES["mean_iou"](counts.scenario_iou(weights), np.ones(3) / 3)[0, 0]
    np.testing.assert_allclose(found, table["mean_iou"])


def test_a_difference_is_found_and_its_interval_holds_it():
    records = records_of({"uniform": 0.0, "uniform_again": 0.0, "lsgs": 0.06, "lora": 0.0}, seeds=8)
    arms = ["uniform", "uniform_again"]
    gain = contrast(records, SCENARIOS, "lsgs", arms, "mean_iou", resamples=500)
    assert 0 < gain["low"] < gain["difference"] < gain["high"]
    assert gain["p"] < 0.01
    assert gain["detectable"] == pytest.approx(gain["standard_error"] * 2.8016, rel=1e-3)
    nothing = contrast(records, SCENARIOS, "lora", arms, "mean_iou", resamples=500)
    assert nothing["low"] < 0 < nothing["high"]
    assert nothing["p"] > 0.05


def test_resamples_without_any_pixel_of_the_classes_do_not_count():
    records = records_of({"uniform": 0.0, "lsgs": 0.3}, seeds=4)
    records.loc[records["block"] > 0, ["tp", "fp", "fn"]] = 0
    found = contrast(records, SCENARIOS, "lsgs", ["uniform"], "worst_iou", resamples=300)
    assert 0 < found["low"] < found["high"]
    assert found["p"] > 2 / 250  # a third of the resamples lack the block that has pixels


def test_intervals_cover():
    """Of the 95 % intervals for a difference of zero, about 95 % hold it."""
    holds = []
    for draw in range(60):
        records = records_of({"uniform": 0.0, "lsgs": 0.0}, seeds=6, blocks=16, draw=draw)
        found = contrast(records, SCENARIOS, "lsgs", ["uniform"], "mean_iou", resamples=200)
        holds.append(found["low"] <= 0 <= found["high"])
    assert 0.83 <= np.mean(holds) <= 1.0


def test_both_replicates_and_blocks_are_resampled():
    """With copies of one replicate, what is left is the spread between blocks; and the reverse."""
    records = records_of({"uniform": 0.0, "lsgs": 0.03}, seeds=4)
    one = records[records["seed"] == 0]
    copies = pd.concat([one.assign(seed=seed) for seed in range(4)])
    blocks_only = contrast(copies, SCENARIOS, "lsgs", ["uniform"], "mean_iou", resamples=300)
    assert blocks_only["standard_error"] > 1e-4
    block = records[records["block"] == records["block"].iloc[0]]
    same = pd.concat([block.assign(block=number) for number in range(12)])
    seeds_only = contrast(same, SCENARIOS, "lsgs", ["uniform"], "mean_iou", resamples=300)
    counts = Counts.of(same, ["lsgs", "uniform"], SCENARIOS)
    values = SUMMARIES["mean_iou"](counts.scenario_iou(np.ones((1, 12))), np.ones(3) / 3)[0]
    paired = values[0] - values[1]
    expected = paired.std() / np.sqrt(len(paired))  # of a bootstrap mean
    assert seeds_only["standard_error"] == pytest.approx(expected, rel=0.15)


def test_seeds_that_only_some_methods_have_are_not_compared():
    records = records_of({"uniform": 0.0, "uniform_again": 0.0, "lsgs": 0.03}, seeds=5)
    fewer = records[(records["method"] != "lsgs") | (records["seed"] < 3)]
    found = contrast(fewer, SCENARIOS, "lsgs", ["uniform"], "mean_iou", resamples=50)
    assert found["replicates"] == 3
    hole = records[(records["method"] != "lsgs") | (records["block"] != 3)]
    for part, reference, message in (
        (fewer, "absent", "a seed with all methods"),
        (records[records["seed"] == 0], "uniform", "at least 2 replicates"),
        (hole, "uniform", "missing; every method needs the same folds"),
    ):
        with pytest.raises(InputError, match=message):
            contrast(part, SCENARIOS, "lsgs", [reference], "mean_iou", resamples=50)
    few = records[records["block"] < 5]
    with pytest.warns(UserWarning, match="5 spatial blocks"):
        contrast(few, SCENARIOS, "lsgs", ["uniform"], "mean_iou", resamples=50)


def test_tables():
    effects = {"pretrained": -0.05, "uniform": 0.0, "uniform_again": 0.0, "lsgs": 0.05}
    first = records_of(effects, seeds=4).assign(dataset="demo", backbone="cmx")
    second = records_of({"uniform": 0.0, "lsgs": 0.0}, seeds=1)
    records = pd.concat([first, second.assign(dataset="demo", backbone="cbc")])
    table = differences(records, SCENARIOS, ["mean_iou", "worst_iou"], resamples=100)
    assert set(table["backbone"]) == {"cmx"}  # one replicate of the other says nothing
    assert list(table["method"]) == ["pretrained", "uniform_again", "lsgs"] * 2
    floor = table[table["method"] == "uniform_again"]
    assert set(floor["reference"]) == {"uniform"}
    assert floor["p_holm"].isna().all()
    compared = table[table["method"] == "lsgs"]
    assert set(compared["reference"]) == {"uniform+uniform_again"}
    assert (compared["p_holm"] >= compared["p"]).all()
    wanted = "lsgs-uniform, lsgs-pretrained, coverage-uniform"  # the last was not run
    fixed = differences(records, SCENARIOS, ["worst_iou"], None, 50, wanted)
    assert list(fixed["contrast"]) == ["lsgs - uniform", "lsgs - pretrained"]
    with pytest.raises(InputError, match="contrasts"):
        differences(records, SCENARIOS, ["worst_iou"], contrasts="lsgs")


def test_replicates_without_all_folds_are_left_out():
    records = records_of({"uniform": 0.0, "lsgs": 0.0}, seeds=3).assign(dataset="d", backbone="b")
    both = pd.concat([records, records.assign(fold=1)], ignore_index=True)
    assert len(whole_replicates(both)) == len(both)
    cut = both[(both["method"] != "lsgs") | (both["fold"] == 0) | (both["seed"] < 2)]
    kept = whole_replicates(cut).groupby("method")["seed"].agg(set).to_dict()
    assert kept == {"lsgs": {0, 1}, "uniform": {0, 1, 2}}


def test_holm():
    p = [0.01, 0.04, 0.03, 0.005]
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # Holm 1979, by hand
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_study_that_still_runs():
    """Methods are compared over the seeds they share with their reference, where there are two."""
    effects = {"pretrained": 0.0, "uniform": 0.0, "uniform_again": 0.0, "lsgs": 0.0}
    records = records_of(effects, seeds=3).assign(dataset="d", backbone="b")
    begun = records[(records["method"] != "uniform_again") | (records["seed"] == 0)]
    for part in (begun, records[records["block"] == 3]):
        assert differences(part, SCENARIOS, ["mean_iou"], resamples=20).empty
    ahead = begun["method"].isin(["uniform", "pretrained"])
    apart = begun[ahead & (begun["seed"] < 2) | (begun["method"] == "lsgs") & (begun["seed"] > 0)]
    wanted = "lsgs-pretrained,pretrained-uniform"
    fixed = differences(apart, SCENARIOS, ["mean_iou"], contrasts=wanted)
    assert list(fixed["contrast"]) == ["pretrained - uniform"]
    alone = records[records["method"].isin(["lsgs", "pretrained"])]
    fixed = differences(alone, SCENARIOS, ["mean_iou"], contrasts="lsgs-pretrained,lsgs-uniform")
    assert list(fixed["contrast"]) == ["lsgs - pretrained"]  # also without uniform
    with pytest.raises(InputError, match=r"contrasts: method: .*found 'lsgg'"):
        differences(records, SCENARIOS, ["mean_iou"], contrasts="lsgg-uniform")


def test_pooled_cases_agree_with_a_published_analysis():
    """Thirteen trials of the BCG vaccine (Colditz 1994), as the R package metafor analyses them."""
    ill = np.array([4, 6, 3, 62, 33, 180, 8, 505, 29, 17, 186, 5, 27])
    well = np.array([119, 300, 228, 13536, 5036, 1361, 2537, 87886, 7470, 1699, 50448, 2493, 16886])
    ill_untreated = np.array([11, 29, 11, 248, 47, 372, 10, 499, 45, 65, 141, 3, 29])
    treated = ill + well
    untreated = ill_untreated + np.array(
        [128, 274, 209, 12619, 5761, 1079, 619, 87892, 7232, 1600, 27197, 2338, 17825]
    )
    effect = np.log(ill / treated) - np.log(ill_untreated / untreated)
    error = np.sqrt(1 / ill - 1 / treated + 1 / ill_untreated - 1 / untreated)
    found = pooled(effect.tolist(), error.tolist())
    assert found["spread"] ** 2 == pytest.approx(0.3181, abs=1e-4)
    assert found["mean"] == pytest.approx(-0.7150, abs=1e-3)
    interval = found["spread_low"] ** 2, found["spread_high"] ** 2
    assert interval == pytest.approx((0.1197, 1.1115), abs=2e-4)
    assert found["new_low"] < found["low"] < found["mean"] < found["high"] < found["new_high"]
    assert (found["cases"], found["positive"]) == (13, 2)
    with pytest.raises(InputError, match="at least 3 cases"):
        pooled([0.1, 0.2], [0.1, 0.1])


def test_cases_that_agree_have_no_spread():
    found = pooled([0.1, 0.1, 0.1, 0.1], [0.02, 0.02, 0.02, 0.02])
    assert found["spread"] == 0
    assert found["mean"] == pytest.approx(0.1)
    # the interval is never narrower than that of one difference common to all
    assert found["high"] - found["mean"] == pytest.approx(3.1824 * 0.01, rel=1e-3)


def test_networks_before_fine_tuning_do_not_set_the_scale_of_figures():
    effects = {"pretrained": -0.4, "uniform": 0.0, "uniform_again": 0.0, "lsgs": 0.02}
    records = records_of(effects, seeds=3).assign(dataset="d", backbone="cmx")
    axes = forest(differences(records, SCENARIOS, resamples=100), "worst_iou").axes[0]
    assert axes.get_xlim()[0] > -0.1
    assert sum(text.get_text().startswith("← -0.") for text in axes.texts) == 1
    iou = scenario_scores(records, ["dataset", "backbone", "method"])
    assert score_heatmaps(iou, SCENARIOS.names).axes[0].collections[0].get_clim()[1] < 0.1


def test_sensor_values_are_shares_of_the_whole():
    records = records_of({"uniform": 0.0}, seeds=3)
    values = sensor_values(records, SCENARIOS, "uniform", empty=0.2, resamples=100)
    iou = Counts.of(records, ["uniform"], SCENARIOS).scenario_iou(np.ones((1, 12)))[0, 0]
    one, other, both = iou.mean(axis=0)
    # of two sensors, a value is half of what it gives alone and half of what it adds
    expected = [(one - 0.2 + both - other) / 2, (other - 0.2 + both - one) / 2]
    np.testing.assert_allclose(values["value"], expected)
    assert values["value"].sum() == pytest.approx(both - 0.2)
    assert (np.diff(values[["low", "value", "high"]]) > 0).all()


def networks_of(noise: float) -> pd.DataFrame:
    """Scores of three scenarios of one sensor and three of two, in four networks."""
    random = np.random.default_rng(0)
    columns = {"dataset": "d", "backbone": "b", "fold": 0}
    scenarios = pd.DataFrame(
        {"missing": [2, 2, 2, 1, 1, 1, 0], "lost": [0.5, 0.4, 0.3, 0.2, 0.1, 0.15, 0.0]}
    ).rename_axis("scenario")
    table = pd.concat([scenarios] * 4, keys=range(4), names=["network"]).reset_index()
    distortion = abs(table["lost"] + noise * random.normal(size=len(table)))
    return table.assign(distortion=distortion, **columns)


def test_stability_tells_signal_from_noise():
    same, counting = stability(networks_of(0.0)).to_dict("records")
    assert same["between"] == pytest.approx(0, abs=1e-12)
    perfect = ("within", "common", "rank", "rank_others", "within_others")
    assert [same[name] for name in perfect] == pytest.approx([1] * 5)
    assert counting["score"] == "missing"
    assert 0.8 < counting["rank"] < 1  # it does not order scenarios of as many sensors
    noisy = stability(networks_of(2.0)).iloc[0]
    assert noisy["between"] > 0.05
    assert noisy["within"] < 0.5
    assert noisy["rank"] < counting["rank"]
    with pytest.raises(InputError, match="at least two networks"):
        stability(networks_of(0.0).query("network == 0"))
