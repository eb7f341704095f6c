"""The form that defines the networks: every layer as it was published.

`with plain_form():` runs it, for the tests that hold the faster forms to it and for the benchmark
that is measured against it. The faster forms (2-D encoders on every device; the decoder of
`volumes` and the attention of `attention` on a CPU) give the same numbers up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from lsgs_core.models.cbc_layers import Encoder

_PLAIN: ContextVar[bool] = ContextVar("plain", default=False)


@contextmanager
def plain_form() -> Iterator[None]:
    """Run the networks in the form that defines them, within the block."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def is_plain() -> bool:
    """Whether the defining form is wanted."""
    return _PLAIN.get()


def has_fast_kernels(x: Tensor) -> bool:
    """Whether `volumes` and `attention` are wanted for it and were written for its device."""
    return x.device.type == "cpu" and not is_plain() and not torch.is_autocast_enabled("cpu")


def encode(encoder: Encoder, bands: Tensor) -> list[Tensor]:
    """Return what `encoder(bands)` does, by 3-D convolutions over a one-channel volume."""
    x = bands[:, None]  # (B, 1, D, H, W)
    levels, resized = [], []
    for name, stage in encoder.stages.items():
        assert isinstance(stage, nn.Sequential)
        if name == "level1":
            conv, _, norm, _ = stage.children()
            weight = conv.get_parameter("weight")[:, None]  # its three channels were the depth
            x = F.conv3d(x, weight, None, stride=(1, 2, 2), padding=(1, 3, 3))
            x = F.max_pool3d(_normalised(F.relu(x), norm), (1, 3, 3), (1, 2, 2), (0, 1, 1))
        else:
            for block in stage.children():
                x = _bottleneck(x, block)
        reduced = _convolved(x, encoder.reduce[name])
        levels.append(reduced)
        resized.append(F.interpolate(reduced, encoder.grid, mode="trilinear", align_corners=True))
    return [*levels[:4], encoder.merge(torch.cat(resized, dim=1))]


def _bottleneck(x: Tensor, block: nn.Module) -> Tensor:
    out = x
    for name in ("part1", "part2", "part3"):
        conv, norm = block.get_submodule(name).children()
        out = _normalised(_convolved(out, conv), norm)
        out = F.relu(out) if name != "part3" else out
    projection = [*block.get_submodule("shortcut").children()]
    return F.relu(out + (_normalised(_convolved(x, projection[0]), projection[1])
                         if projection else x))  # fmt: skip


def _convolved(x: Tensor, conv: nn.Module) -> Tensor:
    assert isinstance(conv, nn.Conv2d)
    assert not isinstance(conv.padding, str)
    stride, padding = (1, *conv.stride), (0, *conv.padding)
    return F.conv3d(x, conv.weight[:, :, None], conv.bias, stride=stride, padding=padding)


def _normalised(x: Tensor, norm: nn.Module) -> Tensor:
    assert isinstance(norm, nn.BatchNorm2d)
    return F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias,
        norm.training, norm.momentum or 0.0, norm.eps,
    )  # fmt: skip
