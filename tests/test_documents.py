"""Documents are written all or nothing, and what goes wrong has the right name."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hforce.documents import read_document, write_document
from hforce.errors import DataError, PermissionDenied, WriteError

unprivileged = pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")


@contextmanager
def short_files() -> Iterator[int]:
    """No file may grow past 1000 bytes, as on a full disk; not even the log of the test run."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield 1000
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_document_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_document(path, "old")
    with short_files() as limit, pytest.raises(WriteError, match=r"writing .*a\.json failed"):
        write_document(path, "x" * (limit + 1))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_reading_stops_at_the_limit() -> None:
    with pytest.raises(DataError, match="larger than"):
        read_document("/dev/zero", limit=100)


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf{}")
    assert read_document(tmp_path / "a.json", limit=100) == b"{}"


@unprivileged
def test_what_is_not_ours_is_denied(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "a.json").chmod(0)
    with pytest.raises(PermissionDenied):
        read_document(tmp_path / "a.json", limit=100)
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionDenied):
        write_document(tmp_path / "b.json", "{}")
    tmp_path.chmod(0o700)
