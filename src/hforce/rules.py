"""Rules for one value: functions that return the complaint, or None."""

import difflib
import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

from hforce.errors import UsageError
from hforce.units import LONGEST, parse_bytes, parse_size

Rule = Callable[[Any], str | None]


def nearest(name: str, known: Iterable[str]) -> str:
    """" (did you mean 'video.fps'?)" for the known name most like `name`, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {found[0]!r}?)" if found else ""


def one_of(*known: str, also: str = r"(?!)", shown: str = "") -> Rule:
    """A word out of `known`, or one that the pattern `also` matches whole (and that messages call `shown`)."""
    def check(value: str) -> str | None:
        if value in known or re.fullmatch(also, value):
            return None
        return f"unknown {value[:60]!r}{nearest(value, known)}; known are {', '.join(filter(None, (*known, shown)))}"
    return check


def within(low: float, high: float, unit: str = "") -> Rule:
    """A number from `low` to `high`, both included; NaN is neither."""
    def check(value: float) -> str | None:
        return None if low <= value <= high else f"{value} is outside {low} to {high}{unit}"
    return check


def each(rule: Rule) -> Rule:
    """A list with at least one value, all of which keep `rule`."""
    def check(values: list[Any]) -> str | None:
        complaints = (message for value in values if (message := rule(value)))
        return next(complaints, None) if values else "expected at least one value"
    return check


def falling(least: int) -> Rule:
    """At least `least` timesteps within 1000..0, each lower than the one before."""
    def check(steps: list[int]) -> str | None:
        falls = all(above > below for above, below in pairwise(steps))
        inside = all(0 <= step <= 1000 for step in steps)
        return None if falls and inside and len(steps) >= least else f"{steps} are not timesteps falling within 1000..0"
    return check


def seconds(value: float) -> str | None:
    """A length of video in seconds."""
    return None if 0 < value <= LONGEST else f"{value} is not a number of seconds above 0 and up to 24 h"


def size(value: str) -> str | None:
    """Width x height in pixels, or nothing."""
    try:
        parse_size(value or "16x16")
    except UsageError as error:
        return f"{error}; {error.mend}"
    return None


def amount(value: str) -> str | None:
    """An amount of memory, or nothing."""
    try:
        parse_bytes(value or "1GiB")
    except UsageError as error:
        return f"{error}; {error.mend}"
    return None
