"""The methods of the study by name: how scenarios are drawn, and which weights are trained.

A new method is one function here, which turns the scoring of a pretrained network into a sampler.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from typing import Any

import numpy as np

from lsgs_core import adaptive, distributions
from lsgs_core.errors import (
    Floats,
    InputError,
    check_choice,
    check_count,
    check_number,
    check_type,
    real_numbers,
)
from lsgs_core.probabilities import rbf_kernel, scenario_descriptors, scenario_probabilities
from lsgs_core.randomness import STREAMS
from lsgs_core.sampling import FixedSampler, ScenarioSampler, check_probabilities
from lsgs_core.scenarios import ScenarioSet

SETTINGS = ("direction", "lengthscale", "ridge", "inverse_temperature", "mixing", "smooth")


@dataclass(frozen=True)
class Evidence:
    """What a method can build its sampler from.

    Attributes:
        scenarios: K scenarios.
        probabilities: p of LSGS from the scoring, [K].
        distortion: D, [K]; None where the authors' scoring file does not contain it.
        latent_shift: Mean shift of the latent per channel, [K, C]; None as above.
        prior: Probability of each scenario in deployment, [K]; None is the paper's uniform prior.
        settings: Settings of the scoring, by the names in `SETTINGS`.
        descriptor: What the kernel compared; see `scenario_descriptors`.
        seed: Random seed of the run, for methods that draw their distribution.
        epochs: Number of epochs of the run, for methods that anneal.
        steps: Number of optimiser steps of the whole run, for group DRO.
        measure: Scores the network in training and returns p, [K], for methods that measure again.
        prediction_distortion: D measured at the prediction instead of the latent, [K]; None where
            it was not measured (`lsgs_core.models.adapter.PredictionModel`).
    """

    scenarios: ScenarioSet
    probabilities: Floats
    distortion: Floats | None = None
    latent_shift: Floats | None = None
    prior: Floats | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    descriptor: str = "distortion"
    seed: int = 0
    epochs: int | None = None
    steps: int | None = None
    measure: Callable[[], Floats] | None = None
    prediction_distortion: Floats | None = None

    def __post_init__(self) -> None:
        check_type("scenarios", self.scenarios, ScenarioSet)
        count = len(self.scenarios)
        check_probabilities(self.probabilities, count)
        if self.prior is not None:
            check_probabilities(self.prior, count, "prior")
        for name in ("distortion", "prediction_distortion", "latent_shift"):
            if getattr(self, name) is not None:
                shape = [count, None] if name == "latent_shift" else [count]
                real_numbers(name, getattr(self, name), shape)
        check_type("settings", self.settings, Mapping)
        for name, value in self.settings.items():
            check_choice("settings", name, SETTINGS)
            if name == "smooth":
                check_type("settings.smooth", value, bool)
            elif name != "lengthscale" or not isinstance(value, str) or value != "median":
                check_number(f"settings.{name}", value, lambda x: True, "a number")
        check_type("descriptor", self.descriptor, str)
        for name in ("seed", "epochs", "steps"):
            if name == "seed" or getattr(self, name) is not None:
                check_count(name, getattr(self, name), int(name == "steps"), 2**64 - 1)
        check_type("measure", self.measure, Callable, type(None))

    def required(self, name: str) -> Any:
        """Return an attribute that a method needs; raise `InputError` where it is None."""
        check_choice("name", name, vars(self))
        value = getattr(self, name)
        if value is None:
            expected = "a value from the scoring or the run, which this method needs"
            raise InputError(f"evidence.{name}: expected {expected}, found None")
        return value

    @property
    def base(self) -> Floats:
        """The prior, which is uniform where it is None, [K]."""
        count = len(self.scenarios)
        return np.full(count, 1 / count) if self.prior is None else self.prior

    @property
    def inverse_temperature(self) -> float:
        """The scoring's tau; the paper's 0.5 where it is unknown."""
        return float(self.settings.get("inverse_temperature", 0.5))

    @property
    def mixing(self) -> float:
        """The scoring's gamma; the paper's 0.5 where it is unknown."""
        return float(self.settings.get("mixing", 0.5))

    def scored(
        self, descriptor: str = "", measured: str = "distortion", **changes: Any
    ) -> FixedSampler:
        """Return LSGS with other settings than those of the scoring, or from another score.

        The measured score is "distortion" or "prediction_distortion". A descriptor of "", and
        changes of None to arguments of `scenario_probabilities`, are those of the scoring.
        """
        distortion, kind = self.required(measured), descriptor or self.descriptor
        rows = scenario_descriptors(kind, self.scenarios.masks, distortion, self.latent_shift)
        settings: dict[str, Any] = {"prior": self.prior, **self.settings}
        settings |= {name: value for name, value in changes.items() if value is not None}
        result = scenario_probabilities(distortion, descriptors=rows, **settings)
        return FixedSampler(result.probabilities)


def without_evidence(scenarios: ScenarioSet) -> Evidence:
    """Return the evidence before any scoring, for methods that need none."""
    check_type("scenarios", scenarios, ScenarioSet)
    return Evidence(scenarios, np.full(len(scenarios), 1 / len(scenarios)))


@dataclass(frozen=True)
class Method:
    """A method of fine-tuning; `lsgs_core.sampling` says why methods share their random numbers."""

    title: str  # in tables and figures
    about: str  # one line for the table of methods
    family: str  # its role in this study, one of `FAMILIES`; it decides the colour in figures
    sampler: Callable[[Evidence], ScenarioSampler]
    low_rank: bool = False  # True trains low-rank updates (LoRA) instead of all weights
    stream: str = "scenario"  # of the random numbers; only the second uniform arm has another
    rate: float = 1.0  # multiple of the usual learning rate


METHODS: dict[str, Method] = {}
FAMILIES = ("LSGS", "uniform", "successor", "control", "adaptive", "LoRA", "positive control")
# A scenario of this probability is drawn only where a sample can serve no other: a draw has 2^53
# possible numbers, of which 1e-16 is less than one.
NEVER = 1e-16


def method(
    title: str, family: str, low_rank: bool = False, stream: str = "scenario"
) -> Callable[..., Any]:
    """Return the decorator that enters a function into `METHODS` under its own name.

    Arguments are those of `Method`; the first line of the function's docstring is its `about`.
    """
    check_type("title", title, str)
    check_choice("family", family, FAMILIES)
    check_choice("stream", stream, STREAMS)

    def enter(build: Callable[[Evidence], ScenarioSampler]) -> Callable[..., ScenarioSampler]:
        about = (build.__doc__ or "").strip().partition("\n")[0]
        if not about:
            raise InputError(f"method {build.__name__}: expected a docstring, found none")
        METHODS[build.__name__] = Method(title, about, family, build, low_rank, stream)
        return build

    return enter


def find_method(name: str) -> Method:
    """Return the method of a name, such as "lsgs" or "group_dro@mixing=1@step=50".

    The settings that follow "@" are the keyword arguments of the method's function, non-negative
    numbers, and `rate`, which multiplies the learning rate.
    """
    check_type("method", name, str)
    own, *texts = name.split("@")
    check_choice("method", own, METHODS)
    chosen, settings = METHODS[own], dict[str, float]()
    _, *possible = signature(chosen.sampler).parameters
    for text in texts:
        setting, _, number = text.partition("=")
        check_choice(f"method {own}: setting", setting, [*possible, "rate"])
        # One way to write a number: two names of one method would be two runs.
        right = re.fullmatch(r"(0|[1-9][0-9]{0,8})(\.[0-9]{0,8}[1-9])?", number)
        if not right or setting in settings:
            raise InputError(f"method {own}: expected one number for {setting}, found {name!r}")
        settings[setting] = float(number)
    if not settings:
        return chosen
    title = ", ".join([chosen.title, *(f"{key} = {value:g}" for key, value in settings.items())])
    rate = settings.pop("rate", 1.0)
    expected = "a number from 0.001 to 1000"
    check_number(f"method {own}: rate", rate, lambda x: 1e-3 <= x <= 1e3, expected)
    return replace(chosen, title=title, sampler=partial(chosen.sampler, **settings), rate=rate)


@method("uniform", "uniform")
def uniform(evidence: Evidence) -> ScenarioSampler:
    """All scenarios equally often: fine-tuning with modality dropout, the paper's baseline."""
    return FixedSampler.uniform(len(evidence.scenarios))


@method("LSGS", "LSGS")
def lsgs(evidence: Evidence) -> ScenarioSampler:
    """The probabilities of the scoring (arXiv 2605.20372)."""
    return FixedSampler(evidence.probabilities)


@method("LoRA", "LoRA", low_rank=True)
def lora(evidence: Evidence) -> ScenarioSampler:
    """Uniform scenarios and low-rank updates: the paper's second baseline (Hu et al. 2021)."""
    return uniform(evidence)


@method("uniform, second arm", "uniform", stream="second_scenario")
def uniform_again(evidence: Evidence) -> ScenarioSampler:
    """Uniform with other random numbers: its difference from the first arm is noise."""
    return uniform(evidence)


@method("LSGS, no smoothing", "LSGS")
def lsgs_unsmoothed(evidence: Evidence) -> ScenarioSampler:
    """LSGS with r = U, without the contribution of the kernel."""
    return evidence.scored(smooth=False)


@method("LSGS, τ = 2, γ = 1", "LSGS")
def lsgs_strong(evidence: Evidence) -> ScenarioSampler:
    """LSGS without the paper's restraint: inverse temperature 2, no mixing with uniform."""
    return evidence.scored(inverse_temperature=2.0, mixing=1.0)


@method("LSGS on predictions", "LSGS")
def lsgs_prediction(
    evidence: Evidence, mixing: float | None = None, inverse_temperature: float | None = None
) -> ScenarioSampler:
    """LSGS from the distortion of the predictions, which networks have more in common."""
    return evidence.scored(
        measured="prediction_distortion", mixing=mixing, inverse_temperature=inverse_temperature
    )


@method("LSGS, latent shifts", "LSGS")
def lsgs_latent_shift(evidence: Evidence) -> ScenarioSampler:
    """LSGS whose kernel compares latent shifts at the median lengthscale, with a ridge of 1."""
    return evidence.scored("latent_shift", lengthscale="median", ridge=1.0)


@method("cardinality", "control")
def cardinality(evidence: Evidence) -> ScenarioSampler:
    """Depends on the number of missing modalities alone, fitted to LSGS: a control."""
    return FixedSampler(distributions.by_cardinality(evidence.scenarios, evidence.probabilities))


@method("permuted", "control")
def permuted(evidence: Evidence) -> ScenarioSampler:
    """LSGS's probabilities assigned to other scenarios at random, by the seed: a control."""
    p = distributions.permuted(evidence.scenarios, evidence.probabilities, evidence.seed, False)
    return FixedSampler(p)


@method("permuted within", "control")
def permuted_within(evidence: Evidence) -> ScenarioSampler:
    """As permuted, among scenarios with as many modalities: the decisive control."""
    p = distributions.permuted(evidence.scenarios, evidence.probabilities, evidence.seed, True)
    return FixedSampler(p)


@method("cardinality of predictions", "control")
def cardinality_prediction(
    evidence: Evidence, mixing: float | None = None, inverse_temperature: float | None = None
) -> ScenarioSampler:
    """As cardinality, fitted to LSGS on predictions: its control."""
    target = lsgs_prediction(evidence, mixing, inverse_temperature).probabilities(0)
    return FixedSampler(distributions.by_cardinality(evidence.scenarios, target))


@method("permuted predictions", "control")
def permuted_prediction(
    evidence: Evidence, mixing: float | None = None, inverse_temperature: float | None = None
) -> ScenarioSampler:
    """As permuted within, with the probabilities of LSGS on predictions: its decisive control."""
    target = lsgs_prediction(evidence, mixing, inverse_temperature).probabilities(0)
    return FixedSampler(distributions.permuted(evidence.scenarios, target, evidence.seed, True))


@method("coverage", "successor")
def coverage(evidence: Evidence) -> ScenarioSampler:
    """Coverage sampling: U is the distortion, K compares latent shifts at half the median distance.

    At the median distance itself, q is a single scenario.
    """
    shift = evidence.required("latent_shift")
    _, median = rbf_kernel(shift, "median")
    kernel, _ = rbf_kernel(shift, median / 2)
    distortion, mixing = evidence.required("distortion"), evidence.mixing
    return FixedSampler(distributions.coverage(distortion, kernel, mixing, evidence.prior))


@method("inverse", "control")
def inverse(evidence: Evidence) -> ScenarioSampler:
    """LSGS with alpha = -1: scenarios of low distortion are drawn more often."""
    return evidence.scored(direction=-1.0)


@method("inverse, τ = 2, γ = 1", "positive control")
def inverse_strong(evidence: Evidence) -> ScenarioSampler:
    """Scenarios of high distortion hardly ever: a positive control, which must do worse."""
    return evidence.scored(direction=-1.0, inverse_temperature=2.0, mixing=1.0)


@method("full only", "positive control")
def full_only(evidence: Evidence) -> ScenarioSampler:
    """All modalities that a patch has files of: a positive control, which must do worse."""
    weights = NEVER ** evidence.scenarios.missing.astype(np.float64)
    return FixedSampler(weights / weights.sum())


@method("specialist", "positive control")
def specialist(evidence: Evidence, scenario: float = 0) -> ScenarioSampler:
    """One scenario alone, by its position: a bound of what sampling can give this scenario."""
    weights = np.full(len(evidence.scenarios), NEVER)
    check_number("scenario", scenario, lambda k: k in range(len(weights)), "a position")
    weights[int(scenario)] = 1.0
    return FixedSampler(weights / weights.sum())


@method("Bernoulli", "uniform")
def bernoulli(evidence: Evidence) -> ScenarioSampler:
    """Each modality is kept with probability 0.8, until one is (Neverova et al. 2016)."""
    return FixedSampler(distributions.bernoulli(evidence.scenarios, 0.8))


@method("deployment prior", "uniform")
def deployment(evidence: Evidence) -> ScenarioSampler:
    """Scenarios as often as the failure rates of the sensors produce them."""
    return FixedSampler(evidence.base)


@method("Dirichlet", "control")
def dirichlet(evidence: Evidence) -> ScenarioSampler:
    """One draw of p for the whole run from a symmetric Dirichlet of concentration 5: a control."""
    return FixedSampler(distributions.dirichlet(len(evidence.scenarios), evidence.seed, 5.0))


@method("loss-proportional", "adaptive")
def loss_proportional(
    evidence: Evidence, mixing: float | None = None, inverse_temperature: float | None = None
) -> ScenarioSampler:
    """Observes the training loss: scenarios with a high running mean are drawn more often."""
    tau = evidence.inverse_temperature if inverse_temperature is None else inverse_temperature
    mixing = evidence.mixing if mixing is None else mixing
    return adaptive.LossProportional(evidence.base, tau, mixing)


@method("smoothed loss", "successor")
def smoothed_loss(
    evidence: Evidence, mixing: float = 0.35, inverse_temperature: float = 1.0, ridge: float = 0.3
) -> ScenarioSampler:
    """As loss-proportional, with the losses smoothed by a kernel over the scenarios' masks.

    The kernel compares availability masks at lengthscale 1: exp(-h / 2) with h the number of
    modalities in which two scenarios differ.
    """
    kernel, _ = rbf_kernel(evidence.scenarios.masks.astype(np.float64), 1.0)
    return adaptive.LossProportional(
        evidence.base, inverse_temperature, mixing, kernel=kernel, ridge=ridge
    )


@method("group DRO", "adaptive")
def group_dro(evidence: Evidence, step: float = 100.0, mixing: float = 0.9) -> ScenarioSampler:
    """Observes the training loss: exponentiated ascent on it (Sagawa et al. 2020).

    Their step size of 0.01 is for runs of ten thousand steps; the product of both is kept.
    """
    return adaptive.GroupDRO(evidence.base, step / evidence.required("steps"), mixing)


@method("kernel group DRO", "successor")
def kernel_group_dro(
    evidence: Evidence, step: float = 100.0, mixing: float = 0.5
) -> ScenarioSampler:
    """Group DRO on losses that the kernel regression of LSGS denoises, from the p of LSGS on.

    The kernel compares availability masks at their median distance.
    """
    kernel, _ = rbf_kernel(evidence.scenarios.masks.astype(np.float64), "median")
    start, step = evidence.probabilities, step / evidence.required("steps")
    return adaptive.KernelGroupDRO(evidence.base, start, kernel, step, mixing)


@method("Exp3.S", "adaptive")
def exp3s(evidence: Evidence) -> ScenarioSampler:
    """Observes how the training loss falls: a bandit on learning progress (Graves et al. 2017)."""
    return adaptive.Exp3S(evidence.base)


@method("curriculum", "adaptive")
def curriculum(evidence: Evidence) -> ScenarioSampler:
    """Scenarios of low distortion first, annealed to the prior (after Bengio et al. 2009)."""
    distortion, epochs = evidence.required("distortion"), evidence.required("epochs")
    return adaptive.Curriculum(distortion, evidence.base, epochs)


@method("online LSGS", "LSGS")
def online(evidence: Evidence) -> ScenarioSampler:
    """Observes the network: distortions are measured again in each epoch of fine-tuning."""
    return adaptive.Online(evidence.probabilities, evidence.required("measure"), every=1)


@method("LoRA + LSGS", "LoRA", low_rank=True)
def lora_lsgs(evidence: Evidence) -> ScenarioSampler:
    """Low-rank updates with the scenarios of LSGS."""
    return lsgs(evidence)
