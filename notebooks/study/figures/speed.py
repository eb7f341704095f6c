"""Figures of the benchmark: where the time goes, and how it grows."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from study.figures import PALETTE
from study.speed import CASE, FORMS, PARTS, ratios

COLOURS = dict(zip((*PARTS, "backward", "optimiser"), PALETTE, strict=False)) | {"other": "#BBBBBB"}
FORM_COLOURS = {"plain": "#666666", "ours": PALETTE[0]}
AXES = {
    "modalities": "modalities of three bands",
    "size": "patch side (pixels)",
    "batch": "patches at a time",
}


def parts_figure(timings: pd.DataFrame) -> Figure:
    """Draw the seconds per patch by part, of both forms of every case in their median run."""
    table = ratios(timings)
    figure, axes = plt.subplots(
        len(table), figsize=(8, 0.4 + 1.15 * len(table)), squeeze=False, layout="constrained"
    )
    for panel, (_, case) in zip(axes[:, 0], table.iterrows(), strict=True):
        rows = timings[(timings[CASE] == case[CASE]).all(axis=1)]
        for form in FORMS:
            left = 0.0
            runs = rows[rows["form"] == form].pivot_table("seconds", "repeat", "part")
            median = runs.sum(axis=1).sort_values().index[(len(runs) - 1) // 2]
            for part, colour in COLOURS.items():
                width = runs.loc[median].get(part, 0.0)
                panel.barh(form, width, left=left, color=colour, height=0.7, label=part)
                left += width
        panel.invert_yaxis()
        title = (
            f"{case['task']}, {case['backbone']} ({case['preset']}), {case['size']} pixels, "
            f"{case['batch']} at a time: {case['ratio']:.1f} times as fast"
        )
        panel.set_title(title, loc="left", fontsize="small")
        panel.tick_params(labelsize="small")
    axes[-1, 0].set_xlabel("seconds per patch (the run of median time)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    figure.legend(
        shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown), fontsize="small"
    )
    return figure


def growth_figure(timings: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Draw the seconds per patch of both forms; timings are by the column that varies.

    Cases with a budget of scenarios are a dashed line of ours.
    """
    figure, axes = plt.subplots(
        1, len(timings), figsize=(9, 3.2), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, (column, varied) in zip(axes[0], timings.items(), strict=True):
        every = ratios(varied)
        limited, table = every[every["budget"] > 0], every[every["budget"] == 0]
        for form, colour in FORM_COLOURS.items():
            panel.plot(table[column], table[form], "o-", color=colour, label=form)
        for budget, part in limited.groupby("budget"):
            label = f"ours, {budget} scenarios"
            panel.plot(part[column], part["ours"], "o--", color=FORM_COLOURS["ours"], label=label)
            panel.legend()
        for _, row in table.iterrows():
            panel.annotate(
                f"{row['ratio']:.1f}×", (row[column], row["ours"]), ha="center", fontsize="small",
                textcoords="offset points", xytext=(0, -13), color=FORM_COLOURS["ours"],
            )  # fmt: skip
        panel.set(xlabel=AXES[column], xticks=table[column], yscale="log")
        panel.margins(x=0.15, y=0.2)
    axes[0, 0].set_ylabel("seconds per patch")
    axes[0, -1].legend()
    figure.suptitle(title, fontsize="medium")
    return figure
