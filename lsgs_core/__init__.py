"""Latent-space guided scenario sampling (LSGS): the method, its backbones and its data.

The names below are the stable public face. They are imported when first used, so that
`import lsgs_core` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsgs_core.data.batch import Batch as Batch
    from lsgs_core.distortion import (
        ScenarioScores as ScenarioScores,
    )
    from lsgs_core.distortion import (
        score_scenarios as score_scenarios,
    )
    from lsgs_core.errors import InputError as InputError
    from lsgs_core.models import (
        build_backbone as build_backbone,
    )
    from lsgs_core.models import (
        load_author_weights as load_author_weights,
    )
    from lsgs_core.models.hooked import HookedModel as HookedModel
    from lsgs_core.scenarios import ScenarioSet as ScenarioSet
    from lsgs_core.smoothing import (
        ScenarioProbabilities as ScenarioProbabilities,
    )
    from lsgs_core.smoothing import (
        scenario_probabilities as scenario_probabilities,
    )

_HOME = {
    "Batch": "data.batch",
    "HookedModel": "models.hooked",
    "InputError": "errors",
    "ScenarioProbabilities": "smoothing",
    "ScenarioScores": "distortion",
    "ScenarioSet": "scenarios",
    "build_backbone": "models",
    "load_author_weights": "models",
    "scenario_probabilities": "smoothing",
    "score_scenarios": "distortion",
}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lsgs_core' has no attribute {name!r}")
    return getattr(import_module(f"lsgs_core.{_HOME[name]}"), name)
