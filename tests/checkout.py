"""A copy of this checkout, as a fresh clone of it would be."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
KEPT = "results/networks/"  # inputs of the study


def copy_checkout(folder: Path, results: bool = False) -> Path:
    """Copy the tracked files, with or without results but networks, and the cached download."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file() and (
            results or name.startswith(KEPT) or not name.startswith("results/")
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    if (ROOT / "work" / "downloads").is_dir():
        shutil.copytree(ROOT / "work" / "downloads", folder / "work" / "downloads")
    return folder


def environment(folder: Path = ROOT) -> dict[str, str]:
    """The environment of a process that runs the code of a checkout."""
    path = os.pathsep.join([str(folder), str(folder / "notebooks")])
    return {**os.environ, "PYTHONPATH": path, "JUPYTER_PLATFORM_DIRS": "1"}
