"""What a person sees meanwhile: a bar on a terminal, few lines elsewhere, nothing when quiet."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.table import Table

from hforce import progress
from hforce.build import Plan
from hforce.generate import Progress
from hforce.progress import CountProgress, VideoProgress, show_table
from hforce.prompts import Item
from hforce.sidecar import Job, Target


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@dataclass(frozen=True)
class Counted:
    """Some parts of a hundred."""

    done: int
    total: int = 100
    label: str = "chunks"


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Standard error that is no terminal."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def on_terminal(monkeypatch: pytest.MonkeyPatch, kind: str = "xterm-256color") -> io.StringIO:
    """Standard error on a terminal of 100 columns."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setenv("COLUMNS", "100")
    return stream


def video(name: str, done: int, chunks: int = 4) -> Progress:
    path = Path(f"{name}.mp4")
    job = Job(Item(name, ()), (), Plan((chunks,), 12 * chunks - 3), 0, Target(path, path, path))
    return Progress(job, done, {})


def test_elsewhere_than_on_a_terminal_only_the_end_is_told(monkeypatch):
    stream = elsewhere(monkeypatch)
    with VideoProgress(quiet=False) as shown:
        for done in (9, 21, 33, 45):
            shown.update(video("a", done))
            shown.update(video("b", done))
    first, second = stream.getvalue().splitlines()
    assert first.startswith("a: 45/45 frames")
    assert second.startswith("b: 45/45 frames")
    assert "\x1b" not in stream.getvalue()


def test_a_long_run_tells_a_line_now_and_then(monkeypatch):
    stream = elsewhere(monkeypatch)
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with CountProgress("profiling", quiet=False) as shown:
        for done in (1, 2, 3):
            shown.update(Counted(done))
    assert stream.getvalue() == "profiling: 1/100 chunks\nprofiling: 2/100 chunks\nprofiling: 3/100 chunks\n"


@pytest.mark.parametrize("where", [elsewhere, on_terminal])
def test_quiet_is_quiet(where, monkeypatch):
    written = where(monkeypatch)
    with VideoProgress(quiet=True) as shown:
        shown.update(video("a", 9))
        shown.update(video("a", 45))
    assert written.getvalue() == ""


def test_a_terminal_shows_a_bar_for_every_video_with_name_count_and_time_left(monkeypatch):
    terminal = on_terminal(monkeypatch)
    with VideoProgress(quiet=False) as shown:
        for name in ("first", "second"):
            for done in (9, 21, 33, 45):
                shown.update(video(name, done))
    last = terminal.getvalue()
    assert "first" in last
    assert "second" in last
    assert "45/45 frames" in last
    assert " FPS" in last
    assert "ETA" in last


def test_a_name_is_neither_markup_nor_longer_than_it_may_be(monkeypatch):
    terminal = on_terminal(monkeypatch)
    with VideoProgress(quiet=False) as shown:
        shown.update(video("a [bold] [red]name", 9))
        shown.update(video("long " * 20, 9))
    assert "[bold] [red]name" in terminal.getvalue()
    assert "long long lo..." in terminal.getvalue()
    assert "long " * 9 not in terminal.getvalue()


def test_a_dumb_terminal_gets_lines(monkeypatch):
    terminal = on_terminal(monkeypatch, "dumb")
    with CountProgress("benchmark", quiet=False) as shown:
        shown.update(Counted(1))
        shown.update(Counted(100))
    assert terminal.getvalue() == "benchmark: 100/100 chunks\n"


def test_the_bar_is_taken_away_after_an_error(monkeypatch):
    terminal = on_terminal(monkeypatch)
    with pytest.raises(KeyError), CountProgress("benchmark", quiet=False) as shown:
        shown.update(Counted(1))
        raise KeyError
    assert terminal.getvalue().endswith(("\x1b[?25h", "\n"))  # the cursor is shown again


def test_a_table_is_not_cut_where_nobody_set_a_width(capsys):
    table = Table("name", *(f"column {i}" for i in range(8)))
    table.add_row("setup", *(f"{i * 1000.5:.1f}" for i in range(8)))
    show_table(table)
    out = capsys.readouterr().out
    assert "column 7" in out
    assert "7003.5" in out
    assert "…" not in out
