"""The cache against dense attention, and what no stream of chunks, flushes and returns may do to its slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.builders import (
    Loop,
    attend_clip,
    close,
    draw,
    held,
    placed,
    role_map,
    rotate,
    stored,
)
from torch import Tensor

from hforce.attention.backends import make_backend, reasons
from hforce.attention.dense import BlockCausal
from hforce.attention.layout import Backend, Keeping
from hforce.attention.rope import Rope3D
from hforce.cache.heads import HeadCache
from hforce.cache.policies import Anchor, Full, Local, Memory, Sink, Window, make_policy
from hforce.cache.policy import CachePolicy
from hforce.cache.roles import HeadRole, RoleMap
from hforce.errors import ConfigError, DataError
from hforce.geometry import Geometry
from hforce.models.dit import Attend

GRID, TOKENS, HEADS, WIDTH = (2, 3), 6, 4, 12
LOCAL, ANCHOR, MEMORY = HeadRole
Policies = Mapping[HeadRole, CachePolicy]
FORCING: Policies = {LOCAL: Local(), ANCHOR: Anchor(), MEMORY: Memory()}
UNEQUAL: Policies = {LOCAL: Local(window=1), ANCHOR: Sink(sink=2, window=3), MEMORY: Memory(sink=1, episodes=2)}
NOTHING: Policies = {LOCAL: Local(window=0), ANCHOR: Window(frames=5), MEMORY: Memory(episodes=1, window=5)}
MIXED = role_map("MMAL", "LAMM", "LLLL", "AAMM", "MMMM")  # all orders; layers without a role
Clip = tuple[Tensor, Tensor, Tensor]  # q, k, v, each [L, 1, F S, H, D]


def cache_of(roles: RoleMap, policies: Policies, chunk: int = 3, grid: tuple[int, int] = GRID) -> HeadCache:
    return HeadCache(Geometry(roles.layers, roles.heads, WIDTH, grid, chunk), roles, policies)


def one_role(policy: CachePolicy, chunk: int = 3, layers: int = 2) -> HeadCache:
    return cache_of(RoleMap.uniform(MEMORY, layers, HEADS), {MEMORY: policy}, chunk)


def clip(frames: int, layers: int = 2, tokens: int = TOKENS, seed: int = 0) -> Clip:
    q, k, v = (draw(layers, 1, frames * tokens, HEADS, WIDTH, seed=3 * seed + i) for i in range(3))
    return q, k, v


def part_of(whole: Clip, first: int, last: int, tokens: int = TOKENS) -> Clip:
    """Frames first .. last - 1 of a clip."""
    q, k, v = (x[:, :, first * tokens : last * tokens] for x in whole)
    return q, k, v


def chunk_pass(attend: Attend, part: Clip) -> Tensor:
    """One pass through all layers -> [L, 1, N, H, D]."""
    return torch.stack([attend(layer, *layers) for layer, layers in enumerate(zip(*part, strict=True))])


def play(cache: HeadCache, whole: Clip, blocks: Sequence[int]) -> Tensor:
    """Runs a clip through the cache as a stream does, a noisy pass before every clean one; what the clean ones saw."""
    layers, tokens, start, outs = cache.geometry.layers, cache.geometry.tokens, 0, []
    for number, frames in enumerate(blocks):
        chunk_pass(cache.attend, clip(frames, layers, tokens, seed=100 + number))
        outs.append(chunk_pass(cache.attend, part_of(whole, start, start + frames, tokens)))
        cache.advance()
        start += frames
    return torch.cat(outs, dim=2)


# Against dense attention


@pytest.mark.parametrize("blocks", [[3] * 5, [1] * 9, [1, 3, 3, 3]])
@pytest.mark.parametrize("window", [0, 3, 5, 7])
def test_stream_through_full_or_window_is_block_causal_attention(blocks: list[int], window: int) -> None:
    whole, chunk = clip(sum(blocks)), blocks[-1]
    policy = Window(window, chunk, positions="true") if window else Full(sum(blocks))
    dense = BlockCausal(Rope3D(GRID, WIDTH), blocks, window)
    close(play(one_role(policy, chunk), whole, blocks), chunk_pass(dense, whole))


@pytest.mark.parametrize("blocks", [[3] * 5, [1] * 9, [1, 3, 3, 3]])
def test_stream_through_a_sink_is_attention_to_the_first_and_the_newest_frames(blocks: list[int]) -> None:
    whole = clip(sum(blocks))
    out = play(one_role(Sink(sink=2, window=4, positions="true"), blocks[-1]), whole, blocks)

    def past(start: int) -> list[int]:
        return [f for f in range(start) if f < 2 or f >= start - 4]

    for layer in range(2):
        q, k, v = (x[layer, 0].unflatten(0, (-1, TOKENS)) for x in whole)
        close(out[layer, 0].unflatten(0, (-1, TOKENS)), attend_clip(q, k, v, GRID, blocks, past))


@pytest.mark.parametrize("positions", ["clamp", "rank"])
@pytest.mark.parametrize("blocks", [[3] * 7, [1] * 21, [1, 3, 3, 3, 3, 3, 3]])
def test_generous_budgets_are_the_model_as_trained_for_its_whole_span(positions: str, blocks: list[int]) -> None:
    chunk, whole = blocks[-1], clip(sum(blocks), MIXED.layers)
    policies = {
        LOCAL: Local(window=20, positions=positions),
        ANCHOR: Anchor(sink=1, window=19, positions=positions),
        MEMORY: Memory(sink=3, episodes=6, window=17, chunk=chunk, positions=positions),
    }
    dense = BlockCausal(Rope3D(GRID, WIDTH), blocks)
    close(play(cache_of(MIXED, policies, chunk), whole, blocks), chunk_pass(dense, whole))


@pytest.mark.parametrize("positions", ["clamp", "rank", "true"])
@pytest.mark.parametrize("policies", [FORCING, UNEQUAL, NOTHING])
def test_grouped_attention_is_a_loop_over_heads(policies: Policies, positions: str) -> None:
    """Roles in any order, layers without some role, roles of equal and of different capacity."""
    cache = cache_of(MIXED, {role: replace(policy, positions=positions) for role, policy in policies.items()})
    loop = Loop(cache.geometry, MIXED)
    for number in range(12):
        for part in (clip(3, MIXED.layers, seed=number), clip(3, MIXED.layers, seed=50 + number)):
            close(chunk_pass(cache.attend, part), chunk_pass(loop.attend, part))
        cache.advance()
        loop.advance(placed(cache))
        if number == 8:  # roles of equal capacity now hold unequally many frames
            cache.forget(cache.now - 3)
            loop.now, loop.placed = cache.now, placed(cache)
    assert any(len(lane.held) < cache.now for lane in cache.lanes)


def test_a_role_holds_what_its_policy_keeps() -> None:
    policies: Policies = {LOCAL: Local(window=2), ANCHOR: Anchor(), MEMORY: Sink(sink=2, window=3)}
    cache = cache_of(MIXED, policies)
    play(cache, clip(12, MIXED.layers), [3] * 4)
    assert [held(cache, role) for role in (LOCAL, ANCHOR, MEMORY)] == [[10, 11], [0, 10, 11], [0, 1, 9, 10, 11]]


# What a stream must not do


def test_a_noisy_pass_leaves_no_trace() -> None:
    """Bitwise: after any number of noisy passes and a clean one, the next chunk sees what the clean one alone left."""
    one, other = cache_of(MIXED, UNEQUAL), cache_of(MIXED, UNEQUAL)
    for number in range(8):
        clean = clip(3, MIXED.layers, seed=number)
        for noisy in range(number % 3 + 1):
            chunk_pass(one.attend, clip(3, MIXED.layers, seed=100 + noisy))
        close(chunk_pass(one.attend, clean), chunk_pass(other.attend, clean), 0)
        one.advance()
        other.advance()


def test_the_order_of_slots_does_not_matter() -> None:
    cache = cache_of(MIXED, UNEQUAL)
    play(cache, clip(24, MIXED.layers), [3] * 8)
    part = clip(3, MIXED.layers, seed=1)
    before = chunk_pass(cache.attend, part)
    for number, lane in enumerate(cache.lanes):
        old = [*lane.slot.values()]
        new = [old[i] for i in torch.randperm(len(old), generator=torch.Generator().manual_seed(number))]
        for layer, row in enumerate(MIXED.roles):
            if lane.role in row:
                for store in (cache.store.keys[layer], cache.store.values[layer]):
                    block = cache.store.block(store, layer, number)
                    block[:, new] = block[:, old]
        lane.slot = dict(zip(lane.slot, new, strict=True))
    close(chunk_pass(cache.attend, part), before)


def check_slots(cache: HeadCache) -> None:
    """Slots are owned once, dense behind staging, and hold the frame they say, turned to where it is placed."""
    for lane in cache.lanes:
        numbers, chunk = [f.index for f in lane.held], cache.geometry.chunk
        assert numbers == sorted(set(numbers)) and set(numbers) == set(lane.slot)
        assert len(numbers) <= lane.policy.capacity
        assert sorted(lane.slot.values()) == list(range(chunk, chunk + len(numbers)))
        assert [f.index for f in lane.placed.frames] == numbers
        raw = torch.stack([torch.zeros(WIDTH), *(numbered(index)[0] for index in numbers)])[1:, None, None]
        expected = rotate(raw, [-d for d in lane.placed.distance], (1, 1))[:, 0]  # [frames, 1, D]
        for layer in range(cache.geometry.layers):
            kept = stored(cache, lane.role, layer)
            for place, index in enumerate(numbers):
                keys, values = kept[index]  # [heads, 1, D]
                assert bool((values == index + 1).all())
                close(keys, expected[place].expand_as(keys))


def numbered(index: int) -> tuple[Tensor, Tensor]:
    """A key and a value [D] that tell the number of their frame."""
    return draw(WIDTH, seed=index), torch.full((WIDTH,), index + 1.0)


def numbered_chunk(now: int, frames: int) -> Clip:
    pairs = [numbered(index) for index in range(now, now + frames)]
    k, v = (torch.stack(x)[None, None, :, None].expand(3, 1, -1, HEADS, -1) for x in zip(*pairs, strict=True))
    return torch.zeros_like(k), k, v


@given(
    rows=st.lists(st.sampled_from(["MMAL", "LAMM", "LLLL", "AAMM", "MMMM", "MMML"]), min_size=3, max_size=3),
    policies=st.sampled_from([FORCING, UNEQUAL, NOTHING, dict.fromkeys(HeadRole, Sink(1, 14, positions="rank"))]),
    short=st.booleans(),
    begun=st.integers(0, 10),
    events=st.lists(st.sampled_from(["chunk", "chunk", "flush", "back 3", "back 6", "reset"]), max_size=8),
)
@settings(max_examples=30, deadline=None)
def test_no_slot_leaks_and_no_frame_is_lost(
    rows: list[str], policies: Policies, short: bool, begun: int, events: list[str]
) -> None:
    """Whatever happens, in a cache of one token a frame; a video may begin with a single frame."""
    cache = cache_of(role_map(*rows), policies, grid=(1, 1))
    size = cache.stats().nbytes
    for event in ["chunk"] * begun + events:
        if event == "chunk":
            frames = 1 if short and not cache.now else 3
            chunk_pass(cache.attend, numbered_chunk(cache.now + 1, frames))
            chunk_pass(cache.attend, numbered_chunk(cache.now, frames))
            cache.advance()
            continue
        if event == "flush":
            cache.flush()
        elif event == "reset":
            cache.reset()
        else:
            cache.forget(max(cache.now - int(event[-1]), 0))
        check_slots(cache)
    check_slots(cache)
    assert cache.stats().nbytes == size


def test_memory_is_the_same_before_the_first_frame_and_after_200_chunks() -> None:
    cache = cache_of(role_map("MMAL", "LLLL", "AAMM"), FORCING, grid=(1, 1))
    before, where = cache.stats().nbytes, [x.data_ptr() for x in cache.store.tensors]
    slots = 3 * 6 + 1 * 6 + 4 * 6 + 4 * 15  # A+L, L, L, A: 6 frames; M: 15
    past = slots - 12 * 3  # of which the chunk being made has no second copy of what turns in time
    assert before == 4 * (2 * WIDTH * slots + Rope3D((1, 1), WIDTH).time_dims * past)
    for number in range(200):
        chunk_pass(cache.attend, numbered_chunk(3 * number, 3))
        cache.advance()
    assert cache.stats().nbytes == before
    assert [x.data_ptr() for x in cache.store.tensors] == where
    assert cache.stats().frames == {"local": 3, "anchor": 3, "memory": len(held(cache))}


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("positions", ["clamp", "rank"])
@pytest.mark.parametrize("names", [("local", "anchor", "memory"), ("window", "sink", "full")])
def test_no_head_is_ever_given_a_distance_it_was_not_trained_on(
    names: tuple[str, ...], positions: str, chunk: int
) -> None:
    """For hundreds of frames every difference, query minus key, lies in -(chunk - 1) .. span - 1."""
    options = {
        "full": {"frames": 150},
        "memory": {"chunk": chunk},
        "window": {"chunk": chunk},
    }
    made = [make_policy(name, positions=positions, **options.get(name, {})) for name in names]
    cache = cache_of(role_map("LAMM"), dict(zip(HeadRole, made, strict=True)), chunk, grid=(1, 1))
    chunks = 150 // chunk if "full" in names else 300
    seen: set[float] = set()
    for number in range(chunks):
        chunk_pass(cache.attend, clip(chunk, 1, 1, seed=number))
        cache.advance()
        for lane in cache.lanes:
            seen |= {query + distance for query in range(chunk) for distance in lane.placed.distance}
    assert min(seen) > 0 and max(seen) <= cache.geometry.span - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_are_always_turned_from_the_raw_key(dtype: torch.dtype) -> None:
    """After 300 chunks the first frame's key is its raw key turned once. Turned again and again, it would drift."""
    geometry = Geometry(1, HEADS, 24, GRID)
    policy = Anchor(sink=1, window=4)
    cache = HeadCache(geometry, RoleMap.uniform(ANCHOR, 1, HEADS), {ANCHOR: policy}, dtype)
    first = draw(1, 3 * TOKENS, HEADS, 24).to(dtype)
    for number in range(300):
        k = first if not number else draw(1, 3 * TOKENS, HEADS, 24, seed=number).to(dtype)
        cache.attend(0, k, k, k)
        cache.advance()
    assert placed(cache)[ANCHOR].distance[0] == 18
    key, value = stored(cache, ANCHOR, 0)[0]
    raw = first[0, :TOKENS]
    tolerance = 1e-5 if dtype is torch.float32 else 2**-8 * float(raw.abs().max())
    close(key.transpose(0, 1).float(), rotate(raw[None], [-18], GRID)[0], tolerance)
    close(value.transpose(0, 1), raw, 0)


# Going back, and beginning again


def test_a_cache_that_was_reset_is_a_new_one() -> None:
    used, fresh = cache_of(MIXED, FORCING), cache_of(MIXED, FORCING)
    play(used, clip(21, MIXED.layers, seed=5), [3] * 7)
    used.reset()
    whole = clip(15, MIXED.layers)
    close(play(used, whole, [3] * 5), play(fresh, whole, [3] * 5), 0)


def test_frames_forgotten_and_run_again_leave_what_was_there() -> None:
    one, other = one_role(Full(18)), one_role(Full(18))
    whole, part = clip(12), clip(3, seed=1)
    play(one, whole, [3] * 4)
    play(other, whole, [3] * 4)
    other.forget(6)
    assert held(other) == [*range(6)] and other.now == 6
    play(other, part_of(whole, 6, 12), [3, 3])
    close(chunk_pass(other.attend, part), chunk_pass(one.attend, part), 1e-6)


def test_a_flush_leaves_memory_its_sink_and_two_frames_and_the_others_all() -> None:
    cache = cache_of(MIXED, FORCING)
    play(cache, clip(30, MIXED.layers), [3] * 10)
    assert len(held(cache)) > 6
    cache.flush()
    assert [held(cache, role) for role in (LOCAL, ANCHOR, MEMORY)] == [[27, 28, 29], [0, 28, 29], [0, 1, 2, 28, 29]]


# Mass on frames


@pytest.mark.parametrize("blocks", [[3], [3] * 4, [1], [1, 3, 3]])
def test_frame_mass_is_the_softmax_over_all_tokens_summed_by_frame(blocks: list[int]) -> None:
    frames = sum(blocks)
    whole, cache = clip(frames), one_role(Window(8, positions="true"))
    start = frames - blocks[-1]
    if start:
        play(cache, part_of(whole, 0, start), blocks[:-1])
    q, k, v = part_of(whole, start, frames)
    chunk_pass(cache.attend, (q, k, v))
    numbers = [*range(max(0, start - 5), frames)]
    for layer in range(2):
        mass, seen = cache.frame_mass(layer, q[layer])
        assert seen == numbers
        close(mass.sum(dim=1), torch.ones(HEADS), 1e-6)
        query = rotate(q[layer, 0].unflatten(0, (-1, TOKENS)), range(start, frames), GRID)
        key = rotate(whole[1][layer, 0].unflatten(0, (-1, TOKENS))[numbers], numbers, GRID)
        for head in range(HEADS):
            logits = query[:, :, head].flatten(0, 1) @ key[:, :, head].flatten(0, 1).T / WIDTH**0.5
            by_frame = logits.softmax(dim=1).unflatten(1, (len(numbers), TOKENS)).sum(dim=2).mean(dim=0)
            close(mass[head], by_frame)


def test_frame_mass_does_not_depend_on_the_size_of_its_blocks_and_samples_every_stride() -> None:
    cache, whole = one_role(Window(9)), clip(12)
    play(cache, whole, [3] * 4)
    q, k, v = clip(3, seed=1)
    chunk_pass(cache.attend, (q, k, v))
    exact, _ = cache.frame_mass(0, q[0])
    for block in (1, 5, 18):
        close(cache.frame_mass(0, q[0], block=block)[0], exact, 1e-6)
    every = [cache.frame_mass(0, q[0].roll(-shift, 1), stride=6)[0] for shift in range(6)]
    assert all(bool((mass.sum(dim=1) - 1).abs().max() < 1e-6) for mass in every)
    assert not torch.equal(every[0], exact)


# Looking at pictures, and what is refused


@pytest.mark.parametrize("rows", [("LLLL", "MMMM"), ("LLLL", "AAAA", "MMLL", "LLLL"), ("MMMM", "LLLL")])
def test_memory_heads_are_looked_at_wherever_they_are(rows: tuple[str, ...]) -> None:
    """Looking at every third layer alone used to fail when none of them had a memory head."""
    roles = role_map(*rows)
    cache = cache_of(roles, {**FORCING, MEMORY: Memory(window=0)})
    play(cache, clip(9, roles.layers), [3] * 3)
    assert held(cache)[:3] == [0, 1, 2] and len(held(cache)) > 3


def test_a_role_without_a_policy_is_refused() -> None:
    """It used to be a KeyError."""
    with pytest.raises(ConfigError, match="anchor"):
        cache_of(role_map("MMAL"), {LOCAL: Local(), MEMORY: Memory()})


def test_a_role_in_pieces_is_refused() -> None:
    with pytest.raises(ConfigError, match="head_order"):
        cache_of(role_map("MALM"), FORCING)


def test_roles_of_another_model_are_refused() -> None:
    with pytest.raises(DataError, match="1 x 4"):
        HeadCache(Geometry(2, 4, WIDTH, GRID), role_map("MMAL"), FORCING)


def test_only_the_first_chunk_may_be_short() -> None:
    """Later, the frames held lie in slots beyond those a short pass would read; it used to read the wrong ones."""
    cache = one_role(Window(9))
    play(cache, clip(12), [3] * 4)
    with pytest.raises(AssertionError, match="first chunk"):
        chunk_pass(cache.attend, clip(1))


# Backends that turn the query instead of the keys


FEW: Policies = {
    LOCAL: Local(window=1),
    ANCHOR: Sink(sink=1, window=1),
    MEMORY: Memory(sink=1, episodes=1, window=1, chunk=1),
}
needs_triton = pytest.mark.skipif(not find_spec("triton"), reason='pip install "hforce[kernels]"')


def whole_backend(name: str) -> Backend:
    """The backend; with Triton's kernel, those that write, move and turn, too, as on a GPU."""
    if not name.startswith("triton"):
        return make_backend(name)
    from hforce.attention.triton_kernel import move, place, turn_past

    return replace(make_backend(name), keeping=Keeping(place, move, turn_past))


@pytest.mark.parametrize(
    ("name", "rows", "policies", "chunk"),
    [
        ("reference", ("MMAL", "LAMM"), UNEQUAL, 3),
        pytest.param("triton", ("LMAA",), FEW, 1, marks=needs_triton),  # few slots: the interpreter is slow
        pytest.param("triton-key", ("LMAA",), FEW, 1, marks=needs_triton),
    ],
)
def test_turning_queries_gives_what_turning_keys_gives(
    name: str, rows: tuple[str, ...], policies: Policies, chunk: int
) -> None:
    """A long roll-out with evictions, episodes, a change of prompt, and chunks forgotten and made again."""
    geometry = Geometry(len(rows), HEADS, WIDTH, GRID, chunk)
    device = "cuda" if name.startswith("triton") and torch.cuda.is_available() else "cpu"
    keys, queries = (
        HeadCache(geometry, role_map(*rows), policies, device=device, backend=whole_backend(each))
        for each in ("sdpa", name)
    )
    for number in range(14):
        for seed in (100 + number, number) if number % 4 == 0 else (number,):  # a noisy pass before the clean one
            q, k, v = clip(chunk if number else 1, len(rows), seed=seed)  # the first chunk is short
            part = q.to(device), k.to(device), v.to(device)
            close(chunk_pass(queries.attend, part), chunk_pass(keys.attend, part))
        for cache in (keys, queries):
            cache.advance(shot=number // 7)
            if number == 7:
                cache.flush()
            if number == 10:
                cache.forget(cache.now - 6)
        assert placed(queries) == placed(keys)
    assert any(len(lane.held) < keys.now for lane in keys.lanes)
    for lane in range(3):
        for layer in range(len(rows)):
            close(queries.store.read_keys(layer, lane, chunk + 1), keys.store.read_keys(layer, lane, chunk + 1))


def test_turning_queries_needs_no_second_copy() -> None:
    geometry, roles = Geometry(3, HEADS, WIDTH, GRID), role_map("MMAL", "LLLL", "AAMM")
    keys, queries = (
        HeadCache(geometry, roles, FORCING, backend=make_backend(name)).stats().nbytes for name in ("sdpa", "reference")
    )
    slots = 8 * 6 + 4 * 15  # L and A: 6 frames; M: 15
    assert queries == 4 * 2 * WIDTH * TOKENS * slots
    assert keys - queries == 4 * Rope3D(GRID, WIDTH).time_dims * TOKENS * (slots - 12 * 3)


def test_mass_on_frames_is_the_same_when_queries_are_turned() -> None:
    geometry, policies = Geometry(2, HEADS, WIDTH, GRID), {MEMORY: Window(9)}
    masses = []
    for backend in ("sdpa", "reference"):
        cache = HeadCache(geometry, RoleMap.uniform(MEMORY, 2, HEADS), policies, backend=make_backend(backend))
        play(cache, clip(12), [3] * 4)
        q, k, v = clip(3, seed=1)
        chunk_pass(cache.attend, (q, k, v))
        masses.append(cache.frame_mass(1, q[1])[0])
    close(*masses)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sdpa", "cudnn", "varlen", "triton", "triton-key"])
def test_attending_never_waits_for_the_gpu(name: str) -> None:
    device, dtype = torch.device("cuda"), torch.bfloat16
    if reason := reasons(device, dtype, 64)[name]:
        pytest.skip(f"{name} {reason}")
    roles, geometry = role_map("MMAL"), Geometry(1, HEADS, 64, GRID)
    cache = HeadCache(geometry, roles, FORCING, dtype, "cuda", make_backend(name, device))
    q, k, v = (draw(1, 3 * TOKENS, HEADS, 64, seed=i).to(device, dtype) for i in range(3))
    for _ in range(6):
        cache.attend(0, q, k, v)
        cache.advance()
    try:
        torch.cuda.set_sync_debug_mode("error")
        out = cache.attend(0, q, k, v)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(out.isfinite().all())
