"""Figures with controls in JupyterLab; everywhere else a static version is shown.

Nothing is computed but p: stored distortions and predictions are drawn again by the functions that
draw them in the study.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
from IPython.display import display
from matplotlib.figure import Figure

from lsgs_core.distributions import deployment_prior
from lsgs_core.errors import InputError
from lsgs_core.methods import Evidence
from lsgs_core.probabilities import rbf_kernel, scenario_descriptors, scenario_probabilities
from lsgs_core.scoring_file import read_evidence
from lsgs_core.uncertainty import smoothing_report
from study.comparison.predictions import Predictions, load_predictions
from study.figures import backbone_title
from study.figures.maps import prediction_view
from study.figures.scoring import SETTING_TITLES, probability_steps
from study.metrics.statistics import method_title

STYLE = {"description_width": "12em"}
WIDE: dict[str, Any] = {"style": STYLE, "layout": widgets.Layout(width="27em")}


@dataclass(frozen=True)
class View:
    """A figure and its controls."""

    draw: Callable[..., Figure]  # for values of the controls, which are passed by name
    controls: dict[str, widgets.ValueWidget]  # by name
    static: Mapping[str, Any] = field(default_factory=dict)  # values where there are no controls

    def values(self) -> dict[str, Any]:
        """Return the values of the controls, by name."""
        return {name: control.value for name, control in self.controls.items()}

    def panel(self) -> widgets.Widget:
        """Return the controls, in columns of three, above the figure."""

        def draw(**values: Any) -> None:
            try:
                self.draw(**values)
            except InputError as error:
                print(error)

        controls = list(self.controls.values())
        columns = [widgets.VBox(controls[i : i + 3]) for i in range(0, len(controls), 3)]
        rows = widgets.HBox(columns, layout=widgets.Layout(flex_flow="row wrap"))
        return widgets.VBox([rows, widgets.interactive_output(draw, self.controls)])


def show_probabilities(own: Sequence[Path], committed: Sequence[Path]) -> widgets.Widget | None:
    """Explore how p follows from stored distortions, with a control for every setting.

    Args:
        own: Files `probabilities.json` of this run; files that do not exist are skipped.
        committed: Further ones, which only an interactive session offers.

    Returns:
        The widget, or None if the figure is static or there is no file. A file that is no scoring
        raises `InputError`.
    """
    return _show(own, committed, lambda path: probability_view(read_evidence(path)))


def show_predictions(own: Sequence[Path], committed: Sequence[Path]) -> widgets.Widget | None:
    """Explore files `predictions_<data set>.npz`, as `show_probabilities` explores scorings."""
    return _show(own, committed, lambda path: prediction_explorer(load_predictions(path)))


def probability_view(evidence: Evidence) -> View:
    """Return a view of kernel, smoothing and p, with the settings and failure rates as controls.

    A scoring without distortions raises `InputError`.
    """
    distortion = evidence.required("distortion")
    scenarios, settings = evidence.scenarios, evidence.settings
    descriptors = scenario_descriptors(
        evidence.descriptor, scenarios.masks, distortion, evidence.latent_shift
    )
    _, median = rbf_kernel(descriptors, "median")
    rates = [f"fails:{name}" for name in scenarios.modalities]

    def draw(lengthscale: float, **values: Any) -> Figure:
        prior = deployment_prior(scenarios, [values.pop(name) for name in rates])
        used = {**values, "lengthscale": lengthscale * median, "prior": prior}
        used["descriptors"] = descriptors
        figure = probability_steps(scenario_probabilities(distortion, **used), scenarios.names)
        report = smoothing_report(distortion, used)
        figure.suptitle(
            f"total variation of p to the prior {report['total_variation_from_prior']:.3f}, "
            f"to unsmoothed p {report['total_variation_from_unsmoothed']:.4f}; "
            f"effective number of scenarios {report['effective_scenarios']:.2f}"
        )
        return figure

    lengthscale, tau = settings.get("lengthscale", "median"), evidence.inverse_temperature
    multiple = 1.0 if lengthscale == "median" else float(lengthscale) / median
    titles = SETTING_TITLES
    controls: dict[str, widgets.ValueWidget] = {
        "inverse_temperature": _slider(tau, max(4.0, tau), titles["inverse_temperature"]),
        "mixing": _slider(evidence.mixing, 1, titles["mixing"]),
        "ridge": _log_slider(float(settings.get("ridge", 1e-3)), -6, titles["ridge"]),
        "lengthscale": _log_slider(multiple, -2, "σ / median distance"),
        "direction": _choice(
            "direction",
            {"more where D is high": 1.0, "more where D is low": -1.0},
            float(np.sign(settings.get("direction", 1.0))),
        ),
        "smooth": _check_box(settings.get("smooth", True), "smooth with the kernel"),
    }
    for index, name in enumerate(rates):
        title = f"failure rate of {scenarios.modalities[index]}"
        controls[name] = _slider(_failure_rate(evidence, index), 1, title)
    return View(draw, controls)


def prediction_explorer(predictions: Predictions) -> View:
    """Return a view of one patch under one scenario, with a check box per modality."""
    networks = [name.split("/", 1) for name in predictions.maps]
    backbones = list(dict.fromkeys(backbone for backbone, _ in networks))
    methods = list(dict.fromkeys(method for _, method in networks))
    patches = [(f"{i + 1} (id {n})", i) for i, n in enumerate(predictions.patch_ids.tolist())]
    titles = [(method_title(name), name) for name in methods]
    boxes = {f"has:{name}": _check_box(True, f"{name} is there") for name in predictions.modalities}

    def draw(patch: int, backbone: str, method: str, **values: bool) -> Figure:
        available = [values[name] for name in boxes]
        return prediction_view(predictions, patch, backbone, method, available)

    controls: dict[str, widgets.ValueWidget] = {
        "patch": _choice("patch", patches, 0),
        "backbone": _choice("backbone", [(backbone_title(b), b) for b in backbones], backbones[0]),
        "method": _choice("method", titles, methods[-1]),
    }
    return View(draw, controls | boxes, {next(iter(boxes)): False})


def _show(
    own: Sequence[Path], committed: Sequence[Path], view: Callable[[Path], View]
) -> widgets.Widget | None:
    live = "JPY_SESSION_NAME" in os.environ  # an interactive Jupyter session
    # A static figure is part of the record of a run, so it never shows the results of others.
    marks = dict.fromkeys(own, "") | (dict.fromkeys(committed, ", committed") if live else {})
    views = {_title(path) + mark: view(path) for path, mark in marks.items() if path.is_file()}
    titles = list(views)
    if not titles:
        print("nothing to show: no such file was written, and none is committed")
        return None
    if not live:
        print("shown:", titles[0])
        views[titles[0]].draw(**{**views[titles[0]].values(), **views[titles[0]].static})
        return None

    @cache
    def panel(title: str) -> widgets.Widget:
        return views[title].panel()

    width = f"{18 + max(map(len, titles)) * 0.6:.0f}em"
    layout = {"width": width}
    choice = widgets.Dropdown(options=titles, description="shown", style=STYLE, layout=layout)
    shown = widgets.interactive_output(lambda title: display(panel(title)), {"title": choice})
    return widgets.VBox([choice, shown])


def _title(path: Path) -> str:
    """Return what a scoring or predictions are of, such as "demo, CBC, fold 0", from the path."""
    if path.suffix == ".npz":
        return path.stem.removeprefix("predictions_")
    dataset, backbone, fold, seed = path.resolve().parts[-5:-1]
    network = "" if seed == "seed0" else f", network {seed.removeprefix('seed')}"
    return f"{dataset}, {backbone_title(backbone)}, fold {fold.removeprefix('fold')}{network}"


def _failure_rate(evidence: Evidence, modality: int) -> float:
    """Return the failure rate of a modality that the prior implies; a uniform prior gives 0.5."""
    scenarios = evidence.scenarios
    others = np.arange(len(scenarios.modalities)) != modality
    without = float(evidence.base[scenarios.index(others)])
    both = without + float(evidence.base[scenarios.full])
    return without / both if both else 0.5


def _choice(title: str, options: Any, value: Any) -> widgets.ValueWidget:
    return widgets.Dropdown(options=options, value=value, description=title, **WIDE)


def _slider(value: float, high: float, title: str) -> widgets.ValueWidget:
    """Return a slider from 0 to `high`, which must be at least the value."""
    return widgets.FloatSlider(
        value=value, max=high, step=0.05, description=title, continuous_update=False, **WIDE
    )


def _log_slider(value: float, low: float, title: str) -> widgets.ValueWidget:
    """Return a slider over the powers of 10 from `low` to 2, extended so as to hold the value."""
    power = float(np.log10(value))
    limits = {"min": min(low, power), "max": max(2, power), "step": 0.1, "readout_format": ".3g"}
    return widgets.FloatLogSlider(
        value=value, description=title, continuous_update=False, **limits, **WIDE
    )


def _check_box(value: bool, title: str) -> widgets.ValueWidget:
    return widgets.Checkbox(value=value, description=title, indent=False)
