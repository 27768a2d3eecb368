"""The procedural world: scenes, how they move, and what their pictures show."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hforce.errors import DataError
from hforce.toy.words import held_out
from hforce.toy.world import (
    CELL,
    CORNERS,
    HUE_SHIFT,
    LANDMARK_COLOR,
    LANDMARKS,
    MARGIN,
    PIXELS,
    SIZES,
    SLOTS,
    SPEEDS,
    TINTS,
    Scene,
    backdrop,
    emblem,
    ground_picture,
    object_color,
    position,
    presence,
    render,
)

SOME_WORDS = st.fixed_dictionaries({}, optional={slot: st.sampled_from(words) for slot, words in SLOTS.items()})
SCENES = st.integers(0, 2**32).map(lambda seed: Scene.sample(random.Random(seed)))

STILL_LIFE = Scene("slow", "red", "circle", "middle", "bouncing sideways", "second", "green", "plain")


def test_a_scene_refuses_words_it_does_not_have():
    with pytest.raises(DataError, match="color 'pink'") as caught:
        Scene.sample(random.Random(0), {"color": "pink"})
    assert "magenta" in caught.value.mend


@given(SOME_WORDS, st.integers(0, 2**32))
def test_a_sampled_scene_shows_the_words_and_stays_in_range(words, seed):
    scene = Scene.sample(random.Random(seed), words, held_out=None)
    assert words.items() <= scene.words.items()
    assert SIZES[0] <= scene.size <= SIZES[1]
    assert TINTS[0] <= scene.tint <= TINTS[1]
    assert abs(scene.hue) <= HUE_SHIFT


@given(st.integers(0, 2**32))
def test_training_is_not_shown_what_is_held_out(seed):
    assert not held_out(Scene.sample(random.Random(seed)).words)
    assert held_out(Scene.sample(random.Random(seed), held_out=True).words)


def test_words_that_are_held_out_cannot_be_drawn_for_training():
    words = Scene.sample(random.Random(0), held_out=True).words
    with pytest.raises(DataError, match="held out of training"):
        Scene.sample(random.Random(0), words)
    assert Scene.sample(random.Random(0), words, held_out=None).words == words


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
        blank = backdrop(scene)
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
    unsaid = (
        {"mark": "white"},
        {"hue": 9.0},
        {"size": 7.0},
        {"tint": 0.85},
        {"landmark": "cross"},
        {"corner": "lower left"},
    )
    for hidden in unsaid:
        assert (render(Scene(**STILL_LIFE.words, **hidden), 1) != plain).any()


@pytest.mark.parametrize("corner", CORNERS)
def test_a_landmark_is_pale_small_and_behind_the_object(corner):
    x, y = (int(axis) for axis in CORNERS[corner])
    scene = Scene(
        **{**STILL_LIFE.words, "motion": "bouncing sideways", "lane": "middle"}, landmark="diamond", corner=corner
    )
    frame = render(scene, 1)[0]
    assert (frame[y, x] == LANDMARK_COLOR).all()
    changed = (frame != render(Scene(**scene.words, landmark="diamond", corner="upper left"), 1)[0]).any(-1)
    assert changed.any() == (corner != "upper left")
    lane = "upper" if y < PIXELS / 2 else "lower"
    covering = Scene(
        **{**scene.words, "motion": "passing right", "lane": lane}, size=10.0, corner=corner, landmark="cross"
    )
    t = int(np.argmin(np.abs(position(covering, np.arange(112))[0] - x)))
    paint = render(covering, 1, first=t)[0, int(position(covering, t)[1]) - 6, x].astype(float)
    np.testing.assert_allclose(paint, object_color("red"), atol=1)


def test_landmarks_lie_inside_their_cell_and_are_unlike_each_other():
    for corner, (x, y) in CORNERS.items():
        covers = np.stack([emblem(landmark, corner) for landmark in LANDMARKS])
        left, top = int(x) - CELL // 2, int(y) - CELL // 2
        assert covers.sum() == covers[:, top : top + CELL, left : left + CELL].sum()
        areas, common = covers.sum((1, 2)), np.einsum("ayx,byx->ab", covers, covers)
        assert (areas > 20).all()
        alike = common / np.sqrt(np.outer(np.diag(common), np.diag(common)))
        assert alike[~np.eye(len(LANDMARKS), dtype=bool)].max() < 0.75
