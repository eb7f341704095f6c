"""The volume decoder of CBC and CBC-SLP, and the convolution unit that it is made of."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Unit(nn.Module):
    """Convolution, ReLU, instance normalisation; [B, inputs, d, h, w] to [B, outputs, d, h, w]."""

    def __init__(self, inputs: int, outputs: int, kernel: int, padding_mode: str = "zeros") -> None:
        super().__init__()
        self.conv = nn.Conv3d(
            inputs, outputs, kernel, padding=kernel // 2, padding_mode=padding_mode
        )
        self.norm = nn.InstanceNorm3d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the unit."""
        return self.norm(F.relu(self.conv(x)))


class Refinement(nn.Sequential):
    """Three units with kernels 1, 3, 1 that keep the shape [B, channels, d, h, w]."""

    def __init__(self, channels: int) -> None:
        super().__init__(*(Unit(channels, channels, kernel) for kernel in (1, 3, 1)))


class DecoderLevel(nn.Module):
    """One level: enlarge the volume, join the refined skip of that level to it."""

    def __init__(self, inputs: int, carried: int, skip: int, outputs: int) -> None:
        super().__init__()
        self.refine = Refinement(skip)
        self.enlarge = Unit(inputs, carried, 3, padding_mode="replicate")
        self.join = Unit(skip + carried, outputs, 3, padding_mode="replicate")
        self.out = Unit(outputs, outputs, 1)

    def forward(self, x: Tensor, skip: Tensor, depth: int) -> Tensor:
        """Return [B, outputs, depth, 2h, 2w] from [B, inputs, d, h, w] and a skip of any size."""
        size = (depth, 2 * x.shape[3], 2 * x.shape[4])
        x = self.enlarge(F.interpolate(x, size, mode="trilinear", align_corners=True))
        skip = F.interpolate(self.refine(skip), size, mode="nearest")
        return self.out(self.join(torch.cat((skip, x), dim=1)))


class Decoder(nn.Module):
    """From the latent and the fused levels 4, 3, … to the logits of all heads and classes.

    Args:
        latent_channels: Channels of the latent.
        skip_channels: Channels of the fused levels 1…4.
        channels: Channels of the reduced latent, then of the volume after each level.
        depths: Depth of the volume at each level; one entry is one level, from level 4 down.
        outputs: Channels of the result, heads × classes.
    """

    def __init__(
        self,
        latent_channels: int,
        skip_channels: Sequence[int],
        channels: Sequence[int],
        depths: Sequence[int],
        outputs: int,
    ) -> None:
        super().__init__()
        self.depths = tuple(depths)
        self.refine = Refinement(latent_channels)
        self.reduce = nn.Conv3d(latent_channels, channels[0], 1)
        self.levels = nn.ModuleDict()
        for index in range(len(depths)):
            level = 4 - index
            before, after = channels[index], channels[index + 1]
            # Only the first level keeps its width while it enlarges.
            carried = before if index == 0 else after
            self.levels[f"level{level}"] = DecoderLevel(
                before, carried, skip_channels[level - 1], after
            )
        self.head = nn.Conv3d(channels[len(depths)], outputs, 1)

    def forward(self, latent: Tensor, skips: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Return logits [B, outputs, H, W].

        Args:
            latent: [B, latent_channels, d, h, w].
            skips: Fused levels from 4 down, one per decoder level, each [B, c, D, h, w].
            size: H and W of the images.
        """
        x = self.reduce(self.refine(latent))
        for level, skip, depth in zip(self.levels.values(), skips, self.depths, strict=True):
            x = level(x, skip, depth)
        # With aligned corners a depth of 1 reads slice 0 alone; the paper has it so.
        x = F.interpolate(x, (1, *size), mode="trilinear", align_corners=True)
        return self.head(x).squeeze(2)
