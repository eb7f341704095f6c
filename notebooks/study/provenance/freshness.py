"""The one rule of freshness: an output is kept while parameters, inputs and code are the same.

Notebooks ask `artifacts.is_made` with parameters, hashes of inputs and the fingerprint of their
stage's code before long work. Snakemake has the fingerprint as a parameter of each rule, so that it
starts a notebook again for the same reasons. The code of a stage are the modules below with all
that they import from this project. Comments, docstrings and layout do not count, and a figure of
the study counts for its evaluation alone.
"""

import ast
import hashlib
from functools import cache
from pathlib import Path
from typing import Literal

import lsgs_core

NotebookStage = Literal["data", "pretraining", "scoring", "finetuning", "evaluation", "mapping"]
# A network and its patches, as `study.stages.run` opens them.
NETWORK = ("study.training.checkpoints", "study.data.patches")
# What computes the results of a stage; its notebook imports more, such as figures.
STAGES: dict[NotebookStage, tuple[str, ...]] = {
    "data": ("study.data.preparation", "study.data.patches"),
    "pretraining": ("study.stages.pretraining", *NETWORK),
    "scoring": ("study.stages.scoring", *NETWORK),
    "finetuning": ("study.stages.finetuning", *NETWORK),
    "evaluation": ("study.stages.agreement", "study.comparison.robustness", "study.figures.study"),
    "mapping": ("study.stages.mapping",),
}
PACKAGES = {"study": Path(__file__).parents[1], "lsgs_core": Path(lsgs_core.__file__).parent}


@cache
def imported(module: str) -> frozenset[str]:
    """Names of the modules of this project that a module imports, itself included."""
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
        for source, names in _imports(_path(name).read_text("utf-8")):
            if source.partition(".")[0] in PACKAGES:
                inner = [f"{source}.{one}" for one in names]
                waiting += [source, *(n for n in inner if _path(n).is_file())]
    return frozenset(found - set(PACKAGES))


@cache
def fingerprint(stage: NotebookStage) -> str:
    """SHA-256 over the code that decides the results of a stage."""
    digest = hashlib.sha256()
    modules = frozenset[str]().union(*map(imported, STAGES[stage]))
    for name in sorted(modules):
        code = code_without_prose(_path(name).read_text("utf-8"))
        digest.update(name.encode() + b"\0" + code.encode() + b"\0")
    return digest.hexdigest()


@cache  # modules have imports in common, and parsing takes most of the time
def _imports(code: str) -> list[tuple[str, list[str]]]:
    """Modules from which code imports, and what, but for what only a type checker reads."""
    return [
        (node.module or "", [alias.name for alias in node.names])
        for part in ast.parse(code).body
        if not (isinstance(part, ast.If) and ast.unparse(part.test) == "TYPE_CHECKING")
        for node in ast.walk(part)
        if isinstance(node, ast.ImportFrom)
    ]


@cache
def code_without_prose(code: str) -> str:
    """Return code as Python would write it, without docstrings and comments."""
    tree, documented = ast.parse(code), ast.Module | ast.ClassDef | ast.FunctionDef
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _path(module: str) -> Path:
    package, *inner = module.split(".")
    path = PACKAGES[package].joinpath(*inner)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
