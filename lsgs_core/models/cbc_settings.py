"""The sizes of CBC and CBC-SLP."""

from dataclasses import dataclass

from lsgs_core.errors import InputError


@dataclass(frozen=True)
class CBCSettings:
    """Sizes of CBC and CBC-SLP; the defaults are the paper's.

    Attributes:
        private_branches: True for CBC-SLP, False for CBC.
        stem_width: Encoder channels after the stem.
        stage_widths: Encoder channels after each of its four stages.
        stage_blocks: Bottlenecks in each stage.
        reduced_channels: Channels of a modality at levels 1…5.
        latent_channels: Channels per modality of level 6 and of the shared latent; even.
        latent_grid: Depth, height and width of the latent.
        token_width: Width of the transformer tokens.
        attention_heads: Heads of each transformer block; they divide the token width.
        feed_forward_width: Hidden width of the feed-forward layers.
        dropout: Dropout rate after the attention's projection and in the feed-forward layers.
        attention_dropout: Dropout rate on the attention weights; above 0 it keeps a CPU from
            using a fused attention kernel in training.
        decoder_channels: Channels of the reduced latent, then after each decoder level.
        decoder_depths: Depth of the volume at each decoder level, one to four of them.

    Raises:
        InputError: When the entries do not fit together.
    """

    private_branches: bool = True
    stem_width: int = 64
    stage_widths: tuple[int, ...] = (256, 512, 1024, 2048)
    stage_blocks: tuple[int, ...] = (3, 4, 6, 3)
    reduced_channels: tuple[int, ...] = (8, 16, 32, 64, 64)
    latent_channels: int = 64
    latent_grid: tuple[int, ...] = (8, 8, 8)
    token_width: int = 512
    attention_heads: int = 8
    feed_forward_width: int = 512
    dropout: float = 0.1
    attention_dropout: float = 0.1
    decoder_channels: tuple[int, ...] = (128, 64, 32, 16, 8)
    decoder_depths: tuple[int, ...] = (16, 32, 64, 128)

    def __post_init__(self) -> None:
        levels = len(self.decoder_depths)
        fits = {
            "stage_widths": len(self.stage_widths) == 4,
            "stage_blocks": len(self.stage_blocks) == 4,
            "reduced_channels": len(self.reduced_channels) == 5,
            "latent_channels": self.latent_channels % 2 == 0,
            "latent_grid": len(self.latent_grid) == 3,
            "token_width": self.token_width % self.attention_heads == 0,
            "decoder_depths": 1 <= levels <= 4,
            "decoder_channels": len(self.decoder_channels) > levels,
        }
        for field, right in fits.items():
            if not right:
                raise InputError(f"{field}: found {getattr(self, field)}; see CBCSettings for it")
