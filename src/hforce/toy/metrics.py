"""Does the video still show what was asked, and does it drift.

`read_frames` says what a video shows, `score` compares that with the words of its prompt and with its own first second,
`drift` sums a long video up: how much worse its end is than its beginning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hforce.toy.motion import PATHS, path_error
from hforce.toy.reading import Reading, read_frames
from hforce.toy.words import check_words
from hforce.toy.world import FPS, LOOP, MARGIN, PIXELS, SPEEDS, Scene

__all__ = ["Reading", "Scores", "drift", "read_frames", "score"]

MOTION_TOLERANCE = 3.0  # pixels, rms: up to this the motion is the asked one
HUE_TOLERANCE, SIZE_TOLERANCE = 8.0, 1.0  # degrees and pixels within which what is remembered counts as kept
HIDDEN = LOOP - PIXELS + 2 * MARGIN  # pixels of its loop on which a passing object is not fully seen
PATIENCE = 1.1  # a passing object may stay away a tenth longer than it should
EDGE_SECONDS = 5  # `drift` compares the last so many seconds with the first

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Scores:
    """Measures a second, float [seconds]; nan where a second has nothing to judge, or the words do not say it.

    Fractions 0..1 of the frames, 1 is best: color_right, shape_right (of an object fully in the picture), ground_right,
    pattern_right, motion_right (motion, speed and lane, in any phase), one_object (exactly one, wherever one should be
    seen), and mark_kept, hue_kept, size_kept: as in the first second, for no prompt says them.
    Distances, 0 is best: ghosts (area of what should not be there, in areas of the object), hue_error (degrees),
    size_error (pixels) and ground_error (rms 0..1) from the first second, residual (rms 0..1) from a clean drawing.
    sharpness: steepness of the object's edge over that of the first second; 1 is unchanged.
    """

    color_right: Array
    shape_right: Array
    ground_right: Array
    pattern_right: Array
    motion_right: Array
    one_object: Array
    mark_kept: Array
    hue_kept: Array
    size_kept: Array
    ghosts: Array
    hue_error: Array
    size_error: Array
    ground_error: Array
    residual: Array
    sharpness: Array


def score(reading: Reading, words: Mapping[str, str] | Scene, fps: int = FPS) -> Scores:
    """Judge a reading by the words of its prompt (all, or some of them), second by second at `fps` frames a second.

    The first second is the first `fps` frames, for the object the first that show what is compared. Frames past the
    last full second count to it. Raises DataError for words that the world does not have.
    """
    asked = words.words if isinstance(words, Scene) else dict(words)
    check_words(asked)
    always, whole = np.ones(len(reading.x), bool), reading.whole
    right = {
        "color_right": (_says(reading.color, asked.get("color")), whole),
        "shape_right": (_says(reading.shape, asked.get("shape")), whole),
        "ground_right": (_says(reading.ground, asked.get("ground")), always),
        "pattern_right": (_says(reading.pattern, asked.get("pattern")), always),
        "one_object": _one_object(reading, asked),
        "mark_kept": (_says(reading.mark, _commonest(reading.mark[whole][:fps])), whole),
        "ghosts": (reading.ghosts, always),
        "residual": (reading.residual, always),
        "ground_error": (_ground_error(reading, fps), always),
        "sharpness": (reading.sharpness / _middle(reading.sharpness, fps), always),
    }
    hue_error = np.abs(_turned(reading.hue - _middle_hue(reading.hue[whole], fps)))
    size_error = np.abs(reading.size - _middle(reading.size, fps))
    right |= {"hue_error": (hue_error, whole), "size_error": (size_error, whole)}
    right |= {"hue_kept": (_within(hue_error, HUE_TOLERANCE), whole)}
    right |= {"size_kept": (_within(size_error, SIZE_TOLERANCE), whole)}
    means = {name: _each_second(value, counted, fps) for name, (value, counted) in right.items()}
    return Scores(motion_right=_motion_right(reading, asked, fps), **means)


def drift(reading: Reading, words: Mapping[str, str] | Scene, fps: int = FPS) -> dict[str, float]:
    """How a video changes: the mean of its last five seconds minus that of its first five, for every measure.

    nan where either end has nothing to judge. A video of less than ten seconds is cut in halves.
    """
    scores = score(reading, words, fps)
    changes = {}
    for field in fields(Scores):
        values = getattr(scores, field.name)
        edge = max(1, min(EDGE_SECONDS, len(values) // 2))
        changes[field.name] = _mean(values[-edge:]) - _mean(values[:edge])
    return changes


def _says(read: Array, asked: str | None) -> Array:
    """1 where the word read [T] is the one asked for, 0 elsewhere; nan everywhere if none was asked for."""
    return np.where(read == asked, 1.0, 0.0) if asked else np.full(len(read), np.nan)


def _within(error: Array, tolerance: float) -> Array:
    return np.where(np.isfinite(error), error <= tolerance, np.nan)


def _one_object(reading: Reading, asked: Mapping[str, str]) -> tuple[Array, Array]:
    """Whether exactly one object is seen [T], and which frames count [T].

    A passing object may be out of sight as long as its way round takes, each time; that the way is the asked one is
    motion_right's matter.
    """
    alone = reading.whole & (reading.objects == 1)
    allowed = 0.0
    if asked.get("motion", "passing").startswith("passing"):
        allowed = PATIENCE * HIDDEN / SPEEDS[asked.get("speed", "slow")]
    t = np.arange(len(alone))
    away = t - np.maximum.accumulate(np.where(reading.whole, t, -1))  # frames since it was last fully seen
    excused = ~reading.whole & (away <= allowed) & (reading.objects <= 1)
    return alone.astype(np.float64), ~excused


def _motion_right(reading: Reading, asked: Mapping[str, str], fps: int) -> Array:
    """1 for each second whose movement fits the asked motion, speed and lane, else 0; nan if none of them was asked."""
    said = [asked.get(slot) for slot in ("motion", "speed", "lane")]
    fitting = [path for path in PATHS if all(want in (None, have) for want, have in zip(said, path, strict=True))]
    error = np.min([path_error(reading.x, reading.y, path, fps) for path in fitting], axis=0)
    return np.where(any(said), error <= MOTION_TOLERANCE, np.nan)


def _ground_error(reading: Reading, fps: int) -> Array:
    """Distance [T] of the background's tones from those of the first second: rms over tones and channels, 0..1."""
    before = np.median(reading.cells[:fps], axis=0)
    error: Array = np.sqrt(np.square(reading.cells - before).mean((1, 2))) / 255
    return error


def _turned(degrees: Array) -> Array:
    """An angle as the shortest turn, -180..180 degrees."""
    turned: Array = (degrees + 180) % 360 - 180
    return turned


def _middle_hue(hue: Array, fps: int) -> float:
    """The median of the first second's hues in degrees, which may lie on both sides of 0; nan if there is none."""
    known = hue[np.isfinite(hue)][:fps]
    return float(known[0] + np.median(_turned(known - known[0]))) if len(known) else np.nan


def _middle(values: Array, fps: int) -> float:
    """The median of the first second in which they are known; nan if they never are."""
    known = values[np.isfinite(values)][:fps]
    return float(np.median(known)) if len(known) else np.nan


def _commonest(words: Array) -> str | None:
    """The word that is there most often; None if there is none."""
    known, counts = np.unique(words, return_counts=True)
    return str(known[counts.argmax()]) if len(known) else None


def _mean(values: Array) -> float:
    """The mean of the values that are known; nan if none is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else np.nan


def _each_second(value: Array, counted: Array, fps: int) -> Array:
    """Mean of value [T] over the counted frames [T] of each second, [seconds]; nan where none counts."""
    seconds = max(1, len(value) // fps)
    second = np.minimum(np.arange(len(value)) // fps, seconds - 1)
    good = counted & np.isfinite(value)
    amount = np.bincount(second, good, seconds)
    total = np.bincount(second, np.where(good, value, 0), seconds)
    mean: Array = np.divide(total, amount, out=np.full(seconds, np.nan), where=amount > 0)
    return mean
