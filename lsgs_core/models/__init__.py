"""The three backbones, built by name."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lsgs_core.errors import InputError
from lsgs_core.models.author_weights import load_author_weights
from lsgs_core.models.backbone import Backbone
from lsgs_core.models.cbc import CBC
from lsgs_core.models.cbc_layers import CBCSettings
from lsgs_core.models.cmx import CMX, CMXSettings

__all__ = ["BACKBONES", "PRESETS", "Backbone", "build_backbone", "load_author_weights"]

# For 64×64 patches on a CPU; the decoder's volume stops at half the patch. Its depth is never 1:
# the last instance normalisation gives every channel mean zero over the volume, and only with a
# second slice can the one that is read differ from it, so that a patch can be all forest or none.
_CBC_DEMO: dict[str, Any] = {
    "stem_width": 8,
    "stage_widths": (32, 32, 48, 64),
    "stage_blocks": (1, 1, 1, 1),
    "reduced_channels": (4, 8, 8, 8, 8),
    "latent_channels": 16,
    "latent_grid": (2, 4, 4),
    "token_width": 64,
    "attention_heads": 4,
    "feed_forward_width": 128,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "decoder_channels": (32, 24, 16, 12),
    "decoder_depths": (2, 2, 2),
}
_CMX_DEMO: dict[str, Any] = {
    "stem_width": 16,
    "stage_widths": (24, 32, 64, 96),
    "attention_heads": 4,
    "decoder_width": 48,
    "dropout": 0.1,
}

# What a preset changes in the settings of its backbone, whose defaults are the paper's.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "cbc_slp": {"paper": {}, "demo": _CBC_DEMO},
    "cbc": {
        "paper": {"private_branches": False},
        "demo": {"private_branches": False, **_CBC_DEMO},
    },
    "cmx": {"paper": {}, "demo": _CMX_DEMO},
}
BACKBONES = tuple(PRESETS)


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
        name: "cbc_slp", "cbc" or "cmx".
        preset: "paper", or "demo" for a network that trains on a CPU.
        bands: Number of bands of each of the M >= 2 modalities.
        classes: Number of classes, 1 for a binary mask.
        **settings: Fields of `CBCSettings` or `CMXSettings` that replace the preset's.

    Raises:
        InputError: For an unknown name, preset or setting, or values that do not fit together.
    """
    if name not in PRESETS:
        raise InputError(f"backbone {name!r} is unknown; expected one of {sorted(PRESETS)}")
    if preset not in PRESETS[name]:
        raise InputError(f"preset {preset!r} is unknown; expected one of {sorted(PRESETS[name])}")
    kind: type[CBCSettings] | type[CMXSettings] = CMXSettings if name == "cmx" else CBCSettings
    known = asdict(kind())
    values = {**PRESETS[name][preset], **settings}
    for key, value in values.items():
        if key not in known:
            raise InputError(f"setting {key!r} of {name} is unknown; expected some of {[*known]}")
        values[key] = value = tuple(value) if isinstance(value, list) else value
        # Not isinstance: a bool is no count.
        if type(value) is not type(known[key]) and (type(value), type(known[key])) != (int, float):
            raise InputError(f"setting {key}: found {value!r}, expected one like {known[key]!r}")
    chosen = kind(**values)
    model: Backbone
    if isinstance(chosen, CMXSettings):
        model = CMX(bands, classes, chosen)
    else:
        model = CBC(bands, classes, chosen)
    model.configuration = {"name": name, "preset": preset, "bands": list(bands), "classes": classes}
    for key, value in asdict(chosen).items():
        model.configuration[key] = list(value) if isinstance(value, tuple) else value
    return model
