"""A network of one's own in the whole study, where the command line names its file alone."""

import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
import torch
import yaml
from checkout import ROOT, printed
from study.provenance import artifacts
from study.provenance.artifacts import Record, save_weights
from study.stages.parameters import checked_parameters, notebook_parameters
from study.stages.pretraining import expect_fit
from study.stages.tiers import load_tier
from study.training import checkpoints
from study.training.checkpoints import NETWORKS, build_own, load_network, own_code
from study.training.settings import TrainingSettings
from test_training import SCENARIOS, Blobs, run, small

from lsgs_core import AdaptedBackbone, HookedModel, InputError
from lsgs_core.models import BACKBONES
from lsgs_core.models.lora import add_lora, merge_lora

NAME = "my_networks:good"
OWN = """
import os
from pathlib import Path

import torch
from torch import nn

from lsgs_core import HookedModel

Path(os.environ["IMPORTED"]).touch()


def joined(network, images):
    return network(torch.cat(images, dim=1))


def good(bands, classes, call=joined, stride=1):
    layers = nn.Conv2d(sum(bands), 4, 3, stride, 1), nn.ReLU(), nn.Conv2d(4, classes, 1)
    return HookedModel(nn.Sequential(*layers), "1", call, low_rank=["0", "2"])


class wrapped(nn.Module):
    def __init__(self, bands, classes):
        super().__init__()
        self.inner = good(bands, classes)

    def latent(self, images, available):
        return self.inner.latent(images, available)

    def forward(self, images, available):
        return self.inner(images, available)


class looks_at_the_absent(wrapped):
    def forward(self, images, available):
        return self.inner(images, available) + images[-1].mean(dim=1, keepdim=True)


class looks_in_its_latent(wrapped):
    def latent(self, images, available):
        return self.inner.latent(images, available) + images[-1].mean(dim=1, keepdim=True)


class mixes_samples(wrapped):
    def forward(self, images, available):
        return self.inner(images, available).cumsum(dim=0)


class mixes_latents(wrapped):  # as the published code does
    def latent(self, images, available):
        return self.inner.latent(images, available).cumsum(dim=0)


class has_learned_too_fast(wrapped):
    def __init__(self, bands, classes):
        super().__init__(bands, classes)
        next(self.inner.parameters()).data.view(-1)[0] = float("inf")


class draws_its_latent(wrapped):
    def latent(self, images, available):
        return torch.rand(len(available), 1, 2, 2)


small = lambda bands, classes: good(bands, classes, stride=2)
whole_numbers = lambda bands, classes: good(bands, classes, lambda *a: joined(*a).round().long())
other_type = lambda bands, classes: good(bands, classes, lambda *a: {"logits": joined(*a)})
fails = lambda bands, classes: good(bands, classes, lambda network, images: network(images[0]))
no_latent = lambda bands, classes: nn.Conv2d(sum(bands), classes, 1)
cannot_be_built = lambda bands, classes: 1 / 0
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The file, which leaves a mark when it is imported; the command line does not name it yet."""
    path, mark = tmp_path / "my_networks.py", tmp_path / "imported"
    path.write_text(OWN)
    monkeypatch.setenv("IMPORTED", str(mark))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return SimpleNamespace(
        path=path, mark=mark, name=lambda file: monkeypatch.setenv(NETWORKS, str(file))
    )


def saved(folder: Path, model: torch.nn.Module) -> Path:
    """Weights whose record names the network."""
    bands, numbers = {name: [name] for name in "ABC"}, {name: [1.0] for name in "ABC"}
    description = {"bands": bands, "classes": ["x"], "task_kind": "binary", "patch_size": 32}
    description |= {"pixel_size": None, "means": numbers, "deviations": numbers}
    made_with = {"model": model.configuration, "description": description}
    return save_weights(folder / "weights.safetensors", model.state_dict(), Record(made_with))


def test_nothing_but_the_command_line_imports_it(own, tmp_path):
    """No tier, notebook, record or weights, though the file lies where Python finds it."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copyfile(ROOT / "data_manifest.yaml", tmp_path / "data_manifest.yaml")
    tier = {"grid": {"backbones": [NAME], "methods": ["lsgs"], "folds": 1, "seeds": 1}}
    tier["02_pretraining_check"] = {"weights": "train"}
    (tmp_path / "notebooks" / "tiers" / "own.yaml").write_text(yaml.safe_dump(tier))
    parameters = notebook_parameters(ROOT / "notebooks" / "02_pretraining_check.ipynb")
    parameters |= {"backbone": NAME, "manifest": str(ROOT / "data_manifest.yaml")}
    own.name(own.path)
    weights = saved(tmp_path, build_own(NAME, [1, 1, 1], 1))
    doors = (
        lambda: load_tier("own", tmp_path),
        lambda: checked_parameters("02_pretraining_check", parameters),
        lambda: load_network(weights),
    )
    for file in ("", own.path):
        own.name(file)
        for door in doors:
            checkpoints._imported.cache_clear()
            own.mark.unlink(missing_ok=True)
            if file:
                door()
            else:
                with pytest.raises(InputError, match="the command line names its file"):
                    door()
            assert own.mark.exists() == bool(file)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other:good", r"expected a file other\.py for 'other:good', found .*my_networks\.py"),
        ("my_networks:nothing", r"expected a function 'nothing' in .*my_networks\.py"),
        ("my_networks:HookedModel", "expected a function 'HookedModel'"),  # of another module
        ("../x:good", "names its file"),
        ("my_networks:no_latent", "no_latent: network: .*a method `latent`"),
        ("my_networks:cannot_be_built", "cannot_be_built: ZeroDivisionError: division by zero"),
        ("my_networks:small", r"small: logits .*expected shape \[3, 1, 64, 64\], found .*32, 32"),
        ("my_networks:whole_numbers", r"forward: expected floating-point numbers .*torch\.int64"),
        ("my_networks:other_type", "forward: expected a Tensor, found {'logits'"),
        ("my_networks:fails", "fails: RuntimeError: .*expected input.* to have 9 channels"),
        ("my_networks:looks_at_the_absent", "pixels of an absent modality: expected at most 0"),
        ("my_networks:looks_in_its_latent", "pixels of an absent modality: expected at most 0"),
        ("my_networks:mixes_samples", "a patch alone and in a batch: expected at most 0.0001"),
        ("my_networks:mixes_latents", "a patch alone and in a batch: expected at most 0.0001"),
        ("my_networks:draws_its_latent", "D of the full scenario: expected at most 0.0001"),
        ("my_networks:has_learned_too_fast", "not finite: expected at most 0"),
        *((name, None) for name in (NAME, *BACKBONES)),
    ],
)
def test_what_is_wrong_is_one_sentence_before_long_work(own, name, message):
    own.name(own.path)
    patches = Blobs(4, size=64)
    training = SimpleNamespace(batches=lambda size: patches.batches(size, range(4)))
    settings = TrainingSettings(epochs=1)
    opened = SimpleNamespace(
        training=training, settings=settings, scenarios=SCENARIOS,
        build=lambda device: build_own(name, [3, 3, 3], 1) if ":" in name else small(name),
    )  # fmt: skip
    if message is None:
        expect_fit(name, opened)
        return
    with pytest.raises(InputError, match=message) as raised:
        expect_fit(name, opened)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_no_python_is_named(own):
    own.name(own.path)
    own.path.write_text("def good(:")
    with pytest.raises(InputError, match=r"my_networks\.py: SyntaxError: invalid syntax"):
        own_code(NAME)
    own.path.unlink()
    with pytest.raises(InputError, match=r"NETWORKS: expected a file my_networks\.py"):
        own_code(NAME)


def test_its_code_takes_part_in_freshness(own, tmp_path, monkeypatch):
    own.name(own.path)
    before, model = own_code(NAME), build_own(NAME, [1, 1, 1], 1)
    weights = saved(tmp_path, model)
    assert artifacts.check(weights)["parameters"]["model"]["code"] == before
    own.path.write_text("# Why.\n" + OWN)
    assert own_code(NAME) == before
    hashed, sha256 = [], artifacts.file_sha256
    monkeypatch.setattr(artifacts, "file_sha256", lambda path: hashed.append(path) or sha256(path))
    assert load_network(weights).model.networks[0].model[0].out_channels == 4
    assert hashed == [weights]  # once
    own.path.write_text(OWN.replace("nn.ReLU()", "nn.GELU()"))
    assert own_code(NAME) != before
    assert isinstance(build_own(NAME, [1, 1, 1], 1).networks[0].model[1], torch.nn.GELU)
    with pytest.raises(InputError, match=r"made with model = .*my_networks:good"):
        load_network(weights)
    assert own_code("cmx") == ""


def test_low_rank_updates_of_branches_and_tokens_are_trained(own, tmp_path):
    own.name(own.path)
    branches = [build_own(NAME, [1, 2], 1).networks[0] for _ in range(3)]
    for branch in branches:
        branch.call = lambda network, images: network(images[0])
    model = AdaptedBackbone(branches, [3, 3, 3], 1)
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    layers = [f"networks.{m}.model.{layer}" for m in range(3) for layer in (0, 2)]
    assert list(model.low_rank_layers()) == layers
    add_lora(model)
    run(tmp_path, model)
    merge_lora(model)
    after = model.state_dict()
    changed = {name for name, value in frozen.items() if not torch.equal(after[name], value)}
    assert changed == {f"{layer}.weight" for layer in layers}
    token = torch.nn.Parameter(torch.ones(3))
    inner = build_own(NAME, [3, 3, 3], 1).networks[0]
    absent = [token, torch.zeros(3), torch.zeros(3)]
    stacked = AdaptedBackbone(HookedModel(inner.model, "1", inner.call, absent=absent), [3] * 3, 1)
    run(tmp_path / "token", stacked)
    assert not torch.equal(token, torch.ones(3))


@pytest.mark.slow
def test_segformer_goes_through_the_whole_study(clone):
    """The cells and the tier of notebook A3 in files, as its last section says."""
    notebook = nbformat.read(clone / "notebooks" / "A3_your_own_network.ipynb", 4)
    code = [c.source for c in notebook.cells if c.cell_type == "code" and "SegformerC" in c.source]
    (clone / "my_networks.py").write_text("\n\n\n".join(code), "utf-8")
    [tier] = re.findall(r"```yaml\n(.*?)```", notebook.cells[-1].source, re.S)
    (clone / "notebooks" / "tiers" / "own.yaml").write_text(tier)
    command = [sys.executable, "-m", "study", "run", "own", "--cores", "2"]
    printed(*command, folder=clone, **{NETWORKS: "my_networks.py"})
    summary = pd.read_csv(clone / "results" / "own" / "evaluation" / "summary.csv")
    assert set(summary["method"]) == {"pretrained", "uniform", "lsgs", "lora"}
    assert set(summary["backbone"]) == {"my_networks:segformer"}
