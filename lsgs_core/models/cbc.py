"""CBC and CBC-SLP (arXiv 2604.15856): per-modality encoders, a shared latent, a volume decoder."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lsgs_core.models.backbone import Backbone, Images
from lsgs_core.models.cbc_decoder import Decoder, Unit
from lsgs_core.models.cbc_encoder import Encoder
from lsgs_core.models.cbc_settings import CBCSettings
from lsgs_core.models.cbc_transformer import TransformerBlock


class PointConv(nn.Linear):
    """A 1×1×1 convolution over the latent grid, as the linear layer over tokens that it is."""


def _tokens(volume: Tensor) -> Tensor:
    """Flatten [B, C, d, h, w] to tokens [B, N, C] in (d, h, w) order."""
    return volume.flatten(2).transpose(1, 2)


def _mask(features: Tensor, available: Tensor) -> Tensor:
    """Zero the absent modalities of [B, M, ...]; a fill, so that they may hold anything."""
    return features.masked_fill(~available[(...,) + (None,) * (features.ndim - 2)], 0.0)


class CBC(Backbone):
    """CBC, and CBC-SLP with its private branches; the paper's shape at M = D = 3.

    The bands of a modality are repeated cyclically up to the largest band count.
    """

    def __init__(self, bands: Sequence[int], classes: int, settings: CBCSettings) -> None:
        super().__init__(bands, classes)
        self.settings = settings
        count, width = len(bands), settings.token_width
        latent = settings.latent_channels * count
        self.encoders = nn.ModuleList(Encoder(settings) for _ in bands)
        # Level 5 is never used, and the lowest levels only by a decoder that goes so far.
        self.skip_levels = (4, 3, 2, 1)[: len(settings.decoder_depths)]
        self.fusions = nn.ModuleDict({"level6": Unit(latent, latent, 1)})
        for level in self.skip_levels:
            channels = settings.reduced_channels[level - 1] * count
            self.fusions[f"level{level}"] = Unit(channels, channels, 1)
        self.tokenizers = nn.ModuleList(PointConv(settings.latent_channels, width) for _ in bands)
        self.fused_tokenizer = PointConv(latent, width)
        self.positions = nn.ParameterList(
            torch.zeros(1, math.prod(settings.latent_grid), width) for _ in range(count + 1)
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
        skips, x6 = self._encode(patches)
        x6 = _mask(x6, available)
        latent, correlated = self._share(x6, *self._states(x6), available)
        if self.settings.private_branches:
            private = torch.stack(
                [layer(correlated[:, m]) for m, layer in enumerate(self.to_private)], dim=1
            )
            private = _mask(private, available)  # (B, M, N, c)
            parts = [self.to_shared(_tokens(latent)), *private.unbind(1)]
            latent = self._volume(torch.cat(parts, dim=2))
        fused = [
            self.fusions[f"level{level}"](_mask(skips[level - 1], available).flatten(1, 2))
            for level in self.skip_levels
        ]
        logits = self.decoder(latent, fused, tuple(patches[0].shape[2:]))
        return logits.unflatten(1, (self.head_count, self.classes))

    def latent(self, images: Images, available: Tensor) -> Tensor:
        """Return the shared latent [B, C·M, d, h, w], the same for CBC and CBC-SLP."""
        x6 = _mask(self._encode(self.check(images, available))[1], available)
        return self._share(x6, *self._states(x6), available)[0]

    def scenario_latents(self, images: Images, masks: Tensor) -> Tensor:
        """Return the latents [K, B, C·M, d, h, w] of K scenarios, masks bool [K, M].

        Each modality is encoded once, and goes through its transformer block once for each of
        its two states; the absent state is the same for every image.

        Raises:
            InputError: For images or masks of another shape or dtype, or an empty scenario.
        """
        self.check_masks(masks, "masks")
        _, x6 = self._encode(self.check_images(images))
        present = self._states(x6)
        absent = self._states(torch.zeros_like(x6[:1]))
        latents = []
        for mask in masks:
            chosen = mask[None, :, None, None]
            tokens, qkv = (torch.where(chosen, *pair) for pair in zip(present, absent, strict=True))
            available = mask.expand(len(x6), -1)
            latents.append(self._share(_mask(x6, available), tokens, qkv, available)[0])
        return torch.stack(latents)

    def low_rank_layers(self) -> dict[str, nn.Module]:
        """Return the multimodal transformer's two projections and the early fusions."""
        names = ["multimodal.attention.qkv", "multimodal.attention.projection"]
        names += [f"fusions.{name}.conv" for name in self.fusions]
        return {name: self.get_submodule(name) for name in names}

    def _encode(self, patches: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Return x1…x4, each [B, M, c, D, h, w], and x6 [B, M, C, d, h, w], nothing masked."""
        encoded = []
        for encoder, patch in zip(self.encoders, patches, strict=True):
            bands = [index % patch.shape[1] for index in range(max(self.bands))]
            encoded.append(encoder(patch[:, bands] if len(bands) > patch.shape[1] else patch))
        skips = [torch.stack(level, dim=1) for level in zip(*(s for s, _ in encoded), strict=True)]
        return skips, torch.stack([x6 for _, x6 in encoded], dim=1)

    def _states(self, x6: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens [B, M, N, T] and queries, keys, values [B, M, N, 3T] of masked x6."""
        all_tokens, all_qkv = [], []
        for m, tokenizer in enumerate(self.tokenizers):
            tokens = tokenizer(_tokens(x6[:, m]))
            all_tokens.append(tokens)
            all_qkv.append(self.between[m](self.blocks[m](tokens + self.positions[m])))
        return torch.stack(all_tokens, dim=1), torch.stack(all_qkv, dim=1)

    def _share(
        self, x6: Tensor, tokens: Tensor, qkv: Tensor, available: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the shared latent [B, C·M, d, h, w] and the correlated tokens [B, M, N, T]."""
        query, key, value = qkv.chunk(3, dim=-1)
        # Element by element: modality m (axis 1) weighs every modality j (axis 2).
        logits = query[:, :, None] * key[:, None] / math.sqrt(len(self.bands))
        correlated = (logits.softmax(dim=2) * value[:, None]).sum(dim=2)
        correlated = _mask(correlated, available)
        fused = self.fused_tokenizer(_tokens(self.fusions["level6"](x6.flatten(1, 2))))
        sequence = torch.cat(((tokens + correlated).flatten(1, 2), fused), dim=1)
        out = self.multimodal(sequence + torch.cat(tuple(self.positions), dim=1))
        # M + 1 consecutive tokens fall in one cell: mmFormer's view, kept for its checkpoints.
        cells = out.reshape(len(out), -1, self.to_latent.in_features)
        return self._volume(self.to_latent(cells)), correlated

    def _volume(self, tokens: Tensor) -> Tensor:
        """Put tokens [B, N, C] back on the grid, [B, C, d, h, w]."""
        return tokens.transpose(1, 2).unflatten(2, self.settings.latent_grid)
