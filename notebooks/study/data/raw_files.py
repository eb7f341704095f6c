"""Which files make up every scene of a data set, as they lie in the user's folder.

Archives nest folders twice or come with a folder of their own, so a path of the manifest is found
wherever the end of a file's path is the same, doubled folder names counted once.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pandas as pd

from lsgs_core.errors import InputError, MissingFileError
from study.data.label_kinds import ScaledPolygonLabels
from study.data.manifest import Dataset, ManualSource
from study.data.schema import NAME, VARIABLE, Files, fill

# Attributes, index, reference system and place of a file, kept in files beside it.
SIDECARS = (".dbf", ".shx", ".prj", ".cpg", ".hdr", ".tfw", ".jgw", ".j2w", ".wld")


@dataclass(frozen=True)
class Scene:
    """One scene and its files.

    Attributes:
        name: Of the scene.
        bands: File of every band of a file; those of absent modalities are not there.
        masks: File of the mask of every modality that has one.
        labels: Label file.
        extents: File with the extents of images, for labels that are scaled to them.
    """

    name: str
    bands: dict[str, Path]
    masks: dict[str, Path]
    labels: Path
    extents: Path | None = None

    @property
    def files(self) -> list[Path]:
        """Return all files, each once, with those that belong to them."""
        extents = [self.extents] if self.extents else []
        used = [*self.bands.values(), *self.masks.values(), self.labels, *extents]
        beside = [path.with_suffix(suffix) for path in used for suffix in SIDECARS]
        return list(dict.fromkeys([*used, *(path for path in beside if path.is_file())]))

    def modalities(self, dataset: Dataset) -> list[str]:
        """Return the modalities whose files are there, in the manifest's order."""
        used = {
            name: {source for band in bands for source in dataset.sources(band)}
            for name, bands in dataset.modalities.items()
        }
        return [name for name, bands in used.items() if bands <= self.bands.keys()]


class RawFolder:
    """The files below a folder, found by the ends of their paths.

    Args:
        folder: Where a data set's files are.

    Raises:
        InputError: There is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise MissingFileError(f"{folder}: the folder is missing")
        self.paths: dict[str, Path] = {}
        self._by_name: dict[str, list[str]] = {}
        for path in sorted(_walked(self.folder)):
            inside = path.relative_to(self.folder)
            hidden = any(part.startswith((".", "__MACOSX")) for part in inside.parts)
            if not hidden:
                self.paths[inside.as_posix()] = path
                self._by_name.setdefault(path.name, []).append(inside.as_posix())

    def find(self, file: str) -> Path | None:
        """Return the file of a path of the manifest, None when there is none.

        Raises:
            InputError: Several files fit, and none of them is exactly the path.
        """
        if file in self.paths:
            return self.paths[file]
        name = file.rpartition("/")[2]
        fitting = [p for p in self._by_name.get(name, []) if f"/{_plain(p)}".endswith(f"/{file}")]
        if len(fitting) > 1:
            raise InputError(f"{self.folder}: {file} is there more than once: {fitting}")
        return self.paths[fitting[0]] if fitting else None

    def matches(self, template: str) -> Iterator[tuple[dict[str, str], Path]]:
        """Yield the variables of a template and the file, for every file that fits it."""
        pattern, seen, end = "", set[str](), 0
        for variable in VARIABLE.finditer(template):
            name = variable[1]
            pattern += re.escape(template[end : variable.start()])
            pattern += f"(?P={name})" if name in seen else f"(?P<{name}>[^/]+?)"
            seen.add(name)
            end = variable.end()
        whole = re.compile(f"(?:^|/){pattern}{re.escape(template[end:])}$")
        for inside, path in self.paths.items():
            if match := whole.search(_plain(inside)):
                yield match.groupdict(), path


def _walked(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder, through links to other folders too, each folder once."""
    entered = set()
    for inside, folders, files in os.walk(folder, followlinks=True):
        if (real := Path(inside).resolve()) in entered:
            folders.clear()
            continue
        entered.add(real)
        yield from (path for path in map(Path(inside).joinpath, files) if path.is_file())


def find_scenes(dataset: Dataset, folder: Path) -> list[Scene]:
    """Return the scenes with all their files, in the order of the manifest or of their names.

    Raises:
        InputError: The folder or a file is missing, no scene is there, or two scenes have one name.
    """
    raw = RawFolder(folder)
    variables = _variables(dataset, raw)
    labels = dataset.labels
    if isinstance(labels, ScaledPolygonLabels):
        table = next((path for path in map(raw.find, labels.file) if path), None)
        if table is not None:
            labelled = set(read_csv(table, ["ImageId"])["ImageId"])
            variables = {name: given for name, given in variables.items() if name in labelled}
    scenes = [_scene(dataset, raw, name, given) for name, given in variables.items()]
    if not scenes:
        raise MissingFileError(f"{folder}: holds no scene{_how_to_get(dataset)}")
    return scenes


def read_csv(path: Path, columns: list[str]) -> pd.DataFrame:
    """Read a CSV with at least these columns, all as text; fields may be of any length.

    Raises:
        InputError: It cannot be read, or a column is missing.
    """
    try:
        status = path.stat()
        table = _csv(path, status.st_mtime_ns, status.st_size)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as CSV ({error})") from error
    if missing := [name for name in columns if name not in table]:
        raise InputError(f"{path}: expected the columns {missing}, found {list(table)}")
    return table


@lru_cache(4)
def _csv(path: Path, changed: int, size: int) -> pd.DataFrame:
    """Read a CSV once for all scenes; nobody changes the table."""
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def _plain(path: str) -> str:
    """Return a path with a folder inside a folder of the same name counted once."""
    parts = path.split("/")
    return "/".join(p for i, p in enumerate(parts) if i == 0 or p != parts[i - 1])


def _variables(dataset: Dataset, raw: RawFolder) -> dict[str, dict[str, str]]:
    """Return the variables of every scene by its name."""
    if dataset.find_scenes is None:
        return {name: {"scene": name} | given for name, given in dataset.scenes.items()}
    found: dict[str, dict[str, str]] = {}
    origin: dict[str, Path] = {}
    for variables, path in raw.matches(dataset.find_scenes.file):
        name = fill(dataset.find_scenes.name, variables)
        if not re.fullmatch(NAME, name):
            raise InputError(f"{path}: {name!r} cannot be the name of a scene, expected {NAME}")
        if name in found:
            raise InputError(f"scene {name} is there twice: {origin[name]} and {path}")
        if name not in dataset.find_scenes.exclude:
            found[name], origin[name] = {"scene": name} | variables, path
    return dict(sorted(found.items()))


def _scene(dataset: Dataset, raw: RawFolder, name: str, variables: Mapping[str, str]) -> Scene:
    """Return one scene. Raises `InputError` when a file is missing that has to be there."""

    def find(files: Files) -> Path | None:
        filled = [fill(template, variables) for template in files]
        return next((path for path in map(raw.find, filled) if path), None)

    def need(files: Files, field: str) -> Path:
        if path := find(files):
            return path
        expected = " or ".join(fill(template, variables) for template in files)
        raise MissingFileError(
            f"{raw.folder / expected}: the file is missing (scene {name}, {field})"
            + _how_to_get(dataset)
        )

    bands: dict[str, Path] = {}
    for modality, names in dataset.modalities.items():
        for band in (source for name in names for source in dataset.sources(name)):
            files = dataset.file_band(band).file
            optional = modality in dataset.may_be_absent
            path = find(files) if optional else need(files, f"band {band}")
            bands |= {band: path} if path else {}
    reference = dataset.reference_band
    bands[reference] = need(dataset.file_band(reference).file, "reference_band")
    labels = dataset.labels
    extents = need(labels.extents, "extents") if isinstance(labels, ScaledPolygonLabels) else None
    scene = Scene(name, bands, {}, need(labels.file, "labels"), extents)
    for modality in scene.modalities(dataset):
        if modality in dataset.masks:
            scene.masks[modality] = need(dataset.masks[modality].file, f"mask of {modality}")
    return scene


def _how_to_get(dataset: Dataset) -> str:
    source = dataset.source
    if isinstance(source, ManualSource):
        return f"\n  {source.instructions} {source.url}".rstrip()
    return ""
