"""CMX as the paper uses it: two convolutional streams, rectified and fused after each stage."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsgs_core.errors import InputError
from lsgs_core.models.backbone import Backbone, Images


@dataclass(frozen=True)
class CMXSettings:
    """Sizes of CMX; the defaults are the paper's.

    Attributes:
        stem_width: Channels after the stem of a stream.
        stage_widths: Channels after each of the four stages.
        attention_heads: Heads of the fusion's cross attention; they divide every stage width.
        decoder_width: Channels of the decoder.
        dropout: Rate of the decoder's channel dropout.

    Raises:
        InputError: When the entries do not fit together.
    """

    stem_width: int = 64
    stage_widths: tuple[int, ...] = (64, 128, 320, 512)
    attention_heads: int = 8
    decoder_width: int = 256
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if len(self.stage_widths) != 4 or any(w % self.attention_heads for w in self.stage_widths):
            raise InputError(
                f"stage_widths is {self.stage_widths}; expected four multiples of "
                f"attention_heads, {self.attention_heads}"
            )


class Stage(nn.Sequential):
    """Two 3×3 convolutions; [B, inputs, h, w] to [B, outputs, h/2, w/2]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )


class Rectification(nn.Module):
    """CMX's feature rectification: each stream takes from the other what both agree on."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channel_weights = nn.Sequential(
            nn.Linear(4 * channels, 4 * channels), nn.ReLU(), nn.Linear(4 * channels, 2 * channels)
        )
        self.spatial_weights = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 1), nn.ReLU(), nn.Conv2d(channels, 2, 1)
        )

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """Return both streams rectified, [B, C, h, w] each."""
        both = torch.cat((x1, x2), dim=1)
        pooled = torch.cat((both.mean(dim=(2, 3)), both.amax(dim=(2, 3))), dim=1)  # (B, 4C)
        by_channel = self.channel_weights(pooled).sigmoid()[:, :, None, None]  # (B, 2C, 1, 1)
        channel1, channel2 = by_channel.chunk(2, dim=1)
        spatial1, spatial2 = self.spatial_weights(both).sigmoid().chunk(2, dim=1)  # (B, 1, h, w)
        return x1 + 0.5 * (channel2 + spatial2) * x2, x2 + 0.5 * (channel1 + spatial1) * x1


class Fusion(nn.Module):
    """CMX's feature fusion: cross attention over channels, then one feature map of the two."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.split = nn.ModuleList(nn.Linear(channels, 2 * channels) for _ in range(2))
        self.key_value = nn.ModuleList(
            nn.Linear(channels, 2 * channels, bias=False) for _ in range(2)
        )
        self.end = nn.ModuleList(nn.Linear(2 * channels, channels) for _ in range(2))
        self.end_norm = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.residual = nn.Conv2d(2 * channels, channels, 1, bias=False)
        self.merge = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 1),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
            nn.BatchNorm2d(channels),
        )
        self.norm = nn.BatchNorm2d(channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Conv2d):
                # √(2/fan_out) with the fan_out of one group
                area = module.kernel_size[0] * module.kernel_size[1]
                fan_out = area * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=(2.0 / fan_out) ** 0.5)
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Return the fused feature [B, C, h, w] of two streams of that shape."""
        tokens = [x.flatten(2).transpose(1, 2) for x in (x1, x2)]  # (B, N, C)
        kept, crossed, contexts = [], [], []
        for split, key_value, x in zip(self.split, self.key_value, tokens, strict=True):
            y, u = F.relu(split(x)).chunk(2, dim=2)
            # (B, N, 2C) -> 2 × (B, heads, N, C / heads)
            key, value = key_value(u).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
            context = key.transpose(2, 3) @ value * key.shape[3] ** -0.5
            contexts.append(context.softmax(dim=2))  # over the key's channels
            kept.append(y)
            crossed.append(u.unflatten(2, (self.heads, -1)).transpose(1, 2))
        joined = []
        for index, x in enumerate(tokens):
            out = crossed[index] @ contexts[1 - index]  # (B, heads, N, C / heads)
            out = torch.cat((kept[index], out.transpose(1, 2).flatten(2)), dim=2)
            joined.append(self.end_norm[index](x + self.end[index](out)))
        # (B, N, 2C) -> (B, 2C, h, w)
        both = torch.cat(joined, dim=2).transpose(1, 2).unflatten(2, tuple(x1.shape[2:]))
        return self.norm(self.residual(both) + self.merge(both))


class CMXDecoder(nn.Module):
    """Four fused levels to logits [B, outputs, h, w] at the size of the first level."""

    def __init__(self, widths: Sequence[int], width: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Linear(inputs, width) for inputs in widths)
        self.fuse = nn.Sequential(
            nn.Conv2d(len(widths) * width, width, 1), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(width, outputs, 1)
        for conv in (self.fuse[0], self.head):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Return the logits; levels are [B, C_i, h_i, w_i], the largest first."""
        size = levels[0].shape[2:]
        projected = []
        for project, level in zip(self.project, levels, strict=True):
            x = project(level.flatten(2).transpose(1, 2)).transpose(1, 2)
            x = x.unflatten(2, tuple(level.shape[2:]))
            projected.append(F.interpolate(x, size, mode="bilinear", align_corners=False))
        return self.head(self.dropout(self.fuse(torch.cat(projected[::-1], dim=1))))


class CMX(Backbone):
    """CMX with two convolutional streams: the first modality, and all others together.

    Args:
        bands: Number of bands of each of the M >= 2 modalities.
        classes: Number of classes.
        settings: Sizes.

    Raises:
        InputError: For bands or classes out of range.
    """

    def __init__(self, bands: Sequence[int], classes: int, settings: CMXSettings) -> None:
        super().__init__(bands, classes)
        first = nn.Identity() if bands[0] == 3 else nn.Conv2d(bands[0], 3, 1, bias=False)
        self.mix = nn.ModuleList((first, nn.Conv2d(sum(bands[1:]), 3, 1, bias=False)))
        widths = (settings.stem_width, *settings.stage_widths)
        self.stems = nn.ModuleList(Stage(3, widths[0]) for _ in range(2))
        self.stages = nn.ModuleList(
            nn.ModuleList(Stage(a, b) for a, b in zip(widths, widths[1:], strict=False))
            for _ in range(2)
        )
        self.rectifications = nn.ModuleList(Rectification(width) for width in widths[1:])
        self.fusions = nn.ModuleList(
            Fusion(width, settings.attention_heads) for width in widths[1:]
        )
        self.decoder = CMXDecoder(widths[1:], settings.decoder_width, classes, settings.dropout)

    def heads(self, images: Images, available: Tensor) -> Tensor:
        """Return the one output of CMX as every head, [B, heads, classes, H, W]."""
        patches = self.check(images, available)
        logits = self.decoder(self._levels(*self._streams(patches, available)))
        size = patches[0].shape[2:]
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        return logits[:, None].expand(-1, self.head_count, -1, -1, -1)

    def latent(self, images: Images, available: Tensor) -> Tensor:
        """Return the output of the fourth fusion, [B, C, H/32, W/32]."""
        return self._level4(*self._streams(self.check(images, available), available))

    def scenario_latents(self, images: Images, masks: Tensor) -> Tensor:
        """Return the latents [K, B, C, H/32, W/32] of K scenarios, masks bool [K, M].

        Up to the first rectification a stream depends on its own modalities alone, so it runs
        once for each state of those: twice and 2^(M-1) times for all scenarios of M modalities.

        Raises:
            InputError: For images or masks of another shape or dtype, or an empty scenario.
        """
        patches = self.check_images(images)
        self.check_masks(masks, "masks")
        groups = ((patches[:1], masks[:, :1]), (patches[1:], masks[:, 1:]))
        outputs: list[list[Tensor]] = []
        for index, (group, states) in enumerate(groups):
            unique, which = states.unique(dim=0, return_inverse=True)
            started = [
                self._start(index, group, state.expand(len(group[0]), -1)) for state in unique
            ]
            outputs.append([started[position] for position in which.tolist()])
        return torch.stack([self._level4(x1, x2) for x1, x2 in zip(*outputs, strict=True)])

    def low_rank_layers(self) -> dict[str, nn.Module]:
        """Return every linear and convolutional layer outside the decoder."""
        return {
            name: module
            for name, module in self.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and not name.startswith("decoder.")
        }

    def _streams(self, patches: list[Tensor], available: Tensor) -> tuple[Tensor, Tensor]:
        """Return both streams after their first stage, [B, C, H/4, W/4]."""
        return (
            self._start(0, patches[:1], available[:, :1]),
            self._start(1, patches[1:], available[:, 1:]),
        )

    def _start(self, index: int, patches: list[Tensor], available: Tensor) -> Tensor:
        """Return one stream after its first stage from its modalities and their availability."""
        kept = [
            patch.masked_fill(~available[:, m, None, None, None], 0.0)
            for m, patch in enumerate(patches)
        ]
        x = self.mix[index](torch.cat(kept, dim=1))
        return self.stages[index][0](self.stems[index](x))

    def _rectified(self, x1: Tensor, x2: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return both streams after the rectification of each of the four levels."""
        levels = [self.rectifications[0](x1, x2)]
        for level in range(1, 4):
            x1, x2 = (stages[level](x) for stages, x in zip(self.stages, levels[-1], strict=True))
            levels.append(self.rectifications[level](x1, x2))
        return levels

    def _levels(self, x1: Tensor, x2: Tensor) -> list[Tensor]:
        """Return the fused feature of every level, the largest first."""
        pairs = self._rectified(x1, x2)
        return [fusion(*pair) for fusion, pair in zip(self.fusions, pairs, strict=True)]

    def _level4(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Return the fused feature of the fourth level alone."""
        return self.fusions[3](*self._rectified(x1, x2)[3])
