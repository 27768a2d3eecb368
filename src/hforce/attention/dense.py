"""Block-causal attention over whole clips: for training, and the truth the cache is tested against."""

from __future__ import annotations

import itertools
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
    Self-Forcing's local_attn_size. With noisy = n (teacher forcing) the clip comes first clean, without its last block,
    for nothing looks back at that, and then n times noisy (positions repeat): clean blocks see clean ones up to
    themselves, noisy blocks see the earlier clean ones and themselves.
    """

    def __init__(
        self,
        rope: Rope3D,
        blocks: Sequence[int],
        window: int = 0,
        noisy: int = 0,
        kernel: Kernel = sdpa,
    ) -> None:
        self.rope, self.blocks, self.window, self.kernel = rope, tuple(blocks), window, kernel
        self.clean, self.noisy = len(blocks) - bool(noisy), noisy
        index = torch.arange(sum(blocks))
        clean = index[: sum(self.blocks[: self.clean])]
        self.phase = rope.full(torch.cat([clean, *[index] * noisy]))[:, None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B, T, H, D] before RoPE, T tokens of the whole clip -> [B, T, H, D]."""
        q, k = turn(q, self.phase), turn(k, self.phase)
        tokens = self.rope.space.shape[0]
        sizes = [frames * tokens for frames in (*self.blocks[: self.clean], *self.blocks * self.noisy)]
        # Cut once: the backward pass of a slice writes a whole tensor, that of a concatenation only its parts.
        queries, keys, values = (x.transpose(1, 2).split(sizes, dim=2) for x in (q, k, v))
        outs = []
        for at, q in enumerate(queries):
            block = at if at < self.clean else (at - self.clean) % len(self.blocks)
            first, hidden = self._from(block)
            outs.append(self._block(q, keys, values, [*range(first, block), at], hidden * tokens))
        return torch.cat(outs, dim=2).transpose(1, 2)

    def _block(
        self, q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], seen: list[int], hidden: int
    ) -> Tensor:
        """Attention of one block's queries to the blocks `seen`, without their first `hidden` tokens."""
        k, v = (torch.cat([x[i] for i in seen], dim=2) for x in (keys, values))
        return self.kernel(q, k[:, :, hidden:], v[:, :, hidden:])

    def _from(self, block: int) -> tuple[int, int]:
        """The first block that `block` sees, and how many of its frames lie before the window."""
        starts = [0, *itertools.accumulate(self.blocks)]
        low = max(0, starts[block + 1] - self.window) if self.window else 0
        first = next(i for i, end in enumerate(starts[1:]) if end > low)
        return first, low - starts[first]
