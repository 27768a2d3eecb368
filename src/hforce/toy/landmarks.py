"""Which landmark each corner of a picture shows, and what of it is seen.

A landmark is a pale emblem on the background. Its pixels lie on the way from the background's colour to its own; where
many do not, something is in front of it, and nothing can be said.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hforce.toy.background import blurred
from hforce.toy.world import CORNERS, EMBLEM, LANDMARK_COLOR, LANDMARKS, emblem

NOTHING, BLOT, COVERED = "none", "blot", ""  # what a corner may show, other than a landmark
REACH = 6  # pixels from a landmark's centre, each way, in which it is looked for: its blurred edge is in it

SLACK, SPREAD = 10.0, 0.35  # a pale pixel is off its way by at most so much (RGB distance), and so much of its progress
UNLIKE = 45.0  # RGB distance from that way at which a pixel shows something in front
FEWEST = 5  # so many of them hide a landmark
TRACE = 0.25  # strength, 1 is a full landmark, below which a corner shows none
FULL = (0.65, 1.35)  # strength that a landmark may have
POOR = 0.3  # part of what is seen that the best landmark may leave unexplained

Array = NDArray[Any]


def read_corners(pixels: Array, ground: Array) -> tuple[Array, Array]:
    """What the corners of frames [T, 64, 64, 3] on their background show.

    Returns a word [T, 4] for each of CORNERS: a landmark, "none", "blot" for a pale thing that is no landmark, or ""
    where it is covered; and the background [T, 64, 64, 3] with what is pale in its corners painted in.
    """
    words, painted = [], ground.copy()
    for x, y in CORNERS.values():
        rows, columns = (slice(int(at) - REACH, int(at) + REACH) for at in (y, x))
        under = ground[:, rows, columns]
        seen = pixels[:, rows, columns] - under
        toward = np.asarray(LANDMARK_COLOR, np.float32) - under
        way = np.einsum("tyxc,tyxc->tyx", toward, toward)
        along = np.einsum("tyxc,tyxc->tyx", seen, toward) / way.clip(1)
        off = np.sqrt((np.einsum("tyxc,tyxc->tyx", seen, seen) - along**2 * way).clip(0))
        pale = np.where(off <= SLACK + SPREAD * along * np.sqrt(way), along.clip(0), 0)
        painted[:, rows, columns] += pale[..., None] * toward
        words.append(_words(pale, off))
    return np.stack(words, axis=1), painted


def sole_landmark(corners: Array) -> tuple[Array, Array]:
    """Landmark and corner [T] of words [T, 4]; "" unless exactly one corner shows one and no other has a blot."""
    shown = (corners != NOTHING) & (corners != COVERED)
    sole = (shown.sum(1) == 1) & ~(corners == BLOT).any(1)
    place = shown.argmax(1)
    words = np.take_along_axis(corners, place[:, None], 1)[:, 0]
    return np.where(sole, words, ""), np.where(sole, np.array(list(CORNERS))[place], "")


@cache
def _templates() -> tuple[Array, Array]:
    """Where in a corner a landmark may be [12, 12] bool, and each there, seen a little blurred [3, pixels]."""
    corner, (x, y) = next(iter(CORNERS.items()))
    rows, columns = (slice(int(at) - REACH, int(at) + REACH) for at in (y, x))
    drawn = blurred(np.stack([emblem(landmark, corner) for landmark in LANDMARKS]))[:, rows, columns]
    offsets = np.arange(2 * REACH) + 0.5 - REACH
    place = np.hypot(offsets, offsets[:, None]) <= EMBLEM + 1
    return place, drawn[:, place]


def _words(pale: Array, off: Array) -> Array:
    """The word [T] for a corner, from how far its pixels [T, 12, 12] are on their way, and off it."""
    place, templates = _templates()
    covered = (off[:, place] > UNLIKE).sum(1) >= FEWEST
    seen = pale[:, place]
    norms, energy = np.square(templates).sum(1), np.square(seen).sum(1)
    strength = seen @ templates.T / norms
    left = energy[:, None] - strength**2 * norms
    best = left.argmin(1)
    at_best = (np.arange(len(best)), best)
    fits = (left[at_best] <= POOR * energy) & (strength[at_best] >= FULL[0]) & (strength[at_best] <= FULL[1])
    words = np.where(energy < TRACE**2 * norms.mean(), NOTHING, np.where(fits, np.array(LANDMARKS)[best], BLOT))
    return np.where(covered, COVERED, words)
