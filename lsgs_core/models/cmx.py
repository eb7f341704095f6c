"""CMX as the paper uses it: two convolutional streams, rectified and fused after each stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsgs_core.errors import InputError
from lsgs_core.models.backbone import Backbone, Images

STREAMS = (slice(0, 1), slice(1, None))  # which modalities go into which stream


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


class FusionStream(nn.Module):
    """One stream of the fusion, over tokens [B, N, C]."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.split = nn.Linear(channels, 2 * channels)
        self.key_value = nn.Linear(channels, 2 * channels, bias=False)
        self.end = nn.Linear(2 * channels, channels)
        self.norm = nn.LayerNorm(channels)

    def describe(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return y and u, [B, N, C] each, and the context [B, heads, C/heads, C/heads]."""
        y, u = F.relu(self.split(x)).chunk(2, dim=2)
        # (B, N, 2C) -> 2 × (B, heads, N, C / heads)
        key, value = self.key_value(u).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        context = key.transpose(2, 3) @ value * key.shape[3] ** -0.5
        return y, u, context.softmax(dim=2)  # over the channels of the key

    def attend(self, x: Tensor, y: Tensor, u: Tensor, other_context: Tensor) -> Tensor:
        """Return the tokens [B, N, C] after attention to the other stream's context."""
        query = u.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, C / heads)
        out = (query @ other_context).transpose(1, 2).flatten(2)
        return self.norm(x + self.end(torch.cat((y, out), dim=2)))


class Fusion(nn.Module):
    """CMX's feature fusion: cross attention over channels, then one feature map of the two."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.stream1 = FusionStream(channels, heads)
        self.stream2 = FusionStream(channels, heads)
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
        size = tuple(x1.shape[2:])
        x1, x2 = (x.flatten(2).transpose(1, 2) for x in (x1, x2))  # (B, N, C)
        y1, u1, context1 = self.stream1.describe(x1)
        y2, u2, context2 = self.stream2.describe(x2)
        x1 = self.stream1.attend(x1, y1, u1, context2)
        x2 = self.stream2.attend(x2, y2, u2, context1)
        both = torch.cat((x1, x2), dim=2).transpose(1, 2).unflatten(2, size)  # (B, 2C, h, w)
        return self.norm(self.residual(both) + self.merge(both))


class CMXDecoder(nn.Module):
    """Four fused levels to logits [B, outputs, h, w] at the size of the first level."""

    def __init__(self, widths: Sequence[int], width: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.project = nn.ModuleDict(
            {f"level{level}": nn.Linear(inputs, width) for level, inputs in enumerate(widths, 1)}
        )
        self.fuse = nn.Conv2d(len(widths) * width, width, 1)
        self.fuse_norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(width, outputs, 1)
        for conv in (self.fuse, self.head):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.constant_(conv.get_parameter("bias"), 0.0)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Return the logits; levels are [B, C_i, h_i, w_i], the largest first."""
        size = levels[0].shape[2:]
        projected = []
        for project, level in zip(self.project.values(), levels, strict=True):
            x = project(level.flatten(2).transpose(1, 2)).transpose(1, 2)
            x = x.unflatten(2, tuple(level.shape[2:]))
            projected.append(F.interpolate(x, size, mode="bilinear", align_corners=False))
        x = F.relu(self.fuse_norm(self.fuse(torch.cat(projected[::-1], dim=1))))
        return self.head(self.dropout(x))


class CMX(Backbone):
    """CMX with two convolutional streams: the first modality, and all others together."""

    def __init__(self, bands: Sequence[int], classes: int, settings: CMXSettings) -> None:
        super().__init__(bands, classes)
        widths = (settings.stem_width, *settings.stage_widths)
        # Up to the first rectification a stream depends on its own modalities alone.
        self.starts = nn.ModuleList(
            nn.Sequential(
                # The first modality needs no mixing when it has three bands.
                nn.Identity() if inputs is None else nn.Conv2d(inputs, 3, 1, bias=False),
                Stage(3, widths[0]),
                Stage(widths[0], widths[1]),
            )
            for inputs in (None if bands[0] == 3 else bands[0], sum(bands[1:]))
        )
        self.stages1, self.stages2 = (
            nn.ModuleDict(
                {
                    f"level{level}": Stage(a, b)
                    for level, (a, b) in enumerate(pairwise(widths[1:]), 2)
                }
            )
            for _ in STREAMS
        )
        self.rectifications = nn.ModuleList(Rectification(width) for width in widths[1:])
        self.fusions = nn.ModuleList(
            Fusion(width, settings.attention_heads) for width in widths[1:]
        )
        self.decoder = CMXDecoder(widths[1:], settings.decoder_width, classes, settings.dropout)

    def heads(self, images: Images, available: Tensor) -> Tensor:
        """Return the one output of CMX as every head, [B, heads, classes, H, W]."""
        patches = self.check(images, available)
        pairs = self._rectified(*self._streams(patches, available))
        logits = self.decoder([fuse(*pair) for fuse, pair in zip(self.fusions, pairs, strict=True)])
        size = patches[0].shape[2:]
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        return logits[:, None].expand(-1, self.head_count, -1, -1, -1)

    def latent(self, images: Images, available: Tensor) -> Tensor:
        """Return the output of the fourth fusion, [B, C, H/32, W/32]."""
        streams = self._streams(self.check(images, available), available)
        return self.fusions[3](*self._rectified(*streams)[3])

    def scenario_latents(self, images: Images, masks: Tensor) -> Tensor:
        """Return the latents [K, B, C, H/32, W/32] of K scenarios, masks bool [K, M].

        The start of a stream runs once for each state of its modalities, not once a scenario.

        Raises:
            InputError: For images or masks of another shape or dtype, or an empty scenario.
        """
        patches = self.check_images(images)
        self.check_masks(masks, "masks")
        starts: dict[tuple[int | bool, ...], Tensor] = {}
        latents = []
        for mask in masks:
            states = [(stream, *mask[part].tolist()) for stream, part in enumerate(STREAMS)]
            for state in states:
                if state not in starts:
                    starts[state] = self._start(state[0], patches, mask.expand(len(patches[0]), -1))
            streams = [starts[state] for state in states]
            latents.append(self.fusions[3](*self._rectified(*streams)[3]))
        return torch.stack(latents)

    def low_rank_layers(self) -> dict[str, nn.Module]:
        """Return every linear and convolutional layer outside the decoder."""
        return {
            name: module
            for name, module in self.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and not name.startswith("decoder.")
        }

    def _start(self, stream: int, patches: list[Tensor], available: Tensor) -> Tensor:
        """Return one stream after its first stage, [B, C, H/4, W/4]."""
        absent = ~available[:, STREAMS[stream], None, None, None]
        kept = [
            patch.masked_fill(absent[:, m], 0.0) for m, patch in enumerate(patches[STREAMS[stream]])
        ]
        return self.starts[stream](torch.cat(kept, dim=1))

    def _streams(self, patches: list[Tensor], available: Tensor) -> list[Tensor]:
        """Return both streams after their first stage."""
        return [self._start(stream, patches, available) for stream in (0, 1)]

    def _rectified(self, x1: Tensor, x2: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return both streams after the rectification of each of the four levels."""
        levels = [self.rectifications[0](x1, x2)]
        later = zip(
            self.stages1.values(), self.stages2.values(), self.rectifications[1:], strict=True
        )
        for stage1, stage2, rectify in later:
            x1, x2 = levels[-1]
            levels.append(rectify(stage1(x1), stage2(x2)))
        return levels
