"""Files that are whole or not there."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pooch

from lsgs_core.errors import InputError

# What `written_beside` calls a file until it is whole.
TEMPORARY = re.compile(r"\.(.+)\.(\d+)(\.[^.]*)?")
file_sha256 = pooch.file_hash  # of a path: 64 hexadecimal digits
FULL = 1 << 20  # bytes; with less than that left, a failed write is for want of space


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Write a file beside its place and rename it when it is whole.

    A kill leaves at most a file with the process id in its name, which nothing reads; an exception
    leaves nothing. The suffix is kept, since writers choose a format by it. Raises `OSError` when
    the disk is full; what was there before is whole.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    said = f"{path.name} was not written, what it held before is whole"
    try:
        with explaining_a_full_disk(path, said):
            yield temporary
            with temporary.open("rb+") as handle:
                os.fsync(handle.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def explaining_a_full_disk(path: Path, said: str) -> Iterator[None]:
    """Raise an `OSError` that says what became of a file, where writing failed on a full disk."""
    try:
        yield
    except Exception as error:
        # Writers say it in many ways, such as a RuntimeError about a stream.
        if shutil.disk_usage(path.parent).free < FULL:
            raise OSError(errno.ENOSPC, f"the disk is full; {said}", str(path)) from error
        raise


def make_folder(path: Path) -> Path:
    """Make a folder, with those around it, and return its path; raise `InputError` else."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: expected a folder, or a place for one: {error}") from error
    return path
