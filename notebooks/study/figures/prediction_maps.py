"""Figures of predictions for single patches."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from study.figures import NO_CLASS, category_colours, category_map, method_title
from study.figures.predictions import NOTHING, UNKNOWN, Predictions

RIGHT, WRONG = "#DDDDDD", "#D55E00"


def prediction_maps(predictions: Predictions, backbone: str, method: str) -> Figure:
    """A row per patch: image, truth, and what each single modality and all of them give.

    Pixels without a label are drawn pale.
    """
    maps, scenarios = predictions.of(backbone, method), predictions.scenarios
    single = np.flatnonzero(scenarios.masks.sum(axis=1) == 1)
    shown = {scenarios.names[number]: number for number in single} | {"all": scenarios.full}
    titles = [f"image ({predictions.modalities[0]})", "truth", *shown]
    figure, axes = plt.subplots(
        len(maps), len(titles), figsize=(2 * len(titles) + 1.6, 2.15 * len(maps)), squeeze=False
    )
    for row, pictures, truth, found in zip(
        axes, predictions.pictures, predictions.truth, maps, strict=True
    ):
        row[0].imshow(pictures[0])
        _class_panel(row[1], truth, predictions)
        for panel, number in zip(row[2:], shown.values(), strict=True):
            _class_panel(panel, found[number], predictions)
            _pale(panel, truth == UNKNOWN)
    for panel, title in zip(axes[0], titles, strict=True):
        panel.set_title(title)
    _finish(figure, predictions)
    figure.suptitle(f"{backbone}, {method_title(method)}")
    return figure


def prediction_view(
    predictions: Predictions, patch: int, backbone: str, method: str, available: Sequence[bool]
) -> Figure:
    """One patch under one scenario: what the sensors see, truth, prediction, and where it errs.

    Args:
        predictions: With those of the network.
        patch: Position among them.
        backbone: Of the network.
        method: Of the network.
        available: Whether each modality is there, at least one, [M].

    Raises:
        InputError: No such network, or no modality.
    """
    scenario = predictions.scenarios.index(available)
    found = predictions.of(backbone, method)[patch, scenario]
    truth, names = predictions.truth[patch], predictions.modalities
    figure, axes = plt.subplots(2, max(3, len(names)), figsize=(3 * max(3, len(names)) + 1, 6))
    for panel, name, picture, there in zip(
        axes[0], names, predictions.pictures[patch], available, strict=False
    ):
        panel.imshow(picture if there else np.full_like(picture, 225))
        panel.set_title(name if there else f"{name}: missing")
    _class_panel(axes[1, 0], truth, predictions)
    axes[1, 0].set_title("truth (white: no label)")
    _class_panel(axes[1, 1], found, predictions)
    _pale(axes[1, 1], truth == UNKNOWN)
    axes[1, 1].set_title(f"prediction from {predictions.scenarios.names[scenario]}")
    known = (truth != UNKNOWN) & (found != UNKNOWN)
    right = np.where(known, found == truth, -1)
    category_map(axes[1, 2], right, {0: "wrong", 1: "right"}, "", (WRONG, RIGHT), legend=False)
    share = (found == truth)[known].mean() if known.any() else float("nan")
    axes[1, 2].set_title(f"{share:.0%} right (orange: wrong)")
    for panel in [*axes[0, len(names) :], *axes[1, 3:]]:
        panel.axis("off")
    _finish(figure, predictions)
    return figure


def _class_panel(panel: Axes, classes: NDArray[np.uint8], predictions: Predictions) -> None:
    category_map(panel, classes.astype(int), dict(enumerate(predictions.classes)), "", legend=False)
    panel.imshow(np.where((classes == NOTHING)[..., None], to_rgba(NO_CLASS), 0))


def _pale(panel: Axes, where: NDArray[np.bool_]) -> None:
    panel.imshow(np.dstack([np.ones((*where.shape, 3)), where * 0.6]))


def _finish(figure: Figure, predictions: Predictions) -> None:
    """Take away ticks and frames, and put a legend of the classes below."""
    for panel in figure.axes:
        panel.set_xticks([])
        panel.set_yticks([])
        panel.spines[:].set_visible(False)
    colours = category_colours(len(predictions.classes))
    handles = [Patch(color=c, label=n) for c, n in zip(colours, predictions.classes, strict=True)]
    handles.append(Patch(color=NO_CLASS, label="none of these"))
    figure.legend(handles=handles, loc="outside lower center", ncols=6)
