"""Words <-> prompt: what a description says in the words of the world, and which combinations training never shows.

Eight words say what a scene shows (`SLOTS`). `sentence` puts them in the form that the tiny model is trained on,
`parse` reads free text, `complete` fills what a text leaves out. One combination in nine of colour, shape, ground and
pattern is held out of training (`held_out`).
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from hforce.errors import DataError

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

LOOKS = ("color", "shape", "ground", "pattern")  # the slots whose combinations may be held out of training

Prompt = dict[str, str]  # slot -> one of its words; may be partial

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
    """What a text says in the words of this world, what was not understood, and what contradicts an earlier word."""

    words: Prompt
    unknown: tuple[str, ...]
    surplus: tuple[str, ...] = ()


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
    nothing here (articles, "moving", "lane") are passed over; the rest comes back in `unknown`, and what contradicts an
    earlier word in `surplus`, in order, once each.
    """
    plain = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    for phrase, single in PHRASES.items():
        plain = plain.replace(phrase, single)
    tokens = re.findall(r"[^\W_]+|[,.;!?]", plain)
    words: Prompt = {}
    unknown: dict[str, None] = {}
    surplus: dict[str, None] = {}
    motion = _motion(tokens)
    if motion:
        words["motion"] = motion
    for place, token in enumerate(tokens):
        if token in BREAKS or token in IGNORED or token in VERBS or token in DIRECTIONS:
            continue
        slot, word = PLAIN_WORDS.get(token) or _color(tokens, place)
        if not word:
            unknown[token] = None
        elif words.setdefault(slot, word) != word:
            surplus[token] = None
    return Parsed({slot: words[slot] for slot in SLOTS if slot in words}, tuple(unknown), tuple(surplus))


def check_words(words: Mapping[str, str], known: Mapping[str, tuple[str, ...]] = SLOTS) -> None:
    """Raises DataError for a slot, or a word of it, that is not known; it names those that are."""
    for slot, word in words.items():
        choices = known.get(slot, ())
        if word not in choices:
            raise DataError(f"the tiny world has no {slot} {word!r}", mend=f"one of: {', '.join(choices or known)}")


def held_out(words: Mapping[str, str]) -> bool:
    """Whether training never shows this combination of colour, shape, ground and pattern; the other slots do not count.

    30 of the 270 are held out: of every single word one in nine, and of any two words at most two in fifteen.
    """
    color, shape, ground, pattern = (SLOTS[slot].index(words[slot]) for slot in LOOKS)
    return (color + shape + pattern) % 3 == 0 and (color // 3 + shape + ground + 2 * pattern) % 3 == 0


def looks(given: Mapping[str, str], held: bool | None = None) -> list[Prompt]:
    """Every combination of colour, shape, ground and pattern that has the given words.

    held=False leaves out those that are held out of training, held=True all others. Raises DataError where none is
    left.
    """
    choices = [(given[slot],) if slot in given else SLOTS[slot] for slot in LOOKS]
    found = [dict(zip(LOOKS, words, strict=True)) for words in product(*choices)]
    found = [words for words in found if held in (None, held_out(words))]
    if not found:
        told = ", ".join(given[slot] for slot in LOOKS if slot in given)
        raise DataError(f"{told}: every such combination is {'seen in' if held else 'held out of'} training")
    return found


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
