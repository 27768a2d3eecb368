"""Schedules: which words hold when, and what was there when a scene was first seen."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hforce.errors import DataError
from hforce.toy.film import Cut, Film
from hforce.toy.schedule import asked_words, each_stretch, first_seen, stretches
from hforce.toy.world import Scene

RED, BLUE = {"color": "red"}, {"color": "blue"}
CUTS = st.lists(st.integers(1, 60), unique=True, max_size=5).map(sorted)


@given(CUTS, st.integers(1, 80), st.data())
def test_stretches_cover_every_frame_once_and_know_a_scene_again(cuts, frames, data):
    words = [data.draw(st.sampled_from([RED, BLUE, {}])) for _ in range(len(cuts) + 1)]
    plan = stretches(list(zip([0, *cuts], words, strict=True)), frames)
    assert [frame for part in plan for frame in range(part.begin, part.end)] == list(range(frames))
    assert all((one.scene == other.scene) == (one.words == other.words) for one in plan for other in plan)
    assert each_stretch(plan, lambda part: np.full(part.end - part.begin, part.scene)).shape == (frames,)


def test_one_prompt_is_a_schedule_and_so_are_the_cuts_of_a_film():
    scene = Scene("slow", "red", "circle", "middle", "circling", "first", "blue", "plain")
    assert stretches(scene, 9) == stretches(scene.words, 9) == stretches([(0, scene)], 9)
    assert stretches(Film((Cut(0, scene),)).cuts, 9) == stretches(scene, 9)


def test_the_words_of_a_frame_are_those_of_its_stretch():
    plan = stretches([(0, RED), (2, BLUE), (3, {}), (5, RED)], 6)
    assert asked_words(plan, "color").tolist() == ["red", "red", "blue", "", "", "red"]
    assert asked_words(plan, "shape").tolist() == [""] * 6


def test_what_was_first_seen_is_found_across_a_cut():
    plan = stretches([(0, RED), (3, BLUE), (5, RED)], 8)
    values = np.array([1.0, 2.0, 3.0, 10.0, 20.0, 100.0, 200.0, 300.0])
    seen = np.ones(8, bool)
    before = first_seen(plan, values, seen, 2, np.mean)
    assert before.tolist() == [1.5, 1.5, 1.5, 15, 15, 1.5, 1.5, 1.5]
    seen[:3] = False  # not seen in its first stretch, so the next one counts
    assert first_seen(plan, values, seen, 2, np.mean).tolist() == [150, 150, 150, 15, 15, 150, 150, 150]
    nothing = first_seen(plan, values, np.zeros(8, bool), 2, np.mean)
    assert np.isnan(nothing).all()
    words = first_seen(plan, np.array(list("aabbbcca")), seen, 2, lambda read: read[0])
    assert words.tolist() == list("cccbbccc")


@pytest.mark.parametrize("schedule", [[], [(1, RED)], [(0, RED), (0, BLUE)], [(0, RED), (9, BLUE), (3, RED)]])
def test_a_schedule_out_of_order_is_refused(schedule):
    with pytest.raises(DataError, match="prompts at video frames"):
        stretches(schedule, 20)


def test_words_that_the_world_does_not_have_are_refused_wherever_they_stand():
    with pytest.raises(DataError, match="no color 'pink'"):
        stretches([(0, RED), (30, {"color": "pink"})], 20)
