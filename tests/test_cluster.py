"""The same study through SLURM, on a SLURM of one node that the test starts on this machine."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT, printed
from study.stages.tiers import load_tier
from test_study import outputs

SCRIPT = Path(__file__).parent / "start_slurm.sh"
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")
CAN_START = os.geteuid() == 0 and all(shutil.which(name) for name in NEEDED)


@pytest.fixture
def slurm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run(["bash", SCRIPT, "start", folder], check=True, timeout=60)
    yield
    subprocess.run(["bash", SCRIPT, "stop", folder], check=True, timeout=60)


@pytest.mark.slow
@pytest.mark.skipif(not CAN_START, reason="needs root, and SLURM from Debian's packages")
def test_the_smoke_grid_on_slurm(clone, slurm):
    study = sys.executable, "-m", "study", "run", "smoke", "--profile", "profiles/slurm"
    assert "submitted with SLURM jobid" in printed(*study, folder=clone)
    assert len(outputs(clone)) >= 10
    assert (clone / "results" / "smoke" / "evaluation" / "summary.csv").is_file()


def test_the_page_has_the_jobs_of_the_tier():
    text = (ROOT / "profiles" / "slurm" / "README.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| `cluster` |"))
    written = [int(cell.replace(",", "")) for cell in line.split("|")[2:-1]]
    tier = load_tier("cluster", ROOT)
    runs = sum(len(methods) for methods in tier.points().values())
    starts, points = len(tier.networks()), len(tier.points())
    assert written == [len(tier.datasets), starts, starts, points, runs]
