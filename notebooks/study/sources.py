"""One fingerprint of the code that can have had a part in a result.

What a module imports, directly or not, counts; comments, docstrings and layout do not.
"""

from __future__ import annotations

import ast
import hashlib
from functools import lru_cache
from pathlib import Path

import lsgs_core

PACKAGES = {"study": Path(__file__).parent, "lsgs_core": Path(lsgs_core.__file__).parent}


@lru_cache
def imported(module: str) -> frozenset[str]:
    """Names of the modules of this project that a module imports, itself included.

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
            if not isinstance(node, ast.ImportFrom):
                continue
            source = node.module or ""
            if source.partition(".")[0] in PACKAGES:
                inner = [f"{source}.{alias.name}" for alias in node.names]
                waiting += [source, *(n for n in inner if _path(n).is_file())]
    return frozenset(found - set(PACKAGES))


def source_sha256(module: str) -> str:
    """SHA-256 over the code of a module and of all that it imports from this project."""
    digest = hashlib.sha256()
    for name in sorted(imported(module)):
        tree = ast.parse(_path(name).read_text(encoding="utf-8"))
        digest.update(name.encode() + b"\0" + _without_docstrings(tree).encode() + b"\0")
    return digest.hexdigest()


def _without_docstrings(tree: ast.Module) -> str:
    """The code as Python would write it, without docstrings and comments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _path(module: str) -> Path:
    package, *inner = module.split(".")
    path = PACKAGES[package].joinpath(*inner)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
