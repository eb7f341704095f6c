"""The JSON file of a scoring, with the published field names, written and read.

The authors' trainer reads `final_probs` alone, in the order of the scenarios, so that our files can
replace theirs and theirs can be used by our fine-tuning.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lsgs_core.distortion import ScenarioScores
from lsgs_core.errors import Floats, InputError, check_number, check_type, real_numbers
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
# Fields that a method may need, with their name in `Evidence` and number of axes.
ARRAYS = {
    "D_sh": ("distortion", 1),
    "latent_shift": ("latent_shift", 2),
    "prediction_distortion": ("prediction_distortion", 1),
    "prior": ("prior", 1),
}


def published_scoring(
    scores: ScenarioScores,
    result: ScenarioProbabilities,
    descriptor: str,
    settings: Mapping[str, Any],
    model_type: str,
    checkpoint: str,
    output: str,
    meta_info: Mapping[str, Any],
    prediction_distortion: Floats | None = None,
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
        meta_info: Further values, such as foldNo (counted from 1) and num_training_samples.
        prediction_distortion: D measured at the prediction, [K], where it was measured.

    Raises:
        InputError: A setting is missing, or scores and result have different scenarios.
    """
    check_type("scores", scores, ScenarioScores)
    check_type("result", result, ScenarioProbabilities)
    check_type("settings", settings, Mapping)
    check_type("meta_info", meta_info, Mapping)
    texts = {"model_type": model_type, "checkpoint": checkpoint, "output": output}
    for name, text in texts.items():
        check_type(name, text, str)
    for name in ("direction", "inverse_temperature", "mixing", "ridge"):
        check_number(f"settings.{name}", settings.get(name), lambda x: True, "a number")
    check_type("settings.smooth", settings.get("smooth", True), bool)
    if settings.get("lengthscale", "median") != "median":
        expected = "a positive number or 'median'"
        check_number("settings.lengthscale", settings["lengthscale"], lambda x: x > 0, expected)
    scenarios = scores.scenarios
    check_type("scores.scenarios", scenarios, ScenarioSet)
    numbers = {}
    for name, value in vars(result).items():
        shape = [len(scenarios)] * (0 if name == "lengthscale" else 2 if name == "kernel" else 1)
        numbers[name] = real_numbers(f"result.{name}", value, shape).tolist()
    check_probabilities(result.probabilities)
    further: dict[str, Any] = {k: settings[k] for k in ("smooth", "lengthscale") if k in settings}
    if prediction_distortion is not None:
        values = real_numbers("prediction_distortion", prediction_distortion, [len(scenarios)])
        further["prediction_distortion"] = values.tolist()
    shift = scores.latent_shift
    features = scenario_descriptors(descriptor, scenarios.masks, scores.distortion, shift)
    used = {**settings, "lengthscale": numbers["lengthscale"]}
    return {
        "modelType": model_type,
        "checkpoint_path": checkpoint,
        "output_json": output,
        **{field: used[ours] for ours, field in SETTINGS.items()},
        "scenario_names": list(scenarios.names),
        "mask_array": scenarios.masks.astype(int).tolist(),
        "meta_info": dict(meta_info),
        "D_sh": real_numbers("scores.distortion", scores.distortion).tolist(),
        "U": numbers["utility"],
        "scenario_features_X": features.tolist(),
        "kernel_matrix": numbers["kernel"],
        "kernel_scores_r": numbers["smoothed"],
        "normalized_kernel_scores": numbers["standardised"],
        "softmax_probs": numbers["softmax"],
        "final_probs": numbers["probabilities"],
        # Fields of this study, for its other samplers.
        "latent_shift": real_numbers("scores.latent_shift", shift).tolist(),
        "prior": numbers["prior"],
        "descriptor": descriptor,
        **further,
    }


def read_evidence(path: Path, scenarios: ScenarioSet | None = None) -> Evidence:
    """Read our or the authors' scoring file for the methods that build on it.

    Args:
        path: JSON file with `final_probs`, and the fields of `published_scoring` that methods need.
        scenarios: Scenarios that the file must have, in this order; None takes those of the file.

    Raises:
        InputError: The file is no scoring, its probabilities are no distribution, or it has other
            scenarios.
    """
    check_type("path", path, str, Path)
    check_type("scenarios", scenarios, ScenarioSet, type(None))
    try:
        if not Path(path).is_file():  # reading a device may never end
            raise OSError("there is no such file")
        content = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected the JSON of a scoring: {error}") from error
    if not isinstance(content, dict) or "final_probs" not in content:
        raise InputError(f"{path}: expected the JSON of a scoring, with 'final_probs'")
    try:
        return _evidence(content, scenarios)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _evidence(content: Mapping[str, Any], scenarios: ScenarioSet | None) -> Evidence:
    names = content.get("scenario_names")
    if scenarios is None:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError.of("scenario_names", "a list of names", names)
        scenarios = ScenarioSet.of([name for name in names if "+" not in name])
    expected = {
        "scenario_names": list(scenarios.names),
        "mask_array": scenarios.masks.astype(int).tolist(),
    }
    for field, values in expected.items():
        if content.get(field, values) != values:
            raise InputError.of(field, f"the scenarios of {scenarios.modalities}", content[field])
    fields: dict[str, Any] = {"descriptor": content.get("descriptor", "distortion")}
    for field, (ours, ndim) in ARRAYS.items():
        if field in content:
            fields[ours] = real_numbers(field, content[field], [len(scenarios), None][:ndim])
    settings: dict[str, Any] = {}
    for ours, field in SETTINGS.items():
        if field in content:
            settings[ours] = check_number(field, content[field], lambda x: True, "a number")
    if "smooth" in content:
        settings["smooth"] = content["smooth"]
        check_type("smooth", content["smooth"], bool)
    if content.get("lengthscale") == "median":  # used where D is measured again
        settings["lengthscale"] = "median"
    probabilities = check_probabilities(content["final_probs"], len(scenarios), "final_probs")
    return Evidence(scenarios, probabilities, settings=settings, **fields)
