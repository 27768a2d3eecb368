"""What a person sees meanwhile: a bar on a terminal, few lines elsewhere, nothing when quiet."""

from __future__ import annotations

import io
import re
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


def on_terminal(
    monkeypatch: pytest.MonkeyPatch, kind: str = "xterm-256color", columns: str = "100"
) -> io.StringIO:
    """Standard error on a terminal."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setenv("COLUMNS", columns)
    return stream


def items(*names: str) -> list[Item]:
    return [Item(name, ()) for name in names]


def video(name: str, done: int, chunks: int = 4) -> Progress:
    path = Path(f"{name}.mp4")
    (item,) = items(name)
    job = Job(item, (), Plan((chunks,), 12 * chunks - 3), 0, Target(path, path, path))
    return Progress(job, done, {})


def test_elsewhere_than_on_a_terminal_only_the_end_is_told(monkeypatch):
    stream = elsewhere(monkeypatch)
    with VideoProgress(quiet=False, items=items("a", "b")) as shown:
        for done in (9, 21, 33, 45):
            shown.update(video("a", done))
            shown.update(video("b", done))
    first, second = stream.getvalue().splitlines()
    assert first.startswith("1/2 a: 45/45 frames")
    assert second.startswith("2/2 b: 45/45 frames")
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
    with VideoProgress(quiet=True, items=items("a")) as shown:
        shown.update(video("a", 9))
        shown.update(video("a", 45))
    assert written.getvalue() == ""


def screen(written: str) -> list[str]:
    """What a person sees at last: lines that were drawn over are gone, and so are colours."""
    lines, at = [""], 0
    for text in re.split(r"(\x1b\[\d*A|\r|\n|\x1b\[2K)", written):
        if up := re.fullmatch(r"\x1b\[(\d*)A", text):
            at -= int(up[1] or 1)
        elif text == "\n":
            at += 1
            lines += [""] * (at + 1 - len(lines))
        elif text in ("\r", "\x1b[2K"):
            lines[at] = ""
        else:
            lines[at] += re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text)
    return [line.rstrip() for line in lines if line.strip()]


@pytest.mark.parametrize("columns", ["80", "120"])
def test_a_terminal_shows_one_bar_with_number_name_count_and_time_left(monkeypatch, columns):
    """However many videos there are, and however their names begin."""
    terminal = on_terminal(monkeypatch, columns=columns)
    names = [f"a slow red circle in the middle lane, number {n}" for n in range(30)]
    with VideoProgress(quiet=False, items=items(*names)) as shown:
        for name in names[:3]:
            for done in (9, 21, 33, 45):
                shown.update(video(name, done))
    seen = screen(terminal.getvalue())
    (line,) = seen
    assert line.startswith("3/30 a slow red ci")
    assert "45/45 frames" in line
    assert " FPS" in line
    assert re.search(r"0:00:00 ETA 0:00:00$", line)
    assert len(line) <= int(columns)


def test_a_narrow_terminal_shows_what_fits(monkeypatch):
    terminal = on_terminal(monkeypatch, columns="48")
    with VideoProgress(quiet=False, items=items("a red circle circling", "b")) as shown:
        shown.update(video("a red circle circling", 33))
    (line,) = screen(terminal.getvalue())
    assert line.startswith("1/2 a red circle") and line.endswith("33/45 frames")


def test_a_name_is_neither_markup_nor_longer_than_it_may_be(monkeypatch):
    terminal = on_terminal(monkeypatch)
    with VideoProgress(quiet=False, items=items("[bold] [red]name")) as shown:
        shown.update(video("[bold] [red]name", 9))
    with VideoProgress(quiet=False, items=items("long " * 20)) as shown:
        shown.update(video("long " * 20, 9))
    assert "[bold] [red]name" in terminal.getvalue()
    assert "long long lon..." in terminal.getvalue()
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
