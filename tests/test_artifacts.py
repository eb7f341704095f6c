"""Outputs carry what made them, are whole or not there, and others are refused."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from study.comparison.predictions import composite
from study.figures import save_figure, use_style
from study.provenance.artifacts import (
    Record,
    check,
    load_table,
    load_weights,
    save,
    save_json,
    save_table,
    save_weights,
)
from study.provenance.files import file_sha256

from lsgs_core import InputError

RECORD = Record({"fold": 1, "bands": (3, 3), "seed": 0}, {"weights": "abc"})
TABLE = pd.DataFrame({"scenario": ["A", "B"], "p": [0.1, 1 / 3]})


def test_round_trips(tmp_path):
    save_table(tmp_path / "t.csv", TABLE, RECORD)
    pd.testing.assert_frame_equal(load_table(tmp_path / "t.csv"), TABLE, rtol=1e-8)
    named = pd.DataFrame({"class": ["None", "NA", "null"], "iou": [0.5, float("nan"), 1.0]})
    save_table(tmp_path / "n.csv", named, RECORD)
    pd.testing.assert_frame_equal(load_table(tmp_path / "n.csv"), named)
    save_json(tmp_path / "j.json", {"p": [0.5, float("nan")]}, RECORD)
    check(tmp_path / "j.json", {"fold": 1})
    assert json.loads((tmp_path / "j.json").read_text()) == {"p": [0.5, None]}
    weights = {"w": torch.randn(2, 3).T, "n": torch.tensor(3)}
    save_weights(tmp_path / "w.safetensors", weights, RECORD)
    loaded, record = load_weights(tmp_path / "w.safetensors", {"fold": 1})
    assert torch.equal(loaded["w"], weights["w"])
    assert record["parameters"] == {"fold": 1, "bands": [3, 3], "seed": 0}
    assert record["inputs"] == {"weights": "abc"}
    assert record["environment"]["threads"] == torch.get_num_threads()
    assert {"python", "packages", "device", "commit", "date"} <= set(record["environment"])


def test_equal_content_is_equal_bytes(tmp_path):
    weights = {name: torch.arange(5.0) for name in "cab"}
    one, two = (save_weights(tmp_path / name, weights, Record({"name": name})) for name in "ab")
    assert one.read_bytes() == two.read_bytes()


def test_other_parameters_are_refused(tmp_path):
    path = save_table(tmp_path / "t.csv", TABLE, RECORD)
    check(path, {"fold": 1, "bands": (3, 3)}, {"weights": "abc"})
    with pytest.raises(InputError, match=r"t\.csv: made with fold = 1, expected 2"):
        check(path, {"fold": 2})
    with pytest.raises(InputError, match="preset"):
        check(path, {"preset": "demo"})  # it says nothing about it
    with pytest.raises(InputError, match="another weights"):
        check(path, made_from={"weights": "abd"})


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = save_table(tmp_path / "t.csv", TABLE, RECORD)
    before = path.read_bytes()

    def fail(to):
        to.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save(path, fail, RECORD)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.csv", "t.csv.record.json"]


def test_figures_are_equal_bytes_and_have_records(tmp_path):
    use_style()
    digests = []
    for name in ("one", "two"):
        figure, axes = plt.subplots()
        axes.plot([1, 2, 3])
        png, pdf = save_figure(figure, tmp_path, name, RECORD)
        plt.close(figure)
        digests.append((file_sha256(png), file_sha256(pdf)))
        assert check(png, {"fold": 1})["file"] == f"{name}.png"
    assert digests[0] == digests[1]


def test_pictures_and_maps_of_odd_input():
    flat = composite(np.full((1, 4, 4), 7, dtype=np.uint16))
    assert flat.shape == (4, 4, 3)
    assert np.isfinite(flat).all()
    two = composite(np.arange(2 * 16).reshape(2, 4, 4))
    assert (two.min(), two.max()) == (0, 1)
