"""The wheel and the sdist of the core, installed where nothing else is."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT, copy_checkout

# What the core asks for itself, and what PyTorch brings along on a CPU.
ASKED = {"torch", "numpy", "scipy", "safetensors", "tqdm"}
BROUGHT = {"filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "setuptools"}
BROUGHT |= {"sympy", "typing-extensions"}


def example_of_the_readme() -> str:
    """The code of the section that says how to use the core in one's own loop."""
    section = (ROOT / "README.md").read_text().partition("## In your own code")[2]
    return re.search(r"```python\n(.*?)```", section, re.S)[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
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
    assert "RGB+NIR+SWIR" in subprocess.check_output(command, text=True, cwd=tmp_path, env={})
    [folder] = (tmp_path / "venv" / "lib").glob("python*/site-packages/lsgs_core")
    assert (folder / "py.typed").is_file()
