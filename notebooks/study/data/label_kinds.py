"""The kinds of labels that a data set can have, as the manifest describes them."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from study.data.schema import NOT_EMPTY, Files, Name, Placed, Positive, Strict, by_name

BACKGROUND = "background"  # labelled, and none of the label values
MOST_VALUES, MOST_OVERLAPPING = 253, 15  # as uint8 ids, as uint16 bit masks
Colour = Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=3, max_length=3)]
Codes = dict[Name, Annotated[list[int], NOT_EMPTY]]


class _Labels(Strict):
    """What all kinds of labels have: named values, of which a pixel has one, or several."""

    overlapping: ClassVar[bool] = False  # whether a pixel can have several values
    values: dict[Name, Any]

    @model_validator(mode="after")
    def _listed_once(self) -> Self:
        entries = self._entries()
        if twice := [entry for entry in entries if entries.count(entry) > 1]:
            raise ValueError(f"{twice[0]} is listed twice")
        return self

    def _entries(self) -> list[Any]:
        """Return everything in the label file that is given a meaning."""
        return [entry for group in self.values.values() for entry in group]

    @property
    def has_background(self) -> bool:
        """Return whether pixels can be labelled as none of the values."""
        return False

    @property
    def ignore(self) -> int:
        """Return the code of a pixel without a label in the prepared rasters."""
        return 2**16 - 1 if self.overlapping else 2**8 - 1

    @property
    def names(self) -> list[str]:
        """Return the label values, and the background where there is one."""
        return [*self.values, *[BACKGROUND] * self.has_background]

    def not_in(self, found: set[str]) -> list[str]:
        """Return the label values that are not among those found."""
        return [name for name in self.values if name not in found]


class PolygonLabels(_Labels):
    """Polygons with a column that tells the value.

    Attributes:
        values: Entries of the column per label value. Later values are burned over earlier ones.
        outside: What is known where no polygon lies: nothing ("ignore"), or that it is none of the
            values ("background").
    """

    kind: Literal["polygons"]
    file: Files
    column: str
    crs: str | None = None
    values: Annotated[
        dict[Name, Annotated[list[str | int], NOT_EMPTY]], NOT_EMPTY, BeforeValidator(by_name)
    ]
    outside: Literal["ignore", "background"] = "ignore"

    @property
    def has_background(self) -> bool:
        """Return whether pixels can be labelled as none of the values."""
        return self.outside == BACKGROUND


class ScaledPolygonLabels(_Labels):
    """The labels of DSTL: a table of overlapping polygons in coordinates relative to the image.

    With W × H the size of the image, a point (x, y) lies at x · W'/Xmax, y · H'/Ymin pixels, where
    W' = W · W/(W + 1), H' = H · H/(H + 1); Xmax and Ymin are given per image. Pixels without any
    polygon are none of the classes. Images that the table does not name have no labels.

    Attributes:
        file: CSV with ImageId, ClassType and MultipolygonWKT.
        extents: CSV with the image, Xmax and Ymin.
        values: Class numbers per label value.
    """

    overlapping: ClassVar[bool] = True
    kind: Literal["scaled_polygons"]
    file: Files
    extents: Files
    values: Annotated[
        Codes, Field(min_length=1, max_length=MOST_OVERLAPPING),
        BeforeValidator(by_name),
    ]  # fmt: skip

    @property
    def has_background(self) -> bool:
        """Return whether pixels can be labelled as none of the values."""
        return True


class IdLabels(_Labels, Placed):
    """A raster of whole numbers.

    Attributes:
        values: Numbers per label value.
        background: Numbers that mean none of the values.
        ignored: Numbers that mean unknown, besides the file's nodata.
        unlisted: What other numbers are: a mistake ("error") or unknown ("ignore").
    """

    kind: Literal["ids"]
    channel: Positive = 1
    values: Annotated[Codes, NOT_EMPTY, BeforeValidator(by_name)]
    background: list[int] = []
    ignored: list[int] = []
    unlisted: Literal["error", "ignore"] = "error"

    @property
    def has_background(self) -> bool:
        """Return whether pixels can be labelled as none of the values."""
        return bool(self.background)

    def _entries(self) -> list[Any]:
        return [*super()._entries(), *self.background, *self.ignored]


class ColourLabels(_Labels, Placed):
    """A raster of colours, red, green and blue in its first three channels.

    Attributes:
        values: A colour per label value.
        ignored: Colours that mean unknown.
        threshold: Where given, a channel above it is 255 and else 0 (for lossy files).
        unlisted: What other colours are: a mistake ("error") or unknown ("ignore").
    """

    kind: Literal["colours"]
    values: Annotated[dict[Name, Colour], NOT_EMPTY]
    ignored: list[Colour] = []
    threshold: Annotated[int, Field(ge=0, le=254)] | None = None
    unlisted: Literal["error", "ignore"] = "error"

    def _entries(self) -> list[Any]:
        return [*self.values.values(), *self.ignored]


Labels = Annotated[
    PolygonLabels | ScaledPolygonLabels | IdLabels | ColourLabels, Field(discriminator="kind")
]
