"""Scores the committed networks of the demo in a process of its own, whose environment can ask for
another processor's rounding: `python score_committed.py PREPARED`. Prints JSON: D and p."""

import json
import sys
from pathlib import Path

import torch
from checkout import ROOT
from study.data.manifest import load_manifest
from study.data.patches import PatchDataset
from study.provenance.devices import make_deterministic
from study.training.checkpoints import load_network

from lsgs_core import ScenarioSet, scenario_probabilities, score_scenarios


def committed_network(backbone: str):
    """A committed network of the demo."""
    return load_network(ROOT / "results/networks/demo" / backbone / "fold0/seed0").model


def main() -> None:
    make_deterministic(threads=1)
    definition = load_manifest(ROOT / "data_manifest.yaml").dataset("demo")
    patches = PatchDataset(Path(sys.argv[1]), definition, "land_cover", 0, "training")
    scenarios = ScenarioSet.of(patches.modalities)
    found = {"capability": torch.backends.cpu.get_cpu_capability()}
    for backbone in ("cbc_slp", "cbc", "cmx"):
        model, batches = committed_network(backbone), patches.batches(8)
        scores = score_scenarios(model, batches, scenarios, progress=False)
        p = scenario_probabilities(scores.distortion).probabilities
        found[backbone] = {"D": scores.distortion.tolist(), "p": p.tolist()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
