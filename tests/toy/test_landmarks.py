"""Landmarks are read where they are in sight, and nothing is said where they are not."""

import random
from dataclasses import replace

import numpy as np
import pytest

from hforce.toy.landmarks import BLOT, COVERED, NOTHING, sole_landmark
from hforce.toy.reading import read_frames
from hforce.toy.world import CORNERS, FPS, LANDMARK_COLOR, LANDMARKS, Scene, emblem, object_color, position, render

NAMES = list(CORNERS)
AWAY = Scene("slow", "red", "circle", "middle", "circling", "second", "green", "plain")  # never over a landmark
OVER = Scene("slow", "cyan", "square", "lower", "passing right", "first", "gray", "checkered", size=10.0,
             landmark="diamond", corner="lower left")  # fmt: skip


def painted(video, color, alpha):
    """A video with a colour painted over it as far as alpha [64, 64] goes."""
    under = video.astype(np.float64)
    return np.rint(under + alpha[..., None] * (np.asarray(color) - under)).astype(np.uint8)


@pytest.mark.parametrize("pattern", ["plain", "striped", "checkered"])
@pytest.mark.parametrize("landmark", LANDMARKS)
def test_every_landmark_is_read_in_every_corner(landmark, pattern):
    for corner in CORNERS:
        for ground, tint in (("gray", 1.15), ("green", 0.85), ("brown", 1.0)):
            scene = replace(AWAY, landmark=landmark, corner=corner, pattern=pattern, ground=ground, tint=tint)
            reading = read_frames(render(scene, 12))
            assert (reading.landmark == landmark).all()
            assert (reading.corner == corner).all()
            assert (reading.objects == 1).all()
            assert (reading.ghosts == 0).all()
            assert reading.residual.max() < 0.02


def test_a_landmark_behind_the_object_is_neither_read_nor_taken_for_an_object():
    t = np.arange(7 * FPS)
    reading = read_frames(render(OVER, len(t)))
    (x, _), (at, _) = position(OVER, t), CORNERS[OVER.corner]
    hidden, clear = np.abs(x - at) < OVER.size - 3, np.abs(x - at) > OVER.size + 6
    assert hidden.sum() >= 10
    assert (reading.corners[hidden, NAMES.index(OVER.corner)] == COVERED).all()
    assert (reading.landmark[hidden] == "").all()
    assert (reading.landmark[clear] == OVER.landmark).all()
    assert (reading.objects <= 1).all()
    assert (reading.ghosts == 0).all()


def test_what_is_read_is_never_wrong_however_much_is_covered():
    for seed in range(6):
        scene = Scene.sample(random.Random(seed), {"motion": "passing left", "lane": "upper"}, held_out=None)
        scene = replace(scene, corner="upper right")
        reading = read_frames(render(scene, 112))
        assert set(reading.landmark) <= {scene.landmark, ""}
        assert set(reading.corner) <= {scene.corner, ""}
        assert set(np.delete(reading.corners, NAMES.index(scene.corner), axis=1).ravel()) <= {NOTHING, COVERED}


@pytest.mark.parametrize("strength", [0.3, 0.5])
def test_a_faint_second_landmark_is_a_blot(strength):
    video = painted(render(AWAY, 4), LANDMARK_COLOR, strength * emblem("cross", "lower right"))
    reading = read_frames(video)
    assert (reading.corners == ["ring", NOTHING, NOTHING, BLOT]).all()
    assert (reading.landmark == "").all()
    assert (reading.objects == 1).all()


def test_a_mixture_of_two_landmarks_is_none_of_them():
    both = np.maximum(emblem("ring", "upper left"), emblem("cross", "upper left"))
    reading = read_frames(painted(render(AWAY, 4), LANDMARK_COLOR, both))
    assert (reading.corners[:, 0] == BLOT).all()


def test_a_colourful_thing_in_a_corner_is_an_object_not_a_landmark():
    reading = read_frames(painted(render(AWAY, 4), object_color("yellow"), emblem("diamond", "lower right")))
    assert (reading.corners[:, 3] == COVERED).all()
    assert (reading.objects == 2).all()
    assert (reading.landmark == "ring").all()


def test_the_sole_landmark_is_the_only_thing_in_sight():
    corners = np.array(
        [
            ["none", "ring", "none", "none"],
            ["none", "ring", "", ""],
            ["none", "ring", "none", "cross"],
            ["none", "ring", "blot", "none"],
            ["none", "none", "none", "none"],
            ["none", "none", "blot", "none"],
            ["", "", "", ""],
        ]
    )
    landmark, corner = sole_landmark(corners)
    assert landmark.tolist() == ["ring", "ring", "", "", "", "", ""]
    assert corner.tolist() == ["upper right", "upper right", "", "", "", "", ""]
