"""What can go wrong, for whom, and with which exit code."""

import errno
from pathlib import Path

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


class WriteError(HforceError):
    """A write that failed on the way: the disk is full, the encoder died, or the check after writing failed."""

    exit_code = 74


class InterruptedRun(HforceError):
    """A request to stop, by a signal: what was made until then is kept. `exit_code` depends on who asked."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message, "run the same command again")
        self.exit_code = exit_code


def cannot_write(path: Path | str, error: OSError) -> HforceError:
    """What an OSError met while creating or writing `path` means: WriteError, PermissionDenied or OutputError."""
    reason = error.strerror or str(error)
    if error.errno in FULL:
        return WriteError(f"writing {path} failed: {reason}", "free some space, or write elsewhere")
    if isinstance(error, PermissionError):
        return PermissionDenied(f"may not write {path}: {reason}", "write to a folder of your own")
    return OutputError(f"cannot create {path}: {reason}", "check the path")
