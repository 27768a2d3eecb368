"""Which of the known paths an object follows.

A path is a motion, a speed and a lane; its phase is free, for a small error of speed piles up over a long video without
anything having gone wrong.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hforce.toy.world import FPS, LOOP, MARGIN, ORBIT, PIXELS, SLOTS, SPEEDS, Scene, position, presence

WINDOW = 64  # video frames that a motion is judged by: long enough to show a turn of the slow ones
CAP = 8.0  # pixels: the most that one frame can count against a path

Array = NDArray[Any]
Path = tuple[str, str, str]  # motion, speed, lane
PATHS: tuple[Path, ...] = tuple(product(SLOTS["motion"], SLOTS["speed"], SLOTS["lane"]))


def likeliest_path(x: Array, y: Array) -> Path:
    """The path that fits the centres x, y [T] of a whole clip best; nan = not seen."""
    return min(PATHS, key=lambda path: float(np.square(path_error(x, y, path)).sum()))


def path_error(x: Array, y: Array, path: Path, fps: int = FPS) -> Array:
    """How far centres x, y [T] (nan = not seen) are from a path at its best phase: rms pixels, float [seconds].

    Each second is judged by the 64 frames around it with a phase of its own, so a small error of speed does not pile up
    over a long video. Not seeing the object where the path shows it, or the reverse, costs as much as 8 pixels.
    """
    track, shown = _track(path)
    cost = _cost(x, y, track, CAP**2 * shown[:, None])
    t = np.arange(len(x))
    phased = cost[(np.arange(len(track))[:, None] + t) % len(track), t]
    total = np.pad(np.cumsum(phased, axis=1), ((0, 0), (1, 0)))
    begin, length = _windows(len(x), fps)
    error: Array = np.sqrt((total[:, begin + length] - total[:, begin]).min(axis=0) / length)
    return error


def idle_error(x: Array, y: Array, fps: int = FPS) -> Array:
    """How far centres x, y [T] are from no motion at all, the nearer of rest and absence: rms pixels, float [seconds].

    A resting object is where the seen ones are in the middle, and always in the picture; an absent one never is.
    """
    begin, length = _windows(len(x), fps)
    errors = []
    for near in (slice(first, first + length) for first in begin):
        seen = np.isfinite(x[near])
        spot = [np.median(axis[near][seen]) for axis in (x, y)] if seen.any() else [0, 0]
        rest = _cost(x[near], y[near], np.array([spot]), np.full(1, CAP**2))
        errors.append(np.sqrt(min(rest.mean(), CAP**2 * seen.mean())))
    return np.array(errors)


def _cost(x: Array, y: Array, track: Array, unseen: Array) -> Array:
    """What centres x, y [T] cost at the places track [P, 2]: squared pixels [P, T], `unseen` where nothing is seen."""
    seen = np.isfinite(x)
    squared = np.square(track[:, :1] - np.where(seen, x, 0)) + np.square(track[:, 1:] - np.where(seen, y, 0))
    return np.where(seen, np.minimum(squared, CAP**2), unseen)


def _windows(frames: int, fps: int) -> tuple[Array, int]:
    """The first video frame [seconds] of what every second is judged by, and how many frames that is."""
    length = min(WINDOW, frames)
    middle = (np.arange(max(1, frames // fps)) + 0.5) * fps
    return np.clip(middle - length / 2, 0, frames - length).astype(np.int64), length


@cache
def _track(path: Path) -> tuple[Array, Array]:
    """One round of a path: centres [P, 2] a frame apart, and the visible fraction [P] of an object on it."""
    motion, speed, lane = path
    scene = Scene(speed, "red", "circle", lane, motion, "first", "green", "plain")
    rounds = {"passing": LOOP, "bouncing": 2 * (PIXELS - 2 * MARGIN), "circling": 2 * np.pi * ORBIT}
    t = np.arange(round(rounds[motion.split()[0]] / SPEEDS[speed]))
    return np.stack(position(scene, t), axis=1), presence(scene, t)
