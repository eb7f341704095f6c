"""The pre-norm transformer block of CBC and CBC-SLP."""

import torch.nn.functional as F
from torch import Tensor, nn

from lsgs_core.models.cbc_settings import CBCSettings


class Attention(nn.Module):
    """Multi-head self-attention over tokens [B, N, T]."""

    def __init__(self, width: int, heads: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended tokens [B, N, T]."""
        # (B, N, 3T) -> 3 × (B, heads, N, T / heads)
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        rate = self.attention_dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=rate)
        return self.dropout(self.projection(out.transpose(1, 2).flatten(2)))


class TransformerBlock(nn.Module):
    """Pre-norm transformer block over tokens [B, N, T]."""

    def __init__(self, settings: CBCSettings) -> None:
        super().__init__()
        width, hidden, rate = settings.token_width, settings.feed_forward_width, settings.dropout
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(
            width, settings.attention_heads, rate, settings.attention_dropout
        )
        # The published block drops twice: after the projection and again before the residual.
        self.dropout = nn.Dropout(rate)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Dropout(rate),
            nn.Linear(hidden, width),
            nn.Dropout(rate),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.feed_forward(self.feed_forward_norm(x))
