"""Reading and checking YAML files: the manifest of data sets, and tiers of the study."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from lsgs_core.errors import InputError

SHOWN_PROBLEMS = 8  # one mistake can cause many messages, of which the first ones tell enough
Model = TypeVar("Model", bound=BaseModel)


class Strict(BaseModel):
    """Base of all parts: unknown fields are mistakes, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _UniqueKeys(yaml.SafeLoader):
    """A loader for which two equal keys are a mistake; in YAML, the last one wins silently."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # Merging (`<<`) may add a key that the mapping has already, so keys are compared before.
        if not hasattr(node, "keys_are_unique"):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if repeated := [key for key in keys if keys.count(key) > 1]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {repeated[0]!r} occurs twice", node.start_mark
                )
            setattr(node, "keys_are_unique", True)  # noqa: B010
        super().flatten_mapping(node)


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file. Raises `InputError` when it cannot be read or parsed."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        return yaml.load(text, Loader=_UniqueKeys)  # a SafeLoader
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: expected a YAML file in UTF-8: {error}") from error


def validated(model: type[Model], content: Any, where: str) -> Model:
    """Return `content` as a checked model.

    Raises:
        InputError: A field is wrong. The message begins with `where` and names, one per line, the
            wrong fields and what was expected.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            field, value = _field(problem["loc"], content), problem["input"]
            found = f" (found {value!r})" if isinstance(value, (str, int, float)) else ""
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
