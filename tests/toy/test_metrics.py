"""The judge: exact on what the world draws, and every corruption is seen by the measure meant for it."""

import random
from dataclasses import fields, replace

import numpy as np
import pytest

from hforce.errors import DataError
from hforce.toy.film import Cut, Film, render_film
from hforce.toy.metrics import Scores, drift, read_frames, score
from hforce.toy.motion import PATHS, likeliest_path, path_error
from hforce.toy.world import HUES, PIXELS, SLOTS, Scene, position, presence, render

RIGHT = [field.name for field in fields(Scores) if field.name.endswith(("_right", "_kept"))] + [
    "one_object", "one_landmark", "continuity", "on_path"
]  # fmt: skip
RARE = ["on_time"]  # known only where a passing object is due
DISTANCES = ["ghosts", "hue_error", "size_error", "ground_error", "residual"]
BOUNCING = Scene(
    "slow", "yellow", "square", "upper", "bouncing sideways", "first", "blue", "striped", "black", 4.0, 9.0, 1.1,
    "cross", "lower right",
)  # fmt: skip
PASSING = Scene("slow", "red", "circle", "middle", "passing right", "first", "gray", "plain", "white", -5.0, 8.0, 0.9)


def coded(video, seed=0):
    """What an autoencoder does to a picture, roughly: a 3 x 3 box blur and noise."""
    wide = np.pad(video.astype(float), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    soft = sum(wide[:, y : y + PIXELS, x : x + PIXELS] for y in range(3) for x in range(3)) / 9
    noise = np.random.default_rng(seed).normal(0, 4, soft.shape)
    return np.clip(np.rint(soft + noise), 0, 255).astype(np.uint8)


def variant(scene, **changes):
    return Scene(**{**{field.name: getattr(scene, field.name) for field in fields(Scene)}, **changes})


def halves(scene, later, frames=160):
    """A film whose second half is another one."""
    return np.concatenate([render(scene, frames // 2), later])


def ends(video, words):
    """Every measure in the first and in the last three seconds of a film."""
    scores = score(read_frames(video), words)
    return {f.name: (getattr(scores, f.name)[:3].mean(), getattr(scores, f.name)[-3:].mean()) for f in fields(Scores)}


# --- exactness


FILMS = [(np.asarray, seed) for seed in range(25)] + [(coded, seed) for seed in range(100, 112)]


@pytest.mark.parametrize(("through", "seed"), FILMS, ids=lambda value: getattr(value, "__name__", value))
def test_the_judge_is_exact_on_the_world_and_gives_it_full_marks(through, seed):
    scene = Scene.sample(random.Random(seed))
    reading = read_frames(through(render(scene, 81)))
    seen = presence(scene, np.arange(81))
    full = seen > 0.9999
    for words, truth in ((reading.ground, scene.ground), (reading.pattern, scene.pattern)):
        assert (words == truth).all()
    for words, truth in ((reading.color, scene.color), (reading.shape, scene.shape), (reading.mark, scene.mark)):
        assert (words[full] == truth).all()
    assert (reading.motion, reading.speed, reading.lane) == (scene.motion, scene.speed, scene.lane)
    assert (reading.objects[full] == 1).all()
    assert (reading.objects[seen == 0] == 0).all()
    assert (reading.ghosts == 0).all()
    np.testing.assert_allclose(reading.visible, seen, atol=0.1)
    np.testing.assert_allclose(reading.tint, scene.tint, atol=0.02)
    blurred = through is coded  # mixes the paint of a small object with mark and background
    if np.isfinite(reading.size).any():
        np.testing.assert_allclose(np.nanmedian(reading.size), scene.size, atol=0.5 if blurred else 0.2)
    hue = np.nanmedian((reading.hue[full] - HUES[scene.color] + 180) % 360) - 180
    np.testing.assert_allclose(hue, scene.hue, atol=8 if blurred else 1)
    x, y = position(scene, np.arange(81))
    assert np.hypot(reading.x - x, reading.y - y)[full].max() < 0.5
    assert_full_marks(score(reading, scene))


def assert_full_marks(scores):
    for name in RIGHT + RARE:
        values = getattr(scores, name)
        assert (values[np.isfinite(values)] == 1).all(), name
    assert (scores.ghosts == 0).all()
    assert np.nanmax(scores.ground_error) < 0.01
    assert 0.85 < np.nanmin(scores.sharpness) <= np.nanmax(scores.sharpness) < 1.15
    assert scores.one_object.shape == (5,)


def test_a_true_film_does_not_drift():
    for scene in (BOUNCING, PASSING):
        changes = drift(read_frames(render(scene, 240)), scene)
        assert set(changes) == {field.name for field in fields(Scores)}
        changes.pop("on_time")  # neither end shows a return
        assert all(abs(change) < 0.05 for change in changes.values())


def test_words_serve_as_well_as_the_scene_and_unsaid_words_are_not_judged():
    reading = read_frames(render(BOUNCING, 48))
    by_words, by_scene = score(reading, BOUNCING.words), score(reading, BOUNCING)
    for field in fields(Scores):
        np.testing.assert_array_equal(getattr(by_words, field.name), getattr(by_scene, field.name))
    some = score(reading, {"color": "red"})
    assert (some.color_right == 0).all()
    assert np.isnan(some.shape_right).all()
    assert np.isnan(some.motion_right).all()
    assert (score(reading, {"motion": "bouncing sideways"}).motion_right == 1).all()
    assert (some.mark_kept == 1).all()


def test_a_film_that_starts_late_is_as_good():
    for scene in (BOUNCING, PASSING):
        scores = score(read_frames(render(scene, 160, first=37)), scene)
        assert (scores.motion_right == 1).all()
        assert np.nanmin(scores.one_object) == 1


# --- corruptions


def test_blur_is_seen_by_sharpness():
    late = render(BOUNCING, 80, first=80)
    for _ in range(2):
        late = coded(late)
    was, now = ends(halves(BOUNCING, late), BOUNCING)["sharpness"]
    assert was == pytest.approx(1, abs=0.05)
    assert now < 0.7


def test_a_fading_background_is_seen_by_ground_error_and_tint_alone():
    late = render(variant(BOUNCING, tint=1.4), 80, first=80)
    measures = ends(halves(BOUNCING, late), BOUNCING)
    assert measures["ground_error"][0] == 0
    assert measures["ground_error"][1] > 0.05
    assert {name for name in RIGHT if measures[name][1] != 1} == {"tint_kept"}


@pytest.mark.parametrize(
    ("change", "measure"),
    [
        ({"color": "cyan"}, "color_right"),
        ({"shape": "triangle"}, "shape_right"),
        ({"shape": "circle"}, "shape_right"),
        ({"ground": "purple"}, "ground_right"),
        ({"pattern": "plain"}, "pattern_right"),
        ({"pattern": "checkered"}, "pattern_right"),
        ({"mark": "none"}, "mark_kept"),
        ({"mark": "white"}, "mark_kept"),
        ({"hue": -9.0}, "hue_kept"),
        ({"size": 7.0}, "size_kept"),
        ({"speed": "fast"}, "motion_right"),
        ({"lane": "lower"}, "motion_right"),
        ({"motion": "circling"}, "motion_right"),
        ({"motion": "passing left"}, "motion_right"),
    ],
)
def test_a_swapped_attribute_is_seen_by_its_measure_alone(change, measure):
    measures = ends(coded(halves(BOUNCING, render(variant(BOUNCING, **change), 80, first=80))), BOUNCING)
    assert measures[measure] == (1, 0)
    related = {"color_right": {"hue_kept"}, "ground_right": {"tint_kept"}, "pattern_right": {"tint_kept"}}
    related["motion_right"] = {"on_path"}
    others = set(RIGHT) - {measure} - related.get(measure, set())
    others -= {"one_object"} if change.get("motion") == "passing left" else set()
    others -= {"one_landmark", "landmark_kept"} if change.get("lane") == "lower" else set()  # the object covers it
    assert {name: measures[name] for name in others} == dict.fromkeys(others, (1, 1))


def test_a_freeze_is_seen_by_motion():
    frozen = np.repeat(render(BOUNCING, 1, first=90), 80, axis=0)
    measures = ends(halves(BOUNCING, frozen), BOUNCING)
    assert measures["motion_right"] == (1, 0)
    assert {name for name in RIGHT if measures[name] != (1, 1)} == {"motion_right", "on_path"}


def test_the_right_motion_at_a_slightly_wrong_speed_is_right_but_off_its_path():
    late = np.concatenate([render(BOUNCING, 1, first=80 + 0.75 * t) for t in range(80)])
    measures = ends(halves(BOUNCING, late), BOUNCING)
    assert measures["on_path"] == (1, 0)
    assert {name for name in RIGHT if measures[name] != (1, 1)} == {"on_path"}


@pytest.mark.parametrize("opacity", [1.0, 0.5])
@pytest.mark.parametrize("apart", [(26, 0), (26, 14)], ids=["beside", "askew"])
def test_a_ghost_copy_is_seen(opacity, apart):
    late = render(BOUNCING, 80, first=80).astype(float)
    copy = np.roll(render(BOUNCING, 80, first=80), apart, axis=(1, 2))
    blank = render(variant(PASSING, ground="blue", pattern="striped", tint=1.1, start="fourth"), 80)[40]
    there = np.abs(copy.astype(float) - np.roll(blank, apart, axis=(0, 1))).sum(-1, keepdims=True) > 30
    ghostly = np.where(there, late + opacity * (copy - late), late).astype(np.uint8)
    measures = ends(halves(BOUNCING, ghostly), BOUNCING)
    assert measures["one_object"] == (1, 0)
    assert measures["ghosts"][0] == 0
    assert 0.7 < measures["ghosts"][1] < 1.3


def test_a_copy_that_touches_the_object_is_a_ghost_too():
    frames = render(BOUNCING, 48)
    for shift in (8, 14):
        there = (np.abs(frames.astype(int) - frames[0, 0, 0]).sum(-1, keepdims=True) > 60) & (frames[..., :1] > 150)
        smeared = np.where(np.roll(there, shift, axis=1), np.roll(frames, shift, axis=1), frames)
        reading = read_frames(np.concatenate([frames, smeared]))
        assert (reading.objects[:48] == 1).all()
        assert (reading.objects[48:] >= 2).mean() > 0.9
        assert reading.ghosts[48:].mean() > 0.15


@pytest.mark.parametrize("pattern", SLOTS["pattern"])
def test_many_copies_do_not_pass_for_the_background(pattern):
    scene = variant(BOUNCING, pattern=pattern)
    frames = alone = render(scene, 32)
    for shift in ((16, 0), (32, 0), (0, 32), (16, 32), (32, 32)):
        copy = np.roll(alone, shift, axis=(1, 2))
        frames = np.where((copy[..., :1] > 150) & (copy[..., 2:] < 100), copy, frames)  # yellow, so not the landmark
    reading = read_frames(frames)
    assert (reading.pattern == pattern).all()
    assert np.median(reading.objects + reading.ghosts) > 4


def test_an_object_that_vanishes_is_missed():
    blank = render(variant(PASSING, start="fourth"), 60)[40]
    gone = np.repeat(blank[None], 240, axis=0)
    scores = score(read_frames(np.concatenate([render(variant(BOUNCING, ground="gray"), 80), gone])), BOUNCING)
    assert (scores.one_object[:5] == 1).all()
    assert (scores.one_object[5:] == 0).all()
    assert (scores.motion_right[-10:] == 0).all()
    assert (scores.on_path[-10:] == 0).all()
    assert np.isnan(scores.color_right[-10:]).all()


def test_a_passing_object_may_hide_but_must_return():
    blank = render(PASSING, 100)[80]
    gone = np.concatenate([render(PASSING, 80), np.repeat(blank[None], 240, axis=0)])
    scores = score(read_frames(gone), PASSING)
    assert np.nanmin(scores.one_object[:7]) == 1
    assert (scores.one_object[-8:] == 0).all()
    assert (scores.motion_right[-8:] == 0).all()


# --- paths


@pytest.mark.parametrize("path", PATHS)
def test_every_path_is_recognised_at_a_slightly_wrong_speed(path):
    motion, speed, lane = path
    scene = Scene(speed, "red", "circle", lane, motion, "third", "gray", "plain")
    t = 1.03 * np.arange(400)
    x, y = (np.where(presence(scene, t) > 0.1, axis, np.nan) for axis in position(scene, t))
    assert likeliest_path(x, y) == path
    errors = np.array([path_error(x, y, other) for other in PATHS])
    assert (errors[PATHS.index(path)] < 2).all()
    assert (np.delete(errors, PATHS.index(path), axis=0) > 3).mean() > 0.95


# --- odd input


@pytest.mark.parametrize("frames", [1, 2, 15, 17])
def test_short_films_are_read(frames):
    scores = score(read_frames(render(BOUNCING, frames)), BOUNCING)
    assert scores.one_object.tolist() == [1]
    changes = drift(read_frames(render(BOUNCING, frames)), BOUNCING)
    unknown = {name for name, change in changes.items() if not np.isfinite(change)}
    assert unknown == {"on_time"} | ({"continuity"} if frames == 1 else set())


def test_a_long_film_is_read_as_its_parts(monkeypatch):
    monkeypatch.setattr("hforce.toy.reading.BATCH", 20)
    parts = read_frames(render(BOUNCING, 50))
    monkeypatch.undo()
    whole = read_frames(render(BOUNCING, 50))
    for field in fields(whole):
        np.testing.assert_array_equal(getattr(parts, field.name), getattr(whole, field.name))


@pytest.mark.parametrize("kind", ["noise", "black", "white", "ramp"])
def test_a_ruined_film_scores_nothing_and_breaks_nothing(kind):
    rng = np.random.default_rng(0)
    video = {
        "noise": rng.integers(0, 256, (40, PIXELS, PIXELS, 3)),
        "black": np.zeros((40, PIXELS, PIXELS, 3)),
        "white": np.full((40, PIXELS, PIXELS, 3), 255),
        "ramp": np.broadcast_to(np.arange(PIXELS)[:, None] * 4, (40, PIXELS, PIXELS, 3)[:3])[..., None].repeat(3, -1),
    }[kind].astype(np.uint8)
    reading = read_frames(video)
    scores = score(reading, BOUNCING)
    assert (scores.one_object == 0).all()
    assert (scores.motion_right == 0).all()
    assert (scores.ground_right == 0).all()
    assert not np.nansum(scores.shape_right * scores.color_right)
    drift(reading, BOUNCING)


@pytest.mark.parametrize(
    "video", [np.zeros((4, 64, 64, 3)), np.zeros((4, 3, 64, 64), np.uint8), np.zeros((0, 64, 64, 3), np.uint8)]
)
def test_other_arrays_are_refused(video):
    with pytest.raises(DataError, match="uint8"):
        read_frames(video)


def test_words_the_world_does_not_have_are_refused():
    reading = read_frames(render(BOUNCING, 2))
    for words in ({"lane": "left"}, {"texture": "rough"}):
        with pytest.raises(DataError, match="the tiny world has no"):
            score(reading, words)


def test_a_reading_has_a_value_for_every_frame():
    reading = read_frames(render(PASSING, 30))
    assert all(
        len(getattr(reading, f.name)) == 30 for f in fields(reading) if f.name not in ("motion", "speed", "lane")
    )
    assert reading.whole.shape == (30,)
    assert reading.motion in SLOTS["motion"]


# --- schedules and what they remember


def test_a_schedule_of_one_prompt_is_that_prompt():
    for seed in range(4):
        scene = Scene.sample(random.Random(seed))
        reading = read_frames(render(scene, 70))
        one, schedule = score(reading, scene), score(reading, [(0, scene.words)])
        for field in fields(Scores):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(schedule, field.name))
        assert drift(reading, scene) == pytest.approx(drift(reading, [(0, scene)]), nan_ok=True)


@pytest.mark.parametrize("seed", range(6))
def test_a_true_film_gets_full_marks_across_its_cuts(seed):
    film = Film.sample(random.Random(seed), 117)
    scores = score(read_frames(render_film(film, 117)), film.cuts)
    for name in RIGHT + RARE:
        values = getattr(scores, name)
        assert (values[np.isfinite(values)] == 1).all(), name


def test_frames_are_judged_by_the_words_in_force():
    film = Film((Cut(0, BOUNCING), Cut(45, PASSING), Cut(93, BOUNCING)))
    reading = read_frames(render_film(film, 141))
    swapped = [(0, PASSING), (45, BOUNCING), (93, PASSING)]
    wrong = score(reading, swapped)
    for name in ("color_right", "shape_right", "ground_right", "pattern_right"):
        assert np.nanmax(getattr(wrong, name)) == 0
    assert np.nanmin(wrong.mark_kept) == 1  # it is the same whatever the words say


def test_a_scene_that_returns_is_compared_with_what_was_seen_long_before():
    film = Film((Cut(0, BOUNCING), Cut(9, PASSING), Cut(105, BOUNCING)))
    right = render_film(film, 160)
    other = variant(BOUNCING, mark="white", hue=-9.0, size=7.0, tint=0.9, landmark="ring", corner="lower left")
    wrong = right.copy()
    wrong[105:] = render(other, 55, 105)
    names = ("mark_kept", "hue_kept", "size_kept", "tint_kept", "landmark_kept")
    good, bad = (score(read_frames(video), film.cuts) for video in (right, wrong))
    alone = score(read_frames(wrong[105:]), BOUNCING)  # who does not know what was before finds nothing amiss
    for name in names:
        assert np.nanmin(getattr(good, name)) == 1
        assert np.nanmax(getattr(bad, name)[-2:]) == 0
        assert np.nanmin(getattr(alone, name)) == 1


def test_a_landmark_that_is_covered_does_not_count():
    scene = variant(PASSING, lane="upper", corner="upper right", size=10.0)
    scores = score(read_frames(render(scene, 112)), scene)
    assert np.nanmin(scores.landmark_kept) == np.nanmin(scores.one_landmark) == 1
    still = np.repeat(render(scene, 1, first=44), 32, axis=0)  # the object stands before the landmark
    scores = score(read_frames(still), scene)
    assert np.isnan(scores.landmark_kept).all()
    assert np.isnan(scores.one_landmark).all()


def test_a_jump_is_seen_by_continuity_and_a_cut_is_none():
    jumped = np.concatenate([render(BOUNCING, 24), render(BOUNCING, 24, first=36)])
    assert score(read_frames(jumped), BOUNCING).continuity.tolist() == [1, 15 / 16, 1]
    cut = Film((Cut(0, BOUNCING), Cut(21, variant(BOUNCING, lane="lower", ground="gray"))))
    assert score(read_frames(render_film(cut, 48)), cut.cuts).continuity.tolist() == [1, 1, 1]
    too_fast = render(variant(BOUNCING, speed="fast"), 96)[::2]
    assert (score(read_frames(too_fast), BOUNCING).continuity < 0.2).all()


@pytest.mark.parametrize("speed", ["slow", "fast"])
def test_a_passing_object_is_on_time_on_every_round_but_not_when_it_is_early_or_late(speed):
    scene = variant(PASSING, speed=speed)
    around = round(112 / {"slow": 1, "fast": 2}[speed])  # the loop, in frames
    seen = presence(scene, np.arange(3 * around))
    gone = int(np.flatnonzero(seen == 0)[0])
    back = gone + int(np.flatnonzero(seen[gone:] > 0.9999)[0])
    true = render(scene, 3 * around)

    def judged(video):
        values = score(read_frames(video), scene).on_time
        return values[np.isfinite(values)].tolist()

    assert judged(true) == [1.0, 1.0]
    assert judged(true[: back - 1]) == []  # it was not due yet
    behind, wait = true[gone][None], round(0.3 * (back - gone))
    assert judged(np.concatenate([true[:gone], true[gone + wait : 2 * around]]))[0] == 0.0
    late = judged(np.concatenate([true[:gone], behind.repeat(wait, axis=0), true[gone:]]))
    assert late[0] == 0.0 and late[-1] == 1.0  # late once, then on time again
    assert judged(np.concatenate([true[:gone], behind.repeat(2 * around, axis=0)])) == [0.0]  # never back
    assert judged(true[:1].repeat(2 * around, axis=0)) == []  # it stands, and has not left


def test_only_a_passing_object_is_ever_due():
    assert np.isnan(score(read_frames(render(BOUNCING, 160)), BOUNCING).on_time).all()
    assert np.isnan(score(read_frames(render(PASSING, 160)), {"color": "red"}).on_time).all()


def test_slow_words_allow_less_than_fast_ones():
    leaps = read_frames(render(variant(BOUNCING, speed="fast"), 64)[::2][:18])  # 4 pixels a frame
    assert (score(leaps, {}).continuity == 0).all()
    steps = read_frames(render(variant(BOUNCING, speed="fast"), 18))
    assert (score(steps, {"speed": "fast"}).continuity == 1).all()


def test_a_film_without_a_landmark_has_none_to_keep():
    bare = read_frames(np.repeat(render(BOUNCING, 1), 32, axis=0))
    blank = replace(bare, corners=np.full((32, 4), "none"), landmark=np.full(32, ""), corner=np.full(32, ""))
    scores = score(blank, BOUNCING)
    assert np.isnan(scores.landmark_kept).all()
    assert (scores.one_landmark == 0).all()


def test_an_object_at_the_edge_is_not_taken_for_as_small_as_that_of_another_scene():
    """Its size used to be that of the nearest frame in plain view, even across a cut; so it seemed whole."""
    large = variant(PASSING, start="fourth", size=10.0, mark="none")
    film = Film((Cut(0, large), Cut(9, variant(BOUNCING, size=7.0))))
    reading = read_frames(render_film(film, 33))
    seen = presence(large, np.arange(9))
    assert seen.max() < 0.95
    np.testing.assert_allclose(reading.visible[:9], seen, atol=0.1)
    assert not reading.whole[:9].any()
