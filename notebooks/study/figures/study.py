"""Figures of the comparison: one panel per data set and backbone, all made from tables."""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lsgs_core.methods import METHODS
from study.comparison.cases import SCORES
from study.data.colours import PALETTE
from study.figures import backbone_title, family_members, method_colour
from study.metrics.statistics import METRICS, UNIFORM_ARMS, method_title, rank_correlation

MARKERS = "osD^vP*Xh"


def forest(differences: pd.DataFrame, metric: str) -> Figure:
    """Draw the difference of every method to uniform in one metric, with its 95 % interval.

    Networks before fine-tuning can lie far below all methods; their difference is then written.
    """
    table = differences[differences["metric"] == metric]
    others = table[table["method"] != "pretrained"]
    ends = others if len(others) else table
    left, right = min(0, ends["low"].min()), max(0, ends["high"].max())
    margin = 0.1 * (right - left)
    present = set(table["method"])
    names = dict.fromkeys(["pretrained", "uniform_again", *METHODS, *sorted(present)])
    order = [name for name in names if name in present][::-1]

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        rows = rows.set_index("method")
        axes.axvline(0, color="#333333", linewidth=1)
        for position, name in enumerate(order):
            if name not in rows.index:
                continue
            row, colour = rows.loc[name], method_colour(name)
            face = colour if row["p_holm"] < 0.05 else "white"
            axes.hlines(position, row["low"], row["high"], color=colour, linewidth=2)
            axes.plot(row["difference"], position, "o", color=colour, markerfacecolor=face)
            if row["difference"] < left - margin:
                axes.text(
                    left - 0.8 * margin, position, f"← {row['difference']:+.2f}", fontsize=8,
                    color="#666666", va="center", bbox={"color": "white", "pad": 0},
                )  # fmt: skip
            _note(axes, position, f"{row['replicates']:.0f}")
        axes.set_xlim(left - margin, right + margin)
        axes.set_yticks(range(len(order)), [method_title(name) for name in order])
        axes.set_xlabel("IoU minus uniform")
        axes.xaxis.set_major_locator(MaxNLocator(4))

    title = (
        f"{METRICS[metric]}: difference to uniform, 95 % over replicates and blocks\n"
        "filled: Holm-corrected p < 0.05; on the right: replicates; second arm: the noise floor"
    )
    height = 0.6 + 0.27 * len(order)
    figure = _panels(table, draw, title, width=3.6, height=height, sharex=True, sharey=True)
    # The numbers of replicates stand between the panels.
    figure.set_layout_engine("constrained", wspace=0.08)
    return figure


def forest_of_cases(differences: pd.DataFrame, pooled: pd.DataFrame) -> Figure:
    """Draw the pooled difference of every method to uniform over its cases, a panel per metric.

    Args:
        differences: Result of `study.metrics.statistics.differences` of all cases, drawn as small
            points.
        pooled: Result of `study.comparison.cases.pooled_differences`: the mean with its interval,
            thick, and the interval for a new case, thin.
    """
    metrics = list(dict.fromkeys(pooled["metric"]))
    names = dict.fromkeys(("uniform_again", *METHODS))
    order = [name for name in names if name in set(pooled["method"])][::-1]
    size = 2 + 3.2 * len(metrics), 1.2 + 0.36 * len(order)
    figure, axes = plt.subplots(1, len(metrics), figsize=size, squeeze=False, sharey=True)
    for panel, metric in zip(axes.flat, metrics, strict=True):
        panel.axvline(0, color="#333333", linewidth=1)
        for position, name in enumerate(order):
            colour = method_colour(name)
            cases = differences[(differences["metric"] == metric) & (differences["method"] == name)]
            row = pooled[(pooled["metric"] == metric) & (pooled["method"] == name)].iloc[0]
            panel.hlines(position, row["new_low"], row["new_high"], color=colour, linewidth=1)
            panel.hlines(position, row["low"], row["high"], color=colour, linewidth=4)
            panel.plot(row["mean"], position, "D", color=colour, markeredgecolor="white")
            places = [position - 0.25] * len(cases)  # beside the interval, which would hide them
            panel.plot(cases["difference"], places, ".", color="#777777", markersize=5)
            _note(panel, position, f"{row['cases']:.0f}")
        panel.set(title=METRICS[metric], xlabel="IoU minus uniform")
        panel.xaxis.set_major_locator(MaxNLocator(4))
    axes[0, 0].set_yticks(range(len(order)), [method_title(name) for name in order])
    figure.suptitle(
        "What a sampler brings over scenes and backbones: mean (thick: 95 % interval), "
        "a new case (thin), cases (grey; on the right: how many)"
    )
    return figure


def score_agreement(table: pd.DataFrame) -> Figure:
    """Draw what networks have in common, a panel per case.

    The table is the result of `study.comparison.cases.stability`.
    """
    shown = {
        "within": "p agrees between two networks,\nwithin a number missing",
        "rank_others": "the score orders the IoU\nthat other networks lost",
        "within_others": "the same, within\na number missing",
    }

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        bars = rows.set_index("score")[[*shown]].rename(index=SCORES, columns=shown).T
        bars.plot.barh(ax=axes, width=0.8, color=[*PALETTE[: len(rows)]], legend=False)
        axes.minorticks_off()  # which pandas switched on
        axes.set(xlim=(-0.5, 1), ylim=(len(shown) - 0.5, -0.5), xlabel="correlation")
        axes.axvline(0, color="#333333", linewidth=1)

    title = "How much of a score do two networks have in common?"
    return _panels(table, draw, title, width=3.4, height=2.6, sharey=True, legend=True)


def sensor_bars(table: pd.DataFrame) -> Figure:
    """Draw what each sensor is worth in IoU, with 95 % intervals, a panel per case.

    The table is that of `study.comparison.cases.worth_of_sensors`.
    """

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        ends = rows["value"] - rows["low"], rows["high"] - rows["value"]
        axes.barh(rows["modality"], rows["value"], xerr=ends, color=PALETTE[4], ecolor="#333333")
        axes.invert_yaxis()
        axes.axvline(0, color="#333333", linewidth=1)
        axes.set_xlabel("Shapley value, IoU")
        axes.xaxis.set_major_locator(MaxNLocator(4))

    return _panels(table, draw, "What each sensor is worth", width=3, height=2.4, sharex=True)


def score_heatmaps(scores: pd.DataFrame, names: Sequence[str]) -> Figure:
    """Draw the IoU of uniform sampling per scenario, and below it what each method adds to it.

    Without a uniform arm, the IoU itself is drawn. More than 15 scenarios carry no numbers.

    Args:
        scores: The columns dataset, backbone, method, scenario and iou; methods of a data set and
            backbone are compared on the same replicates.
        names: Names of the scenarios, in their order.
    """
    readable = len(names) <= 15

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        table = rows.pivot_table(index="method", columns="scenario", values="iou", sort=False)
        table = table.reindex(columns=list(names))
        arms = [name for name in UNIFORM_ARMS if name in table.index]
        base = table.loc[arms].mean() if arms else 0 * table.iloc[0]
        shown = table.drop(index=arms[:1]) - base if arms else table
        shown.loc[shown.index.isin(arms)] *= 2  # from the first arm, not from the mean of both
        text = shown.map("{:+.3f}".format if arms else "{:.2f}".format)
        if arms:
            shown.loc["uniform, IoU"] = 0.0  # white: its numbers are of another kind
            text.loc["uniform, IoU"] = base.map("{:.2f}".format)
            order = ["uniform, IoU", *shown.index[:-1]]
            shown, text = shown.loc[order], text.loc[order]
        # Networks before fine-tuning can lie so far below that methods would all look alike.
        others = shown.drop(index="pretrained", errors="ignore") if arms else shown
        largest = float(np.nanmax(np.abs(others)) or np.nanmax(np.abs(shown)))
        low, map_name = (-largest, "RdBu") if arms else (0.0, "viridis")
        sns.heatmap(
            shown.rename(index=method_title), ax=axes, cmap=map_name, vmin=low, vmax=largest,
            annot=text.to_numpy() if readable else False, fmt="", annot_kws={"fontsize": 8},
            cbar_kws={"label": "IoU minus uniform" if arms else "IoU"}, xticklabels=readable,
        )  # fmt: skip
        axes.set(xlabel="" if readable else "scenarios, from one modality to all", ylabel="")
        plt.setp(axes.get_xticklabels(), rotation=40, ha="right", rotation_mode="anchor")

    height = 1.6 + 0.27 * (scores["method"].nunique() + 1)
    title = "What each method adds to uniform sampling, by scenario"
    return _panels(scores, draw, title, width=5.6, height=height, columns=2)


def method_curves(histories: pd.DataFrame) -> Figure:
    """Draw the validation IoU per epoch of fine-tuning, a line per method: means over folds, seeds.

    Histories have the columns dataset, backbone, method, epoch and validation_mean_iou.
    """
    looks = _looks(histories)

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        for method, lines in rows.groupby("method", sort=False):
            curve = lines.groupby("epoch")["validation_mean_iou"].mean()
            axes.plot(curve.index + 1, curve, **looks[str(method)])
        axes.set(xlabel="epochs of fine-tuning", ylabel="validation IoU, mean over scenarios")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))

    height = max(3.2, 0.18 * _legend_lines(histories))
    title = "What fine-tuning learns, by method: means over folds and seeds"
    return _panels(histories, draw, title, width=4, height=height, legend=True)


def worst_against_mean(summary: pd.DataFrame) -> Figure:
    """Draw what each method adds to uniform sampling: in the worst scenario, and in the mean.

    A point is the mean over replicates of the paired differences, and its bars are their standard
    errors; uniform is the mean of its arms, and the second arm is compared with the first. A line
    joins the settings of a method: its front.

    Args:
        summary: The columns dataset, backbone, method, seed, mean_iou and worst_iou.
    """
    columns = ["mean_iou", "worst_iou"]
    arms = summary[summary["method"].isin(UNIFORM_ARMS)]
    keys = ["dataset", "backbone", "seed"]
    base = arms.groupby(keys)[columns].mean()
    table = summary[~summary["method"].isin(["pretrained", *UNIFORM_ARMS[:1]])]
    paired = table.merge(base, on=keys, suffixes=("", "_of_uniform"))
    for column in columns:
        paired[column] -= paired[f"{column}_of_uniform"]
    # The second arm is shown from the first, not from the mean of both, half as far away.
    paired.loc[paired["method"] == UNIFORM_ARMS[1], columns] *= 2
    looks = _looks(paired)

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        settings = rows.groupby("method", sort=False)[columns].mean()
        for name, front in settings.groupby(lambda method: method.partition("@")[0]):
            front = front.sort_values("mean_iou")  # the settings of one method, by a line
            axes.plot(front["mean_iou"], front["worst_iou"], color=method_colour(str(name)), lw=0.8)
        for method, own in rows.groupby("method", sort=False):
            means, errors = own[columns].mean(), own[columns].sem().fillna(0)
            axes.errorbar(
                means["mean_iou"], means["worst_iou"], errors["worst_iou"], errors["mean_iou"],
                linestyle="", elinewidth=1, **looks[str(method)],
            )  # fmt: skip
        axes.axvline(0, color="#333333", linewidth=1, zorder=0)
        axes.axhline(0, color="#333333", linewidth=1, zorder=0)
        axes.set(xlabel="mean over scenarios, IoU", ylabel="worst scenario, IoU")
        axes.margins(0.12)
        axes.xaxis.set_major_locator(MaxNLocator(4))

    height = max(3.6, 0.2 * _legend_lines(paired))
    title = "What each method adds to uniform sampling"
    title += ", ± one standard error over replicates" if len(paired["seed"].unique()) > 1 else ""
    return _panels(paired, draw, title, width=4, height=height, legend=True)


def distortion_against_loss(table: pd.DataFrame) -> Figure:
    """Draw what each scenario costs against its distortion, a point per scenario and network.

    The rank correlations are Spearman's, as means over networks.

    Args:
        table: The columns dataset, backbone, fold, network, scenario, missing, distortion, and lost
            (before fine-tuning, the IoU with all modalities minus that of the scenario).
    """
    shades = sns.color_palette("crest", int(table["missing"].max()) + 1)

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        rows = rows[rows["missing"] > 0]
        for _, points in rows.groupby(["fold", "missing"]):
            fold, missing = (int(points[name].iloc[0]) for name in ("fold", "missing"))
            label, marker = f"{missing} missing, fold {fold}", MARKERS[fold % len(MARKERS)]
            x, y = points["distortion"], points["lost"]
            axes.scatter(x, y, color=shades[missing], marker=marker, label=label)
        axes.set(xlabel="distortion D", ylabel="IoU lost against all modalities")
        axes.axhline(0, color="#333333", linewidth=1, zorder=0)
        ranks = [rank_correlation(rows, column) for column in ("distortion", "missing")]
        label = f"rank correlation {ranks[0]:+.2f}"
        if np.isfinite(ranks[1]):  # with two sensors, all scenarios miss as many
            label += f", of counting {ranks[1]:+.2f}"
        axes.text(0, 1, label, transform=axes.transAxes, fontsize="small", va="bottom")

    title = "Does D order the scenarios as the loss does, better than counting?"
    return _panels(table, draw, title, width=4, height=3.5, legend=True)


def _note(axes: Axes, position: int, text: str) -> None:
    """Write a small text on the right of a row."""
    axes.text(
        1.02, position, text, fontsize=8, color="#666666", va="center",
        transform=axes.get_yaxis_transform(),
    )  # fmt: skip


def _legend_lines(table: pd.DataFrame) -> int:
    return sum(1 + ("@" in method) for method in table["method"].unique())


def _looks(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Return the colour, title and marker of every method, alike in all panels.

    Markers are those of the methods' places in their families; a setting takes the next free one.
    """
    looks: dict[str, dict[str, Any]] = {}
    taken: dict[tuple[str, ...], set[str]] = {}
    for method in sorted(table["method"].unique(), key=lambda method: "@" in method):
        members, name = family_members(method), method.partition("@")[0]
        place = members.index(name) if members else -1
        markers = [*MARKERS[place % len(MARKERS) :], *MARKERS]
        used = taken.setdefault(tuple(members), set())
        marker = next((other for other in markers if other not in used), markers[0])
        used.add(marker)
        title = method_title(method)
        looks[method] = {
            "color": method_colour(method),
            # Settings stand on a line of their own: the legend would be wider than the panel.
            "label": title.replace(", ", "\n   ", 1) if "@" in method else title,
            "marker": marker,
        }
    return looks


def _panels(
    table: pd.DataFrame,
    draw: Callable[[Axes, pd.DataFrame], None],
    title: str,
    width: float,
    height: float,
    columns: int = 3,
    sharex: bool = False,
    sharey: bool = False,
    legend: bool = False,
) -> Figure:
    """Draw a panel of `width` × `height` inches per data set and backbone, `columns` in a row.

    The legend, on the right, is that of the panel with most entries.
    """
    groups = [*table.groupby(["dataset", "backbone"], sort=False)]
    columns = min(columns, len(groups))
    rows = -(-len(groups) // columns)
    size = max(7, width * columns + 1), height * rows + 0.6
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=sharey)
    if sharex:
        for panel in axes.flat[1:]:  # all with the numbers of their axis, also above an empty place
            panel.sharex(axes.flat[0])
    for panel in axes.flat[len(groups) :]:
        panel.axis("off")
    for panel, ((dataset, backbone), group) in zip(axes.flat, groups, strict=False):
        draw(panel, group)
        panel.set_title(f"{dataset}, {backbone_title(str(backbone))}", pad=16)
    figure.suptitle(title)
    if legend:
        entries = [panel.get_legend_handles_labels() for panel in figure.axes]
        longest = max(entries, key=lambda entry: len(entry[0]))
        figure.legend(*longest, loc="outside right center", fontsize="small")
    return figure
