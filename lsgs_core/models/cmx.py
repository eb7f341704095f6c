"""CMX as in the paper: two convolutional streams that are rectified and fused after each stage."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsgs_core.errors import InputError
from lsgs_core.models.backbone import Backbone, Images, zero_absent

STREAMS = (slice(0, 1), slice(1, None))  # the modalities of each stream


@dataclass(frozen=True)
class CMXSettings:
    """Sizes of CMX; the defaults are the paper's."""

    stem_width: int = 64  # channels after the stem of a stream
    stage_widths: tuple[int, ...] = (64, 128, 320, 512)  # and after each of the four stages
    attention_heads: int = 8  # of the fusion's cross attention; they divide every stage width
    decoder_width: int = 256
    dropout: float = 0.1  # rate of the decoder's channel dropout

    def __post_init__(self) -> None:
        widths, heads = self.stage_widths, self.attention_heads
        if len(widths) != 4 or any(width % heads for width in widths):
            expected = f"four multiples of attention_heads ({heads})"
            raise InputError.of("stage_widths", expected, widths)


CMX_PRESETS = {
    "paper": CMXSettings(),
    "demo": CMXSettings(  # for 64×64 patches on a CPU
        stem_width=16,
        stage_widths=(24, 32, 64, 96),
        attention_heads=4,
        decoder_width=48,
    ),
}


class Stage(nn.Sequential):
    """Two 3×3 convolutions; [B, inputs, h, w] to [B, outputs, h/2, w/2]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class Rectification(nn.Module):
    """CMX's feature rectification: each stream adds weighted features of the other."""

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
        return (
            torch.addcmul(x1, channel2 + spatial2, x2, value=0.5),
            torch.addcmul(x2, channel1 + spatial1, x1, value=0.5),
        )


class FusionStream(nn.Module):
    """One stream of the fusion, over tokens [B, N, C]."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.channel_proj = nn.Linear(channels, 2 * channels)
        self.kv = nn.Linear(channels, 2 * channels, bias=False)
        self.end_proj = nn.Linear(2 * channels, channels)
        self.norm = nn.LayerNorm(channels)

    def describe(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return y and u, [B, N, C] each, and the context [B, heads, C/heads, C/heads]."""
        y, u = F.relu(self.channel_proj(x)).chunk(2, dim=2)
        # (B, N, 2C) -> 2 × (B, heads, N, C / heads)
        key, value = self.kv(u).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        context = key.transpose(2, 3) @ value * key.shape[3] ** -0.5
        return y, u, context.softmax(dim=2)  # over the channels of the key

    def attend(self, x: Tensor, y: Tensor, u: Tensor, other_context: Tensor) -> Tensor:
        """Return the tokens [B, N, C] after attention to the other stream's context."""
        query = u.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, C / heads)
        out = (query @ other_context).transpose(1, 2).flatten(2)
        return self.norm(x + self.end_proj(torch.cat((y, out), dim=2)))


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
                fan_out = module.weight[:, 0].numel() / module.groups  # of one group
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
        layers = {f"level{n}": nn.Linear(inputs, width) for n, inputs in enumerate(widths, 1)}
        self.project = nn.ModuleDict(layers)
        self.fuse = nn.Conv2d(len(widths) * width, width, 1)
        self.fuse_norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(width, outputs, 1)
        for conv in (self.fuse, self.head):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.get_parameter("bias"))

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Return the logits; levels are [B, C_i, h_i, w_i], the largest first."""
        size = levels[0].shape[2:]
        projected = []
        for project, level in zip(self.project.values(), levels, strict=True):
            x = project(level.movedim(1, 3)).movedim(3, 1)
            projected.append(F.interpolate(x, size, mode="bilinear", align_corners=False))
        x = F.relu(self.fuse_norm(self.fuse(torch.cat(projected[::-1], dim=1))))
        return self.head(self.dropout(x))


class ScoringDecoder(CMXDecoder):
    """The decoder with the same results up to rounding and an eighth of the multiplications.

    Projection, resizing and fusion are linear, so that each level is fused before it is enlarged.
    """

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Return the logits as `CMXDecoder.forward` does, in evaluation mode."""
        size = levels[0].shape[2:]
        weights = reversed(self.fuse.weight.flatten(1).chunk(len(levels), dim=1))
        x = self.fuse.get_parameter("bias")[:, None, None]
        for project, weight, level in zip(self.project.values(), weights, levels, strict=True):
            matrix, bias = (weight @ project.get_parameter(name) for name in ("weight", "bias"))
            fused = F.linear(level.movedim(1, 3), matrix, bias).movedim(3, 1)
            x = x + F.interpolate(fused, size, mode="bilinear", align_corners=False)
        return self.head(F.relu(self.fuse_norm(x)))


class CMX(Backbone):
    """CMX with two convolutional streams: the first modality, and all others together."""

    def __init__(self, bands: Sequence[int], classes: int, settings: CMXSettings) -> None:
        super().__init__(bands, classes, settings)
        stem, *widths = settings.stem_width, *settings.stage_widths
        # A first modality with three bands needs no mixing.
        mixing = [
            nn.Identity() if bands[0] == 3 else nn.Conv2d(bands[0], 3, 1, bias=False),
            nn.Conv2d(sum(bands[1:]), 3, 1, bias=False),
        ]
        # Until the first rectification, a stream depends on its own modalities alone.
        self.starts = nn.ModuleList(
            nn.Sequential(mix, Stage(3, stem), Stage(stem, widths[0])) for mix in mixing
        )
        self.stages = nn.ModuleDict()
        for level, sizes in enumerate(pairwise(widths), 2):
            self.stages[f"level{level}"] = nn.ModuleList(Stage(*sizes) for _ in STREAMS)
        self.rectifications = nn.ModuleList(Rectification(width) for width in widths)
        self.fusions = nn.ModuleList(Fusion(width, settings.attention_heads) for width in widths)
        self.decoder = CMXDecoder(widths, settings.decoder_width, classes, settings.dropout)

    def heads(self, images: Images, available: Tensor) -> Tensor:
        """Return the one output of CMX as every head, [B, heads, classes, H, W]."""
        patches = self.check(images, available)
        logits = self._decode(self._levels(patches, available), patches[0].shape[2:])
        return logits[:, None].expand(-1, self.head_count, -1, -1, -1)

    def latent(self, images: Images, available: Tensor) -> Tensor:
        """Return the output of the fourth fusion, [B, C, H/32, W/32]."""
        patches = self.check(images, available)
        return self.fusions[-1](*self._levels(patches, available)[-1])

    def scenario_latents(self, images: Images, masks: Tensor) -> Tensor:
        """Return the latents [K, B, C, H/32, W/32] of K scenarios, masks bool [K, M].

        The start of a stream runs once for each state of its modalities (for one image where none
        is available, because all images are then equal); after it, the scenarios form the batch.
        """
        latent = self.fusions[-1](*self._scenario_levels(images, masks)[-1])
        return latent.unflatten(0, (len(masks), -1))

    def scenario_logits(self, images: Images, masks: Tensor) -> Iterator[Tensor]:
        """Yield the logits [B, classes, H, W] of K scenarios; as above until the fusions."""
        levels = self._scenario_levels(images, masks)
        split = [zip(*(x.chunk(len(masks)) for x in level), strict=True) for level in levels]
        for of_scenario in zip(*split, strict=True):
            yield self._decode(of_scenario, images[0].shape[-2:])

    def _scenario_levels(self, images: Images, masks: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the result of `_levels` for all scenarios, each stream [K · B, C, h, w]."""
        patches = self.check(images, masks, scenarios=True)
        batch = len(patches[0])
        streams = []
        for stream, part in enumerate(STREAMS):
            states, indices = masks[:, part].unique(dim=0, return_inverse=True)
            starts = []
            for state in states:
                inputs = patches if bool(state.any()) else [patch[:1] for patch in patches]
                start = self._start(stream, inputs, state.expand(len(inputs[0]), -1))
                starts.append(start.expand(batch, -1, -1, -1))
            streams.append(torch.cat([starts[index] for index in indices.tolist()]))
        return self._rectify(*streams)

    def _decode(self, levels: Sequence[Sequence[Tensor]], size: Sequence[int]) -> Tensor:
        """Return the logits [B, classes, *size] from both rectified streams of each level."""
        fused = [fuse(*level) for fuse, level in zip(self.fusions, levels, strict=True)]
        return F.interpolate(self.decoder(fused), size, mode="bilinear", align_corners=False)

    def for_scoring(self) -> Self:
        """Return a copy in evaluation mode that computes faster, its decoder included."""
        faster = super().for_scoring()
        faster.decoder.__class__ = ScoringDecoder
        return faster

    def low_rank_layers(self) -> dict[str, nn.Module]:
        """Return every linear and convolutional layer outside the decoder."""
        kinds = nn.Linear | nn.Conv2d
        layers = {name: layer for name, layer in self.named_modules() if isinstance(layer, kinds)}
        return {name: layer for name, layer in layers.items() if not name.startswith("decoder.")}

    def _start(self, stream: int, patches: list[Tensor], available: Tensor) -> Tensor:
        """Return one stream, [B, C, H/4, W/4]; `available` is that of its own modalities."""
        pairs = zip(patches[STREAMS[stream]], available.unbind(1), strict=True)
        return self.starts[stream](torch.cat([zero_absent(*pair) for pair in pairs], dim=1))

    def _levels(self, patches: list[Tensor], available: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return both streams after the rectification of each of the four levels."""
        x1, x2 = (self._start(i, patches, available[:, part]) for i, part in enumerate(STREAMS))
        return self._rectify(x1, x2)

    def _rectify(self, x1: Tensor, x2: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return both streams after each rectification, from their starts."""
        levels = [self.rectifications[0](x1, x2)]
        for stages, rectify in zip(self.stages.values(), self.rectifications[1:], strict=True):
            pairs = zip(stages.children(), levels[-1], strict=True)
            levels.append(rectify(*(stage(x) for stage, x in pairs)))
        return levels
