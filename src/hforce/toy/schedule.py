"""Which words a video is judged by when, and what every scene looked like when it was first seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hforce.errors import DataError
from hforce.toy.words import check_words
from hforce.toy.world import Scene

Array = NDArray[Any]
Words = Mapping[str, str] | Scene
Asked = Words | Sequence[tuple[int, Words]]  # one prompt, or (first video frame, words) of each: Film.cuts is one too


@dataclass(frozen=True)
class Stretch:
    """Video frames begin .. end - 1, and the words they are judged by. Where words are the same, so is the scene."""

    begin: int
    end: int
    words: Mapping[str, str]
    scene: int

    @property
    def frames(self) -> slice:
        """Its place in an array over all video frames."""
        return slice(self.begin, self.end)


def stretches(asked: Asked, frames: int) -> list[Stretch]:
    """What is asked of a video of so many frames, in order and without a gap. Prompts that begin after it are left out.

    Raises DataError unless the first begins at frame 0 and the others follow in order, and for words that the world
    does not have.
    """
    schedule = [(0, asked)] if isinstance(asked, Mapping | Scene) else list(asked)
    begins = [begin for begin, _ in schedule]
    if begins[:1] != [0] or any(later <= sooner for sooner, later in pairwise(begins)):
        raise DataError(f"prompts at video frames {begins}", "the first is at 0, and each comes after the one before")
    scenes: dict[frozenset[tuple[str, str]], int] = {}
    found = []
    for (begin, said), end in zip(schedule, [*begins[1:], frames], strict=True):
        words = said.words if isinstance(said, Scene) else dict(said)
        check_words(words)
        scene = scenes.setdefault(frozenset(words.items()), len(scenes))
        if begin < frames:
            found.append(Stretch(begin, min(end, frames), words, scene))
    return found


def asked_words(plan: Iterable[Stretch], slot: str) -> Array:
    """The word for a slot that every frame [T] is judged by; "" where none is asked for."""
    return np.concatenate([np.full(part.end - part.begin, part.words.get(slot, "")) for part in plan])


def each_stretch(plan: Iterable[Stretch], judge: Callable[[Stretch], Array]) -> Array:
    """What `judge` says of the frames of every stretch, joined: [T, ...]."""
    return np.concatenate([judge(part) for part in plan])


def first_seen(
    plan: Sequence[Stretch], values: Array, seen: Array, frames: int, sum_up: Callable[[Array], Any]
) -> Array:
    """What values [T, ...], known where seen [T], were like when the scene of each frame was first seen: [T, ...].

    It is summed up from the first so many frames that show it, in the first stretch of the scene that does. Where no
    stretch shows it, the value is like an empty one: nan or "".
    """
    before = np.full_like(values, "" if values.dtype.kind == "U" else np.nan)
    for scene in {part.scene for part in plan}:
        parts = [part for part in plan if part.scene == scene]
        shown = (part.begin + np.flatnonzero(seen[part.frames])[:frames] for part in parts)
        first = next((places for places in shown if len(places)), None)
        if first is not None:
            for part in parts:
                before[part.frames] = sum_up(values[first])
    return before
