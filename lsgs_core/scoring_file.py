"""The published JSON of a scoring: written with its field names, so that it can replace theirs.

The authors' trainer reads `final_probs` alone, in the order of the scenarios; a file of theirs can
be given to our fine-tuning in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lsgs_core.distortion import ScenarioScores
from lsgs_core.errors import InputError
from lsgs_core.methods import Evidence
from lsgs_core.probabilities import ScenarioProbabilities, scenario_descriptors
from lsgs_core.sampling import check_probabilities
from lsgs_core.scenarios import ScenarioSet

# Published names of what a scoring was made with, and of what it found.
SETTINGS = {
    "direction": "alpha",
    "inverse_temperature": "tau",
    "mixing": "gamma_floor",
    "ridge": "lambda",
    "lengthscale": "rbf_sigma",
}
# Beyond the published ones, for the other samplers of this study.
OWN_SETTINGS = ("smooth", "lengthscale")
ARRAYS = ("D_sh", "latent_shift", "prior")


def published_scoring(
    scores: ScenarioScores,
    result: ScenarioProbabilities,
    descriptor: str,
    settings: Mapping[str, Any],
    model_type: str,
    checkpoint: str,
    output: str,
    meta_info: Mapping[str, Any],
) -> dict[str, Any]:
    """Put a scoring into the published fields.

    Args:
        scores: Distortions.
        result: What was made of them.
        descriptor: What the kernel compared, see `scenario_descriptors`.
        settings: direction, inverse_temperature, mixing and ridge, as they were used; also smooth
            and lengthscale (a number or "median"), where other than the defaults may be.
        model_type: Name of the backbone.
        checkpoint: Path of the weights, as it is to be recorded.
        output: Path of the JSON itself, as it is to be recorded.
        meta_info: foldNo (counted from 1), inputType, num_training_samples and so on.

    Returns:
        A dictionary for JSON.
    """
    scenarios = scores.scenarios
    features = scenario_descriptors(
        descriptor, scenarios.masks, scores.distortion, scores.latent_shift
    )
    return {
        "modelType": model_type,
        "checkpoint_path": checkpoint,
        "output_json": output,
        "alpha": settings["direction"],
        "tau": settings["inverse_temperature"],
        "gamma_floor": settings["mixing"],
        "lambda": settings["ridge"],
        "rbf_sigma": result.lengthscale,
        "scenario_names": list(scenarios.names),
        "mask_array": scenarios.masks.astype(int).tolist(),
        "meta_info": dict(meta_info),
        "D_sh": scores.distortion.tolist(),
        "U": result.utility.tolist(),
        "scenario_features_X": features.tolist(),
        "kernel_matrix": result.kernel.tolist(),
        "kernel_scores_r": result.smoothed.tolist(),
        "normalized_kernel_scores": result.standardised.tolist(),
        "softmax_probs": result.softmax.tolist(),
        "final_probs": result.probabilities.tolist(),
        # Beyond the published fields, for the other samplers of this study.
        "latent_shift": scores.latent_shift.tolist(),
        "prior": result.prior.tolist(),
        "descriptor": descriptor,
        **{name: settings[name] for name in OWN_SETTINGS if name in settings},
    }


def read_evidence(path: Path, scenarios: ScenarioSet | None = None) -> Evidence:
    """Read a scoring, ours or the authors', for the methods that build on it.

    Args:
        path: A JSON file with `final_probs` and, where they are there, the fields of
            `published_scoring`. What a file lacks is None, and methods that need it say so.
        scenarios: Over which it must be, in this order; None takes those that the file names.

    Raises:
        InputError: Not such a file, not a distribution, or over other scenarios.
    """
    try:
        content = json.loads(path.read_text())
        final = np.asarray(content["final_probs"], dtype=np.float64)
        if scenarios is None:
            scenarios = ScenarioSet.of([n for n in content["scenario_names"] if "+" not in n])
        masks = np.asarray(content.get("mask_array", scenarios.masks.astype(int)))
        given = {
            name: np.asarray(content[name], dtype=np.float64) for name in ARRAYS if name in content
        }
        descriptor = str(content.get("descriptor", "distortion"))
        settings: dict[str, Any] = {
            name: float(content[key]) for name, key in SETTINGS.items() if key in content
        }
        if "smooth" in content:
            settings["smooth"] = bool(content["smooth"])
        if content.get("lengthscale") == "median":  # asked for again where D is measured again
            settings["lengthscale"] = "median"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{path}: expected the JSON of a scoring, with 'final_probs': {error}"
        ) from error
    try:
        probabilities = check_probabilities(final, len(scenarios))
    except InputError as error:
        raise InputError(f"{path}: final_probs: {error}") from error
    if not np.array_equal(masks, scenarios.masks.astype(int)):
        raise InputError(f"{path}: mask_array: expected the scenarios {list(scenarios.names)}")
    for name, values in given.items():
        if values.shape[:1] != final.shape or not np.isfinite(values).all():
            raise InputError(f"{path}: {name}: expected finite numbers for every scenario")
    return Evidence(
        scenarios,
        probabilities,
        distortion=given.get("D_sh"),
        latent_shift=given.get("latent_shift"),
        prior=given.get("prior"),
        settings=settings,
        descriptor=descriptor,
    )
