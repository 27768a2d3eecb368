"""Block-causal attention of whole clips against a loop over blocks and heads."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tests.builders import attend_clip, close, draw
from torch import Tensor

from hforce.attention.dense import BlockCausal, Kernel, plain_softmax, sdpa
from hforce.attention.rope import Rope3D

GRID, TOKENS, HEADS, WIDTH = (2, 3), 6, 3, 12
ROPE = Rope3D(GRID, WIDTH)
LAYOUTS = ([3, 3, 3], [1] * 7, [1, 3, 3], [7])


def clip(frames: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [2, frames S, H, D]."""
    q, k, v = (draw(2, frames * TOKENS, HEADS, WIDTH, seed=3 * seed + i) for i in range(3))
    return q, k, v


@pytest.mark.parametrize("kernel", [sdpa, plain_softmax])
@pytest.mark.parametrize("window", [0, 3, 5])
@pytest.mark.parametrize("blocks", LAYOUTS)
def test_every_block_sees_itself_and_the_window_before_it(blocks: Sequence[int], window: int, kernel: Kernel) -> None:
    q, k, v = clip(sum(blocks))
    window = max(window, max(blocks)) if window else 0
    out = BlockCausal(ROPE, blocks, window, kernel=kernel)(0, q, k, v)
    size = dict(zip([sum(blocks[:i]) for i in range(len(blocks))], blocks, strict=True))

    def past(start: int) -> Sequence[int]:
        return range(max(0, start + size[start] - window) if window else 0, start)

    for item in range(2):
        one = [x[item].unflatten(0, (-1, TOKENS)) for x in (q, k, v)]
        close(out[item].unflatten(0, (-1, TOKENS)), attend_clip(one[0], one[1], one[2], GRID, blocks, past))


def test_later_frames_change_no_earlier_block() -> None:
    q, k, v = clip(9)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, 6 * TOKENS :] += 1
    attend = BlockCausal(ROPE, [3, 3, 3])
    before, after = attend(0, q, k, v), attend(0, *changed)
    close(after[:, : 6 * TOKENS], before[:, : 6 * TOKENS], 0)
    assert not torch.equal(after[:, 6 * TOKENS :], before[:, 6 * TOKENS :])


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("blocks", [[3, 3, 3], [1, 3, 3], [1] * 4])
def test_teacher_forcing_is_many_streams_at_once(blocks: Sequence[int], window: int, views: int) -> None:
    """The clean part is the clip alone; a noisy block is that block in place of the clean one, and nothing after it."""
    tokens, clean = sum(blocks) * TOKENS, sum(blocks[:-1]) * TOKENS
    clips = [clip(sum(blocks), seed=seed) for seed in range(views + 1)]
    joined = [torch.cat([parts[0][:, :clean], *parts[1:]], dim=1) for parts in zip(*clips, strict=True)]
    out = BlockCausal(ROPE, blocks, window, noisy=views)(0, *joined)
    alone = BlockCausal(ROPE, blocks, window)(0, *clips[0])
    close(out[:, :clean], alone[:, :clean], 1e-6)
    for view in range(views):
        begin, end = clean + view * tokens, 0
        for number, frames in enumerate(blocks):
            start, end = end, end + frames * TOKENS
            noisy = slice(begin + start, begin + end)
            replaced = [torch.cat([x[:, :start], x[:, noisy]], dim=1) for x in joined]
            one = BlockCausal(ROPE, blocks[: number + 1], window)(0, *replaced)
            close(out[:, noisy], one[:, start:])


def test_both_kernels_have_the_same_gradient() -> None:
    inputs = [x.transpose(1, 2).requires_grad_() for x in clip(2)]
    weight = draw(*inputs[0].shape, seed=9)
    gradients = [torch.autograd.grad((kernel(*inputs) * weight).sum(), inputs) for kernel in (sdpa, plain_softmax)]
    for fused, plain in zip(*gradients, strict=True):
        close(plain, fused)


def test_keys_in_any_order_give_the_same() -> None:
    """Positions are in the keys, not in their places: why a cache may keep a frame in any slot."""
    q, k, v = (x.transpose(1, 2) for x in clip(2))
    order = torch.randperm(k.shape[2], generator=torch.Generator().manual_seed(0))
    close(sdpa(q, k[:, :, order], v[:, :, order]), sdpa(q, k, v))
