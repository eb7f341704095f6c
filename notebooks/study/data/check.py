"""Say for every data set what is present, missing or damaged: `make data-check`."""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import rasterio
from tqdm.auto import tqdm

from lsgs_core.errors import InputError, MissingFileError
from study.data.alignment import ENVIRONMENT
from study.data.manifest import Dataset, PackageSource, load_manifest
from study.data.rasters import check_scene
from study.data.raw_files import find_scenes
from study.files import file_sha256


@dataclass
class Report:
    """What was found of a data set.

    Attributes:
        state: "absent" (nothing is there), "missing" (something that is needed is not), "damaged"
            (something is not what the manifest says), or "ready".
        scenes: How many there are.
        sizes: Height and width of every scene that is whole.
        problems: One sentence each, naming the file or field.
        notes: What is good to know.
    """

    state: Literal["absent", "missing", "damaged", "ready"]
    scenes: int = 0
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Return the report in lines."""
        lines = [f"{self.state}, {self.scenes} scenes" if self.scenes else self.state]
        return "\n  ".join([*lines, *self.problems, *self.notes])


def check_data(dataset: Dataset, folder: Path) -> Report:
    """Look at all raw files of a data set; nothing is written.

    Every file is opened and read once: its hash where it is known, its place on the grid, its
    channels, and whether the labels hold what the manifest says.

    Args:
        dataset: From the manifest.
        folder: Where its files are.
    """
    source = dataset.source
    if not folder.is_dir() or not any(folder.iterdir()):
        if isinstance(source, PackageSource):
            note = f"notebook 01 downloads {source.package} to {folder}"
        else:
            note = f"expected in {folder}: {source.instructions} {source.url}".rstrip()
        return Report("absent", notes=[note])
    known = source.members if isinstance(source, PackageSource) else source.files
    wrong = []
    for member in known:
        path = folder / member.path
        if not path.is_file():
            return Report("missing", problems=[f"{path}: the file is missing"])
        if path.stat().st_size != member.size or file_sha256(path) != member.sha256:
            wrong.append(f"{path}: expected {member.size} bytes with SHA-256 {member.sha256}")
    if wrong:
        return Report("damaged", problems=wrong)
    try:
        scenes = find_scenes(dataset, folder)
    except InputError as error:
        missing = isinstance(error, MissingFileError)
        return Report("missing" if missing else "damaged", problems=[str(error)])
    report, found = Report("ready", len(scenes)), set()
    with rasterio.Env(**ENVIRONMENT):
        for scene in tqdm(scenes, desc="check", unit="scene"):
            try:
                grid, values = check_scene(dataset, scene)
                report.sizes[scene.name] = (grid.height, grid.width)
                found |= values
            except InputError as error:
                report.problems.append(str(error))
    absent = dataset.labels.not_in(found)
    if absent and not report.problems:
        report.problems.append(f"labels.values: {absent} occur in no scene")
    if report.problems:
        report.state = "damaged"
    expected = getattr(source, "scene_count", None)
    if expected and expected != len(scenes):
        report.notes.append(f"the whole data set has {expected} scenes")
    for scene in scenes:
        if lacking := [m for m in dataset.modalities if m not in scene.modalities(dataset)]:
            report.notes.append(f"scene {scene.name}: {', '.join(lacking)} absent")
    return report


def main() -> int:
    """Print a report for every data set, and return 1 when one that is there has problems."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manifest", type=Path, default=Path("data_manifest.yaml"))
    parser.add_argument("--dataset", default="", help="this one only")
    parser.add_argument("--raw", type=Path, help="its folder; by default work/downloads/<dataset>")
    arguments = parser.parse_args()
    try:
        manifest = load_manifest(arguments.manifest)
        if arguments.raw and not arguments.dataset:
            raise InputError("--raw: say of which --dataset")
        if arguments.dataset:
            chosen = {arguments.dataset: manifest.dataset(arguments.dataset)}
        else:
            chosen = manifest.datasets
    except InputError as error:
        print(error, file=sys.stderr)
        return 1
    failed = False
    for name, dataset in chosen.items():
        report = check_data(dataset, arguments.raw or Path("work/downloads") / name)
        print(f"{name} ({dataset.title}): {report}")
        # What was never fetched is no fault unless it was asked for by name.
        failed |= report.state in {"missing", "damaged"} or (
            report.state == "absent" and bool(arguments.dataset)
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
