"""Video files: written while they are made, checked, and only then given their name."""

import contextlib
import errno
import io
import os
import stat
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from hforce.errors import OutputError, TakenError, WriteError, cannot_write
from hforce.ffmpeg import Encoder, check_encoder, count_frames, holds_frames, run_ffmpeg

Frames = NDArray[np.uint8]

KEYFRAME_SECONDS = 3  # a killed run loses at most about this much
GAP, LABEL = 6, 14  # pixels between the pictures of a contact sheet, and of the letters below them
LARGEST_SIDE = 16384  # pixels, of x264
TICKS = 1024  # of one frame, so that every frame is equally long
BIT_EXACT = ("-map_metadata", "-1", "-fflags", "+bitexact", "-flags:v", "+bitexact")
# The matrix of the conversion and the tags that tell of it; players otherwise guess, and are off by up to 40 of 255.
BT709 = ("scale=out_color_matrix=bt709:out_range=tv,"
         "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv")


class VideoSink(Protocol):
    """Where video frames go; a context manager, on whose clean end the video is complete."""

    frames: int

    def __enter__(self) -> "VideoSink": ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None: ...
    def write(self, frames: Any) -> None:
        """Take frames uint8 [T, H, W, 3], a numpy array or a tensor on the CPU."""


class NullSink:
    """A sink that counts frames and keeps none."""

    def __init__(self) -> None:
        self.frames = 0

    def __enter__(self) -> "NullSink":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        return None

    def write(self, frames: Any) -> None:
        """Count frames [T, H, W, 3]."""
        self.frames += len(frames)


class FfmpegSink:
    """An H.264 mp4 file, BT.709, byte for byte the same each time.

    Frames go to ffmpeg in a thread of their own, into a fragmented mp4 (`part_path`) that plays even after a crash.
    On a clean end it is remuxed with its index in front, decoded and counted, shown to `certify`, and moved to `path`:
    what `certify` writes is on the disk before the video appears. On any error what was encoded stays in the part
    file; `kept` names it, or the one of an earlier run if that is longer, which stays until a video is finished.
    Raises UnavailableError without ffmpeg; OutputError where nothing can be created, its child TakenError where another
    process is writing the same video or, unless it `replaces`, where one is there; WriteError when ffmpeg fails, stalls
    or the count is wrong.
    """

    patience = 120.0  # seconds that ffmpeg may take for one chunk, and for its end

    def __init__(self, path: Path | str, size: tuple[int, int], fps: int = 16, crf: int = 18, preset: str = "medium",
                 expected: int | None = None, replaces: bool = True,
                 certify: Callable[[Path], None] | None = None) -> None:
        check_size(size)
        self.path = Path(os.path.abspath(path))
        self.part = part_path(self.path)
        _, self.before = unfinished(self.path)
        self.replaces, self.certify = replaces, certify
        self.size, self.fps, self.crf, self.preset, self.expected = size, fps, crf, preset, expected
        self._clock = ("-video_track_timescale", str(TICKS * fps))
        self.frames = 0
        self.kept: Path | None = None

    def __enter__(self) -> "FfmpegSink":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.part.parent.mkdir(parents=True, exist_ok=True)
            if self.part.is_symlink():
                self.part.unlink()  # never through a link that somebody left there
            old = self._claim()
            if _worth(self.part) > _worth(self.before):
                os.replace(self.part, self.before)
                self._claimed = self._claim()
                old.close()
            else:
                self._claimed = old
        except OSError as error:
            raise cannot_write(self.part, error) from error
        try:
            if self.path.exists() and not self.replaces:
                raise TakenError(f"{self.path} was made meanwhile", "choose another output")
            self._encoder = Encoder(self._arguments(), self.part, self.patience)
        except BaseException:
            self._let_go()
            raise
        return self

    def write(self, frames: Any) -> None:
        """Take frames uint8 [T, H, W, 3], a numpy array or a tensor on the CPU; waits while two chunks are queued."""
        array = np.asarray(frames)
        width, height = self.size
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != (height, width, 3):
            raise ValueError(f"expected uint8 [T, {height}, {width}, 3], got {array.dtype} {list(array.shape)}")
        self._encoder.write(array.tobytes())
        self.frames += len(array)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            self._encoder.close(is_clean=kind is None)
            if kind is None:
                self._publish()
        finally:
            self._let_go()

    def _claim(self) -> IO[bytes]:
        """The part file, opened and locked: nobody else writes this video until it is closed.

        Where the system or the file system has no such locks, nothing is held.
        """
        file = self.part.open("ab")
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise TakenError(f"another hforce is making {self.path}", "wait, or choose another output") from None
        except (ImportError, OSError):
            file.close()
            return file
        if not self._is_here(file):
            file.close()  # whoever held it has finished meanwhile
            raise TakenError(f"another hforce has just made {self.path}", "choose another output")
        return file

    def _let_go(self) -> None:
        """Closes the part file, removes it where no frame is in it, and tells which one is worth keeping."""
        longest = max(self.part, self.before, key=_worth)
        self.kept = longest if _worth(longest) else None
        if not _worth(self.part) and self._is_here(self._claimed):
            _discard(self.part)
        self._claimed.close()

    def _is_here(self, file: IO[bytes]) -> bool:
        """Whether the part file is still the one that was claimed, and not of somebody who came later."""
        return file.closed or (self.part.exists() and os.path.samestat(os.fstat(file.fileno()), self.part.stat()))

    def _arguments(self) -> list[str]:
        width, height = self.size
        return [
            "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(self.fps), "-i", "pipe:0",
            "-an", "-vf", BT709, "-c:v", "libx264", "-pix_fmt", "yuv420p",
            "-crf", str(self.crf), "-preset", self.preset, "-bf", "0", "-g", str(KEYFRAME_SECONDS * self.fps),
            "-threads", "1", *BIT_EXACT, *self._clock,
            "-movflags", "+frag_keyframe+empty_moov+default_base_moof", "-f", "mp4", str(self.part),
        ]

    def _publish(self) -> None:
        if self.expected not in (None, self.frames):
            raise WriteError(f"{self.frames} frames were made, {self.expected} expected", f"they are in {self.part}")
        whole = self.part.with_name(self.part.name.removesuffix(".part.mp4") + ".whole.mp4")
        try:
            whole.unlink(missing_ok=True)
            run_ffmpeg(["-i", str(self.part), "-map", "0:v:0", "-c", "copy", *BIT_EXACT, *self._clock,
                        "-movflags", "+faststart", "-f", "mp4", str(whole)], f"finishing {self.path}")
            found = count_frames(whole)
            if found != self.frames:
                raise WriteError(f"{self.path.name} holds {found} frames, {self.frames} were written",
                                 f"the file was not published; what there is: {self.part}")
            _sync(whole)
            if self.certify:
                self.certify(whole)
            os.replace(whole, self.path)
            with contextlib.suppress(OSError):  # not every system can do this to a folder
                _sync(self.path.parent, os.O_RDONLY)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        finally:
            _discard(whole)
        _discard(self.part)
        _discard(self.before)


def _worth(path: Path) -> int:
    """Bytes of an unfinished video, 0 where there is none, or no frame in it."""
    return path.stat().st_size if holds_frames(path) else 0


def is_taken(path: Path) -> bool:
    """Whether another process is making this video now, as far as the file system has locks."""
    try:
        import fcntl

        with part_path(path).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):
        pass
    return False


def check_size(size: tuple[int, int]) -> None:
    """Raises OutputError for a width and height that H.264 cannot have."""
    if size[0] % 2 or size[1] % 2:
        raise OutputError(f"cannot encode {size[0]}x{size[1]}: H.264 needs an even width and height")
    if max(size) > LARGEST_SIDE:
        message = f"cannot encode {size[0]}x{size[1]}: H.264 has at most {LARGEST_SIDE} pixels a side"
        raise OutputError(message, "choose a smaller --size or --upscale")


def part_path(path: Path) -> Path:
    """Where the unfinished video lies: `work` beside a folder called `videos`, else a hidden file beside `path`."""
    if path.parent.name == "videos":
        return path.parent.parent / "work" / f"{path.stem}.part.mp4"
    return path.with_name(f".{path.stem}.part.mp4")


def unfinished(path: Path) -> tuple[Path, Path]:
    """Where the unfinished video lies, and one that an earlier run left there."""
    part = part_path(path)
    return part, part.with_name(part.name.removesuffix(".part.mp4") + ".before.mp4")


def preflight(*paths: Path | str) -> None:
    """Find out in a moment whether videos, and what belongs to them, can be written, before a model is loaded.

    Creates the folders. Raises UnavailableError without an ffmpeg that has libx264, and what `check_place` raises.
    """
    check_encoder("libx264")
    check_place(*paths)


def check_place(*paths: Path | str) -> None:
    """Create the folders of files to be written. Raises OutputError or its child where one cannot be created."""
    wanted = [Path(os.path.abspath(path)) for path in paths]
    for path in wanted:
        _check_kind(path)
    videos = [path for path in wanted if path.suffix.lower() == ".mp4"]
    for folder in dict.fromkeys([path.parent for path in (*wanted, *map(part_path, videos))]):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise cannot_write(folder, error) from error


def _check_kind(path: Path) -> None:
    """Raises OutputError or its child where something that is no file is in the way, or no file can have this name."""
    try:
        kind = path.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise cannot_write(path, error) from error
    if not stat.S_ISREG(kind):
        what = "it is a folder" if stat.S_ISDIR(kind) else "something that is no file is there"
        raise OutputError(f"cannot create {path}: {what}", "give the name of a file, or another name")


def check_reach(path: Path | str) -> None:
    """As `check_place`, as far as that can be told without creating anything."""
    path = Path(os.path.abspath(path))
    _check_kind(path)
    folder = next(folder for folder in path.parents if folder.exists())
    if not os.access(folder, os.W_OK | os.X_OK):
        raise cannot_write(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def upscale(frames: Any, factor: int) -> Frames:
    """Frames uint8 [T, H, W, 3] enlarged without smoothing -> [T, factor H, factor W, 3]."""
    array: Frames = np.asarray(frames)
    return array if factor == 1 else array.repeat(factor, axis=1).repeat(factor, axis=2)


def contact_sheet(frames: Sequence[tuple[float, Frames]], columns: int) -> bytes:
    """A PNG with pictures in rows of `columns`, each with its time: (seconds, uint8 [H, W, 3]), all of one size."""
    height, width = frames[0][1].shape[:2]
    font = ImageFont.load_default(LABEL)
    rows = -(-len(frames) // columns)
    size = (columns * (width + GAP) + GAP, rows * (height + LABEL + 2 * GAP) + GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, (seconds, frame) in enumerate(frames):
        left = GAP + number % columns * (width + GAP)
        top = GAP + number // columns * (height + LABEL + 2 * GAP)
        sheet.paste(Image.fromarray(np.ascontiguousarray(frame)), (left, top))
        draw.text((left, top + height + GAP // 2), f"{seconds:.1f} s", fill="black", font=font)
    png = io.BytesIO()
    sheet.save(png, format="PNG")
    return png.getvalue()


def _discard(path: Path) -> None:
    with contextlib.suppress(OSError):  # another error is told, or the video is complete already
        path.unlink(missing_ok=True)


def _sync(path: Path, flags: int = os.O_RDWR) -> None:
    """Have the system put a file on the disk, or the names in a folder."""
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
