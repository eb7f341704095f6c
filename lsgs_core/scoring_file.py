"""The JSON file of a scoring, with the published field names, written and read.

The authors' trainer reads `final_probs` alone, in the order of the scenarios, so that our files can
replace theirs and theirs can be used by our fine-tuning.
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

# Our names of the settings and their published names.
SETTINGS = {
    "direction": "alpha",
    "inverse_temperature": "tau",
    "mixing": "gamma_floor",
    "ridge": "lambda",
    "lengthscale": "rbf_sigma",
}
# Fields that a method may need, and their names in `Evidence`.
ARRAYS = {"D_sh": "distortion", "latent_shift": "latent_shift", "prior": "prior"}


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
    """Return a scoring as a dictionary for JSON, with the published field names.

    Args:
        scores: Distortions.
        result: Probabilities from these distortions.
        descriptor: What the kernel compared; see `scenario_descriptors`.
        settings: direction, inverse_temperature, mixing and ridge of the result; also smooth, and
            lengthscale (a number or "median"), where they can differ from the defaults.
        model_type: Name of the backbone.
        checkpoint: Path of the weights, as it should be recorded.
        output: Path of the JSON file itself, as it should be recorded.
        meta_info: Further values, such as foldNo (counted from 1), inputType and
            num_training_samples.
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
        # Fields of this study, for its other samplers.
        "latent_shift": scores.latent_shift.tolist(),
        "prior": result.prior.tolist(),
        "descriptor": descriptor,
        **{name: settings[name] for name in ("smooth", "lengthscale") if name in settings},
    }


def read_evidence(path: Path, scenarios: ScenarioSet | None = None) -> Evidence:
    """Read our or the authors' scoring file for the methods that build on it.

    Args:
        path: JSON file with `final_probs`, and with other fields of `published_scoring` where a
            method needs them.
        scenarios: Scenarios that the file must have, in this order; None takes those of the file.

    Raises:
        InputError: The file is no scoring, its probabilities are no distribution, or it has other
            scenarios.
    """
    try:
        content = json.loads(path.read_text())
        final = np.asarray(content["final_probs"], dtype=np.float64)
        if scenarios is None:
            scenarios = ScenarioSet.of([n for n in content["scenario_names"] if "+" not in n])
        masks = np.asarray(content.get("mask_array", scenarios.masks.astype(int)))
        arrays: dict[str, Any] = {
            ours: np.asarray(content[field], dtype=np.float64)
            for field, ours in ARRAYS.items()
            if field in content
        }
        descriptor = str(content.get("descriptor", "distortion"))
        settings: dict[str, Any] = {
            ours: float(content[field]) for ours, field in SETTINGS.items() if field in content
        }
        if "smooth" in content:
            settings["smooth"] = bool(content["smooth"])
        if content.get("lengthscale") == "median":  # used where D is measured again
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
    for field, ours in ARRAYS.items():
        values = arrays.get(ours, final)
        if values.shape[:1] != final.shape or not np.isfinite(values).all():
            raise InputError(f"{path}: {field}: expected finite numbers for every scenario")
    return Evidence(scenarios, probabilities, settings=settings, descriptor=descriptor, **arrays)
