"""Sum, norm and activation between two convolutions of Wan2.1's decoder in one kernel: twin of `wan_decode.join`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hforce.models.wan_decode import PAST, Join, Sum

VALUES = 4096  # of a program


@triton.jit
def _join_pixels(
    x, y, bias, gain, past, total, out, frames, height, width, channels, root,
    ADDS: tl.constexpr, BIASED: tl.constexpr, FOLLOWS: tl.constexpr, P: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """P pixels of the result with all their channels, at most B: of the border, of the frames before, or new ones."""
    pixel, column = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P), tl.arange(0, B)
    plane = (height + 2) * (width + 2)
    frame, row, line = pixel // plane - 2, pixel % plane // (width + 2) - 1, pixel % (width + 2) - 1
    is_seen = (row >= 0) & (row < height) & (line >= 0) & (line < width) & (frame < frames)
    is_channel = column < channels
    is_new = (is_seen & (frame >= 0))[:, None] & is_channel[None, :]
    spot = ((frame * height + row) * width + line)[:, None] * channels + column[None, :]
    value = tl.load(x + spot, mask=is_new, other=0.0).to(tl.float32)
    if ADDS:
        value += tl.load(y + spot, mask=is_new, other=0.0).to(tl.float32)
    if BIASED:
        value += tl.load(bias + column, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    if ADDS or BIASED:
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + spot, rounded, mask=is_new)
        value = rounded.to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(value * value, axis=1)), 1e-12)
    value *= (root / length)[:, None] * tl.load(gain + column, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    value = tl.where(is_new, value * tl.sigmoid(value), 0.0)
    if FOLLOWS:
        is_old = (is_seen & (frame < 0))[:, None] & is_channel[None, :]
        value += tl.load(past + 2 * height * width * channels + spot, mask=is_old, other=0.0).to(tl.float32)
    is_in = (frame < frames)[:, None] & is_channel[None, :]
    tl.store(out + pixel[:, None] * channels + column[None, :], value.to(out.dtype.element_ty), mask=is_in)


def join(parts: Sum, gain: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
    """`wan_decode.join` with a border of one, in one launch."""
    form = torch.channels_last_3d
    x = parts.x.contiguous(memory_format=form)
    y, bias = parts.y, parts.bias
    y = None if y is None else y.contiguous(memory_format=form)
    past = None if past is None else past.contiguous(memory_format=form)
    _, channels, frames, height, width = x.shape
    shape = (1, channels, PAST + frames, height + 2, width + 2)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)
    total = x if y is None and bias is None else torch.empty_like(x)
    wide = triton.next_power_of_2(channels)
    tile = max(1, VALUES // wide)
    with torch.cuda.device_of(x):
        _join_pixels[(triton.cdiv(out.numel() // channels, tile),)](
            x, x if y is None else y, gain if bias is None else bias, gain, x if past is None else past, total, out,
            frames, height, width, channels, channels**0.5,
            y is not None, bias is not None, past is not None, tile, wide,
        )  # fmt: skip
    return total, out


KERNEL = Join(join, border=1)
