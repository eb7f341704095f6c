"""Patches and spatially separate folds.

Every scene is cut into square blocks. Block (r, c) of scene s is tested in fold (r + c + s) mod
count, so each fold's test blocks form diagonals that cross the whole scene. Patches of one kind
lie on a stride (training windows), those of the other do not overlap (test and validation tiles).
In every fold, `margin` pixels of nothing lie between training, validation and test pixels.
Scenes are taken to be separate places.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lsgs_core.errors import InputError
from lsgs_core.files import written_beside

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
        labels: (scene, ids uint8 [H, W]) per scene; id i + 1 is `values[i]`, others unlabelled.
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
        part = _places(ids.shape, size, stride, block_size, margin)
        for value, name in enumerate(pixels, start=1):
            part[name] = _true_pixels(ids == value, part, size)
        first_block += _add_blocks(part, ids.shape, size, block_size, margin, first_block)
        part[["first", "last"]] += index
        tables.append(part.assign(scene=scene, size=size))
    table = pd.concat(tables, ignore_index=True)
    labelled = table["labelled_fraction"] = (table[pixels].sum(axis=1) / size**2).round(6)
    enough = (labelled >= minimum_labelled) | (table["kind"] != "sliding")
    table = table[enough & (labelled > 0)]
    for fold, name in enumerate(folds):
        table[name] = _parts(table, pixels, fold, count, validation_blocks)
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
        for first, second in combinations(PARTS, 2):
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
    """Return a fold's parts in one scene, uint8 [H, W], 0 for none, and the name of every id."""
    roles: np.ndarray = np.zeros(shape, dtype=np.uint8)
    names = dict(enumerate(PARTS, start=1))
    for index, part in names.items():
        roles[coverage(patches[patches[f"fold_{fold}"] == part], shape)] = index
    return roles, names


def class_shares(
    table: pd.DataFrame, classes: Mapping[str, Sequence[str]], fold: int
) -> pd.DataFrame:
    """Return the share of every class in the labelled pixels of every part of a fold.

    `classes` gives the label values of every class. Pixels in several training windows count once
    for each. One row per class, one column per part.
    """
    counts = table.filter(like="pixels_").groupby(table[f"fold_{fold}"]).sum().T
    counts = counts[[part for part in PARTS if part in counts]]
    shares = {
        name: counts.loc[[f"pixels_{value}" for value in values]].sum() / counts.sum()
        for name, values in classes.items()
    }
    return pd.DataFrame(shares).T.rename_axis(index="class", columns=None)


def _places(
    shape: Sequence[int], size: int, stride: int, block_size: int, margin: int
) -> pd.DataFrame:
    """Return where "sliding" windows, test tiles ("tile") and validation tiles ("inner") lie."""
    starts: dict[str, list[Sequence[int]]] = {
        "sliding": [range(0, length - size + 1, stride) for length in shape],
        "tile": [_tiles(length, size, block_size, 0) for length in shape],
        "inner": [_tiles(length, size, block_size, margin) for length in shape],
    }
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


def _true_pixels(mask: np.ndarray, windows: pd.DataFrame, size: int) -> np.ndarray:
    """Return the number of True pixels in each window (by an integral image)."""
    integral = np.pad(mask.cumsum(axis=0, dtype=np.int64).cumsum(axis=1), ((1, 0), (1, 0)))
    top, left = windows["row"].to_numpy(), windows["column"].to_numpy()
    below = integral[top + size, left + size] - integral[top + size, left]
    above = integral[top, left + size] - integral[top, left]
    return below - above


def _add_blocks(
    table: pd.DataFrame, shape: Sequence[int], size: int, block_size: int, margin: int, number: int
) -> int:
    """Add which blocks, numbered from `number`, windows touch; return how many blocks there are.

    Added are the block of the centre, the set of all blocks (`touched`), and the first and the last
    diagonal r + c that a window touches, a sliding one with `margin` pixels around it. It touches
    all diagonals between them too.
    """
    top, left = table["row"].to_numpy(), table["column"].to_numpy()
    rows, columns = (-(-length // block_size) for length in shape)
    blocks = number + np.arange(rows * columns).reshape(rows, columns)

    def block(down: Any, right: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return (r, c) of the block under the pixel at an offset from every window's corner."""
        row, column = np.clip(top + down, 0, shape[0] - 1), np.clip(left + right, 0, shape[1] - 1)
        return row // block_size, column // block_size

    table["block"] = blocks[block(size // 2, size // 2)]
    # A window is no larger than a block: the blocks that it touches are those of its corners.
    corners = [blocks[block(*offsets)].tolist() for offsets in product((0, size - 1), repeat=2)]
    table["touched"] = pd.Series(map(set, zip(*corners, strict=True)), dtype=object)
    around = np.where(table["kind"] == "sliding", margin, 0)
    table["first"] = np.add(*block(-around, -around))
    table["last"] = np.add(*block(size - 1 + around, size - 1 + around))
    return rows * columns


def _parts(
    table: pd.DataFrame, pixels: list[str], fold: int, count: int, validation_blocks: int
) -> pd.Series:
    """Return the part of every patch in one fold."""
    kind = table["kind"]
    test = (fold - table["first"]) % count <= table["last"] - table["first"]
    # One row per training window and block that it touches, with the window's index.
    training = table.loc[(kind == "sliding") & ~test, "touched"].explode()
    totals = table.loc[kind == "tile", pixels].sum()
    rest = table[(kind == "inner") & ~test].groupby("block")[pixels].sum()
    if len(rest) < validation_blocks:
        raise InputError(f"validation_blocks: fold {fold} has {len(rest)} blocks to choose from")
    chosen: list[int] = []
    have = totals * 0
    for _ in range(validation_blocks):
        classes = ((rest + have >= HELD_SHARE * totals) & (totals > 0)).sum(axis=1)
        lost = training.value_counts().reindex(rest.index, fill_value=0)
        yields = rest.sum(axis=1) / lost.clip(lower=1)
        best = max(rest.index, key=lambda block: (classes[block], yields[block]))
        chosen.append(best)
        have = have + rest.loc[best]
        rest = rest.drop(index=best)
        training = training.drop(training.index[training == best])
    parts = pd.Series("", index=table.index, dtype=object)
    parts[training.index] = "training"
    parts[(kind == "tile") & test] = "test"
    parts[(kind == "inner") & table["block"].isin(chosen)] = "validation"
    for part in ("training", "test"):
        if not (parts == part).any():
            raise InputError(f"fold {fold} has no {part} patches: blocks are too few or too large")
    return parts
