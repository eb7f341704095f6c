"""Diagonal blocks: spatial folds of one scene or several.

Block (r, c) of scene s is tested in fold (r + c + s) mod count, so each fold's test blocks form
diagonals that cross the whole scene. In every fold, `margin` pixels of nothing lie between the
training windows, the validation tiles and the test tiles.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from lsgs_core.errors import InputError
from study.data.fold_kinds import DiagonalBlocks

HELD_SHARE = 0.01  # a class is held by the validation tiles that have this part of its pixels


def check_lengths(size: int, folds: DiagonalBlocks) -> None:
    """Raise `InputError` when blocks, patches and margins do not fit each other."""
    block_size, margin = folds.block_size, folds.margin
    if block_size < size or block_size % size:
        raise InputError(
            f"block_size: expected a multiple of the patch size {size}, found {block_size}"
        )
    if folds.validation_blocks and block_size < size + 2 * margin:
        raise InputError(
            f"block_size: validation needs a tile of {size} and a margin of {margin} on each side "
            f"in a block, {size + 2 * margin} pixels, found {block_size}"
        )


def tiles(length: int, size: int, block_size: int, margin: int) -> list[int]:
    """Return where tiles start that stay `margin` away from their block's ends, centred there."""
    starts: list[int] = []
    for start in range(0, length, block_size):
        inside = min(block_size, length - start) - 2 * margin
        # Without a margin, tiles keep to the grid of the block, also where the scene cuts it.
        offset = margin + inside % size // 2 if margin else 0
        starts += [start + offset + size * index for index in range(inside // size)]
    return starts


def add_blocks(
    table: pd.DataFrame, shape: Sequence[int], size: int, folds: DiagonalBlocks, number: int
) -> int:
    """Add which blocks, numbered from `number`, windows touch; return how many blocks there are.

    Added are the block of the centre, the set of all blocks (`touched`), and the first and the last
    diagonal r + c that a window touches, a sliding one with `margin` pixels around it. It touches
    all diagonals between them too.
    """
    block_size, margin = folds.block_size, folds.margin
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


def block_parts(
    table: pd.DataFrame, pixels: list[str], fold: int, folds: DiagonalBlocks
) -> pd.Series:
    """Return the part of every patch in one fold."""
    kind, count, validation_blocks = table["kind"], folds.count, folds.validation_blocks
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
    return parts
