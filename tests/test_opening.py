"""What a video starts from: which files are read, which are refused, and what is made of their pictures."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from hforce.errors import DataError, HforceError, WriteError
from hforce.ffmpeg import read_times, run_ffmpeg
from hforce.opening import crop_box, examine, fit, load_picture, pick, read_opening
from hforce.prompts import Init
from hforce.video import FfmpegSink, upscale

Frames = NDArray[np.uint8]
SIZES = st.tuples(st.integers(1, 80), st.integers(1, 80))


def gradient(width: int, height: int, frames: int = 1) -> Frames:
    """Soft colours that differ in every corner, and grow brighter with time: uint8 [T, H, W, 3]."""
    y, x = np.mgrid[0:height, 0:width]
    plane = np.stack([40 + 120 * x / width, 40 + 120 * y / height, 160 - 80 * x / width], axis=-1)
    return np.rint(plane + 40 * np.arange(frames)[:, None, None, None] / frames).astype(np.uint8)


def save_picture(path: Path, picture: Frames, **options: object) -> Path:
    Image.fromarray(picture).save(path, **options)
    return path


def save_video(path: Path, frames: Frames, fps: int = 16) -> Path:
    with FfmpegSink(path, frames.shape[2:0:-1], fps, crf=4) as sink:
        sink.write(frames)
    return path


def encode_video(path: Path, frames: Frames, times: list[int]) -> Path:
    """A video of PyAV's, without loss, with frames at times in milliseconds."""
    with av.open(path, "w") as container:
        stream = container.add_stream("ffv1", rate=1000)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "bgr0"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for time, frame in zip(times, frames, strict=True):
            shown = av.VideoFrame.from_ndarray(frame, "rgb24").reformat(format="bgr0")
            shown.pts, shown.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(shown))
        container.mux(stream.encode())
    return path


def read_image(path: Path, size: tuple[int, int]) -> Frames:
    return read_opening(examine(Init(str(path)), 16, 60), size)


def read_video(path: Path, size: tuple[int, int], fps: int = 16, seconds: float = 60) -> Frames:
    return read_opening(examine(Init(str(path), is_video=True), fps, seconds), size)


# Cropping and resizing


@given(SIZES, SIZES)
def test_the_largest_part_of_the_right_shape_is_cut_out_of_the_middle(have, want):
    left, top, right, bottom = crop_box(have, want)
    width, height = right - left, bottom - top
    assert left >= 0 and top >= 0 and right <= have[0] and bottom <= have[1]
    assert width * want[1] == pytest.approx(height * want[0])
    assert width == pytest.approx(have[0]) or height == pytest.approx(have[1])
    assert abs(left - (have[0] - right)) <= 2 and abs(top - (have[1] - bottom)) <= 2


@given(SIZES, SIZES, st.tuples(*[st.integers(0, 255)] * 3))
def test_one_colour_stays_that_colour_at_every_size(have, want, colour):
    fitted = fit(Image.new("RGB", have, colour), want)
    assert (fitted.shape, fitted.dtype) == ((want[1], want[0], 3), np.uint8)
    assert np.array_equal(np.unique(fitted.reshape(-1, 3), axis=0), [colour])


def test_a_picture_of_the_right_size_is_not_touched():
    picture = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    assert np.array_equal(fit(Image.fromarray(picture), (64, 48)), picture)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_what_was_enlarged_pixel_by_pixel_comes_back(factor):
    picture = np.random.default_rng(0).integers(0, 256, (1, 48, 64, 3), np.uint8)
    assert np.array_equal(fit(Image.fromarray(upscale(picture, factor)[0]), (64, 48)), picture[0])


def test_shrinking_averages_and_does_not_pick():
    board = np.indices((150, 150)).sum(axis=0) % 2 * 255
    shrunk = fit(Image.fromarray(np.repeat(board[..., None], 3, axis=2).astype(np.uint8)), (64, 64))
    assert abs(shrunk.astype(int) - 127.5).max() < 20


def test_sides_are_cut_off_and_not_squeezed_in(tmp_path, caplog):
    picture = np.zeros((100, 300, 3), np.uint8)
    picture[:, :100], picture[:, 200:] = (255, 0, 0), (0, 255, 0)
    shown = read_image(save_picture(tmp_path / "a.png", picture), (64, 64))
    assert shown.shape == (1, 64, 64, 3)
    assert shown.max() < 20  # no more than the resampling takes from next to the edge
    assert f"{tmp_path / 'a.png'}: 300x100 pixels are cropped to 100x100 and resized to 64x64" in caplog.text


def test_only_what_changes_is_told(tmp_path, caplog):
    read_image(save_picture(tmp_path / "a.png", gradient(64, 48)[0]), (64, 48))
    assert caplog.text == ""
    read_image(save_picture(tmp_path / "b.png", gradient(128, 96)[0]), (64, 48))
    assert "128x96 pixels are resized to 64x48" in caplog.text


# Pictures


@pytest.mark.parametrize(("name", "tolerance"), [
    ("a.png", 0), ("a.bmp", 0), ("a.tiff", 0), ("a.webp", 12), ("a.jpg", 12), ("a.JPEG", 12), ("no suffix", 0),
])  # fmt: skip
def test_pictures_are_known_by_their_content(tmp_path, name, tolerance):
    picture = gradient(64, 48)[0]
    save_picture(tmp_path / name, picture, **({} if "." in name else {"format": "PNG"}))
    (shown,) = read_image(tmp_path / name, (64, 48))
    assert abs(shown.astype(int) - picture).max() <= tolerance


def half(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (8, 8), colour)


def palette_with_hole() -> Image.Image:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([9, 9, 9, 200, 100, 50])
    image.info["transparency"] = 1
    return image


@pytest.mark.parametrize(("image", "name", "expected"), [
    (half("RGBA", (200, 100, 50, 0)), "a.png", (0, 0, 0)),
    (half("RGBA", (200, 100, 50, 128)), "a.png", (100, 50, 25)),
    (half("RGBA", (200, 100, 50, 255)), "a.png", (200, 100, 50)),
    (half("LA", (200, 128)), "a.png", (100, 100, 100)),
    (half("L", 77), "a.png", (77, 77, 77)),
    (half("1", 1), "a.png", (255, 255, 255)),
    (half("CMYK", (0, 255, 255, 0)), "a.tiff", (255, 0, 0)),
    (palette_with_hole(), "a.png", (0, 0, 0)),
    (Image.fromarray(np.full((8, 8), 0x8080, np.uint16)), "a.png", (128, 128, 128)),
])  # fmt: skip
def test_every_kind_of_picture_becomes_colours_on_black(tmp_path, image, name, expected):
    image.save(tmp_path / name)
    shown = np.asarray(load_picture(tmp_path / name))
    assert abs(shown.astype(int) - expected).max() <= 1


def test_a_photograph_is_turned_upright(tmp_path):
    picture, exif = gradient(64, 32)[0], Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side: turn a quarter clockwise
    save_picture(tmp_path / "a.png", picture, exif=exif)
    assert np.array_equal(load_picture(tmp_path / "a.png"), np.rot90(picture, -1))


def test_of_an_animation_the_first_picture_is_taken(tmp_path, caplog):
    first, *others = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime"))
    first.save(tmp_path / "a.gif", save_all=True, append_images=others)
    assert np.array_equal(np.unique(read_image(tmp_path / "a.gif", (16, 16)).reshape(-1, 3), axis=0), [[255, 0, 0]])
    assert "a.gif is an animation: only its first picture is taken" in caplog.text


def test_a_single_pixel_is_a_picture_too(tmp_path):
    save_picture(tmp_path / "a.png", np.full((1, 1, 3), 90, np.uint8))
    assert np.array_equal(read_image(tmp_path / "a.png", (64, 32)), np.full((1, 32, 64, 3), 90))


def declared(path: Path, width: int, height: int) -> None:
    """A PNG that says how large it is, and ends there."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + struct.pack(">I", 99) + b"IDAT"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


# Rate


@given(st.lists(st.integers(1, 400), min_size=1, max_size=30), st.integers(1, 60), st.integers(-500, 500))
def test_every_tick_shows_the_frame_that_is_nearest_in_time(gaps, fps, start):
    times = [Fraction(start, 1000)]
    for gap in gaps:
        times.append(times[-1] + Fraction(gap, 1000))
    picks = pick(times, fps)
    assert len(picks) == max(1, round((times[-1] - times[0] + Fraction(gaps[-1], 1000)) * fps))
    for tick, chosen in enumerate(picks):
        distances = [abs(time - times[0] - Fraction(tick, fps)) for time in times]
        assert chosen == distances.index(min(distances))


@pytest.mark.parametrize(("rate", "frames", "picks"), [
    (16, 9, (*range(9),)),
    (32, 10, (0, 2, 4, 6, 8)),
    (8, 3, (0, 0, 1, 1, 2, 2)),
    (24, 6, (0, 1, 3, 4)),
])  # fmt: skip
def test_a_video_of_another_rate_is_resampled_and_that_is_said(tmp_path, caplog, rate, frames, picks):
    video = gradient(32, 32, frames)
    opening = examine(Init(str(save_video(tmp_path / "a.mp4", video, rate)), is_video=True), 16, 60)
    assert opening.picks == picks
    assert (f"its {frames} frames are shown as {len(picks)}, at 16 a second" in caplog.text) == (rate != 16)
    assert abs(read_opening(opening, (32, 32)).astype(int) - video[[*picks]]).mean() < 3


def test_frames_of_uneven_length_are_taken_by_their_times(tmp_path):
    levels = np.array([0, 50, 100, 150, 200], np.uint8)
    video = np.broadcast_to(levels[:, None, None, None], (5, 16, 16, 3))
    encode_video(tmp_path / "a.mkv", video, [0, 125, 187, 250, 500])
    shown = read_video(tmp_path / "a.mkv", (16, 16))[:, 0, 0, 0]
    assert shown.tolist() == [0, 0, 50, 100, 150, 150, 150, 200, 200, 200, 200, 200]


# Videos


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (34, 30)])
def test_the_frames_of_a_video_come_with_their_colours(tmp_path, size):
    video = gradient(*size, frames=17)
    shown = read_video(save_video(tmp_path / "-a %d: b.mp4", video), size)
    assert (shown.shape, shown.dtype) == (video.shape, np.uint8)
    assert abs(shown.astype(int) - video).max() <= 8


def test_pixels_that_are_not_square_become_so(tmp_path):
    video = np.zeros((2, 32, 32, 3), np.uint8)
    video[:, :, 8:24] = 255  # shown twice as wide as high, this is the square in the middle
    plain = encode_video(tmp_path / "plain.mkv", video, [0, 62])
    wide = ["-i", str(plain), "-c:v", "ffv1", "-vf", "setsar=2", str(tmp_path / "wide.mkv")]
    run_ffmpeg(wide, "widening")
    assert read_video(tmp_path / "wide.mkv", (32, 32))[:, :, 2:-2].min() > 200
    assert not read_video(plain, (32, 32))[:, :, :8].any()


def test_an_animation_is_a_video_too(tmp_path):
    first, *others = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime"))
    first.save(tmp_path / "a.gif", save_all=True, append_images=others, duration=60)
    shown = read_video(tmp_path / "a.gif", (16, 16))
    assert shown[:, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255], [0, 255, 0]]


def test_of_a_long_video_only_the_beginning_is_looked_at(tmp_path):
    opening = examine(Init(str(save_video(tmp_path / "a.mp4", gradient(16, 16, 160))), is_video=True), 16, 2)
    assert 32 < len(opening.picks) < 64


# What is refused


def spoil_nothing(path: Path) -> None:
    """There is no such file."""


def picture_of_half(path: Path) -> None:
    save_picture(path, np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), format="PNG")
    path.write_bytes(path.read_bytes()[:5000])


def video_of_half(path: Path) -> None:
    save_video(path.with_suffix(".mp4"), np.random.default_rng(0).integers(0, 256, (17, 64, 64, 3), np.uint8))
    data = path.with_suffix(".mp4").read_bytes()
    path.write_bytes(data[: len(data) // 2])


def video_with_a_hole(path: Path) -> None:
    video_of_half(path)
    data = bytearray(path.with_suffix(".mp4").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4000] = bytes(4000)
    path.write_bytes(data)


def sound(path: Path) -> None:
    with av.open(path, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux([*stream.encode(frame), *stream.encode()])


def playlist(path: Path) -> None:
    save_video(path.with_name("secret.mp4"), gradient(16, 16, 17))
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n")


def frameless(path: Path) -> None:
    with av.open(path, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=16)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "bgr0"
        container.start_encoding()


BAD = [
    (False, spoil_nothing, 66, "No such file"),
    (False, Path.mkdir, 66, "is no file"),
    (False, os.mkfifo, 66, "is no file"),
    (False, Path.touch, 65, "it is none of PNG, JPEG"),
    (False, lambda path: path.write_text("hello\n" * 99), 65, "it is none of PNG, JPEG"),
    (False, picture_of_half, 65, "truncated"),
    (False, video_of_half, 65, "it is none of PNG, JPEG"),
    (False, lambda path: declared(path, 9000, 9000), 65, "has 9000x9000 pixels, more than the 64 million"),
    (False, lambda path: declared(path, 10**6, 10**6), 65, "more than the 64 million"),
    (True, spoil_nothing, 66, "No such file"),
    (True, Path.mkdir, 66, "is no file"),
    (True, os.mkfifo, 66, "is no file"),
    (True, Path.touch, 65, "reading"),
    (True, lambda path: path.write_text("hello\n" * 99), 65, "reading"),
    (True, video_of_half, 65, "reading"),
    (True, video_with_a_hole, 65, "reading"),
    (True, sound, 65, "reading"),
    (True, playlist, 65, "reading"),
    (True, frameless, 65, ""),
    (True, picture_of_half, 65, "reading"),
]


@pytest.mark.parametrize("suffix", ["", ".png", ".mp4", ".m3u8"])
@pytest.mark.parametrize(("is_video", "spoil", "code", "told"), BAD)
def test_what_is_no_whole_file_of_its_kind_is_refused(tmp_path, is_video, spoil: Callable, code, told, suffix):
    path = tmp_path / f"file{suffix or '.txt'}"
    spoil(path)
    with pytest.raises(HforceError) as caught:
        examine(Init(str(path), is_video), 16, 60)
    assert caught.value.exit_code == code
    assert told in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.mend


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="everything is permitted to root")
def test_a_file_that_may_not_be_read_is_told_apart(tmp_path):
    save_picture(tmp_path / "a.png", gradient(16, 16)[0]).chmod(0)
    with pytest.raises(HforceError) as caught:
        examine(Init(str(tmp_path / "a.png")), 16, 60)
    assert caught.value.exit_code == 77


def test_a_name_too_long_for_a_file_is_one_that_is_not_there():
    with pytest.raises(HforceError) as caught:
        examine(Init("a" * 5000), 16, 60)
    assert caught.value.exit_code == 66


def test_a_video_of_too_many_pixels_is_not_decoded(tmp_path):
    path = save_video(tmp_path / "a.mp4", gradient(64, 64, 3))
    assert len(read_times(path, 64 * 64, 60)) == 3
    with pytest.raises(WriteError, match="reading"):
        read_times(path, 64 * 64 - 1, 60)


@pytest.mark.parametrize("is_video", [False, True])
def test_a_file_that_changes_on_the_way_is_noticed(tmp_path, is_video):
    path = tmp_path / ("a.mp4" if is_video else "a.png")
    files = [save_video(path, gradient(16, 16, n)).read_bytes() if is_video else
             save_picture(path, gradient(16, 16 * n)[0]).read_bytes() for n in (5, 6)]  # fmt: skip
    opening = examine(Init(str(path), is_video), 16, 60)
    path.write_bytes(files[0])
    with pytest.raises(DataError, match="has changed since"):
        read_opening(opening, (16, 16))


def test_times_of_a_video_are_those_of_its_frames(tmp_path):
    times = read_times(save_video(tmp_path / "a.mp4", gradient(16, 16, 9), fps=7), 1 << 20, 60)
    assert [after - before for before, after in pairwise(times)] == [Fraction(1, 7)] * 8
