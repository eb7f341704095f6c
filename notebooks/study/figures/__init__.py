"""Figures: one style, the same colour for the same method, the same order of scenarios everywhere.

Every function draws what it is given and returns the figure; `save_figure` writes PNG and PDF
without dates, so that equal figures are equal files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lsgs_core.methods import METHODS
from study.artifacts import Record, save

# Okabe and Ito's colours, told apart by readers of every colour vision.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
NO_CLASS = "#999999"  # labelled or predicted as none of the classes
# Methods that are not in the table, such as the network before fine-tuning.
OTHER_METHODS = {"pretrained": "before fine-tuning", "always_positive": "always positive"}
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
    """Set the style of every figure after this call: `figures.mplstyle`."""
    plt.style.use(Path(__file__).with_name("figures.mplstyle"))


def method_title(method: str) -> str:
    """A method's name as figures and tables show it."""
    return METHODS[method].title if method in METHODS else OTHER_METHODS.get(method, method)


def method_colour(method: str) -> str:
    """A method's colour, the same in every figure: its family's, lighter for later members."""
    if method not in METHODS:
        return "#999999"
    family = METHODS[method].family
    members = [name for name, known in METHODS.items() if known.family == family]
    shades = sns.light_palette(FAMILY_COLOURS[family], n_colors=len(members) + 3, reverse=True)
    return to_hex(shades[members.index(method)])


def save_figure(figure: Figure, folder: Path, name: str, record: Record) -> list[Path]:
    """Write `<name>.png` and `<name>.pdf` with their records, and return their paths."""
    png = save(
        folder / f"{name}.png", lambda to: figure.savefig(to, metadata={"Software": None}), record
    )
    pdf = save(
        folder / f"{name}.pdf",
        lambda to: figure.savefig(to, metadata={"CreationDate": None}),
        record,
    )
    return [png, pdf]


def composite(bands: NDArray[Any], seen: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """Colour picture of three bands (of fewer: grey), each stretched from 2 to 98 %.

    Args:
        bands: [D, H, W]; the first three are shown, in the order red, green, blue.
        seen: Pixels with data, [H, W]; others are white.

    Returns:
        float64 [H, W, 3], from 0 to 1.
    """
    shown = np.asarray(bands, dtype=np.float64)[:3]
    shown = np.repeat(shown[:1], 3, axis=0) if len(shown) < 3 else shown
    inside = np.ones(shown.shape[1:], dtype=bool) if seen is None else seen
    if not inside.any():
        return np.ones((*inside.shape, 3))
    limits = np.percentile(shown[:, inside], [2, 98], axis=1)[..., None, None]
    stretched = np.clip((shown - limits[0]) / np.maximum(np.ptp(limits, axis=0), 1e-12), 0, 1)
    stretched[:, ~inside] = 1
    return stretched.transpose(1, 2, 0)


def category_colours(count: int, colours: Sequence[str] = PALETTE) -> list[str]:
    """The first of some colours; evenly spread hues where there are not enough of them."""
    few = count <= len(colours)
    return list(colours)[:count] if few else list(sns.husl_palette(count).as_hex())


def category_map(
    axes: Axes,
    ids: NDArray[np.integer],
    names: Mapping[int, str],
    title: str,
    colours: Sequence[str] = PALETTE,
    extent: tuple[float, float, float, float] | None = None,
    legend: bool = True,
) -> None:
    """Draw a map of ids; those that have no name stay white.

    Args:
        axes: Where to draw.
        ids: [H, W].
        names: Name of every id that is shown.
        title: Of the panel.
        colours: One per name; when there are more names, evenly spread hues instead.
        extent: left, right, bottom, top in the units of the axes; None: pixels.
        legend: Of the names, to the right.
    """
    keys = list(names)
    position = np.full(ids.shape, np.nan)
    for index, key in enumerate(keys):
        position[ids == key] = index
    chosen = category_colours(len(keys), colours)
    norm = BoundaryNorm(np.arange(len(keys) + 1) - 0.5, len(keys))
    axes.imshow(position, cmap=ListedColormap(chosen), norm=norm, extent=extent)
    axes.set_title(title)
    if not legend:
        return
    handles = [Patch(color=c, label=names[k]) for c, k in zip(chosen, keys, strict=True)]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), fontsize="small")


def training_curves(history: pd.DataFrame, title: str) -> Figure:
    """Loss of training, and IoU on validation where the history has it, per epoch.

    Args:
        history: Columns epoch, loss, and any of validation_full_iou, validation_mean_iou.
        title: Of the figure.
    """
    shown = [name for name in ("validation_full_iou", "validation_mean_iou") if name in history]
    figure, axes = plt.subplots(1, 2 if shown else 1, figsize=(9, 3), squeeze=False)
    marker = "o" if len(history) < 3 else None
    epochs = history["epoch"] + 1
    axes[0, 0].plot(epochs, history["loss"], color=PALETTE[0], marker=marker)
    axes[0, 0].set(xlabel="epochs", ylabel="training loss")
    labels = {"validation_full_iou": "all modalities", "validation_mean_iou": "mean over scenarios"}
    for colour, name in zip(PALETTE, shown, strict=False):
        axes[0, 1].plot(epochs, history[name], color=colour, marker=marker, label=labels[name])
    if shown:
        axes[0, 1].set(xlabel="epochs", ylabel="validation IoU")
        axes[0, 1].legend()
    for panel in axes.flat:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title)
    return figure
