"""What can go wrong, for whom, and with which exit code."""

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SMALLER = "make the video smaller (--size), or let heads remember less: another --policy, as hf-10"
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})  # met while writing a file that could be opened


class HforceError(Exception):
    """An expected failure, told in one or two sentences.

    `str(error)` says what was got and what was expected, `mend` how to go on (may be empty),
    `exit_code` what the command line returns (BSD sysexits where one fits).
    """

    exit_code = 70

    def __init__(self, message: str, mend: str = "") -> None:
        super().__init__(message)
        self.mend = mend

    def say_where(self, where: str) -> None:
        """Begins the message with where it happened."""
        self.args = (f"{where}: {self}",)


class UsageError(HforceError):
    """A command line that cannot be meant: a bad value, or options that exclude each other."""

    exit_code = 2


class ConfigError(HforceError):
    """A configuration with an unknown key, a bad value, or values that do not fit together."""

    exit_code = 78


class DataError(HforceError):
    """An input file that was found but cannot be used: malformed, corrupt, or of the wrong kind."""

    exit_code = 65


class CheckpointError(DataError):
    """Weights that are damaged, unsafe to load, or of another model."""


class InputError(HforceError):
    """An input file that is not there, or is a folder."""

    exit_code = 66


class UnavailableError(HforceError):
    """Something this machine lacks: a device, a program, an optional package, the network."""

    exit_code = 69


class BackendError(UnavailableError):
    """An attention backend that cannot run here."""


class RoomError(HforceError):
    """A run that needs more memory than there is."""

    exit_code = 71


class OutputError(HforceError):
    """An output that cannot be created where it was asked for."""

    exit_code = 73


class PermissionDenied(OutputError):
    """A file or folder that the user may not read or write."""

    exit_code = 77


class TakenError(OutputError):
    """A video that another process is making, or has made meanwhile."""


class WriteError(HforceError):
    """A write that failed on the way: the disk is full, the encoder died, or the check after writing failed."""

    exit_code = 74


class InterruptedRun(HforceError):
    """A request to stop, by a signal: what was made until then is kept. `exit_code` depends on who asked."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message, "run the same command again")
        self.exit_code = exit_code

    def say_where(self, where: str) -> None:
        """Does nothing: where the request came from has nothing to do with what was being done."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is Python's, PyTorch's or a driver's way to say that there is no memory left."""
    if not isinstance(error, RuntimeError):
        return isinstance(error, MemoryError)
    return any(words in str(error).lower() for words in ("can't allocate memory", "out of memory", "alloc_failed"))


@contextmanager
def memory_for(stage: str, mend: str = SMALLER) -> Iterator[None]:
    """Turns a lack of memory inside into a RoomError that names the stage, and lets go of what was being made."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors that did not fit
        raise RoomError(f"out of memory while {stage}", mend) from error


def cannot_write(path: Path | str, error: OSError) -> HforceError:
    """What an OSError met while creating or writing `path` means: WriteError, PermissionDenied or OutputError."""
    reason = error.strerror or str(error)
    if error.errno in FULL:
        return WriteError(f"writing {path} failed: {reason}", "free some space, or write elsewhere")
    if isinstance(error, PermissionError):
        return PermissionDenied(f"may not write {path}: {reason}", "write to a folder of your own")
    return OutputError(f"cannot create {path}: {reason}", "check the path")
