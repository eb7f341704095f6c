"""How to train: the settings of a run, checked when they are made."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import Field, create_model

from study.metrics.losses import Protocol
from study.provenance.devices import Precision
from study.provenance.schema import Strict, validated

# Ranges of numbers. Beyond the upper ends, which no run comes near, a value is a typing error.
Positive = Annotated[int, Field(ge=1, le=100_000)]
Rate = Annotated[float, Field(gt=0, le=100)]


@dataclass(frozen=True)
class TrainingSettings:
    """How to train. The paper's own values sit in a file that was not published; these are ours."""

    epochs: Positive  # passes over the training patches
    batch_size: Positive = 8  # patches per step, over all processes
    learning_rate: Rate = 2e-3  # at the start
    optimiser: Literal["adam", "sgd"] = "adam"  # "sgd" has a momentum of 0.9
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.0  # L2 penalty
    # factor on the learning rate every `rate_decay_every` epochs
    rate_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    rate_decay_every: Positive = 5
    # "paper" takes the published loss (binary and multi-label tasks only)
    protocol: Protocol = "strict"
    # turn and mirror every patch at random (the eight symmetries of the square)
    augment: bool = True
    # Parts that a batch is computed in, one after the other, where memory is short. Loss and
    # normalisation are then those of each part.
    accumulation: Positive = 1
    precision: Precision = "float32"  # of the forward pass; "bfloat16" is mixed, on GPUs alone

    def batch_sizes(self, patches: int) -> list[int]:
        """Return the number of patches of every step of an epoch.

        A single patch that is left over joins the batch before: batch normalisation has no variance
        over one sample where the features have shrunk to one pixel.
        """
        size = self.batch_size
        sizes = [min(size, patches - start) for start in range(0, patches, size)]
        if len(sizes) > 1 and sizes[-1] == 1 < size:
            sizes[-2:] = [size + 1]
        return sizes

    def __post_init__(self) -> None:
        """Raise `InputError` that names a setting and what was expected."""
        validated(_CHECKED, asdict(self), "settings of the training")


TYPES = get_type_hints(TrainingSettings, include_extras=True)  # of every setting, with its range
_FIELDS: dict[str, Any] = {name: (kind, ...) for name, kind in TYPES.items()}
_CHECKED = create_model("TrainingSettings", __base__=Strict, **_FIELDS)
