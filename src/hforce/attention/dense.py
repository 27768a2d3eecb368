"""Block-causal attention over whole clips: for training, and the truth the cache is tested against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hforce.attention.rope import Rope3D, turn

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k / sqrt(D)) v for [B, H, n, D] and [B, H, m, D]."""
    return F.scaled_dot_product_attention(q, k, v)


def plain_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same in three steps. On a CPU its backward pass is several times faster than the fused one's."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.softmax(dim=-1) @ v


class BlockCausal:
    """An `Attend` for whole clips: each block of frames sees itself and every earlier block.

    blocks: frames per block, for example [3] * 7. window: frames a block may see, itself included (0 = all), as
    Self-Forcing's local_attn_size. With teacher_forcing the clip comes twice, clean then noisy (positions repeat):
    clean blocks see clean ones up to themselves, noisy blocks see the earlier clean ones and themselves.
    """

    def __init__(
        self,
        rope: Rope3D,
        blocks: Sequence[int],
        window: int = 0,
        teacher_forcing: bool = False,
        kernel: Kernel = sdpa,
    ) -> None:
        self.rope, self.blocks, self.window, self.kernel = rope, tuple(blocks), window, kernel
        self.teacher_forcing = teacher_forcing
        index = torch.arange(sum(blocks))
        self.phase = rope.full(torch.cat([index, index]) if teacher_forcing else index)[:, None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B, T, H, D] before RoPE, T tokens of the whole clip -> [B, T, H, D]."""
        q, k = turn(q, self.phase), turn(k, self.phase)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        tokens = self.rope.space.shape[0]
        half = sum(self.blocks) * tokens if self.teacher_forcing else 0
        clean, noisy = [], []
        end = 0
        for frames in self.blocks:
            start, end = end, end + frames * tokens
            low = max(0, end - self.window * tokens) if self.window else 0
            clean.append(self.kernel(q[:, :, start:end], k[:, :, low:end], v[:, :, low:end]))
            if half:
                own = slice(half + start, half + end)
                past = slice(low, start)
                keys, values = (torch.cat([x[:, :, past], x[:, :, own]], dim=2) for x in (k, v))
                noisy.append(self.kernel(q[:, :, own], keys, values))
        return torch.cat(clean + noisy, dim=2).transpose(1, 2)
