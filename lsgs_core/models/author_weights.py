"""Loading the authors' checkpoints into our backbones."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lsgs_core.errors import InputError, check_type
from lsgs_core.models.backbone import Backbone

# Replacements that turn the authors' names into ours, one after the other.
_CBC_NAMES = (
    ("RGB|rgb", "0"),
    ("NIR|nir", "1"),
    ("SWIR|swir", "2"),
    ("fused6", "3"),
    (r"^(\d)_pos", r"positions.\1"),
    (r"^(\d)_encoder\.", r"encoders.\1."),
    (r"\.conv6", ".merge"),
    (r"\.e1_c1", ".stages.level1.0"),
    (r"\.e1_bn", ".stages.level1.2"),
    (r"\.e([2-5])\.", r".stages.level\1."),
    (r"\.conv([123])\.", r".part\1.0."),
    (r"\.bn([123])\.", r".part\1.1."),
    (r"\.downsample", ".shortcut"),
    (r"\.adapt(\d)", r".reduce.level\1"),
    (r"^(\d)_encode_conv", r"tokenizers.\1"),
    (r"^(\d)_transformer", r"blocks.\1"),
    ("^multimodal_transformer", "multimodal"),
    (r"cross_(attention|ffn)_list\.0\.fn\.norm", r"\1_norm"),
    (r"cross_attention_list\.0\.fn\.fn\.", ""),
    (r"cross_ffn_list\.0\.fn\.fn\.net", "ffn"),
    ("^qkv_", "between."),
    ("^multimodal_decode_conv", "to_latent"),
    (r"^fusion(\d)", r"fusions.level\1"),
    ("^shared_conv", "to_shared"),
    (r"^(\d)_private_conv", r"to_private.\1"),
    (r"^decoder_fuse\.", "decoder."),
    (r"RFM5\.fusion_layer", "refine"),
    ("RFM5_reduce", "reduce"),
    (r"RFM(\d)\.fusion_layer", r"levels.level\1.refine"),
    (r"\.d(\d)_c1", r".levels.level\1.enlarge"),
    (r"\.d(\d)_c2", r".levels.level\1.join"),
    (r"\.d(\d)_out", r".levels.level\1.out"),
    ("final_conv", "head"),
)
_CMX_NAMES = (
    (r"^core\.(backbone|decode_head)\.", ""),
    ("^modal_proj", "starts.1.0"),
    ("^rgb_", "0_"),
    ("^mod_", "1_"),
    (r"^(\d)_stem\.block", r"starts.\1.1"),
    (r"^(\d)_s1\.block", r"starts.\1.2"),
    (r"^(\d)_s(\d)\.block", r"stages.level\2.\1"),
    (r"^frm\.(\d)\.(\w+)\.mlp", r"rectifications.\1.\2"),
    (r"^ffm\.", "fusions."),
    (r"cross\.(cross_attn\.)?(\w+)([12])", r"stream\3.\2"),
    (r"channel_emb\.channel_embed", "merge"),
    (r"channel_emb\.", ""),
    (r"^linear_c(\d)\.proj", r"decoder.project.level\1"),
    (r"^linear_fuse\.0", "decoder.fuse"),
    (r"^linear_fuse\.1", "decoder.fuse_norm"),
    ("^linear_pred", "decoder.head"),
)
# Entries of the checkpoints that no forward pass uses.
_UNUSED = re.compile(r"fusion5\.|decoder_fuse\.seg_(d[1-4]|layer)\.|(RGB|NIR|SWIR)_decode_conv\.")


def load_author_weights(model: Backbone, weights: Mapping[str, Any] | str | Path) -> None:
    """Load a checkpoint of the published CBC-SLP, CBC or CMX into the same backbone.

    Entries that the published models never use are dropped; unless all others fit, none is loaded.

    Args:
        model: Backbone of the "paper" preset for three modalities (RGB, NIR, SWIR) of three bands
            and one class.
        weights: State dict, which may be inside "state_dict" or "model" and have "module." before
            its names, or the path of such a file (.safetensors, or a PyTorch file of tensors).

    Raises:
        InputError: The model is another one, the file cannot be read as plain tensors, or an entry
            is missing, unexpected, of the wrong shape or not finite.
    """
    check_type("model", model, Backbone)
    expected = {"preset": "paper", "bands": [3, 3, 3], "classes": 1}
    found = {key: model.configuration.get(key) for key in expected}
    if found != expected:
        raise InputError(f"the authors' weights need a model with {expected}, found {found}")
    source = str(weights) if isinstance(weights, str | Path) else "the authors' weights"
    entries = _entries(weights, source)
    name = model.configuration["name"]
    marks = (("core.", "cmx"), ("shared_conv", "cbc_slp"), ("RGB_", "cbc"))
    kinds = [kind for mark, kind in marks if any(key.startswith(mark) for key in entries)]
    kind = kinds[0] if kinds else "an unknown model"
    if kind != name:
        raise InputError(f"{source}: expected weights of {name}, found those of {kind}")

    targets = model.state_dict()
    values: dict[str, Tensor] = {}
    problems = []
    for key, value in entries.items():
        ours = key
        for pattern, replacement in _CMX_NAMES if name == "cmx" else _CBC_NAMES:
            ours = re.sub(pattern, replacement, ours)
        if ours in targets and ours not in values:
            values[ours] = value
            if problem := _problem(value, targets[ours]):
                problems.append(f"{key} {problem}")
        elif name == "cmx" or not _UNUSED.match(key):
            problems.append(f"{key} is unexpected")
    problems += [f"{key} (our name) is missing" for key in targets if key not in values]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError(f"{source} do not fit {name}: {'; '.join(problems[:5])}{more}")
    model.load_state_dict({key: values[key].reshape(targets[key].shape) for key in targets})


def _entries(weights: Any, source: str) -> dict[str, Any]:
    """Return the state dict without wrapper and "module."; no code in a file is executed."""
    if isinstance(weights, str | Path):
        path = Path(weights)
        if not path.is_file():
            raise InputError(f"{path}: expected a checkpoint, found no such file")
        try:
            if path.suffix == ".safetensors":
                weights = load_file(path)
            else:
                weights = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged or refused pickle can raise almost anything
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(f"{path}: expected a file of plain tensors; {reason}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(weights, Mapping) and isinstance(weights.get(wrapper), Mapping):
            weights = weights[wrapper]
    if not isinstance(weights, Mapping) or not all(isinstance(key, str) for key in weights):
        raise InputError(f"{source}: expected a state dict, found {type(weights).__name__}")
    return {key.removeprefix("module."): value for key, value in weights.items()}


def _problem(value: Any, target: Tensor) -> str:
    """Return what is wrong with an entry, or nothing."""
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}, not a tensor"
    # Their 1×1×1 and 1×3×3 kernels are 2-D convolutions and linear layers here.
    if [n for n in value.shape if n != 1] != [n for n in target.shape if n != 1]:
        return f"has shape {list(value.shape)}, not that of {list(target.shape)}"
    if value.is_complex() or value.is_floating_point() != target.is_floating_point():
        return f"has dtype {value.dtype}, not {target.dtype}"
    # As the model holds it: 1e300 is finite in float64 and infinite in float32.
    return "" if bool(value.to(target.dtype).isfinite().all()) else "is not finite"
