"""Films: scenes with hard cuts between them, drawn so that what was seen long ago is needed again.

A scene that comes back looks as it did, and its clock has kept running: the object is where it would be by now. Cuts
lie where a chunk of the model begins. `layout` says where things are, for whoever weighs a loss by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hforce.errors import DataError
from hforce.toy.world import CORNERS, PIXELS, Floats, Random, Scene, position, presence, render

FIRST_CHUNK, CHUNK = 9, 12  # video frames that the first chunk of the model is long, and every later one
PATTERNS = {  # which scene every stretch shows -> how often it is drawn
    "A": 10, "AB": 2, "ABA": 5, "ABAB": 3, "ABCA": 2, "ABCB": 2, "ABAC": 1
}  # fmt: skip
EXTRA = 0.35  # how often the first stretch gets a chunk to spare, against 1 for every other: mostly it is short


class Cut(NamedTuple):
    """From video frame `frame` on, `scene` is shown."""

    frame: int
    scene: Scene


class Segment(NamedTuple):
    """Video frames begin .. end - 1 show `scene` from its own video frame `clock` on."""

    begin: int
    end: int
    scene: Scene
    clock: int


@dataclass(frozen=True, slots=True)
class Film:
    """Which scene is shown from which video frame on; the last one stays.

    Raises DataError unless the first cut is at frame 0 and the others follow in order.
    """

    cuts: tuple[Cut, ...]

    def __post_init__(self) -> None:
        begins = [cut.frame for cut in self.cuts]
        if begins[:1] != [0] or any(later <= sooner for sooner, later in pairwise(begins)):
            raise DataError(
                f"cuts at video frames {begins}", mend="the first is at 0, and each comes after the one before"
            )

    @classmethod
    def sample(cls, rng: Random, frames: int, held_out: bool | None = False) -> Film:
        """A film of so many video frames: two in five are a single scene, most others return to one. See Scene.sample.

        A film that is too short for a pattern gets a shorter one.
        """
        chunks = max(1, -(-(frames - FIRST_CHUNK) // CHUNK) + 1)
        pattern = _pattern(rng, chunks)
        scenes: dict[str, Scene] = {}
        for name in sorted(set(pattern)):
            scenes[name] = _another(rng, list(scenes.values()), held_out)
        starts = np.cumsum([0, *_lengths(rng, len(pattern), chunks)[:-1]]).tolist()
        return cls(tuple(Cut(chunk_start(start), scenes[name]) for start, name in zip(starts, pattern, strict=True)))

    def segments(self, frames: int, first: int = 0) -> list[Segment]:
        """The stretches without a cut of video frames first .. first + frames - 1, in order."""
        begins = [cut.frame for cut in self.cuts]
        appeared: dict[Scene, int] = {}
        found = []
        for begin, end, (_, scene) in zip(begins, [*begins[1:], first + frames], self.cuts, strict=True):
            since = appeared.setdefault(scene, begin)
            begin, end = max(begin, first), min(end, first + frames)
            if begin < end:
                found.append(Segment(begin, end, scene, begin - since))
        return found


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things are in every video frame, float [T], in pixels: the object's centre (x, y), its size (that of Scene)
    and the fraction 0..1 of it inside the picture (presence), and the landmark's centre (landmark_x, landmark_y).
    """

    x: Floats
    y: Floats
    size: Floats
    presence: Floats
    landmark_x: Floats
    landmark_y: Floats


def render_film(film: Film, frames: int, first: int = 0) -> NDArray[np.uint8]:
    """The film from video frame `first` on: uint8 [frames, 64, 64, 3]."""
    stretches = [render(part.scene, part.end - part.begin, part.clock) for part in film.segments(frames, first)]
    return np.concatenate([np.empty((0, PIXELS, PIXELS, 3), np.uint8), *stretches])


def layout(film: Film, frames: int, first: int = 0) -> Layout:
    """Where object and landmark are in video frames first .. first + frames - 1."""
    rows = []
    for part in film.segments(frames, first):
        t = part.clock + np.arange(part.end - part.begin)
        x, y = position(part.scene, t)
        fixed = (np.full(len(t), value) for value in (part.scene.size, *CORNERS[part.scene.corner]))
        size, landmark_x, landmark_y = fixed
        rows.append(np.stack([x, y, size, presence(part.scene, t), landmark_x, landmark_y]))
    return Layout(*np.concatenate([np.empty((6, 0)), *rows], axis=1))


def chunk_start(chunk: int) -> int:
    """The video frame with which a chunk of the model begins."""
    return FIRST_CHUNK + CHUNK * (chunk - 1) if chunk else 0


def _pattern(rng: Random, chunks: int) -> str:
    """One of the patterns that fit, by how often each is drawn."""
    fitting = [pattern for pattern in PATTERNS if len(pattern) <= chunks]
    return fitting[_weighted(rng, [PATTERNS[pattern] for pattern in fitting])]


def _another(rng: Random, others: list[Scene], held_out: bool | None) -> Scene:
    """A scene that differs from the others in colour, shape, ground or pattern, so that its prompt and its look do."""
    taken = [(other.color, other.shape, other.ground, other.pattern) for other in others]
    while True:
        scene = Scene.sample(rng, held_out=held_out)
        if (scene.color, scene.shape, scene.ground, scene.pattern) not in taken:
            return scene


def _lengths(rng: Random, stretches: int, chunks: int) -> list[int]:
    """How many chunks each stretch is long: at least one, and in all as many as there are."""
    lengths = [1] * stretches
    for _ in range(chunks - stretches):
        lengths[_weighted(rng, [EXTRA] + [1.0] * (stretches - 1))] += 1
    return lengths


def _weighted(rng: Random, weights: list[float] | list[int]) -> int:
    """An index, drawn in proportion to its weight."""
    reached = np.cumsum(weights)
    return int(np.searchsorted(reached, rng.random() * reached[-1], side="right"))
