"""What a prepared folder holds: the record of its scenes, and their aligned rasters."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import rasterio
from pydantic import ValidationError
from rasterio.errors import RasterioError

from lsgs_core.errors import InputError
from study.data.alignment import ENVIRONMENT
from study.data.manifest import Dataset
from study.data.schema import Strict
from study.data.separation import Place
from study.files import written_beside

RECORD = "prepared.json"
LABELS = "labels"


class PreparedScene(Strict):
    """What one scene was made from and what came out; hashes by path relative to its folder."""

    raw: dict[str, str]
    outputs: dict[str, str]
    height: int
    width: int
    crs: str | None
    transform: tuple[float, float, float, float, float, float]
    modalities: list[str]  # those that are not absent
    labelled_pixels: int
    label_pixels: dict[str, int]  # pixels per label value, more in all where values overlap
    label_values: list[str] = []  # that the raw labels hold, also where no modality sees anything
    unseen_pixels: dict[str, int]  # pixels without data, per modality

    @property
    def place(self) -> Place:
        """Return where the scene lies."""
        return Place((self.height, self.width), self.crs, rasterio.Affine(*self.transform))

    @property
    def pixel_size(self) -> tuple[float, str]:
        """Return the width of a pixel and its unit, as maps show it."""
        if self.crs is None:
            return 1.0, "pixels"
        crs = rasterio.crs.CRS.from_wkt(self.crs)
        if crs.is_geographic:
            return self.transform[0], "degrees"
        return self.transform[0] * crs.linear_units_factor[1] / 1000, "km"


class Prepared(Strict):
    """The content of `prepared.json`."""

    definition: dict[str, Any]
    scenes: dict[str, PreparedScene]
    complete: bool = True  # False while scenes are still to come

    def summary(self) -> pd.DataFrame:
        """Return a row per scene: its size, labelled pixels, and what part each modality sees."""
        rows = []
        for name, made in self.scenes.items():
            pixels = made.height * made.width
            row = {"scene": name, "rows": made.height, "columns": made.width}
            row |= {"labelled": made.labelled_pixels / pixels}
            rows.append(row | {f"{m} sees": 1 - n / pixels for m, n in made.unseen_pixels.items()})
        return pd.DataFrame(rows)


def load_prepared(folder: Path) -> Prepared | None:
    """Return the record of a prepared folder, None when there is no readable one."""
    try:
        return Prepared.model_validate_json((Path(folder) / RECORD).read_bytes())
    except (OSError, ValidationError):
        return None


def matching_record(folder: Path, dataset: Dataset) -> Prepared:
    """Return the record of a prepared folder.

    Raises:
        InputError: There is none, it was made from another manifest, or it is not whole.
    """
    record = load_prepared(folder)
    if record is None:
        raise InputError(f"{folder}: is not a prepared folder")
    if record.definition != dataset.raster_definition():
        raise InputError(f"{folder}: was prepared from another definition; prepare it again")
    if not record.complete:
        raise InputError(f"{folder}: its preparation was interrupted; prepare it again to go on")
    return record


@contextmanager
def open_prepared(path: Path) -> Iterator[Any]:
    """Open a prepared raster for reading. Raises `InputError` when there is none."""
    with rasterio.Env(**ENVIRONMENT):
        try:
            raster = rasterio.open(path)
        except RasterioError as error:
            raise InputError(f"{path}: is not prepared: {error}") from error
        with raster:
            yield raster


def write_record(record: Prepared, folder: Path) -> None:
    """Write the record of a prepared folder, beside and renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    with written_beside(folder / RECORD) as path:
        path.write_text(record.model_dump_json(indent=1) + "\n", "utf-8")
