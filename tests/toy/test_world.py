"""The procedural world: sentences and scenes, and what its pictures show."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hforce.errors import DataError
from hforce.toy.world import (
    CELL,
    HUE_SHIFT,
    MARGIN,
    PIXELS,
    SIZES,
    SLOTS,
    SPEEDS,
    TINTS,
    Scene,
    complete,
    ground_picture,
    object_color,
    parse,
    position,
    presence,
    render,
    sentence,
    vocabulary,
)

WORDS = st.fixed_dictionaries({slot: st.sampled_from(choices) for slot, choices in SLOTS.items()})
SOME_WORDS = st.fixed_dictionaries({}, optional={slot: st.sampled_from(words) for slot, words in SLOTS.items()})
SCENES = st.integers(0, 2**32).map(lambda seed: Scene.sample(random.Random(seed)))

STILL_LIFE = Scene("slow", "red", "circle", "middle", "bouncing sideways", "second", "green", "plain")


# --- words


@given(WORDS)
def test_sentence_and_parse_are_inverse(words):
    parsed = parse(sentence(words))
    assert parsed.words == words
    assert parsed.unknown == ()


@given(SOME_WORDS)
def test_a_partial_sentence_says_just_what_it_is_given(words):
    parsed = parse(sentence(words))
    assert parsed.words == words
    assert parsed.unknown == ()


def test_the_sentence_reads_like_english():
    words = dict(
        zip(SLOTS, ("slow", "red", "circle", "upper", "bouncing sideways", "second", "green", "striped"), strict=True)
    )
    assert sentence(words) == (
        "a slow red circle in the upper lane, bouncing sideways from the second quarter of its path, "
        "on a dark green striped background"
    )


@given(st.text())
def test_any_text_is_read_without_complaint(text):
    parsed = parse(text)
    assert all(word in SLOTS[slot] for slot, word in parsed.words.items())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A Red BALL rolls left!", {"color": "red", "shape": "circle", "motion": "passing left"}),
        ("the ball's passing", {"shape": "circle", "motion": "passing right"}),
        ("a box moving from left to right", {"shape": "square", "motion": "passing right"}),
        ("a box from the left", {"shape": "square", "motion": "passing right"}),
        ("a ball moves side to side", {"shape": "circle", "motion": "bouncing sideways"}),
        ("left and right goes the ball", {"shape": "circle", "motion": "bouncing sideways"}),
        ("up and down", {"motion": "bouncing up and down"}),
        ("a ball that bounces", {"shape": "circle", "motion": "bouncing sideways"}),
        ("a square orbiting quickly", {"speed": "fast", "shape": "square", "motion": "circling"}),
        ("a circle circles slowly", {"speed": "slow", "shape": "circle", "motion": "circling"}),
        ("pink wedge, grey checkerboard backdrop",
         {"color": "magenta", "shape": "triangle", "ground": "gray", "pattern": "checkered"}),
        ("green background, blue disk at the bottom",
         {"color": "blue", "shape": "circle", "lane": "lower", "ground": "green"}),
        ("background: brown; a cyan disk", {"color": "cyan", "shape": "circle", "ground": "brown"}),
        ("a blue ball on blue", {"color": "blue", "shape": "circle", "ground": "blue"}),
        ("a triangle, golden, over violet stripes, from the last quarter",
         {"color": "yellow", "shape": "triangle", "start": "fourth", "ground": "purple", "pattern": "striped"}),
    ],
)  # fmt: skip
def test_free_form_is_understood(text, words):
    assert parse(text) == parse(sentence(words))


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("a furry cat on the beach", ("furry", "cat", "beach")),
        ("a purple ball", ("purple",)),
        ("a ball on a red background", ("red",)),
        ("a red ball and a blue square", ("blue", "square")),
        ("ein Bällchen, 猫", ("ein", "bällchen", "猫")),
        ("", ()),
    ],
)
def test_what_is_not_understood_is_told(text, unknown):
    assert parse(text).unknown == unknown


@given(SOME_WORDS, st.text(max_size=20))
def test_complete_keeps_what_is_said_and_fills_the_rest(words, key):
    full = complete(words, key)
    assert list(full) == list(SLOTS)
    assert full == complete(full, "another key") == complete(words, key)
    assert words.items() <= full.items()


def test_complete_depends_on_its_key():
    assert len({tuple(complete({}, str(key)).values()) for key in range(50)}) > 40


def test_vocabulary_names_every_word():
    assert all(word in vocabulary() for words in SLOTS.values() for word in words)


def test_a_scene_refuses_words_it_does_not_have():
    with pytest.raises(DataError, match="color 'pink'") as caught:
        Scene.sample(random.Random(0), {"color": "pink"})
    assert "magenta" in caught.value.mend


@given(SOME_WORDS, st.integers(0, 2**32))
def test_a_sampled_scene_shows_the_words_and_stays_in_range(words, seed):
    scene = Scene.sample(random.Random(seed), words)
    assert words.items() <= scene.words.items()
    assert SIZES[0] <= scene.size <= SIZES[1]
    assert TINTS[0] <= scene.tint <= TINTS[1]
    assert abs(scene.hue) <= HUE_SHIFT


def test_both_kinds_of_random_numbers_draw_scenes():
    assert Scene.sample(np.random.default_rng(3)) == Scene.sample(np.random.default_rng(3))
    assert Scene.sample(random.Random(3)) != Scene.sample(random.Random(4))


# --- motion


@given(SCENES)
def test_objects_move_at_their_speed_and_stay_inside_unless_they_pass(scene):
    x, y = position(scene, np.arange(0, 300, 0.25))
    step = np.hypot(np.diff(x), np.diff(y))
    assert np.median(step) == pytest.approx(SPEEDS[scene.speed] / 4, rel=1e-3)
    if not scene.motion.startswith("passing"):
        assert min(x.min(), y.min()) >= MARGIN - 1e-9
        assert max(x.max(), y.max()) <= PIXELS - MARGIN + 1e-9
        assert presence(scene, np.arange(120)).min() > 0.999


@given(SCENES)
def test_the_first_frame_always_shows_the_object(scene):
    assert presence(scene, 0) > 0.5


@pytest.mark.parametrize("motion", ["passing left", "passing right"])
@pytest.mark.parametrize(("speed", "frames"), [("slow", 112), ("fast", 56)])
def test_a_passing_object_leaves_and_returns(motion, speed, frames):
    scene = Scene(speed, "red", "square", "upper", motion, "first", "gray", "plain")
    seen = presence(scene, np.arange(3 * frames))
    hidden = seen == 0
    assert 0.2 < hidden.mean() < 0.35
    np.testing.assert_allclose(seen[:frames], seen[frames : 2 * frames], atol=1e-9)
    empty = render(scene, 3 * frames)[hidden]
    assert (empty == empty[0]).all()


@given(SCENES)
def test_motion_repeats_and_starts_in_its_quarter(scene):
    quarters = [Scene(**{**scene.words, "start": start}) for start in SLOTS["start"]]
    places = {tuple(np.round([*position(each, 0), *position(each, 1)], 6)) for each in quarters}
    assert len(places) == 4


# --- pictures


@given(SCENES)
def test_a_film_is_the_same_bit_for_bit_and_can_be_cut_anywhere(scene):
    film = render(scene, 12)
    assert film.shape == (12, PIXELS, PIXELS, 3)
    assert film.dtype == np.uint8
    np.testing.assert_array_equal(film[5:], render(scene, 7, first=5))


@given(SCENES)
def test_presence_is_the_visible_share_of_the_drawn_area(scene):
    t = np.arange(0, 120, 7)
    x, y = position(scene, t)
    inside = (abs(x - PIXELS / 2) <= PIXELS / 2 - 13) & (abs(y - PIXELS / 2) <= PIXELS / 2 - 13)
    far = abs(x - PIXELS / 2) >= PIXELS / 2 + 13
    np.testing.assert_allclose(presence(scene, t)[inside], 1)
    np.testing.assert_allclose(presence(scene, t)[far], 0)


@pytest.mark.parametrize("shape", SLOTS["shape"])
@pytest.mark.parametrize(("mark", "level"), [("white", 246), ("black", 10)])
def test_the_mark_is_at_the_centre_and_the_paint_around_it(shape, mark, level):
    scene = Scene("slow", "red", shape, "middle", "bouncing sideways", "second", "green", "plain", mark, 5.0, 10.0)
    x, y = (int(axis) for axis in position(scene, 0))
    frame = render(scene, 1)[0]
    assert (frame[y, x] == level).all()
    np.testing.assert_allclose(frame[y + 5, x], object_color("red", 5.0), atol=1)


def test_the_largest_object_covers_as_much_as_its_shape_says():
    areas = {"circle": np.pi, "square": (2 * 0.88) ** 2, "triangle": 3 * np.sqrt(3) * 0.6**2}
    for shape, area in areas.items():
        scene = Scene("slow", "yellow", shape, "middle", "circling", "first", "blue", "plain", size=9.0)
        blank = ground_picture("blue", "plain")
        change = np.abs(render(scene, 4).astype(float) - blank)[..., 0].sum((1, 2))
        full = object_color("yellow")[0] - blank[0, 0, 0]
        np.testing.assert_allclose(change / full, area * 81, rtol=0.02)


def test_patterns_repeat_every_two_cells_from_the_corner():
    for pattern in SLOTS["pattern"]:
        picture = ground_picture("brown", pattern, 1.1)
        np.testing.assert_array_equal(picture[2 * CELL :], picture[: -2 * CELL])
        np.testing.assert_array_equal(picture[:, 2 * CELL :], picture[:, : -2 * CELL])
    tones = ground_picture("brown", "checkered")[..., 0]
    assert tones[0, 0] == tones[CELL, CELL] > tones[0, CELL] == tones[CELL, 0]
    stripes = ground_picture("brown", "striped")[..., 0]
    assert stripes[0, 0] == stripes[CELL, 0] > stripes[0, CELL]


def test_what_is_not_said_is_seen():
    plain = render(STILL_LIFE, 1)
    for hidden in ({"mark": "white"}, {"hue": 9.0}, {"size": 7.0}, {"tint": 0.85}):
        assert (render(Scene(**STILL_LIFE.words, **hidden), 1) != plain).any()
