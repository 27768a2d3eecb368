"""ffmpeg as a child process: found, fed, listened to, and its end understood."""

import collections
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import IO

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray

from hforce.errors import FULL, UnavailableError, WriteError

QUEUE = 2  # chunks waiting for the encoder; a third makes the generator wait
LAST_LINES = 20  # of what ffmpeg says
LONGEST_LINE = 500  # bytes
FRAGMENT, HEADER = b"moof", 1 << 14  # name of the box that frames come in, and bytes in which the first one begins
LOWEST_ERRNO_STATUS = 256 - 133  # ffmpeg ends with 256 - errno where the system refused it something
CONTAINERS = "mov,matroska,avi,gif,mpegts,mpeg,flv,asf,ogg"  # no playlists, which name other files, and no text as art
# Pixels become square, within bounds.
SQUARE = "scale=round(iw*min(sar\\,4)):ih:flags=lanczos+accurate_rnd+full_chroma_int+full_chroma_inp,setsar=1"


def find_ffmpeg() -> str:
    """Path of the ffmpeg program. Raises UnavailableError when there is none."""
    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        raise UnavailableError("no ffmpeg was found", "install it, or: pip install --upgrade imageio-ffmpeg") from error


def check_encoder(name: str) -> None:
    """Raises UnavailableError when ffmpeg is missing, does not run, or cannot encode with `name`."""
    with _spawn(["-h", f"encoder={name}"]) as process:
        said, complaints = process.communicate()
    if b"Encoder " + name.encode() not in said:
        reason = _readable(complaints or said) or f"it ended with status {process.returncode}"
        raise UnavailableError(f"{find_ffmpeg()} cannot encode with {name}: {reason}",
                               "unset IMAGEIO_FFMPEG_EXE to use the ffmpeg that comes with imageio-ffmpeg")


def run_ffmpeg(arguments: Sequence[str], purpose: str) -> bytes:
    """Run to the end and return its standard output. Raises WriteError "`purpose` failed: ..." unless it ends well."""
    with _spawn(arguments) as process:
        output, complaints = process.communicate()
    if process.returncode:
        raise _failure(purpose, process.returncode, complaints)
    return output


def count_frames(path: Path) -> int:
    """Decode the whole video and count its frames. Raises WriteError when it cannot be decoded without an error."""
    progress = run_ffmpeg(["-xerror", "-i", str(path), "-map", "0:v:0", "-fps_mode", "passthrough",
                           "-progress", "pipe:1", "-f", "null", os.devnull], f"reading {path}")
    counts = [line.partition(b"=")[2] for line in progress.splitlines() if line.startswith(b"frame=")]
    return int(counts[-1]) if counts else 0


def read_times(path: Path, most_pixels: int, seconds: float) -> list[Fraction]:
    """When every frame of a video begins, in seconds; of a long video only the first `seconds`.

    Everything is decoded. Raises WriteError when that fails, or a frame has more than `most_pixels`.
    """
    told = run_ffmpeg([*_input(path, most_pixels), "-t", str(seconds), "-enc_time_base:v", "demux", "-f", "framecrc",
                       "pipe:1"], f"reading {path}").decode()
    clock = next((Fraction(line.split()[-1]) for line in told.splitlines() if line.startswith("#tb")), Fraction(0))
    return [int(line.split(",")[2]) * clock for line in told.splitlines() if not line.startswith("#")]


def read_video(path: Path, most_pixels: int, frames: int) -> Iterator[NDArray[np.uint8]]:
    """The first `frames` frames of a video, one after the other, uint8 [H, W, 3]. Raises WriteError when it fails."""
    arguments = [*_input(path, most_pixels), "-frames:v", str(frames), "-f", "image2pipe", "-c:v", "ppm", "pipe:1"]
    with tempfile.TemporaryFile() as complaints, _spawn(arguments, stderr=complaints) as process:
        try:
            while (frame := _read_ppm(_open_pipe(process.stdout))) is not None:
                yield frame
            status = process.wait()
        finally:
            process.kill()  # where the caller wants no more
        if status:
            complaints.seek(0)
            raise _failure(f"reading {path}", status, complaints.read())


class Encoder:
    """One ffmpeg process that reads raw frames, fed by a thread with at most two chunks waiting.

    `arguments` are ffmpeg's, `part` is the file they write (for messages), `patience` the seconds that ffmpeg may take
    for one chunk and for its end.
    """

    def __init__(self, arguments: Sequence[str], part: Path, patience: float) -> None:
        self._part, self._patience = part, patience
        self._process = _spawn(arguments, subprocess.DEVNULL)
        self._said: collections.deque[bytes] = collections.deque(maxlen=LAST_LINES)
        self._queue: queue.Queue[bytes | None] = queue.Queue(QUEUE)
        self._failed = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._feed, self._listen)]
        for thread in self._threads:
            thread.start()

    def write(self, data: bytes) -> None:
        """Queue one chunk; waits for room. Raises WriteError when ffmpeg has died or does nothing."""
        if not self._failed.is_set() and not self._put(data):
            self._process.kill()
            raise WriteError(f"ffmpeg has taken nothing for {self._patience:g} seconds", self._way_out())
        if self._failed.is_set():
            raise self._death()

    def close(self, is_clean: bool) -> None:
        """Let ffmpeg finish the file. Raises WriteError when it fails, unless an error is on its way already."""
        told = self._put(None)
        try:
            self._process.wait(self._patience if told else 0)
        except subprocess.TimeoutExpired:
            self._process.kill()
        if not told:
            self._put(None)
        for thread in self._threads:
            thread.join(self._patience)
        if is_clean and (self._process.wait() or self._failed.is_set()):
            raise self._death()

    def _put(self, data: bytes | None) -> bool:
        try:
            self._queue.put(data, timeout=self._patience)
        except queue.Full:
            return False
        return True

    def _feed(self) -> None:
        pipe = _open_pipe(self._process.stdin)
        while (data := self._queue.get()) is not None:
            try:
                if not self._failed.is_set():
                    pipe.write(data)
            except OSError:
                self._failed.set()  # and go on emptying the queue, so that nobody waits for it
        try:
            pipe.close()
        except OSError:
            self._failed.set()

    def _listen(self) -> None:
        with _open_pipe(self._process.stderr) as pipe:
            while line := pipe.readline(LONGEST_LINE):
                if line.strip():
                    self._said.append(line.strip())

    def _death(self) -> WriteError:
        status = self._process.wait()
        self._threads[1].join(self._patience)
        return _failure(f"writing {self._part}", status, b"\n".join(self._said), self._way_out())

    def _way_out(self) -> str:
        return f"what was encoded so far: {self._part}" if holds_frames(self._part) else "nothing was encoded"


def holds_frames(path: Path) -> bool:
    """Whether a fragmented mp4 is there that can be read and holds more than its header."""
    try:
        with path.open("rb") as file:
            return FRAGMENT in file.read(HEADER)
    except OSError:
        return False


def _input(path: Path, most_pixels: int) -> list[str]:
    """Arguments that read the pictures of a file and nothing else: no other file that it may name, and no network."""
    return ["-xerror", "-protocol_whitelist", "file", "-format_whitelist", CONTAINERS, "-max_pixels", str(most_pixels),
            "-i", f"file:{path}", "-map", "0:V:0", "-vf", SQUARE, "-fps_mode", "passthrough", "-pix_fmt", "rgb24"]


def _read_ppm(pipe: IO[bytes]) -> NDArray[np.uint8] | None:
    """The next picture out of a pipe, uint8 [H, W, 3]; None at its end, and where it ends too early."""
    header = [pipe.readline(LONGEST_LINE) for _ in range(3)]  # "P6", "width height", "255"
    if not header[2]:
        return None
    width, height = map(int, header[1].split())
    data = pipe.read(3 * width * height)
    return np.frombuffer(data, np.uint8).reshape(height, width, 3) if len(data) == 3 * width * height else None


def _spawn(
    arguments: Sequence[str], stdout: int = subprocess.PIPE, stderr: int | IO[bytes] = subprocess.PIPE
) -> subprocess.Popen[bytes]:
    program = find_ffmpeg()
    try:
        # A session of its own: Ctrl-C is for hforce, which then lets ffmpeg finish the file.
        return subprocess.Popen([program, "-nostdin", "-hide_banner", "-loglevel", "error", *arguments],
                                stdin=subprocess.PIPE, stdout=stdout, stderr=stderr,
                                start_new_session=True)
    except OSError as error:
        raise UnavailableError(f"cannot run ffmpeg at {program}: {error.strerror}",
                               "unset IMAGEIO_FFMPEG_EXE to use the one that comes with imageio-ffmpeg") from error


def _open_pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None, "the process was started with pipes"
    return pipe


def _failure(purpose: str, status: int, complaints: bytes, mend: str = "") -> WriteError:
    number = 256 - status
    if status < 0:
        reason = f"ffmpeg was ended by {signal.Signals(-status).name}"
    elif status >= LOWEST_ERRNO_STATUS and number in FULL:
        reason = f"ffmpeg ended with status {status} ({os.strerror(number)})"
    else:
        reason = f"ffmpeg ended with status {status}"
    last = _readable(complaints)
    return WriteError(f"{purpose} failed: {reason}" + (f": {last}" if last else ""), mend)


def _readable(said: bytes) -> str:
    """The last line that ffmpeg said, without anything that a terminal would obey."""
    lines = said.decode(errors="replace").strip().splitlines()
    return "".join(char if char.isprintable() else "?" for char in lines[-1][:LONGEST_LINE]) if lines else ""
