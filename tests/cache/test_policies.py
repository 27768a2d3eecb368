"""The laws every cache policy obeys, and one example of what each keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hforce.cache.policies import POLICIES, Anchor, Full, Local, Memory, Sink, Window, fits, make_policy
from hforce.cache.policy import POSITIONS, CachePolicy, Clock, Frame, clamp, rank, true, unlike
from hforce.errors import ConfigError

CHUNK, SPAN = 3, 21
FAR = SPAN - CHUNK
BOUNDED = [(name, positions) for name in POLICIES for positions in ("clamp", "rank")]


def frames(first: int, last: int, shot: int = 0) -> list[Frame]:
    return [Frame(index, shot) for index in range(first, last)]


def numbers(kept: Sequence[Frame]) -> list[int]:
    return [frame.index for frame in kept]


@dataclass(frozen=True)
class Noise:
    """A symmetric likeness drawn for every pair of frames, in -0.5..1."""

    seed: int

    def __call__(self, one: Frame, other: Frame) -> float:
        low, high = sorted((one.index, other.index))
        return Random(self.seed * 1_000_003 + low * 1009 + high).uniform(-0.5, 1.0)


@st.composite
def streams(draw: st.DrawFn, chunks: int = 40) -> list[list[Frame]]:
    """Chunks of frames with any surprise and drift; prompts change now and then."""
    seed = draw(st.integers(0, 10_000))
    random, shot, stream = Random(seed), 0, []
    for number in range(draw(st.integers(1, chunks))):
        shot += random.random() < 0.1
        indices = range(number * CHUNK, (number + 1) * CHUNK)
        stream.append([Frame(i, shot, random.gauss(0, 1.5), random.uniform(0, 2)) for i in indices])
    return stream


def policy_for(name: str, stream: Sequence[Sequence[Frame]], positions: str) -> CachePolicy:
    size = {"frames": CHUNK * len(stream)} if name == "full" else {}
    return make_policy(name, positions=positions, **size)


def play(policy: CachePolicy, stream: Sequence[Sequence[Frame]], likeness: object = unlike) -> Iterator[list[Frame]]:
    """What the policy holds after each chunk."""
    kept: list[Frame] = []
    for chunk in stream:
        kept = policy.keep([*kept, *chunk], likeness)  # type: ignore[arg-type]
        yield kept


def clock(now: int) -> Clock:
    return Clock(now=now, chunk=CHUNK, span=SPAN)


# Laws


@pytest.mark.parametrize("name", POLICIES)
@given(stream=streams(), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_kept_is_a_bounded_subset_in_order_with_the_newest(name: str, stream: list[list[Frame]], seed: int) -> None:
    policy = policy_for(name, stream, "clamp")
    held: list[Frame] = []
    for chunk in stream:
        held = [*held, *chunk]
        kept = policy.keep(held, Noise(seed))
        assert kept == [frame for frame in held if frame in kept]
        assert len(kept) <= policy.capacity
        assert kept[-1] == chunk[-1]
        held = kept


@pytest.mark.parametrize("name", POLICIES)
@given(stream=streams(), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_keeping_twice_is_keeping_once(name: str, stream: list[list[Frame]], seed: int) -> None:
    policy = policy_for(name, stream, "clamp")
    for kept in play(policy, stream, Noise(seed)):
        assert policy.keep(kept, Noise(seed)) == kept


@pytest.mark.parametrize("name", POLICIES)
@given(picked=st.sets(st.integers(0, 80), min_size=1, max_size=18), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_laws_hold_for_any_frames_held(name: str, picked: set[int], seed: int) -> None:
    policy, held = make_policy(name), [Frame(index) for index in sorted(picked)]
    kept = policy.keep(held, Noise(seed))
    assert kept == [frame for frame in held if frame in kept]
    assert len(kept) <= policy.capacity
    assert kept[-1] == held[-1]
    assert policy.keep(kept, Noise(seed)) == kept


@pytest.mark.parametrize(("name", "positions"), BOUNDED)
@given(stream=streams(), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_placed_distances_are_in_order_and_within_the_span(
    name: str, positions: str, stream: list[list[Frame]], seed: int
) -> None:
    policy = policy_for(name, stream, positions)
    for kept, chunk in zip(play(policy, stream, Noise(seed)), stream, strict=True):
        placement = policy.place(kept, clock(chunk[-1].index + 1))
        distance = placement.distance
        assert placement.frames == tuple(kept)
        assert all(0 < d <= FAR for d in distance)
        assert list(distance) == sorted(distance, reverse=True)
        if len(kept) + CHUNK <= SPAN:
            assert len(set(distance)) == len(distance)


@pytest.mark.parametrize(("name", "positions"), BOUNDED)
def test_distances_are_true_until_a_frame_is_dropped(name: str, positions: str) -> None:
    stream = [frames(i, i + CHUNK) for i in range(0, FAR, CHUNK)]
    policy = policy_for(name, stream, positions)
    for kept, chunk in zip(play(policy, stream), stream, strict=True):
        now = chunk[-1].index + 1
        if len(kept) == now:
            assert policy.place(kept, clock(now)) == true(kept, clock(now))


@pytest.mark.parametrize(("name", "positions"), BOUNDED)
def test_a_thousand_chunks_stay_in_range(name: str, positions: str) -> None:
    stream = [frames(i, i + CHUNK) for i in range(0, 1000 * CHUNK, CHUNK)]
    policy = policy_for(name, stream, positions)
    for kept, chunk in zip(play(policy, stream, Noise(7)), stream, strict=True):
        distance = policy.place(kept, clock(chunk[-1].index + 1)).distance
        assert min(distance) > 0 and max(distance) <= FAR


# What each policy keeps


def test_full_keeps_everything_at_its_true_distance() -> None:
    policy = Full(frames=30)
    kept = policy.keep(frames(0, 30))
    assert numbers(kept) == list(range(30))
    assert policy.place(kept, clock(30)).distance == tuple(range(30, 0, -1))


def test_full_says_which_option_to_raise_when_the_video_is_longer() -> None:
    with pytest.raises(ConfigError, match="room for 18 frames and was given 19") as error:
        Full().keep(frames(0, 19))
    assert "cache.<role>.options.frames" in error.value.mend


def test_window_counts_the_chunk_as_self_forcing_does() -> None:
    assert numbers(Window().keep(frames(0, 24))) == list(range(6, 24))
    assert Window().capacity + CHUNK == SPAN


def test_sink_keeps_the_first_frames_and_a_window() -> None:
    assert numbers(Sink(sink=3, window=3).keep(frames(0, 12))) == [0, 1, 2, 9, 10, 11]

    assert numbers(Sink(sink=3, window=0).keep(frames(0, 12))) == [0, 1, 2]


def test_local_keeps_the_newest() -> None:
    assert numbers(Local().keep(frames(0, 12))) == [9, 10, 11]
    assert Local(window=0).keep(frames(0, 12)) == []


def test_anchor_keeps_sink_and_window() -> None:
    assert numbers(Anchor(sink=3, window=3).keep(frames(0, 12))) == [0, 1, 2, 9, 10, 11]


def test_anchor_sees_the_sink_far_away_and_recent_frames_where_they_are() -> None:
    kept = Anchor().keep(frames(0, 60))
    assert numbers(kept) == [0, 58, 59]
    assert Anchor().place(kept, clock(60)).distance == (18, 2, 1)


def test_budgets_of_the_roles() -> None:
    """Frames read by a head, the chunk included: 6, 6 and 15, the default allocation of the project."""
    assert [policy.capacity + CHUNK for policy in (Local(), Anchor(), Memory())] == [6, 6, 15]


# Positions


def test_clamp_packs_the_overflow_at_the_far_end() -> None:
    kept = [Frame(i) for i in (0, 1, 2, 40, 50, 84, 97, 98, 99)]
    assert clamp(kept, clock(100)).distance == (18, 17, 16, 15, 14, 13, 3, 2, 1)


def test_clamp_lets_the_newest_share_a_place_when_more_is_kept_than_fits() -> None:
    assert clamp(frames(0, 20), clock(20)).distance[-4:] == (2, 1, 1, 1)


def test_rank_forgets_the_time_between_kept_frames() -> None:
    kept = [Frame(i) for i in (0, 1, 2, 40, 97, 98, 99)]
    assert rank(kept, clock(100)).distance == (7, 6, 5, 4, 3, 2, 1)


@pytest.mark.parametrize("positions", POSITIONS)
def test_nothing_kept_is_nothing_placed(positions: str) -> None:
    placement = Local(positions=positions).place([], clock(0))
    assert placement.frames == placement.distance == ()


# The episodic bank


def scene(names: str) -> tuple[list[list[Frame]], object]:
    """A stream with one letter a chunk, and the likeness by which equal letters show the same picture."""
    stream = [frames(i * CHUNK, (i + 1) * CHUNK) for i in range(len(names))]
    return stream, lambda one, other: float(names[one.index // CHUNK] == names[other.index // CHUNK])


@pytest.mark.parametrize("sink", [0, 3])
def test_a_constant_video_fills_the_bank_with_at_most_one_frame(sink: int) -> None:
    stream = [frames(i, i + CHUNK) for i in range(0, 120, CHUNK)]
    for kept in play(Memory(sink=sink), stream, lambda one, other: 1.0):
        assert len(kept) <= sink + 1 + CHUNK


@pytest.mark.parametrize("sink", [0, 3])
def test_both_scenes_of_a_return_are_remembered(sink: int) -> None:
    names = "AAAAAAAABBBBBBBBAAAAAAAA"
    stream, likeness = scene(names)
    *_, kept = play(Memory(sink=sink), stream, likeness)
    remembered = [names[frame.index // CHUNK] for frame in kept[:-CHUNK]]
    assert remembered.count("B") == 1
    assert remembered.count("A") == max(sink, 1)


def test_one_frame_a_chunk_enters_and_the_older_wins_a_tie() -> None:
    *_, kept = play(Memory(), [frames(i, i + CHUNK) for i in range(0, 18, CHUNK)])
    assert numbers(kept) == [0, 1, 2, 3, 6, 9, 12, 15, 16, 17]


def test_the_most_novel_of_the_leaving_frames_enters() -> None:
    def likeness(one: Frame, other: Frame) -> float:
        return 0.2 if 4 in (one.index, other.index) else 0.6

    *_, kept = play(Memory(), [frames(i, i + CHUNK) for i in range(0, 9, CHUNK)], likeness)
    assert numbers(kept) == [0, 1, 2, 4, 6, 7, 8]


def test_a_full_bank_gives_up_its_most_redundant_frame() -> None:
    def likeness(one: Frame, other: Frame) -> float:
        return 0.9 if sorted((one.index // CHUNK, other.index // CHUNK)) == [2, 3] else 0.0

    *_, kept = play(Memory(episodes=3), [frames(i, i + CHUNK) for i in range(0, 18, CHUNK)], likeness)
    assert numbers(kept) == [0, 1, 2, 3, 9, 12, 15, 16, 17]


def test_a_full_bank_keeps_its_spread_when_the_newcomer_is_the_twin() -> None:
    def likeness(one: Frame, other: Frame) -> float:
        return 0.9 if max(one.index, other.index) >= 12 and min(one.index, other.index) < 3 else 0.0

    *_, kept = play(Memory(episodes=3), [frames(i, i + CHUNK) for i in range(0, 18, CHUNK)], likeness)
    assert numbers(kept) == [0, 1, 2, 3, 6, 9, 15, 16, 17]


def test_a_full_bank_does_not_swap_a_picture_for_its_copy() -> None:
    def likeness(one: Frame, other: Frame) -> float:
        return 0.99 if sorted((one.index // CHUNK, other.index // CHUNK)) == [1, 4] else 0.0

    *_, kept = play(Memory(episodes=3), [frames(i, i + CHUNK) for i in range(0, 18, CHUNK)], likeness)
    assert numbers(kept) == [0, 1, 2, 3, 6, 9, 15, 16, 17]


def test_old_episodes_fade() -> None:
    *_, kept = play(Memory(episodes=3), [frames(i, i + CHUNK) for i in range(0, 60, CHUNK)])
    assert numbers(kept) == [0, 1, 2, 48, 51, 54, 57, 58, 59]


def test_a_full_bank_takes_no_frame_that_surprises_nobody() -> None:
    stream = [frames(i, i + CHUNK) for i in range(0, 60, CHUNK)]
    dull = [[replace(frame, surprise=-1.5 if frame.index >= 12 else 0.0) for frame in chunk] for chunk in stream]
    *_, kept = play(Memory(episodes=3), dull)
    assert numbers(kept) == [0, 1, 2, 3, 6, 9, 57, 58, 59]


def test_frames_that_drifted_never_enter() -> None:
    stream = [frames(i, i + CHUNK) for i in range(0, 60, CHUNK)]
    drifted = [[replace(frame, drift=1.6) for frame in chunk] for chunk in stream]
    *_, kept = play(Memory(), drifted)
    assert numbers(kept) == [0, 1, 2, 57, 58, 59]


def test_episodes_keep_their_spacing() -> None:
    *_, kept = play(Memory(spacing=7), [frames(i, i + CHUNK) for i in range(0, 30, CHUNK)])
    assert numbers(kept[3:-3]) == [3, 10, 17, 24]


def test_the_first_remembered_frame_of_the_shot_played_is_never_given_up() -> None:
    stream = [frames(i, i + CHUNK, shot=int(i >= 30)) for i in range(0, 240, CHUNK)]
    held = play(Memory(episodes=2), stream, Noise(3))
    first = [next((f.index for f in kept[:-CHUNK] if f.shot == 1), None) for kept in held]
    entered = next(index for index in first if index is not None)
    assert 30 <= entered < 36
    assert set(first[first.index(entered) :]) == {entered}


def test_the_sink_outlives_a_flush_of_all_else() -> None:
    """A prompt switch may empty the bank; the sink is known by its number in the stream, not by its place."""
    kept = Memory().keep([*frames(0, 2), *frames(40, 42), *frames(42, 45)])
    assert numbers(kept) == [0, 1, 40, 42, 43, 44]


def test_flush_clears_the_bank_of_memory_and_nothing_elsewhere() -> None:
    *_, held = play(Memory(), [frames(i, i + CHUNK) for i in range(0, 60, CHUNK)])
    assert numbers(Memory().flush(held)) == [0, 1, 2, 58, 59]
    assert numbers(Memory(window=1).flush(held)) == [0, 1, 2, 59]
    assert Anchor().flush(frames(0, 3)) == frames(0, 3)


def test_frames_taken_back_and_made_again_leave_the_same_bank() -> None:
    """A recache drops the last two chunks and runs them again under the new prompt."""
    stream, policy, likeness = [frames(i, i + CHUNK) for i in range(0, 60, CHUNK)], Memory(), Noise(5)
    *_, held = play(policy, stream, likeness)
    again = [f for f in held if f.index < 54]
    for chunk in stream[-2:]:
        again = policy.keep([*again, *chunk], likeness)
    assert again == held


def test_only_a_policy_with_a_bank_looks_at_pictures() -> None:
    assert [name for name in POLICIES if make_policy(name).looks] == ["memory"]


def test_memory_without_a_bank_is_a_sink_and_a_window() -> None:
    stream = [frames(i, i + CHUNK) for i in range(0, 60, CHUNK)]
    *_, kept = play(Memory(episodes=0), stream, Noise(1))
    assert numbers(kept) == [0, 1, 2, 57, 58, 59]


# Making one by name


def test_an_unknown_policy_names_the_nearest_and_all() -> None:
    with pytest.raises(ConfigError, match="did you mean 'memory'") as error:
        make_policy("memroy")
    assert all(name in error.value.mend for name in POLICIES)


def test_an_unknown_option_names_the_nearest_and_all() -> None:
    with pytest.raises(ConfigError, match="did you mean 'episodes'") as error:
        make_policy("memory", episode=3)
    assert "window" in error.value.mend and "positions" in error.value.mend


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("local", "window", -1),
        ("local", "window", 3.0),
        ("local", "window", True),
        ("local", "window", "3"),
        ("local", "window", None),
        ("memory", "novelty", float("nan")),
        ("memory", "gate", -0.5),
        ("memory", "horizon", 0),
        ("memory", "chunk", 0),
        ("window", "frames", 2),
        ("anchor", "positions", "clmap"),
        ("anchor", "positions", 3),
    ],
)
def test_impossible_values_are_refused(name: str, option: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        make_policy(name, **{option: value})
    assert option in f"{error.value} {error.value.mend}"


@pytest.mark.parametrize(("name", "positions"), BOUNDED)
def test_the_defaults_fit_wan(name: str, positions: str) -> None:
    fits(make_policy(name, positions=positions), CHUNK, SPAN)


def test_a_policy_that_does_not_fit_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"holds 19 frames, but a chunk of 3 leaves room for 18 in .* 21") as error:
        fits(Sink(window=16), CHUNK, SPAN, role="anchor")
    assert "cache.anchor.options" in error.value.mend and "18 or less" in error.value.mend
    fits(Sink(window=16, positions="true"), CHUNK, SPAN)
    fits(Full(frames=300, positions="clamp"), CHUNK, SPAN)


def test_a_policy_for_other_chunks_is_refused() -> None:
    with pytest.raises(ConfigError, match="expects chunks of 3 frames, the model makes 1"):
        fits(Memory(), 1, SPAN)
