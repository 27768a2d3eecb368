"""Does the video still show what was asked, and does it drift.

`read_frames` says what a video shows, `score` compares that with the words of its prompt, or of each prompt of a
schedule, and with what every scene looked like when it was first seen; `drift` sums a long video up: how much worse its
end is than its beginning.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hforce.toy.landmarks import COVERED, NOTHING
from hforce.toy.motion import PATHS, idle_error, path_error
from hforce.toy.reading import Reading, read_frames
from hforce.toy.schedule import Asked, Stretch, asked_words, each_stretch, first_seen, stretches
from hforce.toy.world import CORNERS, FPS, LOOP, MARGIN, PIXELS, SPEEDS

__all__ = ["Edges", "Reading", "Scores", "drift", "read_frames", "score"]

PATH_TOLERANCE = 3.0  # pixels, rms: so near to a path an object is on it
HUE_TOLERANCE, SIZE_TOLERANCE = 8.0, 1.0  # degrees and pixels within which what is remembered counts as kept
TINT_TOLERANCE = 0.06  # the same for the background's tones, over their brightness; a tint is 0.85 to 1.15
JUMP = 1.5  # pixels by which an object may move further in a frame than its speed allows: it is read that exactly
HIDDEN = LOOP - PIXELS + 2 * MARGIN  # pixels of its loop on which a passing object is not fully seen
PATIENCE = 1.1  # a passing object may stay away a tenth longer than it should
PUNCTUAL = 0.15  # share of its time out of the picture by which a passing object's return may be early or late
EDGE_SECONDS = 5  # `drift` compares the last so many seconds with the first
# The judge looks a little further: a motion shows in the 64 frames around a second, and an object may rightly be out of
# sight for five.
HEAD_SECONDS, TAIL_SECONDS = 7, 10

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Scores:
    """Measures a second, float [seconds]; nan where a second has nothing to judge, or the words do not say it.

    Fractions 0..1 of the frames, 1 is best: color_right, shape_right (of an object fully in the picture), ground_right,
    pattern_right, motion_right (no other motion, speed or lane fits better, in any phase, nor does rest or absence),
    on_path (the movement is within 3 pixels rms of the asked one), one_object and one_landmark (exactly one, wherever
    one should be seen), continuity (the object moved no further than its speed allows since the frame before), on_time
    (of the returns of a passing object, those that come when its way round is done; one that is overdue counts as
    missed), and mark_kept, hue_kept, size_kept, tint_kept, landmark_kept (which one and where, and no other): as when
    the scene was first seen, for no prompt says them.
    Distances, 0 is best: ghosts (area of what should not be there, in areas of the object), hue_error (degrees),
    size_error (pixels) and ground_error (rms 0..1) from when the scene was first seen, residual (rms 0..1) from a clean
    drawing. sharpness: steepness of the object's edge over that when the scene was first seen; 1 is unchanged.
    """

    color_right: Array
    shape_right: Array
    ground_right: Array
    pattern_right: Array
    motion_right: Array
    on_path: Array
    one_object: Array
    one_landmark: Array
    continuity: Array
    on_time: Array
    mark_kept: Array
    hue_kept: Array
    size_kept: Array
    tint_kept: Array
    landmark_kept: Array
    ghosts: Array
    hue_error: Array
    size_error: Array
    ground_error: Array
    residual: Array
    sharpness: Array


def score(reading: Reading, asked: Asked, fps: int = FPS) -> Scores:
    """Judge a reading by the words asked for, second by second at `fps` frames a second.

    asked: the words of one prompt (all, or some of them), or a schedule of (first video frame, words). What no prompt
    says is compared with the first second of the first stretch with the same words: the first `fps` frames of it that
    show what is compared. Frames past the last full second count to it. Raises DataError for words that the world does
    not have, and for a schedule that does not begin at frame 0 or is out of order.
    """
    plan = stretches(asked, len(reading.x))
    always, whole = np.ones(len(reading.x), bool), reading.whole
    moves, on_path = each_stretch(plan, lambda part: _motion(reading, part, fps)).T
    right = {
        "color_right": (_says(reading.color, asked_words(plan, "color")), whole),
        "shape_right": (_says(reading.shape, asked_words(plan, "shape")), whole),
        "ground_right": (_says(reading.ground, asked_words(plan, "ground")), always),
        "pattern_right": (_says(reading.pattern, asked_words(plan, "pattern")), always),
        "motion_right": (moves, always),
        "on_path": (on_path, always),
        "one_object": (each_stretch(plan, lambda part: _one_object(reading, part)), always),
        "one_landmark": (_one_landmark(reading), always),
        "continuity": (_continuity(reading, plan), always),
        "on_time": (each_stretch(plan, lambda part: _on_time(reading, part)), always),
        "mark_kept": (_says(reading.mark, first_seen(plan, reading.mark, whole, fps, _commonest)), whole),
        "landmark_kept": (_landmark_kept(reading, plan, fps), always),
        "ghosts": (reading.ghosts, always),
        "residual": (reading.residual, always),
        "sharpness": (reading.sharpness / _first_middle(plan, reading.sharpness, fps), always),
    }
    hue = np.where(whole, reading.hue, np.nan)
    hue_error = np.abs(_turned(hue - first_seen(plan, hue, np.isfinite(hue), fps, _middle_hue)))
    size_error = np.abs(reading.size - _first_middle(plan, reading.size, fps))
    ground_error, ground_level = _ground_error(reading, plan, fps)
    right |= {"hue_error": (hue_error, whole), "hue_kept": (_within(hue_error, HUE_TOLERANCE), whole)}
    right |= {"size_error": (size_error, whole), "size_kept": (_within(size_error, SIZE_TOLERANCE), whole)}
    right |= {"ground_error": (ground_error, always)}
    right |= {"tint_kept": (_within(ground_error / ground_level, TINT_TOLERANCE), always)}
    return Scores(**{name: _each_second(value, counted, fps) for name, (value, counted) in right.items()})


def drift(reading: Reading, asked: Asked, fps: int = FPS) -> dict[str, float]:
    """How a video changes: the mean of its last five seconds minus that of its first five, for every measure.

    nan where either end has nothing to judge. A video of less than ten seconds is cut in halves.
    """
    scores = score(reading, asked, fps)
    changes = {}
    for field in fields(Scores):
        values = getattr(scores, field.name)
        edge = max(1, min(EDGE_SECONDS, len(values) // 2))
        changes[field.name] = _mean(values[-edge:]) - _mean(values[:edge])
    return changes


class Edges:
    """Keeps the beginning and the end of a video, and the beginning of every scene in it: all that `drift` needs.

    frames: how many the video has; schedule: (first video frame, words) of each prompt. video, uint8 [T, H, W, 3]: what
    is kept; the attribute schedule is the same as the argument, but counts the frames that are kept. The memory is
    taken at once, so that keeping frames does not look like a process that grows.
    """

    def __init__(self, frames: int, schedule: Sequence[tuple[int, Mapping[str, str]]] = ((0, {}),)) -> None:
        head, tail = HEAD_SECONDS * FPS, max(0, frames // FPS - TAIL_SECONDS) * FPS
        wanted, shown = {*range(head), *range(tail, frames)}, list[Mapping[str, str]]()
        for (begin, words), end in zip(schedule, [*(begin for begin, _ in schedule[1:]), frames], strict=True):
            if words not in shown:
                wanted.update(range(begin, min(begin + head, end)))
                shown.append(words)
        self._wanted = sorted(number for number in wanted if number < frames)
        self.video = np.full((len(self._wanted), PIXELS, PIXELS, 3), 1, np.uint8)
        kept = {bisect_left(self._wanted, begin): words for begin, words in schedule}  # of a shot not kept, the next
        self.schedule = [(place, words) for place, words in kept.items() if place < len(self._wanted)]

    def look(self, first: int, frames: NDArray[np.uint8]) -> None:
        """Takes what is wanted of frames [T, H, W, 3], the first of which is number `first`."""
        begin, end = (bisect_left(self._wanted, number) for number in (first, first + len(frames)))
        for place in range(begin, end):
            self.video[place] = frames[self._wanted[place] - first]


def _says(read: Array, asked: Array) -> Array:
    """1 where the word read [T] is the one asked for [T], 0 elsewhere; nan where none is asked for."""
    return np.where(asked == "", np.nan, (read == asked).astype(np.float64))


def _within(error: Array, tolerance: float) -> Array:
    return np.where(np.isfinite(error), error <= tolerance, np.nan)


def _one_object(reading: Reading, part: Stretch) -> Array:
    """Whether exactly one object is seen, 0 or 1 for the frames of a stretch; nan where none needs to be.

    A passing object may be out of sight as long as its way round takes, each time; that the way is the asked one is
    motion_right's matter.
    """
    whole, objects = reading.whole[part.frames], reading.objects[part.frames]
    alone = whole & (objects == 1)
    allowed = 0.0
    if part.words.get("motion", "passing").startswith("passing"):
        allowed = PATIENCE * HIDDEN / SPEEDS[part.words.get("speed", "slow")]
    t = np.arange(len(alone))
    away = t - np.maximum.accumulate(np.where(whole, t, -1))  # frames since it was last fully seen
    excused = ~whole & (away <= allowed) & (objects <= 1)
    return np.where(excused, np.nan, alone)


def _motion(reading: Reading, part: Stretch, fps: int) -> Array:
    """Of every frame of a stretch [T, 2]: whether the asked motion, speed and lane fit best, and whether they fit well.

    1 or 0 for all frames of a second, nan if none of them is asked for. Seconds are counted from the beginning of the
    stretch. A path that fits as well as the asked one, as in a short stretch, leaves it right.
    """
    x, y = reading.x[part.frames], reading.y[part.frames]
    said = [part.words.get(slot) for slot in ("motion", "speed", "lane")]
    if not any(said):
        return np.full((len(x), 2), np.nan)
    errors = np.array([*(path_error(x, y, path, fps) for path in PATHS), idle_error(x, y, fps)])
    asked = np.array([all(want in (None, have) for want, have in zip(said, path, strict=True)) for path in PATHS])
    error = errors[:-1][asked].min(axis=0)
    fits = np.array([error <= errors.min(axis=0), error <= PATH_TOLERANCE])
    return fits.T[_seconds(len(x), fps)].astype(np.float64)


def _continuity(reading: Reading, plan: Sequence[Stretch]) -> Array:
    """1 for each frame [T] in which the object is no further from where it was than its speed allows, else 0.

    nan unless it is in plain view in this frame and the one before, and at a cut.
    """
    plain = reading.whole & np.isfinite(reading.size)
    fastest = max(SPEEDS.values())
    speed = np.array([SPEEDS.get(word, fastest) for word in asked_words(plan, "speed").tolist()])
    step = np.hypot(np.diff(reading.x, prepend=np.nan), np.diff(reading.y, prepend=np.nan))
    judged = plain & np.concatenate([[False], plain[:-1]])
    judged[[part.begin for part in plan]] = False
    return np.where(judged, step <= speed + JUMP, np.nan)


def _on_time(reading: Reading, part: Stretch) -> Array:
    """1 for the frame of a stretch in which a passing object comes back when it should, 0 where it does early or late.

    0 too for the frame from which on it is overdue, nan for all others. It comes back when it is fully seen again on
    the other side of the picture.
    """
    found = np.full(part.end - part.begin, np.nan)
    if not part.words.get("motion", "").startswith("passing"):
        return found
    size, x = reading.size[part.frames], reading.x[part.frames]
    seen = np.flatnonzero(reading.whole[part.frames] & np.isfinite(size))
    if not len(seen):
        return found
    away = (LOOP - PIXELS + 2 * np.median(size[seen])) / SPEEDS[part.words.get("speed", "slow")]
    lateness = np.diff(seen, append=len(found)) / away - 1
    crossed = np.abs(np.diff(x[seen])) > PIXELS / 2
    returns = seen[1:][crossed]
    found[returns] = np.abs(lateness[:-1][crossed]) <= PUNCTUAL
    overdue = seen[lateness > PUNCTUAL] + round(away * (1 + PUNCTUAL))
    found[overdue[overdue < len(found)]] = 0
    return found


def _one_landmark(reading: Reading) -> Array:
    """Whether just one landmark is seen, 0 or 1 a frame [T]; nan where none is, but may be behind something."""
    hidden = (reading.landmark == "") & np.isin(reading.corners, (NOTHING, COVERED)).all(1)
    excused = hidden & (reading.corners == COVERED).any(1)
    return np.where(excused, np.nan, reading.landmark != "")


def _landmark_kept(reading: Reading, plan: Sequence[Stretch], fps: int) -> Array:
    """Whether the landmark is still the one, and where, that it was when the scene was first seen, and the only one.

    0 or 1 a frame [T]; nan where its place is covered and no other place shows anything, and where it was never seen.
    """
    known = reading.landmark != ""
    landmark, corner = (first_seen(plan, words, known, fps, _commonest) for words in (reading.landmark, reading.corner))
    should = np.where(np.array(list(CORNERS)) == corner[:, None], landmark[:, None], NOTHING)
    right = (reading.corners == should) | (reading.corners == COVERED)
    unseen = right.all(1) & ((should != NOTHING) & (reading.corners == COVERED)).any(1)
    return np.where((landmark == "") | unseen, np.nan, right.all(1))


def _ground_error(reading: Reading, plan: Sequence[Stretch], fps: int) -> tuple[Array, Array]:
    """How far [T] the background's tones are from those when the scene was first seen, and how bright [T] those were.

    Both are rms over tones and channels, 0..1.
    """
    always = np.ones(len(reading.x), bool)
    before = first_seen(plan, reading.cells, always, fps, lambda cells: np.median(cells, axis=0))
    error, level = (np.sqrt(np.square(tones).mean((1, 2))) / 255 for tones in (reading.cells - before, before))
    return error, level.clip(1 / 255)


def _first_middle(plan: Sequence[Stretch], values: Array, fps: int) -> Array:
    """The median of values [T] when each scene was first seen, for every frame [T]."""
    return first_seen(plan, values, np.isfinite(values), fps, np.median)


def _turned(degrees: Array) -> Array:
    """An angle as the shortest turn, -180..180 degrees."""
    turned: Array = (degrees + 180) % 360 - 180
    return turned


def _middle_hue(hue: Array) -> float:
    """The median of hues in degrees, which may lie on both sides of 0."""
    return float(hue[0] + np.median(_turned(hue - hue[0])))


def _commonest(words: Array) -> str:
    """The word that is there most often."""
    known, counts = np.unique(words, return_counts=True)
    return str(known[counts.argmax()])


def _mean(values: Array) -> float:
    """The mean of the values that are known; nan if none is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else np.nan


def _seconds(frames: int, fps: int) -> Array:
    """The second that every frame [T] belongs to; those past the last full one belong to it."""
    return np.minimum(np.arange(frames) // fps, max(1, frames // fps) - 1)


def _each_second(value: Array, counted: Array, fps: int) -> Array:
    """Mean of value [T] over the counted frames [T] of each second, [seconds]; nan where none counts."""
    second = _seconds(len(value), fps)
    seconds = int(second[-1]) + 1
    good = counted & np.isfinite(value)
    amount = np.bincount(second, good, seconds)
    total = np.bincount(second, np.where(good, value, 0), seconds)
    mean: Array = np.divide(total, amount, out=np.full(seconds, np.nan), where=amount > 0)
    return mean
