"""A copy of this checkout, as a fresh clone of it would be."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
KEPT = "results/networks/"  # inputs of the study


def copy_checkout(folder: Path, results: bool = False) -> Path:
    """Copy the tracked files, with or without results but networks, and the cached download."""
    for name in tracked_files():
        if results or name.startswith(KEPT) or not name.startswith("results/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    if (ROOT / "work" / "downloads").is_dir():
        shutil.copytree(ROOT / "work" / "downloads", folder / "work" / "downloads")
    return folder


def tracked_files() -> list[str]:
    """The tracked files that are there, relative to the root."""
    listed = printed("git", "ls-files", "-z").split("\0")
    return [name for name in listed if (ROOT / name).is_file()]


def printed(*command: object, folder: Path = ROOT, **variables: str) -> str:
    """Run a command with the code of a checkout; return its output, and then its errors."""
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env=environment(folder) | variables,
        capture_output=True, text=True, timeout=3600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def environment(folder: Path = ROOT) -> dict[str, str]:
    """The environment of a process that runs the code of a checkout."""
    path = os.pathsep.join([str(folder), str(folder / "notebooks")])
    return {**os.environ, "PYTHONPATH": path, "JUPYTER_PLATFORM_DIRS": "1"}
