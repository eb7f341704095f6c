"""How long a study takes: said before it starts, and after it by stage.

The estimate is a product: seconds per patch, measured once on one core, times the patches of the
tier. It is for CPUs and small networks (the preset "demo"); for others nothing was measured.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from lsgs_core.errors import InputError
from study.provenance.schema import read_json
from study.stages.tiers import NOTEBOOKS, Tier

MEASURED_ON = "one core of an Intel Xeon of 2.8 GHz"
SIZE = 64  # pixels; side of the patches
# Seconds of a training step per patch, and of one scenario of a patch: evaluated, and scored.
SECONDS: Mapping[str, tuple[float, float, float]] = {
    "cbc_slp": (0.014, 0.016, 0.002),
    "cbc": (0.045, 0.017, 0.002),
    "cmx": (0.023, 0.006, 0.001),
}
# Seconds of a notebook besides: starting, importing, drawing. Notebook 01 downloads nothing.
BESIDES = {"data": 30, "pretraining": 20, "scoring": 28, "finetuning": 24, "evaluation": 60}
# Patches of the data sets that come with the repository, in the manifest's own folds: side in
# pixels, number of training patches, and of test patches.
PATCHES = {"demo": (64, 293, 93), "landsat7": (32, 268, 69)}
PATCHES |= {"flood": (64, 59, 24), "landsat8": (32, 440, 114)}
PATCHES |= {f"{name}_five": PATCHES[name] for name in ("demo", "flood")}
RESIZED = {"protocol": "strict", "split": "", "patch_size": 0, "patch_stride": 0}
RESIZED |= {"block_size": 0, "margin": -1, "validation_blocks": -1}


def estimate(tier: Tier, cores: int, root: Path) -> str:
    """Return a sentence that says how long a whole tier takes, and what this is based on."""
    other_size = any(section.get("preset", "demo") != "demo" for section in tier.sections.values())
    if other_size or {backbone for _, backbone, *_ in tier.networks()} - SECONDS.keys():
        measured = f"the preset 'demo' of {', '.join(SECONDS)}"
        return f"how long this takes is not known: it was measured for {measured} alone"
    devices = {tier.setting(stage, "device") for stage in ("pretraining", "scoring", "finetuning")}
    if devices - {"auto", "cpu"} or torch.cuda.is_available():
        return "how long this takes is not known: it was measured on a CPU alone"
    stages: dict[str, list[float]] = defaultdict(list)
    counts = {name: _patches(tier, name, root) for name in tier.datasets}
    if unknown := [name for name, count in counts.items() if count is None]:
        return f"how long this takes is not known before notebook 01 has cut {unknown[0]} up"
    scenarios = {name: 2 ** len(tier.manifest.dataset(name).modalities) - 1 for name in counts}
    for job, parameters in tier.jobs():
        stage = next(stage for stage, name in NOTEBOOKS.items() if job.startswith(name))
        seconds = float(BESIDES[stage])
        if "backbone" in parameters:
            name = parameters["dataset"]
            seconds += _computing(stage, parameters, counts[name] or (0, 0, 0), scenarios[name])
        stages[stage].append(seconds)
    total = sum(max(max(jobs), sum(jobs) / cores) for jobs in stages.values())
    return (
        f"{_counted(sum(map(len, stages.values())), 'notebook')} take about {_written(total)} on "
        f"{_counted(cores, 'core')} with nothing else to do, by the seconds per patch that were "
        f"measured on {MEASURED_ON}; what was made before is not made again"
    )


def _computing(
    stage: str, parameters: Mapping[str, Any], patches: tuple[int, int, int], scenarios: int
) -> float:
    """Return the seconds that a notebook trains, evaluates or scores on one core."""
    size, training, test = patches
    training = min(training, parameters.get("training_patches") or training)
    test = min(test, parameters.get("evaluation_patches") or test)
    of_size = SECONDS[parameters["backbone"]]
    step, evaluated, scored = (seconds * (size / SIZE) ** 2 for seconds in of_size)
    if stage == "scoring":
        return training * scenarios * (scored + evaluated * parameters["predictions"])
    trained = stage == "finetuning" or parameters["weights"] == "train"
    one = trained * parameters["epochs"] * training * step + test * scenarios * evaluated
    return one * len(parameters.get("methods", "one").split(","))


def _patches(tier: Tier, dataset: str, root: Path) -> tuple[int, int, int] | None:
    """Return side and numbers of training and test patches, None where they are not known."""
    path = root / tier.folder.prepared(dataset) / "patches.csv"
    if path.is_file():
        table = pd.read_csv(path)
        parts = table.filter(regex="^fold_")
        numbers = [int((parts == part).sum().max()) for part in ("training", "test")]
        return int(table["size"].iloc[0]), numbers[0], numbers[1]
    changed = any(tier.setting("data", name) != value for name, value in RESIZED.items())
    return None if changed else PATCHES.get(dataset)


def executed(tier: Tier, root: Path) -> dict[Path, int]:
    """Return the executed notebooks of a tier that are there, with the times of their writing."""
    paths = [root / tier.folder.executed_notebook(job) for job, _ in tier.jobs()]
    return {path: path.stat().st_mtime_ns for path in paths if path.is_file()}


def read_executed(path: Path) -> dict[str, Any]:
    """Return an executed notebook; an empty one where it was not written, or not to its end."""
    try:
        content = read_json(path)
    except InputError:
        return {}
    return content if isinstance(content, dict) else {}


def durations(before: Mapping[Path, int], after: Mapping[Path, int]) -> Iterator[str]:
    """Yield a line per stage: how many notebooks were executed, and how long they took together.

    What is after a run as it was before (results of `executed`) was not executed again.
    """
    for stage, notebook in NOTEBOOKS.items():
        new = [p for p in after if p.name.startswith(notebook) and after[p] != before.get(p)]
        about = [read_executed(path).get("metadata", {}).get("papermill", {}) for path in new]
        if new:
            together = _written(sum(run.get("duration") or 0.0 for run in about))
            yield f"{stage}: {together} in {_counted(len(new), 'notebook')}"


def _written(seconds: float) -> str:
    """Return a duration in the unit that fits it."""
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _counted(number: int, name: str) -> str:
    return f"{number} {name}{'s' * (number != 1)}"
