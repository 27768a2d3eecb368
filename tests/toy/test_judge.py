"""The judge is right on true films, and sees every corruption by the measure meant for it."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from hforce.toy import judge
from hforce.toy.corruptions import CORRUPTIONS, HALF, Corruption, alter
from hforce.toy.film import Film
from hforce.toy.judge import TRUTH, Finding, film_of, judge_corruption, judge_truth, landmark_is_clear, report
from hforce.toy.words import held_out
from hforce.toy.world import Scene, render

SCENE = Scene("slow", "red", "circle", "upper", "passing right", "first", "gray", "plain", corner="upper right")


def test_true_films_are_read_right_and_get_full_marks():
    films = [film_of(number) for number in range(8)]
    assert max(len(film.cuts) for film in films) > 2
    right = judge_truth(films)
    assert {"landmark", "corner", "landmark_kept", "tint_kept", "continuity", "motion_right", "mark"} <= set(right)
    assert {name: share for name, share in right.items() if share < TRUTH} == {}


def test_half_of_the_films_show_what_training_never_does():
    for number in range(6):
        assert {held_out(cut.scene.words) for cut in film_of(number).cuts} == {number % 2 == 1}


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda corruption: corruption.name)
def test_every_corruption_is_seen_by_its_measure(corruption):
    found = judge_corruption(corruption, 1)
    assert found.is_seen, (found.before, found.after)


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda corruption: corruption.name)
def test_a_corrupted_video_begins_as_the_truth_and_is_the_same_twice(corruption):
    video, asked = corruption.make(np.random.default_rng(4))
    again, _ = corruption.make(np.random.default_rng(4))
    np.testing.assert_array_equal(video, again)
    film = Film(asked) if corruption.altered else None
    scene = film.cuts[0].scene if film else asked
    first = film.cuts[1].frame if film else HALF
    np.testing.assert_array_equal(video[:first], render(scene, first))


def test_altering_a_scene_changes_one_thing_and_changes_it_enough():
    for slot, least in {"hue": 9.0, "size": 1.5, "tint": 0.15, "mark": None, "landmark": None, "corner": None}.items():
        other = alter(SCENE, slot)
        assert replace(other, **{slot: getattr(SCENE, slot)}) == SCENE
        assert other != SCENE
        assert least is None or abs(getattr(other, slot) - getattr(SCENE, slot)) >= least


def test_a_landmark_is_clear_until_the_object_comes_near():
    clear = landmark_is_clear(SCENE, np.arange(112))
    assert clear[:20].all()
    assert not clear[40:48].any()  # the centre passes below that of the landmark at frame 44
    assert clear[70:].all()


def test_a_measure_that_is_bad_from_the_start_or_good_to_the_end_has_seen_nothing():
    mark, blur = (Corruption("some", measure) for measure in ("mark_kept", "sharpness"))
    assert Finding(mark, 1.0, 0.0).is_seen
    assert not Finding(mark, 0.9, 0.0).is_seen
    assert not Finding(mark, 1.0, 0.7).is_seen
    assert not Finding(mark, 1.0, float("nan")).is_seen
    assert Finding(blur, 1.02, 0.6).is_seen
    assert not Finding(blur, 1.02, 0.9).is_seen


def test_the_report_has_a_row_for_each_finding_and_the_exit_code_tells(monkeypatch, tmp_path, capsys):
    mark = next(each for each in CORRUPTIONS if each.measure == "mark_kept")
    text = report({"truth": {"mark": 1.0}, "codec": {"mark": 0.5}}, [Finding(mark, 1.0, 0.75)])
    assert "| mark | 1.0000 | 0.5000 |" in text
    assert f"| {mark.name} | mark_kept | 1.000 | 0.750 | NO |" in text
    for corruptions, code in (((mark,), 0), ((replace(mark, measure="shape_right"),), 1)):
        monkeypatch.setattr(judge, "CORRUPTIONS", corruptions)
        monkeypatch.setattr(sys, "argv", ["judge", "--videos", "1", "--out", str(tmp_path / "to" / "judge.md")])
        assert judge.main() == code
        assert capsys.readouterr().out == (tmp_path / "to" / "judge.md").read_text()
