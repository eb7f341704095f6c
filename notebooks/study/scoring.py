"""Scoring of a pretrained network: shared out over processes, and read where it was done before."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lsgs_core import distortion
from lsgs_core.distortion import BatchScores, ScenarioScores, joined_scores, score_batches
from lsgs_core.models.adapter import PredictionModel
from lsgs_core.randomness import generator
from lsgs_core.uncertainty import ToProbabilities, stopping_error
from study.artifacts import is_made, load_weights, save_weights
from study.devices import Processes, in_processes, is_first_process

if TYPE_CHECKING:
    from study.run import NetworkRun

Measured = Literal["latent", "prediction"]
SCORES: Mapping[Measured, str] = {
    "latent": "scores.safetensors",
    "prediction": "prediction_scores.safetensors",
}
Until = Callable[[NDArray[np.float64], NDArray[np.int64]], bool]


def scored(
    run: "NetworkRun",
    measured: Measured = "latent",
    until: Until | None = None,
    stopped_by: Mapping[str, Any] | None = None,
) -> ScenarioScores:
    """Return the scoring of a run's pretrained network on its training patches, by notebook 03.

    A scoring that is there already, of the same weights, data and code, is read instead. Measured
    is the latent, or the predicted probabilities. Where `until` stops the scoring, by the settings
    `stopped_by`, patches come in random order.
    """
    inputs = {"weights": run.weights_sha256()}
    more = {"stopped_by": dict(stopped_by or {})}
    names = ("training_patches", "batch_size", "scenario_budget")
    record = run.record(*names, inputs=inputs, **more)
    path = run.scores / SCORES[measured]
    if is_made(path, record):
        tensors, _ = load_weights(path)
        return ScenarioScores(run.scenarios, **{k: v.numpy() for k, v in tensors.items()})
    processes = run.parameters["processes"] if until is None else 1
    given, device = (run, measured, until), run.parameters["device"]
    scores: ScenarioScores = in_processes(score, given, processes, device)
    arrays = [field.name for field in fields(scores) if field.name != "scenarios"]
    save_weights(path, {n: torch.from_numpy(getattr(scores, n)) for n in arrays}, record)
    return scores


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
        return distortion.score_scenarios(
            model, batches, scenarios, until=until, scenario_budget=budget
        )
    processes = Processes(run.device)
    positions = np.arange(len(run.training))
    starts = range(processes.rank * size, len(positions), processes.count * size)
    batches = run.training.batches_of([positions[start : start + size] for start in starts])
    how = {"progress": is_first_process(), "scenario_budget": budget}
    own = [*score_batches(model, batches, scenarios, **how)]
    position = {patch: place for place, patch in enumerate(run.training.patch_ids.tolist())}
    parts: list[BatchScores] = [part for share in processes.gather(own) for part in share]
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
