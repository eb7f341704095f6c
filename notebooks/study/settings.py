"""How to train: the settings of a run, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lsgs_core.errors import InputError
from study.devices import Precision
from study.losses import Protocol


@dataclass(frozen=True)
class TrainingSettings:
    """How to train. The paper's own values sit in a file that was not published; these are ours.

    Attributes:
        epochs: Passes over the training patches.
        batch_size: Patches per step, over all processes.
        learning_rate: At the start.
        optimiser: "adam" or "sgd" (with momentum 0.9).
        weight_decay: L2 penalty.
        rate_decay: Factor on the learning rate ...
        rate_decay_every: ... every so many epochs.
        accumulation: Parts that a batch is computed in, one after the other, where memory is short.
            Loss and normalisation are then those of each part.
        precision: Of the forward pass, "float32" or "bfloat16" (mixed).
        protocol: "strict" takes `segmentation_loss`, "paper" the published one (binary and
            multi-label tasks only).
        augment: Turn and mirror every patch at random (the eight symmetries of the square).
    """

    epochs: int
    batch_size: int = 8
    learning_rate: float = 2e-3
    optimiser: Literal["adam", "sgd"] = "adam"
    weight_decay: float = 0.0
    rate_decay: float = 1.0
    rate_decay_every: int = 5
    protocol: Protocol = "strict"
    augment: bool = True
    accumulation: int = 1
    precision: Precision = "float32"

    def batch_sizes(self, patches: int) -> list[int]:
        """Patches of every step of an epoch.

        A single one that is left over joins the batch before: batch normalisation has no variance
        over one sample where the features have shrunk to one pixel.
        """
        size = self.batch_size
        sizes = [min(size, patches - start) for start in range(0, patches, size)]
        if len(sizes) > 1 and sizes[-1] == 1 < size:
            sizes[-2:] = [size + 1]
        return sizes

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: Names the setting and what was expected.
        """
        for name, least in (
            ("epochs", 0),
            ("batch_size", 1),
            ("rate_decay_every", 1),
            ("accumulation", 1),
        ):
            if getattr(self, name) < least:
                raise InputError(f"{name}: expected {least} or more, found {getattr(self, name)}")
        if not self.learning_rate > 0 or not 0 < self.rate_decay <= 1 or self.weight_decay < 0:
            raise InputError(
                "learning_rate > 0, 0 < rate_decay <= 1 and weight_decay >= 0 expected, found "
                f"{self.learning_rate}, {self.rate_decay}, {self.weight_decay}"
            )
        for name, known in (("optimiser", ("adam", "sgd")), ("protocol", ("strict", "paper"))):
            if getattr(self, name) not in known:
                raise InputError(f"{name}: expected one of {known}, found {getattr(self, name)!r}")
