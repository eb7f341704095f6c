"""The compared methods by name: what draws the scenarios, and what is trained.

Adding one takes one function here: from what is known of the pretrained network to a sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsgs_core import adaptive, distributions
from lsgs_core.errors import InputError
from lsgs_core.probabilities import rbf_kernel, scenario_descriptors, scenario_probabilities
from lsgs_core.sampling import FixedSampler, ScenarioSampler
from lsgs_core.scenarios import ScenarioSet


@dataclass(frozen=True)
class Evidence:
    """What a method may build its sampler from.

    Attributes:
        scenarios: Of K scenarios.
        probabilities: p of LSGS as it was scored, [K].
        distortion: D, [K]; None where a scoring file of the authors lacks it.
        latent_shift: Mean shift of the latent per channel, [K, C]; None as above.
        prior: Of the scenarios in deployment, [K]; uniform in the paper.
        settings: Those of the scoring: direction, lengthscale, ridge, inverse_temperature, mixing,
            smooth.
        descriptor: What its kernel compared, see `scenario_descriptors`.
        seed: Of the run, for methods that draw their distribution.
        epochs: That the run trains.
        steps: Of the optimiser in the whole run.
        measure: Scores the network as it is now and returns p, [K]; for methods that ask again.
    """

    scenarios: ScenarioSet
    probabilities: NDArray[np.float64]
    distortion: NDArray[np.float64] | None = None
    latent_shift: NDArray[np.float64] | None = None
    prior: NDArray[np.float64] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    descriptor: str = "distortion"
    seed: int = 0
    epochs: int = 1
    steps: int = 1
    measure: Callable[[], NDArray[np.float64]] | None = None

    def known(self, name: str) -> Any:
        """An attribute that a method cannot do without. Raises `InputError` where it is None."""
        value = getattr(self, name)
        if value is None:
            raise InputError(f"scoring: expected one with {name}, which this method needs")
        return value

    @property
    def base(self) -> NDArray[np.float64]:
        """The prior, or uniform, [K]."""
        count = len(self.scenarios)
        return np.full(count, 1 / count) if self.prior is None else self.prior

    @property
    def inverse_temperature(self) -> float:
        """The scoring's tau; 0.5 where it is not known."""
        return float(self.settings.get("inverse_temperature", 0.5))

    @property
    def mixing(self) -> float:
        """The scoring's gamma; 0.5 where it is not known."""
        return float(self.settings.get("mixing", 0.5))

    def scored(self, descriptor: str = "", **changes: Any) -> FixedSampler:
        """LSGS with other settings than those of the scoring, from the same distortions."""
        distortion = self.known("distortion")
        rows = scenario_descriptors(
            descriptor or self.descriptor, self.scenarios.masks, distortion, self.latent_shift
        )
        settings: dict[str, Any] = {"prior": self.prior, **self.settings, **changes}
        result = scenario_probabilities(distortion, descriptors=rows, **settings)
        return FixedSampler(result.probabilities)


def without_evidence(scenarios: ScenarioSet) -> Evidence:
    """What is known before anything was scored: for methods that ask for nothing."""
    return Evidence(scenarios, np.full(len(scenarios), 1 / len(scenarios)))


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        title: For tables and figures.
        about: One line, for the table of methods.
        family: What it is in this study; decides its colour.
        sampler: Builds what draws the scenarios.
        low_rank: Train low-rank updates (LoRA) instead of all weights.
        stream: Random numbers that scenarios are drawn with. All methods share them, so that their
            draws agree where their probabilities do, but for the second uniform arm.
    """

    title: str
    about: str
    family: str
    sampler: Callable[[Evidence], ScenarioSampler]
    low_rank: bool = False
    stream: str = "scenario"


METHODS: dict[str, Method] = {}
FAMILIES = ("LSGS", "uniform", "successor", "control", "adaptive", "LoRA", "positive control")
# So improbable that it is never drawn, unless nothing else can be: in the 2^53 numbers that a draw
# can take, 1e-16 is less than one.
NEVER = 1e-16


def method(
    title: str, family: str, low_rank: bool = False, stream: str = "scenario"
) -> Callable[..., Any]:
    """Enter a function into `METHODS` under its own name."""

    def enter(build: Callable[[Evidence], ScenarioSampler]) -> Callable[..., ScenarioSampler]:
        about = (build.__doc__ or "").strip().partition("\n")[0]
        if not about or family not in FAMILIES:
            raise TypeError(
                f"method {build.__name__}: expected a docstring, whose first line is shown, and a "
                f"family of {list(FAMILIES)}, found {family!r}"
            )
        METHODS[build.__name__] = Method(title, about, family, build, low_rank, stream)
        return build

    return enter


def find_method(name: str) -> Method:
    """The method of a name.

    Raises:
        InputError: There is none of that name; the message lists those there are.
    """
    if name not in METHODS:
        raise InputError(f"method: expected one of {sorted(METHODS)}, found {name!r}")
    return METHODS[name]


@method("uniform", "uniform")
def uniform(evidence: Evidence) -> ScenarioSampler:
    """Every scenario alike: standard fine-tuning with modality dropout, the paper's baseline."""
    return FixedSampler.uniform(len(evidence.scenarios))


@method("LSGS", "LSGS")
def lsgs(evidence: Evidence) -> ScenarioSampler:
    """The probabilities that scoring gave (arXiv 2605.20372)."""
    return FixedSampler(evidence.probabilities)


@method("LoRA", "LoRA", low_rank=True)
def lora(evidence: Evidence) -> ScenarioSampler:
    """Uniform scenarios, low-rank updates: the paper's second baseline (Hu et al. 2021)."""
    return uniform(evidence)


@method("uniform, second arm", "uniform", stream="second_scenario")
def uniform_again(evidence: Evidence) -> ScenarioSampler:
    """Uniform with scenarios drawn anew: what differs from the first arm is noise."""
    return uniform(evidence)


@method("LSGS, no smoothing", "LSGS")
def lsgs_unsmoothed(evidence: Evidence) -> ScenarioSampler:
    """LSGS with r = U: what the kernel contributes is missing."""
    return evidence.scored(smooth=False)


@method("LSGS, τ = 2, γ = 1", "LSGS")
def lsgs_strong(evidence: Evidence) -> ScenarioSampler:
    """LSGS without the paper's restraint: inverse temperature 2, no mixing with uniform."""
    return evidence.scored(inverse_temperature=2.0, mixing=1.0)


@method("LSGS, latent shifts", "LSGS")
def lsgs_latent_shift(evidence: Evidence) -> ScenarioSampler:
    """LSGS whose kernel compares latent shifts at the median lengthscale, with a ridge of 1."""
    return evidence.scored("latent_shift", lengthscale="median", ridge=1.0)


@method("cardinality", "control")
def cardinality(evidence: Evidence) -> ScenarioSampler:
    """Only the number of missing modalities counts, fitted to LSGS: a control."""
    p = distributions.by_cardinality(evidence.scenarios, evidence.probabilities)
    return FixedSampler(p)


@method("permuted", "control")
def permuted(evidence: Evidence) -> ScenarioSampler:
    """LSGS's probabilities given to other scenarios at random, another way per seed: a control."""
    p = distributions.permuted(evidence.scenarios, evidence.probabilities, evidence.seed, False)
    return FixedSampler(p)


@method("permuted within", "control")
def permuted_within(evidence: Evidence) -> ScenarioSampler:
    """As permuted, among scenarios with as many modalities: the control that decides."""
    p = distributions.permuted(evidence.scenarios, evidence.probabilities, evidence.seed, True)
    return FixedSampler(p)


@method("coverage", "successor")
def coverage(evidence: Evidence) -> ScenarioSampler:
    """Coverage sampling: U is the distortion, K compares latent shifts at half the median distance.

    This study's successor to LSGS; see `lsgs_core.distributions.coverage`. At the median distance
    itself q sits on a single scenario.
    """
    shift = evidence.known("latent_shift")
    _, median = rbf_kernel(shift, "median")
    kernel, _ = rbf_kernel(shift, median / 2)
    p = distributions.coverage(
        evidence.known("distortion"), kernel, evidence.mixing, evidence.prior
    )
    return FixedSampler(p)


@method("inverse", "control")
def inverse(evidence: Evidence) -> ScenarioSampler:
    """LSGS with alpha = -1: scenarios of low distortion more often."""
    return evidence.scored(direction=-1.0)


@method("inverse, τ = 2, γ = 1", "positive control")
def inverse_strong(evidence: Evidence) -> ScenarioSampler:
    """Scenarios of high distortion nearly never: a positive control, which must come out worse."""
    return evidence.scored(direction=-1.0, inverse_temperature=2.0, mixing=1.0)


@method("full only", "positive control")
def full_only(evidence: Evidence) -> ScenarioSampler:
    """All modalities that a patch has files of: a positive control, which must come out worse."""
    weights = NEVER ** evidence.scenarios.missing.astype(np.float64)
    return FixedSampler(weights / weights.sum())


@method("Bernoulli", "uniform")
def bernoulli(evidence: Evidence) -> ScenarioSampler:
    """Every modality kept with probability 0.8, again where none is (Neverova et al. 2016)."""
    return FixedSampler(distributions.bernoulli(evidence.scenarios, 0.8))


@method("deployment prior", "uniform")
def deployment(evidence: Evidence) -> ScenarioSampler:
    """Scenarios as often as the failure rates of the sensors make them occur."""
    return FixedSampler(evidence.base)


@method("Dirichlet", "control")
def dirichlet(evidence: Evidence) -> ScenarioSampler:
    """One draw of p for the whole run from a symmetric Dirichlet of concentration 5: a control."""
    return FixedSampler(distributions.dirichlet(len(evidence.scenarios), evidence.seed, 5.0))


@method("loss-proportional", "adaptive")
def loss_proportional(evidence: Evidence) -> ScenarioSampler:
    """Observes the training loss: scenarios whose running mean is high more often."""
    temperature, mixing = evidence.inverse_temperature, evidence.mixing
    return adaptive.LossProportional(evidence.base, temperature, mixing)


@method("group DRO", "adaptive")
def group_dro(evidence: Evidence) -> ScenarioSampler:
    """Observes the training loss: exponentiated ascent on it (Sagawa et al. 2020).

    Their step of 0.01 is for runs of ten thousand steps; step times steps is kept.
    """
    return adaptive.GroupDRO(evidence.base, step=100 / evidence.steps)


@method("Exp3.S", "adaptive")
def exp3s(evidence: Evidence) -> ScenarioSampler:
    """Observes how the training loss falls: a bandit on learning progress (Graves et al. 2017)."""
    return adaptive.Exp3S(evidence.base)


@method("curriculum", "adaptive")
def curriculum(evidence: Evidence) -> ScenarioSampler:
    """Scenarios of low distortion first, annealed to the prior (after Bengio et al. 2009)."""
    return adaptive.Curriculum(evidence.known("distortion"), evidence.base, evidence.epochs)


@method("online LSGS", "LSGS")
def online(evidence: Evidence) -> ScenarioSampler:
    """Observes the network: distortions are measured again in every epoch of fine-tuning."""
    return adaptive.Online(evidence.probabilities, evidence.known("measure"), every=1)


@method("LoRA + LSGS", "LoRA", low_rank=True)
def lora_lsgs(evidence: Evidence) -> ScenarioSampler:
    """Low-rank updates, scenarios as LSGS draws them."""
    return lsgs(evidence)
