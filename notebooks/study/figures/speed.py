"""Figures of the benchmark: where the time goes, and how it grows."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from study.benchmark.speed import CASE, FORMS, PARTS, ratios
from study.data.colours import PALETTE
from study.figures import backbone_title

COLOURS = dict(zip((*PARTS, "backward", "optimiser"), PALETTE, strict=False)) | {"other": "#BBBBBB"}
FORM_COLOURS = {"plain": "#666666", "ours": PALETTE[0]}
AXES = {
    "modalities": "modalities of three bands",
    "size": "patch side (pixels)",
    "batch": "patches at a time",
}


def parts_figure(timings: pd.DataFrame) -> Figure:
    """Draw where the time of every case goes, both forms in percent of the plain form's time.

    Each bar is the run of median time.
    """
    table = ratios(timings)
    titles = table["task"] + ", " + table["backbone"].map(backbone_title)
    titles += " (" + table["preset"] + ")\n" + table["size"].map("{} pixels, ".format)
    titles += table["batch"].map("{} at a time".format)
    figure, axes = plt.subplots(figsize=(8, 1.3 + 0.55 * len(table)))
    for place, case in enumerate(table.to_dict("records")):
        rows = timings[(timings[CASE] == [case[name] for name in CASE]).all(axis=1)]
        for form, y in zip(FORMS, (place - 0.2, place + 0.2), strict=True):
            runs = rows[rows["form"] == form].pivot_table("seconds", "repeat", "part")
            median = runs.loc[runs.sum(axis=1).sort_values().index[(len(runs) - 1) // 2]]
            widths = 100 * median.reindex([*COLOURS], fill_value=0) / case["plain"]
            axes.barh(y, widths, 0.38, widths.cumsum() - widths, color=[*COLOURS.values()])
            said = f", {case['ratio']:.1f} times as fast" if form == "ours" else ""
            axes.text(widths.sum() + 1, y, f"{form}: {case[form]:.2g} s{said}", va="center")
    axes.set_yticks(range(len(table)), titles)
    axes.set(xlim=(0, 150), xticks=range(0, 101, 25), ylim=(len(table) - 0.5, -0.5))
    axes.set_xlabel("time of a patch, % of the plain form", loc="left")
    handles = [Patch(color=colour, label=part) for part, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    figure.suptitle("Where the time goes, and what our form of the networks saves")
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
