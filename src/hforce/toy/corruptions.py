"""Videos that go wrong in a known way from a known frame on, to try the judge on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hforce.toy.background import blurred
from hforce.toy.film import Cut, Film, render_film
from hforce.toy.schedule import Asked
from hforce.toy.world import (
    FPS,
    HUE_SHIFT,
    LANDMARK_COLOR,
    PIXELS,
    SIZES,
    SLOTS,
    TINTS,
    UNSAID,
    Random,
    Scene,
    backdrop,
    emblem,
    position,
    presence,
    render,
)

HALF = 80  # video frames that a scene is right, and then wrong
CUTS = (0, 45, 93, 153)  # of a film that leaves a scene and returns to it; where chunks begin
COLOR_DRIFT, FADE = 40.0, 0.75  # degrees, and the factor on the background, at the end of a slow drift
SLOWED = 0.8  # share of its speed that an object has which keeps to its path too slowly
DELAY = 12  # video frames by which an object comes back too late
FAINT = 0.5  # strength of a landmark that is half gone

CHOICES = {**SLOTS, **UNSAID}
RANGES = {"hue": (-HUE_SHIFT, HUE_SHIFT), "size": SIZES, "tint": TINTS}

Video = NDArray[np.uint8]
Later = Callable[[Scene], Video]


@dataclass(frozen=True)
class Corruption:
    """A way to go wrong, and the measure that is to see it.

    later says, for a scene, what is seen from video frame 80 on instead of the truth. Without it, a film leaves the
    scene and returns to it with another value of `altered`. words: only scenes that show one of these go wrong so.
    """

    name: str
    measure: str
    later: Later | None = None
    altered: str = ""
    words: tuple[dict[str, str], ...] = ({},)

    def make(self, rng: Random) -> tuple[Video, Asked]:
        """A video that is right at first and wrong in the end, uint8 [T, 64, 64, 3], and what was asked of it."""
        scene = Scene.sample(rng, self.words[int(rng.random() * len(self.words))], held_out=None)
        if self.later is not None:
            return np.concatenate([render(scene, HALF), self.later(scene)]), scene
        other = Scene.sample(rng, {"ground": _next(SLOTS["ground"], scene.ground)}, held_out=None)
        asked = tuple(Cut(frame, shown) for frame, shown in zip(CUTS, (scene, other, scene), strict=False))
        video = render_film(Film(asked), CUTS[-1])
        video[CUTS[2] :] = render(alter(scene, self.altered), CUTS[3] - CUTS[2], CUTS[2])
        return video, asked


def alter(scene: Scene, slot: str) -> Scene:
    """The scene with another value of a slot: the next word, or the end of the range that is further away."""
    value = getattr(scene, slot)
    changes: dict[str, Any] = {slot: _next(CHOICES[slot], value) if slot in CHOICES else _far(RANGES[slot], value)}
    return replace(scene, **changes)


def _next(choices: tuple[str, ...], word: str) -> str:
    """The word after this one; the first after the last."""
    return choices[(choices.index(word) + 1) % len(choices)]


def _far(bounds: tuple[float, float], value: float) -> float:
    return max(bounds, key=lambda end: abs(end - value))


def _rest(scene: Scene) -> Video:
    """The second half of a scene."""
    return render(scene, HALF, HALF)


def _with(slot: str) -> Later:
    return lambda scene: _rest(alter(scene, slot))


def _drifting(slot: str, end: Callable[[float], float]) -> Later:
    """With a number that changes a little with every frame, up to end(number)."""

    def later(scene: Scene) -> Video:
        values = np.linspace(getattr(scene, slot), end(getattr(scene, slot)), HALF)
        changes: list[dict[str, Any]] = [{slot: float(value)} for value in values]
        return np.concatenate([render(replace(scene, **change), 1, HALF + t) for t, change in enumerate(changes)])

    return later


def _blur(scene: Scene) -> Video:
    channels = np.moveaxis(_rest(scene).astype(np.float32), -1, 0).reshape(-1, PIXELS, PIXELS)
    for _ in range(3):
        channels = blurred(channels)
    return np.moveaxis(np.rint(channels).astype(np.uint8).reshape(3, HALF, PIXELS, PIXELS), 0, -1)


def _freeze(scene: Scene) -> Video:
    return np.repeat(render(scene, 1, HALF), HALF, axis=0)


def _slowed(scene: Scene) -> Video:
    """On its path, but slower than its slow or fast word says."""
    clock = HALF + SLOWED * np.arange(HALF)
    return np.concatenate([render(scene, 1, t) for t in clock])


def _flash_back(scene: Scene) -> Video:
    """The first second once more, when the object is furthest from where it was then."""
    later, t = _rest(scene), np.arange(FPS, HALF - FPS)
    (x, y), (x0, y0) = position(scene, HALF + t), position(scene, 0)
    start = int(t[np.hypot(x - x0, y - y0).argmax()])
    later[start : start + FPS] = render(scene, FPS)
    return later


def _behind(scene: Scene) -> NDArray[np.uint8]:
    return np.rint(backdrop(scene)).astype(np.uint8)


def _object(scene: Scene) -> NDArray[np.bool_]:
    """Where the object is in the second half: bool [80, 64, 64, 1]."""
    there: NDArray[np.bool_] = (_rest(scene) != _behind(scene)).any(-1, keepdims=True)
    return there


def _no_landmark(scene: Scene) -> Video:
    elsewhere = _rest(alter(scene, "corner"))
    return np.where(emblem(scene.landmark, scene.corner)[..., None] > 0, elsewhere, _rest(scene))


def _faint_landmark(scene: Scene) -> Video:
    return _painted(_no_landmark(scene), scene, FAINT)


def _second_landmark(scene: Scene) -> Video:
    return _painted(_rest(scene), alter(scene, "corner"), 1.0)


def _faint_second_landmark(scene: Scene) -> Video:
    return _painted(_rest(scene), alter(scene, "corner"), FAINT)


def _painted(video: Video, scene: Scene, strength: float) -> Video:
    """A video with the scene's landmark painted over it, behind the scene's object."""
    alpha = strength * emblem(scene.landmark, scene.corner)[..., None] * ~_object(scene)
    under = video.astype(np.float64)
    return np.rint(under + alpha * (np.asarray(LANDMARK_COLOR) - under)).astype(np.uint8)


def _second_object(scene: Scene) -> Video:
    """The same object again, in another lane and half a round ahead."""
    lane = {"upper": "lower", "lower": "upper", "middle": "upper"}[scene.lane]
    second = replace(scene, lane=lane, start=_next(SLOTS["start"], _next(SLOTS["start"], scene.start)))
    return np.where(_object(second), _rest(second), _rest(scene))


def _never_back(scene: Scene) -> Video:
    """A passing object that has left the picture stays away."""
    later = _rest(scene)
    gone = np.flatnonzero(presence(scene, np.arange(HALF, 2 * HALF)) == 0)[0]
    later[gone:] = _behind(scene)
    return later


def _late(scene: Scene) -> Video:
    """A passing object that has left the picture comes back too late, and goes on from there."""
    later = _rest(scene)
    gone = np.flatnonzero(presence(scene, np.arange(HALF, 2 * HALF)) == 0)[0]
    return np.concatenate([later[:gone], np.repeat(_behind(scene)[None], DELAY, axis=0), later[gone : HALF - DELAY]])


STAYING = tuple({"motion": word} for word in SLOTS["motion"] if not word.startswith("passing"))
PASSING = tuple({"motion": word, "speed": "fast"} for word in SLOTS["motion"] if word.startswith("passing"))
CORRUPTIONS = (
    Corruption("blur", "sharpness", _blur),
    Corruption("object's colour drifts", "hue_kept", _drifting("hue", lambda hue: hue + COLOR_DRIFT)),
    Corruption("object of another colour", "color_right", _with("color")),
    Corruption("object of another shape", "shape_right", _with("shape")),
    Corruption("object of another size", "size_kept", _with("size")),
    Corruption("another mark", "mark_kept", _with("mark")),
    Corruption("another motion", "motion_right", _with("motion")),
    Corruption("another speed", "motion_right", _with("speed")),
    Corruption("freeze", "motion_right", _freeze),
    Corruption("a fifth too slow", "on_path", _slowed),
    Corruption("flash-back", "continuity", _flash_back, words=STAYING),
    Corruption("second object", "one_object", _second_object),
    Corruption("object does not come back", "one_object", _never_back, words=PASSING),
    Corruption("object comes back late", "on_time", _late, words=PASSING),
    Corruption("background fades", "tint_kept", _drifting("tint", lambda tint: tint * FADE)),
    Corruption("landmark in another corner", "landmark_kept", _with("corner")),
    Corruption("another landmark", "landmark_kept", _with("landmark")),
    Corruption("landmark gone", "landmark_kept", _no_landmark),
    Corruption("landmark half faded", "landmark_kept", _faint_landmark),
    Corruption("second landmark", "one_landmark", _second_landmark),
    Corruption("half faded second landmark", "landmark_kept", _faint_second_landmark),
    Corruption("returns with another mark", "mark_kept", altered="mark"),
    Corruption("returns with another hue", "hue_kept", altered="hue"),
    Corruption("returns with another size", "size_kept", altered="size"),
    Corruption("returns with another tint", "tint_kept", altered="tint"),
    Corruption("returns with another landmark", "landmark_kept", altered="landmark"),
    Corruption("returns with landmark in another corner", "landmark_kept", altered="corner"),
)
