"""Reading and checking YAML and JSON files: the manifest of data sets, tiers, records."""

import json
from collections.abc import Iterable
from pathlib import Path
from reprlib import Repr
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from lsgs_core.errors import InputError

SHOWN_PROBLEMS = 8  # one mistake can cause many messages, of which the first ones tell enough
LARGEST_FILE = 4 << 20  # bytes of a YAML file; a larger one is another kind of file
MOST_NODES = 100_000  # of a YAML file once every alias is written out
SHORTENED = Repr()
SHORTENED.maxstring = 200  # characters of a text that a message shows
Model = TypeVar("Model", bound=BaseModel)


class Strict(BaseModel):
    """Base of all parts: unknown fields are mistakes, and nothing changes after loading.

    No value is converted, except an int where a float fits.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Careful(yaml.SafeLoader):
    """A loader that refuses equal keys (else the last wins) and aliases that fill the memory."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.sizes: dict[int, int] = {}  # of every node, aliases written out

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.CollectionNode) and id(node) not in self.sizes:
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            children = [child for pair in pairs for child in pair] if pairs else node.value
            self.sizes[id(node)] = 1 + sum(self.sizes.get(id(child), 1) for child in children)
            # Merging (`<<`), later, may add a key that the mapping has already.
            keys = [key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode)]
            problem = ""
            if repeated := [key for key in keys if keys.count(key) > 1]:
                problem = f"the key {repeated[0]!r} occurs twice"
            elif self.sizes[id(node)] > MOST_NODES:
                problem = f"more than {MOST_NODES} entries, aliases written out"
            if problem:
                raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
        return node


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file. Raises `InputError` when it cannot be read or parsed."""
    try:
        if Path(path).stat().st_size > LARGEST_FILE:
            raise yaml.YAMLError(f"it has more than {LARGEST_FILE >> 20} MB")
        text = Path(path).read_text(encoding="utf-8")
        return yaml.load(text, Loader=_Careful)  # a SafeLoader
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    # A ValueError is a date or a number that is none, or text in another encoding.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected a YAML file in UTF-8: {error}") from error


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises `InputError` when it cannot be read or parsed."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected a JSON file in UTF-8: {error}") from error


def validated(model: type[Model], content: Any, where: str) -> Model:
    """Return `content` as a checked model; raise `InputError` with a line per wrong field."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            field, value = _field(problem["loc"], content), problem["input"]
            shown = isinstance(value, (str, int, float))
            found = f" (found {SHORTENED.repr(value)})" if shown else ""
            problems.append(f"{field}: {problem['msg'].removeprefix('Value error, ')}{found}")
        if more := len(problems[SHOWN_PROBLEMS:]):
            problems[SHOWN_PROBLEMS:] = [f"and {more} more"]
        raise InputError("\n  ".join([f"{where}: is not valid", *problems])) from error


def _field(location: Iterable[int | str], content: Any) -> str:
    """Return where a mistake is in the file, without what pydantic adds to the path."""
    parts: list[str] = []
    for part in location:
        entries = content if isinstance(content, dict) else {}
        kinds = ("file_band", "difference", "slope", entries.get("kind"), entries.get("access"))
        if isinstance(content, list) and isinstance(part, int):
            content = content[part]
        elif isinstance(part, int) or (part in kinds and part not in entries):
            continue  # the place in a list of one, or the kind of a union's member
        else:
            content = entries.get(part)
        parts.append(str(part))
    return ".".join(parts) or "top level"
