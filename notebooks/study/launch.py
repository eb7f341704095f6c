"""Runs a notebook's code in several processes, which papermill cannot: one per GPU.

    torchrun --nproc_per_node 4 -m study.launch notebooks/04_finetuning.ipynb -f p.yaml

Every process runs all cells; the first one writes files and prints. There is no executed copy.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import chdir, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from lsgs_core.errors import InputError
from study.data.schema import read_yaml
from study.devices import is_first_process
from study.tiers import notebook_parameters


def run_notebook(path: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """Run the code cells of a notebook in this process, in the notebook's folder.

    Args:
        path: Of the notebook, one of this project's own: its code is run.
        parameters: Set after its parameters cell, as papermill does.

    Returns:
        The names that its code defined.

    Raises:
        InputError: A parameter that the notebook does not have.
    """
    known = notebook_parameters(path)
    if unknown := sorted(parameters.keys() - known.keys()):
        raise InputError(f"{path.name}: no parameter {unknown[0]!r}; there are {list(known)}")
    names: dict[str, Any] = {"__name__": "__main__"}
    os.environ.setdefault("MPLBACKEND", "Agg")
    with chdir(path.parent):
        for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            if cell["cell_type"] != "code":
                continue
            code = compile("".join(cell["source"]), f"{path.name}[{number}]", "exec")
            exec(code, names)
            if "parameters" in cell["metadata"].get("tags", []):
                names.update(parameters)
    return names


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m study.launch", description=__doc__)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("-f", "--file", type=Path, help="YAML of parameters")
    given = parser.parse_args(arguments)
    try:
        parameters = read_yaml(given.file) if given.file else {}
        if not isinstance(parameters, dict):
            raise InputError(f"{given.file}: expected parameters with their values")
        with (
            Path(os.devnull).open("w") as nowhere,
            redirect_stdout(sys.stdout if is_first_process() else nowhere),
        ):
            run_notebook(given.notebook.resolve(), parameters)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
