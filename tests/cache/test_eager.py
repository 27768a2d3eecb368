"""The eager window computes what the cache computes under the policy `window`, and what dense attention says."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tests.builders import attend_clip, close, draw

from hforce.cache.eager import EagerWindow
from hforce.cache.heads import HeadCache
from hforce.cache.policies.window import Window
from hforce.cache.roles import HeadRole, RoleMap
from hforce.geometry import Geometry
from hforce.stream import Past

LAYERS, HEADS, WIDTH, GRID, CHUNK, SPAN = 2, 3, 12, (2, 3), 3, 9
GEOMETRY = Geometry(LAYERS, HEADS, WIDTH, GRID, CHUNK, SPAN)
TOKENS = GEOMETRY.tokens


def window_cache() -> HeadCache:
    roles = RoleMap.uniform(HeadRole.MEMORY, LAYERS, HEADS)
    return HeadCache(GEOMETRY, roles, {HeadRole.MEMORY: Window(frames=SPAN)})


def passes(cache: Past, chunk: int, frames: int = CHUNK) -> list[torch.Tensor]:
    """A noisy and a clean pass over a chunk, both layers: what attention gives, [1, N, H, D] each."""
    outs = []
    for number in range(2):
        for layer in range(LAYERS):
            seeds = (100 * chunk + 10 * number + layer + 1000 * part for part in range(3))
            outs.append(cache.attend(layer, *(draw(1, frames * TOKENS, HEADS, WIDTH, seed=seed) for seed in seeds)))
    return outs


@pytest.mark.parametrize("sizes", [(3,) * 6, (1, 3, 3, 3, 3)])
def test_it_equals_the_window_of_the_cache(sizes: Sequence[int]) -> None:
    eager, cache = EagerWindow(GEOMETRY), window_cache()
    for chunk, frames in enumerate(sizes):
        for ours, theirs in zip(passes(eager, chunk, frames), passes(cache, chunk, frames), strict=True):
            close(ours, theirs, 1e-4)
        for each in (eager, cache):
            each.advance()
        assert eager.now == cache.now
        assert eager.stats().next_frames == cache.stats().next_frames


def test_it_is_dense_attention_over_a_rolling_window() -> None:
    eager, frames = EagerWindow(GEOMETRY), 6 * CHUNK
    q, k, v = (draw(frames, TOKENS, HEADS, WIDTH, seed=seed) for seed in range(3))
    expected = attend_clip(q, k, v, GRID, [CHUNK] * 6, lambda start: range(max(0, start + CHUNK - SPAN), start))
    for first in range(0, frames, CHUNK):
        own = [x[first : first + CHUNK].flatten(0, 1)[None] for x in (q, k, v)]
        for layer in range(LAYERS):
            close(eager.attend(layer, *own)[0], expected[first : first + CHUNK].flatten(0, 1), 1e-4)
        eager.advance()


def test_what_is_forgotten_is_gone_from_both() -> None:
    eager, cache = EagerWindow(GEOMETRY), window_cache()
    for each in (eager, cache):
        for chunk in range(5):
            passes(each, chunk)
            each.advance()
        each.forget(each.now - 2 * CHUNK)
        each.flush()
    for chunk in (7, 8):
        for ours, theirs in zip(passes(eager, chunk), passes(cache, chunk), strict=True):
            close(ours, theirs, 1e-4)
        for each in (eager, cache):
            each.advance(shot=1)
    eager.reset()
    assert (eager.now, eager.stats().next_frames) == (0, CHUNK)


def test_it_tells_the_bytes_it_takes() -> None:
    stats = EagerWindow(GEOMETRY, torch.float16).stats()
    assert stats.nbytes == 2 * LAYERS * SPAN * TOKENS * HEADS * WIDTH * 2
    assert stats.mean_frames == SPAN
