"""One YAML file, read within limits, and the line of every key in it."""

import re
from pathlib import Path
from typing import Any

import yaml

from hforce.errors import ConfigError, DataError
from hforce.textfile import read_text

MOST_BYTES = 1 << 20
DEEPEST = 32
MOST_KEYS = 10_000

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_CLOCK = re.compile(r"[-+]?\d+(?::[0-5]?\d)+(?:\.\d*)?")  # YAML 1.1 reads 1:30 as the number 90


def read_yaml_text(path: Path) -> str:
    """The text of a YAML file, at most 1 MiB of UTF-8. Raises InputError, PermissionDenied or ConfigError."""
    try:
        return read_text(path, MOST_BYTES)
    except DataError as error:
        raise ConfigError(str(error), error.mend) from error


def key_lines(text: str, name: str) -> dict[str, int]:
    """Dotted path -> line, from 1, of every key of the mapping that `text` holds; {} for an empty text.

    Raises ConfigError with `name:line` for a syntax error, a top level that is no mapping, more than 32 levels,
    more than 10,000 keys, or a plain number like 1:30, which YAML would read as 90.
    """
    try:
        _check_events(text, name)
        root = yaml.compose(text, _LOADER)
    except yaml.YAMLError as error:
        raise yaml_error(error, name) from error
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{name}:{root.start_mark.line + 1}: expected 'section:' with keys below it at the top level",
                          "write for example 'video:' and below it, indented, 'fps: 16'")
    lines: dict[str, int] = {}
    _collect(root, "", lines, name)
    return lines


def yaml_error(error: yaml.YAMLError, name: str) -> ConfigError:
    """The same complaint of the YAML reader, in one line with file, line and column."""
    mark = getattr(error, "problem_mark", None)
    place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
    return ConfigError(f"{place}: not valid YAML: {problem}", "check indentation, quotes and tabs near there")


def _check_events(text: str, name: str) -> None:
    depth = 0
    for event in yaml.parse(text, _LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ConfigError(f"{name}:{event.start_mark.line + 1}: nested more than {DEEPEST} levels deep")
        if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and _CLOCK.fullmatch(event.value):
            raise ConfigError(f"{name}:{event.start_mark.line + 1}: YAML would read {event.value} in sixties",
                              f"write the number itself, or quote it: '{event.value}'")


def _collect(node: yaml.MappingNode, prefix: str, lines: dict[str, int], name: str, depth: int = 1) -> None:
    for key, value in node.value:
        path = f"{prefix}{key.value}"
        lines.setdefault(path, key.start_mark.line + 1)
        if len(lines) > MOST_KEYS or depth > DEEPEST:
            raise ConfigError(f"{name}: more than {MOST_KEYS} keys or {DEEPEST} levels", "aliases may not multiply")
        if isinstance(value, yaml.MappingNode):
            _collect(value, f"{path}.", lines, name, depth + 1)
