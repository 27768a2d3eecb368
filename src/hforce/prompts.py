"""Prompt files read into shots, and the name of the video of a prompt."""

import hashlib
import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from hforce.errors import DataError, HforceError, UsageError
from hforce.rules import nearest
from hforce.textfile import decode_text, read_text
from hforce.units import Grid, parse_duration, parse_moment

MOST_FILE_BYTES = 256 << 20
MOST_PROMPT_BYTES = 1 << 20
MOST_FAULTS = 20  # told of one file
MOST_STEM_BYTES = 236  # with ".mp4" 240, so that other tools can add a suffix below the 255 of file systems
MOST_SLUG = 80
LARGEST_SEED = 2**63 - 1

_JSON_SUFFIXES = (".jsonl", ".ndjson")
_KEYS = ("prompt", "prompts", "schedule", "name", "seed", "duration", "init_image", "init_video")
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$)(\..*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Shot:
    """A stretch of video under one prompt; `seconds` None: an equal share of what the other shots leave."""

    prompt: str
    seconds: float | None = None


@dataclass(frozen=True)
class Init:
    """What a video starts from: the path of a picture, or of a video to go on from."""

    path: str
    is_video: bool = False


@dataclass(frozen=True)
class Item:
    """One video to make: its shots, and what the file says about it (None where it says nothing)."""

    name: str | None
    shots: tuple[Shot, ...]
    seed: int | None = None
    seconds: float | None = None
    line: int = 1
    init: Init | None = None
    file: str = field(default="", compare=False)  # of which it is a line; "": it was given by itself

    @contextmanager
    def blamed(self, count: int) -> Iterator[None]:
        """Lets errors inside tell where it stands, if it is one of several or a line of a file."""
        try:
            yield
        except HforceError as error:
            if count > 1 or self.file:
                error.say_where(f"{self.file}:{self.line}" if self.file else f"prompt {self.line}")
            raise

    def timed(self, seconds: float) -> tuple[Shot, ...]:
        """The shots with their lengths, when the video has `seconds`. Raises DataError when they do not fit."""
        fixed = sum(shot.seconds for shot in self.shots if shot.seconds is not None)
        free = sum(shot.seconds is None for shot in self.shots)
        left = seconds - fixed
        if left <= 0 if free else abs(left) > 1e-6:
            raise DataError(f"the shots take {fixed:g}s, the video has {seconds:g}s",
                            "make the video longer or the schedule shorter")
        return tuple(shot if shot.seconds is not None else replace(shot, seconds=left / free) for shot in self.shots)


class _Fault(Exception):
    """What is wrong with one line."""


def load_prompts(path: Path | str, grid: Grid = Grid()) -> list[Item]:  # noqa: B008 (frozen)
    """The items of a prompt file, or of standard input for "-".

    `.txt`: one prompt a line. `.jsonl`, or without a suffix what begins with a brace: one object a line with `prompt`,
    `prompts` or `schedule`, and optionally `name`, `seed`, `duration`, and `init_image` or `init_video`; `grid` turns
    moments told in frames or chunks into seconds. Raises InputError for a missing file and DataError for a bad one with
    `file:line` of its first 20 faults.
    """
    name, text = _read(path)
    lines = list(_lines(text))
    is_json = name.lower().endswith(_JSON_SUFFIXES)
    if not is_json and not name.lower().endswith(".txt"):  # as of a pipe: no prompt begins like that
        is_json = bool(lines) and lines[0][1].startswith("{")
    items: list[Item] = []
    faults: list[str] = []
    for number, line in lines:
        try:
            item = _parse_object(line, number, grid) if is_json else _parse_line(line, number)
            items.append(replace(item, file=name))
        except _Fault as fault:
            faults.append(f"{name}:{number}: {fault}")
    faults += [f"{name}:{fault}" for fault in _repeated_names(items)]
    if len(faults) > MOST_FAULTS:
        faults[MOST_FAULTS:] = [f"{name}: and {len(faults) - MOST_FAULTS} more"]
    if faults:
        raise DataError("\n".join(faults), "nothing was generated; mend the lines and start again")
    if not items:
        raise DataError(f"{name}: no prompts in it", "write one prompt a line")
    return items


def file_stem(prompt: str, index: int, taken: set[str]) -> str:
    """File name, without ".mp4", for sample `index` of a prompt: "{prompt}-{index}" where every system allows it.

    Otherwise "{slug}-{hash}-{index}" (letters, digits and hyphens). The name differs from all in `taken` even where
    the file system ignores case and accents' spelling, and is added to it. The exact form is the one that VBench
    looks for; it has no underscore, at which VBench-Long would cut.
    """
    exact = f"{prompt}-{index}"
    stem, attempt = exact, 0
    while _folded(stem) in taken or (attempt == 0 and not _is_legal(prompt, exact)):
        salt = f"#{attempt}" if attempt else ""
        digest = hashlib.sha256(f"{prompt}{salt}".encode("utf-8", "surrogatepass")).hexdigest()[:8]
        stem, attempt = f"{_slug(prompt)}-{digest}-{index}", attempt + 1
    taken.add(_folded(stem))
    return stem


def _read(path: Path | str) -> tuple[str, str]:
    """Name and text of a prompt file, or of standard input."""
    if str(path) == "-":
        data = sys.stdin.buffer.read(MOST_FILE_BYTES + 1)
        if len(data) > MOST_FILE_BYTES:
            raise DataError(f"<stdin>: larger than {MOST_FILE_BYTES >> 20} MiB")
        return "<stdin>", decode_text(data, "<stdin>")
    suffix = Path(path).suffix
    if suffix.lower() not in ("", ".txt", *_JSON_SUFFIXES):
        raise DataError(f"{path}: prompt files end in .txt or .jsonl, not in {suffix[:20]}")
    return str(path), read_text(path, MOST_FILE_BYTES)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # str.splitlines would also split at U+2028, within a prompt, and shift every number after it.
    for number, line in enumerate(text.split("\n"), start=1):
        if stripped := line.strip():
            yield number, stripped


def _parse_line(text: str, number: int) -> Item:
    return Item(name=None, shots=(Shot(_checked(text)),), line=number)


def _checked(prompt: Any, what: str = "prompt") -> str:
    if not isinstance(prompt, str):
        raise _Fault(f"{what}: expected text, got {_shown(prompt)}")
    if "\0" in prompt:
        raise _Fault(f"{what}: NUL character at column {prompt.index(chr(0)) + 1}")
    try:
        size = len(prompt.encode())
    except UnicodeEncodeError:
        raise _Fault(f"{what}: half of a surrogate pair, which is no character") from None
    if size > MOST_PROMPT_BYTES:
        raise _Fault(f"{what}: {size} bytes long, at most {MOST_PROMPT_BYTES} are read")
    if not prompt.strip():
        raise _Fault(f"{what}: empty")
    return prompt.strip()


def _parse_object(text: str, number: int, grid: Grid) -> Item:
    entry = _json(text)
    unknown = [f"unknown key {_shown(key)}{nearest(key, _KEYS)}" for key in entry if key not in _KEYS]
    if unknown:
        raise _Fault("; ".join(unknown))
    forms = [key for key in ("prompt", "prompts", "schedule") if key in entry]
    if len(forms) != 1:
        raise _Fault(f"expected one of prompt, prompts and schedule, got {' and '.join(forms) or 'none'}")
    seconds = _time(entry["duration"], "duration", grid) if "duration" in entry else None
    if forms == ["prompt"]:
        shots: tuple[Shot, ...] = (Shot(_checked(entry["prompt"])),)
    elif forms == ["prompts"]:
        shots = tuple(Shot(_checked(prompt, f"prompts[{i}]")) for i, prompt in enumerate(_list(entry, "prompts")))
    else:
        shots = _schedule(_list(entry, "schedule"), seconds, grid)
    return Item(_name(entry.get("name")), shots, _seed(entry.get("seed")), seconds, number, _init(entry))


def _json(text: str) -> dict[str, Any]:
    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(found)) < len(found):
            raise ValueError("the same key twice")
        return dict(found)

    try:
        entry = json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise _Fault(f"not JSON: {error.msg} at column {error.colno}: {_shown(text)}") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise _Fault(f"not JSON: {reason}: {_shown(text)}") from None
    if not isinstance(entry, dict):
        raise _Fault(f"expected an object in braces, got {_shown(entry)}")
    return entry


def _list(entry: dict[str, Any], key: str) -> list[Any]:
    found = entry[key]
    if not isinstance(found, list) or not found:
        raise _Fault(f"{key}: expected a list with at least one entry, got {_shown(found)}")
    return found


def _schedule(points: list[Any], end: float | None, grid: Grid) -> tuple[Shot, ...]:
    starts, prompts = [], []
    for i, point in enumerate(points):
        if not isinstance(point, dict) or set(point) != {"at", "prompt"}:
            raise _Fault(f"schedule[{i}]: expected an object with exactly at and prompt, got {_shown(point)}")
        starts.append(_time(point["at"], f"schedule[{i}].at", grid))
        prompts.append(_checked(point["prompt"], f"schedule[{i}].prompt"))
    if starts[0] != 0:
        raise _Fault(f"schedule[0].at: the first shot starts at 0s, not at {starts[0]:g}s")
    chunk = grid.seconds("c")
    for i, (before, start) in enumerate(pairwise(starts), start=1):
        if start <= before:
            raise _Fault(f"schedule[{i}].at: {start:g}s is not after {before:g}s")
        if round(start / chunk) == round(before / chunk):
            raise _Fault(f"schedule[{i}].at: {start:g}s is in the same chunk as {before:g}s; chunks last {chunk:g}s")
    if end is not None and round(starts[-1] / chunk) >= round(end / chunk):
        raise _Fault(f"schedule[{len(starts) - 1}].at: {starts[-1]:g}s is not before the end at {end:g}s")
    ends = [*starts[1:], end]
    return tuple(Shot(prompt, None if end is None else end - start)
                 for prompt, start, end in zip(prompts, starts, ends, strict=True))


def _time(value: Any, what: str, grid: Grid) -> float:
    if not isinstance(value, str):
        raise _Fault(f'{what}: expected text such as "10s", got {_shown(value)}')
    try:
        return parse_duration(value) if what == "duration" else parse_moment(value, grid)
    except UsageError as error:
        raise _Fault(f"{what}: {error}" + (f"; {error.mend}" if error.mend else "")) from None


def _seed(value: Any) -> int | None:
    if value is not None and (type(value) is not int or not 0 <= value <= LARGEST_SEED):
        raise _Fault(f"seed: expected a whole number from 0 to 2^63 - 1, got {_shown(value)}")
    return value


def _init(entry: dict[str, Any]) -> Init | None:
    given = [key for key in ("init_image", "init_video") if key in entry]
    if len(given) > 1:
        raise _Fault("init_image and init_video exclude each other")
    return Init(_checked(entry[given[0]], given[0]), given == ["init_video"]) if given else None


def _name(value: Any) -> str | None:
    if value is None:
        return None
    name = _checked(value, "name")
    if not _is_legal(name, name):
        raise _Fault(f"name: {_shown(name)} is not a file name everywhere; use letters, digits and hyphens")
    return name


def _repeated_names(items: Iterable[Item]) -> Iterator[str]:
    seen: dict[str, int] = {}
    for item in items:
        if item.name is not None and (first := seen.setdefault(_folded(item.name), item.line)) != item.line:
            yield f"{item.line}: name {_shown(item.name)} is taken by line {first}"


def _shown(value: Any) -> str:
    """At most 60 characters of a value, without anything that a terminal would obey."""
    return ascii(value if isinstance(value, str) else json.dumps(value, ensure_ascii=True))[:62]


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _is_legal(prompt: str, stem: str) -> bool:
    """Whether Linux, macOS, Windows and VBench all take the name."""
    if any(unicodedata.category(char)[0] == "C" or char in '/\\<>:"|?*_\u2028\u2029' for char in stem):
        return False
    shape = not (prompt.startswith((".", "~", "-", " ")) or prompt.endswith((".", " ")) or "-Scene" in stem)
    return bool(prompt) and shape and not _RESERVED.fullmatch(prompt) and len(stem.encode()) <= MOST_STEM_BYTES


def _slug(prompt: str) -> str:
    plain = unicodedata.normalize("NFKD", prompt[:1000]).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:MOST_SLUG].strip("-") or "prompt"
