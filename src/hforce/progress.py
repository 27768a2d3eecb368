"""What a person sees while a command works: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from hforce import generate
    from hforce.prompts import Item

LINE_EVERY = 30.0  # seconds between lines where no bar is shown
WIDE, NARROW = 110, 70  # columns of a terminal from which names are shown longer, and below which less is shown
SMOOTHING = 20  # chunks over which speed is averaged


class Counted(Protocol):
    """Progress of something counted: `done` of `total` parts, and what is being done."""

    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def label(self) -> str: ...


class _Display:
    """A bar on a terminal, else lines on standard error; nothing when quiet."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        console = Console(file=sys.stderr)
        is_terminal = sys.stderr.isatty() and not console.is_dumb_terminal
        self._width = console.width
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24 if self._width >= WIDE else 10),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}", markup=False),
        ]
        if self._width >= NARROW:
            columns += [TextColumn("{task.fields[speed]}", markup=False), TimeElapsedColumn()]
            columns += [TextColumn("ETA", markup=False), TimeRemainingColumn()]
        self._bar = Progress(*columns, console=console) if is_terminal and not quiet else None
        self._last_line = time.monotonic()
        self._task: tuple[object, TaskID] | None = None

    def __enter__(self) -> _Display:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def _show(self, key: object, name: str, done: int, total: int, unit: str, speed: str = "") -> None:
        """What is being made now, in the one bar there is: that of what has another key goes."""
        if self._bar:
            if self._task and self._task[0] != key:
                self._bar.remove_task(self._task[1])
                self._task = None
            if not self._task:
                self._task = key, self._bar.add_task(name, total=total, unit=unit, speed=speed)
            self._bar.update(self._task[1], completed=done, total=total, speed=speed)
            return
        now = time.monotonic()
        if not self._quiet and (now - self._last_line >= LINE_EVERY or done == total):
            self._last_line = now
            sys.stderr.write(f"{name}: {done}/{total} {unit} {speed}".rstrip() + "\n")


class VideoProgress(_Display):
    """Progress of `hforce generate`: which of the items, frames, frames per second, time left."""

    def __enter__(self) -> VideoProgress:
        super().__enter__()
        return self

    def __init__(self, quiet: bool, items: Sequence[Item]) -> None:
        super().__init__(quiet)
        self._items = items
        self._recent: deque[tuple[int, float]] = deque(maxlen=SMOOTHING)

    def update(self, progress: generate.Progress) -> None:
        """After every chunk."""
        before = self._recent[-1][0] if self._recent and self._recent[-1][0] < progress.done else 0
        if not before:
            self._recent.clear()
        self._recent.append((progress.done, time.monotonic()))
        (first, start), (last, end) = self._recent[0], self._recent[-1]
        speed = f"{(last - first) / (end - start):.0f} FPS" if end > start else ""
        name, count = progress.job.target.video.stem, len(self._items)
        most = 16 if self._bar and self._width < WIDE else 40
        short = name if len(name) <= most else name[: most - 3] + "..."
        of = f"{self._items.index(progress.job.item) + 1}/{count} " if count > 1 else ""
        self._show(progress.job.target, of + short, progress.done, progress.job.plan.frames, "frames", speed)


class CountProgress(_Display):
    """Progress of `hforce profile` and `hforce bench`: parts done."""

    def __init__(self, name: str, quiet: bool) -> None:
        super().__init__(quiet)
        self._name = name

    def __enter__(self) -> CountProgress:
        super().__enter__()
        return self

    def update(self, progress: Counted) -> None:
        """After every part."""
        self._show(self._name, self._name, progress.done, progress.total, progress.label)


def show_table(table: RenderableType) -> None:
    """A table, or several, on standard output, at least 120 columns wide where nobody set a width."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)
    console.print(table)
