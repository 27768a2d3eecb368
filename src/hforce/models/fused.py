"""The two halves of a block with norms, modulations, gates and sums joined in kernels of ours: twins of `Block`'s own.

Between matrix products every value is read once and written once. All is computed in float32 and rounded when it is
written, which is less often than in single steps.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from hforce.models.dit import Block, CausalWan, Gelu, Projections, RMSNorm

NONE = -1  # instead of the place of a part of the modulation: there is none
WARPS = 4


@triton.jit
def _part(modulation, time, frame, place: tl.constexpr, column, is_in, dim):
    """A part of a block's modulation, learned and of this frame's timestep: float32."""
    learned = tl.load(modulation + place * dim + column, mask=is_in, other=0.0).to(tl.float32)
    return learned + tl.load(time + (frame * 6 + place) * dim + column, mask=is_in, other=0.0).to(tl.float32)


@triton.jit
def _add_and_norm(
    x, y, total, normed, modulation, time, weight, bias, dim, tokens, eps,
    ADDS: tl.constexpr, GATE: tl.constexpr, NORMS: tl.constexpr, SHIFT: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """One token: x + gate y, and its layer norm, modulated (SHIFT, and the scale behind it) or with a weight."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, B)
    frame, is_in = row // tokens, column < dim
    spot = row * dim + column
    value = tl.load(x + spot, mask=is_in, other=0.0).to(tl.float32)
    if ADDS:
        added = tl.load(y + spot, mask=is_in, other=0.0).to(tl.float32)
        if GATE >= 0:
            added *= _part(modulation, time, frame, GATE, column, is_in, dim)
        rounded = (value + added).to(total.dtype.element_ty)
        tl.store(total + spot, rounded, mask=is_in)
        value = rounded.to(tl.float32)
    if NORMS:
        centred = tl.where(is_in, value - tl.sum(value, axis=0) / dim, 0.0)
        unit = centred / tl.sqrt(tl.sum(centred * centred, axis=0) / dim + eps)
        if SHIFT >= 0:
            scale = _part(modulation, time, frame, SHIFT + 1, column, is_in, dim)
            unit = unit * (1 + scale) + _part(modulation, time, frame, SHIFT, column, is_in, dim)
        else:
            unit *= tl.load(weight + column, mask=is_in, other=0.0).to(tl.float32)
            unit += tl.load(bias + column, mask=is_in, other=0.0).to(tl.float32)
        tl.store(normed + spot, unit.to(normed.dtype.element_ty), mask=is_in)


@triton.jit
def _rms_norm(x, weight, dim, eps, B: tl.constexpr):
    """One token, in place; rounded before the weight and after it, as in the release (`RMSNorm`)."""
    spot, column = tl.program_id(0).to(tl.int64) * dim, tl.arange(0, B)
    is_in = column < dim
    value = tl.load(x + spot + column, mask=is_in, other=0.0).to(tl.float32)
    unit = (value / tl.sqrt(tl.sum(value * value, axis=0) / dim + eps)).to(x.dtype.element_ty)
    gain = tl.load(weight + column, mask=is_in, other=0.0).to(tl.float32)
    tl.store(x + spot + column, (unit.to(tl.float32) * gain).to(x.dtype.element_ty), mask=is_in)


def fuse(model: CausalWan) -> None:
    """Lets a model run its blocks like this, from the next pass on."""
    model.before, model.after = before, after


def before(block: Block, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`Block.before`. x [B, N, dim], time [B, F, 6, dim] -> q, k, v [B, N, H, D]."""
    attention = block.self_attn
    _, normed = add_and_norm(block, time, x, shift=0)
    q, k = normed_(attention.q(normed), attention.norm_q), normed_(attention.k(normed), attention.norm_k)
    return attention.split(q), attention.split(k), attention.split(attention.v(normed))


def after(block: Block, x: Tensor, heads: Tensor, time: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """`Block.after`. heads [B, N, dim], text keys and values [B, H, T, D] -> [B, N, dim]."""
    x, normed = add_and_norm(block, time, x, block.self_attn.o(heads), gate=2, weigh=True)
    x, normed = add_and_norm(block, time, x, read_text(block.cross_attn, normed, keys, values), shift=3)
    up, gelu, down = cast(tuple[nn.Linear, Gelu, nn.Linear], tuple(block.ffn))
    if x.is_cuda:  # the library applies this very GELU before it writes the product; on a CPU it has another one
        wide = torch._addmm_activation(up.bias, normed.flatten(0, 1), up.weight.t(), use_gelu=True)
    else:
        wide = gelu(up(normed))
    return add_and_norm(block, time, x, down(wide).view_as(x), gate=5)[0]


def read_text(attention: Projections, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """`CrossAttention.forward`. x [B, N, dim], keys and values [B runs, H, T, D] -> [B, N, dim]."""
    q = normed_(attention.q(x), attention.norm_q).reshape(keys.shape[0], -1, x.shape[-1])
    seen = F.scaled_dot_product_attention(attention.split(q).transpose(1, 2), keys, values)
    return attention.o(seen.transpose(1, 2).reshape(x.shape))


def add_and_norm(
    block: Block, time: Tensor, x: Tensor, y: Tensor | None = None, gate: int = NONE, shift: int = NONE,
    weigh: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x + gate y, and the layer norm of that, modulated from part `shift` on or weighed by norm3; each if asked for.

    x, y [B, N, dim], time [B, F, 6, dim]; gate and shift are parts of the modulation -> twice [B, N, dim].
    """
    x, time, dim = x.contiguous(), time.contiguous(), x.shape[-1]
    norms = weigh or shift != NONE
    total = x if y is None else torch.empty_like(x)
    normed = torch.empty_like(x) if norms else x
    rows = x.numel() // dim
    with torch.cuda.device_of(x):
        _add_and_norm[(rows,)](
            x, x if y is None else y.contiguous(), total, normed, block.modulation, time,
            block.norm3.weight, block.norm3.bias, dim, rows // (time.shape[0] * time.shape[1]), block.eps,
            ADDS=y is not None, GATE=gate, NORMS=norms, SHIFT=shift, B=triton.next_power_of_2(dim), num_warps=WARPS,
        )  # fmt: skip
    return total, normed


def normed_(x: Tensor, norm: RMSNorm) -> Tensor:
    """The RMS norm of x [..., dim], in its place."""
    dim = x.shape[-1]
    with torch.cuda.device_of(x):
        _rms_norm[(x.numel() // dim,)](x, norm.weight, dim, norm.eps, triton.next_power_of_2(dim), num_warps=WARPS)
    return x
