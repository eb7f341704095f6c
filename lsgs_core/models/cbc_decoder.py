"""The volume decoder of CBC and CBC-SLP, and the convolution unit that it is made of."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsgs_core.models.cbc_settings import CBCSettings


class Unit(nn.Module):
    """Convolution, ReLU, instance normalisation; [B, inputs, d, h, w] to [B, outputs, d, h, w]."""

    def __init__(self, inputs: int, outputs: int, kernel: int, replicate: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv3d(
            inputs,
            outputs,
            kernel,
            padding=kernel // 2,
            padding_mode="replicate" if replicate else "zeros",
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
        self.enlarge = Unit(inputs, carried, 3, replicate=True)
        self.join = Unit(skip + carried, outputs, 3, replicate=True)
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
        settings: Sizes, of which one decoder level for each of `decoder_depths`.
        modalities: M, how many modalities the latent and the fused levels hold.
        outputs: Channels of the result, heads × classes.
    """

    def __init__(self, settings: CBCSettings, modalities: int, outputs: int) -> None:
        super().__init__()
        self.depths = settings.decoder_depths
        channels, latent_channels = settings.decoder_channels, settings.latent_channels * modalities
        self.refine = Refinement(latent_channels)
        self.reduce = nn.Conv3d(latent_channels, channels[0], 1)
        self.levels = nn.ModuleDict()
        for index in range(len(self.depths)):
            level, inputs, width = 4 - index, channels[index], channels[index + 1]
            skip = settings.reduced_channels[level - 1] * modalities
            # Only the first level keeps its width while it enlarges.
            carried = inputs if index == 0 else width
            self.levels[f"level{level}"] = DecoderLevel(inputs, carried, skip, width)
        self.head = nn.Conv3d(channels[len(self.depths)], outputs, 1)

    def forward(self, latent: Tensor, skips: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Return logits [B, outputs, H, W] from a latent [B, C, d, h, w].

        The skips are the fused levels from 4 down, [B, c, D, h, w]; the size is H and W.
        """
        x = self.reduce(self.refine(latent))
        for level, skip, depth in zip(self.levels.values(), skips, self.depths, strict=True):
            x = level(x, skip, depth)
        # With aligned corners a depth of 1 reads slice 0 alone; the paper has it so.
        x = F.interpolate(x, (1, *size), mode="trilinear", align_corners=True)
        return self.head(x).squeeze(2)
