"""Loading the authors' checkpoints into our backbones."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lsgs_core.errors import InputError
from lsgs_core.models.backbone import Backbone

_INDEX = {"RGB": "0", "NIR": "1", "SWIR": "2", "rgb": "0", "nir": "1", "swir": "2", "mod": "1"}
_M = "(RGB|NIR|SWIR)"
_STREAM = "(rgb|mod)"

# The start of an authors' name and what it is here; the rest of a name stays. Groups fill the
# braces in order, a modality or stream as its index.
_CBC_NAMES = (
    (f"{_M}_pos", "positions.{}"),
    ("fused6_pos", "positions.3"),
    (rf"{_M}_encoder\.e1_c1", "encoders.{}.stem"),
    (rf"{_M}_encoder\.e1_bn", "encoders.{}.stem_norm"),
    (rf"{_M}_encoder\.e([2-5])\.(\d)\.conv", "encoders.{}.stages.level{}.{}.conv"),
    (rf"{_M}_encoder\.e([2-5])\.(\d)\.bn", "encoders.{}.stages.level{}.{}.norm"),
    (rf"{_M}_encoder\.e([2-5])\.(\d)\.downsample", "encoders.{}.stages.level{}.{}.shortcut"),
    (rf"{_M}_encoder\.adapt([1-5])", "encoders.{}.reduce.level{}"),
    (rf"{_M}_encoder\.conv6", "encoders.{}.merge"),
    (f"{_M}_encode_conv", "tokenizers.{}"),
    ("fused6_encode_conv", "fused_tokenizer"),
    (rf"{_M}_transformer\.", "blocks.{}."),
    (r"multimodal_transformer\.", "multimodal."),
    (f"qkv_{_M}", "between.{}"),
    ("multimodal_decode_conv", "to_latent"),
    (r"fusion([12346])\.", "fusions.level{}."),
    ("shared_conv", "to_shared"),
    ("(rgb|nir|swir)_private_conv", "to_private.{}"),
    (r"decoder_fuse\.RFM5_reduce", "decoder.reduce"),
    (r"decoder_fuse\.RFM5\.fusion_layer", "decoder.refine"),
    (r"decoder_fuse\.RFM([1-4])\.fusion_layer", "decoder.levels.level{}.refine"),
    (r"decoder_fuse\.d([1-4])_c1", "decoder.levels.level{}.enlarge"),
    (r"decoder_fuse\.d([1-4])_c2", "decoder.levels.level{}.join"),
    (r"decoder_fuse\.d([1-4])_out", "decoder.levels.level{}.out"),
    (r"decoder_fuse\.final_conv", "decoder.head"),
)
_BLOCK_NAMES = {
    "cross_attention_list.0.fn.norm": "attention_norm",
    "cross_attention_list.0.fn.fn.qkv": "attention.qkv",
    "cross_attention_list.0.fn.fn.proj": "attention.projection",
    "cross_ffn_list.0.fn.norm": "feed_forward_norm",
    "cross_ffn_list.0.fn.fn.net": "feed_forward",
}
_CMX_NAMES = (
    ("modal_proj", "starts.1.0"),
    (rf"core\.backbone\.{_STREAM}_stem\.block", "starts.{}.1"),
    (rf"core\.backbone\.{_STREAM}_s1\.block", "starts.{}.2"),
    (r"core\.backbone\.rgb_s([2-4])\.block", "stages1.level{}"),
    (r"core\.backbone\.mod_s([2-4])\.block", "stages2.level{}"),
    (r"core\.backbone\.frm\.(\d)\.(channel|spatial)_weights\.mlp", "rectifications.{}.{}_weights"),
    (r"core\.backbone\.ffm\.(\d)\.cross\.channel_proj([12])", "fusions.{}.stream{}.split"),
    (r"core\.backbone\.ffm\.(\d)\.cross\.cross_attn\.kv([12])", "fusions.{}.stream{}.key_value"),
    (r"core\.backbone\.ffm\.(\d)\.cross\.end_proj([12])", "fusions.{}.stream{}.end"),
    (r"core\.backbone\.ffm\.(\d)\.cross\.norm([12])", "fusions.{}.stream{}.norm"),
    (r"core\.backbone\.ffm\.(\d)\.channel_emb\.residual", "fusions.{}.residual"),
    (r"core\.backbone\.ffm\.(\d)\.channel_emb\.channel_embed", "fusions.{}.merge"),
    (r"core\.backbone\.ffm\.(\d)\.channel_emb\.norm", "fusions.{}.norm"),
    (r"core\.decode_head\.linear_c([1-4])\.proj", "decoder.project.level{}"),
    (r"core\.decode_head\.linear_fuse\.0", "decoder.fuse"),
    (r"core\.decode_head\.linear_fuse\.1", "decoder.fuse_norm"),
    (r"core\.decode_head\.linear_pred", "decoder.head"),
)
# In the checkpoints, but in no forward pass.
_UNUSED = re.compile(rf"fusion5\.|decoder_fuse\.seg_(d[1-4]|layer)\.|{_M}_decode_conv\.")


def load_author_weights(model: Backbone, weights: Mapping[str, Any] | str | Path) -> None:
    """Load a checkpoint of the published CBC-SLP, CBC or CMX into the same backbone.

    Entries that the published models never use are dropped. Nothing is loaded unless all fits.

    Args:
        model: A backbone of the "paper" preset for three modalities (RGB, NIR, SWIR) of three
            bands and one class.
        weights: The state dict, also within "state_dict" or "model" and with "module." before
            its names, or the path of such a file (.safetensors, or a PyTorch file of tensors).

    Raises:
        InputError: When the model is another one, the file cannot be read as plain tensors, or an
            entry is missing, unexpected, of the wrong shape or not finite.
    """
    found = {key: model.configuration.get(key) for key in ("preset", "bands", "classes")}
    expected = {"preset": "paper", "bands": [3, 3, 3], "classes": 1}
    if found != expected:
        raise InputError(f"the authors' weights need a model with {expected}, found {found}")
    source = "the authors' weights"
    if isinstance(weights, str | Path):
        source = str(weights)
        weights = _read(Path(weights))
    entries = _unwrap(weights, source)
    name, kind = model.configuration["name"], _kind(entries)
    if kind != name:
        raise InputError(f"{source}: found weights of {kind}, expected those of {name}")

    targets = model.state_dict()
    values: dict[str, Tensor] = {}
    problems: list[str] = []
    for key, value in entries.items():
        ours = _our_name(key, name)
        if ours in targets:
            values[ours] = value
            problems += _problems(key, value, targets[ours])
        elif not (name != "cmx" and _UNUSED.match(key)):
            problems.append(f"{key} is unexpected")
    # Missing entries can only be told by our name.
    problems += [f"{key} (our name) is missing" for key in targets if key not in values]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError(f"{source} do not fit {name}: {'; '.join(problems[:5])}{more}")
    model.load_state_dict({key: values[key].reshape(targets[key].shape) for key in targets})


def _read(path: Path) -> Any:
    """Read a file of tensors without running any code that it may hold."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a checkpoint")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken or refused pickle can raise almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: expected a file of plain tensors; {reason}") from error


def _unwrap(weights: Any, source: str) -> dict[str, Any]:
    """Return the state dict itself, without wrapping and without "module." in its names."""
    for wrapper in ("state_dict", "model"):
        if isinstance(weights, Mapping) and isinstance(weights.get(wrapper), Mapping):
            weights = weights[wrapper]
    if not isinstance(weights, Mapping) or not all(isinstance(key, str) for key in weights):
        raise InputError(f"{source}: found {type(weights).__name__}, expected a state dict")
    return {key.removeprefix("module."): value for key, value in weights.items()}


def _kind(entries: Mapping[str, Any]) -> str:
    """Tell by its names of which backbone a state dict is."""
    for kind, start in (("cmx", "core."), ("cbc_slp", "shared_conv"), ("cbc", "RGB_")):
        if any(key.startswith(start) for key in entries):
            return kind
    return "an unknown model"


def _our_name(key: str, name: str) -> str:
    """Return our name of an authors' entry, or "" when there is none."""
    for pattern, template in _CMX_NAMES if name == "cmx" else _CBC_NAMES:
        if match := re.match(pattern, key):
            groups = (_INDEX.get(group, group) for group in match.groups())
            ours = template.format(*groups) + key[match.end() :]
            for theirs, part in _BLOCK_NAMES.items():
                ours = ours.replace(theirs, part)
            return ours
    return ""


def _problems(key: str, value: Any, target: Tensor) -> list[str]:
    """Return what is wrong with one entry."""
    if not isinstance(value, Tensor):
        return [f"{key} is a {type(value).__name__}, not a tensor"]
    # Their 1×1×1 and 1×3×3 kernels are 2-D convolutions and linear layers here.
    if [n for n in value.shape if n != 1] != [n for n in target.shape if n != 1]:
        return [f"{key} has shape {list(value.shape)}, not that of {list(target.shape)}"]
    return [] if bool(value.isfinite().all()) else [f"{key} is not finite"]
