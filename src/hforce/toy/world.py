"""Scene <-> prompt, render(scene) -> video.

A picture of 64 x 64 pixels shows one object on a dark background, at 16 frames a second. Eight words say what is seen
(`SLOTS`), so a prompt can be judged; four things are *not* said (mark, hue, size, tint): they can only be remembered.
Pixel i covers [i, i + 1); x grows to the right and y downwards; t counts video frames from 0. Everything is a pure
function of the scene, so the same scene is the same film, bit for bit.
"""

from __future__ import annotations

import colorsys
import hashlib
import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hforce.errors import DataError

PIXELS = 64  # width and height
FPS = 16

SLOTS: dict[str, tuple[str, ...]] = {
    "speed": ("slow", "fast"),
    "color": ("red", "yellow", "green", "cyan", "blue", "magenta"),
    "shape": ("circle", "square", "triangle"),
    "lane": ("upper", "middle", "lower"),
    "motion": ("bouncing sideways", "bouncing up and down", "passing right", "passing left", "circling"),
    "start": ("first", "second", "third", "fourth"),
    "ground": ("green", "blue", "purple", "brown", "gray"),
    "pattern": ("plain", "striped", "checkered"),
}
MARKS = ("none", "white", "black")

HUES = {"red": 0.0, "yellow": 60.0, "green": 120.0, "cyan": 180.0, "blue": 240.0, "magenta": 300.0}  # degrees
SATURATION, VALUE = 0.85, 0.95  # of every object
GROUNDS = {  # RGB 0..255
    "green": (30, 92, 50), "blue": (30, 48, 112), "purple": (84, 40, 108), "brown": (104, 68, 32), "gray": (84, 84, 84)
}  # fmt: skip
MARK_COLORS = {"white": (246, 246, 246), "black": (10, 10, 10)}
HUE_SHIFT, SIZES, TINTS = 9.0, (7.0, 10.0), (0.85, 1.15)  # the ranges of what is not said: degrees, pixels, factor

CELL = 8  # pixels a stripe is wide and a check is wide and high: both repeat every 16 pixels, always from the corner
SHADE = 0.62  # the second tone of a pattern
MARK_RADIUS = 0.4  # of the object's size, which is the radius of a circle
SQUARE_HALF = 0.88  # half the side of a square, in sizes: about as large as the circle
TRIANGLE_INNER = 0.6  # inner radius of the triangle, in sizes; the outer one is twice that

SPEEDS = {"slow": 1.0, "fast": 2.0}  # pixels a frame along the path
LANES = {"upper": 18.0, "middle": 32.0, "lower": 46.0}  # y of the path; its x when bouncing up and down
CIRCLE_LANES = {"upper": 26.0, "middle": 32.0, "lower": 38.0}  # y of the centre of a circular path
ORBIT = 14.0  # its radius in pixels
MARGIN = 12.0  # nearest that a centre comes to the edge, unless it passes
LOOP, LEAD = 112.0, 24.0  # a passing object is on a loop of 112 pixels that begins 24 pixels before the edge
QUARTERS = {word: quarter for quarter, word in enumerate(SLOTS["start"])}
WINDOW = 28  # side of the square in which an object is drawn: the largest and its soft edge fit

Prompt = dict[str, str]  # slot -> one of its words; may be partial
Floats = NDArray[np.floating[Any]]


class Random(Protocol):
    """What drawing a scene needs: `random.Random` and `numpy.random.Generator` both have it."""

    def random(self) -> float:
        """A number in [0, 1)."""
        ...


@dataclass(frozen=True, slots=True)
class Scene:
    """One film: eight words that the prompt says, then four things that it does not say.

    mark is a dot at the centre (none, white, black), hue an offset in degrees, size in pixels, tint a factor on the
    background. Raises DataError for a word that the world does not have.
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

    def __post_init__(self) -> None:
        check_words({**self.words, "mark": self.mark})

    @property
    def words(self) -> Prompt:
        """What the prompt says: every slot and its word."""
        return {slot: getattr(self, slot) for slot in SLOTS}

    @classmethod
    def sample(cls, rng: Random, words: Mapping[str, str] | None = None) -> Scene:
        """A scene drawn evenly from all, or from those that show `words`. Uses `rng.random()` alone."""
        drawn = {slot: choices[int(rng.random() * len(choices))] for slot, choices in SLOTS.items()}
        hidden = {
            "mark": MARKS[int(rng.random() * len(MARKS))],
            "hue": (2 * rng.random() - 1) * HUE_SHIFT,
            "size": SIZES[0] + rng.random() * (SIZES[1] - SIZES[0]),
            "tint": TINTS[0] + rng.random() * (TINTS[1] - TINTS[0]),
        }
        return cls(**{**drawn, **(words or {}), **hidden})  # type: ignore[arg-type]


# --- words -----------------------------------------------------------------------------------------------------------

PHRASES = {"side to side": "sideways", "back and forth": "sideways", "to and fro": "sideways", "'s": ""}
PLAIN_WORDS: dict[str, tuple[str, str]] = {  # token -> slot and word, where no context is needed
    **{word: (slot, word) for slot in ("speed", "shape", "lane", "start", "pattern") for word in SLOTS[slot]},
    **dict.fromkeys(("slowly", "gently", "leisurely"), ("speed", "slow")),
    **dict.fromkeys(("quick", "quickly", "rapid", "rapidly", "swift", "swiftly"), ("speed", "fast")),
    **dict.fromkeys(("ball", "disc", "disk", "dot", "circular", "round"), ("shape", "circle")),
    **dict.fromkeys(("box", "block", "cube"), ("shape", "square")),
    **dict.fromkeys(("triangular", "pyramid", "wedge"), ("shape", "triangle")),
    **dict.fromkeys(("top", "high"), ("lane", "upper")),
    **dict.fromkeys(("mid", "center", "centre", "central"), ("lane", "middle")),
    **dict.fromkeys(("bottom", "low"), ("lane", "lower")),
    "1st": ("start", "first"), "2nd": ("start", "second"), "3rd": ("start", "third"),
    **dict.fromkeys(("4th", "last"), ("start", "fourth")),
    **dict.fromkeys(("solid", "flat", "uniform"), ("pattern", "plain")),
    **dict.fromkeys(("stripes", "stripy"), ("pattern", "striped")),
    **dict.fromkeys(("checked", "checks", "chequered", "checkerboard", "chessboard"), ("pattern", "checkered")),
}  # fmt: skip
OBJECT_COLORS = {
    **{word: word for word in SLOTS["color"]},
    **dict.fromkeys(("crimson", "scarlet"), "red"), **dict.fromkeys(("gold", "golden"), "yellow"), "lime": "green",
    **dict.fromkeys(("turquoise", "aqua"), "cyan"), **dict.fromkeys(("pink", "fuchsia"), "magenta"),
}  # fmt: skip
GROUND_COLORS = {**{word: word for word in SLOTS["ground"]}, "violet": "purple", "grey": "gray"}
GROUND_NOUNS = frozenset({"background", "backdrop", "ground", "floor", "wall"})
GROUND_MARKS = GROUND_NOUNS | {"on", "against", "over"}
VERBS = {
    **dict.fromkeys(("bouncing", "bounces", "bounce"), "bouncing"),
    **dict.fromkeys(("passing", "passes", "pass", "crossing", "crosses", "rolling", "rolls"), "passing"),
    **dict.fromkeys(("circling", "circles", "orbiting", "orbits", "revolving", "revolves"), "circling"),
}
DIRECTIONS = {
    **dict.fromkeys(("sideways", "horizontally", "horizontal"), "sideways"),
    **dict.fromkeys(("up", "down", "vertically", "vertical", "upwards", "downwards"), "vertical"),
    **dict.fromkeys(("left", "leftwards"), "left"), **dict.fromkeys(("right", "rightwards"), "right"),
}  # fmt: skip
CARRIERS = (  # words that carry the sentence and say nothing here
    "a an the in of its it is and to from at by near with while that moving moves move going goes through across along "
    "around path quarter lane row edge side starting starts dark bright colored coloured pattern object thing"
)
IGNORED = GROUND_MARKS | frozenset(CARRIERS.split())
BREAKS = frozenset(",.;!?")


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a text says in the words of this world, and what in it was not understood or contradicts an earlier word."""

    words: Prompt
    unknown: tuple[str, ...]


def sentence(words: Mapping[str, str]) -> str:
    """The words in the form that the tiny model is trained on. A missing slot is left out; `parse` is the inverse."""
    thing = [words[slot] for slot in ("speed", "color") if slot in words] + [words.get("shape", "object")]
    lane = f" in the {words['lane']} lane" if "lane" in words else ""
    motion = f", {words['motion']}" if "motion" in words else ""
    start = f"{'' if motion else ','} from the {words['start']} quarter of its path" if "start" in words else ""
    ground = [f"dark {words['ground']}"] if "ground" in words else []
    ground += [words["pattern"]] if "pattern" in words else []
    return f"a {' '.join(thing)}{lane}{motion}{start}" + (f", on a {' '.join(ground)} background" if ground else "")


def parse(text: str) -> Parsed:
    """Read a description in free form: any order, missing pieces, common synonyms, any case and punctuation.

    A colour belongs to the noun that follows it in its clause, so "a green ball on green" has both. Words that carry
    nothing here (articles, "moving", "lane") are passed over; the rest comes back in `unknown`, in order, once each.
    """
    plain = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    for phrase, single in PHRASES.items():
        plain = plain.replace(phrase, single)
    tokens = re.findall(r"[^\W_]+|[,.;!?]", plain)
    words: Prompt = {}
    unknown: dict[str, None] = {}
    motion = _motion(tokens)
    if motion:
        words["motion"] = motion
    for place, token in enumerate(tokens):
        if token in BREAKS or token in IGNORED or token in VERBS or token in DIRECTIONS:
            continue
        slot, word = PLAIN_WORDS.get(token) or _color(tokens, place)
        if not word or words.setdefault(slot, word) != word:
            unknown[token] = None
    return Parsed({slot: words[slot] for slot in SLOTS if slot in words}, tuple(unknown))


def check_words(words: Mapping[str, str]) -> None:
    """Raises DataError for a slot, or a word of it, that this world does not have; it names those it has."""
    for slot, word in words.items():
        known = {**SLOTS, "mark": MARKS}.get(slot, ())
        if word not in known:
            raise DataError(f"the tiny world has no {slot} {word!r}", mend=f"one of: {', '.join(known or SLOTS)}")


def complete(words: Mapping[str, str], key: str) -> Prompt:
    """All eight words: those given, and for each missing slot one picked by a hash of `key` (the prompt, a seed)."""
    return {slot: words.get(slot) or choices[_hash(f"{slot}\n{key}") % len(choices)] for slot, choices in SLOTS.items()}


def vocabulary() -> str:
    """The words of each slot, one slot a line: for help and error messages."""
    return "\n".join(f"{slot}: {', '.join(choices)}" for slot, choices in SLOTS.items())


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _color(tokens: list[str], place: int) -> tuple[str, str]:
    """Slot and word of the colour at `place`; ("", "") when it is no colour that its slot has."""
    token = tokens[place]
    if token not in OBJECT_COLORS and token not in GROUND_COLORS:
        return "", ""
    if _is_ground(tokens, place):
        return "ground", GROUND_COLORS.get(token, "")
    return "color", OBJECT_COLORS.get(token, "")


def _is_ground(tokens: list[str], place: int) -> bool:
    """Whether the colour at `place` is the background's: by the next noun of its clause, else by the one before it."""
    breaks = [i for i, token in enumerate(tokens) if token in BREAKS]
    begin = max((i for i in breaks if i < place), default=-1) + 1
    end = min((i for i in breaks if i > place), default=len(tokens))
    nouns_after = (token for token in tokens[place + 1 : end] if token in GROUND_NOUNS or _is_shape(token))
    marks_before = (token for token in reversed(tokens[begin:place]) if token in GROUND_MARKS or _is_shape(token))
    noun = next(nouns_after, None) or next(marks_before, None)
    return noun in GROUND_MARKS if noun else tokens[place] not in OBJECT_COLORS


def _is_shape(token: str) -> bool:
    return token == "object" or PLAIN_WORDS.get(token, ("", ""))[0] == "shape"


def _motion(tokens: list[str]) -> str:
    """The motion that verbs and directions say together, or ""."""
    verb = next((VERBS[token] for token in tokens if token in VERBS), "")
    ways = [DIRECTIONS[token] for token in tokens if token in DIRECTIONS]
    if verb == "circling":
        return "circling"
    if "vertical" in ways:
        return "bouncing up and down"
    sources = [i for i, token in enumerate(tokens) if token in DIRECTIONS and "from" in tokens[max(i - 2, 0) : i]]
    if verb == "bouncing" or "sideways" in ways or ({"left", "right"} <= set(ways) and not sources):
        return "bouncing sideways"
    if not ways:
        return "passing right" if verb else ""
    turned = {"left": "right", "right": "left"}
    return f"passing {ways[-1] if len(ways) > 1 or not sources else turned[ways[-1]]}"


# --- pictures --------------------------------------------------------------------------------------------------------


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


def render(scene: Scene, frames: int, first: int = 0) -> NDArray[np.uint8]:
    """The film from video frame `first` on, with soft edges: uint8 [frames, 64, 64, 3]."""
    ground = ground_picture(scene.ground, scene.pattern, scene.tint)
    video = np.repeat(np.rint(ground)[None].astype(np.uint8), frames, axis=0)
    x, y = position(scene, np.arange(first, first + frames))
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
