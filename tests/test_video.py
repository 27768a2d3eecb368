"""The video sink: what a player sees, and what is left when something breaks."""

import io
import os
import resource as limits
import stat
import threading
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from hforce.errors import OutputError, PermissionDenied, UnavailableError, WriteError, cannot_write
from hforce.ffmpeg import count_frames, find_ffmpeg
from hforce.video import FfmpegSink, NullSink, check_place, contact_sheet, part_path, preflight, upscale

SIZE = (96, 64)  # width x height


def moving(count: int, first: int = 0) -> np.ndarray:
    """A bright square wandering over a coloured ramp: frames uint8 [T, 64, 96, 3]."""
    width, height = SIZE
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[..., 0] = np.linspace(20, 200, width, dtype=np.uint8)
    frames[..., 1] = np.linspace(60, 120, height, dtype=np.uint8)[:, None]
    frames[..., 2] = 90
    for t, frame in enumerate(frames):
        left = (first + t) % (width - 16)
        frame[24:40, left : left + 16] = (230, 40, 160)
    return frames


def make(path: Path, chunks: int = 5, **options: int | str | None) -> FfmpegSink:
    with FfmpegSink(path, SIZE, **options) as sink:
        for chunk in range(chunks):
            sink.write(moving(12, 12 * chunk))
    return sink


def fake_ffmpeg(monkeypatch, folder: Path, script: str) -> None:
    program = folder / "ffmpeg"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))


def dying_ffmpeg(monkeypatch, folder: Path, script: str, when: str) -> None:
    """An ffmpeg that does as it should, except for calls with the argument `when`."""
    fake_ffmpeg(monkeypatch, folder, f'case " $* " in *" {when} "*) {script};; esac\nexec {find_ffmpeg()} "$@"')


@pytest.mark.parametrize("fps", [16, 7, 30])
def test_a_video_has_every_frame_at_its_time(tmp_path, fps):
    sink = make(tmp_path / "a.mp4", fps=fps, expected=60)
    with av.open(tmp_path / "a.mp4") as container:
        stream = container.streams.video[0]
        times = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
        assert (stream.codec_context.width, stream.codec_context.height) == SIZE
        assert stream.average_rate == fps
    assert sink.frames == len(times) == 60
    assert times == [frame * 1024 for frame in range(60)]
    assert count_frames(tmp_path / "a.mp4") == 60


def test_colours_are_tagged_and_come_back(tmp_path):
    make(tmp_path / "a.mp4", crf=10)
    with av.open(tmp_path / "a.mp4") as container:
        context = container.streams.video[0].codec_context
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        tags = (context.colorspace, context.color_primaries, context.color_trc, context.color_range)
    assert tags == (1, 1, 1, 1)  # BT.709 three times, and the range of television
    for decoded, original in ((frames[0], moving(1)[0]), (frames[-1], moving(1, 59)[0])):
        error = np.mean((decoded.astype(float) - original) ** 2)
        assert 10 * np.log10(255**2 / error) > 30


CARD = np.array([
    (255, 255, 255), (255, 255, 0), (0, 255, 255), (0, 255, 0), (255, 0, 255), (255, 0, 0), (0, 0, 255), (0, 0, 0),
    (191, 191, 191), (191, 191, 0), (0, 191, 191), (0, 191, 0), (191, 0, 191), (191, 0, 0), (0, 0, 191), (64, 64, 64),
], np.uint8)  # fmt: skip


@pytest.mark.parametrize("size", [(832, 480), (480, 832), (130, 98), (18, 34)])
def test_colours_of_a_test_card_come_back_by_the_formulas_of_bt709(tmp_path, size):
    width, height = size
    columns = np.arange(width) * len(CARD) // width
    card = np.broadcast_to(CARD[columns], (2, height, width, 3))
    with FfmpegSink(tmp_path / "a.mp4", size, crf=4) as sink:
        sink.write(card)
    with av.open(tmp_path / "a.mp4") as container:
        context = container.streams.video[0].codec_context
        assert (context.width, context.height, context.pix_fmt) == (width, height, "yuv420p")
        assert container.streams.video[0].average_rate == 16
        planes = next(container.decode(video=0)).to_ndarray()  # rows of Y, then of U and V, as they are stored
    luma, chroma = planes[:height], planes[height:].reshape(2, -1, width // 2)
    middles = [np.flatnonzero(columns == n).mean() for n in range(len(CARD))]
    for colour, x in zip(CARD, middles, strict=True):
        y = (float(luma[height // 2, round(x)]) - 16) / 219
        u, v = ((float(plane[height // 4, round(x) // 2]) - 128) / 224 for plane in chroma)
        red, blue = y + 1.5748 * v, y + 1.8556 * u
        green = (y - 0.2126 * red - 0.0722 * blue) / 0.7152
        if width // len(CARD) > 8:  # wide enough for the halved resolution of the colours
            assert abs(255 * np.array([red, green, blue]) - colour).max() < 4
        assert abs(255 * y - colour @ (0.2126, 0.7152, 0.0722)) < 6


def test_the_index_is_in_front(tmp_path):
    make(tmp_path / "a.mp4")
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    assert b"moof" not in data


def test_the_same_frames_make_the_same_bytes(tmp_path):
    make(tmp_path / "a.mp4")
    make(tmp_path / "b" / "videos" / "another name.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b/videos/another name.mp4").read_bytes()


def test_nothing_but_the_video_is_left(tmp_path):
    make(tmp_path / "a.mp4")
    make(tmp_path / "out" / "videos" / "a.mp4")
    assert [path.name for path in tmp_path.rglob("*.mp4")] == ["a.mp4", "a.mp4"]
    assert make(tmp_path / "a.mp4").kept is None


def test_tensors_are_taken_too(tmp_path):
    with FfmpegSink(tmp_path / "a.mp4", SIZE) as sink:
        sink.write(torch.from_numpy(moving(3)))
    assert count_frames(sink.path) == 3


@pytest.mark.parametrize("frames", [moving(2).astype(np.float32), moving(2)[:, :32], moving(2)[0]])
def test_frames_of_another_kind_are_refused(tmp_path, frames):
    with pytest.raises(ValueError, match="expected uint8"), FfmpegSink(tmp_path / "a.mp4", SIZE) as sink:
        sink.write(frames)


def test_an_odd_size_is_refused(tmp_path):
    with pytest.raises(OutputError, match="833x481"):
        FfmpegSink(tmp_path / "a.mp4", (833, 481))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_error_the_chunks_already_made_are_kept(tmp_path, error):
    sink = FfmpegSink(tmp_path / "videos" / "a.mp4", SIZE)
    with pytest.raises(error), sink:
        sink.write(moving(12))
        sink.write(moving(12, 12))
        raise error
    assert sink.kept == tmp_path / "work" / "a.part.mp4"
    assert count_frames(sink.kept) == 24
    assert not sink.path.exists()
    make(sink.path)  # and the next run takes its place
    assert not sink.kept.exists()


def stopped_after(chunks, path):
    """A sink whose run ended with an error after so many chunks of 12 frames."""
    with pytest.raises(RuntimeError), FfmpegSink(path, SIZE) as sink:
        for number in range(chunks):
            sink.write(moving(12, 12 * number))
        raise RuntimeError
    return sink


@pytest.mark.parametrize("order", [(3, 1), (1, 3), (3, 1, 2), (3, 0)])
def test_the_longest_unfinished_video_is_kept_until_one_is_finished(tmp_path, order):
    for chunks in order:
        sink = stopped_after(chunks, tmp_path / "a.mp4")
    assert count_frames(sink.kept) == 36
    make(tmp_path / "a.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_an_unfinished_video_without_a_frame_is_none(tmp_path):
    assert stopped_after(0, tmp_path / "a.mp4").kept is None
    assert not list(tmp_path.iterdir())


def test_sizes_that_h264_cannot_have_are_refused(tmp_path):
    for size in ((16, 17), (16386, 16), (16, 16386)):
        with pytest.raises(OutputError, match=f"cannot encode {size[0]}x{size[1]}: H.264"):
            FfmpegSink(tmp_path / "a.mp4", size)


@pytest.mark.parametrize("name", ["pipe.mp4", "x" * 252 + ".mp4", "x" * 300 + "/a.mp4", "file/a.mp4"])
def test_a_place_where_no_file_can_be_is_told_of(tmp_path, name):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot create"):
        check_place(tmp_path / name)


def test_a_video_is_made_by_one_process_at_a_time(tmp_path):
    with FfmpegSink(tmp_path / "a.mp4", SIZE) as sink:
        sink.write(moving(12))
        with pytest.raises(OutputError, match="another hforce is making"), FfmpegSink(tmp_path / "a.mp4", SIZE):
            pytest.fail("two of them")
        make(tmp_path / "b.mp4")
        sink.write(moving(12, 12))
    assert count_frames(tmp_path / "a.mp4") == 24
    make(tmp_path / "a.mp4")  # the lock is gone


def test_a_video_that_was_made_meanwhile_is_left_alone(tmp_path):
    make(tmp_path / "a.mp4")
    before = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(OutputError, match="was made meanwhile"):
        make(tmp_path / "a.mp4", replaces=False)
    assert (tmp_path / "a.mp4").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_what_certifies_a_video_is_written_before_it_has_its_name(tmp_path):
    seen = []
    make(tmp_path / "a.mp4", certify=lambda whole: seen.append((count_frames(whole), (tmp_path / "a.mp4").exists())))
    assert seen == [(60, False)]


def test_an_older_video_survives_a_failed_run(tmp_path):
    make(tmp_path / "a.mp4")
    before = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(RuntimeError), FfmpegSink(tmp_path / "a.mp4", SIZE) as sink:
        sink.write(moving(12))
        raise RuntimeError
    assert (tmp_path / "a.mp4").read_bytes() == before


def test_a_wrong_number_of_frames_is_not_published(tmp_path):
    with pytest.raises(WriteError, match="60 frames were made, 61 expected"):
        make(tmp_path / "a.mp4", expected=61)
    assert not (tmp_path / "a.mp4").exists()
    assert count_frames(tmp_path / ".a.part.mp4") == 60


def test_a_file_that_lost_frames_is_not_published(tmp_path, monkeypatch):
    lossy = f'exec {find_ffmpeg()} -i "$6" -c copy -frames:v 40 -f mp4 "$(eval echo \\"\\${{$#}}\\")"'
    dying_ffmpeg(monkeypatch, tmp_path, lossy, "+faststart")
    with pytest.raises(WriteError, match="a.mp4 holds 40 frames, 60 were written"):
        make(tmp_path / "a.mp4")
    assert not (tmp_path / "a.mp4").exists()
    assert (tmp_path / ".a.part.mp4").exists()


@pytest.mark.parametrize("script, expected", [
    ("head -c 30000 >/dev/null; echo 'No space left on device' >&2; exit 228",
     "ffmpeg ended with status 228 (No space left on device): No space left on device"),
    ("cat >/dev/null; printf 'bad \\033[31m thing\\n' >&2; exit 1", "ffmpeg ended with status 1: bad ?[31m thing"),
    ("kill -9 $$", "ffmpeg was ended by SIGKILL"),
    ("exit 0", "ffmpeg ended with status 0"),
])
@pytest.mark.parametrize("chunks", [1, 40])
def test_an_encoder_that_dies_is_noticed(tmp_path, monkeypatch, script, expected, chunks):
    fake_ffmpeg(monkeypatch, tmp_path, script)
    with pytest.raises(WriteError) as caught:
        make(tmp_path / "a.mp4", chunks)
    assert expected in str(caught.value)
    assert caught.value.exit_code == 74
    assert not (tmp_path / "a.mp4").exists()


def test_the_end_of_an_encoder_that_reads_nothing_is_the_same(tmp_path, monkeypatch):
    fake_ffmpeg(monkeypatch, tmp_path, "exec sleep 60")
    monkeypatch.setattr(FfmpegSink, "patience", 0.2)
    before = {*threading.enumerate()}
    with pytest.raises(WriteError, match="ffmpeg has taken nothing for 0.2 seconds"):
        make(tmp_path / "a.mp4", 40)
    with pytest.raises(WriteError, match="SIGKILL"):
        make(tmp_path / "b.mp4", 1)
    assert {*threading.enumerate()} <= before


def test_an_encoder_that_says_much_does_not_block(tmp_path, monkeypatch):
    fake_ffmpeg(monkeypatch, tmp_path, "cat >/dev/null; yes complaint | head -c 3000000 >&2; exit 3")
    with pytest.raises(WriteError, match="status 3: complaint"):
        make(tmp_path / "a.mp4")


def test_a_full_disk_leaves_no_half_file(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (12, 64, 96, 3), np.uint8)
    before = limits.getrlimit(limits.RLIMIT_FSIZE)
    limits.setrlimit(limits.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        sink = FfmpegSink(tmp_path / "a.mp4", SIZE)
        with pytest.raises(WriteError, match="writing .*a.part.mp4 failed"), sink:
            for _ in range(40):
                sink.write(noise)
    finally:
        limits.setrlimit(limits.RLIMIT_FSIZE, before)
    assert not (tmp_path / "a.mp4").exists()


def test_a_failure_while_finishing_keeps_the_part(tmp_path, monkeypatch):
    dying_ffmpeg(monkeypatch, tmp_path, "echo no room >&2; exit 228", "+faststart")
    sink = FfmpegSink(tmp_path / "a.mp4", SIZE)
    with pytest.raises(WriteError, match="finishing .*No space left on device"), sink:
        sink.write(moving(12))
    assert sink.kept and count_frames(sink.kept) == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.part.mp4", "ffmpeg"]


def test_a_link_left_in_the_way_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".a.part.mp4").symlink_to(victim)
    make(tmp_path / "a.mp4")
    assert victim.read_text() == "precious"


def test_preflight_accepts_a_folder_to_be_made(tmp_path):
    preflight(tmp_path / "new" / "videos" / "a.mp4")
    assert (tmp_path / "new" / "work").is_dir()


@pytest.mark.parametrize("name", ["file/a.mp4", "folder", "file/videos/a.mp4"])
def test_preflight_names_a_place_that_cannot_be(tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError) as caught:
        preflight(tmp_path / name)
    assert caught.value.exit_code == 73


def test_what_the_system_refuses_has_its_own_exit_code(tmp_path):
    codes = [cannot_write(tmp_path, error).exit_code for error in
             (PermissionError(13, "Permission denied"), OSError(30, "Read-only"), OSError(28, "No space"))]
    assert codes == [77, 73, 74]
    assert isinstance(cannot_write(tmp_path, PermissionError()), PermissionDenied)


@pytest.mark.parametrize("script", ["exit 1", "echo 'Codec libx264 is not recognized by FFmpeg.'"])
def test_preflight_refuses_an_ffmpeg_that_cannot(tmp_path, monkeypatch, script):
    fake_ffmpeg(monkeypatch, tmp_path, script)
    with pytest.raises(UnavailableError, match="cannot encode with libx264") as caught:
        preflight(tmp_path / "a.mp4")
    assert caught.value.exit_code == 69


@pytest.mark.parametrize("mode", [None, stat.S_IRUSR])
def test_preflight_refuses_a_missing_or_dead_ffmpeg(tmp_path, monkeypatch, mode):
    program = tmp_path / "ffmpeg"
    if mode is not None:
        program.write_text("not a program")
        program.chmod(mode)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    with pytest.raises(UnavailableError, match="cannot run ffmpeg"):
        preflight(tmp_path / "a.mp4")


def test_the_part_lies_out_of_the_way():
    assert part_path(Path("/o/videos/a b.mp4")) == Path("/o/work/a b.part.mp4")
    assert part_path(Path("/o/a b.mp4")) == Path("/o/.a b.part.mp4")


def test_a_null_sink_counts():
    with NullSink() as sink:
        sink.write(moving(5))
    assert sink.frames == 5


def test_upscaling_repeats_pixels():
    frames = moving(2)
    large = upscale(frames, 4)
    assert large.shape == (2, 256, 384, 3)
    assert np.array_equal(large[:, ::4, ::4], frames) and np.array_equal(large[:, 3::4, 3::4], frames)


def test_a_contact_sheet_shows_each_picture_with_its_time():
    pictures = [(10.0 * i, frame) for i, frame in enumerate(moving(5))]
    png = contact_sheet(pictures, columns=3)
    with Image.open(io.BytesIO(png)) as image:
        sheet = np.asarray(image)
    assert np.array_equal(sheet[6:70, 6:102], pictures[0][1])
    assert np.array_equal(sheet[96:160, 108:204], pictures[4][1])
    assert sheet[70:84, 6:102].min() < 100  # letters
    assert contact_sheet(pictures, columns=3) == png
