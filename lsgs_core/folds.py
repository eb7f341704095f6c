"""Patches and spatially separate folds.

Every scene is cut into square blocks. Block (r, c) of scene s is tested in fold (r + c + s) mod
count, so each fold's test blocks form diagonals that cross the whole scene. Patches of one kind
lie on a stride (training windows), those of the other do not overlap (test and validation tiles).
In every fold, `margin` pixels of nothing lie between training, validation and test pixels.
Scenes are taken to be separate places.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lsgs_core.errors import InputError
from lsgs_core.files import written_beside

CORNERS = [f"corner_{number}" for number in range(4)]
PARTS = ("training", "validation", "test")
HELD_SHARE = 0.01  # a class is held by the validation tiles that have this part of its pixels


def patch_table(
    labels: Iterable[tuple[str, np.ndarray]],
    values: Sequence[str],
    *,
    size: int,
    stride: int,
    minimum_labelled: float,
    count: int,
    block_size: int,
    margin: int,
    validation_blocks: int,
) -> pd.DataFrame:
    """Return the table of patches and of their part in every fold.

    Columns: patch_id (0 … n − 1), scene, row, column (of the top left pixel), size, kind ("sliding"
    or "tile"), block (unique over scenes; the block of the patch's centre), labelled_fraction,
    `pixels_<value>` per label value, and `fold_<f>` with "training", "validation", "test" or ""
    (not used in this fold).

    - test: the tiles of the test blocks, all pixels of which are in the block.
    - validation: tiles in the middle of `validation_blocks` other blocks, `margin` pixels away
      from the block's edge, because every block has test blocks beside it. The blocks are chosen
      one after the other: the one that adds most classes that validation does not hold yet (see
      `HELD_SHARE`), of these the one with most labelled pixels per training window that it costs.
    - training: windows that touch no pixel of a test block, of the margin around it, or of a
      validation block, and of which the part `minimum_labelled` is labelled.

    Patches without any labelled pixel, or without a part in any fold, are left out.

    Args:
        labels: (scene, ids uint8 [H, W]) per scene; id i + 1 is `values[i]`, all other ids count
            as unlabelled.
        values: names of the label values.
        size: side of a patch, in pixels.
        stride: step of the training windows, in pixels.
        minimum_labelled: smallest labelled part of a training window, 0 … 1.
        count: number of folds.
        block_size: side of a block in pixels, a multiple of `size`.
        margin: pixels between the parts of a fold.
        validation_blocks: number of validation blocks in each fold, 0 for none.

    Raises:
        InputError: a length does not fit the others, or a fold would have no training or no test
            patch, or fewer blocks than asked for can serve as validation.
    """
    if min(size, stride, count - 1, margin + 1, validation_blocks + 1) < 1:
        raise InputError(
            "expected size ≥ 1, stride ≥ 1, count ≥ 2, margin ≥ 0 and validation_blocks ≥ 0, found "
            f"{size}, {stride}, {count}, {margin} and {validation_blocks}"
        )
    if block_size < size or block_size % size:
        raise InputError(
            f"block_size: expected a multiple of the patch size {size}, found {block_size}"
        )
    if validation_blocks and block_size < size + 2 * margin:
        raise InputError(
            f"block_size: validation needs a tile of {size} and a margin of {margin} on each side "
            f"in a block, {size + 2 * margin} pixels, found {block_size}"
        )
    pixels = [f"pixels_{value}" for value in values]
    folds = [f"fold_{fold}" for fold in range(count)]
    tables: list[pd.DataFrame] = []
    first_block = 0
    for index, (scene, ids) in enumerate(labels):
        if min(ids.shape) < size:
            raise InputError(f"size: patches of {size} pixels do not fit scene {scene} {ids.shape}")
        part, blocks = _scene_patches(ids, pixels, size, stride, count, block_size, margin, index)
        part[["block", *CORNERS]] += first_block
        tables.append(part.assign(scene=scene))
        first_block += blocks
    table = pd.concat(tables)
    table["labelled_fraction"] = (table[pixels].sum(axis=1) / size**2).round(6)
    table = table[table["labelled_fraction"] > 0]
    for fold, name in enumerate(folds):
        table[name] = _parts(table, pixels, fold, minimum_labelled, validation_blocks)
    table = table[(table[folds] != "").any(axis=1)]
    table["kind"] = table["kind"].replace("inner", "tile")
    table["patch_id"] = np.arange(len(table))
    shown = ["patch_id", "scene", "row", "column", "size", "kind", "block", "labelled_fraction"]
    return table[[*shown, *pixels, *folds]].reset_index(drop=True)


def write_patch_table(table: pd.DataFrame, path: Path) -> None:
    """Write a patch table as CSV; its folder exists."""
    with written_beside(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")


def read_patch_table(path: Path) -> pd.DataFrame:
    """Read what `write_patch_table` wrote. Raises `InputError` when there is no such table."""
    try:
        table = pd.read_csv(path, keep_default_na=False, dtype={"scene": str})
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a patch table ({error})") from error
    if missing := [name for name in ("patch_id", "scene", "row", "block") if name not in table]:
        raise InputError(f"{path}: expected a patch table, found none of the columns {missing}")
    return table


def check_separation(table: pd.DataFrame, fold: int, margin: int) -> None:
    """Prove by rasterising that a fold's training, validation and test pixels lie apart.

    Raises:
        InputError: two parts have pixels with fewer than `margin` pixels between them, along rows,
            columns or diagonals.
    """
    for scene, patches in table.groupby("scene"):
        shape = (patches[["row", "column"]].max() + patches["size"].max()).tolist()
        split = patches[f"fold_{fold}"]
        pairs = ("training", "test"), ("training", "validation"), ("validation", "test")
        for first, second in pairs:
            near = coverage(patches[split == second], shape, margin)
            if close := int((coverage(patches[split == first], shape) & near).sum()):
                raise InputError(
                    f"fold {fold}: {close} {first} pixels of scene {scene} lie within {margin} "
                    f"pixels of a {second} pixel"
                )


def coverage(patches: pd.DataFrame, shape: Sequence[int], margin: int = 0) -> np.ndarray:
    """Return bool [H, W]: pixels in a patch, or at most `margin` pixels away from one."""
    covered: np.ndarray = np.zeros(shape, dtype=bool)
    for row, column, size in patches[["row", "column", "size"]].to_numpy():
        top, left = max(0, row - margin), max(0, column - margin)
        covered[top : row + size + margin, left : column + size + margin] = True
    return covered


def split_roles(
    patches: pd.DataFrame, fold: int, shape: tuple[int, int]
) -> tuple[np.ndarray, dict[int, str]]:
    """Return a map of a fold's parts in one scene, uint8 [H, W], and the name of every id in it.

    0 is a pixel in no part.
    """
    roles: np.ndarray = np.zeros(shape, dtype=np.uint8)
    names = dict(enumerate(PARTS, start=1))
    for index, part in names.items():
        roles[coverage(patches[patches[f"fold_{fold}"] == part], shape)] = index
    return roles, names


def class_shares(
    table: pd.DataFrame, classes: Mapping[str, Sequence[str]], fold: int
) -> pd.DataFrame:
    """Return the share of every class in the labelled pixels of every part of a fold.

    Args:
        table: the patch table; pixels in several training windows count once for each.
        classes: label values of every class.
        fold: number of the fold.

    Returns:
        One row per class, one column per part.
    """
    counts = table.filter(like="pixels_").groupby(table[f"fold_{fold}"]).sum()
    parts = [part for part in PARTS if part in counts.index]
    shares = {
        name: counts.loc[parts, [f"pixels_{value}" for value in values]].sum(axis=1)
        / counts.loc[parts].sum(axis=1)
        for name, values in classes.items()
    }
    return pd.DataFrame(shares).T.rename_axis("class").rename_axis(columns=None)


def _scene_patches(
    ids: np.ndarray,
    pixels: list[str],
    size: int,
    stride: int,
    count: int,
    block_size: int,
    margin: int,
    scene_index: int,
) -> tuple[pd.DataFrame, int]:
    """Return the candidates of one scene and its number of blocks.

    Beside the final columns the table has kind "inner" (validation tiles), the test fold of the
    block, the blocks at the four corners, and per fold whether a test block or its margin is
    touched.
    """
    height, width = ids.shape
    columns = -(-width // block_size)
    starts = {
        "sliding": lambda length: np.arange(0, length - size + 1, stride),
        "tile": lambda length: _tiles(length, size, block_size, 0),
        "inner": lambda length: _tiles(length, size, block_size, margin),
    }
    table = pd.concat(
        pd.MultiIndex.from_product([start(height), start(width)], names=["row", "column"])
        .to_frame(index=False)
        .assign(size=size, kind=kind)
        for kind, start in starts.items()
    )
    top, left = table["row"].to_numpy(), table["column"].to_numpy()
    # A window is no larger than a block: the blocks that it touches are those of its corners.
    for place, down, right in (("block", size // 2, size // 2), *_corners(size)):
        table[place] = (top + down) // block_size * columns + (left + right) // block_size
    for value, name in enumerate(pixels):
        table[name] = _true_pixels(ids == value + 1, top, left, size)
    row, column = np.arange(height) // block_size, np.arange(width) // block_size
    test_fold = (row[:, None] + column + scene_index) % count  # of every pixel
    table["test_fold"] = test_fold[top + size // 2, left + size // 2]
    for fold in range(count):
        table[f"near_test_{fold}"] = _true_pixels(test_fold == fold, top, left, size, margin) > 0
    return table, (int(row[-1]) + 1) * columns


def _corners(size: int) -> list[tuple[str, int, int]]:
    last = size - 1
    return [
        (CORNERS[0], 0, 0),
        (CORNERS[1], 0, last),
        (CORNERS[2], last, 0),
        (CORNERS[3], last, last),
    ]


def _tiles(length: int, size: int, block_size: int, margin: int) -> np.ndarray:
    """Return where tiles start that stay `margin` away from their block's ends, centred there."""
    starts: list[int] = []
    for start in range(0, length, block_size):
        inside = min(block_size, length - start) - 2 * margin
        number = max(0, inside // size)
        # Without a margin, tiles keep to the grid of the block, also where the scene cuts it.
        offset = margin + (inside - number * size) // 2 if margin else 0
        starts += [start + offset + size * index for index in range(number)]
    return np.array(starts, dtype=np.int64)


def _true_pixels(
    mask: np.ndarray, top: np.ndarray, left: np.ndarray, size: int, margin: int = 0
) -> np.ndarray:
    """Return the number of True pixels in each window widened by `margin` (integral image)."""
    height, width = mask.shape
    integral = np.zeros((height + 1, width + 1), dtype=np.int64)
    integral[1:, 1:] = mask.cumsum(axis=0, dtype=np.int64).cumsum(axis=1)
    rows = [np.clip(top + edge, 0, height) for edge in (-margin, size + margin)]
    columns = [np.clip(left + edge, 0, width) for edge in (-margin, size + margin)]
    below = integral[rows[1], columns[1]] - integral[rows[1], columns[0]]
    above = integral[rows[0], columns[1]] - integral[rows[0], columns[0]]
    return below - above


def _parts(
    table: pd.DataFrame, pixels: list[str], fold: int, minimum_labelled: float, blocks: int
) -> np.ndarray:
    """Return the part of every patch in one fold."""
    kind = table["kind"].to_numpy()
    enough = table["labelled_fraction"].to_numpy() >= minimum_labelled
    in_test = table["test_fold"].to_numpy() == fold
    corners = np.sort(table[CORNERS].to_numpy(), axis=1)
    distinct = np.diff(corners, axis=1, prepend=-1) > 0  # a block counts once for a window
    training = (kind == "sliding") & enough & ~table[f"near_test_{fold}"].to_numpy()
    inner = table[(kind == "inner") & ~in_test]
    held = inner.groupby("block")[pixels].sum()
    totals = table.loc[kind == "tile", pixels].sum().to_numpy()
    if len(held) < blocks:
        raise InputError(
            f"validation_blocks: fold {fold} has only {len(held)} blocks to choose from"
        )
    chosen: list[int] = []
    have: np.ndarray = np.zeros(len(pixels), dtype=np.int64)
    for _ in range(blocks):
        lost = np.bincount(corners[distinct & training[:, None]], minlength=corners.max() + 1)
        rest = held.drop(index=chosen)
        classes = ((rest.to_numpy() + have >= HELD_SHARE * totals) & (totals > 0)).sum(axis=1)
        yields = rest.sum(axis=1).to_numpy() / np.maximum(1, lost[rest.index])
        best = np.lexsort((rest.index, -yields, -classes))[0]
        chosen.append(int(rest.index[best]))
        have = have + rest.to_numpy()[best]
        training &= ~(corners == chosen[-1]).any(axis=1)
    parts: np.ndarray = np.full(len(table), "", dtype=object)
    parts[training] = "training"
    parts[(kind == "tile") & in_test] = "test"
    parts[(kind == "inner") & table["block"].isin(chosen).to_numpy()] = "validation"
    for part in ("training", "test"):
        if not (parts == part).any():
            raise InputError(
                f"fold {fold} has no {part} patches: the blocks are too few or too large"
            )
    return parts
