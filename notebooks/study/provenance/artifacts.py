"""Outputs that say where they come from, and that are never half written.

Every output file `x` has a sidecar `x.record.json` with the parameters that made it, the hashes of
its inputs and of itself, and the environment (versions, device, threads, commit, date). Reading an
output checks hash and parameters. Dates are in sidecars only, so that equal runs give equal files.
"""

import json
import platform
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import safetensors.torch
import torch
from safetensors import SafetensorError

from lsgs_core.errors import InputError
from study.provenance.devices import is_first_process
from study.provenance.files import file_sha256, make_folder, written_beside
from study.provenance.schema import read_json

RECORDED_PACKAGES = ("torch", "numpy", "scipy", "pandas", "rasterio", "geopandas", "safetensors")


@dataclass(frozen=True)
class Record:
    """What an output was made with and from."""

    parameters: Mapping[str, Any]  # everything that decides the content, JSON-able
    inputs: Mapping[str, str] = field(default_factory=dict)  # SHA-256 of each, by name
    device: str = "cpu"  # where it was computed


def environment(device: str = "cpu") -> dict[str, Any]:
    """Package versions, device, threads, commit and date of this process."""
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in RECORDED_PACKAGES},
        "machine": platform.machine(),
        "processor": processor(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def processor() -> str:
    """The name of the processor, as far as the system tells it."""
    listed = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", listed.read_text() if listed.is_file() else "")
    return named[1].strip() if named else platform.processor() or platform.machine()


def sidecar_path(path: Path) -> Path:
    """Where the record of an output lies."""
    return path.with_name(path.name + ".record.json")


def save(path: Path, write: Callable[[Path], object], record: Record) -> Path:
    """Write an output and its record, each beside and renamed, the record first; return the path.

    Of the processes that share a run, the first one writes. The record carries the output's hash,
    so an output that a kill left without its own record, or with an older one, is noticed.
    """
    if not is_first_process():
        return path
    make_folder(path.parent)
    with written_beside(path) as temporary:
        write(temporary)
        _write_record(path, file_sha256(temporary), record)
    return path


def describe(path: Path, record: Record) -> None:
    """Write the record of an output that is there already."""
    if is_first_process():
        _write_record(path, file_sha256(path), record)


def save_table(path: Path, table: pd.DataFrame, record: Record) -> Path:
    """Write a table as CSV, with nine significant digits."""
    return save(path, lambda to: table.to_csv(to, index=False, float_format="%.9g"), record)


def save_json(path: Path, content: Mapping[str, Any], record: Record) -> Path:
    """Write JSON; a number that is not finite is written as null."""
    finite = json.loads(json.dumps(content), parse_constant=lambda _: None)
    text = json.dumps(finite, indent=2, allow_nan=False) + "\n"
    return save(path, lambda to: to.write_text(text), record)


def save_weights(path: Path, weights: Mapping[str, torch.Tensor], record: Record) -> Path:
    """Write weights as safetensors, without metadata, whose order would change the bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    return save(path, lambda to: safetensors.torch.save_file(tensors, to), record)


def check(
    path: Path,
    expected: Mapping[str, Any] | None = None,
    made_from: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the record of an output, after making sure that the output is the one that is wanted.

    It must have been made with the parameters `expected`, from inputs of the hashes `made_from`;
    others are not looked at. The record has file, sha256, parameters, inputs and environment.
    Raises `InputError` where output or record is absent, or the output is not the one described.
    """
    sidecar = sidecar_path(path)
    for needed in (path, sidecar):
        if not needed.is_file():
            raise InputError(f"{needed}: not there; has the notebook that writes it been run?")
    record = read_json(sidecar)
    content = record if isinstance(record, dict) else {}
    described, parameters, inputs = (content.get(n) for n in ("sha256", "parameters", "inputs"))
    if not (isinstance(parameters, dict) and isinstance(inputs, dict)):
        raise InputError(
            f"{sidecar}: expected the record of an output, with sha256, parameters and inputs"
        )
    if file_sha256(path) != described:
        raise InputError(f"{path}: not the file that {sidecar.name} describes; make it again")
    check_parameters(path, parameters, expected or {})
    for name, sha256 in (made_from or {}).items():
        if inputs.get(name) != sha256:
            raise InputError(f"{path}: made from another {name} than the one here; make it again")
    return record


def check_parameters(
    path: Path, parameters: Mapping[str, Any], expected: Mapping[str, Any]
) -> None:
    """Raise `InputError` where an output was made with other parameters than expected."""
    for name, value in expected.items():
        if name not in parameters or not _same(parameters[name], value):
            raise InputError(
                f"{path}: made with {name} = {parameters.get(name)!r}, expected {value!r}; "
                "make it again, or use other parameters"
            )


def is_made(path: Path, record: Record) -> bool:
    """Whether an output is there, whole, and made with just these parameters from these inputs."""
    try:
        found = check(path)
    except InputError:
        return False
    made_with = [dict(record.parameters), dict(record.inputs)]
    return _same([found["parameters"], found["inputs"]], made_with)


def load_weights(
    path: Path, expected: Mapping[str, Any] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and their record, checked as in `check`."""
    record = check(path, expected)
    try:
        return safetensors.torch.load_file(path), record
    except (SafetensorError, ValueError, KeyError) as error:
        # It is never read in another way, which could run code.
        raise InputError(f"{path}: expected weights as safetensors: {error}") from error


def load_table(path: Path, expected: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """A table, checked as in `check`."""
    check(path, expected)
    # A class or scenario may be called None or NA; only an empty field is no number.
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def _write_record(path: Path, sha256: str, record: Record) -> None:
    content = {
        "file": path.name,
        "sha256": sha256,
        "parameters": dict(record.parameters),
        "inputs": dict(record.inputs),
        "environment": environment(record.device),
    }
    with written_beside(sidecar_path(path)) as sidecar:
        sidecar.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def _same(recorded: object, wanted: object) -> bool:
    """Equal once both are what JSON makes of them (tuples are lists, keys are strings)."""
    return recorded == json.loads(json.dumps(wanted))


@cache
def _commit() -> str | None:
    """The commit of the source tree that runs, with '+changes' where it was edited."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+changes"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # installed without git, or not a checkout
    return done.stdout.strip()
