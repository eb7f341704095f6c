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
from numpy.typing import NDArray

from lsgs_core.distortion import ScenarioScores
from lsgs_core.errors import InputError
from lsgs_core.sampling import check_probabilities
from lsgs_core.scenarios import ScenarioSet
from lsgs_core.smoothing import ScenarioProbabilities


def published_scoring(
    scores: ScenarioScores,
    result: ScenarioProbabilities,
    settings: Mapping[str, float],
    model_type: str,
    checkpoint: str,
    output: str,
    meta_info: Mapping[str, Any],
) -> dict[str, Any]:
    """Put a scoring into the published fields.

    Args:
        scores: Distortions.
        result: What was made of them.
        settings: direction, inverse_temperature, mixing and ridge, as they were used.
        model_type: Name of the backbone.
        checkpoint: Path of the weights, as it is to be recorded.
        output: Path of the JSON itself, as it is to be recorded.
        meta_info: foldNo (counted from 1), inputType, num_training_samples and so on.

    Returns:
        A dictionary for JSON.
    """
    scenarios = scores.scenarios
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
        "scenario_features_X": scores.distortion[:, None].tolist(),
        "kernel_matrix": result.kernel.tolist(),
        "kernel_scores_r": result.smoothed.tolist(),
        "normalized_kernel_scores": result.standardised.tolist(),
        "softmax_probs": result.softmax.tolist(),
        "final_probs": result.probabilities.tolist(),
    }


def read_final_probabilities(path: Path, scenarios: ScenarioSet) -> NDArray[np.float64]:
    """Read the probabilities of a scoring, ours or the authors'.

    Args:
        path: A JSON file with `final_probs` and, where it is there, `mask_array`.
        scenarios: Over which they must be, in this order.

    Returns:
        float64 [K].

    Raises:
        InputError: Not such a file, not a distribution, or over other scenarios.
    """
    try:
        content = json.loads(path.read_text())
        final = np.asarray(content["final_probs"], dtype=np.float64)
        masks = content.get("mask_array")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: expected JSON with 'final_probs': {error}") from error
    try:
        probabilities = check_probabilities(final, len(scenarios))
    except InputError as error:
        raise InputError(f"{path}: final_probs: {error}") from error
    if masks is not None and not np.array_equal(np.asarray(masks), scenarios.masks.astype(int)):
        raise InputError(f"{path}: mask_array: expected the scenarios {list(scenarios.names)}")
    return probabilities
