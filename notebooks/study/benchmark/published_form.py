"""The published form of the networks: 3-D convolutions throughout.

Tests compare the networks of `lsgs_core.models` with it, and the benchmark measures against it.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsgs_core.models import Backbone
from lsgs_core.models.cbc import Encoder


def as_published(model: Backbone) -> Backbone:
    """Return a copy of a network, not accelerated, in its published form with equal parameters."""
    published = copy.deepcopy(model)
    for module in published.modules():
        if type(module) is Encoder:
            module.__class__ = _VolumeEncoder
    return published


class _VolumeEncoder(Encoder):
    """The encoder over a one-channel volume whose depth is the bands."""

    def forward(self, bands: Tensor) -> list[Tensor]:
        """Compute `Encoder.forward` by 3-D convolutions."""
        x = bands[:, None]  # (B, 1, D, H, W)
        levels, resized = [], []
        for name, stage in self.stages.items():
            assert isinstance(stage, nn.Sequential)
            if name == "level1":
                conv, _, norm, _ = stage.children()
                weight = conv.get_parameter("weight")[:, None]  # its three channels were the depth
                x = F.conv3d(x, weight, None, stride=(1, 2, 2), padding=(1, 3, 3))
                x = F.max_pool3d(_normalised(F.relu(x), norm), (1, 3, 3), (1, 2, 2), (0, 1, 1))
            else:
                for block in stage.children():
                    x = _bottleneck(x, block)
            reduced = _convolved(x, self.reduce[name])
            levels.append(reduced)
            resized.append(F.interpolate(reduced, self.grid, mode="trilinear", align_corners=True))
        return [*levels[:4], self.merge(torch.cat(resized, dim=1))]


def _bottleneck(x: Tensor, block: nn.Module) -> Tensor:
    out = x
    for name in ("part1", "part2", "part3"):
        conv, norm = block.get_submodule(name).children()
        out = _normalised(_convolved(out, conv), norm)
        out = F.relu(out) if name != "part3" else out
    if projection := [*block.get_submodule("shortcut").children()]:
        x = _normalised(_convolved(x, projection[0]), projection[1])
    return F.relu(out + x)


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
