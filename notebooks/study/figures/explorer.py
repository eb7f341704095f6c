"""Figures with controls, for JupyterLab; everywhere else the same figures stand still.

Nothing here computes anything: stored distortions and predictions are drawn anew by the functions
that draw them in the study.
"""

from __future__ import annotations

import html
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from lsgs_core.distributions import deployment_prior
from lsgs_core.errors import InputError
from lsgs_core.methods import Evidence
from lsgs_core.probabilities import rbf_kernel, scenario_descriptors, scenario_probabilities
from lsgs_core.scoring_file import read_evidence
from study.figures import method_title
from study.figures.prediction_maps import prediction_view
from study.figures.predictions import Predictions, load_predictions
from study.figures.scoring import probability_steps
from study.sensitivity import smoothing_report

WIDE: dict[str, Any] = {
    "style": {"description_width": "12em"},
    "layout": widgets.Layout(width="25em"),
}


@dataclass(frozen=True)
class View:
    """A figure and what can be changed about it.

    Attributes:
        draw: Makes the figure from the values of the controls, by their names.
        controls: Widgets by name.
    """

    draw: Callable[..., Figure]
    controls: Mapping[str, widgets.ValueWidget]


def is_live() -> bool:
    """Whether a person looks on: in a kernel that a Jupyter server started for a notebook."""
    return "JPY_SESSION_NAME" in os.environ


def explore(views: Mapping[str, View], live: bool) -> widgets.Widget | None:
    """Show the first of some views, with controls and a choice of the others where it is live.

    Args:
        views: By title.
        live: Whether a person looks on.

    Returns:
        What is shown when live. Otherwise None: the figure is left open, as notebooks show it.
    """
    titles = list(views)
    if not titles:
        print("nothing to show: no such file was written, and none is committed")
        return None
    if not live:
        first = views[titles[0]]
        print("shown:", titles[0])
        first.draw(**{name: control.value for name, control in first.controls.items()})
        return None
    panels = {titles[0]: _panel(views[titles[0]])}
    shown = widgets.VBox([panels[titles[0]]])

    def choose(change: Any) -> None:
        if change.new not in panels:
            panels[change.new] = _panel(views[change.new])
        shown.children = [panels[change.new]]

    longest = f"{14 + max(map(len, titles)) * 0.6:.0f}em"
    choice = widgets.Dropdown(
        options=titles, description="shown", style=WIDE["style"], layout={"width": longest}
    )
    choice.observe(choose, "value")
    return widgets.VBox([choice, shown] if len(views) > 1 else [shown])


def show_probabilities(
    own: Sequence[Path], committed: Sequence[Path], live: bool | None = None
) -> widgets.Widget | None:
    """Explore how p follows from stored distortions: every setting of the method is a control.

    Args:
        own: `probabilities.json` of this run, as far as they are there.
        committed: Further ones, offered where a person looks on.
        live: None asks `is_live`.

    Raises:
        InputError: A file is no scoring.
    """
    return _show(own, committed, lambda path: probability_view(read_evidence(path)), live)


def show_predictions(
    own: Sequence[Path], committed: Sequence[Path], live: bool | None = None
) -> widgets.Widget | None:
    """Explore predictions: choose patch, network and method, and switch sensors off.

    Args:
        own: `predictions_<data set>.npz` of this run, as in `show_probabilities`.
        committed: Further ones.
        live: As in `show_probabilities`.

    Raises:
        InputError: A file holds no predictions.
    """
    return _show(own, committed, lambda path: patch_view(load_predictions(path)), live)


def probability_view(evidence: Evidence) -> View:
    """The kernel, the smoothing and p, over all settings of the method and the failure rates.

    Args:
        evidence: With distortions.
    """
    distortion = evidence.required("distortion")
    scenarios, given = evidence.scenarios, evidence.settings
    rows = scenario_descriptors(
        evidence.descriptor, scenarios.masks, distortion, evidence.latent_shift
    )
    _, median = rbf_kernel(rows, "median")
    rates = {f"fails:{name}": name for name in scenarios.modalities}

    def draw(**values: Any) -> Figure:
        settings = {
            "direction": values["direction"],
            "inverse_temperature": values["inverse_temperature"],
            "mixing": values["mixing"],
            "ridge": values["ridge"],
            "lengthscale": values["lengthscale"] * median,
            "smooth": values["smooth"],
            "prior": deployment_prior(scenarios, [values[name] for name in rates]),
            "descriptors": rows,
        }
        figure = probability_steps(scenario_probabilities(distortion, **settings), scenarios.names)
        report = smoothing_report(distortion, settings)
        figure.suptitle(
            f"total variation of p to the prior {report['total_variation_from_prior']:.3f}, "
            f"to unsmoothed p {report['total_variation_from_unsmoothed']:.4f}; "
            f"effective number of scenarios {report['effective_scenarios']:.2f}"
        )
        return figure

    used = given.get("lengthscale", "median")
    multiple = 0.0 if used == "median" else np.log10(float(used) / median)
    ridge = float(given.get("ridge", 1e-3))
    controls: dict[str, widgets.ValueWidget] = {
        "inverse_temperature": _slider(
            evidence.inverse_temperature,
            0,
            max(4.0, evidence.inverse_temperature),
            "inverse temperature τ",
        ),
        "mixing": _slider(evidence.mixing, 0, 1, "mixing γ"),
        "ridge": _logarithmic(ridge, -6, 2, "ridge λ"),
        "lengthscale": _logarithmic(10**multiple, -2, 2, "σ / median distance"),
        "direction": widgets.Dropdown(
            options={"more where D is high": 1.0, "more where D is low": -1.0},
            value=float(np.sign(given.get("direction", 1.0))),
            description="direction",
            **WIDE,
        ),
        "smooth": widgets.Checkbox(
            value=bool(given.get("smooth", True)),
            description="smooth with the kernel",
            indent=False,
        ),
    }
    for position, (name, modality) in enumerate(rates.items()):
        rate = _failure_rate(evidence, position)
        controls[name] = _slider(rate, 0, 1, f"failure rate of {modality}")
    return View(draw, controls)


def patch_view(predictions: Predictions) -> View:
    """One patch under one scenario, with a check box per sensor."""
    names = [name.split("/", 1) for name in predictions.maps]
    backbones = list(dict.fromkeys(backbone for backbone, _ in names))
    methods = list(dict.fromkeys(method for _, method in names))
    sensors = {f"has:{name}": name for name in predictions.modalities}

    def draw(patch: int, backbone: str, method: str, **values: bool) -> Figure:
        available = [values[name] for name in sensors]
        return prediction_view(predictions, patch, backbone, method, available)

    patches = [(f"{i + 1} (id {n})", i) for i, n in enumerate(predictions.patch_ids.tolist())]
    controls: dict[str, widgets.ValueWidget] = {
        "patch": widgets.Dropdown(options=patches, description="patch", **WIDE),
        "backbone": widgets.Dropdown(options=backbones, description="backbone", **WIDE),
        "method": widgets.Dropdown(
            options=[(method_title(name), name) for name in methods],
            value=methods[-1],
            description="method",
            **WIDE,
        ),
    }
    for name, modality in sensors.items():
        controls[name] = widgets.Checkbox(
            value=True, description=f"{modality} is there", indent=False
        )
    return View(draw, controls)


def _panel(view: View) -> widgets.Widget:
    """Controls in columns of three above the figure, which is drawn anew at every change."""
    picture = widgets.Image(format="png", layout={"max_width": "100%", "align_self": "flex-start"})
    message = widgets.HTML()
    box = widgets.VBox([message, picture])

    def redraw(_: Any = None) -> None:
        try:
            figure = view.draw(**{name: control.value for name, control in view.controls.items()})
        except InputError as error:
            message.value = f"<b>{html.escape(str(error))}</b>"
            return
        message.value, file = "", io.BytesIO()
        figure.savefig(file, format="png", dpi=100)
        plt.close(figure)
        picture.value = file.getvalue()

    for control in view.controls.values():
        control.observe(redraw, "value")
    redraw()
    listed = list(view.controls.values())
    columns = [widgets.VBox(listed[start : start + 3]) for start in range(0, len(listed), 3)]
    layout = widgets.Layout(flex_flow="row wrap")
    return widgets.VBox([widgets.HBox(columns, layout=layout), box])


def _show(
    own: Sequence[Path],
    committed: Sequence[Path],
    view: Callable[[Path], View],
    live: bool | None,
) -> widgets.Widget | None:
    looked_on = is_live() if live is None else live
    # What stands still is part of a run's record, so other runs have no place in it.
    paths = [path for path in [*own, *(committed if looked_on else [])] if path.is_file()]
    return explore({path.as_posix().replace("../", ""): view(path) for path in paths}, looked_on)


def _failure_rate(evidence: Evidence, modality: int) -> float:
    """The rate of one modality that gives the prior of a scoring; one half is uniform."""
    scenarios = evidence.scenarios
    others = np.arange(len(scenarios.modalities)) != modality
    without = float(evidence.base[scenarios.index(others)])
    both = without + float(evidence.base[scenarios.full])
    return without / both if both else 0.5


def _slider(
    value: float,
    low: float,
    high: float,
    title: str,
    kind: type[widgets.ValueWidget] = widgets.FloatSlider,
    step: float = 0.05,
    readout_format: str = ".2f",
) -> widgets.ValueWidget:
    return kind(
        value=value,
        min=low,  # callers see to it that the value lies between: a slider would move it silently
        max=high,
        step=step,
        description=title,
        readout_format=readout_format,
        continuous_update=False,
        **WIDE,
    )


def _logarithmic(value: float, low: float, high: float, title: str) -> widgets.ValueWidget:
    power = float(np.log10(value))
    low, high = min(low, power), max(high, power)
    return _slider(value, low, high, title, widgets.FloatLogSlider, 0.1, ".3g")
