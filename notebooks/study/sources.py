"""Which source files can have had a part in a result: what a module imports, directly or not."""

from __future__ import annotations

import ast
import hashlib
from functools import lru_cache
from pathlib import Path

import lsgs_core

PACKAGES = {"study": Path(__file__).parent, "lsgs_core": Path(lsgs_core.__file__).parent}


@lru_cache
def imported(module: str) -> frozenset[str]:
    """Names of the modules of this package that a module imports, itself included.

    Args:
        module: Such as "study.training".
    """
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        if name == "lsgs_core":  # imports what it names when that is used
            continue
        # Importing a module runs the packages around it.
        waiting += [name.rpartition(".")[0]] if name.count(".") > 1 else []
        for node in ast.walk(ast.parse(_path(name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lsgs_core"):
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                waiting += [node.module or "", *(n for n in inner if _path(n).is_file())]
    return frozenset(found - {"lsgs_core"})


def source_sha256(module: str) -> str:
    """SHA-256 over the source of a module and of all that it imports from this package."""
    digest = hashlib.sha256()
    for name in sorted(imported(module)):
        digest.update(name.encode() + b"\0" + _path(name).read_bytes() + b"\0")
    return digest.hexdigest()


def _path(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
