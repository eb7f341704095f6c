"""Figures of the comparison: one panel per data set and backbone, all made from tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.stats
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lsgs_core.figures import PALETTE, method_colour, method_title
from lsgs_core.methods import METHODS

METRIC_TITLES = {
    "worst_iou": "worst scenario",
    "mean_iou": "mean over scenarios",
    "expected_iou": "expected in deployment",
    "full_iou": "all modalities",
}


def forest(differences: pd.DataFrame, metric: str) -> Figure:
    """Difference of every method to uniform with its 95 % interval; grey: two uniform arms.

    Args:
        differences: Of `lsgs_core.statistics.differences`.
        metric: Which rows.
    """
    table = differences[differences["metric"] == metric]
    present = set(table["method"]) - {"uniform_again"}
    order = [name for name in ["pretrained", *METHODS] if name in present]

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        rows = rows.set_index("method")
        if "uniform_again" in rows.index:
            floor = rows.loc["uniform_again"]
            half = max(abs(floor["low"]), abs(floor["high"]))
            axes.axvspan(-half, half, color="#DDDDDD", linewidth=0)
        axes.axvline(0, color="#333333", linewidth=1)
        for position, name in enumerate(reversed(order)):
            if name not in rows.index:
                continue
            row, colour = rows.loc[name], method_colour(name)
            axes.hlines(position, row["low"], row["high"], color=colour, linewidth=2)
            solid = row["p_holm"] < 0.05
            face = colour if solid else "white"
            axes.plot(row["difference"], position, "o", color=colour, markerfacecolor=face)
        axes.set_yticks(range(len(order)), [method_title(name) for name in reversed(order)])
        axes.set_xlabel("IoU minus uniform")
        axes.xaxis.set_major_locator(MaxNLocator(4))

    figure = _panels(table, draw, width=3.4, height=0.6 + 0.27 * len(order), sharey=True)
    figure.suptitle(
        f"{METRIC_TITLES[metric]}: difference to uniform, 95 % over replicates and blocks\n"
        "grey: what two uniform arms differ by; filled: Holm-corrected p < 0.05"
    )
    return figure


def score_heatmaps(scores: pd.DataFrame, names: Sequence[str]) -> Figure:
    """IoU per method and scenario.

    Args:
        scores: Columns dataset, backbone, method, scenario, iou.
        names: Scenarios, in order.
    """
    methods = list(dict.fromkeys(scores["method"]))
    limits = scores["iou"].min(), scores["iou"].max()

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        table = rows.pivot_table(index="method", columns="scenario", values="iou", sort=False)
        table = table.reindex(index=methods, columns=list(names))
        table.index = pd.Index([method_title(method) for method in table.index])
        sns.heatmap(
            table,
            ax=axes,
            annot=True,
            fmt=".2f",
            annot_kws={"fontsize": 8},
            cmap="viridis",
            vmin=limits[0],
            vmax=limits[1],
            cbar_kws={"label": "IoU"},
        )
        axes.set(xlabel="", ylabel="")
        axes.tick_params(axis="x", rotation=40)

    return _panels(scores, draw, width=5.2, height=1.2 + 0.3 * len(methods))


def method_curves(histories: pd.DataFrame) -> Figure:
    """Validation IoU per epoch of fine-tuning, a line per method.

    Args:
        histories: Columns dataset, backbone, method, fold, seed, epoch, validation_mean_iou. Bands
            are the range over folds and seeds.
    """

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        for method, lines in rows.groupby("method", sort=False):
            curve = lines.groupby("epoch")["validation_mean_iou"].agg(["mean", "min", "max"])
            colour, marker = method_colour(str(method)), "o" if len(curve) < 3 else None
            title = method_title(str(method))
            axes.plot(curve.index, curve["mean"], color=colour, label=title, marker=marker)
            axes.fill_between(
                curve.index, curve["min"], curve["max"], color=colour, alpha=0.12, linewidth=0
            )
        axes.set(xlabel="epoch of fine-tuning", ylabel="validation IoU, mean over scenarios")

    methods = histories["method"].nunique()
    figure = _panels(histories, draw, width=4, height=max(3.2, 0.18 * methods))
    shown = [axes for axes in figure.axes if axes.lines]
    shown[-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize="small")
    return figure


def worst_against_mean(summary: pd.DataFrame) -> Figure:
    """Worst scenario against the mean, a point per method (mean over replicates).

    Args:
        summary: Of `lsgs_core.evaluation.summary`, per dataset, backbone, method and seed.
    """
    keys = ["dataset", "backbone", "method"]
    table = summary.groupby(keys, sort=False)[["mean_iou", "worst_iou"]].mean().reset_index()
    present = set(table["method"])
    numbers = {name: n for n, name in enumerate(["pretrained", *METHODS], 1) if name in present}

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        for name, row in rows.set_index("method")[["mean_iou", "worst_iou"]].iterrows():
            place = float(row["mean_iou"]), float(row["worst_iou"])
            axes.plot(*place, "o", markersize=12, color=method_colour(str(name)), alpha=0.85)
            axes.annotate(
                str(numbers[str(name)]), place, color="white", fontsize=8, ha="center", va="center"
            )
        axes.set(xlabel="IoU, mean over scenarios", ylabel="IoU, worst scenario")
        axes.margins(0.12)
        axes.xaxis.set_major_locator(MaxNLocator(4))

    figure = _panels(table, draw, width=4, height=3.6)
    handles = [
        Line2D([], [], marker="o", linestyle="", color=method_colour(name), label=f"{n}  {title}")
        for name, n in numbers.items()
        for title in [method_title(name)]
    ]
    figure.legend(handles=handles, loc="outside right center", fontsize="small")
    return figure


def distortion_against_loss(table: pd.DataFrame) -> Figure:
    """Does the distortion of a scenario predict what it costs? A point per scenario and fold.

    Args:
        table: Columns dataset, backbone, fold, scenario, missing, distortion, lost (IoU with all
            modalities minus IoU of the scenario, before fine-tuning).
    """
    shades = sns.color_palette("crest", int(table["missing"].max()) + 1)

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        rows = rows[rows["missing"] > 0]
        for missing, points in rows.groupby("missing"):
            number = int(str(missing))
            axes.scatter(
                points["distortion"],
                points["lost"],
                color=shades[number],
                label=f"{number} missing",
            )
        per_fold = [
            scipy.stats.spearmanr(fold["distortion"], fold["lost"]).statistic
            for _, fold in rows.groupby("fold")
        ]
        correlation = f"rank correlation (mean of folds) {np.mean(per_fold):.2f}"
        axes.set(xlabel=f"distortion D; {correlation}", ylabel="IoU lost against all modalities")
        axes.axhline(0, color="#333333", linewidth=1, zorder=0)

    figure = _panels(table, draw, width=4, height=3.3)
    shown = [axes for axes in figure.axes if axes.collections]
    shown[-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize="small")
    return figure


def probability_bars(table: pd.DataFrame, names: Sequence[str]) -> Figure:
    """P of LSGS per scenario: bars are means over folds, points the folds, dashes uniform.

    Args:
        table: Columns dataset, backbone, fold, scenario, probability.
        names: Of the scenarios, in order.
    """

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        means = rows.groupby("scenario")["probability"].mean().reindex(list(names))
        positions = np.arange(len(names))
        axes.bar(positions, means, color=PALETTE[4])
        place = pd.Index(list(names)).get_indexer(pd.Index(rows["scenario"]))
        axes.plot(place, rows["probability"], ".", color=PALETTE[0])
        axes.axhline(1 / len(names), color="#333333", linestyle="--", linewidth=1)
        axes.set_xticks(positions, list(names), rotation=40, ha="right")
        axes.set_ylabel("probability p")

    return _panels(table, draw, width=4, height=3, sharey=True)


def _panels(
    table: pd.DataFrame,
    draw: Callable[[Axes, pd.DataFrame], None],
    width: float,
    height: float,
    sharey: bool = False,
) -> Figure:
    """A row per data set, a column per backbone; empty where a table has no rows."""
    datasets = list(dict.fromkeys(table["dataset"]))
    backbones = list(dict.fromkeys(table["backbone"]))
    figure, axes = plt.subplots(
        len(datasets),
        len(backbones),
        figsize=(max(7, width * len(backbones) + 1), height * len(datasets) + 0.6),
        squeeze=False,
        sharey=sharey,
    )
    for row, dataset in zip(axes, datasets, strict=True):
        for panel, backbone in zip(row, backbones, strict=True):
            rows = table[(table["dataset"] == dataset) & (table["backbone"] == backbone)]
            if len(rows):
                draw(panel, rows)
                panel.set_title(f"{dataset}, {backbone}")
            else:
                panel.axis("off")
        first = next(panel for panel in row if panel.axison)
        first.tick_params(labelleft=True)  # shared labels must not go with an empty panel
    return figure
