"""CBC and CBC-SLP (arXiv 2604.15856): per-modality encoders, a shared latent, a volume decoder."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lsgs_core.models.backbone import Backbone, Images, zero_absent
from lsgs_core.models.cbc_layers import CBCSettings, Decoder, Encoder, TransformerBlock, Unit


class PointConv(nn.Linear):
    """A 1×1×1 convolution over the latent grid, as the linear layer over tokens that it is."""


def _tokens(volume: Tensor) -> Tensor:
    """Flatten [B, C, d, h, w] to tokens [B, N, C] in (d, h, w) order."""
    return volume.flatten(2).transpose(1, 2)


class CBC(Backbone):
    """CBC, and CBC-SLP with its private branches; the paper's shape at M = D = 3.

    The bands of a modality are repeated cyclically up to the largest band count.
    """

    def __init__(self, bands: Sequence[int], classes: int, settings: CBCSettings) -> None:
        super().__init__(bands, classes)
        self.settings = settings
        count, width = len(bands), settings.token_width
        channels = (*settings.reduced_channels, settings.latent_channels)  # of levels 1…6
        latent = channels[-1] * count
        # Level 5 is never used, and the lowest levels only by a decoder that goes so far.
        self.skip_levels = (4, 3, 2, 1)[: len(settings.decoder_depths)]
        self.encoders = nn.ModuleList(Encoder(settings) for _ in bands)
        self.fusions = nn.ModuleDict()
        for level in (*self.skip_levels, 6):
            fused = channels[level - 1] * count
            self.fusions[f"level{level}"] = Unit(fused, fused, 1)
        # One for each modality, and the last for the fused level 6.
        self.tokenizers = nn.ModuleList(
            PointConv(inputs, width) for inputs in [channels[-1]] * count + [latent]
        )
        self.positions = nn.ParameterList(
            torch.zeros(1, math.prod(settings.latent_grid), width) for _ in self.tokenizers
        )
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
        latent, correlated = self._share(x6, *self._states(x6), available)
        if self.settings.private_branches:
            private = [
                zero_absent(layer(correlated[:, m]), available[:, m])
                for m, layer in enumerate(self.to_private)
            ]
            latent = torch.cat((self.to_shared(latent), *private), dim=2)
        fused = [
            self.fusions[f"level{level}"](zero_absent(skips[level - 1], available).flatten(1, 2))
            for level in self.skip_levels
        ]
        logits = self.decoder(self._volume(latent), fused, tuple(patches[0].shape[2:]))
        return logits.unflatten(1, (self.head_count, self.classes))

    def latent(self, images: Images, available: Tensor) -> Tensor:
        """Return the shared latent [B, C·M, d, h, w], the same for CBC and CBC-SLP."""
        x6 = zero_absent(self._encode(self.check(images, available))[-1], available)
        return self._volume(self._share(x6, *self._states(x6), available)[0])

    def scenario_latents(self, images: Images, masks: Tensor) -> Tensor:
        """Return the latents [K, B, C·M, d, h, w] of K scenarios, masks bool [K, M].

        Each modality is encoded once, and goes through its transformer block once for each of
        its two states; the absent state is the same for every image.
        """
        x6 = self._encode(self.check(images, masks, scenarios=True))[-1]
        present = self._states(x6)
        absent = self._states(torch.zeros_like(x6[:1]))
        latents = []
        for mask in masks:
            chosen = mask[None, :, None, None]
            tokens, qkv = (torch.where(chosen, *pair) for pair in zip(present, absent, strict=True))
            available = mask.expand(len(x6), -1)
            latent, _ = self._share(zero_absent(x6, available), tokens, qkv, available)
            latents.append(self._volume(latent))
        return torch.stack(latents)

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
        # Absent in every sample: zero in the end, so it need not be computed.
        present = available.any(dim=0).nonzero().flatten()
        # Element by element: modality m (axis 1) weighs every modality j (axis 2).
        logits = query[:, present, None] * (key[:, None] / math.sqrt(len(self.bands)))
        weighed = (logits.softmax(dim=2) * value[:, None]).sum(dim=2)
        correlated = torch.zeros_like(value).index_copy(1, present, weighed)
        correlated = zero_absent(correlated, available)
        fused = self.tokenizers[-1](_tokens(self.fusions["level6"](x6.flatten(1, 2))))
        sequence = torch.cat(((tokens + correlated).flatten(1, 2), fused), dim=1)
        out = self.multimodal(sequence + torch.cat(tuple(self.positions), dim=1))
        # M + 1 consecutive tokens fall in one cell: mmFormer's view, kept for its checkpoints.
        cells = out.reshape(len(out), -1, self.to_latent.in_features)
        return self.to_latent(cells), correlated

    def _volume(self, tokens: Tensor) -> Tensor:
        """Put tokens [B, N, C] back on the grid, [B, C, d, h, w]."""
        return tokens.transpose(1, 2).unflatten(2, self.settings.latent_grid)
