"""Patches, and folds whose training, validation and test pixels lie apart.

Diagonal blocks (the default, see `study.data.block_folds`): square blocks of every scene are
held out, with a margin around them. Patches of one kind lie on a stride (training windows), those
of the other do not overlap (test and validation tiles).

Whole scenes, and a data set's official split: all patches of a scene have one part.

Shuffled patches (the paper's authors): patches that do not overlap, dealt at random. Neighbours of
test patches are trained on, so the scores are too good: `leaks` says so.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lsgs_core.errors import InputError
from lsgs_core.randomness import generator
from study.data.block_folds import add_blocks, block_parts, check_lengths, tiles
from study.data.fold_kinds import (
    DiagonalBlocks,
    Folds,
    OfficialSplit,
    Patches,
    ShuffledPatches,
    WholeScenes,
)
from study.data.separation import PARTS
from study.files import written_beside

TABLE = "patches.csv"
VALIDATION_SHARE = 0.1  # of the patches that are not tested, as the paper's authors take it


@dataclass(frozen=True)
class LabelledScene:
    """The labels of one scene, read by rows, so that no whole scene is held in memory.

    Attributes:
        name: Of the scene.
        shape: Height and width in pixels.
        rows: From the first and the last row (excluded) to label codes [rows, width].
    """

    name: str
    shape: tuple[int, int]
    rows: Callable[[int, int], NDArray[Any]]


def leaks(folds: Folds) -> bool:
    """Return whether test patches have neighbours among the training patches."""
    return isinstance(folds, ShuffledPatches)


def patch_table(
    scenes: Iterable[LabelledScene],
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

    Of diagonal blocks:

    - test: the tiles of the test blocks, all pixels of which are in the block.
    - validation: tiles in the middle of `validation_blocks` other blocks, `margin` pixels away
      from the block's edge, because every block has test blocks beside it. The blocks are chosen
      one after the other: the one that adds most classes that validation does not hold yet (see
      `HELD_SHARE`), of these the one with most labelled pixels per training window that it costs.
    - training: windows that touch no pixel of a test block, of the margin around it, or of a
      validation block, and of which the part `minimum_labelled` is labelled.

    Of whole scenes and official splits: windows of training scenes, tiles of the others; the
    validation scenes are spread evenly over those that are not tested. Of shuffled patches, tiles
    alone, at least `minimum_labelled` labelled.

    Patches without any labelled pixel, or without a part in any fold, are left out.

    Args:
        scenes: Labels per scene.
        member: Which values a label code stands for, [codes, values].
        values: Names of the label values.
        patches: Size and stride.
        folds: How patches are kept apart.
        index_file: For shuffled patches, the permutation to deal by, instead of a seeded one.

    Raises:
        InputError: a length does not fit the others, or a fold would have no training or no test
            patch, or fewer blocks or scenes than asked for can serve as validation.
    """
    size, stride = patches.size, patches.stride or patches.size
    diagonal = folds if isinstance(folds, DiagonalBlocks) else None
    if diagonal:
        check_lengths(size, diagonal)
    elif index_file is not None and not isinstance(folds, ShuffledPatches):
        raise InputError("index_file: only shuffled patches are dealt by one")
    pixels = [f"pixels_{value}" for value in values]
    tables: list[pd.DataFrame] = []
    first_block = 0
    for index, scene in enumerate(scenes):
        if min(scene.shape) < size:
            raise InputError(
                f"size: patches of {size} pixels do not fit scene {scene.name} {scene.shape}"
            )
        part = _places(scene.shape, size, stride, diagonal)
        part[[*pixels, "labelled"]] = _label_pixels(scene, member, part, size)
        if diagonal:
            first_block += add_blocks(part, scene.shape, size, diagonal, first_block)
            part[["first", "last"]] += index
        else:
            part["block"] = index
        tables.append(part.assign(scene=scene.name, size=size))
    table = pd.concat(tables, ignore_index=True)
    table["labelled_fraction"] = (table["labelled"] / size**2).round(6)
    shuffled = isinstance(folds, ShuffledPatches)
    enough = table["labelled_fraction"] >= patches.minimum_labelled
    enough |= (table["kind"] != "sliding") & (not shuffled)
    table = table[enough & (table["labelled"] > 0)]
    parts: Sequence[Any]
    match folds:
        case DiagonalBlocks():
            parts = [block_parts(table, pixels, fold, folds) for fold in range(folds.count)]
        case WholeScenes() | OfficialSplit():
            parts = _scene_parts(table, folds)
        case ShuffledPatches():
            table = table[table["kind"] == "tile"].reset_index(drop=True)
            table["block"] = table.index
            parts = _shuffled_parts(len(table), folds, index_file)
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


def default_split(protocol: str) -> str:
    """Name of the folds that a protocol takes; "" is the first of a data set.

    Raises:
        InputError: Another protocol than "strict" or "paper".
    """
    known = {"strict": "", "paper": "shuffled"}
    if protocol not in known:
        raise InputError(f"protocol: expected one of {sorted(known)}, found {protocol!r}")
    return known[protocol]


def class_shares(
    table: pd.DataFrame, classes: Mapping[str, Sequence[str]], fold: int
) -> pd.DataFrame:
    """Return the share of every class in the labelled pixels of every part of a fold.

    `classes` gives the label values of every class. Pixels in several training windows count once
    for each, and pixels of several values of a class (where labels overlap) once for each value.
    One row per class, one column per part.
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


def _places(
    shape: Sequence[int], size: int, stride: int, folds: DiagonalBlocks | None
) -> pd.DataFrame:
    """Return where "sliding" windows, test tiles ("tile") and validation tiles ("inner") lie."""
    block_size = folds.block_size if folds else max(shape)
    starts: dict[str, list[Sequence[int]]] = {
        "sliding": [range(0, length - size + 1, stride) for length in shape],
        "tile": [tiles(length, size, block_size, 0) for length in shape],
    }
    if folds:
        starts["inner"] = [tiles(length, size, block_size, folds.margin) for length in shape]
    places = [(kind, *place) for kind, both in starts.items() for place in product(*both)]
    return pd.DataFrame(places, columns=["kind", "row", "column"])


def _label_pixels(
    scene: LabelledScene, member: NDArray[np.bool_], windows: pd.DataFrame, size: int
) -> NDArray[np.int64]:
    """Return the pixels of every label value, and of any, int64 [windows, values + 1]."""
    lookup = np.column_stack([member, member.any(axis=1)])
    counts = np.zeros((len(windows), lookup.shape[1]), dtype=np.int64)
    rows, left = windows["row"].to_numpy(), windows["column"].to_numpy()
    for top in np.unique(rows):
        codes = scene.rows(top, top + size)
        chosen = rows == top
        for value in range(lookup.shape[1]):
            columns = lookup[:, value][codes].sum(axis=0, dtype=np.int64)
            sums = np.append(0, columns.cumsum())
            counts[chosen, value] = sums[left[chosen] + size] - sums[left[chosen]]
    return counts


def _scene_parts(table: pd.DataFrame, folds: WholeScenes | OfficialSplit) -> list[pd.Series]:
    """Return the part of every patch in every fold."""
    scenes = list(dict.fromkeys(table["scene"]))
    if isinstance(folds, WholeScenes):
        if len(scenes) < folds.count:
            raise InputError(f"folds.count: expected at most {len(scenes)}, one a scene")
        splits = [
            {s: "test" if i % folds.count == fold else "training" for i, s in enumerate(scenes)}
            for fold in range(folds.count)
        ]
    else:
        splits = [{scene: _official_part(scene, folds) for scene in scenes}]
    for split in splits:
        rest = [scene for scene, part in split.items() if part == "training"]
        if len(rest) <= folds.validation_scenes:
            raise InputError(
                f"validation_scenes: expected fewer than the {len(rest)} scenes that are trained "
                f"on, found {folds.validation_scenes}"
            )
        held = folds.validation_scenes
        spread = [int((number + 0.5) * len(rest) / held) for number in range(held)]
        split |= {rest[position]: "validation" for position in spread}
    sliding = table["kind"] == "sliding"
    parts = []
    for split in splits:
        part = table["scene"].map(split)
        parts.append(part.where((part == "training") == sliding, ""))
    return parts


def _official_part(scene: str, folds: OfficialSplit) -> str:
    patterns = {part: getattr(folds, part) for part in PARTS}
    fitting = [p for p, given in patterns.items() if any(fnmatchcase(scene, g) for g in given)]
    if len(fitting) != 1:
        raise InputError(f"folds: scene {scene} is in {fitting or 'no part'}, expected one part")
    return fitting[0]


def _shuffled_parts(
    count: int, folds: ShuffledPatches, index_file: Path | None
) -> list[NDArray[Any]]:
    """Return the part of every patch in every fold, by the formula of the paper's authors.

    Fold f (from 0) of F tests the places f · ⌊N/F⌋ … (f + 1) · ⌊N/F⌋ of the permutation; of the
    others, in their order, the first ⌊0.1 · (N − ⌊N/F⌋)⌋ are validation and the rest training.
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


def _read_permutation(path: Path, count: int) -> np.ndarray:
    """Return the numbers of an index file, int64 [count].

    Raises:
        InputError: It is not a permutation of 0 … count - 1, one number a line.
    """
    try:
        numbers = np.array(Path(path).read_text("utf-8").split(), dtype=np.int64)
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: expected whole numbers, one a line ({error})") from error
    if not np.array_equal(np.sort(numbers), np.arange(count)):
        raise InputError(
            f"{path}: expected a permutation of 0 … {count - 1}, one number for each of the "
            f"{count} patches, found {len(numbers)} numbers, {len(set(numbers.tolist()))} different"
        )
    return numbers
