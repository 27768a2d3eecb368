"""Films: cuts where chunks begin, scenes that come back as they were and on time, and where things are."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hforce.errors import DataError
from hforce.toy.film import CHUNK, FIRST_CHUNK, Cut, Film, chunk_start, layout, render_film
from hforce.toy.words import held_out
from hforce.toy.world import CORNERS, PIXELS, Scene, position, presence, render

FRAMES = 81
FILMS = st.integers(0, 2**32).map(lambda seed: Film.sample(random.Random(seed), FRAMES))
A, B, C = (Scene.sample(random.Random(seed)) for seed in range(3))


def pattern(film):
    """Which scene follows which, as letters."""
    names = {}
    return "".join(names.setdefault(cut.scene, "ABCD"[len(names)]) for cut in film.cuts)


def test_a_film_of_one_scene_is_that_scene():
    film = Film((Cut(0, A),))
    np.testing.assert_array_equal(render_film(film, 40, first=5), render(A, 40, first=5))


def test_a_scene_that_returns_looks_the_same_and_is_on_time():
    film = render_film(Film((Cut(0, A), Cut(9, B), Cut(33, A), Cut(45, B))), 60)
    np.testing.assert_array_equal(film[:9], render(A, 9))
    np.testing.assert_array_equal(film[9:33], render(B, 24))
    np.testing.assert_array_equal(film[33:45], render(A, 60)[33:45])
    np.testing.assert_array_equal(film[45:], render(B, 51)[36:])


@given(FILMS, st.integers(0, FRAMES), st.integers(0, 40))
def test_a_film_can_be_rendered_from_any_frame_on(film, first, frames):
    whole = render_film(film, first + frames)
    part = render_film(film, frames, first)
    assert part.shape == (frames, PIXELS, PIXELS, 3)
    assert part.dtype == np.uint8
    np.testing.assert_array_equal(part, whole[first:])


@given(FILMS)
def test_cuts_lie_where_chunks_begin_and_every_stretch_is_a_chunk_long(film):
    starts = [chunk_start(chunk) for chunk in range(7)]
    assert starts == [0, *range(FIRST_CHUNK, FRAMES, CHUNK)]
    assert {cut.frame for cut in film.cuts} <= set(starts)
    assert film.cuts[0].frame == 0


@given(FILMS)
def test_training_films_show_nothing_held_out_and_scenes_that_can_be_told_apart(film):
    scenes = {cut.scene for cut in film.cuts}
    assert not any(held_out(scene.words) for scene in scenes)
    assert len({(scene.color, scene.shape, scene.ground, scene.pattern) for scene in scenes}) == len(scenes)


def test_held_out_films_show_only_what_training_does_not():
    films = [Film.sample(random.Random(seed), FRAMES, held_out=True) for seed in range(50)]
    assert all(held_out(cut.scene.words) for film in films for cut in film.cuts)


def test_two_films_in_five_have_no_cut_and_most_others_return():
    films = [Film.sample(random.Random(seed), FRAMES) for seed in range(800)]
    drawn = Counter(map(pattern, films))
    assert drawn["A"] / len(films) == pytest.approx(0.4, abs=0.06)
    returns = [film for film in films if len({cut.scene for cut in film.cuts}) < len(film.cuts)]
    assert len(returns) / len(films) > 0.45
    early = [film for film in returns if film.cuts[1].frame <= chunk_start(2)]  # the first scene is left soon
    assert len(early) / len(returns) > 0.7
    assert any(pattern(film) == "ABAB" for film in films)
    assert {len(film.segments(FRAMES)) for film in films} == {1, 2, 3, 4}


@pytest.mark.parametrize("frames", [1, 9, 10, 21, 22, 81, 501])
def test_films_of_any_length_are_drawn_the_same_twice(frames):
    for seed in range(20):
        film = Film.sample(np.random.default_rng(seed), frames)
        assert film == Film.sample(np.random.default_rng(seed), frames)
        assert film.cuts[-1].frame < frames
        assert sum(part.end - part.begin for part in film.segments(frames)) == frames


@pytest.mark.parametrize("begins", [(), (1,), (0, 0), (0, 9, 5)])
def test_cuts_that_are_out_of_order_are_refused(begins):
    with pytest.raises(DataError, match="cuts at video frames"):
        Film(tuple(Cut(begin, A) for begin in begins))


def test_the_layout_is_where_things_are():
    film = Film((Cut(0, A), Cut(9, B), Cut(21, A)))
    where = layout(film, 30, first=5)
    for scene, t, place in ((A, np.arange(5, 9), slice(0, 4)), (B, np.arange(12), slice(4, 16)),
                            (A, np.arange(21, 35), slice(16, 30))):  # fmt: skip
        x, y = position(scene, t)
        np.testing.assert_array_equal(where.x[place], x)
        np.testing.assert_array_equal(where.y[place], y)
        np.testing.assert_array_equal(where.presence[place], presence(scene, t))
        assert (where.size[place] == scene.size).all()
        landmark = np.stack([where.landmark_x, where.landmark_y], axis=1)[place]
        assert (landmark == CORNERS[scene.corner]).all()
    assert len(layout(film, 0).x) == 0
