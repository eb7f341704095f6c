"""Report for every data set what is present, missing or damaged: `make data-check`."""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import rasterio
from tqdm.auto import tqdm

from lsgs_core.errors import InputError
from study.data.alignment import ENVIRONMENT
from study.data.manifest import Dataset, ManualSource, load_manifest
from study.data.preparation import check_scene
from study.data.raw_files import MissingFileError, find_scenes, member_problem


@dataclass
class Report:
    """The state of the raw files of a data set, and a sentence for each thing to say of them."""

    # "missing" is a file that is needed, "damaged" one that is not what the manifest says.
    state: Literal["absent", "missing", "damaged", "ready"]
    scenes: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # no problems

    def __str__(self) -> str:
        """Return the report in lines."""
        first = f"{self.state}, {self.scenes} scenes" if self.scenes else self.state
        return "\n  ".join([first, *self.problems, *self.notes])


def check_data(dataset: Dataset, folder: Path) -> Report:
    """Read all raw files of a data set once, and write nothing.

    Checked are hashes, the place of every file on the grid, its channels, and the labels' values.
    """
    source = dataset.source
    if isinstance(source, ManualSource):
        note = f"expected in {folder}: {source.instructions} {source.url}".rstrip()
        members = source.files
    else:
        note = f"notebook 01 downloads {getattr(source, 'package', 'its files')} to {folder}"
        members = source.members
    if not folder.is_dir() or not any(folder.iterdir()):
        return Report("absent", notes=[note])
    if problems := [p for p in (member_problem(member, folder) for member in members) if p]:
        missing = not all((folder / member.path).is_file() for member in members)
        return Report("missing" if missing else "damaged", problems=problems)
    try:
        scenes = find_scenes(dataset, folder)
    except InputError as error:
        missing = isinstance(error, MissingFileError)
        return Report("missing" if missing else "damaged", problems=[str(error)])
    report, occurring = Report("ready", len(scenes)), set[str]()
    with rasterio.Env(**ENVIRONMENT):
        for scene in tqdm(scenes, desc="check", unit="scene"):
            try:
                occurring |= check_scene(scene)
            except InputError as error:
                report.problems.append(str(error))
    unused = [value for value in dataset.labels.values if value not in occurring]
    if unused and not report.problems:
        report.problems.append(f"labels.values: {unused} occur in no scene")
    if report.problems:
        report.state = "damaged"
    expected = getattr(source, "scene_count", None)
    if expected and expected != len(scenes):
        report.notes.append(f"the complete data set has {expected} scenes")
    for scene in scenes:
        if absent := [name for name in dataset.modalities if name not in scene.modalities]:
            report.notes.append(f"scene {scene.name}: {', '.join(absent)} absent")
    return report


def main() -> int:
    """Print a report for every data set; return 1 when one that exists has problems."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manifest", type=Path, default=Path("data_manifest.yaml"))
    parser.add_argument("--dataset", default="", help="name of the only data set to check")
    parser.add_argument("--raw", type=Path, help="its folder, by default work/downloads/<dataset>")
    arguments = parser.parse_args()
    try:
        manifest = load_manifest(arguments.manifest)
        if arguments.raw and not arguments.dataset:
            raise InputError("--raw: expected a --dataset too, whose folder this is")
        names = [arguments.dataset] if arguments.dataset else list(manifest.datasets)
        datasets = {name: manifest.dataset(name) for name in names}
    except InputError as error:
        print(error, file=sys.stderr)
        return 1
    # A data set that was never downloaded is a problem only when it was asked for by name.
    problems = {"missing", "damaged"} | ({"absent"} if arguments.dataset else set())
    failed = False
    for name, dataset in datasets.items():
        report = check_data(dataset, arguments.raw or Path("work/downloads") / name)
        print(f"{name} ({dataset.title}): {report}")
        failed |= report.state in problems
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
