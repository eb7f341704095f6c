"""The committed networks: the same probabilities under any rounding, and nothing else is taken."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import papermill
import pytest
import torch
import yaml
from checkout import ROOT, printed
from study.data.manifest import load_manifest
from study.provenance.artifacts import Record, check, save_weights
from study.provenance.files import file_sha256
from study.stages.agreement import DISTORTION, PROBABILITY
from study.training.checkpoints import load_pretrained

from lsgs_core import InputError, build_backbone

MANIFEST = ROOT / "data_manifest.yaml"
NETWORKS = load_manifest(MANIFEST).networks
ROUNDINGS = {
    "this processor": {},
    "a processor without AVX": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "a processor with AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}


def made_with(network) -> dict:
    """What notebook 02 asks of the weights."""
    definition = load_manifest(MANIFEST).dataset(network.dataset)
    classes = tuple(definition.task("land_cover").classes)
    bands = [len(names) for names in definition.modalities.values()]
    return {
        "dataset": network.dataset,
        "task": "land_cover",
        "fold": network.fold,
        "normalisation": "standardise",
        "model": build_backbone(network.backbone, "demo", bands, len(classes)).configuration,
        "modalities": definition.modalities,
        "classes": classes,
        "pretraining_seed": network.seed,
        "patches_sha256": check(ROOT / network.weights)["parameters"]["patches_sha256"],
    }


def built(network):
    torch.manual_seed(0)
    return build_backbone(network.backbone, "demo", (3, 3, 3), 5)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.backbone)
def test_committed_networks_are_those_of_the_manifest(network):
    model = built(network)
    found = load_pretrained(model, "committed", MANIFEST, made_with(network))
    assert found.origin == f"committed: {network.origin}"
    assert found.history is not None
    assert len(found.history) == found.trained_with["settings"]["epochs"]
    assert found.path.with_name("model_card.md").is_file()


@pytest.fixture
def copy(tmp_path):
    """A manifest with one committed network, to be damaged."""
    network = NETWORKS[-1]
    folder = (tmp_path / network.weights).parent
    shutil.copytree((ROOT / network.weights).parent, folder)
    content = yaml.safe_load(MANIFEST.read_text("utf-8"))
    content["networks"] = content["networks"][-1:]

    def write(**changes) -> Path:
        content["networks"][0] |= changes
        path = tmp_path / "data_manifest.yaml"
        path.write_text(yaml.safe_dump(content), "utf-8")
        return path

    return network, folder / "weights.safetensors", write


def refused(copy, message: str, wanted=None, weights: str = "committed", **changes) -> None:
    network, _, write = copy
    expected = made_with(network) | (wanted or {})
    with pytest.raises(InputError, match=message):
        load_pretrained(built(network), weights, write(**changes), expected)


def test_a_damaged_or_absent_network_says_which_command_brings_it(copy):
    copy[1].write_bytes(copy[1].read_bytes()[:-1] + b"\x01")
    refused(copy, r"weights.safetensors: its sha256 is .*expected .* data_manifest.yaml.*checkout")
    copy[1].unlink()
    refused(copy, r"not there.*git checkout -- results/networks.*make networks")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"modalities": {"RGB": ["B02", "B03", "B04"]}}, "made with modalities"),
        ({"classes": ("water", "land")}, "made with classes"),
        ({"task": "forest"}, "made with task"),
        ({"normalisation": "centre"}, "made with normalisation"),
        ({"patches_sha256": "0"}, "another patch table.*'train'"),
        ({"fold": 1}, "no committed network.*fold 1.*'train'"),
        ({"pretraining_seed": 7}, "no committed network.*seed 7"),
        ({"dataset": "potsdam"}, "no committed network of data set 'potsdam'"),
    ],
)
def test_weights_of_something_else_are_named(copy, wanted, message):
    refused(copy, message, wanted)


def test_ones_own_weights_come_in_by_the_same_door(copy, tmp_path):
    network, _, write = copy
    wanted = made_with(network)
    model, path = built(network), tmp_path / "mine" / "weights.safetensors"
    own = {name: wanted[name] for name in ("model", "modalities", "classes")}
    save_weights(path, model.state_dict(), Record({**own, "dataset": "elsewhere"}))
    other = built(network)
    with torch.no_grad():
        next(other.parameters()).zero_()
    found = load_pretrained(other, str(path), write(), wanted)
    assert found.origin == "a checkpoint of this study"
    assert found.history is None
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    save_weights(path, model.state_dict(), Record({**own, "classes": ["a", "b", "c", "d", "e"]}))
    refused(copy, "made with classes", weights=str(path))
    refused(copy, "no such file", weights=str(tmp_path / "nowhere.pth"))


@pytest.mark.parametrize(
    "rounding",
    [pytest.param(name, marks=[pytest.mark.slow] * ("AVX2" in name)) for name in ROUNDINGS],
)
def test_the_same_probabilities_under_any_rounding(prepared_demo, rounding):
    """D to 1e-4 of itself and p to 1e-4, in float32, against the committed scoring."""
    script = ROOT / "tests" / "score_committed.py"
    said = printed(sys.executable, script, prepared_demo, **ROUNDINGS[rounding])
    found = json.loads(said.splitlines()[0])
    capability = ROUNDINGS[rounding].get("ATEN_CPU_CAPABILITY", found["capability"])
    assert found["capability"] == capability.upper()  # and not this processor's
    for network in NETWORKS:
        place = re.sub("^results/networks", "results/reference/scores", network.weights)
        committed = json.loads((ROOT / place).with_name("probabilities.json").read_text())
        here = found[network.backbone]
        np.testing.assert_allclose(here["D"], committed["D_sh"], rtol=DISTORTION, atol=0)
        np.testing.assert_allclose(here["p"], committed["final_probs"], atol=PROBABILITY)


@pytest.mark.slow
def test_the_notebook_takes_ones_own_weights(prepared_demo):
    work, notebook = prepared_demo.parents[1], ROOT / "notebooks" / "02_pretraining_check.ipynb"
    own = shutil.copytree((ROOT / NETWORKS[-1].weights).parent, work / "own")
    own /= "weights.safetensors"
    parameters = {"work": str(work), "weights": str(own), "backbone": NETWORKS[-1].backbone}
    executed = work / "own.ipynb"
    papermill.execute_notebook(
        notebook, executed, parameters, cwd=notebook.parent, progress_bar=False
    )
    assert "a checkpoint of this study" in executed.read_text("utf-8")
    [taken] = (work / "pretrained").rglob("weights.safetensors")
    assert file_sha256(taken) == file_sha256(own)
    record = check(taken)
    assert record["inputs"]["weights"] == file_sha256(own)
    trained_with = record["parameters"]["trained_with"]
    assert trained_with == check(own)["parameters"]["trained_with"]
