"""Text files, read within a limit and only as UTF-8."""

from pathlib import Path

from hforce.documents import read_document
from hforce.errors import DataError


def read_text(path: Path | str, limit: int) -> str:
    """The text of a file of at most `limit` bytes, without a byte order mark.

    Raises InputError when it is not there, PermissionDenied when it may not be read, DataError when it is too large or
    not UTF-8.
    """
    return decode_text(read_document(path, limit), str(path))


def decode_text(data: bytes, name: str) -> str:
    """The text in `data`, without a byte order mark. Raises DataError with line and offset of the first bad byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        is_wide = data.startswith((b"\xff\xfe", b"\xfe\xff")) or data[:64].count(0) > len(data[:64]) // 4
        guess = "; it looks like UTF-16" if is_wide else ""
        raise DataError(f"{name}:{line}: not UTF-8: byte {error.start} is 0x{data[error.start]:02x}{guess}",
                        "save the file as UTF-8") from error
