"""What stands between the convolutions of Wan2.1's decoder, each step a kernel of ours: twins of `wan_decode.PLAIN`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hforce.models.wan_decode import PAST, Between, Sum

VALUES = 4096  # of a program


@triton.jit
def _join_pixels(
    x, y, bias, gain, total, out, pixels, channels, root,
    ADDS: tl.constexpr, BIASED: tl.constexpr, P: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """P pixels with all their channels, of which there are at most B."""
    pixel, column = tl.program_id(0) * P + tl.arange(0, P), tl.arange(0, B)
    is_channel = column < channels
    is_in = (pixel[:, None] < pixels) & is_channel[None, :]
    spot = pixel.to(tl.int64)[:, None] * channels + column[None, :]
    value = tl.load(x + spot, mask=is_in, other=0.0).to(tl.float32)
    if ADDS:
        value += tl.load(y + spot, mask=is_in, other=0.0).to(tl.float32)
    if BIASED:
        value += tl.load(bias + column, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    if ADDS or BIASED:
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + spot, rounded, mask=is_in)
        value = rounded.to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(value * value, axis=1)), 1e-12)
    value *= (root / length)[:, None] * tl.load(gain + column, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    tl.store(out + spot, (value * tl.sigmoid(value)).to(out.dtype.element_ty), mask=is_in)


@triton.jit
def _double_pixels(x, out, pixels, width, channels, P: tl.constexpr, B: tl.constexpr):
    """P pixels, each written to the four places that it has in a picture twice as large."""
    pixel, column = tl.program_id(0) * P + tl.arange(0, P), tl.arange(0, B)
    is_in = (pixel[:, None] < pixels) & (column[None, :] < channels)
    value = tl.load(x + pixel.to(tl.int64)[:, None] * channels + column[None, :], mask=is_in)
    corner = (4 * pixel - 2 * (pixel % width)).to(tl.int64)  # rows of the large picture are 2 width long
    for down in tl.static_range(2):
        for right in tl.static_range(2):
            spot = (corner + down * 2 * width + right)[:, None] * channels + column[None, :]
            tl.store(out + spot, value, mask=is_in)


def join(parts: Sum, gain: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
    """`wan_decode.join`, in one launch but for the frames before."""
    form = torch.channels_last_3d
    x = parts.x.contiguous(memory_format=form)
    y, bias = parts.y, parts.bias
    y = None if y is None else y.contiguous(memory_format=form)
    _, channels, frames, height, width = x.shape
    shape = (1, channels, PAST + frames, height, width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)
    out[:, :, :PAST] = 0 if past is None else past
    last = x if y is None else y  # becomes the total: every value is written by the program that read it
    pixels, (tile, wide) = frames * height * width, _tile(channels)
    with torch.cuda.device_of(x):
        _join_pixels[(triton.cdiv(pixels, tile),)](
            x, last, gain if bias is None else bias, gain, last, out[:, :, PAST:],
            pixels, channels, channels**0.5, y is not None, bias is not None, tile, wide,
        )  # fmt: skip
    return last, out


def double(x: Tensor) -> Tensor:
    """`wan_decode.double`, in one launch."""
    x = x.contiguous(memory_format=torch.channels_last)
    frames, channels, height, width = x.shape
    shape = (frames, channels, 2 * height, 2 * width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    pixels, (tile, wide) = frames * height * width, _tile(channels)
    with torch.cuda.device_of(x):
        _double_pixels[(triton.cdiv(pixels, tile),)](x, out, pixels, width, channels, tile, wide)
    return out


def _tile(channels: int) -> tuple[int, int]:
    """Pixels and channels of a program."""
    wide = triton.next_power_of_2(channels)
    return max(1, VALUES // wide), wide


KERNELS = Between(join, double)
