"""Which frames a head keeps, and where in time it places them.

A video is made chunk after chunk, and every attention head looks back at frames already made. It cannot keep them
all: memory and time would grow with the video, and temporal distances with them, past anything seen in training.
A policy answers the two questions this raises, once per role and chunk, from plain facts and without a tensor:

    keep    after each chunk: which of the frames held stay?
    place   before each chunk: how far back does each of them appear to lie?

`keep` folds over the stream: its state is the list it returned last, with the new frames appended, and nothing hides
in the object. So a few laws hold for every policy (tests/cache/test_policies.py): what is kept is a subset in order,
never more than `capacity`, with the newest frame in it; keeping twice is keeping once; and distances (true is exempt)
are in order, distinct, and within the span. All lengths and distances are counted in latent frames.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from hforce.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Frame:
    """One latent frame of the stream, as a policy sees it."""

    index: int  # its number in the stream, from 0
    shot: int = 0  # the prompt it was made under, from 0
    surprise: float = 0.0  # how unlike the frames held when it came: a z-score against the stream so far
    drift: float = 0.0  # distance of its statistics to the first chunk's, 1 = the running 95th percentile, 0 = unjudged


@dataclass(frozen=True, slots=True)
class Clock:
    """The chunk about to be made: its first frame `now`, its length, and the `span` the model was trained on."""

    now: int
    chunk: int
    span: int


@dataclass(frozen=True, slots=True)
class Placement:
    """The frames the next chunk reads, oldest first, and how far before its first frame each is placed.

    Rotary attention sees only differences of temporal position, so the chunk may sit at 0 .. chunk - 1 and a frame
    at -distance. Every difference stays in the trained range while 0 < distance <= span - chunk.
    """

    frames: tuple[Frame, ...]
    distance: tuple[float, ...]


Likeness = Callable[[Frame, Frame], float]  # symmetric; 1 = the same picture, 0 = unrelated, may be negative
Position = Callable[[Sequence[Frame], Clock], Placement]


def unlike(one: Frame, other: Frame) -> float:
    """The likeness that finds no two frames alike, for policies that do not look at pictures."""
    return 0.0


@dataclass(frozen=True)
class CachePolicy(ABC):
    """What a head does with the past: a frozen dataclass whose fields are its options.

    Raises ConfigError when an option is not of the kind of its default, negative, or not finite.
    """

    looks: ClassVar[bool] = False  # whether `keep` asks for the likeness, which is measured only then
    positions: str = field(default="clamp", kw_only=True)  # a name in POSITIONS

    def __post_init__(self) -> None:
        for option in fields(self):
            _check_option(option.name, getattr(self, option.name), type(option.default))
        if self.positions not in POSITIONS:
            raise ConfigError(f"unknown positions {self.positions!r}", mend=f"use one of: {', '.join(POSITIONS)}")

    @property
    @abstractmethod
    def capacity(self) -> int:
        """The most frames ever held, without the chunk being made. It sizes the cache once and for all."""

    @abstractmethod
    def keep(self, held: Sequence[Frame], likeness: Likeness = unlike) -> list[Frame]:
        """The frames that stay, of those `held`: what was kept before and the newest chunk, oldest first."""

    def flush(self, held: Sequence[Frame]) -> list[Frame]:
        """The frames that stay at a cut to another prompt: all of them, unless the policy collects old scenes."""
        return list(held)

    def place(self, kept: Sequence[Frame], clock: Clock) -> Placement:
        """Where the kept frames appear to lie when the chunk of `clock` looks back at them."""
        return POSITIONS[self.positions](kept, clock)


def clamp(kept: Sequence[Frame], clock: Clock) -> Placement:
    """True distances while they fit in the span; what lies further is packed at its far end, in order.

    Time that passed stays visible: a frame from long ago looks as old as the model can express, never recent (the
    idea of Self-Extend, arXiv 2401.01325). When more frames are kept than there are places, the newest share 1.
    """
    far = clock.span - clock.chunk
    return Placement(tuple(kept), tuple(min(clock.now - f.index, max(far - i, 1)) for i, f in enumerate(kept)))


def rank(kept: Sequence[Frame], clock: Clock) -> Placement:
    """Gaps closed: a frame lies as far back as frames are kept at or after it, within the span (Infinity-RoPE).

    It equals `true` until a frame is dropped; from then on the time that passed between kept frames is forgotten.
    """
    far = clock.span - clock.chunk
    return Placement(tuple(kept), tuple(min(len(kept) - i, far) for i in range(len(kept))))


def true(kept: Sequence[Frame], clock: Clock) -> Placement:
    """True distances without bound: the model's own absolute positions, the control beyond its trained span."""
    return Placement(tuple(kept), tuple(clock.now - f.index for f in kept))


POSITIONS: Mapping[str, Position] = {"clamp": clamp, "rank": rank, "true": true}


def newest(held: Sequence[Frame], count: int) -> list[Frame]:
    """The last `count` frames held, or all of them while there are fewer."""
    return list(held[max(len(held) - count, 0) :])


def split(held: Sequence[Frame], sink: int, window: int) -> tuple[list[Frame], list[Frame], list[Frame]]:
    """Frames held, cut in three: the first `sink` of the stream, the middle, and the newest `window` of the rest."""
    rest = [f for f in held if f.index >= sink]
    recent = newest(rest, window)
    return [f for f in held if f.index < sink], rest[: len(rest) - len(recent)], recent


def _check_option(name: str, value: Any, kind: type) -> None:
    if kind is int and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise ConfigError(f"policy option {name!r} is {value!r}, expected a whole number, 0 or more")
    if kind is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value < 0:
            raise ConfigError(f"policy option {name!r} is {value!r}, expected a number, 0 or more")
