"""Judging the tiny model: on films it was never trained on, played as they are cut."""

import numpy as np
import pytest

from hforce.build import build_backbone
from hforce.config import load_config
from hforce.toy.evaluate import BACK_BY, FRAMES, generate, judge, returning_films, single_films
from hforce.toy.film import Cut, Film, chunk_start, render_film
from hforce.toy.words import held_out


def test_films_are_of_held_out_scenes_and_the_same_every_time():
    singles, returns = single_films(6), returning_films(6)
    assert all(held_out(cut.scene.words) for film in singles + returns for cut in film.cuts)
    assert all(len(film.cuts) == 1 for film in singles)
    assert (single_films(3), returning_films(3)) == (singles[:3], returns[:3])


def test_returning_films_end_in_a_scene_that_was_left():
    for film in returning_films(12):
        last = film.cuts[-1]
        earlier = [cut.scene for cut in film.cuts[:-1]]
        assert last.scene in earlier and earlier[-1] != last.scene
        assert last.frame <= BACK_BY


def test_truth_is_right_and_a_forgotten_mark_is_not_kept():
    film = returning_films(1)[0]
    table, videos = judge([film], lambda _, film: render_film(film, FRAMES))
    assert videos[0].shape == (FRAMES, 64, 64, 3)
    assert table["color_right"] == [1.0] and table["landmark_kept"] == [1.0]
    *before, last = film.cuts
    other = {"ring": "cross", "cross": "diamond", "diamond": "ring"}[last.scene.landmark]
    changed = Cut(last.frame, type(last.scene)(**{**_fields(last.scene), "landmark": other}))
    table, _ = judge([film], lambda _, film: render_film(Film((*before, changed)), FRAMES))
    assert table["landmark_kept"] == [0.0]


def _fields(scene):
    return {name: getattr(scene, name) for name in scene.__dataclass_fields__}


@pytest.mark.parametrize("cut", [1, 4])
def test_prompts_change_at_the_chunk_at_which_the_film_is_cut(cut):
    """Until the cut the video is that of the first prompt alone, from there on it is another."""
    one, other = (film.cuts[0].scene for film in single_films(2))
    backbone = build_backbone(load_config())
    alone = generate(load_config(), backbone, Film((Cut(0, one),)), 0)
    both = generate(load_config(), backbone, Film((Cut(0, one), Cut(chunk_start(cut), other))), 0)
    assert alone.shape == both.shape == (FRAMES, 64, 64, 3)
    differs = np.flatnonzero((alone != both).any(axis=(1, 2, 3)))
    assert differs[0] >= chunk_start(cut) and differs[0] < chunk_start(cut + 1)
