"""Patches, and folds whose training, validation and test pixels lie apart.

Diagonal blocks: square blocks of every scene are held out, with a margin around them. Block (r, c)
of scene s is tested in fold (r + c + s) mod count, so the test blocks of a fold form diagonals that
cross the whole scene. Whole scenes, and a data set's official split: all patches of a scene have
one part. Shuffled patches (the paper's authors): patches that do not overlap, dealt at random.
Neighbours of test patches are trained on, so the scores are too good: `leaks` says so.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import combinations, permutations, product
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd
import rasterio
import shapely
from numpy.typing import NDArray
from rasterio.windows import Window

from lsgs_core.errors import InputError
from lsgs_core.randomness import generator
from study.data import manifest
from study.data.manifest import DiagonalBlocks, Folds, OfficialSplit, Patches, WholeScenes
from study.data.preparation import PreparedScene

PARTS = ("training", "validation", "test")
NUMBERS = ("patch_id", "row", "column", "size", "block")  # columns of a patch table
VALIDATION_SHARE = 0.1  # of the patches that are not tested, as the paper's authors take it
HELD_SHARE = 0.01  # validation tiles hold a class when they have this share of its pixels


def leaks(folds: Folds) -> bool:
    """Return whether test patches have neighbours among the training patches."""
    return isinstance(folds, manifest.ShuffledPatches)


def patch_table(
    scenes: Iterable[tuple[str, Any]],
    member: NDArray[np.bool_],
    values: Sequence[str],
    patches: Patches,
    folds: Folds,
    index_file: Path | None = None,
) -> pd.DataFrame:
    """Return the table of patches and of their part in every fold.

    Columns: patch_id (0 … n − 1), scene, row, column (of the top left pixel), size, kind ("sliding"
    or "tile"), block (unique over scenes; of diagonal blocks the one of the patch's centre, else
    the scene, or the patch itself where patches are shuffled), labelled_fraction, `pixels_<value>`
    per label value, and `fold_<f>` with "training", "validation", "test" or "" (not used).

    Training windows lie on a stride and are labelled to the part `minimum_labelled`; test and
    validation tiles do not overlap. Diagonal blocks are tested by the tiles in them. Validation
    takes tiles in the middle of `validation_blocks` other blocks, `margin` pixels from the edge:
    one after the other the block that adds most classes that validation does not hold yet
    (`HELD_SHARE`), of these the one with most labelled pixels per training window that it costs.
    Windows touch no pixel of these blocks, of a test block or of the margin around it. Whole scenes
    for validation are spread evenly over those that are not tested. Shuffled patches are tiles,
    labelled as windows are. Patches without a label or a part are left out.

    Args:
        scenes: Name and opened label raster of every scene; rasters are read by rows.
        member: Which values a label code stands for, [codes, values].
        values: Names of the label values.
        patches: Size and stride.
        folds: How patches are kept apart.
        index_file: For shuffled patches, the permutation to deal by, instead of a seeded one.

    Raises `InputError` where lengths do not fit, or blocks or scenes are too few for the parts.
    """
    size, stride = patches.size, patches.stride or patches.size
    diagonal = folds if isinstance(folds, DiagonalBlocks) else None
    shuffled = isinstance(folds, manifest.ShuffledPatches)
    if diagonal:
        diagonal.check_fit(size)
    if index_file is not None and not shuffled:
        raise InputError("index_file: only shuffled patches are dealt by an index file")
    pixels = [f"pixels_{value}" for value in values]
    tables: list[pd.DataFrame] = []
    block_count = 0
    for index, (scene, raster) in enumerate(scenes):
        if min(raster.shape) < size:
            raise InputError(
                f"size: patches of {size} pixels do not fit scene {scene} {raster.shape}"
            )
        places = _places(raster.shape, size, stride, diagonal)
        places[[*pixels, "labelled"]] = _label_pixels(raster, member, places, size)
        if diagonal:
            block_count += _add_blocks(places, raster.shape, size, diagonal, block_count)
            places[["first", "last"]] += index
        else:
            places["block"] = index
        tables.append(places.assign(scene=scene, size=size))
    table = pd.concat(tables, ignore_index=True)
    table["labelled_fraction"] = (table["labelled"] / size**2).round(6)
    enough = table["labelled_fraction"] >= patches.minimum_labelled
    enough |= (table["kind"] != "sliding") & (not shuffled)
    table = table[enough & (table["labelled"] > 0)]
    parts: Sequence[Any]
    match folds:
        case DiagonalBlocks():
            parts = [_block_parts(table, pixels, fold, folds) for fold in range(folds.count)]
        case WholeScenes() | OfficialSplit():
            parts = _scene_parts(table, folds)
        case manifest.ShuffledPatches():
            table = table[table["kind"] == "tile"].reset_index(drop=True)
            table["block"] = table.index
            parts = shuffled_parts(len(table), folds, index_file)
    names = [f"fold_{fold}" for fold in range(len(parts))]
    for fold, (name, assigned) in enumerate(zip(names, parts, strict=True)):
        table[name] = assigned
        for needed in ("training", "test"):
            if not (table[name] == needed).any():
                raise InputError(f"fold {fold} has no {needed} patches: too few blocks or scenes")
    table = table[(table[names] != "").any(axis=1)]
    table["kind"] = table["kind"].replace("inner", "tile")
    table["patch_id"] = np.arange(len(table))
    shown = ["patch_id", "scene", "row", "column", "size", "kind", "block", "labelled_fraction"]
    return table[[*shown, *pixels, *names]].reset_index(drop=True)


def read_patch_table(path: Path) -> pd.DataFrame:
    """Read a patch table. Raises `InputError` when there is none, or its entries cannot be."""
    try:
        table = pd.read_csv(path, keep_default_na=False, dtype={"scene": str})
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a patch table ({error})") from error
    if missing := [name for name in ("scene", *NUMBERS, "fold_0") if name not in table]:
        raise InputError(f"{path}: expected a patch table with the columns {missing}")
    if wrong := [name for name in NUMBERS if table[name].dtype.kind != "i"]:
        raise InputError(f"{path}: expected whole numbers in the column {wrong[0]}")
    if not table.filter(regex="^fold_").isin([*PARTS, ""]).all(axis=None):
        raise InputError(f"{path}: expected {PARTS} or nothing in the columns of the folds")
    return table


def default_split(protocol: str) -> str:
    """Return the name of the folds that a protocol takes; "" is the first of a data set."""
    return {"strict": "", "paper": "shuffled"}[protocol]


def class_shares(
    table: pd.DataFrame, classes: Mapping[str, Sequence[str]], fold: int
) -> pd.DataFrame:
    """Return the share of each class (row) in the labelled pixels of each part (column) of a fold.

    Pixels count once for each training window, and once for each value that they have of a class.
    """
    counts = table.filter(like="pixels_")
    labelled = (table["labelled_fraction"] * table["size"] ** 2).round()
    counts = counts.assign(labelled=labelled).groupby(table[f"fold_{fold}"]).sum().T
    counts = counts[[part for part in PARTS if part in counts]]
    shares = {
        name: counts.loc[[f"pixels_{value}" for value in values]].sum() / counts.loc["labelled"]
        for name, values in classes.items()
    }
    return pd.DataFrame(shares).T.rename_axis(index="class", columns=None)


def check_separation(
    table: pd.DataFrame, fold: int, margin: int, scenes: Mapping[str, PreparedScene] | None = None
) -> None:
    """Prove that a fold's training, validation and test pixels lie apart, by their rectangles.

    Raises `InputError` where two parts of a scene have fewer than `margin` pixels between them, or
    where parts of two prepared `scenes` that overlap on the ground show the same of it.
    """
    boxes: dict[Any, NDArray[Any]] = defaultdict(lambda: np.zeros((0, 4)))  # of scene and part
    for key, rows in table.groupby(["scene", f"fold_{fold}"]):
        corner = rows[["column", "row"]].to_numpy()
        boxes[key] = np.hstack([corner, corner + rows[["size"]].to_numpy()])
    around = margin * np.array([-1, -1, 1, 1])
    for scene in table["scene"].unique():
        for first, second in combinations(PARTS, 2):
            beside = _polygons(boxes[scene, second] + around)
            if close := _meeting(_polygons(boxes[scene, first]), beside):
                raise InputError(
                    f"fold {fold}: {close} {first} patches of scene {scene} lie within {margin} "
                    f"pixels of a {second} patch"
                )
    scenes = scenes or {}
    for one, other in _overlapping(scenes):
        for first, second in permutations(PARTS, 2):
            ground = _polygons(boxes[other, second], scenes[other])
            if same := _meeting(_polygons(boxes[one, first], scenes[one]), ground):
                raise InputError(
                    f"fold {fold}: {same} {first} patches of scene {one} show ground that "
                    f"{second} patches of scene {other} show too"
                )


def _polygons(boxes: NDArray[Any], scene: PreparedScene | None = None) -> NDArray[Any]:
    """Return rectangles (left, top, right, bottom) in pixels as polygons, of a scene in degrees."""
    # Smaller by a part of a pixel: rectangles that only touch have no pixel in common.
    polygons = shapely.box(*(boxes + 0.25 * np.array([1, 1, -1, -1])).T)
    if scene is None:
        return polygons
    to_ground = rasterio.Affine(*scene.transform).to_shapely()
    outlines = geopandas.GeoSeries(polygons, crs=scene.crs).affine_transform(to_ground)
    return outlines.to_crs(4326).array


def _meeting(first: NDArray[Any], second: NDArray[Any]) -> int:
    """Return how many polygons of the first kind share area with one of the second."""
    return len(np.unique(shapely.STRtree(second).query(first, predicate="intersects")[0]))


def _overlapping(scenes: Mapping[str, PreparedScene]) -> list[tuple[str, str]]:
    """Return the pairs of georeferenced scenes that overlap on the ground."""
    names = [name for name, scene in scenes.items() if scene.crs]
    if len(names) < 2:
        return []
    corners = ((name, scenes[name].width, scenes[name].height) for name in names)
    outlines = [_polygons(np.array([[0, 0, w, h]]), scenes[name])[0] for name, w, h in corners]
    pairs = shapely.STRtree(outlines).query(outlines, predicate="intersects").T
    return [(names[one], names[other]) for one, other in pairs.tolist() if one < other]


def coverage(
    patches: pd.DataFrame, shape: Sequence[int], window: Window | None = None
) -> NDArray[np.bool_]:
    """Return which pixels of a scene, or of a window of it, are in a patch, bool [H, W]."""
    covered = np.zeros(shape, dtype=np.bool_)
    start = np.array([window.row_off, window.col_off] if window else [0, 0])
    first = patches[["row", "column"]].to_numpy() - start
    last = first + patches[["size"]].to_numpy()
    inside = ((last > 0) & (first < np.array(shape))).all(axis=1)
    for (top, left), (bottom, right) in zip(first[inside], last[inside], strict=True):
        covered[max(0, top) : bottom, max(0, left) : right] = True
    return covered


def split_roles(
    patches: pd.DataFrame, fold: int, shape: tuple[int, int], factor: float = 1.0
) -> NDArray[np.uint8]:
    """Return a fold's parts in one scene, uint8 [H, W]: from 1 those of `PARTS`, 0 for none.

    The factor is how many pixels of the scene lie along one of the H × W pixels.
    """
    roles = np.zeros(shape, dtype=np.uint8)
    scaled = patches.copy()
    if factor > 1:  # one pixel larger, so that rounding leaves no gaps
        corner = ["row", "column"]
        scaled[corner] = (scaled[corner] / factor).astype(int)
        scaled["size"] = np.ceil(scaled["size"] / factor).astype(int) + 1
    for index, part in enumerate(PARTS, start=1):
        roles[coverage(scaled[scaled[f"fold_{fold}"] == part], shape)] = index
    return roles


def _places(
    shape: Sequence[int], size: int, stride: int, folds: DiagonalBlocks | None
) -> pd.DataFrame:
    """Return where "sliding" windows, test tiles ("tile") and validation tiles ("inner") lie."""
    block_size = folds.block_size if folds else max(shape)
    starts: dict[str, list[Sequence[int]]] = {
        "sliding": [range(0, length - size + 1, stride) for length in shape],
        "tile": [_tiles(length, size, block_size, 0) for length in shape],
    }
    if folds:
        starts["inner"] = [_tiles(length, size, block_size, folds.margin) for length in shape]
    places = [(kind, *place) for kind, both in starts.items() for place in product(*both)]
    return pd.DataFrame(places, columns=["kind", "row", "column"])


def _tiles(length: int, size: int, block_size: int, margin: int) -> list[int]:
    """Return where tiles start that stay `margin` away from their block's ends, centred there."""
    starts: list[int] = []
    for start in range(0, length, block_size):
        inside = min(block_size, length - start) - 2 * margin
        # Without a margin, tiles keep to the grid of the block, also where the scene cuts it.
        offset = margin + inside % size // 2 if margin else 0
        starts += [start + offset + size * index for index in range(inside // size)]
    return starts


def _label_pixels(
    raster: Any, member: NDArray[np.bool_], patches: pd.DataFrame, size: int
) -> NDArray[np.int64]:
    """Return the pixels of every label value, and of any, int64 [patches, values + 1]."""
    lookup = np.column_stack([member, member.any(axis=1)])
    counts = np.zeros((len(patches), lookup.shape[1]), dtype=np.int64)
    rows, left = patches["row"].to_numpy(), patches["column"].to_numpy()
    for top in np.unique(rows):
        codes = raster.read(1, window=Window(0, top, raster.shape[1], size))
        chosen = rows == top
        for value in range(lookup.shape[1]):
            columns = lookup[:, value][codes].sum(axis=0, dtype=np.int64)
            sums = np.append(0, columns.cumsum())
            counts[chosen, value] = sums[left[chosen] + size] - sums[left[chosen]]
    return counts


def _add_blocks(
    table: pd.DataFrame, shape: Sequence[int], size: int, folds: DiagonalBlocks, number: int
) -> int:
    """Add the blocks, from `number` on, and diagonals r + c that patches touch; return how many."""
    block_size, margin = folds.block_size, folds.margin
    top, left = table["row"].to_numpy(), table["column"].to_numpy()
    rows, columns = (-(-length // block_size) for length in shape)
    blocks = number + np.arange(rows * columns).reshape(rows, columns)

    def block(down: Any, right: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return (r, c) of the block under the pixel at an offset from every patch's corner."""
        row, column = np.clip(top + down, 0, shape[0] - 1), np.clip(left + right, 0, shape[1] - 1)
        return row // block_size, column // block_size

    table["block"] = blocks[block(size // 2, size // 2)]
    # A patch is no larger than a block: the blocks that it touches are those of its corners.
    corners = [blocks[block(*offsets)].tolist() for offsets in product((0, size - 1), repeat=2)]
    table["touched"] = pd.Series(map(set, zip(*corners, strict=True)), dtype=object)
    around = np.where(table["kind"] == "sliding", margin, 0)
    table["first"] = np.add(*block(-around, -around))
    table["last"] = np.add(*block(size - 1 + around, size - 1 + around))
    return rows * columns


def _block_parts(
    table: pd.DataFrame, pixels: list[str], fold: int, folds: DiagonalBlocks
) -> pd.Series:
    """Return the part of every patch in one fold of diagonal blocks."""
    kind, count, validation_blocks = table["kind"], folds.count, folds.validation_blocks
    test = (fold - table["first"]) % count <= table["last"] - table["first"]
    # One row per training window and block that it touches, with the window's index.
    training = table.loc[(kind == "sliding") & ~test, "touched"].explode()
    totals = table.loc[kind == "tile", pixels].sum()
    rest = table[(kind == "inner") & ~test].groupby("block")[pixels].sum()
    if len(rest) < validation_blocks:
        most = f"{len(rest)}, the blocks with labels that fold {fold} does not test"
        raise InputError(f"validation_blocks: expected at most {most}, found {validation_blocks}")
    chosen: list[int] = []
    held = totals * 0
    for _ in range(validation_blocks):
        classes = ((rest + held >= HELD_SHARE * totals) & (totals > 0)).sum(axis=1)
        lost = training.value_counts().reindex(rest.index, fill_value=0)
        yields = rest.sum(axis=1) / lost.clip(lower=1)
        best = max(rest.index, key=lambda block: (classes[block], yields[block]))
        chosen.append(best)
        held = held + rest.loc[best]
        rest = rest.drop(index=best)
        training = training.drop(training.index[training == best])
    parts = pd.Series("", index=table.index, dtype=object)
    parts[training.index] = "training"
    parts[(kind == "tile") & test] = "test"
    parts[(kind == "inner") & table["block"].isin(chosen)] = "validation"
    return parts


def _scene_parts(table: pd.DataFrame, folds: WholeScenes | OfficialSplit) -> list[pd.Series]:
    """Return the part of every patch in every fold."""
    if isinstance(folds, WholeScenes) and folds.group_before:
        table = table.assign(scene=table["scene"].str.partition(folds.group_before)[0])
    scenes = list(dict.fromkeys(table["scene"]))
    if isinstance(folds, WholeScenes):
        if len(scenes) < folds.count:
            raise InputError(f"folds.count: expected at most {len(scenes)}, the number of scenes")
        tested = [scenes[fold :: folds.count] for fold in range(folds.count)]
        trained = dict.fromkeys(scenes, "training")
        splits = [trained | dict.fromkeys(names, "test") for names in tested]
    else:
        splits = [{scene: _official_part(scene, folds) for scene in scenes}]
    sliding = table["kind"] == "sliding"
    parts = []
    for split in splits:
        rest = [scene for scene, part in split.items() if part == "training"]
        held = folds.validation_scenes
        if len(rest) <= held:
            raise InputError(
                f"validation_scenes: expected fewer than the {len(rest)} scenes that are trained "
                f"on, found {held}"
            )
        spread = [int((number + 0.5) * len(rest) / held) for number in range(held)]
        split |= {rest[position]: "validation" for position in spread}
        part = table["scene"].map(split)
        parts.append(part.where((part == "training") == sliding, ""))
    return parts


def _official_part(scene: str, folds: OfficialSplit) -> str:
    patterns = {part: getattr(folds, part) for part in PARTS}
    fitting = [p for p, names in patterns.items() if any(fnmatchcase(scene, n) for n in names)]
    if len(fitting) != 1:
        raise InputError(f"folds: scene {scene} is in {fitting or 'no part'}, expected one part")
    return fitting[0]


def shuffled_parts(
    count: int, folds: manifest.ShuffledPatches, index_file: Path | None = None
) -> list[NDArray[Any]]:
    """Return the part of every patch in every fold, by the formula of the paper's authors.

    Fold f (from 0) of F tests the places f · ⌊N/F⌋ … (f + 1) · ⌊N/F⌋ of the permutation; of the
    others, in their order, the first ⌊0.1 · (N − ⌊N/F⌋)⌋ are validation and the rest training. The
    permutation is seeded, or that of a file with the numbers 0 … N - 1, one per line.
    """
    if index_file is not None:
        permutation = _read_permutation(index_file, count)
    else:
        permutation = generator("order", folds.seed).permutation(count)
    share = count // folds.count
    parts = []
    for fold in range(folds.count):
        test = permutation[fold * share : (fold + 1) * share]
        rest = np.delete(permutation, np.s_[fold * share : (fold + 1) * share])
        held = int(VALIDATION_SHARE * len(rest))
        part = np.full(count, "training", dtype=object)
        part[test], part[rest[:held]] = "test", "validation"
        parts.append(part)
    return parts


def _read_permutation(path: Path, count: int) -> NDArray[np.int64]:
    try:
        numbers = np.array(Path(path).read_text("utf-8").split(), dtype=np.int64)
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: expected whole numbers, one per line ({error})") from error
    if not np.array_equal(np.sort(numbers), np.arange(count)):
        raise InputError(
            f"{path}: expected a permutation of 0 … {count - 1}, one number for each of the "
            f"{count} patches, found {len(numbers)} numbers, {len(set(numbers.tolist()))} different"
        )
    return numbers
