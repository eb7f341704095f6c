"""Use as a library: alone, with networks of others, and the examples of docstrings and README."""

import ast
import doctest
import pickle
import re
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from checkout import ROOT, copy_checkout
from torch import nn

from lsgs_core import AdaptedBackbone, HookedModel, InputError, ScenarioSet, score_scenarios

# What the core asks for itself, and what PyTorch brings along on a CPU.
ASKED = {"torch", "numpy", "scipy", "safetensors", "tqdm"}
BROUGHT = {"filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "setuptools"}
BROUGHT |= {"sympy", "typing-extensions"}
MODULES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path.read_text("utf-8")
    for path in sorted((ROOT / "lsgs_core").rglob("*.py"))
}
SCENARIOS = ScenarioSet.of(["A", "B", "C"])


def example_of_the_readme() -> str:
    """The code of the section that says how to use the core in one's own loop."""
    section = (ROOT / "README.md").read_text().partition("## In your own code")[2]
    return re.search(r"```python\n(.*?)```", section, re.S)[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The distributions that `python -m build` makes of a copy of this checkout."""
    source = copy_checkout(tmp_path_factory.mktemp("source"))
    subprocess.run([sys.executable, "-m", "build", source], check=True, capture_output=True)
    found = {path.suffix: path for path in (source / "dist").iterdir()}
    return {"wheel": found[".whl"], "sdist": found[".gz"]}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_installs_and_works_alone(built, tmp_path, kind):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    options = ["--quiet", "--constraint", ROOT / "requirements.lock"]
    install = [python, "-m", "pip", "install", *options, built[kind]]
    subprocess.run(install, check=True, timeout=900)
    pip_list = [python, "-m", "pip", "list", "--format=freeze"]
    listed = subprocess.check_output(pip_list, text=True)
    names = {re.sub("[-_.]+", "-", line.partition("==")[0]).lower() for line in listed.split()}
    cuda = {name for name in names if name.startswith(("nvidia-", "cuda-", "triton"))}
    assert names - cuda - {"pip", "lsgs-core"} <= ASKED | BROUGHT
    assert names >= ASKED
    command = [python, "-c", example_of_the_readme()]
    printed = subprocess.check_output(command, text=True, cwd=tmp_path, env={})
    assert "optical+infrared+radar" in printed
    [folder] = (tmp_path / "venv" / "lib").glob("python*/site-packages/lsgs_core")
    assert (folder / "py.typed").is_file()


class Foreign(nn.Module):
    """A network with another call: one tensor of all bands, and a decoder after the latent."""

    decoded = 0

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(9, 8, 3, stride=4), nn.ReLU())
        self.decoder = nn.ConvTranspose2d(8, 1, 4, stride=4)

    def forward(self, bands: torch.Tensor) -> torch.Tensor:
        latent = self.encoder(bands)
        self.decoded += 1
        return self.decoder(latent)


def images_of(count: int, size: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(count, 3, size, size, generator=generator) for _ in range(3)]


def concatenated(network: nn.Module, images: list[torch.Tensor]) -> torch.Tensor:
    return network(torch.cat(images, dim=1))


@pytest.mark.parametrize("name", [name for name, text in MODULES.items() if ">>>" in text])
def test_docstring_examples(name):
    result = doctest.testmod(import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted
    assert not result.failed


def test_the_core_and_the_readmes_example_need_no_other_package():
    example = example_of_the_readme()
    for name, text in {**MODULES, "README.md": example}.items():
        for node in ast.walk(ast.parse(text)):
            imported = [node.module] if isinstance(node, ast.ImportFrom) else []
            imported += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            packages = {module.partition(".")[0] for module in imported}
            assert packages <= {"lsgs_core"} | ASKED | sys.stdlib_module_names, name
    defined = {}
    exec(example, defined)
    assert defined["result"].probabilities.sum() == pytest.approx(1)
    assert defined["available"].shape == (3, 3)


def test_a_foreign_network_is_scored_by_hand():
    torch.manual_seed(0)
    network, images = Foreign(), images_of(6)
    model = HookedModel(network, "encoder", concatenated)
    scores = score_scenarios(model, [images], SCENARIOS, progress=False)
    with torch.no_grad():
        full = network.encoder(torch.cat(images, dim=1))
        for k, mask in enumerate(SCENARIOS.masks):
            seen = [i if m else torch.zeros_like(i) for i, m in zip(images, mask, strict=True)]
            latent = network.encoder(torch.cat(seen, dim=1))
            expected = (latent - full).double().square().mean()
            assert scores.distortion[k] == pytest.approx(float(expected), rel=1e-5, abs=1e-12)
    assert network.decoded == 1  # the first forward pass counts, the others end at the latent
    assert model(images, torch.ones(6, 3, dtype=torch.bool)).shape == (6, 1, 32, 32)
    assert not network.encoder._forward_hooks


def test_mistakes():
    images, available = images_of(1, 8), torch.ones(1, 3, dtype=torch.bool)
    recurrent = nn.Sequential(nn.Flatten(2), nn.LSTM(64, 2))
    of_the_encoder = HookedModel(Foreign(), "decoder", lambda net, i: net.encoder(torch.cat(i, 1)))
    of_one = HookedModel(Foreign(), "encoder", absent=[torch.ones(3)])
    of_bands = Foreign()
    of_bands.latent = of_bands.encoder
    for model, message in (
        (of_the_encoder, "1 times .*found 0"),
        (HookedModel(recurrent, "1", concatenated), "found tuple"),
        (of_one, "absent: .* 3 tensors, found 1"),
        (HookedModel(Foreign(), "encoder"), r"^call: .* a list of tensors.*: conv2d\(\)"),
        (AdaptedBackbone(of_bands, [3, 3, 3], 1), "one for images and availability: .*forward"),
    ):
        with pytest.raises(InputError, match=message):
            model.latent(images, available)


class Shared(nn.Module):
    """One encoder for all modalities, under two names, and a layer after it that works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 4, 3)
        self.same = self.encoder
        self.after, self.scale = nn.ReLU(inplace=True), None

    def forward(self, images: list[torch.Tensor]) -> torch.Tensor:
        if self.scale is None:  # made on first use, as positions are
            self.scale = torch.ones(3)
        pairs = zip(self.scale, images, strict=True)
        return sum(scale * self.after(self.encoder(image)) for scale, image in pairs)


def test_an_encoder_that_modalities_share():
    """Its outputs are concatenated where the caller says how many there are."""
    network, images = Shared(), images_of(2, 8)
    available = torch.tensor([[True, False, True], [True, True, False]])
    with pytest.raises(InputError, match=r"'encoder' to run 1 times .* found 3"):
        HookedModel(network, "encoder").latent(images, available)
    model = HookedModel(network, "same", calls=3)  # the second name of a module is a name
    images[1][0], images[2][1] = 0, 0
    expected = torch.cat([network.encoder(image) for image in images], dim=1)
    for _ in range(2):  # the complete pass and those that end early
        assert torch.equal(model.latent(images, available), expected)
    fresh = pickle.loads(pickle.dumps(HookedModel(Shared(), "same", calls=3)))
    scores = score_scenarios(fresh, [images_of(2, 8)], SCENARIOS, progress=False)
    assert scores.distortion[:6].min() > 0
    fresh(images, available).sum().backward()  # what it made while it was scored serves training
