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
    for encoder in [module for module in published.modules() if type(module) is Encoder]:
        for module in encoder.modules():
            module.__class__ = _VOLUMES.get(type(module), type(module))
    return published


class _VolumeEncoder(Encoder):
    """The encoder over a one-channel volume whose depth is the bands."""

    def forward(self, bands: Tensor) -> list[Tensor]:
        """Compute `Encoder.forward` by 3-D convolutions."""
        x = bands[:, None]  # (B, 1, D, H, W)
        levels, resized = [], []
        for stage, reduce in zip(self.stages.values(), self.reduce.values(), strict=True):
            x = stage(x)
            levels.append(reduce(x))
            resized.append(
                F.interpolate(levels[-1], self.grid, mode="trilinear", align_corners=True)
            )
        return [*levels[:4], self.merge(torch.cat(resized, dim=1))]


class _VolumeConvolution(nn.Conv2d):
    """A convolution whose kernel has a depth of 1, or of 3 in the stem, whose channels they are."""

    def forward(self, x: Tensor) -> Tensor:
        assert not isinstance(self.padding, str)
        weight = self.weight.unflatten(1, (x.shape[1], -1))
        padding = weight.shape[2] // 2, *self.padding
        return F.conv3d(x, weight, self.bias, (1, *self.stride), padding)


class _VolumePooling(nn.MaxPool2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))


_VOLUMES: dict[type[nn.Module], type[nn.Module]] = {
    Encoder: _VolumeEncoder,
    nn.Conv2d: _VolumeConvolution,
    nn.BatchNorm2d: nn.BatchNorm3d,
    nn.MaxPool2d: _VolumePooling,
}
