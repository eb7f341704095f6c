"""Raster files seen on the grid of a scene, window by window."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import scipy.io
import shapely
from affine import Affine
from rasterio._err import CPLE_BaseError  # what some calls raise instead of a RasterioError
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import MemoryFile
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform_bounds
from rasterio.windows import Window, subdivide

from lsgs_core.errors import InputError
from study.data.manifest import Placed

logger = logging.getLogger(__name__)
# Rasters without georeference are common here; what they need is checked.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)

MOST_PIXELS = 10**9  # of a raster
STEP = 1024  # side in pixels of the windows that are processed: it bounds the memory
# With several threads, GDAL returns a truncated JPEG 2000 file without raising an error. The mask
# is kept inside the GeoTIFF, so that a scene is one file per modality. The cache is bounded, in
# bytes, since GDAL's own default grows with the machine.
ENVIRONMENT = {
    "GDAL_NUM_THREADS": "1",
    "GDAL_TIFF_INTERNAL_MASK": True,
    "GDAL_CACHEMAX": 128 * 2**20,
}
# Formats that say where pixels are: in files that no hash covers, or at addresses.
INDIRECT = {"VRT", "DERIVED", "GTI", "STACIT", "STACTA", "WMS", "WMTS", "WCS", "DAAS", "MRF"}
MAT_VARIABLE = "inputPatch"  # the array in the .mat patches of the paper's authors
PLANE = "EPSG:3857"  # to compare two grids without georeference, any metric system serves
SCALE_TOLERANCE = 0.02
METRES_OF_A_DEGREE = 111_320.0  # along the equator and, to 1 %, along any meridian
EDGE_TOLERANCE = 1  # pixels that a file without georeference may differ by: Potsdam's DSM of 3_13
NO_PLACE = (
    "expected a coordinate reference system, found none; give `crs`, or for files without "
    "georeference `placement: extent` or `placement: pixels`"
)


@dataclass(frozen=True)
class Grid:
    """The grid that all rasters of a scene share; without georeference, plain pixels."""

    crs: Any
    transform: Affine
    width: int
    height: int

    @property
    def georeferenced(self) -> bool:
        """Return whether places on the grid are places on the ground."""
        return self.transform != Affine.identity()

    @property
    def pixel_size(self) -> float | None:
        """Return the side of a pixel (the root of its area) in metres, None where unknown.

        A degree is taken at the middle of the grid.
        """
        side = abs(self.transform.determinant) ** 0.5
        if self.crs is None or not (self.crs.is_geographic or self.crs.is_projected):
            return None
        if self.crs.is_projected:
            return float(side * self.crs.linear_units_factor[1])
        _, latitude = self.transform * (self.width / 2, self.height / 2)
        return float(side * METRES_OF_A_DEGREE * np.cos(np.radians(latitude)) ** 0.5)

    def matches(self, transform: Affine, shape: tuple[int, int]) -> bool:
        """Return whether a raster has this grid, to a hundredth of a pixel at every corner."""
        across, down = np.array([[0, 0, 1, 1], [0, 1, 0, 1]]) * [[self.width], [self.height]]
        x, y = ~self.transform * (transform * (across, down))
        distance = max(np.abs(x - across).max(), np.abs(y - down).max())
        return shape == (self.height, self.width) and bool(distance < 0.01)


def windows(height: int, width: int) -> list[Window]:
    """Return windows of at most `STEP` × `STEP` pixels that cover a raster."""
    return subdivide(Window(0, 0, width, height), STEP, STEP)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn rasterio's errors into an `InputError` that names the file."""
    try:
        yield
    except (RasterioError, CPLE_BaseError, UnicodeDecodeError) as error:
        problem = error.__cause__ or error
        raise InputError(f"{path}: is damaged, truncated or not a raster ({problem})") from error


@contextmanager
def open_raster(path: Path) -> Iterator[Any]:
    """Open a raster file, or one of the authors' .mat patches, for reading. Raises `InputError`."""
    with ExitStack() as stack:
        with naming(path):
            if path.suffix.lower() != ".mat":
                raster = stack.enter_context(rasterio.open(path))
            else:
                array, memory = _mat_array(path), stack.enter_context(MemoryFile())
                shape = dict(zip(("count", "height", "width"), array.shape, strict=True))
                with memory.open(driver="GTiff", dtype=array.dtype, **shape) as written:
                    written.write(array)
                raster = stack.enter_context(memory.open())
        if raster.driver in INDIRECT:
            raise InputError(f"{path}: expected pixels, found where they are ({raster.driver})")
        if not np.isfinite(raster.transform[:6]).all() or raster.transform.determinant == 0:
            raise InputError(f"{path}: expected a transform of finite numbers that keeps the area")
        if raster.width * raster.height > MOST_PIXELS:
            raise InputError(
                f"{path}: expected at most {MOST_PIXELS:,} pixels, found {raster.width} × "
                f"{raster.height}; cut the scene into several"
            )
        yield raster


def _mat_array(path: Path) -> np.ndarray:
    """Return the array of a .mat patch as [D, H, W]."""
    try:
        array = scipy.io.loadmat(path, variable_names=[MAT_VARIABLE]).get(MAT_VARIABLE)
    except Exception as error:  # scipy raises anything on a damaged file
        raise InputError(f"{path}: cannot be read as a .mat file ({error})") from error
    numeric = isinstance(array, np.ndarray) and array.dtype.kind in "biuf"
    if not numeric or array.ndim not in (2, 3):
        raise InputError(
            f"{path}: expected a variable {MAT_VARIABLE} of numbers, [H, W] or [H, W, D]"
        )
    if array.dtype.itemsize == 8 or array.dtype.kind == "b":
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.int32)
    return np.moveaxis(np.atleast_3d(array), -1, 0)


def grid_of(path: Path, placed: Placed) -> Grid:
    """Return the grid of a raster file, the one that others are brought onto."""
    with open_raster(path) as raster:
        crs = _crs(placed, raster)
        if crs is None and placed.placement is None:
            raise InputError(f"{path}: {NO_PLACE}")
        # A reference system without a place on it is no georeference.
        crs = None if raster.transform == Affine.identity() else crs
        return Grid(crs, raster.transform, raster.width, raster.height)


class AlignedRaster:
    """Channels of one raster file on the grid of a scene.

    Args:
        path: Path of the file.
        placed: How the file lies on the grid.
        grid: Grid of the scene.
        stack: Keeps the file open.
        channels: Channels counted from 1; negative ones count from the last.
        resampling: Name of one of rasterio's methods.
        nodata: Value of pixels without data, where the file's own is missing or wrong.
        data_channels: Channels that are data, whatever the file's tags say of them.
        colours: Whether the channels are one value, which is nodata when all of them are.

    Raises `InputError` for a damaged file, a missing channel, or a place that is not on the grid.
    """

    def __init__(
        self,
        path: Path,
        placed: Placed,
        grid: Grid,
        stack: ExitStack,
        channels: Sequence[int],
        resampling: str = "nearest",
        nodata: float | None = None,
        data_channels: Sequence[int] = (),
        colours: bool = False,
    ) -> None:
        self.path, self.grid, self._colours = path, grid, colours
        self.raw = raw = stack.enter_context(open_raster(path))
        self.channels = [c if c > 0 else raw.count + 1 + c for c in channels]
        if bad := [c for c in self.channels if not 1 <= c <= raw.count]:
            raise InputError(f"{path}: has no channel {bad[0]}, only {raw.count}")
        self.kind = np.result_type(*(raw.dtypes[channel - 1] for channel in self.channels))
        if self.kind.kind == "c":
            raise InputError(f"{path}: holds complex numbers; expected amplitudes or decibels")
        self._nodata = raw.nodata if nodata is None else nodata
        if (nodata := self._nodata) is not None and self.kind.kind != "f":
            limits = np.iinfo(self.kind)
            if not (float(nodata).is_integer() and limits.min <= nodata <= limits.max):
                raise InputError(f"{path}: nodata {nodata:g} is not a value of {self.kind}")
        # A band that is used is no mask, whatever its tag says (near infrared as alpha).
        with naming(path):
            alpha = raw.count if raw.colorinterp[-1] == ColorInterp.alpha else 0
        data = {c if c > 0 else raw.count + 1 + c for c in data_channels} | {*self.channels}
        alpha_is_data = alpha in data
        self._has_alpha = alpha > 0 and not alpha_is_data
        crs, transform = self._place(placed)
        self.view: Any = None  # None: the file's own grid is the scene's, nothing to resample
        if not (grid.matches(transform, raw.shape) and crs == grid.crs):
            if alpha_is_data:
                raise InputError(f"{path}: channel {alpha} is marked as alpha; mark it as data")
            view = WarpedVRT(
                raw,
                src_crs=crs or PLANE,
                src_transform=transform,
                src_nodata=self._nodata,
                crs=grid.crs or PLANE,
                transform=grid.transform,
                width=grid.width,
                height=grid.height,
                resampling=Resampling[resampling],
                # Its last band: 0 where there is no data. A nodata value is looked for in the
                # bands instead, in each separately.
                add_alpha=self._nodata is None and not self._has_alpha,
                UNIFIED_SRC_NODATA="NO",
            )
            self.view = stack.enter_context(view)
        has_mask = MaskFlags.per_dataset in raw.mask_flag_enums[0] and not alpha_is_data
        self._has_mask = has_mask and self.view is None  # resampling respects it by itself

    def read(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """Return the channels [n, h, w], and which pixels have data in all of them [h, w] bool."""
        raw, raster = self.raw, self.view or self.raw
        with naming(self.path):
            pixels = raster.read(self.channels, window=window)
            seen = np.isfinite(pixels).all(axis=0)
            if self._nodata is not None:
                with_data = pixels != self.kind.type(self._nodata)
                seen &= with_data.any(axis=0) if self._colours else with_data.all(axis=0)
            if self._has_alpha or (self.view is not None and self._nodata is None):
                seen &= raster.read(raster.count, window=window) > 0
            elif self._has_mask:
                seen &= raw.read_masks(1, window=window) > 0
        return pixels, seen

    def _place(self, placed: Placed) -> tuple[Any, Affine]:
        """Return the coordinate reference system and the transform of the file."""
        raw, grid, path = self.raw, self.grid, self.path
        crs = _crs(placed, raw)
        across, down = grid.width / raw.width, grid.height / raw.height
        tagged = raw.transform != Affine.identity() and grid.georeferenced
        if tagged and (crs or not grid.crs or placed.placement):
            # Where one has no reference system (a world file), it is taken for the other's.
            crs, transform = (crs or grid.crs) if grid.crs else None, raw.transform
            bounds = raw.bounds
            if crs != grid.crs:
                try:
                    bounds = transform_bounds(crs, grid.crs, *bounds)
                except (RasterioError, CPLE_BaseError) as error:
                    raise InputError(
                        f"{path}: cannot be brought from {crs} to the reference band's ({error})"
                    ) from error
            own = rasterio.transform.array_bounds(grid.height, grid.width, grid.transform)
            if not shapely.box(*own).intersection(shapely.box(*bounds)).area:
                raise InputError(f"{path}: does not overlap the reference band")
            if crs != grid.crs and grid.matches(transform, raw.shape):
                logger.warning(
                    "%s: has the transform of the reference band, but %s instead of %s; if its tag "
                    "is wrong, give `crs`", path, crs, grid.crs,
                )  # fmt: skip
            own, wanted = (np.hypot(t[0:2], t[3:5]) for t in (transform, grid.transform))
            across, down = own / wanted  # lengths of a pixel's sides, on rotated grids too
        elif placed.placement == "pixels":
            crs, transform = grid.crs, grid.transform
            missing = max(abs(grid.width - raw.width), abs(grid.height - raw.height))
            if missing > EDGE_TOLERANCE:
                raise InputError(
                    f"{path}: expected {grid.width} × {grid.height} pixels as in the reference "
                    f"band (give or take {EDGE_TOLERANCE}), found {raw.width} × {raw.height}"
                )
        elif placed.placement == "extent":
            crs, transform = grid.crs, grid.transform * Affine.scale(across, down)
            # One pixel more or less along a side is rounding: DSTL's SWIR has 133 or 134 rows.
            too_wide = raw.width - raw.height * grid.width / grid.height
            if min(abs(too_wide), abs(too_wide * grid.height / grid.width)) > 1.5:
                raise InputError(
                    f"{path}: {raw.width} × {raw.height} pixels do not have the shape of the "
                    f"reference band, {grid.width} × {grid.height}"
                )
        else:
            raise InputError(f"{path}: {NO_PLACE}")
        scale = placed.scale if crs == grid.crs else None
        if scale and max(abs(side / scale - 1) for side in (across, down)) > SCALE_TOLERANCE:
            raise InputError(
                f"{path}: expected pixels {scale:g} times as large as those of the reference "
                f"band, found {across:.3g} × {down:.3g}; is it another file?"
            )
        return crs, transform


def _crs(placed: Placed, raster: Any) -> Any:
    """Return the coordinate reference system that the manifest gives a file, or else its own."""
    return rasterio.crs.CRS.from_user_input(placed.crs) if placed.crs else raster.crs
