"""The backbones, built by name."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from lsgs_core.errors import InputError
from lsgs_core.models.author_weights import load_author_weights
from lsgs_core.models.backbone import Backbone
from lsgs_core.models.cbc import CBC, CBC_PRESETS, CBC_SLP_PRESETS
from lsgs_core.models.cmx import CMX, CMX_PRESETS

__all__ = ["BACKBONES", "Backbone", "build_backbone", "load_author_weights"]

# A backbone is its file and a line here: its class, and the settings of each of its presets.
BACKBONES: dict[str, tuple[type[Backbone], Mapping[str, Any]]] = {
    "cbc_slp": (CBC, CBC_SLP_PRESETS),
    "cbc": (CBC, CBC_PRESETS),
    "cmx": (CMX, CMX_PRESETS),
}


def build_backbone(
    name: str,
    preset: str = "paper",
    bands: Sequence[int] = (3, 3, 3),
    classes: int = 1,
    **settings: Any,
) -> Backbone:
    """Build a backbone with freshly initialised weights.

    Its `configuration` is a dictionary for JSON with every value that was used, and
    `build_backbone(**configuration)` builds the same network again.

    Args:
        name: One of `BACKBONES`.
        preset: "paper", or "demo" for a network that trains on a CPU.
        bands: Number of bands of each of the M >= 2 modalities.
        classes: Number of classes, 1 for a binary mask.
        **settings: Fields of the backbone's settings that replace the preset's.

    Raises:
        InputError: For an unknown name, preset or setting, or values that do not fit together.
    """
    if name not in BACKBONES:
        raise InputError(f"backbone {name!r} is unknown; expected one of {sorted(BACKBONES)}")
    kind, presets = BACKBONES[name]
    if preset not in presets:
        raise InputError(f"preset {preset!r} is unknown; expected one of {sorted(presets)}")
    known = asdict(presets[preset])
    values = dict(settings)
    for key, value in values.items():
        if key not in known:
            raise InputError(f"setting {key!r} of {name} is unknown; expected some of {[*known]}")
        values[key] = value = tuple(value) if isinstance(value, list) else value
        # Not isinstance: a bool is no count.
        if type(value) is not type(known[key]) and (type(value), type(known[key])) != (int, float):
            raise InputError(f"setting {key}: found {value!r}, expected one like {known[key]!r}")
    chosen = replace(presets[preset], **values)
    model = kind(bands, classes, chosen)
    model.configuration = {"name": name, "preset": preset, "bands": list(bands), "classes": classes}
    for key, value in asdict(chosen).items():
        model.configuration[key] = list(value) if isinstance(value, tuple) else value
    return model
