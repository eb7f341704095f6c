"""Proof that the parts of a fold lie apart, and what pixels they cover."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from rasterio.warp import transform_bounds
from rasterio.windows import Window

from lsgs_core.errors import InputError

PARTS = ("training", "validation", "test")


@dataclass(frozen=True)
class Place:
    """Where a scene lies: height and width, coordinate reference system or None, transform."""

    shape: tuple[int, int]
    crs: str | None
    transform: Any

    def ground(self, boxes: NDArray[np.float64], crs: str | None = None) -> NDArray[np.float64]:
        """Return rectangles in pixels as left, bottom, right, top on the ground, in `crs`."""
        x, y = self.transform * (boxes[:, [0, 2, 0, 2]].T, boxes[:, [1, 1, 3, 3]].T)
        bounds = np.array([x.min(axis=0), y.min(axis=0), x.max(axis=0), y.max(axis=0)]).T
        if crs and self.crs and crs != self.crs:
            bounds = np.array([transform_bounds(self.crs, crs, *box) for box in bounds.tolist()])
        return bounds


def check_separation(
    table: pd.DataFrame, fold: int, margin: int, places: Mapping[str, Place] | None = None
) -> None:
    """Prove that a fold's training, validation and test pixels lie apart, by their rectangles.

    Args:
        table: Of patches.
        fold: Number of the fold.
        margin: Pixels that must lie between two parts, along rows, columns or diagonals.
        places: Where the scenes lie; those that overlap on the ground are compared too.

    Raises:
        InputError: Two parts are closer than that, or show the same ground.
    """
    used = table[table[f"fold_{fold}"] != ""]
    boxes = {str(scene): _part_boxes(rows, fold) for scene, rows in used.groupby("scene")}
    for scene, parts in boxes.items():
        for first, second in combinations(parts, 2):
            around = parts[second] + np.array([-margin, -margin, margin, margin])
            if close := _meeting(parts[first], around, pixel=1.0):
                raise InputError(
                    f"fold {fold}: {close} {first} patches of scene {scene} lie within {margin} "
                    f"pixels of a {second} patch"
                )
    for one, other in _overlapping(places or {}):
        for first, second in product(boxes.get(one, {}), boxes.get(other, {})):
            if first != second and places:
                ground = places[one].ground(boxes[one][first])
                beside = places[other].ground(boxes[other][second], places[one].crs)
                if same := _meeting(ground, beside, abs(places[one].transform.a)):
                    raise InputError(
                        f"fold {fold}: {same} {first} patches of scene {one} show ground that "
                        f"{second} patches of scene {other} show too"
                    )


def coverage(
    patches: pd.DataFrame, shape: Sequence[int], window: Window | None = None
) -> np.ndarray:
    """Return bool [H, W]: pixels in a patch.

    Args:
        patches: Rows of a patch table, of one scene.
        shape: H and W.
        window: Where the H × W pixels lie in the scene, by default from its first.
    """
    covered: np.ndarray = np.zeros(shape, dtype=bool)
    start = np.array([window.row_off, window.col_off] if window else [0, 0])
    first = patches[["row", "column"]].to_numpy() - start
    last = first + patches[["size"]].to_numpy()
    inside = ((last > 0) & (first < np.array(shape))).all(axis=1)
    for (top, left), (bottom, right) in zip(first[inside], last[inside], strict=True):
        covered[max(0, top) : bottom, max(0, left) : right] = True
    return covered


def split_roles(
    patches: pd.DataFrame, fold: int, shape: tuple[int, int], factor: float = 1.0
) -> tuple[np.ndarray, dict[int, str]]:
    """Return a fold's parts in one scene, uint8 [H, W], 0 for none, and the name of every id.

    Args:
        patches: Rows of a patch table, of one scene.
        fold: Number of the fold.
        shape: H and W of the picture.
        factor: Pixels of the scene along one of the picture.
    """
    roles: np.ndarray = np.zeros(shape, dtype=np.uint8)
    names = dict(enumerate(PARTS, start=1))
    scaled = patches.copy()
    if factor > 1:  # a pixel more, so that rounding leaves no gaps
        corner = ["row", "column"]
        scaled[corner] = (scaled[corner] / factor).astype(int)
        scaled["size"] = np.ceil(scaled["size"] / factor).astype(int) + 1
    for index, part in names.items():
        roles[coverage(scaled[scaled[f"fold_{fold}"] == part], shape)] = index
    return roles, names


def _part_boxes(patches: pd.DataFrame, fold: int) -> dict[str, NDArray[np.float64]]:
    """Return the rectangles (left, top, right, bottom) in pixels of the patches of every part."""
    corner = patches[["column", "row"]].to_numpy(np.float64)
    boxes = np.hstack([corner, corner + patches[["size"]].to_numpy()])
    split = patches[f"fold_{fold}"].to_numpy()
    return {part: boxes[split == part] for part in PARTS if (split == part).any()}


def _meeting(first: NDArray[np.float64], second: NDArray[np.float64], pixel: float) -> int:
    """Return how many rectangles of the first kind share area with one of the second."""
    # A part of a pixel smaller: rectangles that only touch have no pixel in common.
    inset = 0.25 * pixel * np.array([1, 1, -1, -1])
    tree = shapely.STRtree(shapely.box(*(second + inset).T))
    return len(np.unique(tree.query(shapely.box(*first.T), predicate="intersects")[0]))


def _overlapping(places: Mapping[str, Place]) -> list[tuple[str, str]]:
    """Return the pairs of scenes with a georeference that overlap on the ground."""
    names = [name for name, place in places.items() if place.crs]
    if len(names) < 2:
        return []
    bounds = []
    for name in names:
        height, width = places[name].shape
        bounds.append(places[name].ground(np.array([[0.0, 0.0, width, height]]), "EPSG:4326")[0])
    boxes = shapely.box(*np.array(bounds).T)
    pairs = shapely.STRtree(boxes).query(boxes, predicate="intersects").T
    return [(names[a], names[b]) for a, b in pairs.tolist() if a < b]
