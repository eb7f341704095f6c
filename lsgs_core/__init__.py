"""Latent-space guided scenario sampling (LSGS): the method and its backbones.

The names below are the stable public interface. Each is imported when it is first used, so that
`import lsgs_core` costs nothing. An argument of another type, shape or range, or that is not
finite, raises `InputError` everywhere; a function's `Raises` says what else does. Letters in shapes
are K scenarios of M modalities, N patches, and B samples in a batch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsgs_core.batch import Batch as Batch
    from lsgs_core.distortion import ScenarioScores as ScenarioScores
    from lsgs_core.distortion import score_scenarios as score_scenarios
    from lsgs_core.dropout import ScenarioDropout as ScenarioDropout
    from lsgs_core.errors import InputError as InputError
    from lsgs_core.methods import Evidence as Evidence
    from lsgs_core.methods import find_method as find_method
    from lsgs_core.models import build_backbone as build_backbone
    from lsgs_core.models import load_author_weights as load_author_weights
    from lsgs_core.models.adapter import AdaptedBackbone as AdaptedBackbone
    from lsgs_core.models.adapter import HookedModel as HookedModel
    from lsgs_core.probabilities import ScenarioProbabilities as ScenarioProbabilities
    from lsgs_core.probabilities import scenario_probabilities as scenario_probabilities
    from lsgs_core.sampling import draw_scenarios as draw_scenarios
    from lsgs_core.scenarios import ScenarioSet as ScenarioSet

_MODULES = {
    "batch": ["Batch"],
    "distortion": ["ScenarioScores", "score_scenarios"],
    "dropout": ["ScenarioDropout"],
    "errors": ["InputError"],
    "methods": ["Evidence", "find_method"],
    "models": ["build_backbone", "load_author_weights"],
    "models.adapter": ["AdaptedBackbone", "HookedModel"],
    "probabilities": ["ScenarioProbabilities", "scenario_probabilities"],
    "sampling": ["draw_scenarios"],
    "scenarios": ["ScenarioSet"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
__all__ = [*_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'lsgs_core' has no attribute {name!r}")
    return getattr(import_module(f"lsgs_core.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
