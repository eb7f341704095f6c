"""Attention with dropout on its weights, for training on a CPU.

PyTorch fuses attention on a CPU only without dropout; with it, all weights of all heads and their
random numbers are kept for the backward pass, and drawing them takes longer than the attention.
Here one head is worked on at a time, its weights are computed again in the backward pass, and a
dropout decision takes 16 random bits. The rate is therefore rounded to a multiple of 2^-16.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def attention_with_dropout(query: Tensor, key: Tensor, value: Tensor, rate: float) -> Tensor:
    """Return softmax(Q Kᵀ / √width) with a share of its elements dropped, times V.

    Args:
        query: [B, heads, N, width], on the CPU.
        key: Likewise.
        value: Likewise.
        rate: Probability that a weight is set to 0; the others are divided by 1 - rate.
    """
    seed = int(torch.randint(2**62, ()))  # the global generator decides, as for other dropout
    batch = query.shape[:2]
    heads = (tensor.flatten(0, 1) for tensor in (query, key, value))
    return _Attention.apply(*heads, round(rate * 2**16), seed).unflatten(0, batch)


class _Attention(torch.autograd.Function):
    """Over heads [heads, N, width]."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, dropped: int, seed: int
    ) -> Tensor:
        """Drop `dropped` of 65,536 weights on average."""
        out = torch.empty_like(query)
        remaining = 1 - dropped / 2**16
        for head, (weights, keep) in enumerate(_weights(query, key, dropped, seed)):
            torch.mm(weights.mul_(keep), value[head] / remaining, out=out[head])
        ctx.dropped, ctx.seed = dropped, seed
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of queries, keys and values."""
        query, key, value, out = ctx.saved_tensors
        of_query, of_key, of_value = (torch.empty_like(x) for x in (query, key, value))
        scale, remaining = query.shape[2] ** -0.5, 1 - ctx.dropped / 2**16
        # Of the softmax: weight · (g - sum of weight · g), and that sum is gradient · out.
        sums = (gradient * out).sum(dim=2, keepdim=True)
        for head, (weights, keep) in enumerate(_weights(query, key, ctx.dropped, ctx.seed)):
            scaled = gradient[head] / remaining
            of_logits = torch.mm(scaled, value[head].T).mul_(keep).sub_(sums[head]).mul_(weights)
            torch.mm(of_logits, key[head] * scale, out=of_query[head])
            torch.mm(of_logits.T, query[head] * scale, out=of_key[head])
            torch.mm(weights.mul_(keep).T, scaled, out=of_value[head])
        return of_query, of_key, of_value, None, None


def _weights(
    query: Tensor, key: Tensor, dropped: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the softmax of every head, [N, N], and 1 where it is kept, the same for a seed.

    The two tensors are reused from head to head.
    """
    tokens, scale = query.shape[1], query.shape[2] ** -0.5
    logits, weights, keep = (query.new_empty(tokens, tokens) for _ in range(3))
    generator = torch.Generator().manual_seed(seed)
    bits = torch.empty(-(-(tokens**2) // 4), dtype=torch.int64)
    numbers = bits.view(torch.int16)[: tokens**2].view(tokens, tokens)
    for head in range(len(query)):
        torch.mm(query[head] * scale, key[head].T, out=logits)
        torch.softmax(logits, dim=1, out=weights)
        bits.random_(-(2**63), None, generator=generator)
        yield weights, torch.ge(numbers, dropped - 2**15, out=keep)
