"""JSON documents: read within bounds and checked, written all or nothing."""

from __future__ import annotations

import codecs
import hashlib
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from hforce.errors import DataError, HforceError, InputError, OutputError, PermissionDenied, cannot_write

Document = TypeVar("Document", bound=BaseModel)


def read_document(path: str | Path, limit: int) -> bytes:
    """The bytes of a file of at most `limit` bytes, without a byte order mark; never reads more than that.

    Raises InputError when it is not there, PermissionDenied when it may not be read, DataError when it is larger.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise _unread(path, error) from error
    if len(data) > limit:
        raise DataError(f"{path} is larger than the {limit / 2**20:g} MiB such a file may have", mend="check the path")
    return data.removeprefix(codecs.BOM_UTF8)


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, in hex. Raises InputError when it is not there, PermissionDenied when it may not be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unread(path, error) from error


def parse_document(kind: type[Document], data: bytes, name: str | Path, mend: str = "") -> Document:
    """The document in `data`, JSON in UTF-8; `name` and `mend` are for the message.

    Raises DataError with the JSON path of the first fault, and the number of others. Deep nesting is a fault, too.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise DataError(f"{name}: {_first_fault(error)}", mend=mend) from error


def write_document(path: str | Path, text: str) -> None:
    """Write `text` in UTF-8, all or nothing. Raises what `write_bytes` raises."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old one or the new one and nothing between.

    Raises OutputError when the file cannot be created (PermissionDenied when it may not), WriteError when it cannot be
    written to its end.
    """
    path = Path(path)
    draft = path.with_name(f".hforce-{os.getpid()}.part")  # short: the name of `path` may be as long as names can be
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException as error:
        with suppress(OSError):  # no draft, or no way to it: the caller hears why
            draft.unlink()
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise


def check_result(path: str | Path, others: Iterable[str | Path] = ()) -> None:
    """Finds out whether a result may be written: nothing is there, or a result that hforce wrote, JSON or PNG.

    `others` are files that the command reads or writes besides. Raises OutputError where one of them, or something
    that hforce did not write, would be replaced.
    """
    path = Path(path)
    if any(_is_same(path, Path(other)) for other in others):
        raise OutputError(f"{path} is read or written by the same command", "give every file a name of its own")
    if not path.exists():
        return
    if not path.is_file():
        raise OutputError(f"cannot create {path}: something that is no file is there", "give the name of a file")
    if not _is_ours(read_head(path, 4096)):
        raise OutputError(f"{path} exists, and is no profile, table or plot of hforce", "choose another name")


def read_head(path: Path, count: int) -> bytes:
    """The first bytes of a file. Raises PermissionDenied or InputError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise _unread(path, error) from error


def _is_ours(head: bytes) -> bool:
    """Whether a file begins like a document or a picture of hforce."""
    return not head or re.search(rb'"kind"\s*:\s*"hforce\.', head) is not None or b"Software\0hforce" in head


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one is not there yet, or cannot be looked at
        return os.path.abspath(one) == os.path.abspath(other)


def _first_fault(error: ValidationError) -> str:
    faults = error.errors(include_url=False, include_input=False)
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in faults[0]["loc"]).lstrip(".")
    reason = faults[0]["msg"].removeprefix("Value error, ")
    others = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{path[:100]}: {reason}{others}" if path else f"{reason}{others}"


def _unread(path: str | Path, error: OSError) -> HforceError:
    if isinstance(error, PermissionError):
        return PermissionDenied(f"may not read {path}", mend="check who owns the file")
    return InputError(f"cannot read {path}: {error.strerror or error}", mend="check the path")
