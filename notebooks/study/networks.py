"""Networks of one's own: code, which runs only where the command line names its file.

With `make study NETWORKS=my_networks.py`, a tier or a notebook can have the backbone
`my_networks:segformer`: a function of that file that returns, for the numbers of bands D_m and of
classes, a `Backbone` or what `AdaptedBackbone` makes one of. Weights, records, manifests and tiers
hold the name at most, which imports nothing by itself.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from lsgs_core.errors import InputError
from lsgs_core.models import Backbone
from lsgs_core.models.adapter import AdaptedBackbone
from study.freshness import code_without_prose

NETWORKS = "LSGS_NETWORKS"  # the variable with the file's path, which the command line sets
ROOT = Path(__file__).resolve().parents[2]


def is_own(backbone: str) -> bool:
    """Return True for the name of a network of one's own, with a file and a function."""
    return ":" in backbone


def own_network(name: str) -> tuple[Callable[[list[int], int], Any], str]:
    """Import the file that the command line names; return a function of it, and the code's hash.

    Raises `InputError` where it is not that of a name such as "my_networks:segformer", or fails.
    """
    stem, _, function = name.partition(":")
    path = ROOT / os.environ.get(NETWORKS, "")
    if path == ROOT or not stem.isidentifier():
        raise InputError(
            f"backbone: {name!r} is code, which runs only where the command line names its file, "
            "as in make study NETWORKS=my_networks.py"
        )
    if path.name != f"{stem}.py" or not path.is_file():
        raise InputError(f"NETWORKS: expected a file {stem}.py for {name!r}, found {path}")
    with errors_named(str(path)):
        code = hashlib.sha256(code_without_prose(path).encode()).hexdigest()
        module = _imported(path, code)
    found = getattr(module, function, None)
    if not callable(found) or getattr(found, "__module__", None) != module.__name__:
        raise InputError(f"backbone: expected a function {function!r} in {path}, found none")
    return found, code


def own_code(backbone: str) -> str:
    """Return the hash of the code of a network of one's own, "" for a backbone of the paper's."""
    return own_network(backbone)[1] if is_own(backbone) else ""


def own_configuration(name: str, bands: Sequence[int], classes: int) -> dict[str, Any]:
    """Return what identifies the network: its name, sizes and code."""
    return {"name": name, "bands": [*bands], "classes": classes, "code": own_code(name)}


def build_own(name: str, bands: Sequence[int], classes: int) -> Backbone:
    """Return a network of one's own with fresh weights."""
    build, _ = own_network(name)
    with errors_named(f"backbone {name}"):
        network = build([*bands], classes)
        if not isinstance(network, Backbone):
            network = AdaptedBackbone(network, bands, classes)
    network.configuration = own_configuration(name, bands, classes)
    return network


@contextmanager
def errors_named(place: str) -> Iterator[None]:
    """Turn whatever code of one's own raises into an `InputError` that says where it was."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        raise InputError(f"{place}: {kind}{' '.join(str(error).split())}") from error


@lru_cache
def _imported(path: Path, code: str) -> ModuleType:
    """Return the module, imported once for every version of its code."""
    # Compiled here: Python's cache of byte code overlooks an edit within the same second.
    module = ModuleType(f"networks_of_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    exec(compile(path.read_bytes(), path, "exec"), vars(module))
    return module
