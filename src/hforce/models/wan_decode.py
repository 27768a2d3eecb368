"""The decoder of Wan2.1's autoencoder as a stream: all latents of a chunk at once, channels last, one step to norm.

The weights are those of diffusers' AutoencoderKLWan, and what comes out is what its own decoder makes, latent by
latent. Two things are done otherwise. A convolution in time reads its input and the two frames before it from one
tensor, to which the norm before it writes directly. And sums, biases, norms and activations between two convolutions
are one step over the values (`Between`), which is a kernel of ours where Triton runs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAST = 2  # frames that a convolution in time looks back
NARROW = 96  # channels up to which cuDNN guesses wrong which of its algorithms is the fastest (on an H200)
Features = list[Tensor | None]
"""For every convolution in time the last two frames it read, [1, C, 2, h, w]; None before the first."""


@dataclass(frozen=True)
class Sum:
    """x + y + bias, not added up yet: x, y [1, C, T, h, w], bias [C]."""

    x: Tensor
    y: Tensor | None = None
    bias: Tensor | None = None

    def total(self) -> Tensor:
        """Added up."""
        x = self.x if self.y is None else self.x + self.y
        return x if self.bias is None else x + self.bias[:, None, None, None]


@dataclass(frozen=True)
class Between:
    """What stands between two convolutions.

    join: a sum, the gains [C] of a norm, and the frames before (None: zeros) -> the total [1, C, T, h, w], perhaps in
    the memory of the last summand, and silu(norm(total)) behind those frames, [1, C, 2 + T, h, w].
    double: pictures [T, C, h, w] -> every pixel twice each way, [T, C, 2 h, 2 w].
    """

    join: Callable[[Sum, Tensor, Tensor | None], tuple[Tensor, Tensor]]
    double: Callable[[Tensor], Tensor]


def join(parts: Sum, gain: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
    """`Between.join` in plain operations. The norm is to length 1, times the root of the number of channels."""
    total = parts.total()
    unit = F.normalize(total.float(), dim=1).to(total.dtype) * total.shape[1] ** 0.5
    return total, _behind(past, F.silu(unit * gain[:, None, None, None]))


def double(x: Tensor) -> Tensor:
    """`Between.double` in plain operations."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest-exact")


PLAIN = Between(join, double)


def to_channels_last(net: nn.Module) -> None:
    """Lays out the weights of all convolutions as these kernels read them. Their values stay."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            form = torch.channels_last if isinstance(layer, nn.Conv2d) else torch.channels_last_3d
            layer.weight.data = layer.weight.data.contiguous(memory_format=form)


class Steps:
    """One run of a decoder over latents: walks through its layers, and in the same order through what they remember.

    What a layer is given is held in `_parts` alone, so that it is let go of as soon as it was read.
    """

    def __init__(self, features: Features, between: Between) -> None:
        self._features, self._between, self._at = features, between, -1
        self._parts = Sum(torch.empty(0))

    def decode(self, net: Any, x: Tensor) -> Tensor:
        """x [1, C, T, h, w] -> video [1, 3, 4 T, 8 h, 8 w], or 4 T - 3 frames where the video begins (T is 1 there)."""
        self._parts = Sum(self._convolve(net.conv_in, _behind(self._next(), x)), bias=net.conv_in.bias)
        self._resnet(net.mid_block.resnets[0])
        for attention, resnet in zip(net.mid_block.attentions, net.mid_block.resnets[1:], strict=True):
            self._parts = Sum(attention(self._parts.total()))
            self._resnet(resnet)
        for block in net.up_blocks:
            for resnet in block.resnets:
                self._resnet(resnet)
            if block.upsamplers is not None:
                self._enlarge(block.upsamplers[0])
        return self._normed(net.norm_out, net.conv_out)[1] + net.conv_out.bias[:, None, None, None]

    def _resnet(self, block: Any) -> None:
        x, y = self._normed(block.norm1, block.conv1)
        self._parts = Sum(y, bias=block.conv1.bias)
        del y
        y = self._normed(block.norm2, block.conv2)[1]
        self._parts = Sum(block.conv_shortcut(x), y, block.conv2.bias)

    def _normed(self, norm: Any, conv: Any) -> tuple[Tensor, Tensor]:
        """The total of the parts, and a convolution of its norm, without the bias."""
        parts, self._parts = self._parts, Sum(torch.empty(0))
        total, normed = self._between.join(parts, norm.gamma.flatten(), self._next())
        del parts
        return total, self._convolve(conv, normed)

    def _convolve(self, conv: Any, x: Tensor) -> Tensor:
        """x [1, C, 2 + T, h, w], T frames behind the two before them -> [1, C', T, h, w], without the bias."""
        self._features[self._at] = x[:, :, -PAST:].clone()
        _, height, width = conv.kernel_size
        with _tried_out() if conv.in_channels <= NARROW else nullcontext():
            return F.conv3d(x, conv.weight, padding=(0, height // 2, width // 2))

    def _enlarge(self, layer: Any) -> None:
        """Twice the size, and twice the frames, if it says so; the first latent of a video stays one frame."""
        x, self._parts = self._parts.total(), Sum(torch.empty(0))
        if layer.mode == "upsample3d":
            past = self._next()
            if past is None:
                self._features[self._at] = torch.zeros_like(x[:, :, :1]).repeat(1, 1, PAST, 1, 1)
            else:
                both = self._convolve(layer.time_conv, _behind(past, x)) + layer.time_conv.bias[:, None, None, None]
                x = both.unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
                del both
        conv, pictures = layer.resample[1], self._between.double(x[0].transpose(0, 1))
        del x
        self._parts = Sum(F.conv2d(pictures, conv.weight, padding=1).transpose(0, 1)[None], bias=conv.bias)

    def _next(self) -> Tensor | None:
        self._at += 1
        return self._features[self._at]


def _tried_out() -> AbstractContextManager[None]:
    """Lets cuDNN try its algorithms on a new shape and keep the fastest.

    Which one that is may change from run to run, and with it the last bit of a value.
    """
    now = torch.backends.cudnn
    return now.flags(now.enabled, benchmark=True, deterministic=now.deterministic, allow_tf32=now.allow_tf32)


def _behind(past: Tensor | None, x: Tensor) -> Tensor:
    """x [1, C, T, h, w] behind the frames before: [1, C, 2 + T, h, w], channels last."""
    past = torch.zeros_like(x[:, :, :1]).repeat(1, 1, PAST, 1, 1) if past is None else past
    return torch.cat([past, x], dim=2).contiguous(memory_format=torch.channels_last_3d)
