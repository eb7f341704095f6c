"""Every make command that the README names is run, in a copy of what is committed."""

import re
import sys
from collections import Counter

import pytest
from checkout import ROOT, copy_checkout, printed
from study.stages.tiers import NOTEBOOKS, load_tier

# A part of what they print, and a file that they make.
RUN_HERE = {
    "make data-check": ("demo", None),
    "make study TIER=smoke": ("results/smoke", "results/smoke/evaluation/summary.csv"),
    "make map": ("100.0% from RGB+NIR+SWIR", "work/maps/demo/*/classes.tif"),
    "make study TIER=<name>": ("results/mine", "results/mine/evaluation/summary.csv"),
    "make study": ("pretrained IoU: equal", "results/demo/evaluation/summary.csv"),
}
QUICK = ("scratch",)  # the others take half a minute each
# test_browser, test_book and test_study run the first three.
RUN_ELSEWHERE = {"make lab", "make book", "make study TIER=cluster PROFILE=profiles/slurm"}
RUN_ELSEWHERE |= {"make test", "make test-slow"}


def commands() -> set[str]:
    """All commands that start with `make` in code blocks, tables and text for users."""
    pages = ("README.md", "notebooks/README.md", "profiles/slurm/README.md")
    text = "\n".join((ROOT / page).read_text() for page in pages)
    return set(re.findall(r"(?:`|^)(make [a-z-]+(?: [A-Z]+=[\w<>/]+)*)(?:`|$)", text, re.M))


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The checkout with its results, and the packages that are installed."""
    folder = copy_checkout(tmp_path_factory.mktemp("clone"), results=True)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    return folder


# Their notebooks take hours or GPUs: what they would do is listed.
LISTED_HERE = commands() - RUN_HERE.keys() - RUN_ELSEWHERE


def test_every_command_has_its_test():
    assert commands() >= RUN_HERE.keys() | RUN_ELSEWHERE
    tiers = {path.stem for path in (ROOT / "notebooks" / "tiers").glob("*.yaml")}
    listed = {command.split("=")[1] for command in LISTED_HERE}
    assert listed == tiers - {"demo", "smoke", "cluster"}


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=[pytest.mark.slow] * (command.split("=")[1] not in QUICK))
        for command in sorted(LISTED_HERE)
    ],
)
def test_long_commands_are_listed(command):
    tier = command.split("=")[1]
    said = printed(sys.executable, "-m", "study", "run", tier, "--dry-run")
    counted = dict(re.findall(r"^(\w+) +(\d+)$", said, re.M))
    jobs = Counter(job.partition("-")[0] for job, _ in load_tier(tier, ROOT).jobs())
    for stage, notebook in NOTEBOOKS.items():
        assert int(counted.get(stage, 0)) == jobs[notebook]


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN_HERE)
def test_commands_do_what_the_readme_says(clone, command):
    expected, made = RUN_HERE[command]
    if "<name>" in command:  # as the README says, but of one backbone and fold
        text = (clone / "notebooks" / "tiers" / "scratch.yaml").read_text()
        text = re.sub(r"backbones: \[.*?\]", "backbones: [cmx]", text)
        text = re.sub(r"folds: \[.*?\]", "folds: [0]", text)
        (clone / "notebooks" / "tiers" / "mine.yaml").write_text(text)
        command = command.replace("<name>", "mine")
    for path in clone.glob(made or "none"):
        path.unlink()
    make = "make", "--old-file=.venv/installed", *command.split()[1:]
    assert expected in printed(*make, folder=clone)
    if made:
        assert [*clone.glob(made)]
