"""How a command begins and ends: streams, exit codes, error lines, signals, and text that is safe to print."""

from __future__ import annotations

import codecs
import errno
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer

import hforce
from hforce.errors import (
    FULL,
    SMALLER,
    HforceError,
    InputError,
    InterruptedRun,
    PermissionDenied,
    RoomError,
    UsageError,
    WriteError,
    is_out_of_memory,
)

UNSEEN = "\u202a\u202b\u202d\u202e\u2066\u2067\u2068\u2069"  # turn the direction of what follows
ERRORS = 2  # the number of standard error
GLOBAL = ("-q", "--quiet", "-v", "--verbose", "--debug")  # may stand before or after the command


def say(text: str) -> None:
    """A line for people, on standard error, with control characters made visible."""
    typer.echo("".join(c if c in "\n\t" or _is_harmless(c) else repr(c)[1:-1] for c in text), err=True)


def _is_harmless(char: str) -> bool:
    return char.isprintable() and char not in UNSEEN


def fail(error: HforceError) -> int:
    """Tells of an error and how to mend it -> its exit code."""
    if "--debug" in sys.argv:
        traceback.print_exception(error)
    say(f"hforce: error: {error}")
    if error.mend:
        say(f"  hint: {error.mend}")
    return error.exit_code


def run(app: typer.Typer) -> int:
    """Runs the command line -> exit code. Every expected failure is a line on standard error, never a traceback."""
    everywhere = [a for a in sys.argv[1:] if a in GLOBAL]
    rest = [a for a in sys.argv[1:] if a not in GLOBAL]
    try:
        code = app([*everywhere, *(rest or ["--help"])], prog_name="hforce", standalone_mode=False) or 0
        sys.stdout.flush()
        return code if rest else UsageError.exit_code
    except HforceError as error:
        return fail(error)
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # nobody reads the results any more
            return 141
        raise
    except Exception as error:
        return fail_otherwise(error)


def fail_otherwise(error: Exception) -> int:
    """Exit code of an error that is not hforce's own: of the option parser, for want of memory, or a bug."""
    if hasattr(error, "format_message"):
        command = getattr(getattr(error, "ctx", None), "command_path", "hforce")
        return fail(UsageError(error.format_message(), f"{command} --help"))
    if isinstance(error, OSError) and error.errno in FULL:  # files are written elsewhere: this was standard output
        return fail(WriteError(f"writing to standard output failed: {error.strerror}", "free some space"))
    if isinstance(error, OSError) and isinstance(error.filename, str | bytes):
        path = os.fsdecode(error.filename)
        if isinstance(error, PermissionError):
            return fail(PermissionDenied(f"may not look at {path}", "check who owns it"))
        if error.errno == errno.ENAMETOOLONG:
            return fail(InputError(f"no file can be called {path[:60]}...: {error.strerror}", "check the path"))
    if is_out_of_memory(error):
        return fail(RoomError("out of memory", SMALLER))
    traceback.print_exception(error)
    say(f"hforce: this is a bug of hforce {hforce.__version__}: {type(error).__name__}")
    return HforceError.exit_code


def start(app: typer.Typer) -> None:
    """Runs the command line and leaves with its exit code."""
    _on_signal(signal.SIGTERM, 75)
    _on_signal(signal.SIGINT, 130)
    _open_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        is_utf8 = codecs.lookup(sys.stdout.encoding).name == "utf-8"
        # Paths that are no text come out as they went in; what an old encoding cannot say is told by its number.
        sys.stdout.reconfigure(errors="surrogateescape" if is_utf8 else "backslashreplace")
    try:
        code = run(app)
    finally:
        _let_go()
    sys.exit(code)


class _Messages(io.RawIOBase):
    """Standard error that never fails: nobody loses a video because a message about it cannot be written."""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return ERRORS

    def isatty(self) -> bool:
        return os.isatty(ERRORS)

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        try:
            while left:
                left = left[os.write(ERRORS, left) :]
        except OSError:
            pass  # the disk is full, or nobody reads any more
        return len(data)


def _open_streams() -> None:
    """Gives the process its three streams; those that were closed lead nowhere, or files would take their places."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it takes the lowest number that is free
    sys.stdin = sys.stdin or open(0)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115
    encoding = sys.stderr.encoding if sys.stderr else "utf-8"
    sys.stderr = io.TextIOWrapper(_Messages(), encoding, "backslashreplace", write_through=True)


def _let_go() -> None:
    """Throws away what standard output does not take: Python would try again, and end with a code of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _on_signal(number: int, code: int) -> None:
    """Turns a request to stop into an error, so that files are closed and what was made is kept."""

    def stop(*_: object) -> None:
        raise InterruptedRun(f"stopped by signal {signal.Signals(number).name}", code)

    handler: Callable[..., None] = stop
    signal.signal(number, handler)
