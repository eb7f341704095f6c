"""Figures of the comparison: one panel per data set and backbone, all made from tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.stats
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lsgs_core.methods import METHODS
from study.figures import PALETTE, method_colour, method_title
from study.pages import METRIC_TITLES

MARKERS = "osD^vP*Xh"


def forest(differences: pd.DataFrame, metric: str) -> Figure:
    """Difference of every method to uniform with its 95 % interval and number of replicates.

    Args:
        differences: Of `study.statistics.differences`.
        metric: Which rows.
    """
    table = differences[differences["metric"] == metric]
    present = set(table["method"])
    first = ["pretrained", "uniform_again"]
    order = [n for n in [*first, *(n for n in METHODS if n not in first)] if n in present]

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        rows = rows.set_index("method")
        axes.axvline(0, color="#333333", linewidth=1)
        for position, name in enumerate(reversed(order)):
            if name not in rows.index:
                continue
            row, colour = rows.loc[name], method_colour(name)
            axes.hlines(position, row["low"], row["high"], color=colour, linewidth=2)
            solid = row["p_holm"] < 0.05
            face = colour if solid else "white"
            axes.plot(row["difference"], position, "o", color=colour, markerfacecolor=face)
            axes.text(
                1.02, position, f"{row['replicates']:.0f}", fontsize=8, color="#666666",
                va="center", transform=axes.get_yaxis_transform(),
            )  # fmt: skip
        axes.set_yticks(range(len(order)), [method_title(name) for name in reversed(order)])
        axes.set_xlabel("IoU minus uniform")
        axes.xaxis.set_major_locator(MaxNLocator(4))

    figure = _panels(table, draw, width=3.6, height=0.6 + 0.27 * len(order), sharey=True)
    # The numbers of replicates stand between the panels.
    figure.set_layout_engine("constrained", wspace=0.08)
    figure.suptitle(
        f"{METRIC_TITLES[metric]}: difference to uniform, 95 % over replicates and blocks\n"
        "filled: Holm-corrected p < 0.05; on the right: replicates; second arm: the noise floor"
    )
    return figure


def score_heatmaps(scores: pd.DataFrame, names: Sequence[str]) -> Figure:
    """IoU per method and scenario; colours span what a data set has.

    Args:
        scores: Columns dataset, backbone, method, scenario, iou.
        names: Scenarios, in order.
    """
    methods = list(dict.fromkeys(scores["method"]))
    limits = scores.groupby("dataset")["iou"].agg(["min", "max"])

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
            vmin=limits.loc[rows["dataset"].iloc[0], "min"],
            vmax=limits.loc[rows["dataset"].iloc[0], "max"],
            cbar_kws={"label": "IoU"},
        )
        axes.set(xlabel="", ylabel="")
        plt.setp(axes.get_xticklabels(), rotation=40, ha="right", rotation_mode="anchor")

    pairs = len(scores[["dataset", "backbone"]].drop_duplicates())
    height = 1.2 + 0.3 * len(methods)
    return _panels(scores, draw, width=5.6, height=height, columns=1 if pairs < 4 else 2)


def method_curves(histories: pd.DataFrame) -> Figure:
    """Validation IoU per epoch of fine-tuning, a line per method: means over folds and seeds.

    Args:
        histories: Columns dataset, backbone, method, fold, seed, epoch, validation_mean_iou.
    """

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        for method, lines in rows.groupby("method", sort=False):
            curve = lines.groupby("epoch")["validation_mean_iou"].mean()
            axes.plot(curve.index + 1, curve, **_look(str(method)))
        axes.set(xlabel="epochs of fine-tuning", ylabel="validation IoU, mean over scenarios")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))

    methods = histories["method"].nunique()
    figure = _panels(histories, draw, width=4, height=max(3.2, 0.18 * methods))
    _legend_beside(figure)
    return figure


def worst_against_mean(summary: pd.DataFrame) -> Figure:
    """Worst scenario against the mean, a point per method (mean over replicates).

    Args:
        summary: Of `study.evaluation.summary`, per dataset, backbone, method and seed.
    """
    keys = ["dataset", "backbone", "method"]
    table = summary.groupby(keys, sort=False)[["mean_iou", "worst_iou"]].mean().reset_index()

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        for name, row in rows.groupby("method", sort=False):
            axes.plot(row["mean_iou"], row["worst_iou"], linestyle="", **_look(str(name)))
        axes.set(xlabel="IoU, mean over scenarios", ylabel="IoU, worst scenario")
        axes.margins(0.12)
        axes.xaxis.set_major_locator(MaxNLocator(4))

    figure = _panels(table, draw, width=4, height=max(3.6, 0.2 * table["method"].nunique()))
    _legend_beside(figure)
    return figure


def distortion_against_loss(table: pd.DataFrame) -> Figure:
    """Does the distortion of a scenario predict what it costs? A point per scenario and fold.

    Rank correlations are Spearman's, means over folds.

    Args:
        table: Columns dataset, backbone, fold, scenario, missing, distortion, lost (IoU with all
            modalities minus IoU of the scenario, before fine-tuning).
    """
    shades = sns.color_palette("crest", int(table["missing"].max()) + 1)

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        rows = rows[rows["missing"] > 0]
        for _, points in rows.groupby(["fold", "missing"]):
            fold, missing = (int(points[name].iloc[0]) for name in ("fold", "missing"))
            axes.scatter(
                points["distortion"],
                points["lost"],
                color=shades[missing],
                marker=MARKERS[fold % len(MARKERS)],
                label=f"{missing} missing, fold {fold}",
            )
        found = [
            np.mean([scipy.stats.spearmanr(f[by], f["lost"])[0] for _, f in rows.groupby("fold")])
            for by in ("distortion", "missing")
        ]
        correlation = f"rank correlation {found[0]:.2f}; of number missing {found[1]:.2f}"
        axes.set(xlabel=f"distortion D\n{correlation}", ylabel="IoU lost against all modalities")
        axes.axhline(0, color="#333333", linewidth=1, zorder=0)

    figure = _panels(table, draw, width=4, height=3.3)
    _legend_beside(figure)
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


def _look(method: str) -> dict[str, Any]:
    """A method's colour, name, and the marker that tells it from the others of its family."""
    known = METHODS.get(method)
    members = [name for name, other in METHODS.items() if known and other.family == known.family]
    position = members.index(method) if members else -1
    marker = MARKERS[position % len(MARKERS)]
    return {"color": method_colour(method), "label": method_title(method), "marker": marker}


def _legend_beside(figure: Figure) -> None:
    """One legend for all panels, to their right: of the one with most entries."""
    found = [axes.get_legend_handles_labels() for axes in figure.axes]
    entries = max(found, key=lambda entry: len(entry[0]))
    figure.legend(*entries, loc="outside right center", fontsize="small")


def _panels(
    table: pd.DataFrame,
    draw: Callable[[Axes, pd.DataFrame], None],
    width: float,
    height: float,
    columns: int = 3,
    sharey: bool = False,
) -> Figure:
    """A panel per data set and backbone that the table has."""
    keys = ["dataset", "backbone"]
    groups = [group for _, group in table.groupby(keys, sort=False)]
    order = list(dict.fromkeys(table["dataset"])), list(dict.fromkeys(table["backbone"]))
    groups.sort(key=lambda g: [o.index(g[k].iloc[0]) for k, o in zip(keys, order, strict=True)])
    columns = min(columns, len(groups))
    rows = -(-len(groups) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(max(7, width * columns + 1), height * rows + 0.6),
        squeeze=False,
        sharey=sharey,
    )
    for panel in axes.flat[len(groups) :]:
        panel.axis("off")
    for panel, group in zip(axes.flat, groups, strict=False):
        draw(panel, group)
        panel.set_title(", ".join(group[key].iloc[0] for key in keys))
    return figure
