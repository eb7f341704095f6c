"""Latent-space guided scenario sampling (LSGS): the method, its backbones and its data.

The names below are the stable public face. They are imported when first used, so that
`import lsgs_core` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsgs_core.batch import Batch
    from lsgs_core.distortion import ScenarioScores, score_scenarios
    from lsgs_core.errors import InputError
    from lsgs_core.models import build_backbone, load_author_weights
    from lsgs_core.models.adapter import HookedModel
    from lsgs_core.probabilities import ScenarioProbabilities, scenario_probabilities
    from lsgs_core.scenarios import ScenarioSet

_HOME = {
    "Batch": "batch",
    "HookedModel": "models.adapter",
    "InputError": "errors",
    "ScenarioProbabilities": "probabilities",
    "ScenarioScores": "distortion",
    "ScenarioSet": "scenarios",
    "build_backbone": "models",
    "load_author_weights": "models",
    "scenario_probabilities": "probabilities",
    "score_scenarios": "distortion",
}
__all__ = [
    "Batch",
    "HookedModel",
    "InputError",
    "ScenarioProbabilities",
    "ScenarioScores",
    "ScenarioSet",
    "build_backbone",
    "load_author_weights",
    "scenario_probabilities",
    "score_scenarios",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lsgs_core' has no attribute {name!r}")
    return getattr(import_module(f"lsgs_core.{_HOME[name]}"), name)
