"""Figures of a scoring: distortions, kernel, probabilities, and what they depend on."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from numpy.typing import NDArray

from lsgs_core.distortion import ScenarioScores
from lsgs_core.probabilities import ScenarioProbabilities, standardise
from study.data.colours import PALETTE

READABLE = 15  # scenarios whose names fit beside each other
MOST_SHOWN = 63  # scenarios in a figure: all of six modalities
SETTING_TITLES = {
    "inverse_temperature": "inverse temperature τ",
    "mixing": "mixing γ",
    "ridge": "ridge λ",
    "lengthscale": "lengthscale σ / median distance",
}


def _shown(result: ScenarioProbabilities) -> tuple[NDArray[np.int64], str]:
    """Return the scenarios that a figure shows, in order, and a note where it leaves some out.

    Of more than `MOST_SHOWN`, every n-th in the order of p is shown, both ends included.
    """
    count = len(result.probabilities)
    if count <= MOST_SHOWN:
        return np.arange(count), ""
    ranks = np.linspace(0, count - 1, MOST_SHOWN).round().astype(int)
    chosen = np.argsort(result.probabilities, kind="stable")[ranks]
    return np.sort(chosen), f"{MOST_SHOWN} of {count} scenarios, spread over p"


def method_at_a_glance(scores: ScenarioScores, result: ScenarioProbabilities) -> Figure:
    """Draw a row per scenario: its modalities, its distortion, and how often it is drawn.

    Bars of the distortion have one standard error, clustered by spatial block; where D is
    predicted, its predictive error is added in squares, and the bar is hatched.
    """
    scenarios = scores.scenarios
    chosen, note = _shown(result)
    masks, missing = scenarios.masks[chosen], scenarios.missing[chosen]
    predicted = scores.predictive_error[chosen]
    error = np.hypot(scores.standard_error[chosen], predicted)
    rows = np.arange(len(chosen))
    shades = sns.color_palette("crest", len(scenarios.modalities))
    colours = [shades[index] for index in missing]
    hatches = ["////" if one else "" for one in predicted]
    size, layout = (9, 0.8 + 0.32 * len(rows)), ConstrainedLayoutEngine(w_pad=0.1)
    figure, axes = plt.subplots(
        1, 3, figsize=size, width_ratios=(1, 2.2, 2.2), sharey=True, layout=layout
    )
    row, column = np.nonzero(masks)
    axes[0].scatter(column, row, s=90, color="#262626")
    row, column = np.nonzero(~masks)
    axes[0].scatter(column, row, s=90, facecolors="none", edgecolors="#999999")
    axes[0].set_xticks(range(len(scenarios.modalities)), scenarios.modalities)
    axes[0].set_yticks(rows, [scenarios.names[k] for k in chosen])
    axes[0].set(title="1  what is there", xlim=(-0.6, len(scenarios.modalities) - 0.4))
    look: dict[str, Any] = {"color": colours, "hatch": hatches, "edgecolor": "white", "capsize": 2}
    axes[1].barh(rows, scores.distortion[chosen], xerr=error, **look)
    axes[1].set(title="2  how much the latent changes", xlabel="distortion D ± standard error")
    axes[2].barh(rows, result.probabilities[chosen], color=colours)
    axes[2].plot(result.prior[chosen], rows, color="#262626", linestyle="--")
    label = f"probability p (dashed: {_prior_title(result)})"
    axes[2].set(title="3  how often training draws it", xlabel=label)
    axes[0].invert_yaxis()
    handles = [Patch(color=shade, label=f"{n} missing") for n, shade in enumerate(shades)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure.suptitle(note + "; hatched: D is predicted" * bool(predicted.any()))
    return figure


def probability_steps(result: ScenarioProbabilities, names: Sequence[str]) -> Figure:
    """Draw a row per scenario: its kernel, what the smoothing changes, and p beside the prior."""
    chosen, note = _shown(result)
    rows = np.arange(len(chosen))
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True)
    kernel = result.kernel[np.ix_(chosen, chosen)]
    image = axes[0].imshow(kernel, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    figure.colorbar(image, ax=axes[0], label="similarity")
    axes[0].set(title=f"RBF kernel, lengthscale {result.lengthscale:.3g}", xticks=[])
    axes[0].set_xlabel("the same scenarios, in this order")
    before, after = result.utility[chosen], result.smoothed[chosen]
    axes[1].hlines(rows, before, after, color=PALETTE[0])
    axes[1].plot(before, rows, "o", color=PALETTE[0], clip_on=False)
    axes[1].plot(after, rows, "o", color=PALETTE[5], markersize=9, fillstyle="none", clip_on=False)
    moved = np.abs(result.standardised - standardise(result.utility)).max()
    title = f"Smoothing moves the standardised\nscores by up to {moved:.2g}"
    if moved < 0.01:
        title = "Smoothing changes nothing at this lengthscale"
    sign = "" if result.utility.max() > 0 else "−"
    axes[1].set(xlabel=f"{sign}D, distortion (dots); r, smoothed (rings)", title=title)
    _probability_bars(axes[2], result, names, "How often training draws it")
    figure.suptitle(note)
    return figure


def sensitivity_panels(
    result: ScenarioProbabilities,
    names: Sequence[str],
    resampled: NDArray[np.float64],
    varied: pd.DataFrame,
    settings: Mapping[str, Any],
) -> Figure:
    """Draw p with its uncertainty, and p as a function of each setting.

    Args:
        result: The probabilities in use.
        names: Names of the scenarios.
        resampled: Probabilities of `bootstrap_probabilities`, [R, K].
        varied: Table of `sensitivity`.
        settings: Settings in use; numbers are marked in their panels, except for the lengthscale,
            whose panel has another unit.
    """
    figure, axes = plt.subplots(2, 3, figsize=(12, 7))
    first, *panels = axes.flat
    chosen, note = _shown(result)
    low, high = np.percentile(resampled[:, chosen], [2.5, 97.5], axis=0)
    _probability_bars(first, result, names, "95 % over resampled blocks")
    first.hlines(np.arange(len(chosen)), low, high, color="#333333")
    sensors = [name.count("+") + 1 for name in names]
    few = len(names) < len(PALETTE)
    for panel, (setting, rows) in zip(panels, varied.groupby("setting", sort=False), strict=False):
        lines = dict([*rows.groupby("scenario")])
        for position in chosen.tolist():
            line = lines[position]
            colour = PALETTE[position if few else (sensors[position] - 1) % len(PALETTE)]
            label = names[position] if few else f"{sensors[position]} available"
            # Scenarios that are drawn alike lie on one another: every other line has gaps.
            look = {"linestyle": "--", "zorder": 3} if few and position % 2 else {}
            panel.plot(line["value"], line["probability"], color=colour, label=label, **look)
        value = settings.get(str(setting))
        if setting != "lengthscale" and isinstance(value, float):
            panel.axvline(value, color="#333333", linestyle=":", linewidth=1)
        if setting in ("ridge", "lengthscale"):
            panel.set_xscale("log")
        label = SETTING_TITLES[str(setting)]
        panel.set(xlabel=label, ylabel="probability p", ylim=(0, None))
    entries = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    figure.suptitle(note)
    panels[-1].axis("off")
    panels[-1].legend(entries.values(), entries.keys(), loc="center")
    return figure


def _probability_bars(
    axes: Axes, result: ScenarioProbabilities, names: Sequence[str], title: str
) -> None:
    """Draw a row per scenario: p as a bar, and the prior as a dashed line."""
    chosen, note = _shown(result)
    rows, label = np.arange(len(chosen)), _prior_title(result)
    axes.barh(rows, result.probabilities[chosen], color=PALETTE[1])
    axes.plot(result.prior[chosen], rows, color="#333333", linestyle="--", label=label)
    readable = len(names) <= READABLE
    axes.set_yticks(rows if readable else [], [names[k] for k in chosen] if readable else [])
    axes.set_ylabel("" if readable else note or "scenarios, from one modality to all")
    axes.set(xlabel=f"probability p (dashed: {label})", title=title, ylim=(len(rows) - 0.5, -0.5))


def _prior_title(result: ScenarioProbabilities) -> str:
    return "uniform" if np.ptp(result.prior) < 1e-12 else "deployment"
