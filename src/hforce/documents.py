"""JSON documents: read within bounds and checked, written all or nothing."""

from __future__ import annotations

import codecs
import errno
import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from hforce.errors import DataError, HforceError, InputError, OutputError, PermissionDenied, WriteError

Document = TypeVar("Document", bound=BaseModel)

FULL = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
)  # the file could be opened, but not written to its end


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
    """Write `text` in UTF-8 so that a reader, or a crash, sees the old file or the new one and nothing between.

    Raises OutputError when the file cannot be created (PermissionDenied when it may not), WriteError when it cannot be
    written to its end.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with draft.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):  # no draft, or no way to it: the caller hears why
            draft.unlink()
        raise _unwritten(path, error) from error


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


def _unwritten(path: Path, error: OSError) -> HforceError:
    reason = error.strerror or str(error)
    if error.errno in FULL:
        return WriteError(f"writing {path} failed: {reason}", mend="free some space, or write elsewhere")
    if isinstance(error, PermissionError):
        return PermissionDenied(f"may not write {path}: {reason}", mend="write to a folder of your own")
    return OutputError(f"cannot create {path}: {reason}", mend="check the path; its folder must exist")
