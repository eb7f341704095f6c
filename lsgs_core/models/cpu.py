"""CBC and CBC-SLP on a CPU: the same results up to rounding, with less time and memory.

`lsgs_core.models.cbc` has the forms that define the networks; `accelerate_on_cpu` replaces them.

The decoder works without its large volumes, for three reasons. A convolution over concatenated
volumes is the sum of one convolution over each. A 3×3×3 convolution is three 2-D convolutions, one
per depth tap, over slices whose results are added; where the volume was resized along depth,
resizing and adding are one small matrix, so that the 2-D convolutions run on the slices before
resizing. And the gradient of a unit (convolution, ReLU, instance normalisation) needs nothing but
its input and its output; everything between is computed in slabs that fit in the processor's cache,
and computed again in the backward pass. Volumes are [B, d, h, w, C] here, the memory order in which
convolutions are fastest.

PyTorch fuses attention with dropout on its weights on a GPU alone. On a CPU it keeps all weights of
all heads and their random numbers for the backward pass, and drawing them takes longer than the
attention. Here, one head is computed at a time, its weights are computed again in the backward
pass, and a dropout decision takes 16 random bits, so that the rate is rounded to a multiple of
2^-16.
"""

import copy
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsgs_core.errors import check_type
from lsgs_core.models.backbone import Backbone
from lsgs_core.models.cbc import Decoder, DecoderLevel, Refinement, TransformerBlock, Unit

SLAB = 2**20  # size of a slab in numbers: 4 MiB of float32
SMALLEST = 2**20  # size of the last volume in numbers; smaller volumes fit in the cache anyway
Size = tuple[int, int, int]


def accelerate_on_cpu(model: Backbone) -> Backbone:
    """Return a copy of a network that computes faster on a CPU, in training and in evaluation.

    Its parameters have the same names and shapes, and its results and gradients are equal up to
    rounding. On other devices and under autocast it computes as the network does. A network
    without a part that has a faster form, such as CMX, is only copied.
    """
    check_type("model", model, Backbone)
    fast = copy.deepcopy(model)
    for module in fast.modules():
        module.__class__ = _FASTER.get(type(module), type(module))
    return fast


def _applies(x: Tensor) -> bool:
    """Return True for tensors that the faster forms are written for."""
    return x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


class SlabDecoder(Decoder):
    """The decoder in slabs, where its volumes are so large that this is faster."""

    def forward(self, latent: Tensor, skips: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Return the logits of the decoder, [B, outputs, H, W]."""
        if not (_applies(latent) and self.is_worthwhile(latent)):
            return super().forward(latent, skips, size)
        x = _refined(self.refine, latent)
        x = F.linear(x, self.reduce.weight.flatten(1), self.reduce.bias)
        levels = cast("list[DecoderLevel]", [*self.levels.values()])
        for level, skip, depth in zip(levels, skips, self.depths, strict=True):
            volume = (depth, 2 * x.shape[2], 2 * x.shape[3])
            x = unit(level.enlarge, volume, (x, "linear"))
            x = unit(level.join, volume, (_refined(level.refine, skip), "nearest"), (x, "nearest"))
            x = unit(level.out, volume, (x, "nearest"))
        first = x[:, 0].movedim(3, 1)
        first = F.interpolate(first, size, mode="bilinear", align_corners=True)
        return F.conv2d(first, self.head.weight[:, :, 0], self.head.bias)

    def is_worthwhile(self, latent: Tensor) -> bool:
        """Return True if slabs are faster for a latent [B, C, d, h, w]."""
        plane = latent[0, 0, 0].numel() * 4 ** len(self.depths)
        return self.depths[-1] * plane * self.head.in_channels >= SMALLEST


class HeadByHead(TransformerBlock):
    """The transformer block with a dropout of attention weights that runs head by head."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rate: float) -> Tensor:
        """Return the attention of the block."""
        if 0 < rate <= 1 - 2**-16 and _applies(query):  # a larger rate is rounded to 1
            return attention_with_dropout(query, key, value, rate)
        return super().attend(query, key, value, rate)


_FASTER: dict[type, type] = {Decoder: SlabDecoder, TransformerBlock: HeadByHead}


def _refined(refinement: Refinement, volume: Tensor) -> Tensor:
    """Return the refined volume, [B, C, d, h, w] to [B, d, h, w, C]."""
    x = volume.movedim(1, 4).contiguous()
    for module in refinement:
        x = unit(cast("Unit", module), (x.shape[1], x.shape[2], x.shape[3]), (x, "nearest"))
    return x


def unit(module: Unit, size: Size, *inputs: tuple[Tensor, str]) -> Tensor:
    """Return the output of a unit with kernel 3, or 1 and a single input, [B, *size, outputs].

    The inputs, volumes [B, d, h, w, C_i], are resized to depth, height and width of the size, each
    in its way, "linear" (with aligned corners) or "nearest", and concatenated. A unit of kernel 1
    does not resize.
    """
    volumes, modes = zip(*inputs, strict=True)
    weights = module.conv.weight.split([volume.shape[4] for volume in volumes], dim=1)
    padding = "replicate" if module.conv.padding_mode == "replicate" else "constant"
    rule = _Rule(size, modes, padding, module.norm.eps)
    return _Unit.apply(rule, module.conv.bias, *chain(*zip(volumes, weights, strict=True)))


class _Rule(NamedTuple):
    """The parameters of a unit that are not tensors."""

    size: Size
    modes: tuple[str, ...]
    padding: str  # "replicate", or "constant" for zeros
    eps: float


@lru_cache(maxsize=512)
def _resizing(
    before: int, after: int, mode: str, width: int, padding: str, dtype: torch.dtype
) -> Tensor:
    """Return resizing along one axis and padding as a matrix [after + 2 · width, before]."""
    aligned = True if mode == "linear" else None
    with torch.inference_mode(False):  # the cached matrix is also used outside of that mode
        unit_vectors = torch.eye(before, dtype=dtype)[None]
        resized = F.interpolate(unit_vectors, after, mode=mode, align_corners=aligned)
        return F.pad(resized, (width, width), mode=padding)[0].T.contiguous()


class _Slices:
    """The slices of one input of a unit, resized in the plane and padded, in chunks."""

    def __init__(self, volume: Tensor, weight: Tensor, rule: _Rule, index: int) -> None:
        self.volume, self.size, taps = volume, rule.size, weight.shape[2]
        self.border, self.padding = taps // 2, rule.padding
        self.kernels = [kernel.contiguous(memory_format=torch.channels_last)
                        for kernel in weight.unbind(2)]  # fmt: skip
        self.depth, self.height, self.width = (
            _resizing(before, after, rule.modes[index], self.border, self.padding, volume.dtype)
            for before, after in zip(volume.shape[1:4], self.size, strict=True)
        )
        self.same_plane = tuple(volume.shape[2:4]) == self.size[1:]
        pixels = (self.size[1] + 2) * (self.size[2] + 2)
        self.step = max(1, SLAB // (len(volume) * pixels * max(weight.shape[:2])))

    def chunks(self) -> Iterator[tuple[slice, slice, list[Tensor]]]:
        """Yield slices of the input, the slices of the result that they add to, and their weights.

        The weights are one matrix [result slices, input slices] for each depth tap.
        """
        taps = len(self.kernels)
        for start in range(0, self.volume.shape[1], self.step):
            chunk = slice(start, min(start + self.step, self.volume.shape[1]))
            used = self.depth[:, chunk].any(dim=1).nonzero()
            if len(used):  # resizing to a smaller depth skips some slices
                # Tap t of result slice z reads the padded slice z + t.
                first, stop = max(0, int(used[0]) - taps + 1), min(self.size[0], int(used[-1]) + 1)
                shares = [self.depth[first + tap : stop + tap, chunk] for tap in range(taps)]
                yield chunk, slice(first, stop), shares

    def read(self, x: Tensor) -> Tensor:
        """Return a chunk as images [B · slices, C, H + 2, W + 2], channels last."""
        if not self.same_plane:
            x = self.width @ x  # (B, s, h, W + 2, C)
            x = (self.height @ x.flatten(3)).unflatten(3, (len(self.width), -1))
            return x.flatten(0, 1).movedim(3, 1)
        x = x.flatten(0, 1).movedim(3, 1)
        return F.pad(x, (self.border,) * 4, mode=self.padding) if self.border else x


class _Unit(torch.autograd.Function):
    """Convolution, ReLU and instance normalisation that keep only their input and output."""

    @staticmethod
    def forward(ctx: Any, rule: _Rule, bias: Tensor, *pairs: Tensor) -> Tensor:
        """Return the output; `pairs` are volume, weight, volume, weight and so on."""
        batch, width = len(pairs[0]), rule.size[2]
        out = pairs[0].new_zeros(batch, *rule.size, len(bias))
        slices = out.flatten(2)  # (B, D, H · W · outputs)
        for index in range(len(rule.modes)):
            inputs = _Slices(pairs[2 * index], pairs[2 * index + 1], rule, index)
            for chunk, rows, shares in inputs.chunks():
                images = inputs.read(inputs.volume[:, chunk])
                for tap, (kernel, share) in enumerate(zip(inputs.kernels, shares, strict=True)):
                    # The rows of the middle tap have a sum of 1, so that it adds the bias once.
                    once = bias if index == 0 and tap == inputs.border else None
                    maps = F.conv2d(images, kernel, once).movedim(1, 3)
                    maps = maps.reshape(batch, share.shape[1], -1)
                    if inputs.border == 0:
                        slices[:, rows] = maps
                    else:
                        slices[:, rows].baddbmm_(share.expand(batch, -1, -1), maps)
        mean = _channel_means(out, lambda slab: slab.relu_())
        per_column = _columns(mean, width)
        variance = _channel_means(out, lambda slab: slab.sub_(per_column).square())
        scale = (variance + rule.eps).rsqrt()
        per_column = _columns(scale, width)
        for slab in _slabs(out):
            slab.mul_(per_column)
        ctx.rule = rule
        ctx.save_for_backward(out, mean, scale, *pairs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the bias and of each volume and weight."""
        out, mean, scale, *pairs = ctx.saved_tensors
        gradient = gradient.contiguous()
        before = _before_normalisation(gradient, out, mean, scale)
        needed = ctx.needs_input_grad[1:]
        bias = None
        if needed[0]:
            bias = _channel_means(before, lambda slab: slab).mean(dim=0) * before[..., 0].numel()
        grads: list[Tensor | None] = [bias]
        for index in range(len(ctx.rule.modes)):
            volume, weight = pairs[2 * index : 2 * index + 2]
            wanted = needed[1 + 2 * index : 3 + 2 * index]
            grads += _gradients(_Slices(volume, weight, ctx.rule, index), before, *wanted)
        return None, *grads


def _before_normalisation(gradient: Tensor, out: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Return the gradient of the ReLU's input from that of the normalised result.

    With x̂ the result, instance normalisation gives scale · (g - mean(g) - x̂ · mean(g · x̂)).
    """
    width = out.shape[3]
    joint = iter(_slabs(out))
    mean_gradient = _channel_means(gradient, lambda slab: slab)
    mean_product = _channel_means(gradient, lambda slab: slab * next(joint))
    by, shift, slope, zero = (
        _columns(value, width)
        for value in (scale, scale * mean_gradient, -scale * mean_product, (0 - mean) * scale)
    )
    before = torch.empty_like(out)
    for result, slab, normalised in zip(*map(_slabs, (before, gradient, out)), strict=True):
        torch.mul(slab, by, out=result)
        # A 0 after the ReLU is `zero` after the normalisation, and all other values are larger.
        result.sub_(shift).addcmul_(normalised, slope).mul_(normalised > zero)
    return before


def _gradients(
    inputs: _Slices, before: Tensor, of_volume: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of one input and of its weight, or None where not needed."""
    _, _, *plane, outputs = before.shape
    volume = torch.zeros_like(inputs.volume) if of_volume else None
    weights = [torch.zeros_like(kernel) for kernel in inputs.kernels]
    for chunk, rows, shares in inputs.chunks():
        part, total = inputs.volume[:, chunk].detach().requires_grad_(of_volume), None
        with torch.set_grad_enabled(of_volume):
            images = inputs.read(part)
        result = before.flatten(2)[:, rows]
        for kernel, weight, share in zip(inputs.kernels, weights, shares, strict=True):
            maps = share.T @ result if inputs.border else result
            maps = maps.reshape(-1, *plane, outputs).movedim(3, 1)
            of_images, of_kernel, _ = torch.ops.aten.convolution_backward(
                maps, images, kernel, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1,
                [of_volume, of_weight, False],
            )  # fmt: skip
            if of_volume:
                total = of_images if total is None else total.add_(of_images)
            if of_weight:
                weight += of_kernel
        if volume is not None and total is not None:
            [volume[:, chunk]] = torch.autograd.grad(images, part, total)
    return volume, torch.stack(weights, dim=2) if of_weight else None


def _slabs(volume: Tensor) -> list[Tensor]:
    """Return a volume [B, D, H, W, C] as slabs, views [B, slices, H, W · C]."""
    step = max(1, SLAB // volume[:, 0].numel())
    return list(volume.flatten(3).split(step, dim=1))


def _channel_means(volume: Tensor, function: Any) -> Tensor:
    """Return the mean of a function of the slabs for each sample and channel, [B, C]."""
    total = sum(function(slab).sum(dim=(1, 2)) for slab in _slabs(volume))  # (B, W · C)
    assert isinstance(total, Tensor)
    _, depth, height, *columns = volume.shape
    return total.unflatten(1, columns).mean(dim=1) / (depth * height)


def _columns(values: Tensor, width: int) -> Tensor:
    """Repeat values [B, C] along the columns of a slab, [B, 1, 1, W · C]."""
    return values.repeat(1, width)[:, None, None]


def attention_with_dropout(query: Tensor, key: Tensor, value: Tensor, rate: float) -> Tensor:
    """Return softmax(Q Kᵀ / √width) V with dropout on the weights of the softmax.

    All tensors are [B, heads, N, width], on the CPU. A weight is set to 0 with a probability of
    `rate`, at most 1 - 2^-16, and the others are divided by 1 - rate.
    """
    seed = int(torch.randint(2**62, ()))  # from the global generator, as in other dropout
    batch = query.shape[:2]
    heads = (tensor.flatten(0, 1) for tensor in (query, key, value))
    return _Attention.apply(*heads, round(rate * 2**16), seed).unflatten(0, batch)


class _Attention(torch.autograd.Function):
    """Attention with dropout over heads [heads, N, width]."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, dropped: int, seed: int
    ) -> Tensor:
        """Return the output; `dropped` of 65,536 weights are dropped on average."""
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
        # The softmax has the gradient weight · (g - sum of weight · g); that sum is gradient · out.
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
    """Yield the softmax of each head and its dropout mask, [N, N] each; the mask is 1 where kept.

    The mask depends on the seed alone. Both tensors are reused for the next head.
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
