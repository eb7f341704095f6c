"""Report for every data set what is present, missing or damaged: `make data-check`."""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import rasterio
from tqdm.auto import tqdm

from lsgs_core.errors import InputError
from study.data.alignment import ENVIRONMENT, open_raster
from study.data.manifest import Dataset, ManualSource, load_manifest
from study.data.preparation import check_scene
from study.data.raw_files import MissingFileError, Scene, find_scenes, member_problem

SAMPLED = 512  # pixels along a side of a file, of which a doubt is raised
FILLED = 1e-3  # share of pixels that are no outliers


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

    Checked are hashes, the place of every file on the grid, its channels, and what occurs in no
    scene. A note says what may be a mistake, by a part of the pixels.
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
    report, occurring, doubts = Report("ready", len(scenes)), set[str](), dict[str, Path]()
    needed = {f"labels.values.{name}" for name in dataset.labels.values}
    needed |= {f"modalities.{name}" for scene in scenes for name in scene.modalities}
    masks = {f"masks.{n}": file for scene in scenes for n, file in scene.mask_files.items()}
    with rasterio.Env(**ENVIRONMENT):
        for scene in tqdm(scenes, desc="check", unit="scene"):
            try:
                values, others = check_scene(scene)
                occurring |= others | {f"labels.values.{name}" for name in values}
                doubts = dict(_doubts(scene)) | doubts  # with the first file of each
            except InputError as error:
                report.problems.append(str(error))
    if not report.problems:
        none = "has no pixel in any scene"
        report.problems += [f"{name}: {none}" for name in sorted(needed - occurring)]
        doubts |= {f"{name}: {none}": masks[name] for name in masks.keys() - occurring}
        report.notes += [f"{path}: {doubt}" for doubt, path in doubts.items()]
    if report.problems:
        report.state = "damaged"
    expected = getattr(source, "scene_count", None)
    if expected and expected != len(scenes):
        report.notes.append(f"the complete data set has {expected} scenes")
    for scene in scenes:
        if absent := [name for name in dataset.modalities if name not in scene.modalities]:
            report.notes.append(f"scene {scene.name}: {', '.join(absent)} absent")
    return report


def _doubts(scene: Scene) -> Iterator[tuple[str, Path]]:
    """Yield what may be a mistake in a band, and in which file."""
    for name, path in scene.band_files.items():
        band = scene.dataset.file_bands[name]
        with open_raster(path) as raster:
            channel = raster.indexes[band.channel - (band.channel > 0)]
            shape = tuple(min(side, SAMPLED) for side in raster.shape)
            pixels = raster.read(channel, out_shape=shape, masked=True).compressed()
        pixels = pixels[np.isfinite(pixels) & (pixels != band.nodata)].astype(float)
        values, counts = np.unique(pixels, return_counts=True)
        if len(values) == 1:
            yield f"{name}: every pixel is {values[0]:g}", path
        for end, next_to, far in ((0, 1, -1), (-1, -2, 0)) if len(values) > 1 else ():
            gap, range_of_others = abs(values[[end, far]] - values[next_to])
            if gap > range_of_others > 0 and counts[end] > FILLED * len(pixels):
                text = f"many pixels are {values[end]:g}, far from all others; is that `nodata`?"
                yield f"{name}: {text}", path


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
