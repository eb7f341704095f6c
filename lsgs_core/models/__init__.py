"""The backbones, built by name."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from lsgs_core.errors import InputError, check_choice, check_count, check_number
from lsgs_core.models.author_weights import load_author_weights
from lsgs_core.models.backbone import Backbone
from lsgs_core.models.cbc import CBC, CBC_PRESETS, CBC_SLP_PRESETS
from lsgs_core.models.cmx import CMX, CMX_PRESETS

__all__ = ["BACKBONES", "Backbone", "build_backbone", "load_author_weights"]

# A new backbone is one file and one line here: its class, and the settings of each preset.
BACKBONES: dict[str, tuple[type[Backbone], Mapping[str, Any]]] = {
    "cbc_slp": (CBC, CBC_SLP_PRESETS),
    "cbc": (CBC, CBC_PRESETS),
    "cmx": (CMX, CMX_PRESETS),
}

MOST_PARAMETERS = 2**29  # 2 GiB of float32


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
    """
    check_choice("backbone", name, BACKBONES)
    kind, presets = BACKBONES[name]
    check_choice("preset", preset, presets)
    defaults = asdict(presets[preset])
    for key, value in settings.items():
        field = f"setting {key!r}"
        if key not in defaults:
            raise InputError(f"{field}: expected one of {[*defaults]} for {name}")
        value = tuple(value) if isinstance(value, list) else value
        default = defaults[key]  # types are compared exactly: True is no count
        if type(value) is not type(default) and (type(value), type(default)) != (int, float):
            raise InputError.of(field, f"one like {default!r}", value)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(default, float):
                check_number(field, part, lambda rate: 0 <= rate < 1, "a rate from 0 to below 1")
            elif not isinstance(default, bool):
                check_count(field, part)
        settings[key] = value if isinstance(value, tuple) else type(default)(value)
    chosen = replace(presets[preset], **settings)
    with torch.device("meta"):  # its size is known before any memory is taken
        size = sum(parameter.numel() for parameter in kind(bands, classes, chosen).parameters())
    if size > MOST_PARAMETERS:
        raise InputError(f"settings: expected at most {MOST_PARAMETERS:,} weights, found {size:,}")
    model = kind(bands, classes, chosen)
    sizes = {"bands": model.bands, "classes": model.classes, **asdict(chosen)}
    lists = {key: [*value] if isinstance(value, tuple) else value for key, value in sizes.items()}
    model.configuration = {"name": name, "preset": preset, **lists}
    return model
