"""CBC and CBC-SLP (arXiv 2604.15856): per-modality encoders, a shared latent, a volume decoder."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsgs_core.errors import InputError
from lsgs_core.models.backbone import Backbone, Images, zero_absent


@dataclass(frozen=True)
class CBCSettings:
    """Sizes of CBC and CBC-SLP; the defaults are the paper's."""

    private_branches: bool = True  # CBC-SLP has them, CBC not
    stem_width: int = 64  # encoder channels after the stem
    stage_widths: tuple[int, ...] = (256, 512, 1024, 2048)  # and after each of the four stages
    stage_blocks: tuple[int, ...] = (3, 4, 6, 3)  # bottlenecks in each stage
    reduced_channels: tuple[int, ...] = (8, 16, 32, 64, 64)  # of a modality at levels 1…5
    latent_channels: int = 64  # per modality, of level 6 and of the shared latent; even
    latent_grid: tuple[int, ...] = (8, 8, 8)  # depth, height and width of the latent
    token_width: int = 512  # of the transformer tokens; a multiple of the heads
    attention_heads: int = 8
    feed_forward_width: int = 512  # hidden width of the feed-forward layers
    dropout: float = 0.1  # after the attention's projection and in the feed-forward layers
    attention_dropout: float = 0.1  # on the attention weights
    decoder_channels: tuple[int, ...] = (128, 64, 32, 16, 8)  # reduced latent, then each level
    decoder_depths: tuple[int, ...] = (16, 32, 64, 128)  # of the volume at each of 1 to 4 levels

    def __post_init__(self) -> None:
        levels, blocks = len(self.decoder_depths), self.stage_blocks
        right = len(blocks) == 4 and sum(blocks) <= 256
        rules = {
            "stage_widths": (len(self.stage_widths) == 4, "four numbers"),
            "stage_blocks": (right, "four numbers with a sum up to 256"),
            "reduced_channels": (len(self.reduced_channels) == 5, "five numbers"),
            "latent_channels": (self.latent_channels % 2 == 0, "an even number"),
            "latent_grid": (len(self.latent_grid) == 3, "three numbers"),
            "token_width": (self.token_width % self.attention_heads == 0, "a multiple of heads"),
            "decoder_depths": (1 <= levels <= 4, "one to four numbers"),
            "decoder_channels": (len(self.decoder_channels) > levels, f"over {levels} numbers"),
        }
        for field, (is_right, expected) in rules.items():
            if not is_right:
                raise InputError(f"{field}: expected {expected}, found {getattr(self, field)}")


# "demo" is for patches of 64×64 pixels on a CPU; its decoder's volume stops at half the patch. The
# depth is never 1: the last instance normalisation gives every channel a mean of 0 over the volume,
# so that only a second slice lets the slice that is read be all forest or none.
CBC_SLP_PRESETS = {
    "paper": CBCSettings(),
    "demo": CBCSettings(
        stem_width=8,
        stage_widths=(32, 32, 48, 64),
        stage_blocks=(1, 1, 1, 1),
        reduced_channels=(4, 8, 8, 8, 8),
        latent_channels=16,
        latent_grid=(2, 4, 4),
        token_width=64,
        attention_heads=4,
        feed_forward_width=128,
        dropout=0.0,
        attention_dropout=0.0,
        decoder_channels=(32, 24, 16, 12),
        decoder_depths=(2, 2, 2),
    ),
}
CBC_PRESETS = {
    name: replace(settings, private_branches=False) for name, settings in CBC_SLP_PRESETS.items()
}


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution without bias that keeps the size at stride 1, and its BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Bottleneck(nn.Module):
    """ResNet bottleneck of 1×1, 3×3 and 1×1 convolutions; [N, inputs, h, w] to [N, width, ...]."""

    def __init__(self, inputs: int, width: int, stride: int = 1, project: bool = False) -> None:
        super().__init__()
        self.part1 = conv_norm(inputs, width // 4, 1)
        self.part2 = conv_norm(width // 4, width // 4, 3, stride)
        self.part3 = conv_norm(width // 4, width, 1)
        self.shortcut = conv_norm(inputs, width, 1, stride) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        out = F.relu(self.part1(x), inplace=True)
        out = F.relu(self.part2(out), inplace=True)
        return F.relu(self.part3(out) + self.shortcut(x), inplace=True)


class Encoder(nn.Module):
    """Features x1…x4 and x6 of the D bands of one modality.

    The bands are the depth of a volume with one channel. Only the stem's kernel spans depth, by one
    band to each side. Every layer is therefore a 2-D convolution over B·D images: the stem reads
    each band and its two neighbours as three channels, which equals its 3×7×7 kernel.
    """

    def __init__(self, settings: CBCSettings) -> None:
        super().__init__()
        self.grid = settings.latent_grid
        widths = (settings.stem_width, *settings.stage_widths)
        stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 7, stride=2, padding=3, bias=False),
            nn.ReLU(inplace=True),
            nn.BatchNorm2d(widths[0]),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.stages = nn.ModuleDict({"level1": stem})
        for index, (inputs, width) in enumerate(pairwise(widths)):
            first = Bottleneck(inputs, width, stride=2 if index else 1, project=True)
            rest = (Bottleneck(width, width) for _ in range(settings.stage_blocks[index] - 1))
            self.stages[f"level{index + 2}"] = nn.Sequential(first, *rest)
        sizes = zip(self.stages, widths, settings.reduced_channels, strict=True)
        self.reduce = nn.ModuleDict({level: nn.Conv2d(a, b, 1) for level, a, b in sizes})
        self.merge = nn.Conv3d(sum(settings.reduced_channels), settings.latent_channels, 1)

    def forward(self, bands: Tensor) -> list[Tensor]:
        """Return x1, x2, x3, x4, each [B, c, D, h, w], and x6 [B, C, d, h, w] on the grid."""
        padded = F.pad(bands, (0, 0, 0, 0, 1, 1))  # (B, D + 2, H, W)
        neighbours = torch.stack((padded[:, :-2], padded[:, 1:-1], padded[:, 2:]), dim=2)
        # Channels last is a third faster here on a CPU, in the pooling and the normalisations.
        x = neighbours.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        levels, resized = [], []
        for stage, reduce in zip(self.stages.values(), self.reduce.values(), strict=True):
            x = stage(x)
            # (B·D, c, h, w) -> (B, c, D, h, w)
            level = reduce(x).unflatten(0, bands.shape[:2]).transpose(1, 2)
            levels.append(level)
            resized.append(F.interpolate(level, self.grid, mode="trilinear", align_corners=True))
        return [*levels[:4], self.merge(torch.cat(resized, dim=1))]


class TransformerBlock(nn.Module):
    """Pre-norm transformer block over tokens [B, N, T]."""

    def __init__(self, settings: CBCSettings) -> None:
        super().__init__()
        width, hidden, rate = settings.token_width, settings.feed_forward_width, settings.dropout
        self.heads = settings.attention_heads
        self.attention_dropout = settings.attention_dropout
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(rate)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Dropout(rate),
            nn.Linear(hidden, width),
            nn.Dropout(rate),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        # (B, N, 3T) -> 3 × (B, heads, N, T / heads)
        qkv = self.qkv(self.attention_norm(x)).unflatten(2, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        out = self.attend(query, key, value, self.attention_dropout if self.training else 0.0)
        out = self.proj(out.transpose(1, 2).flatten(2))
        # The published block drops twice: after the projection and again before the residual.
        x = x + self.dropout(self.dropout(out))
        return x + self.ffn(self.ffn_norm(x))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rate: float) -> Tensor:
        """Return the attention over heads, [B, heads, N, T / heads], all three of that shape."""
        return F.scaled_dot_product_attention(query, key, value, dropout_p=rate)


class Unit(nn.Module):
    """Convolution, ReLU, instance normalisation; [B, inputs, d, h, w] to [B, outputs, d, h, w]."""

    def __init__(self, inputs: int, outputs: int, kernel: int, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, kernel, padding=kernel // 2, **options)
        self.norm = nn.InstanceNorm3d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the unit."""
        out = self.norm(F.relu(self.conv(x)))
        if out.requires_grad:
            # PyTorch (2.13, CPU) misreads the channels-last gradient of a single sample here.
            out.register_hook(lambda gradient: gradient.contiguous())
        return out


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
    """From the latent and the fused levels 4, 3, … of M modalities to `outputs` channels."""

    def __init__(self, settings: CBCSettings, modalities: int, outputs: int) -> None:
        super().__init__()
        self.depths = settings.decoder_depths
        channels = settings.decoder_channels[: len(self.depths) + 1]
        latent_channels = settings.latent_channels * modalities
        self.refine = Refinement(latent_channels)
        self.reduce = nn.Conv3d(latent_channels, channels[0], 1)
        self.levels = nn.ModuleDict()
        for index, (inputs, width) in enumerate(pairwise(channels)):
            skip = settings.reduced_channels[3 - index] * modalities
            # Only the first level keeps its width while it enlarges.
            carried = inputs if index == 0 else width
            self.levels[f"level{4 - index}"] = DecoderLevel(inputs, carried, skip, width)
        self.head = nn.Conv3d(channels[-1], outputs, 1)

    def forward(self, latent: Tensor, skips: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Return logits [B, outputs, H, W] from a latent [B, C, d, h, w].

        The skips are the fused levels from 4 down, [B, c, D, h, w]; the size is H and W.
        """
        x = self.reduce(self.refine(latent))
        for level, skip, depth in zip(self.levels.values(), skips, self.depths, strict=True):
            x = level(x, skip, depth)
        # With aligned corners, a depth of 1 reads slice 0 alone, as in the paper.
        x = F.interpolate(x, (1, *size), mode="trilinear", align_corners=True)
        return self.head(x).squeeze(2)


class PointConv(nn.Linear):
    """A 1×1×1 convolution over the latent grid, as the linear layer over tokens that it is."""


def _tokens(volume: Tensor) -> Tensor:
    """Flatten [B, C, d, h, w] to tokens [B, N, C] in (d, h, w) order."""
    return volume.flatten(2).transpose(1, 2)


class CBC(Backbone):
    """CBC, and CBC-SLP with its private branches; the paper has M = D = 3.

    The bands of a modality are repeated cyclically up to the largest number of bands.
    """

    def __init__(self, bands: Sequence[int], classes: int, settings: CBCSettings) -> None:
        super().__init__(bands, classes, settings)
        count, width = len(bands), settings.token_width
        channels = (*settings.reduced_channels, settings.latent_channels)  # of levels 1…6
        latent = channels[-1] * count
        # Level 5 is never used, and the lowest levels only by a decoder with as many levels.
        self.skip_levels = (4, 3, 2, 1)[: len(settings.decoder_depths)]
        self.encoders = nn.ModuleList(Encoder(settings) for _ in bands)
        fused = {level: channels[level - 1] * count for level in (*self.skip_levels, 6)}
        units = {f"level{level}": Unit(size, size, 1) for level, size in fused.items()}
        self.fusions = nn.ModuleDict(units)
        # One per modality, and the last one for the fused level 6.
        inputs = [channels[-1]] * count + [latent]
        self.tokenizers = nn.ModuleList(PointConv(one, width) for one in inputs)
        zeros = torch.zeros(1, math.prod(settings.latent_grid), width)
        self.positions = nn.ParameterList(zeros.clone() for _ in self.tokenizers)
        self.blocks = nn.ModuleList(TransformerBlock(settings) for _ in bands)
        self.between = nn.ModuleList(PointConv(width, 3 * width) for _ in bands)
        self.multimodal = TransformerBlock(settings)
        self.to_latent = PointConv((count + 1) * width, latent)
        if settings.private_branches:
            half = settings.latent_channels // 2
            self.to_shared = PointConv(latent, half * count)
            self.to_private = nn.ModuleList(PointConv(width, half) for _ in bands)
        self.decoder = Decoder(settings, count, self.head_count * classes)
        for module in self.modules():
            if isinstance(module, PointConv | nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def heads(self, images: Images, available: Tensor) -> Tensor:
        """Return the logits of all heads, [B, heads, classes, H, W]."""
        patches = self.check(images, available)
        *skips, x6 = self._encode(patches)
        x6 = zero_absent(x6, available)
        shared = self._share(x6, *self._states(x6), available)
        return self._decode(*shared, skips, available, patches[0].shape[2:])

    def latent(self, images: Images, available: Tensor) -> Tensor:
        """Return the shared latent [B, C·M, d, h, w], the same for CBC and CBC-SLP."""
        x6 = zero_absent(self._encode(self.check(images, available))[-1], available)
        return self._volume(self._share(x6, *self._states(x6), available)[0])

    def scenario_latents(self, images: Images, masks: Tensor) -> Tensor:
        """Return the latents [K, B, C·M, d, h, w] of K scenarios, masks bool [K, M].

        Each modality is encoded once and passes its transformer block once for each of its two
        states; the absent state is equal for all images.
        """
        x6 = self._encode(self.check(images, masks, scenarios=True))[-1]
        return torch.stack([self._volume(latent) for latent, _ in self._share_each(x6, masks)])

    def scenario_logits(self, images: Images, masks: Tensor) -> Iterator[Tensor]:
        """Yield the logits of head 0, [B, classes, H, W]; as above until the decoder."""
        patches = self.check(images, masks, scenarios=True)
        *skips, x6 = self._encode(patches)
        for mask, shared in zip(masks, self._share_each(x6, masks), strict=True):
            available = mask.expand(len(x6), -1)
            yield self._decode(*shared, skips, available, patches[0].shape[2:])[:, 0]

    def low_rank_layers(self) -> dict[str, nn.Module]:
        """Return the multimodal transformer's two projections and the early fusions."""
        names = ["multimodal.qkv", "multimodal.proj"]
        names += [f"fusions.{level}.conv" for level in self.fusions]
        return {name: self.get_submodule(name) for name in names}

    def _encode(self, patches: list[Tensor]) -> list[Tensor]:
        """Return x1…x4, each [B, M, c, D, h, w], and x6 [B, M, C, d, h, w], nothing masked."""
        encoded = []
        for encoder, patch in zip(self.encoders, patches, strict=True):
            bands = [index % patch.shape[1] for index in range(max(self.bands))]
            encoded.append(encoder(patch[:, bands] if len(bands) > patch.shape[1] else patch))
        return [torch.stack(level, dim=1) for level in zip(*encoded, strict=True)]

    def _states(self, x6: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens [B, M, N, T] and queries, keys, values [B, M, N, 3T] of masked x6."""
        all_tokens, all_qkv = [], []
        for m, block in enumerate(self.blocks):
            tokens = self.tokenizers[m](_tokens(x6[:, m]))
            all_tokens.append(tokens)
            all_qkv.append(self.between[m](block(tokens + self.positions[m])))
        return torch.stack(all_tokens, dim=1), torch.stack(all_qkv, dim=1)

    def _share(
        self, x6: Tensor, tokens: Tensor, qkv: Tensor, available: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the shared latent [B, N, C·M] and the correlated tokens [B, M, N, T]."""
        query, key, value = qkv.chunk(3, dim=-1)
        # What is absent in every sample is set to zero in the end and not computed.
        present = available.any(dim=0).nonzero().flatten()
        # Element by element: modality m (axis 1) weighs every modality j (axis 2).
        logits = query[:, present, None] * (key[:, None] / math.sqrt(len(self.bands)))
        weighed = (logits.softmax(dim=2) * value[:, None]).sum(dim=2)
        correlated = torch.zeros_like(value, dtype=weighed.dtype).index_copy(1, present, weighed)
        correlated = zero_absent(correlated, available)
        fused = self.tokenizers[-1](_tokens(self.fusions["level6"](x6.flatten(1, 2))))
        sequence = torch.cat(((tokens + correlated).flatten(1, 2), fused), dim=1)
        out = self.multimodal(sequence + torch.cat(tuple(self.positions), dim=1))
        # M + 1 consecutive tokens form one cell: mmFormer's order, kept for the checkpoints.
        cells = out.reshape(len(out), -1, self.to_latent.in_features)
        return self.to_latent(cells), correlated

    def _share_each(self, x6: Tensor, masks: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the results of `_share` for the scenarios, masks bool [K, M], one by one."""
        present = self._states(x6)
        absent = self._states(torch.zeros_like(x6[:1]))
        for mask in masks:
            chosen = mask[None, :, None, None]
            tokens, qkv = (torch.where(chosen, *pair) for pair in zip(present, absent, strict=True))
            available = mask.expand(len(x6), -1)
            yield self._share(zero_absent(x6, available), tokens, qkv, available)

    def _decode(
        self,
        latent: Tensor,
        correlated: Tensor,
        skips: list[Tensor],
        available: Tensor,
        size: Sequence[int],
    ) -> Tensor:
        """Return the logits of all heads, [B, heads, classes, H, W].

        The shared latent [B, N, C·M] and the correlated tokens [B, M, N, T] are those of `_share`,
        the skips x1…x4 of `_encode`, nothing masked. The size is H and W.
        """
        if self.settings.private_branches:
            states = zip(self.to_private, correlated.unbind(1), available.unbind(1), strict=True)
            private = [zero_absent(layer(tokens), there) for layer, tokens, there in states]
            latent = torch.cat((self.to_shared(latent), *private), dim=2)
        fused = []
        for level in self.skip_levels:
            skip = zero_absent(skips[level - 1], available).flatten(1, 2)
            fused.append(self.fusions[f"level{level}"](skip))
        logits = self.decoder(self._volume(latent), fused, tuple(size))
        return logits.unflatten(1, (self.head_count, self.classes))

    def _volume(self, tokens: Tensor) -> Tensor:
        """Put tokens [B, N, C] back on the grid, [B, C, d, h, w]."""
        return tokens.transpose(1, 2).unflatten(2, self.settings.latent_grid)
