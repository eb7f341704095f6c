"""One committed result again: which run, and what is said of the comparison."""

import pandas as pd
import pytest
from checkout import ROOT
from statistics_records import records_of
from study.stages.tiers import StudyFolder, load_tier
from study.workflow.commands import compare

from lsgs_core import InputError


@pytest.fixture
def tier(tmp_path):
    return load_tier("demo", ROOT, tmp_path)


def test_one_run_of_a_grid(tier):
    single = tier.only("demo/cmx/lsgs/0/0")
    assert single.points() == {("demo", "cmx", 0, 0): ["lsgs"]}
    jobs = [job for job, _ in single.jobs()]
    assert jobs == [
        "01_data_preparation-demo",
        "02_pretraining_check-demo-cmx-fold0-network0",
        "03_scenario_scoring-demo-cmx-fold0-network0",
        "04_finetuning-demo-cmx-fold0-seed0",
        "05_evaluation",
    ]
    for wrong in ("demo/cmx/lsgs/0/7", "cmx", "demo/cmx/magic/0/0", ""):
        with pytest.raises(InputError, match="such as demo/cbc_slp/uniform/0/0"):
            tier.only(wrong)


def test_comparison(tier, tmp_path):
    single = tier.only("demo/cmx/lsgs/0/0")
    folder: StudyFolder = single.folder
    records = records_of({"pretrained": 0.0, "lsgs": 0.05}, seeds=1)
    published = tmp_path / "records.csv.xz"
    records.assign(dataset="demo", backbone="cmx").to_csv(published, index=False)
    places = {
        "pretrained": folder.pretrained("demo", "cmx", 0, 0),
        "lsgs": folder.runs("demo", "cmx", 0, 0) / "lsgs",
    }
    for method, place in places.items():
        place.mkdir(parents=True)
        rows = records[records["method"] == method].drop(columns=["method", "seed", "fold"])
        rows.sample(frac=1, random_state=0).to_csv(place / "records.csv", index=False)
    same, sentence = compare(single, published)
    assert same
    assert f"all {len(records)} rows" in sentence
    changed = pd.read_csv(places["lsgs"] / "records.csv")
    changed.loc[0, "tp"] += 200
    changed.to_csv(places["lsgs"] / "records.csv", index=False)
    same, sentence = compare(single, published)
    assert not same
    assert "differs by up to 0.0" in sentence
    with pytest.raises(InputError, match="no such run"):
        compare(tier.only("demo/cbc/lsgs/0/0"), published)
