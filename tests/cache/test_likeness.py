"""Likeness against cosines worked out by hand, and what it lets into the memory of a real cache."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.builders import close, draw, held
from torch import Tensor

from hforce.cache.heads import LOOK_EVERY, HeadCache
from hforce.cache.likeness import STILLNESS, DriftGauge, KeyLikeness
from hforce.cache.policies.memory import Memory
from hforce.cache.policy import Frame
from hforce.cache.roles import HeadRole, RoleMap
from hforce.geometry import Geometry

GRID, HEADS, WIDTH = (6, 8), 2, 4
TOKENS = GRID[0] * GRID[1]
GATE = Memory().gate


def frames(*numbers: int) -> list[Frame]:
    return [Frame(index) for index in numbers]


def pooled(keys: Tensor) -> Tensor:
    """Keys [S, H, D] averaged over 2 x 2 tokens, by loops -> [H, 12 D] (a grid of 6 x 8 has 3 x 4 such cells)."""
    picture = keys.double().unflatten(0, GRID)
    cells = [picture[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean(dim=(0, 1)) for r in range(3) for c in range(4)]
    return torch.stack(cells, dim=1).flatten(1)


# The measure


def test_likeness_is_one_less_the_share_of_what_differs() -> None:
    """Per head: 1 - |x - y|^2 / (|x|^2 + |y|^2 + e) of pooled, centred keys; then the mean over heads of all layers."""
    keys = [draw(4 * TOKENS, HEADS, WIDTH, seed=i) + 1 for i in range(2)]
    likeness = KeyLikeness(GRID)
    likeness.add([10, 11, 12, 15], keys)
    numbers = (10, 11, 12, 15)
    x = torch.stack([torch.cat([pooled(k.split(TOKENS)[i]) for k in keys]) for i in range(4)])  # [4, 2 H, cells D]
    mean = x.mean(dim=0)
    for i, one in enumerate(numbers):
        for j, other in enumerate(numbers):
            a, b = x[i] - mean, x[j] - mean
            apart = (a - b).pow(2).sum(dim=1)
            whole = a.pow(2).sum(dim=1) + b.pow(2).sum(dim=1) + STILLNESS * mean.pow(2).sum(dim=1)
            by_hand = float((1 - apart / whole).mean())
            assert math.isclose(likeness(Frame(one), Frame(other)), by_hand, abs_tol=1e-5)


def test_without_a_common_part_and_for_equal_lengths_it_is_the_cosine() -> None:
    """Keys that cancel have no mean, so nothing is added and nothing is subtracted."""
    a = draw(TOKENS, 1, WIDTH)
    a, b = a, a.roll(16, 0)
    likeness = KeyLikeness(GRID)
    likeness.add(range(4), [torch.cat([a, b, -a, -b])])
    x, y = pooled(a)[0], pooled(b)[0]
    cosine = float(torch.nn.functional.cosine_similarity(x, y, dim=0))
    assert math.isclose(likeness(Frame(0), Frame(1)), cosine, abs_tol=1e-5)
    assert math.isclose(likeness(Frame(0), Frame(2)), -1, abs_tol=1e-5)


@given(seed=st.integers(0, 1000), count=st.integers(1, 6), common=st.floats(0, 10))
@settings(max_examples=25, deadline=None)
def test_likeness_is_symmetric_at_most_one_and_one_for_the_frame_itself(seed: int, count: int, common: float) -> None:
    likeness = KeyLikeness(GRID)
    likeness.add(range(count), [draw(count * TOKENS, HEADS, WIDTH, seed=seed) + common])
    for one in frames(*range(count)):
        assert math.isclose(likeness(one, one), 1, abs_tol=1e-4)
        for other in frames(*range(count)):
            assert likeness(one, other) == pytest.approx(likeness(other, one), abs=1e-6)
            assert -1 - 1e-4 <= likeness(one, other) <= 1 + 1e-4


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.03])
def test_frames_of_a_still_scene_are_alike_though_only_noise_parts_them(noise: float) -> None:
    likeness, picture = KeyLikeness(GRID), draw(TOKENS, HEADS, WIDTH) + 1
    for index in range(12):
        likeness.add([index], [picture + noise * draw(TOKENS, HEADS, WIDTH, seed=index + 1)])
    assert min(likeness(a, b) for a in frames(*range(12)) for b in frames(*range(12))) > 0.95


def test_the_grid_may_be_smaller_than_the_cells() -> None:
    likeness = KeyLikeness((1, 2))
    likeness.add([0, 1], [draw(4, HEADS, WIDTH)])
    assert likeness(*frames(0, 1)) < 1


def test_only_frames_kept_are_remembered() -> None:
    likeness = KeyLikeness(GRID)
    for index in range(0, 300, 3):
        likeness.add(range(index, index + 3), [draw(3 * TOKENS, HEADS, WIDTH, seed=index)])
        likeness.keep(frames(0, index, index + 2))
    likeness.add([300], [draw(TOKENS, HEADS, WIDTH)])
    assert sorted(likeness._pooled) == [0, 297, 299, 300]
    assert len(likeness._table) == 16
    with pytest.raises(KeyError):
        likeness(*frames(0, 3))


# Surprise


def test_surprise_is_a_z_score_against_the_stream_so_far() -> None:
    likeness = KeyLikeness(GRID)
    novelties = (0.3 + 0.05 * draw(400)).tolist()
    scores = [likeness.surprise(n) for n in novelties]
    assert scores[0] == 0
    assert abs(statistics.mean(scores[50:])) < 0.3
    assert 0.7 < statistics.stdev(scores[50:]) < 1.6
    assert likeness.surprise(0.8) > 5
    assert KeyLikeness(GRID).surprise(0.8) == 0


def test_surprise_fades_when_the_new_becomes_usual() -> None:
    likeness = KeyLikeness(GRID)
    for n in (0.1 + 0.01 * draw(100)).tolist():
        likeness.surprise(n)
    scores = [likeness.surprise(0.5) for _ in range(60)]
    assert scores[0] > 5
    assert all(later <= earlier for earlier, later in pairwise(scores))
    assert scores[-1] < 0.3


# Drift


def usual(count: int, seed: int) -> Tensor:
    """Clean latents [count, C, h, w] of one look."""
    return draw(count, 4, 8, 8, seed=seed) * torch.tensor([1.0, 0.5, 2.0, 1.0])[:, None, None] + 0.3


def test_the_first_chunk_is_the_reference_and_the_second_has_nothing_to_be_compared_with() -> None:
    gauge = DriftGauge()
    assert gauge.measure(usual(3, 0)) == [0.0, 0.0, 0.0]
    assert gauge.measure(usual(3, 1)) == [0.0, 0.0, 0.0]
    assert all(d > 0 for d in gauge.measure(usual(3, 2)))


@pytest.mark.parametrize("damage", [lambda x: x + 0.5, lambda x: x * 1.5, lambda x: x * 0.4, lambda x: x * 0])
def test_corrupted_latents_exceed_the_gate_and_usual_ones_do_not(damage: Callable[[Tensor], Tensor]) -> None:
    gauge = DriftGauge()
    ordinary = [d for seed in range(20) for d in gauge.measure(usual(3, seed))]
    assert max(ordinary[6:]) < GATE
    assert min(gauge.measure(damage(usual(3, 99)))) > GATE
    assert max(gauge.measure(usual(3, 100))) < GATE


def test_drift_is_the_distance_over_the_95th_percentile_of_those_before() -> None:
    gauge = DriftGauge(recent=20)
    apart: list[float] = []
    start = torch.stack([_statistics(x) for x in usual(3, 0)])
    scale = start.std(dim=0, correction=0) + 0.1 * start.mean(dim=0).abs() + 1e-3
    gauge.measure(usual(3, 0))
    for seed in range(1, 12):
        new = [float((((_statistics(x) - start.mean(dim=0)) / scale) ** 2).mean() ** 0.5) for x in usual(3, seed)]
        measured = gauge.measure(usual(3, seed))
        if apart:
            lower = sorted(apart[-20:])
            percentile = next(d for i, d in enumerate(lower) if (i + 1) / len(lower) >= 0.95)
            close(torch.tensor(measured), torch.tensor(new) / percentile, 1e-4)
        apart += new


def _statistics(latent: Tensor) -> Tensor:
    """Mean and deviation of each channel of [C, h, w]."""
    channels = [c.flatten().tolist() for c in latent]
    return torch.tensor([*map(statistics.fmean, channels), *map(statistics.stdev, channels)])


@pytest.mark.parametrize("count", [1, 3])
def test_a_first_chunk_without_spread_divides_by_no_zero(count: int) -> None:
    gauge = DriftGauge()
    for seed in range(4):
        assert all(math.isfinite(d) for d in gauge.measure(torch.zeros(count, 4, 8, 8) + seed % 2))


# Through the cache


def memory_cache(policy: Memory, layers: int = 4) -> HeadCache:
    roles = RoleMap.uniform(HeadRole.MEMORY, layers, HEADS)
    return HeadCache(Geometry(layers, HEADS, WIDTH, GRID), roles, {HeadRole.MEMORY: policy})


def show(cache: HeadCache, pictures: Sequence[Tensor], noise: float = 0.02, latents: Tensor | None = None) -> None:
    """One chunk in which every frame is a picture [S, H, D] and a little noise, of its own at every frame."""
    for layer in range(cache.geometry.layers):
        grain = draw(len(pictures) * TOKENS, HEADS, WIDTH, seed=1000 * layer + cache.now + 1)
        k = (torch.cat(list(pictures)) + noise * grain)[None]
        cache.attend(layer, k, k, k)
    cache.advance(latents=latents)


def picture(number: int) -> Tensor:
    """Keys [S, H, D] with a strong common part, as real ones have."""
    return draw(TOKENS, HEADS, WIDTH, seed=int(number)) + 2


def bank(cache: HeadCache) -> list[int]:
    """Episodes: what is held beside the sink and the newest three."""
    return [index for index in held(cache) if 3 <= index < cache.now - 3]


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_a_frozen_video_fills_memory_with_at_most_one_episode(noise: float) -> None:
    cache = memory_cache(Memory())
    for _ in range(40):
        show(cache, [picture(0)] * 3, noise)
        assert len(bank(cache)) <= 1


@pytest.mark.parametrize("episodes", [1, 2, 6])
def test_a_scene_that_was_left_and_returned_from_is_remembered_with_the_first(episodes: int) -> None:
    """A-B-A: the sink keeps A, and one episode or more keeps B."""
    cache, scenes = memory_cache(Memory(episodes=episodes)), "A" * 10 + "B" * 10 + "A" * 20
    for scene in scenes:
        show(cache, [picture(ord(scene))] * 3)
    remembered = {scenes[index // 3] for index in held(cache)[:-3]}
    assert remembered == {"A", "B"}
    assert len(bank(cache)) <= episodes


def test_many_scenes_fill_the_bank_with_different_ones() -> None:
    cache, scenes = memory_cache(Memory()), [i // 4 % 5 for i in range(60)]
    for scene in scenes:
        show(cache, [picture(scene)] * 3)
    assert {scenes[index // 3] for index in held(cache)} == set(range(5))


def test_a_cut_is_the_most_surprising_thing_in_the_video() -> None:
    cache, surprises = memory_cache(Memory(window=6)), []
    for number in range(30):
        show(cache, [picture(number >= 20)] * 3)
        surprises.append(cache.lanes[0].held[-3].surprise)
    assert max(range(30), key=surprises.__getitem__) == 20
    assert surprises[20] > 3


def test_corruption_is_novel_and_still_kept_out() -> None:
    """Chunk 12 is a picture never seen, with broken latents: the gate drops it. With whole ones it is an episode."""
    for damage, is_remembered in ((3.0, False), (1.0, True)):
        cache = memory_cache(Memory())
        for number in range(20):
            latents = usual(3, number) * (damage if number == 12 else 1)
            show(cache, [picture(number == 12)] * 3, latents=latents)
        assert any(36 <= index < 39 for index in bank(cache)) is is_remembered


def test_the_gate_is_open_until_the_picture_has_settled() -> None:
    cache = memory_cache(Memory())
    for number in range(10):
        for layer in range(4):
            k = picture(number).repeat(3, 1, 1)[None]
            cache.attend(layer, k, k, k)
        cache.advance(0, usual(3, number) * (5 if number > 6 else 1), settled=number < 7)
        if number > 6:
            assert [frame.drift for frame in cache.lanes[0].held[-3:]] == [0, 0, 0]


def test_what_a_cache_looks_at_does_not_grow() -> None:
    """Memory is constant in the tables, too: only frames held, and keys of the last pass alone."""
    cache, sizes = memory_cache(Memory()), set()
    for number in range(60):
        show(cache, [picture(3 * number + i) for i in range(3)])
        likeness = cache.lanes[0].likeness
        assert likeness is not None
        assert sorted(likeness._pooled) == held(cache)
        assert len(likeness._table) <= (cache.lanes[0].policy.capacity + 3) ** 2
        assert len(cache._seen) == -(-4 // LOOK_EVERY)
        sizes.add(len(held(cache)))
    assert max(sizes) == cache.lanes[0].policy.capacity


def test_a_reset_forgets_every_picture() -> None:
    cache = memory_cache(Memory())
    for number in range(10):
        show(cache, [picture(number)] * 3, latents=usual(3, number))
    once = [(f.index, f.surprise, f.drift) for f in cache.lanes[0].held]
    cache.reset()
    for number in range(10):
        show(cache, [picture(number)] * 3, latents=usual(3, number))
    assert [(f.index, f.surprise, f.drift) for f in cache.lanes[0].held] == once
