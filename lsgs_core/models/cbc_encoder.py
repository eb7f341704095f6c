"""The encoder of one modality in CBC and CBC-SLP: a residual network over its bands."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsgs_core.models.cbc_settings import CBCSettings


class Bottleneck(nn.Module):
    """ResNet bottleneck of 1×1, 3×3 and 1×1 convolutions; [N, inputs, h, w] to [N, width, ...]."""

    def __init__(self, inputs: int, width: int, stride: int = 1, project: bool = False) -> None:
        super().__init__()
        middle = width // 4
        self.conv1 = nn.Conv2d(inputs, middle, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, width, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if project:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        out = F.relu(self.norm1(self.conv1(x)))
        out = F.relu(self.norm2(self.conv2(out)))
        return F.relu(self.norm3(self.conv3(out)) + self.shortcut(x))


class Encoder(nn.Module):
    """Features x1…x4 and x6 of the D bands of one modality.

    The bands are the depth of a one-channel volume. Only the stem's kernel spans depth, and only
    by one band to each side, so every layer is a 2-D convolution over B·D images: the stem reads
    each band with its two neighbours as three channels, which is its 3×7×7 kernel exactly.
    """

    def __init__(self, settings: CBCSettings) -> None:
        super().__init__()
        self.grid = settings.latent_grid
        self.stem = nn.Conv2d(3, settings.stem_width, 7, stride=2, padding=3, bias=False)
        self.stem_norm = nn.BatchNorm2d(settings.stem_width)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        widths = (settings.stem_width, *settings.stage_widths)
        self.stages = nn.ModuleDict()
        self.reduce = nn.ModuleDict()
        for level, (width, reduced) in enumerate(
            zip(widths, settings.reduced_channels, strict=True), 1
        ):
            self.reduce[f"level{level}"] = nn.Conv2d(width, reduced, 1)
            if level > 1:
                first = Bottleneck(widths[level - 2], width, 1 if level == 2 else 2, project=True)
                rest = (
                    Bottleneck(width, width) for _ in range(settings.stage_blocks[level - 2] - 1)
                )
                self.stages[f"level{level}"] = nn.Sequential(first, *rest)
        self.merge = nn.Conv3d(sum(settings.reduced_channels), settings.latent_channels, 1)

    def forward(self, bands: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return [x1, x2, x3, x4], each [B, c, D, h, w], and x6 [B, C, d, h, w] on the grid."""
        batch = len(bands)
        padded = F.pad(bands, (0, 0, 0, 0, 1, 1))  # (B, D + 2, H, W)
        neighbours = torch.stack((padded[:, :-2], padded[:, 1:-1], padded[:, 2:]), dim=2)
        # Channels last is a third faster here on a CPU, in the pooling and the normalisations.
        x = neighbours.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        x = self.stem(x)  # (B·D, c, H/2, W/2)
        x = self.pool(self.stem_norm(F.relu(x)))
        levels = [self.reduce["level1"](x)]
        for name, stage in self.stages.items():
            x = stage(x)
            levels.append(self.reduce[name](x))
        # (B·D, c, h, w) -> (B, c, D, h, w)
        volumes = [level.unflatten(0, (batch, -1)).transpose(1, 2) for level in levels]
        resized = [
            F.interpolate(volume, self.grid, mode="trilinear", align_corners=True)
            for volume in volumes
        ]
        return volumes[:4], self.merge(torch.cat(resized, dim=1))
