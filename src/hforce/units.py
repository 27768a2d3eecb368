"""Lengths of time and sizes of pictures, as people write them."""

import math
import re
from dataclasses import dataclass

from hforce.errors import UsageError

LONGEST = 24 * 3600.0  # seconds of one video; a longer one is a slip of the keyboard
LARGEST = 4096  # pixels a side
STEP = 16  # pixels: 8 by the autoencoder, 2 by the patches

_NUMBER = r"\d+(?:\.\d*)?|\.\d+"
_DURATION = re.compile(rf"(?:(?P<h>{_NUMBER})h)?(?:(?P<m>{_NUMBER})m(?:in)?)?(?:(?P<s>{_NUMBER})s)?")
_MOMENT = re.compile(rf"(?P<count>{_NUMBER})(?P<unit>[flc])")
_BYTES = re.compile(rf"(?P<count>{_NUMBER})\s*(?P<unit>[kmgt]i?b)", re.IGNORECASE)
_POWERS = "kmgt"
_SIZE = re.compile(r"(\d{1,9})\s*[x×]\s*(\d{1,9})", re.IGNORECASE)


@dataclass(frozen=True)
class Grid:
    """How a model cuts time: `fps` video frames per second, `stride` video frames per latent frame, `chunk` F."""

    fps: float = 16.0
    stride: int = 4
    chunk: int = 3

    def seconds(self, unit: str) -> float:
        """Length in seconds of one video frame ("f"), latent frame ("l") or chunk ("c")."""
        frames = {"f": 1, "l": self.stride, "c": self.stride * self.chunk}[unit]
        return frames / self.fps


def parse_duration(text: str) -> float:
    """Seconds told by "90s", "1.5m", "2min", "1m30s" or "1h". Raises UsageError without a unit, or out of range."""
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None or not match.group():
        raise UsageError(f"{text[:60]!r} is not a length of time", "write it with a unit: 30s, 1.5m, 1m30s or 1h")
    parts = {unit: float(number) for unit, number in match.groupdict(default="0").items()}
    seconds = 3600 * parts["h"] + 60 * parts["m"] + parts["s"]
    if not 0 < seconds <= LONGEST:
        raise UsageError(f"a length of {text[:60]!r} is out of range", "it must be above 0s and at most 24h")
    return seconds


def parse_moment(text: str, grid: Grid) -> float:
    """Seconds from the start told by "12s", "192f" (video frames), "48l" (latent frames) or "16c" (chunks).

    Raises UsageError when the unit is missing or unknown, or when the moment lies beyond a day.
    """
    text = text.strip().lower()
    match = _MOMENT.fullmatch(text)
    if match is not None:
        seconds = float(match["count"]) * grid.seconds(match["unit"])
    else:
        zero = re.fullmatch(r"0+(?:\.0*)?(?:s|m|min|h)", text)
        seconds = 0.0 if zero else _duration_of_moment(text)
    if not (math.isfinite(seconds) and seconds <= LONGEST):
        raise UsageError(f"the moment {text[:60]!r} lies beyond 24h")
    return seconds


def _duration_of_moment(text: str) -> float:
    try:
        return parse_duration(text)
    except UsageError as error:
        units = "write 12s, 192f (video frames), 48l (latent frames) or 16c (chunks)"
        raise UsageError(f"{text[:60]!r} is not a moment", units) from error


def parse_size(text: str) -> tuple[int, int]:
    """Width and height in pixels told by "832x480". Raises UsageError unless both are multiples of 16 up to 4096."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text[:60]!r} is not a size", "write width x height in pixels, like 832x480")
    width, height = int(match[1]), int(match[2])
    for side in (width, height):
        if side % STEP or not STEP <= side <= LARGEST:
            below = min(max(side // STEP * STEP, STEP), LARGEST)
            near = f"{below} or {below + STEP}" if STEP <= side < LARGEST else f"{below}"
            raise UsageError(f"a side of {side} pixels in {text.strip()[:60]!r} will not do",
                             f"sides are multiples of {STEP} from {STEP} to {LARGEST}; the nearest is {near}")
    return width, height


def parse_bytes(text: str) -> int:
    """Bytes told by "8GiB" (of 2**30) or "8GB" (of 10**9). Raises UsageError without a unit."""
    match = _BYTES.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text[:60]!r} is not an amount of memory", "write it with a unit: 8GiB, 7.5GB or 900MiB")
    unit = match["unit"].lower()
    amount = float(match["count"]) * (1024 if "i" in unit else 1000) ** (1 + _POWERS.index(unit[0]))
    if not math.isfinite(amount):
        raise UsageError(f"{text[:60]!r} is more memory than there can be")
    return int(amount)
