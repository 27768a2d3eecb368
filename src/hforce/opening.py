"""What a video starts from: a picture or another video, read within bounds and fitted to a size and a rate."""

from __future__ import annotations

import logging
import os
import struct
import warnings
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from hforce.documents import file_digest
from hforce.errors import DataError, InputError, OutputError, WriteError
from hforce.ffmpeg import read_times, read_video
from hforce.prompts import Init

log = logging.getLogger(__name__)

Frames = NDArray[np.uint8]
Times = Sequence[Fraction]

PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MOST_PIXELS = 1 << 26  # of a picture, or of one in a video; 8192 x 8192 take 200 MB
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, KeyError, struct.error, zlib.error)
MARGIN = 1.0  # seconds that are read beyond what there is room for, to know that it is too much


@dataclass(frozen=True)
class Opening:
    """A file that a video starts from: `picks` are the numbers of its frames that are shown, one per video frame."""

    init: Init
    sha256: str
    picks: tuple[int, ...] = (0,)


def examine(init: Init, fps: int, seconds: float) -> Opening:
    """Finds out whether a file can be read to its end, and which of its frames are wanted at `fps`.

    Of a video no more than `seconds` and a little are looked at. Raises InputError when the file is not there,
    PermissionDenied when it may not be read, DataError when it is no whole picture or video, or has too many pixels.
    """
    path = Path(init.path)
    if os.path.exists(path) and not os.path.isfile(path):  # noqa: PTH110, PTH113 (Path fails for what is too long)
        raise InputError(f"{path} is no file", "give a picture or a video")
    digest = file_digest(path)
    if not init.is_video:
        load_picture(path)
        return Opening(init, digest)
    with _video_faults(path):
        times = read_times(path, MOST_PIXELS, seconds + MARGIN)
    if not times:
        raise DataError(f"{path} holds no video frame", "give another video")
    picks = pick(times, fps)
    if picks != (*range(len(times)),):
        log.warning("%s: its %d frames are shown as %d, at %d a second", path, len(times), len(picks), fps)
    return Opening(init, digest, picks)


def read_opening(opening: Opening, size: tuple[int, int]) -> Frames:
    """The frames uint8 [T, H, W, 3] of an examined file, for a size (W, H) in pixels.

    They are cropped about their middle to the shape of the size, then resized; the log says so. Raises DataError when
    the file is not what it was when it was examined.
    """
    path = Path(opening.init.path)
    if file_digest(path) != opening.sha256:
        raise DataError(f"{path} has changed since it was first read", "start again")
    if not opening.init.is_video:
        picture = load_picture(path)
        _tell_fit(path, picture.size, size)
        return np.stack([fit(picture, size)])
    wanted = iter(opening.picks)
    due, shown = next(wanted, None), []
    with _video_faults(path):
        for number, frame in enumerate(read_video(path, MOST_PIXELS, opening.picks[-1] + 1)):
            if not number:
                _tell_fit(path, frame.shape[1::-1], size)
            while due == number:
                shown.append(fit(Image.fromarray(frame), size))
                due = next(wanted, None)
    if len(shown) != len(opening.picks):
        raise DataError(f"{path} has changed since it was first read", "start again")
    return np.stack(shown)


def check_kept(openings: Iterable[Opening], written: Iterable[Path]) -> None:
    """Raises OutputError where a file that a video starts from would be written over."""
    paths = {opening.init.path for opening in openings}
    sources = {(found.st_dev, found.st_ino) for found in map(os.stat, paths)}  # whatever they are called
    for path in written if sources else ():
        if path.exists() and (path.stat().st_dev, path.stat().st_ino) in sources:
            raise OutputError(f"{path} would be written over, and a video starts from it", "choose another output")


def load_picture(path: Path) -> Image.Image:
    """A picture as RGB, upright, what is transparent on black. Of an animation the first picture is taken.

    Raises DataError when it cannot be read to its end, or has too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are looked at here, and of oddities in metadata
            with Image.open(path, formats=PICTURES) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise _too_large(path, f"{image.width}x{image.height}")
                if getattr(image, "is_animated", False):
                    log.warning("%s is an animation: only its first picture is taken (--init-video takes all)", path)
                return opaque(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise _too_large(path, "a huge number of") from error
    except DAMAGE as error:
        reason = "it is none of " + ", ".join(PICTURES) if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{path} is no picture that can be read: {reason}", "give another, or save it again") from error


def opaque(image: Image.Image) -> Image.Image:
    """Any picture as RGB, laid on black where it is transparent."""
    if image.mode.startswith("I"):  # 16 bits of grey; Pillow would cut off what is above 255
        return Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    colours = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "black"), colours).convert("RGB")


def fit(picture: Image.Image, size: tuple[int, int]) -> Frames:
    """A picture, cropped about its middle to the shape of size (W, H) and resized to it -> uint8 [H, W, 3].

    What was enlarged by a whole number, as videos of small models are, becomes exactly what it was.
    """
    box = crop_box(picture.size, size)
    scale = (box[2] - box[0]) / size[0]
    is_whole = scale.is_integer() and box[3] - box[1] == scale * size[1]
    sampling = Image.Resampling.BOX if is_whole else Image.Resampling.LANCZOS
    return np.asarray(picture.resize(size, sampling, box=box))


def crop_box(have: tuple[int, int], want: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the largest part in the middle of `have` that is shaped like `want`."""
    scale = min(side / wanted for side, wanted in zip(have, want, strict=True))
    width, height = (min(side, scale * wanted) for side, wanted in zip(have, want, strict=True))
    left, top = (have[0] - width) // 2, (have[1] - height) // 2
    return left, top, left + width, top + height


def pick(times: Times, fps: int) -> tuple[int, ...]:
    """Which frame is nearest to every tick of `fps`, the earlier of two. `times`: when each begins, in seconds.

    The last frame lasts as long as the one before it, for not every file says how long.
    """
    begins = [time - times[0] for time in times]
    count = max(1, round((2 * begins[-1] - begins[-2]) * fps)) if len(begins) > 1 else 1
    middles = [(before + after) / 2 for before, after in pairwise(begins)]
    return tuple(bisect_left(middles, Fraction(n, fps)) for n in range(count))


def _tell_fit(path: Path, have: tuple[int, int], want: tuple[int, int]) -> None:
    left, top, right, bottom = crop_box(have, want)
    if have == want:
        return
    width, height = round(right - left), round(bottom - top)
    cropped = f"cropped to {width}x{height} and " if (width, height) != have else ""
    log.warning("%s: %dx%d pixels are %sresized to %dx%d", path, *have, cropped, *want)


def _too_large(path: Path, told: str) -> DataError:
    return DataError(f"{path} has {told} pixels, more than the {MOST_PIXELS >> 20} million that are read",
                     "make it smaller first")  # fmt: skip


@contextmanager
def _video_faults(path: Path) -> Iterator[None]:
    try:
        yield
    except WriteError as error:
        mend = "give a whole video, as mp4, webm, mkv, mov, avi or gif; a picture is given with --init-image"
        raise DataError(str(error), mend) from error
