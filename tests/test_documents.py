"""Documents are written all or nothing, and what goes wrong has the right name."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from hforce.documents import check_result, read_document, write_bytes, write_document
from hforce.errors import DataError, OutputError, PermissionDenied, WriteError
from hforce.plots import save_figure

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


def test_a_name_as_long_as_names_can_be_is_written(tmp_path: Path) -> None:
    write_bytes(tmp_path / ("n" * 255), b"here")
    assert [(len(path.name), path.read_bytes()) for path in tmp_path.iterdir()] == [(255, b"here")]


@pytest.mark.parametrize("data", [b"precious", b'{"kind": "other"}', b"\x89PNG\r\n\x1a\nSoftware\0other"])
def test_a_result_replaces_nothing_that_is_not_ours(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(OutputError, match="exists, and is no profile, table or plot of hforce"):
        check_result(tmp_path / "a")


def test_a_result_replaces_results_of_hforce(tmp_path: Path) -> None:
    for number, data in enumerate((b"", b'{\n "kind": "hforce.bench/1"', b'{"kind":"hforce.head-profile"')):
        (tmp_path / f"{number}.json").write_bytes(data)
        check_result(tmp_path / f"{number}.json")
    figure = Figure()
    save_figure(figure, tmp_path / "a.png")
    check_result(tmp_path / "a.png")


def test_a_result_is_no_device_and_no_other_file_of_the_command(tmp_path: Path) -> None:
    for path in (Path(os.devnull), tmp_path):
        with pytest.raises(OutputError, match="something that is no file is there"):
            check_result(path)
    (tmp_path / "there.json").write_text('{"kind": "hforce.head-profile"}')
    (tmp_path / "link.json").symlink_to("there.json")
    check_result(tmp_path / "there.json", ["gone.json"])
    for one, other in (("there.json", "link.json"), ("new.json", "new.json"), ("new.json", "folder/../new.json")):
        with pytest.raises(OutputError, match="is read or written by the same command"):
            check_result(tmp_path / one, [tmp_path / other])


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
