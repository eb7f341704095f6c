"""Figures of the benchmark: where the time goes, and how it grows."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from study.figures import PALETTE
from study.speed import FORMS, PARTS, Case, ratios

COLOURS = dict(zip((*PARTS, "backward", "optimiser"), PALETTE, strict=False)) | {"other": "#BBBBBB"}
FORM_COLOURS = dict(zip(FORMS, ("#666666", PALETTE[0]), strict=True))
AXES = {
    "modalities": "modalities of three bands",
    "size": "patch side (pixels)",
    "batch": "patches at a time",
}


def parts_figure(timings: pd.DataFrame) -> Figure:
    """Seconds per patch by part, both forms of every case in their median run, with the ratio.

    Args:
        timings: Of `study.speed.compare`.
    """
    table = ratios(timings)
    case_columns = list(Case.__dataclass_fields__)
    figure, axes = plt.subplots(
        len(table), figsize=(8, 0.4 + 1.15 * len(table)), squeeze=False, layout="constrained"
    )
    for ax, (_, case) in zip(axes[:, 0], table.iterrows(), strict=True):
        chosen = timings[(timings[case_columns] == case[case_columns]).all(axis=1)]
        for form in FORMS:
            left = 0.0
            runs = chosen[chosen["form"] == form].pivot_table("seconds", "repeat", "part")
            middle = runs.sum(axis=1).sort_values().index[(len(runs) - 1) // 2]
            for part, colour in COLOURS.items():
                width = runs.loc[middle].get(part, 0.0)
                ax.barh(form, width, left=left, color=colour, height=0.7, label=part)
                left += width
        ax.invert_yaxis()
        ax.set_title(
            f"{case['task']}, {case['backbone']} ({case['preset']}), {case['size']} pixels, "
            f"{case['batch']} at a time: {case['ratio']:.1f} times as fast",
            loc="left", fontsize="small",
        )  # fmt: skip
        ax.tick_params(labelsize="small")
    axes[-1, 0].set_xlabel("seconds per patch (the run of median time)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    figure.legend(
        shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown),
        fontsize="small",
    )  # fmt: skip
    return figure


def growth_figure(timings: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Seconds per patch of both forms against what grows.

    Args:
        timings: Of `study.speed.compare`, by the column that varies.
        title: Shown above.
    """
    figure, axes = plt.subplots(
        1, len(timings), figsize=(9, 3.2), sharey=True, squeeze=False, layout="constrained"
    )
    for ax, (column, grown) in zip(axes[0], timings.items(), strict=True):
        table = ratios(grown)
        for form in FORMS:
            ax.plot(table[column], table[form], "o-", color=FORM_COLOURS[form], label=form)
        for _, row in table.iterrows():
            ax.annotate(
                f"{row['ratio']:.1f}×", (row[column], row["ours"]), textcoords="offset points",
                xytext=(0, -13), ha="center", fontsize="small", color=FORM_COLOURS["ours"],
            )  # fmt: skip
        ax.set(xlabel=AXES[column], xticks=table[column], yscale="log")
        ax.margins(x=0.15, y=0.2)
    axes[0, 0].set_ylabel("seconds per patch")
    axes[0, -1].legend()
    figure.suptitle(title, fontsize="medium")
    return figure
