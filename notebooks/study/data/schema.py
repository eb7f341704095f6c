"""What the project's YAML files have in common: names, paths, errors that say where."""

import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lsgs_core.errors import InputError

SHOWN_PROBLEMS = 8  # one mistake can cause many messages; the first ones tell enough
VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)(?::(\d))?\}")  # ${row}, or ${row:2} for two digits


def relative_path(text: str) -> str:
    """Return a relative path that stays in its folder, plainly written; else raise ValueError."""
    path = PureWindowsPath(text)  # knows both kinds of slash, and drives
    if not text or path.anchor:
        raise ValueError("expected a path relative to the data set's folder")
    if ".." in path.parts:
        raise ValueError("expected a path without '..'")
    return path.as_posix()


def fill(template: str, variables: Mapping[str, str]) -> str:
    """Put a scene's variables into a path: `${row}`, or `${row:2}` to fill up with zeros.

    Raises:
        ValueError: A variable is not given, or the path leaves its folder.
    """

    def put(match: re.Match[str]) -> str:
        if match[1] not in variables:
            raise ValueError(f"{template} needs the name {match[1]!r}; there are {[*variables]}")
        return variables[match[1]].zfill(int(match[2] or 0))

    if "${" in (filled := VARIABLE.sub(put, template)):
        raise ValueError(f"{template}: expected variables such as ${{scene}} or ${{row:2}}")
    return relative_path(filled)


def listed(value: Any) -> Any:
    """Return a list as it is, and anything else as a list of one."""
    return value if isinstance(value, list) else [value]


def by_name(value: Any) -> Any:
    """Turn `[forest, water]` into `{forest: [forest], water: [water]}`, `{forest: 5}` likewise."""
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        if len(set(value)) != len(value):
            raise ValueError("a value is listed twice")
        return {name: [name] for name in value}
    if isinstance(value, dict):
        return {name: listed(group) for name, group in value.items()}
    return value


# Names become file names and column names.
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
Name = Annotated[str, Field(pattern=NAME, max_length=64)]
RelativePath = Annotated[str, AfterValidator(relative_path)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
NOT_EMPTY = Field(min_length=1)
Names = Annotated[list[Name], NOT_EMPTY]
# Of several files the first that is there is taken.
Files = Annotated[list[RelativePath], NOT_EMPTY, BeforeValidator(listed)]
Model = TypeVar("Model", bound=BaseModel)


class Strict(BaseModel):
    """Base of all parts: unknown fields are mistakes, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Placed(Strict):
    """A raster file, and how it lies on the grid of the scene.

    Attributes:
        file: Path, or several of which the first that is there is taken; may hold variables.
        crs: The coordinate reference system that is right where the file's own tag is not.
        placement: For a file without georeference: "extent" stretches it over the scene, "pixels"
            lays its pixels on those of the scene, from the top left corner.
        scale: Pixels of the reference band along one of this file, checked to 2 %.
    """

    file: Files
    crs: str | None = None
    placement: Literal["extent", "pixels"] | None = None
    scale: Annotated[float, Field(gt=0)] | None = None


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets the last of two equal keys win silently; here they are a mistake."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # Merging (`<<`) adds keys that the mapping may have itself: it is looked at before that.
        if not hasattr(node, "was_looked_at"):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{twice[0]!r} is there twice", node.start_mark
                )
            setattr(node, "was_looked_at", True)  # noqa: B010
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
        InputError: names `where` and, one a line, the fields that are wrong and what was expected.
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
    *path, last = problem["loc"] or ("top level",)
    for part in [*path, last]:
        inside = content if isinstance(content, (dict, list)) else {}
        try:
            content = inside[part]
        except (KeyError, IndexError, TypeError):
            # Not in the file: the kind of a union's member, or the place in a list of one.
            kinds = {"file_band", "difference", "slope"}
            if isinstance(inside, dict):
                kinds |= {str(inside.get(key)) for key in ("kind", "access")}
            if part in kinds or isinstance(part, int):
                continue
            content = None
        parts.append(str(part))
    field = ".".join(parts)
    if problem["type"] == "extra_forbidden":
        return f"{field}: is not known here"
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(problem["input"], (str, int, float)):
        message += f" (found {problem['input']!r})"
    return f"{field}: {message}"
