"""Patches, and the kinds of folds that a data set can have, as the manifest describes them."""

from typing import Annotated, Literal

from pydantic import Field

from study.data.schema import NOT_EMPTY, Count, Positive, Strict


class Patches(Strict):
    """Size and stride of patches in pixels; see `study.data.folds.patch_table`."""

    size: Positive
    stride: Positive | None = None  # None: as the size, so that patches do not overlap
    minimum_labelled: Annotated[float, Field(ge=0, le=1)] = 0.0


class DiagonalBlocks(Strict):
    """Spatial folds of square blocks, lengths in pixels; see `study.data.folds`."""

    kind: Literal["diagonal_blocks"]
    count: Annotated[int, Field(ge=2)]
    block_size: Positive
    margin: Count
    validation_blocks: Count = 1


class WholeScenes(Strict):
    """Folds of whole scenes: scene s is tested in fold s mod count."""

    kind: Literal["scenes"]
    count: Annotated[int, Field(ge=2)]
    validation_scenes: Count = 1


class OfficialSplit(Strict):
    """One fold, with the parts that the data set's makers chose.

    Attributes:
        training: Scene names, or patterns such as `6_1[0-2]` or `train_*`; likewise the others.
        validation_scenes: Taken from training where the split has no validation part.
    """

    kind: Literal["official"]
    training: Annotated[list[str], NOT_EMPTY]
    validation: list[str] = []
    test: Annotated[list[str], NOT_EMPTY]
    validation_scenes: Count = 0


class ShuffledPatches(Strict):
    """Folds of patches dealt at random, as the paper's authors do. They leak: see `folds`."""

    kind: Literal["shuffled_patches"]
    count: Annotated[int, Field(ge=2)]
    seed: Count = 0


Folds = Annotated[
    DiagonalBlocks | WholeScenes | OfficialSplit | ShuffledPatches, Field(discriminator="kind")
]
