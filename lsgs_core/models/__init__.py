"""The backbones, built by name."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from reprlib import repr as shortened
from typing import Any

from lsgs_core.errors import InputError
from lsgs_core.models.author_weights import load_author_weights
from lsgs_core.models.backbone import LARGEST_COUNT, Backbone, is_count
from lsgs_core.models.cbc import CBC, CBC_PRESETS, CBC_SLP_PRESETS
from lsgs_core.models.cmx import CMX, CMX_PRESETS

__all__ = ["BACKBONES", "Backbone", "build_backbone", "load_author_weights"]

# A new backbone is one file and one line here: its class, and the settings of each preset.
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
    """Build a backbone with new initial weights.

    Its `configuration` is a dictionary for JSON with every value that was used, and
    `build_backbone(**configuration)` builds the same architecture again.

    Args:
        name: Name in `BACKBONES`.
        preset: "paper", or "demo" for a network that trains on a CPU.
        bands: Number of bands of each of the M >= 2 modalities.
        classes: Number of classes, 1 for a binary mask.
        **settings: Fields of the backbone's settings that replace those of the preset.

    Raises:
        InputError: A name, preset or setting is unknown, or values do not fit together.
    """
    if name not in BACKBONES:
        raise InputError(f"backbone: expected one of {sorted(BACKBONES)}, found {name!r}")
    kind, presets = BACKBONES[name]
    if preset not in presets:
        raise InputError(f"preset: expected one of {sorted(presets)}, found {preset!r}")
    defaults = asdict(presets[preset])
    for key, value in settings.items():
        if key not in defaults:
            raise InputError(f"setting {key!r}: expected one of {[*defaults]} for {name}")
        settings[key] = value = tuple(value) if isinstance(value, list) else value
        default = defaults[key]  # types are compared exactly: True is no count
        if type(value) is not type(default) and (type(value), type(default)) != (int, float):
            raise InputError(f"setting {key!r}: expected one like {default!r}, found {value!r}")
        value = float(value) if isinstance(default, float) and value in (0, 1) else value
        if not all(map(_fits, value if isinstance(value, tuple) else (value,))):
            raise InputError(
                f"setting {key!r}: expected counts from 1 to {LARGEST_COUNT} or a rate below 1, "
                f"found {shortened(value)}"
            )
    chosen = replace(presets[preset], **settings)
    model = kind(bands, classes, chosen)
    model.configuration = {"name": name, "preset": preset, "bands": list(bands), "classes": classes}
    for key, value in asdict(chosen).items():
        model.configuration[key] = list(value) if isinstance(value, tuple) else value
    return model


def _fits(value: Any) -> bool:
    """Return True for True and False, a count, or a rate from 0 to below 1."""
    if isinstance(value, float):
        return 0 <= value < 1
    return isinstance(value, bool) or is_count(value)
