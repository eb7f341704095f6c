"""Reading and checking YAML files: the manifest of data sets, and tiers of the study."""

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
        problems = [_sentence(problem, content) for problem in error.errors()]
        if more := len(problems[SHOWN_PROBLEMS:]):
            problems[SHOWN_PROBLEMS:] = [f"and {more} more"]
        raise InputError("\n  ".join([f"{where}: is not valid", *problems])) from error


def _sentence(problem: Any, content: Any) -> str:
    """Return one of pydantic's errors as `field: what is wrong (found …)`."""
    parts: list[str] = []
    holder: Any
    for part in problem["loc"] or ("top level",):
        holder = content if isinstance(content, (dict, list)) else {}
        try:
            content = holder[part]
        except (KeyError, IndexError, TypeError):
            # pydantic also lists the kind of a union's member, and the place in a list of one.
            kinds = {"file_band", "difference", "slope"}
            if isinstance(holder, dict):
                kinds |= {str(holder.get(key)) for key in ("kind", "access")}
            if part in kinds or isinstance(part, int):
                continue
            content = None
        parts.append(str(part))
    field = ".".join(parts)
    if problem["type"] == "extra_forbidden":
        return f"{field}: is not a known field"
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(problem["input"], (str, int, float)):
        message += f" (found {problem['input']!r})"
    return f"{field}: {message}"
