"""Scene <-> prompt, render(scene) -> video.

A picture of 64 x 64 pixels shows one object on a dark background with a pale landmark in one corner, at 16 frames a
second. Eight words say what is seen (`SLOTS`), so a prompt can be judged; six things are *not* said (mark, hue, size,
tint, landmark, corner): they can only be remembered. Pixel i covers [i, i + 1); x grows to the right and y downwards; t
counts video frames from 0. Everything is a pure function of the scene: the same scene is the same film, bit for bit.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hforce.toy.words import SLOTS as SLOTS
from hforce.toy.words import Prompt as Prompt
from hforce.toy.words import check_words, looks
from hforce.toy.words import complete as complete
from hforce.toy.words import parse as parse
from hforce.toy.words import sentence as sentence
from hforce.toy.words import vocabulary as vocabulary

PIXELS = 64  # width and height
FPS = 16

MARKS = ("none", "white", "black")
LANDMARKS = ("ring", "cross", "diamond")
CORNERS = {  # x and y of a landmark's centre: the centre of a square of 8 x 8 pixels, so of one latent pixel
    "upper left": (12.0, 12.0), "upper right": (52.0, 12.0), "lower left": (12.0, 52.0), "lower right": (52.0, 52.0)
}  # fmt: skip
UNSAID = {"mark": MARKS, "landmark": LANDMARKS, "corner": tuple(CORNERS)}

HUES = {"red": 0.0, "yellow": 60.0, "green": 120.0, "cyan": 180.0, "blue": 240.0, "magenta": 300.0}  # degrees
SATURATION, VALUE = 0.85, 0.95  # of every object
GROUNDS = {  # RGB 0..255
    "green": (30, 92, 50), "blue": (30, 48, 112), "purple": (84, 40, 108), "brown": (104, 68, 32), "gray": (84, 84, 84)
}  # fmt: skip
MARK_COLORS = {"white": (246, 246, 246), "black": (10, 10, 10)}
LANDMARK_COLOR = (206, 203, 194)  # pale and almost gray, so it is unlike every object
HUE_SHIFT, SIZES, TINTS = 9.0, (7.0, 10.0), (0.85, 1.15)  # the ranges of what is not said: degrees, pixels, factor

CELL = 8  # pixels a stripe is wide and a check is wide and high: both repeat every 16 pixels, always from the corner
SHADE = 0.62  # the second tone of a pattern
MARK_RADIUS = 0.4  # of the object's size, which is the radius of a circle
SQUARE_HALF = 0.88  # half the side of a square, in sizes: about as large as the circle
TRIANGLE_INNER = 0.6  # inner radius of the triangle, in sizes; the outer one is twice that
EMBLEM = 4.0  # pixels: half the width of a landmark
EMBLEM_STROKE = 1.0  # half the width of the ring's line and of the cross's bars

SPEEDS = {"slow": 1.0, "fast": 2.0}  # pixels a frame along the path
LANES = {"upper": 18.0, "middle": 32.0, "lower": 46.0}  # y of the path; its x when bouncing up and down
CIRCLE_LANES = {"upper": 26.0, "middle": 32.0, "lower": 38.0}  # y of the centre of a circular path
ORBIT = 14.0  # its radius in pixels
MARGIN = 12.0  # nearest that a centre comes to the edge, unless it passes
LOOP, LEAD = 112.0, 24.0  # a passing object is on a loop of 112 pixels that begins 24 pixels before the edge
QUARTERS = {word: quarter for quarter, word in enumerate(SLOTS["start"])}
WINDOW = 28  # side of the square in which an object is drawn: the largest and its soft edge fit

Floats = NDArray[np.floating[Any]]
Choice = TypeVar("Choice")


class Random(Protocol):
    """What drawing a scene needs: `random.Random` and `numpy.random.Generator` both have it."""

    def random(self) -> float:
        """A number in [0, 1)."""
        ...


@dataclass(frozen=True, slots=True)
class Scene:
    """What is seen between two cuts: eight words that the prompt says, then six things that it does not say.

    mark is a dot at the centre (none, white, black), hue an offset in degrees, size in pixels, tint a factor on the
    background; landmark is an emblem behind the object, in a corner of the picture. Raises DataError for a word that
    the world does not have.
    """

    speed: str
    color: str
    shape: str
    lane: str
    motion: str
    start: str
    ground: str
    pattern: str
    mark: str = "none"
    hue: float = 0.0
    size: float = 8.5
    tint: float = 1.0
    landmark: str = "ring"
    corner: str = "upper left"

    def __post_init__(self) -> None:
        unsaid = {slot: getattr(self, slot) for slot in UNSAID}
        check_words({**self.words, **unsaid}, {**SLOTS, **UNSAID})

    @property
    def words(self) -> Prompt:
        """What the prompt says: every slot and its word."""
        return {slot: getattr(self, slot) for slot in SLOTS}

    @classmethod
    def sample(cls, rng: Random, words: Mapping[str, str] | None = None, held_out: bool | None = False) -> Scene:
        """A scene drawn evenly from all that show `words`. Uses `rng.random()` alone.

        held_out=False draws what training may show, held_out=True what it never does, None both. Raises DataError where
        no such scene shows `words`.
        """
        given = dict(words or {})
        check_words(given)
        drawn = {slot: _choose(rng, choices) for slot, choices in SLOTS.items()}
        drawn |= given | _choose(rng, looks(given, held_out))
        unsaid = {slot: _choose(rng, choices) for slot, choices in UNSAID.items()}
        return cls(
            **drawn,
            **unsaid,
            hue=(2 * rng.random() - 1) * HUE_SHIFT,
            size=SIZES[0] + rng.random() * (SIZES[1] - SIZES[0]),
            tint=TINTS[0] + rng.random() * (TINTS[1] - TINTS[0]),
        )


def _choose(rng: Random, choices: Sequence[Choice]) -> Choice:
    return choices[int(rng.random() * len(choices))]


def position(scene: Scene, t: ArrayLike) -> tuple[Floats, Floats]:
    """Centre (x, y) of the object in pixels at video frame t; x and y have the shape of t.

    Bouncing objects go back and forth between the margins and start at a quarter of that round; circling ones go
    clockwise from the top. A passing object starts in a quarter of the *visible* stretch, so that the first second of
    every film shows what has to be remembered, leaves the picture, and returns at the other side.
    """
    way = SPEEDS[scene.speed] * np.asarray(t, np.float64)
    quarter = QUARTERS[scene.start]
    if scene.motion == "circling":
        angle = way / ORBIT + quarter * np.pi / 2
        return PIXELS / 2 + ORBIT * np.sin(angle), CIRCLE_LANES[scene.lane] - ORBIT * np.cos(angle)
    lane = np.full_like(way, LANES[scene.lane])
    if scene.motion.startswith("passing"):
        x = (way + (quarter + 0.5) * PIXELS / 4 + LEAD) % LOOP - LEAD
        return (x if scene.motion == "passing right" else PIXELS - x), lane
    span = PIXELS - 2 * MARGIN
    back = MARGIN + span - np.abs((way + quarter * span / 2) % (2 * span) - span)
    return (back, lane) if scene.motion == "bouncing sideways" else (lane, back)


def presence(scene: Scene, t: ArrayLike) -> Floats:
    """Fraction 0..1 of the object's area that lies inside the picture at video frame t; has the shape of t."""
    x, y = (np.atleast_1d(axis).ravel() for axis in position(scene, t))
    alpha, left, top = cover(scene.shape, scene.size, x, y)
    columns, rows = (corner[:, None] + np.arange(WINDOW) for corner in (left, top))
    in_x, in_y = ((line >= 0) & (line < PIXELS) for line in (columns, rows))
    seen: Floats = (alpha * in_x[:, None, :] * in_y[:, :, None]).sum((1, 2)) / alpha.sum((1, 2))
    return seen.reshape(np.shape(t))


def ground_picture(ground: str, pattern: str, tint: float = 1.0) -> Floats:
    """The background alone, float [64, 64, 3] in 0..255."""
    y, x = np.indices((PIXELS, PIXELS)) // CELL
    second = {"plain": 0 * x, "striped": x % 2, "checkered": (x + y) % 2}[pattern]
    picture: Floats = np.where(second, SHADE, 1.0)[..., None] * tint * np.asarray(GROUNDS[ground], np.float64)
    return picture


def backdrop(scene: Scene) -> Floats:
    """Background and landmark, without the object: float [64, 64, 3] in 0..255."""
    ground = ground_picture(scene.ground, scene.pattern, scene.tint)
    alpha = emblem(scene.landmark, scene.corner)[..., None]
    picture: Floats = ground + alpha * (np.asarray(LANDMARK_COLOR) - ground)
    return picture


def emblem(landmark: str, corner: str) -> Floats:
    """How much of each pixel a landmark covers: [64, 64] in 0..1."""
    x, y = CORNERS[corner]
    centers = np.arange(PIXELS) + 0.5
    dx, dy = np.abs(centers - x)[None, :], np.abs(centers - y)[:, None]
    outline: Floats
    if landmark == "ring":
        outline = np.abs(np.hypot(dx, dy) - (EMBLEM - EMBLEM_STROKE)) - EMBLEM_STROKE
    elif landmark == "cross":  # two bars, from corner to corner of a square
        outline = np.maximum(np.abs(dx - dy) / math.sqrt(2) - EMBLEM_STROKE, np.maximum(dx, dy) - EMBLEM)
    else:
        outline = (dx + dy - EMBLEM) / math.sqrt(2)
    return np.clip(0.5 - outline, 0, 1)


def object_color(color: str, hue: float = 0.0) -> Floats:
    """RGB in 0..255, float [3], of a colour word, its hue turned by `hue` degrees."""
    return 255 * np.asarray(colorsys.hsv_to_rgb((HUES[color] + hue) / 360 % 1, SATURATION, VALUE))


def cover(shape: str, size: float, x: Floats, y: Floats) -> tuple[Floats, NDArray[np.int64], NDArray[np.int64]]:
    """How much of each pixel the shape covers, near its centre (x [T], y [T]).

    Returns alpha [T, 28, 28] in 0..1, and the column left [T] and row top [T] where each window begins in the picture.
    """
    left, top = (np.floor(axis).astype(np.int64) - WINDOW // 2 for axis in (x, y))
    near = np.arange(WINDOW) + 0.5
    dx = (near + (left - x)[:, None])[:, None, :]
    dy = (near + (top - y)[:, None])[:, :, None]
    return np.clip(0.5 - distance(shape, size, dx, dy), 0, 1), left, top


def distance(shape: str, size: float | Floats, dx: Floats, dy: Floats) -> Floats:
    """Signed distance in pixels from the shape's outline, negative inside; dx, dy from its centre, broadcast."""
    outline: Floats
    if shape == "circle":
        outline = np.hypot(dx, dy) - size
    elif shape == "square":
        outline = np.maximum(np.abs(dx), np.abs(dy)) - SQUARE_HALF * size
    else:
        slope = math.sqrt(0.75) * np.abs(dx) - 0.5 * dy  # the two upper sides of an equilateral triangle
        outline = np.maximum(slope, dy) - TRIANGLE_INNER * size
    return outline


def render(scene: Scene, frames: int, first: float = 0) -> NDArray[np.uint8]:
    """The scene from its video frame `first` on, with soft edges: uint8 [frames, 64, 64, 3]."""
    ground = backdrop(scene)
    video = np.repeat(np.rint(ground)[None].astype(np.uint8), frames, axis=0)
    x, y = position(scene, first + np.arange(frames))
    alpha, left, top = cover(scene.shape, scene.size, x, y)
    paint = np.broadcast_to(object_color(scene.color, scene.hue), (*alpha.shape, 3))
    if scene.mark != "none":
        dot = cover("circle", MARK_RADIUS * scene.size, x, y)[0][..., None]
        paint = paint + dot * (np.asarray(MARK_COLORS[scene.mark]) - paint)
    for picture, mask, color, x0, y0 in zip(video, alpha[..., None], paint, left, top, strict=True):
        rows, columns = slice(max(y0, 0), max(y0 + WINDOW, 0)), slice(max(x0, 0), max(x0 + WINDOW, 0))
        under = ground[rows, columns]
        inside = slice(max(-y0, 0), max(-y0, 0) + under.shape[0]), slice(max(-x0, 0), max(-x0, 0) + under.shape[1])
        picture[rows, columns] = np.rint(under + mask[inside] * (color[inside] - under))
    return video
