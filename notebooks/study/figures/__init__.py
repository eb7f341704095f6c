"""What all figures share: one style, and the same colour for the same method everywhere.

Every function of this package draws its arguments and returns the figure; `save_figure` writes it
as PNG and PDF without dates, so that equal figures are equal files.
"""

from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from lsgs_core.methods import METHODS
from lsgs_core.models import BACKBONES
from study.data.colours import GREY
from study.provenance.artifacts import Record, save

FAMILY_COLOURS = {
    "LSGS": "#0072B2",
    "uniform": "#555555",
    "successor": "#CC79A7",
    "control": "#E69F00",
    "adaptive": "#009E73",
    "LoRA": "#56B4E9",
    "positive control": "#D55E00",
}


def use_style() -> None:
    """Use the style of the study, `figures.mplstyle`, for every figure after this call."""
    plt.style.use(Path(__file__).with_name("figures.mplstyle"))


def backbone_title(backbone: str) -> str:
    """Return the name of a backbone in figures: "CBC-SLP" of "cbc_slp"; others keep theirs."""
    return backbone.upper().replace("_", "-") if backbone in BACKBONES else backbone


def family_members(method: str) -> list[str]:
    """Return the methods of the same family, in order; none for a method outside of `METHODS`."""
    own = METHODS.get(method.partition("@")[0])
    return [name for name, other in METHODS.items() if own and other.family == own.family]


def method_colour(method: str) -> str:
    """Return the colour of a method: that of its family, lighter for later members."""
    members, name = family_members(method), method.partition("@")[0]
    if not members:
        return GREY
    colour = FAMILY_COLOURS[METHODS[name].family]
    shades = sns.light_palette(colour, n_colors=len(members) + 3, reverse=True)
    return to_hex(shades[members.index(name)])


def save_figure(figure: Figure, folder: Path, name: str, record: Record) -> list[Path]:
    """Write `<name>.png` and `<name>.pdf` with their records, and return their paths."""
    metadata = {"png": {"Software": None}, "pdf": {"CreationDate": None}}
    return [
        save(folder / f"{name}.{suffix}", partial(figure.savefig, metadata=without), record)
        for suffix, without in metadata.items()
    ]
