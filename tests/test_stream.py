"""The loop against a generator without any cache, and what a change of prompt does to the past."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from tests.builders import close, draw, geometry_of, held, random_wan, role_map, stored
from torch import Tensor

from hforce.attention.backends import make_backend, reasons
from hforce.attention.dense import BlockCausal
from hforce.attention.rope import Rope3D
from hforce.cache.heads import HeadCache
from hforce.cache.policies.anchor import Anchor
from hforce.cache.policies.full import Full
from hforce.cache.policies.local import Local
from hforce.cache.policies.memory import Memory
from hforce.cache.policies.sink import Sink
from hforce.cache.policies.window import Window
from hforce.cache.policy import CachePolicy
from hforce.cache.roles import HeadRole, RoleMap
from hforce.errors import DataError
from hforce.graphs import Graphs
from hforce.models.dit import CausalWan
from hforce.sampler import Step
from hforce.stream import SETTLING, Chunk, Noise, Sampling, Stream, Switch, Take, seeded

GRID, SHAPE = (2, 3), (4, 4, 6)
STEPS = (Step(1000, 1.0), Step(700, 0.7), Step(300, 0.3))
WAN = random_wan()
TEXTS = [draw(1, 4, 8, seed=50 + shot) for shot in range(3)]
LOCAL, ANCHOR, MEMORY = HeadRole
FORCING = {LOCAL: Local(), ANCHOR: Anchor(), MEMORY: Memory()}
IN_CUDA = ["sdpa", "cudnn", "varlen", "triton", "triton-key"]


def one_role(policy: CachePolicy, chunk: int = 3, wan: CausalWan = WAN) -> HeadCache:
    geometry = geometry_of(wan, GRID, chunk)
    return HeadCache(geometry, RoleMap.uniform(MEMORY, geometry.layers, geometry.heads), {MEMORY: policy})


def mixed() -> HeadCache:
    return HeadCache(geometry_of(WAN, GRID), role_map("MAL", "MML"), FORCING)


def in_cuda(name: str) -> tuple[CausalWan, HeadCache]:
    """A model on a GPU with a cache that is attended by a backend, in half precision where that takes nothing else."""
    device, is_half = torch.device("cuda"), name in ("cudnn", "varlen")
    wan, dtype = (random_wan(head_dim=16), torch.bfloat16) if is_half else (copy.deepcopy(WAN), torch.float32)
    if reason := reasons(device, dtype, wan.config.head_dim)[name]:
        pytest.skip(f"{name} {reason}")
    geometry, backend = geometry_of(wan, GRID), make_backend(name, device)
    return wan.to(device, dtype), HeadCache(geometry, role_map("MAL", "MML"), FORCING, dtype, "cuda", backend)


def stream_of(
    cache: HeadCache, rule: str = "keep", noise: Noise | None = None, frames: int = 6, wan: CausalWan = WAN
) -> Stream:
    return Stream(wan, cache, Sampling(STEPS), SHAPE, noise or seeded(0), Switch(rule, frames))


def takes(*chunks: int | None) -> list[Take]:
    return [Take(TEXTS[shot], count) for shot, count in enumerate(chunks)]


def latents(chunks: Sequence[Chunk]) -> Tensor:
    return torch.cat([chunk.latents for chunk in chunks], dim=1)


def generate_without_cache(
    sampling: Sampling, noise: Noise, blocks: Sequence[int], window: int = 0, given: Tensor | None = None
) -> Tensor:
    """Makes the clip by running everything made so far through the model at every step, with no cache at all.

    blocks are those of the whole clip, with the given one's first.
    """
    clean, text, start = torch.zeros(1, 0, *SHAPE) if given is None else given, WAN.project_text(TEXTS[0]), 0
    number = 0
    for index, frames in enumerate(blocks):
        start += frames
        if start <= (0 if given is None else given.shape[1]):
            continue
        is_first = index == 0
        attend = BlockCausal(Rope3D(GRID, 12), blocks[: index + 1], window)
        draws = noise(number, (1, frames, *SHAPE))
        x = next(draws)
        steps = (is_first and sampling.first_steps) or sampling.steps
        for step, following in zip(steps, [*steps[1:], None], strict=True):
            times = torch.tensor([[sampling.commit_timestep] * clean.shape[1] + [step.timestep] * frames])
            flow = WAN(torch.cat([clean, x], dim=1), times, text, attend)[:, -frames:]
            x = x - step.sigma * flow
            if following is not None:
                x = (1 - following.sigma) * x + following.sigma * next(draws)
        clean, number = torch.cat([clean, x], dim=1), number + 1
    return clean


# Against generation without a cache


@pytest.mark.parametrize(("chunk", "first"), [(3, 0), (1, 0), (3, 1)])
@pytest.mark.parametrize("window", [0, 4])
def test_a_stream_is_generation_without_a_cache(chunk: int, first: int, window: int) -> None:
    """With a whole past, or a window at true positions; a first chunk may be one frame, with steps of its own."""
    blocks = ([1] if first else []) + [chunk] * 5
    sampling = Sampling(STEPS, first_steps=STEPS[::2], first_frames=first, commit_timestep=20.0)
    policy = Window(window, chunk, positions="true") if window else Full(sum(blocks))
    stream = Stream(WAN, one_role(policy, chunk), sampling, SHAPE, seeded(4))
    made = latents(list(stream.play([Take(TEXTS[0], len(blocks))])))
    close(made, generate_without_cache(sampling, seeded(4), blocks, window), 2e-4)


@pytest.mark.parametrize("positions", ["clamp", "rank"])
def test_head_forcing_changes_nothing_before_a_frame_is_dropped(positions: str) -> None:
    policies = {
        LOCAL: Local(window=18, positions=positions),
        ANCHOR: Anchor(sink=1, window=17, positions=positions),
        MEMORY: Memory(window=15, positions=positions),
    }
    cache = HeadCache(geometry_of(WAN, GRID), role_map("MAL", "MML"), policies)
    made = latents(list(stream_of(cache).play(takes(7))))
    close(made, generate_without_cache(Sampling(STEPS), seeded(0), [3] * 7), 2e-4)


@pytest.mark.parametrize(("count", "blocks"), [(3, [3]), (4, [1, 3]), (1, [1]), (6, [3, 3])])
def test_a_video_goes_on_from_given_latents(count: int, blocks: list[int]) -> None:
    """What holds for the very first chunk holds for none of its own then."""
    given, sampling = draw(1, count, *SHAPE, seed=8), Sampling(STEPS, first_steps=STEPS[::2], first_frames=1)
    made = list(Stream(WAN, one_role(Full(18)), sampling, SHAPE, seeded(0)).play(takes(2), given))
    assert [chunk.number for chunk in made] == [*range(-len(blocks), 2)]
    assert [chunk.latents.shape[1] for chunk in made] == [*blocks, 3, 3]
    assert torch.equal(latents(made)[:, :count], given)
    expected = generate_without_cache(sampling, seeded(0), [*blocks, 3, 3], given=given)
    close(latents(made), expected, 2e-4)


@pytest.mark.parametrize("given", [False, True])
def test_every_shot_opens_with_steps_of_its_own(given: bool) -> None:
    """But a shot that goes on from given latents is open already."""
    sampling = Sampling(STEPS, first_steps=STEPS[:1])
    told: list[float] = []
    hook = WAN.register_forward_hook(lambda module, args, flow: told.append(float(args[1][0, 0])))
    stream = Stream(WAN, one_role(Full(24)), sampling, SHAPE, seeded(0), Switch("keep"))
    list(stream.play(takes(2, 2), draw(1, 3, *SHAPE) if given else None))
    hook.remove()
    steps = [step.timestep for step in STEPS]
    ordinary, opening, taken_in = [*steps, 0.0], [steps[0], 0.0], [0.0]
    assert told == [*(taken_in + ordinary if given else opening), *ordinary, *opening, *ordinary]


def test_the_clean_pass_says_what_a_dense_pass_over_the_whole_clip_says() -> None:
    flows: list[Tensor] = []
    hook = WAN.register_forward_hook(lambda module, args, flow: flows.append(flow))
    made = list(stream_of(one_role(Full(18))).play(takes(6)))
    hook.remove()
    clip = latents(made)
    dense = WAN(clip, torch.zeros(1, 18), WAN.project_text(TEXTS[0]), BlockCausal(Rope3D(GRID, 12), [3] * 6))
    close(torch.cat(flows[len(STEPS) :: len(STEPS) + 1], dim=1), dense, 5e-5)


# Noise, laziness, failure


def test_noise_is_asked_for_by_chunk_and_a_longer_video_begins_with_the_shorter() -> None:
    asked: list[tuple[int, tuple[int, ...]]] = []

    def watched(number: int, shape: Sequence[int]) -> Iterator[Tensor]:
        asked.append((number, tuple(shape)))
        return seeded(3)(number, shape)

    short = latents(list(stream_of(mixed(), noise=watched).play(takes(4))))
    assert asked == [(number, (1, 3, *SHAPE)) for number in range(4)]
    long = latents(list(stream_of(mixed(), noise=seeded(3)).play(takes(6))))
    close(long[:, :12], short, 0)
    other = latents(list(stream_of(mixed(), noise=seeded(4)).play(takes(1))))
    assert not (other == short[:, :3]).any()


def test_a_stream_plays_the_same_video_again() -> None:
    stream = stream_of(mixed(), "recache")
    once, again = (latents(list(stream.play(takes(5, 4)))) for _ in range(2))
    close(again, once, 0)


def test_a_take_without_an_end_goes_on_for_as_long_as_somebody_asks() -> None:
    calls: list[int] = []
    hook = WAN.register_forward_hook(lambda *_: calls.append(1))
    playing = stream_of(mixed()).play(takes(None))
    assert not calls
    made = list(islice(playing, 3))
    assert [chunk.number for chunk in made] == [0, 1, 2]
    assert len(calls) == 3 * (len(STEPS) + 1)
    playing.close()  # type: ignore[attr-defined]
    hook.remove()
    assert list(playing) == []


def test_the_next_take_is_asked_for_when_the_one_before_has_ended() -> None:
    asked: list[int] = []

    def script() -> Iterator[Take]:
        for shot, take in enumerate(takes(2, 0, 1)):
            asked.append(shot)
            yield take

    seen = [(chunk.number, chunk.shot, list(asked)) for chunk in stream_of(mixed()).play(script())]
    assert seen == [(0, 0, [0]), (1, 0, [0]), (2, 2, [0, 1, 2])]


def test_a_script_without_takes_is_no_video() -> None:
    assert list(stream_of(mixed()).play([])) == []


def test_values_that_are_not_finite_end_the_video_after_the_good_chunks() -> None:
    wan = random_wan(seed=1)
    playing = stream_of(one_role(Full(18), wan=wan), wan=wan).play(takes(4))
    made = [next(playing), next(playing)]
    wan.head.head.weight.fill_(float("nan"))
    with pytest.raises(DataError, match="chunk 2 holds values that are not finite") as error:
        next(playing)
    assert "float32" in error.value.mend
    assert bool(torch.isfinite(latents(made)).all())


def test_every_pass_goes_through_a_wrapped_attend() -> None:
    cache = mixed()
    layers: list[int] = []

    def watch(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layers.append(layer)
        return cache.attend(layer, q, k, v)

    watched = stream_of(cache)
    watched.attend = watch
    made = latents(list(watched.play(takes(3))))
    assert layers == [0, 1] * 3 * (len(STEPS) + 1)
    close(made, latents(list(stream_of(mixed()).play(takes(3)))), 0)


def test_seconds_are_those_of_the_clock() -> None:
    stream = stream_of(mixed())
    stream.clock = iter([10.0, 14.0, 15.0, 20.0, 22.0, 25.0]).__next__
    assert [c.seconds for c in stream.play(takes(2))] == [{"denoise": 4, "commit": 1}, {"denoise": 2, "commit": 3}]


def test_chunks_need_no_gradient_and_may_be_kept() -> None:
    made = list(stream_of(mixed()).play(takes(3)))
    assert not any(chunk.latents.requires_grad for chunk in made)
    assert len({chunk.latents.data_ptr() for chunk in made}) == 3


# Prompts


def at_every_chunk(cache: HeadCache, look: Callable[[], object], seen: list[Any]) -> Noise:
    """The noise of seed 0, which notes what the cache holds when a chunk is about to be made."""

    def noise(number: int, shape: Sequence[int]) -> Iterator[Tensor]:
        seen.append(look())
        return seeded(0)(number, shape)

    return noise


@pytest.mark.parametrize("rule", ["keep", "flush", "recache"])
def test_a_new_prompt_changes_the_chunks_after_it_and_none_before(rule: str) -> None:
    plain = latents(list(stream_of(mixed()).play(takes(7))))
    made = list(stream_of(mixed(), rule).play(takes(4, 3)))
    assert [chunk.shot for chunk in made] == [0] * 4 + [1] * 3
    assert [chunk.number for chunk in made] == list(range(7))
    close(latents(made)[:, :12], plain[:, :12], 0)
    assert (latents(made)[:, 12:15] - plain[:, 12:15]).abs().max() > 0.01


def test_a_prompt_that_is_the_same_again_changes_nothing_if_the_past_is_kept() -> None:
    plain = latents(list(stream_of(one_role(Sink(2, 3))).play(takes(6))))
    again = [Take(TEXTS[0], 4), Take(TEXTS[0], 2)]
    close(latents(list(stream_of(one_role(Sink(2, 3))).play(again))), plain, 0)


def held_at_the_switch(rule: str) -> tuple[list[list[int]], list[list[int]]]:
    """Frames per role, local, anchor, memory, before and after the prompt changes at frame 30."""
    cache = mixed()
    seen: list[Any] = []
    noise = at_every_chunk(cache, lambda: [held(cache, role) for role in HeadRole], seen)
    list(stream_of(cache, rule, noise).play(takes(10, 1)))
    without = mixed()
    list(stream_of(without).play(takes(10)))
    return [held(without, role) for role in HeadRole], seen[10]


def test_keep_keeps_all() -> None:
    before, after = held_at_the_switch("keep")
    assert after == before
    assert len(after[2]) > 6


def test_flush_leaves_memory_its_sink_and_two_frames() -> None:
    before, after = held_at_the_switch("flush")
    assert after == [*before[:2], [0, 1, 2, 28, 29]] == [[27, 28, 29], [0, 28, 29], [0, 1, 2, 28, 29]]


def test_recache_leaves_sinks_windows_and_the_bank() -> None:
    """Of frames run again another episode may enter, for their keys are new; it may replace one old one."""
    before, after = held_at_the_switch("recache")
    assert after[:2] == before[:2]
    assert after[2][:3] == [0, 1, 2] and after[2][-3:] == [27, 28, 29]
    old = [{index for index in kept if index < 24} for kept in (before[2], after[2])]
    assert old[1] <= old[0] and len(old[0] - old[1]) <= 1


@pytest.mark.parametrize("policy", [Window(9), Window(21), Sink(2, 3), Sink(3, 9), Local(2), Anchor(), Full(40)])
@pytest.mark.parametrize("frames", [0, 2, 3, 6, 9, 100])
def test_a_recache_leaves_the_frames_that_were_held(policy: CachePolicy, frames: int) -> None:
    cache, without = one_role(policy), one_role(policy)
    seen: list[Any] = []
    noise = at_every_chunk(cache, lambda: (cache.now, held(cache)), seen)
    list(stream_of(cache, "recache", noise, frames).play(takes(5, 1)))
    list(stream_of(without).play(takes(5)))
    now, kept = seen[5]
    assert now == 15
    assert kept == held(without)


@pytest.mark.parametrize(("frames", "again"), [(0, 0), (1, 2), (3, 2), (4, 4), (6, 4), (7, 6), (100, 5 + 6)])
def test_a_recache_runs_the_last_frames_again_in_whole_chunks(frames: int, again: int) -> None:
    """At two switches, after 5 chunks and after 6. With 0 frames it used to run one chunk."""
    passes: list[int] = []
    hook = WAN.register_forward_hook(lambda *_: passes.append(1))
    list(stream_of(one_role(Full(21)), "recache", frames=frames).play(takes(5, 1, 1)))
    hook.remove()
    assert len(passes) - 7 * (len(STEPS) + 1) == again


@pytest.mark.parametrize(("frames", "again"), [(3, 1), (6, 2), (15, 5)])
def test_keys_after_a_recache_are_those_of_the_same_latents_under_the_new_prompt(frames: int, again: int) -> None:
    cache = one_role(Full(18))
    seen: list[Any] = []
    noise = at_every_chunk(cache, lambda: [stored(cache, MEMORY, layer) for layer in range(2)], seen)
    made = list(stream_of(cache, "recache", noise, frames).play(takes(5, 1)))
    fresh = one_role(Full(18))
    for number, chunk in enumerate(made[:5]):
        text = WAN.project_text(TEXTS[int(number >= 5 - again)])
        WAN(chunk.latents, torch.zeros(1, 3), text, fresh.attend)
        fresh.advance()
    for layer in range(2):
        expected = stored(fresh, MEMORY, layer)
        after = seen[5][layer]
        assert sorted(after) == sorted(expected) == list(range(15))
        for index, (key, value) in expected.items():
            close(after[index][0], key)
            close(after[index][1], value)
    before = seen[4][1]
    changed = [index for index, pair in before.items() if not torch.allclose(pair[1], after[index][1], atol=1e-4)]
    assert changed == [index for index in range(12) if index >= 15 - frames]


@pytest.mark.parametrize("rule", ["keep", "flush", "recache"])
def test_shots_follow_each_other_and_the_gate_is_open_while_the_picture_settles(rule: str) -> None:
    cache = one_role(Full(60))
    list(stream_of(cache, rule).play(takes(5, 6, 4)))
    frames = cache.lanes[0].held
    shots = [frame.shot for frame in frames]
    assert shots == sorted(shots) and set(shots) == {0, 1, 2}
    again = 6 if rule == "recache" else 0
    assert [shots.count(shot) for shot in range(3)] == [15 - again, 18, 12 + again]
    for begin in (15, 33):
        assert all(frame.drift == 0 for frame in frames[begin - again : begin + 3 * SETTLING])
        assert all(frame.drift > 0 for frame in frames[begin + 3 * SETTLING : begin + 3 * SETTLING + 3])


def test_a_recache_of_a_video_that_began_with_one_frame() -> None:
    cache = one_role(Full(18))
    stream = Stream(WAN, cache, Sampling(STEPS, first_frames=1), SHAPE, seeded(0), Switch("recache", 60))
    made = list(stream.play(takes(3, 2)))
    assert [chunk.latents.shape[1] for chunk in made] == [1, 3, 3, 3, 3]
    assert held(cache) == list(range(13))
    assert {frame.shot for frame in cache.lanes[0].held} == {1}


@pytest.mark.gpu
@pytest.mark.parametrize("name", IN_CUDA)
def test_no_pass_of_a_chunk_waits_for_the_gpu(name: str) -> None:
    """Denoising and the clean pass, the cache being full; between chunks policies may ask the device."""
    wan, cache = in_cuda(name)
    stream = stream_of(cache, wan=wan)
    list(stream.play(takes(8)))
    with torch.inference_mode():
        text, noise = wan.project_text(stream._to_device(TEXTS[0])), stream._draw(8, 3, STEPS)
        try:
            torch.cuda.set_sync_debug_mode("error")
            clean = stream._denoise(noise, STEPS, text)
            stream._flow(clean, 0.0, text)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert bool(clean.isfinite().all())


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", ["separate", "fused"])
@pytest.mark.parametrize("name", IN_CUDA)
def test_recorded_passes_make_the_same_video(name: str, blocks: str) -> None:
    """Two videos one after the other, the first chunk of one frame, with changes of prompt and episodes on the way."""
    made, graphs = [], Graphs()
    for each in (None, graphs):
        wan, cache = in_cuda(name)
        if blocks == "fused":
            pytest.importorskip("hforce.models.fused").fuse(wan)
        sampling, switch = Sampling(STEPS, first_frames=1), Switch("recache", 6)
        stream = Stream(wan, cache, sampling, SHAPE, seeded(0), switch, graphs=each)
        made.append([chunk.latents for _ in range(2) for chunk in stream.play(takes(9, 7, 8))])
    assert len(graphs.replays) > 1 and sum(graphs.replays) > 40 and graphs.nbytes > 0
    for one, other in zip(*made, strict=True):
        close(one.float().cpu(), other.float().cpu(), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("fault", ["raises", "waits"])
def test_where_recording_fails_the_video_goes_on_in_single_steps(fault: str) -> None:
    """And nothing is left of it: memory can be had as before, and the next video is recorded."""
    wan, cache = in_cuda("sdpa")
    expected = [chunk.latents for chunk in stream_of(cache, wan=wan).play(takes(5))]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            if fault == "raises":
                raise RuntimeError("no way to record this")
            float(q.sum())
        return cache.attend(layer, q, k, v)

    for watched, replays in ((attend, 0), (None, 1)):
        graphs = Graphs()
        stream = replace(stream_of(cache, wan=wan), graphs=graphs, attend=watched)
        for one, other in zip(stream.play(takes(5)), expected, strict=True):
            close(one.latents.cpu(), other.cpu(), 1e-5)
        assert len(torch.empty(1 << 20, device="cuda")) == 1 << 20
        assert bool(sum(graphs.replays)) == bool(replays)


def test_passes_with_the_same_layout_use_the_same_memory() -> None:
    """Which is why they can be recorded: the views, to the first and last byte; other layouts have other views."""
    cache = HeadCache(geometry_of(WAN, GRID), role_map("MAL", "MML"), FORCING)
    seen: dict[Any, Any] = {}
    for _ in range(2):
        for _ in stream_of(cache).play(takes(12, 5)):
            runs = [run for view in cache._views for run in view.runs]
            used = [(x.data_ptr(), x.shape) for run in runs for x in (run.keys, run.values)]
            used += [(x.data_ptr(), x.shape) for view in cache._views for x in (view.length, view.order, view.begin)]
            assert seen.setdefault(cache.open(3), used) == used
            told = [view.length.tolist() for view in cache._views]
            assert told == [[run.keys.shape[1] for run in view.runs for _ in run.keys] for view in cache._views]
    assert len(seen) > 3 and len({repr(used) for used in seen.values()}) == len(seen)
