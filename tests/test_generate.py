"""Making videos: what lands in the file, what is told of it, and what is left when it fails."""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from hforce import generate
from hforce.build import build_backbone, build_plan, build_script, build_stream
from hforce.cache.roles import HeadRole, load_profile, save_profile
from hforce.config import load_config
from hforce.decoding import decoded, read_ahead, to_bytes
from hforce.errors import DataError, HforceError, InterruptedRun, OutputError, WriteError
from hforce.generate import Progress, Result, Sheet, choose_targets
from hforce.models.taehv import TAEHV, TaehvCodec, TaehvConfig
from hforce.models.tiny import WORD_INDEX, WordEncoder
from hforce.models.weights import read_safetensors
from hforce.prompts import Item, Shot, load_prompts
from hforce.settings import SETUPS, Config
from hforce.video import FfmpegSink

CIRCLE = "a red circle bouncing sideways on a green striped background"
SQUARE = "a blue square circling on a purple plain background"
Settings = Callable[..., Config]


@pytest.fixture
def settings(weights: Path, heads: Path) -> Settings:
    """Makes configurations: a second of video from the random model, unless told otherwise."""

    def load(*overrides: str, seconds: float = 1) -> Config:
        own = [f"model.checkpoint={weights}", f"cache.profile={heads}", f"video.seconds={seconds}"]
        return load_config(overrides=[*own, "video.upscale=1", "sample.steps=[1000]", *overrides])

    return load


def items(*prompts: str) -> list[Item]:
    return [Item(None, (Shot(prompt),), line=number) for number, prompt in enumerate(prompts, 1)]


def make(config: Config, output: Path, *prompts: str, on_exists: str = "error") -> Result:
    return generate.run(config, items(*(prompts or [CIRCLE])), output, on_exists, lambda _: None)


def make_one(config: Config, path: Path, *prompts: str) -> Path:
    """One video, which must not fail."""
    result = make(config, path, *prompts)
    assert not result.failed
    return result.made[0].video


def pictures(path: Path) -> list[NDArray[np.uint8]]:
    """All frames of a video, decoded by PyAV."""
    with av.open(path) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def play(config: Config, *shots: tuple[str, float | None]) -> tuple[torch.Tensor, NDArray[np.uint8]]:
    """Latents [F, C, h, w] and video frames [T, H, W, 3] of a whole video, before they are encoded."""
    backbone, seconds = build_backbone(config), config.video.seconds
    timed = Item(None, tuple(Shot(*shot) for shot in shots or [(CIRCLE, None)])).timed(seconds)
    plan = build_plan(timed, seconds, config.video.fps, backbone)
    stream = build_stream(config, backbone, plan.total)
    parts = list(decoded(stream, build_script(timed, plan, backbone), backbone))
    return torch.cat([chunk.latents[0] for chunk, *_ in parts]), np.concatenate([frames for _, frames, _ in parts])


def changed(weights: Path, path: Path, **tensors: torch.Tensor) -> Path:
    """A copy of a weight file in float32, with other tensors under some names (dots written as double underscores)."""
    state = {name: value.float() for name, value in load_file(weights).items()}
    state |= {name.replace("__", "."): value for name, value in tensors.items()}
    save_file(state, path, read_safetensors(weights)[1])
    return path


def loud(weights: Path, path: Path, slot: str, word: str) -> Path:
    """A model that is whole, but whose word is so loud that what it says overflows."""
    words = load_file(weights)["words.weight"].float()
    words[WORD_INDEX[slot, word]] = 3e38
    return changed(weights, path, words__weight=words)


# The file


@pytest.mark.parametrize(("seconds", "frames"), [(0.01, 9), (1, 21), (21 / 16, 21), (22 / 16, 33), (5, 81)])
def test_a_video_has_every_frame_up_to_a_whole_chunk(settings, tmp_path, seconds, frames):
    path = make_one(settings(seconds=seconds), tmp_path / "a.mp4")
    assert path == tmp_path / "a.mp4"
    assert len(pictures(path)) == frames


def test_size_upscaling_and_speed_are_as_asked(settings, tmp_path):
    config = settings("model.size=128x96", "video.upscale=3", "video.fps=10")
    with av.open(make_one(config, tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.width, stream.codec_context.height) == (384, 288)
        assert (stream.average_rate, stream.frames) == (10, 21)


def test_the_next_chunk_is_made_meanwhile_and_frames_stay_the_same(settings):
    backbone, shots = build_backbone(settings(seconds=3)), [Shot(CIRCLE)]
    plan = build_plan(shots, 3, 16, backbone)
    made: list[list] = []
    with ThreadPoolExecutor(1) as thread:
        for worker in (None, thread):
            stream = build_stream(settings(seconds=3), backbone, plan.total)
            made.append(list(decoded(stream, build_script(shots, plan, backbone), backbone, worker=worker)))
    assert len(made[0]) == plan.total
    for (chunk, frames, _), (other, others, seconds) in zip(*made, strict=True):
        assert (chunk.number, chunk.latents.equal(other.latents)) == (other.number, True)
        np.testing.assert_array_equal(frames, others)
        assert min(seconds.values()) > 0


def test_a_contact_sheet_goes_with_the_video_that_it_shows(settings, tmp_path):
    make_one(settings(), tmp_path / "a.mp4")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    for name in ("a", "b"):
        item = Item(None, (Shot(CIRCLE),))
        config = settings("video.contact_sheet=false", "sample.seed=5")
        assert generate.run(config, [item], tmp_path / f"{name}.mp4", "overwrite", lambda _: None).made
    assert not (tmp_path / "a.png").exists()
    assert (tmp_path / "b.png").exists()  # of which no sidecar says that it is ours


@pytest.mark.parametrize("name", ["a.gif", "a.WEBM", "-"])
def test_only_mp4_is_written(settings, tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="videos are written as .mp4"):
        make_one(settings(), Path(name))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("second", "message"), [
    ('{"prompt": "xyzzy"}', "p.jsonl:2: the tiny model knows no word"),
    ('{"prompt": "red", "init_image": "none.png"}', "p.jsonl:2: cannot read none.png"),
    ('{"prompts": ["red", "blue"], "duration": "0.5s"}', "p.jsonl:2: prompt 1 of 2 would last less than a chunk"),
])  # fmt: skip
def test_faults_of_a_list_say_where_they_are(settings, tmp_path, monkeypatch, second, message):
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text('{"prompt": "a red circle"}\n' + second + "\n")
    with pytest.raises(HforceError) as caught:
        generate.run(settings(), load_prompts("p.jsonl"), tmp_path / "out", "skip", lambda _: None)
    assert str(caught.value).startswith(message)


def test_one_item_is_read_ahead_and_no_more():
    taken = []

    def items():
        for number in range(1, 9):
            taken.append((number, threading.current_thread() is threading.main_thread()))
            yield number
        raise DataError("the ninth is bad")

    with ThreadPoolExecutor(1) as worker:
        reading = read_ahead(items(), worker)
        assert next(reading) == 1
        reading.close()  # waits for what is being made
        assert taken == [(1, False), (2, False)]
        got = []
        with pytest.raises(DataError, match="the ninth is bad"):
            for item in read_ahead(items(), worker):
                got.append(item)
        assert got == [*range(1, 9)]
        assert list(read_ahead(iter([]), worker)) == []


def test_the_video_shows_the_frames_that_were_decoded(settings, tmp_path):
    config = settings("video.crf=1")
    shown, made = np.stack(pictures(make_one(config, tmp_path / "a.mp4"))), play(config)[1]
    assert made.std() > 10  # the model that was never trained does paint something
    # x264 halves the colour's resolution, so brightness is what comes back.
    weights_of_brightness = np.array([0.2126, 0.7152, 0.0722])
    assert np.abs(shown @ weights_of_brightness - made @ weights_of_brightness).mean() < 8


def test_the_same_settings_make_the_same_bytes(settings, tmp_path):
    one, two = (make_one(settings(), tmp_path / name) for name in ("one", "two"))
    other = make_one(settings("sample.seed=1"), tmp_path / "three")
    assert one.read_bytes() == two.read_bytes() != other.read_bytes()


@pytest.mark.parametrize("setup", ["head-forcing", "full", "window"])
def test_a_short_video_is_the_beginning_of_a_long_one(settings, setup):
    short, long = (play(settings(f"cache.setup={setup}", seconds=n)) for n in (2, 5.5))
    for part, whole in zip(short, long, strict=True):
        assert len(part) < len(whole)
        assert np.array_equal(np.asarray(part), np.asarray(whole[: len(part)]))


def test_every_setup_runs_and_remembers_in_its_own_way(settings):
    made = [play(settings(f"cache.setup={setup}", seconds=7))[0] for setup in SETUPS]
    assert [len(latents) for latents in made] == [30] * len(SETUPS)
    named = dict(zip(SETUPS, made, strict=True))
    assert torch.equal(named.pop("hf-11"), named["head-forcing"])
    for one, other in combinations(named.values(), 2):
        torch.testing.assert_close(one[:3], other[:3], atol=1e-4, rtol=0)  # the first chunk has no past
        assert (one[-3:] - other[-3:]).abs().max() > 1e-3


def test_a_model_that_makes_one_frame_at_a_time_makes_no_more_than_asked(settings, tmp_path):
    config = settings("sample.chunk=1", "cache.switch=recache", seconds=3)
    shots = [Shot(CIRCLE, 1.5), Shot(SQUARE)]
    result = generate.run(config, [Item("a", tuple(shots), seconds=3.0)], tmp_path, "error", lambda _: None)
    told = json.loads(result.made[0].sidecar.read_text())
    assert [shot["chunk"] for shot in told["schedule"]] == [0, 6]
    assert (told["chunks"], told["frames"], told["sample"]["chunk"]) == (13, 49, 1)
    assert len(pictures(result.made[0].video)) == 49
@given(st.floats(0, 255, width=32))
def test_brightness_is_rounded_and_never_cut_off(level):
    shown = to_bytes(torch.full((1, 3, 2, 2), level / 255))
    assert shown.shape == (1, 2, 2, 3)
    assert abs(float(shown[0, 0, 0, 0]) - level) <= 0.5001


def test_a_video_of_the_usual_size_keeps_it_from_the_latents_to_the_file(tmp_path):
    """A codec of Wan's shape, narrow, at 832x480."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec = TaehvCodec(TAEHV(TaehvConfig(16, 4, (8, 8, 6, 6))).eval().requires_grad_(False))
        frames = to_bytes(codec.decoder()(torch.randn(1, 1, 16, 60, 104)))
    with FfmpegSink(tmp_path / "a.mp4", (832, 480)) as sink:
        sink.write(frames)
    assert np.stack(pictures(sink.path)).shape == (1, 480, 832, 3)


# Prompts


def test_a_schedule_changes_the_prompt_at_its_chunk(settings, tmp_path):
    plain, switched = (play(settings(seconds=4.5), *shots)[0]
                       for shots in ([(CIRCLE, None)], [(CIRCLE, 3.0), (SQUARE, None)]))
    assert torch.equal(plain[:12], switched[:12])  # 3 s are 4 chunks of 3 latents
    assert not torch.equal(plain[12], switched[12])
    schedule = [{"at": "0s", "prompt": CIRCLE}, {"at": "3s", "prompt": SQUARE}]
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"schedule": schedule, "name": "two", "duration": "4.5s", "seed": 9}))
    result = generate.run(settings(), load_prompts(file), tmp_path / "out", "error", lambda _: None)
    written = json.loads(result.made[0].sidecar.read_text())
    assert [(shot["chunk"], shot["prompt"]) for shot in written["schedule"]] == [(0, CIRCLE), (4, SQUARE)]
    assert (written["seed"], written["frames"], written["chunks"]) == (9, 81, 7)
    assert result.made[0].video == tmp_path / "out" / "videos" / "two-0.mp4"


def test_equal_prompts_make_files_of_their_own(settings, tmp_path):
    result = make(settings(), tmp_path, CIRCLE, CIRCLE, CIRCLE.upper())
    names = [target.video.name for target in result.made]
    assert names[0] == f"{CIRCLE}-0.mp4"
    assert len({name.casefold() for name in names}) == 3
    assert sorted(names) == sorted(path.name for path in (tmp_path / "videos").iterdir())
    assert not list((tmp_path / "work").iterdir())


def test_prompts_never_lead_out_of_the_folder(tmp_path):
    for prompt in ("../../red", "/abs/red", "~/red", "con", "red.", "r" * 500, "красный круг " * 40):
        (target,) = choose_targets(items(prompt), tmp_path)
        assert target.video.parent == tmp_path / "videos"
        assert len(target.video.name.encode()) <= 240
        assert target.video.name[0] not in ".~"


def test_several_videos_do_not_go_into_one_file(tmp_path):
    with pytest.raises(OutputError, match="2 videos cannot go into one file"):
        choose_targets(items(CIRCLE, SQUARE), tmp_path / "a.mp4")


def test_a_prompt_that_says_nothing_stops_all_before_any_is_begun(settings, tmp_path):
    with pytest.raises(DataError, match="knows no word of the prompt 'xyzzy'") as caught:
        make(settings(), tmp_path, CIRCLE, "xyzzy")
    assert "shape: circle, square, triangle" in str(caught.value)
    assert not list((tmp_path / "videos").iterdir())


def test_prompts_of_all_videos_are_encoded_before_the_first_is_made(settings, tmp_path, monkeypatch):
    asked: list[list[str]] = []
    monkeypatch.setattr(WordEncoder, "encode_all", lambda _, prompts: asked.append(list(prompts)))
    make(settings(), tmp_path, CIRCLE, SQUARE)
    assert asked == [[CIRCLE, SQUARE], [CIRCLE], [SQUARE]]
    make(settings(), tmp_path, CIRCLE, SQUARE, on_exists="skip")
    assert asked[3:] == []


# Sidecar and contact sheet


def test_a_sidecar_is_enough_to_make_the_video_again(settings, tmp_path):
    config = settings("cache.setup=random", "cache.memory.options.episodes=2", "sample.steps=[999,600]", "video.crf=9")
    shots = (Shot(CIRCLE, 1.5), Shot(SQUARE))
    item = Item(None, shots, seed=5, seconds=3.0)
    first = generate.run(config, [item], tmp_path / "one", "error", lambda _: None).made[0]
    told = json.loads(first.sidecar.read_text())
    assert told["result"]["sha256"] == hashlib.sha256(first.video.read_bytes()).hexdigest()
    assert told["result"]["frames"] == told["frames"] == 57
    assert set(told["result"]["stages"]) == {"denoise", "commit", "decode", "encode"}

    (tmp_path / "again.yaml").write_text(json.dumps({key: told[key] for key in ("model", "cache", "sample", "video")}))
    points = [{"at": f"{shot['chunk']}c", "prompt": shot["prompt"]} for shot in told["schedule"]]
    (tmp_path / "again.jsonl").write_text(json.dumps({"schedule": points, "seed": told["seed"], "duration": "3s"}))
    again = load_config(files=[tmp_path / "again.yaml"])
    result = generate.run(again, load_prompts(tmp_path / "again.jsonl"), tmp_path / "two", "error", lambda _: None)
    assert json.loads(result.made[0].sidecar.read_text())["result"]["sha256"] == told["result"]["sha256"]


def test_a_sidecar_tells_how_the_prompt_was_read(settings, tmp_path):
    make_one(settings(), tmp_path / "a.mp4", "red ball")
    told = json.loads((tmp_path / "a.mp4.json").read_text())
    assert "red circle" in told["schedule"][0]["reads"]
    assert len(told["fingerprint"]) == 64


def test_a_contact_sheet_shows_the_first_and_the_last_frame(settings, tmp_path):
    config = settings("video.upscale=2")
    make_one(config, tmp_path / "a.mp4")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
        assert image.size == (6 * (64 + 6) + 6, 4 * (64 + 14 + 12) + 6)  # 21 pictures, with gaps and their times
        sheet = np.asarray(image)
    frames = play(config)[1]
    assert np.array_equal(sheet[6:70, 6:70], frames[0])
    last_row, last_column = 6 + 3 * 90, 6 + 2 * 70
    assert np.array_equal(sheet[last_row : last_row + 64, last_column : last_column + 64], frames[20])


@pytest.mark.parametrize(("frames", "count"), [(1, 1), (9, 9), (961, 24)])
def test_pictures_of_a_sheet_are_spread_evenly(frames, count):
    sheet = Sheet(frames, fps=16)
    for first in range(0, frames, 12):
        sheet.look(first, np.zeros((min(12, frames - first), 2, 2, 3), np.uint8))
    times = [seconds * 16 for seconds, _ in sheet.pictures]
    assert len(times) == count
    assert (times[0], times[-1]) == (0, frames - 1)
    assert np.ptp(np.diff(times)) <= 1 if count > 1 else times == [0]


def test_without_a_contact_sheet_there_is_none(settings, tmp_path):
    make_one(settings("video.contact_sheet=false"), tmp_path / "a.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.mp4.json"]


def test_progress_is_told_after_every_chunk(settings, tmp_path):
    told: list[Progress] = []
    generate.run(settings(seconds=3), items(CIRCLE), tmp_path / "a.mp4", "error", told.append)
    assert [progress.done for progress in told] == [9, 21, 33, 45, 57]
    assert all(set(progress.seconds) == {"denoise", "commit", "decode", "encode"} for progress in told)


# What is there already


def test_a_video_made_by_the_same_settings_is_skipped(settings, tmp_path):
    path = make_one(settings(), tmp_path)
    before = path.stat().st_mtime_ns
    result = make(settings(), tmp_path, on_exists="skip")
    assert [target.video for target in result.skipped] == [path]
    assert not result.made
    assert path.stat().st_mtime_ns == before


def test_other_roles_of_the_same_profile_file_make_another_video(settings, heads, tmp_path):
    """Only the path of the profile used to be recorded."""
    profile, mine = load_profile(heads), tmp_path / "mine.json"
    save_profile(profile, mine)
    config = settings(f"cache.profile={mine}")
    made = make(config, tmp_path).made
    assert make(config, tmp_path, on_exists="skip").skipped == made
    others = tuple(head.model_copy(update={"role": HeadRole.LOCAL}) for head in profile.heads)
    save_profile(profile.model_copy(update={"heads": others}), mine)
    with pytest.raises(OutputError, match="was not made by this very command"):
        make(config, tmp_path, on_exists="skip")


def test_what_is_other_than_it_was_is_told(settings, tmp_path):
    make(settings("sample.seed=4"), tmp_path)
    with pytest.raises(OutputError, match=r"this very command: seed was 4 and is 5, .*sample.seed was 4 and is 5$"):
        make(settings("sample.seed=5"), tmp_path, on_exists="skip")
    with pytest.raises(OutputError, match=r": frames was 21 and is 9, chunks was 2 and is 1, video.fps .* and 2 more$"):
        make(settings("sample.seed=4", "video.crf=20", "video.preset=slow", "video.fps=8"), tmp_path, on_exists="skip")


@pytest.mark.parametrize("last", ["hforce.sidecar.write_document", "hforce.sidecar.write_bytes"])
def test_a_run_that_is_stopped_while_its_files_get_their_names_goes_on_the_next_time(settings, tmp_path, last):
    """Once the sidecar is there, or the contact sheet, too, but the video is not."""
    module, _, name = last.rpartition(".")
    write = getattr(sys.modules[module], name)

    def stop(*written: object) -> None:
        write(*written)
        raise InterruptedRun("stopped", 130)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(last, stop)
        ((target, error),) = make(settings(), tmp_path).failed
    assert isinstance(error, InterruptedRun)
    assert not target.video.exists()
    assert make(settings(), tmp_path, on_exists="skip").made == [target]
    assert make(settings(), tmp_path, on_exists="skip").skipped == [target]


@pytest.mark.parametrize("on_exists", ["skip", "error"])
def test_a_picture_that_takes_the_place_of_a_sheet_is_spared(settings, tmp_path, on_exists):
    """Although there is a sidecar: the one of a video that was moved away."""
    target = make(settings("video.contact_sheet=false"), tmp_path).made[0]
    target.video.unlink()
    target.sheet.write_text("precious")
    with pytest.raises(OutputError, match="exists and was not made by this very command"):
        make(settings(), tmp_path, on_exists=on_exists)
    assert target.sheet.read_text() == "precious"
    assert make(settings("video.contact_sheet=false"), tmp_path, on_exists=on_exists).made == [target]


@pytest.mark.parametrize("on_exists", ["skip", "error"])
def test_a_video_made_otherwise_is_never_touched(settings, tmp_path, on_exists):
    """A conflict used to be found only when its turn came, after other videos of the list had been made."""
    path = make_one(settings(), tmp_path)
    before = path.read_bytes()
    with pytest.raises(OutputError, match="exists and was not made by this very command") as caught:
        generate.run(settings("sample.seed=1"), items(CIRCLE, SQUARE)[::1], tmp_path, on_exists, lambda _: None)
    assert caught.value.exit_code == 73
    assert path.read_bytes() == before
    assert [p.name for p in (tmp_path / "videos").iterdir()] == [path.name]


def test_a_video_is_overwritten_on_request(settings, tmp_path):
    path = make_one(settings(), tmp_path)
    before = path.read_bytes()
    assert make(settings("sample.seed=1"), tmp_path, on_exists="overwrite").made[0].video == path
    assert path.read_bytes() != before
    assert make(settings("sample.seed=1"), tmp_path, on_exists="skip").skipped


def test_a_video_that_was_cut_short_does_not_count_as_done(settings, tmp_path):
    """Only the sidecar used to be looked at, so a truncated video was reported as made."""
    path = make_one(settings(), tmp_path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(OutputError):
        make(settings(), tmp_path, on_exists="skip")


def test_a_video_of_somebody_else_is_not_ours(settings, tmp_path):
    (tmp_path / "a.mp4").write_text("precious")
    with pytest.raises(OutputError):
        make(settings(), tmp_path / "a.mp4", on_exists="skip")
    assert (tmp_path / "a.mp4").read_text() == "precious"


@pytest.mark.parametrize("on_exists", ["skip", "error"])
@pytest.mark.parametrize("text", ["precious", '{"kind": "other", "result": {}}', '{"result": {}}'])
def test_a_sidecar_of_something_else_is_not_written_over(settings, tmp_path, text, on_exists):
    (tmp_path / "a.mp4.json").write_text(text)
    with pytest.raises(DataError, match="is no sidecar of hforce") as caught:
        make(settings(), tmp_path / "a.mp4", on_exists=on_exists)
    assert "overwrite" in caught.value.mend
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.mp4.json", text)]
    assert make(settings(), tmp_path / "a.mp4", on_exists="overwrite").made


@pytest.mark.parametrize("text", ["", "[]", "{}", '"x"', "[" * 100_000, '{"result": 1}', "\ud83d"])
def test_a_damaged_sidecar_is_said_to_be_one(settings, tmp_path, text):
    (tmp_path / "a.mp4").write_text("a video")
    (tmp_path / "a.mp4.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(HforceError) as caught:
        make(settings(), tmp_path / "a.mp4", on_exists="skip")
    assert caught.value.exit_code in (65, 73)
    assert "overwrite" in caught.value.mend


# Failures


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """A disk on which no file gets beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("crf", [18, 51])  # the video does not fit; it fits, but its contact sheet does not
def test_a_full_disk_leaves_no_half_video(settings, tmp_path, crf):
    config = settings(f"video.crf={crf}")
    with full_after(6000):
        ((target, error),) = make(config, tmp_path).failed
    assert isinstance(error, WriteError)
    assert error.exit_code == 74
    assert not list(tmp_path.glob("videos/*")) + list(tmp_path.glob("meta/*")) + list(tmp_path.glob("previews/*"))
    if crf == 51:
        assert str(tmp_path / "work") in str(error)
        assert len(pictures(tmp_path / "work" / f"{target.video.stem}.part.mp4")) == 21
    assert make(config, tmp_path).made == [target]


def test_a_video_whose_record_cannot_be_written_is_withdrawn(settings, tmp_path):
    """It used to stay, and the same command then took it for somebody else's."""
    config, prompt = settings("video.contact_sheet=false", "video.crf=51"), f"{CIRCLE} {'really ' * 900}"
    with full_after(6000):
        ((target, error),) = make(config, tmp_path, prompt).failed
    assert error.exit_code == 74
    assert not target.video.exists()
    assert len(pictures(tmp_path / "work" / f"{target.video.stem}.part.mp4")) == 21
    assert make(config, tmp_path, prompt, on_exists="skip").made == [target]


def test_chunks_made_before_the_numbers_run_away_are_kept(settings, weights, tmp_path):
    model = loud(weights, tmp_path / "loud.safetensors", "color", "yellow")
    item = Item("odd", (Shot(CIRCLE, 2.25), Shot(CIRCLE.replace("red", "yellow"))), seconds=4.5)
    config = settings(f"model.checkpoint={model}")
    ((target, error),) = generate.run(config, [item], tmp_path, "error", lambda _: None).failed
    kept = tmp_path / "work" / "odd-0.part.mp4"
    told = "chunk 3 holds values that are not finite after denoising; what was made until then is in"
    assert str(error) == f"{told} {kept}"
    assert (type(error), error.exit_code) == (DataError, 65)
    assert "model.dtype=float32" in error.mend
    assert len(pictures(kept)) == 33  # chunks 0, 1 and 2
    assert not target.video.exists()
    assert not target.sidecar.exists()


def test_the_other_videos_of_a_list_are_made(settings, weights, tmp_path, caplog):
    model = loud(weights, tmp_path / "loud.safetensors", "color", "red")
    result = make(settings(f"model.checkpoint={model}"), tmp_path, CIRCLE, SQUARE)
    assert [target.video.name for target in result.made] == [f"{SQUARE}-1.mp4"]
    assert [target.video.name for target, _ in result.failed] == [f"{CIRCLE}-0.mp4"]
    assert "chunk 0 holds values that are not finite" in caplog.text


def test_a_codec_that_overflows_makes_no_black_video(settings, weights, tmp_path):
    """Frames that were no numbers used to become black ones."""
    first, *_, last = (n for n, x in load_file(weights).items() if n.startswith("codec.decoder") and x.dim() == 4)
    loud, loudest = 1e12 * load_file(weights)[first].float(), torch.full_like(load_file(weights)[last].float(), 3e38)
    loudest[:, ::2] *= -1
    loudness = {first.replace(".", "__"): loud, last.replace(".", "__"): loudest}
    model = changed(weights, tmp_path / "loud.safetensors", **loudness)
    ((target, error),) = make(settings(f"model.checkpoint={model}"), tmp_path).failed
    assert "the video frames of chunk 0 hold values that are not finite" in str(error)
    assert error.exit_code == 65
    assert not target.video.exists()


def test_a_place_that_cannot_be_is_found_out_before_the_model_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    config = load_config(overrides=[f"model.checkpoint={tmp_path / 'missing.safetensors'}"])
    for output in (tmp_path / "file" / "a.mp4", tmp_path / "file", tmp_path / "folder.mp4"):
        (tmp_path / "folder.mp4").mkdir(exist_ok=True)
        with pytest.raises(OutputError):
            make(config, output)
