"""Scoring of a pretrained network: shared out over processes, and read where it was done before."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from lsgs_core.distortion import ScenarioScores, joined_scores, score_batches, score_scenarios
from lsgs_core.distributions import read_failure_rates
from lsgs_core.models.adapter import PredictionModel
from lsgs_core.probabilities import rbf_kernel, scenario_descriptors, scenario_probabilities
from lsgs_core.randomness import generator
from lsgs_core.scoring_file import published_scoring
from lsgs_core.uncertainty import ToProbabilities, stop_when_precise, stopping_error
from study.provenance.artifacts import is_made, load_weights, save_weights
from study.provenance.devices import Processes, in_processes, is_first_process

if TYPE_CHECKING:
    from study.stages.run import NetworkRun

Measured = Literal["latent", "prediction"]
SCORES: Mapping[Measured, str] = {
    "latent": "scores.safetensors",
    "prediction": "prediction_scores.safetensors",
}
# The values of each setting, varied one at a time. Lengthscales are multiples of the median
# distance between scenarios, since distortions of two backbones differ by orders of magnitude.
VARIED: dict[str, tuple[float, ...]] = {
    "inverse_temperature": (0.0, 0.25, 0.5, 1.0, 2.0, 4.0),
    "mixing": (0.0, 0.25, 0.5, 0.75, 1.0),
    "ridge": (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0),
    "lengthscale": (0.01, 0.1, 0.3, 1.0, 3.0, 10.0),
}
SETTINGS = ("direction", "ridge", "inverse_temperature", "mixing", "lengthscale", "smooth")
SCORED_BY = ("training_patches", "scenario_budget")  # parameters that decide D
DECIDED_BY = ("descriptor", "failure_rates", "predictions", "tolerance", *SCORED_BY, *SETTINGS)
Until = Callable[[NDArray[np.float64], NDArray[np.int64]], bool]


def scored(run: "NetworkRun", measured: Measured = "latent") -> ScenarioScores:
    """Return the scoring of a run's pretrained network on its training patches.

    A scoring that is there already, of the same weights, data and code, is read instead. One of the
    latent stops early where the run has a tolerance; patches come in random order then. What is
    `measured` between scenarios is the latent, or the predicted probabilities.
    """
    parameters, until, stopped_by = run.parameters, None, {}
    if measured == "latent" and parameters["tolerance"]:
        stopped_by = {name: parameters[name] for name in ("tolerance", "failure_rates", *SETTINGS)}
        known = to_probabilities(method_settings(run))
        until = stop_when_precise(parameters["tolerance"], known, len(run.training))
    names, inputs = (*SCORED_BY, "batch_size"), {"weights": run.weights_sha256()}
    record = run.record(*names, inputs=inputs, stopped_by=stopped_by)
    path = run.scores / SCORES[measured]
    if is_made(path, record):
        tensors, _ = load_weights(path)
        return ScenarioScores(run.scenarios, **{k: v.numpy() for k, v in tensors.items()})
    processes = parameters["processes"] if until is None else 1
    given, device = (run, measured, until), parameters["device"]
    scores: ScenarioScores = in_processes(score, given, processes, device)
    arrays = [field.name for field in fields(scores) if field.name != "scenarios"]
    save_weights(path, {n: torch.from_numpy(getattr(scores, n)) for n in arrays}, record)
    return scores


def method_settings(run: "NetworkRun", scores: ScenarioScores | None = None) -> dict[str, Any]:
    """Return the arguments of `scenario_probabilities` that the parameters of a run ask for.

    Without scores, that is, while patches are scored, the kernel compares distortions.
    """
    settings = {name: run.parameters[name] for name in SETTINGS}
    settings["lengthscale"] = settings["lengthscale"] or "median"
    settings["prior"] = read_failure_rates(run.parameters["failure_rates"], run.scenarios)
    if scores and (descriptor := run.parameters["descriptor"]) != "distortion":
        measured = scores.distortion, scores.latent_shift
        settings["descriptors"] = scenario_descriptors(descriptor, run.scenarios.masks, *measured)
    return settings


def to_probabilities(settings: Mapping[str, Any]) -> ToProbabilities:
    """Return the function from D to p that has these settings."""
    return lambda distortion: scenario_probabilities(distortion, **settings).probabilities


def published(
    run: "NetworkRun",
    scores: ScenarioScores,
    settings: Mapping[str, Any],
    prediction_distortion: NDArray[np.float64] | None,
) -> dict[str, Any]:
    """Return a scoring of `settings` as the JSON that other samplers and the authors' code read."""
    samples = {"training": run.training, "validation": run.validation, "test": run.test}
    return published_scoring(
        scores,
        scenario_probabilities(scores.distortion, **settings),
        run.parameters["descriptor"],
        settings,
        model_type=run.parameters["backbone"],
        checkpoint=str(run.weights.relative_to(run.study.root)),
        output=str((run.scores / "probabilities.json").relative_to(run.study.root)),
        meta_info={
            "foldNo": run.parameters["fold"] + 1,
            "inputType": "+".join(run.training.modalities),
            **{f"num_{part}_samples": len(patches) for part, patches in samples.items()},
            "batch_size": run.parameters["batch_size"],
            "num_scored": len(scores.patch_ids),
            "weights_sha256": run.weights_sha256(),
        },
        prediction_distortion=prediction_distortion,
    )


def score(run: "NetworkRun", measured: Measured, until: Until | None) -> ScenarioScores:
    """Score a network; every process that shares the scoring calls this.

    Each takes every n-th batch. The result is that of one process.
    """
    size, budget = run.parameters["batch_size"], run.parameters["scenario_budget"]
    model: nn.Module = run.pretrained()
    scenarios = run.scenarios
    if measured == "prediction":
        model = PredictionModel(model, exclusive=run.training.task_kind == "multiclass")
    if until is not None:
        order = generator("order", run.parameters["pretraining_seed"])
        batches = run.training.batches(size, order.permutation(len(run.training)))
        return score_scenarios(model, batches, scenarios, until=until, scenario_budget=budget)
    processes = Processes(run.device)
    positions = np.arange(len(run.training))
    starts = range(processes.rank * size, len(positions), processes.count * size)
    batches = run.training.batches_of([positions[start : start + size] for start in starts])
    how = {"progress": is_first_process(), "scenario_budget": budget}
    own = [*score_batches(model, batches, scenarios, **how)]
    position = {patch: place for place, patch in enumerate(run.training.patch_ids.tolist())}
    parts = [part for share in processes.gather(own) for part in share]
    parts.sort(key=lambda part: position[int(part.patch_ids[0])])
    return joined_scores(parts, scenarios, budget)


def precision_sentence(
    scores: ScenarioScores,
    patches: int,
    tolerance: float,
    to_probabilities: ToProbabilities,
    scene_error: NDArray[np.float64],
) -> str:
    """Say how precisely p is known: against the whole pass, and beyond this scene's blocks.

    Args:
        scores: The scoring, of patches in random order where it was stopped.
        patches: Number of patches of the whole pass.
        tolerance: Standard error of p at which it was to stop; 0 where it was not.
        to_probabilities: Function from D to p.
        scene_error: Standard error of p over resampled blocks, [K].
    """
    count, blocks = len(scores.patch_ids), len(np.unique(scores.block_ids))
    text = f"{count} of {patches} patches scored"
    if 2 <= count < patches and tolerance:
        error = stopping_error(scores.patch_distortion, to_probabilities, patches).max()
        text += f"; every p is known to {error:.4f}, against the whole pass"
    elif tolerance:
        text += f": too few to stop before the end for a standard error of {tolerance}"
    text += f"; {blocks} blocks of another place would change p by {scene_error.max():.4f}"
    if tolerance and scene_error.max() > tolerance:
        text += ", more than the tolerance: more patches of this scene do not help"
    return text


def sensitivity(distortion: NDArray[np.float64], settings: Mapping[str, Any]) -> pd.DataFrame:
    """Compute p with one setting varied and the others kept, from the same distortions.

    Args:
        distortion: D, [K].
        settings: Keyword arguments of `scenario_probabilities`.

    Returns:
        The columns setting, value, scenario (its index) and probability. Lengthscales are given as
        multiples of the median distance between scenarios.
    """
    descriptors = settings.get("descriptors")
    _, median = rbf_kernel(distortion if descriptors is None else descriptors, "median")
    rows = []
    for setting, values in VARIED.items():
        for value in values:
            used = value * median if setting == "lengthscale" else value
            result = scenario_probabilities(distortion, **{**settings, setting: used})
            rows += [(setting, value, k, p) for k, p in enumerate(result.probabilities)]
    return pd.DataFrame(rows, columns=["setting", "value", "scenario", "probability"])
