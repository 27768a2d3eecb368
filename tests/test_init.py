"""Videos that start from a picture or go on from another video: from file to file, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from hforce.models.base import Codec
from hforce.models.taehv import TaehvCodec
from hforce.models.tiny import PACKAGED, TinyModel
from hforce.toy.metrics import read_frames, score
from hforce.toy.world import Scene, render, sentence
from hforce.video import FfmpegSink, upscale

PROMPT = "a red circle bouncing sideways on a green striped background"
OTHER = "a blue square circling on a purple plain background"
SCENE = Scene(
    "slow", "yellow", "square", "upper", "bouncing sideways", "first", "blue", "striped", "black", 4.0, 9.0, 1.1,
    "cross", "lower right",
)  # fmt: skip
LUMA = np.array([0.2126, 0.7152, 0.0722])


def save_video(path: Path, frames: NDArray[np.uint8], fps: int = 16) -> Path:
    with FfmpegSink(path, frames.shape[2:0:-1], fps, crf=4) as sink:
        sink.write(frames)
    return path


def frames_of(path: Path) -> NDArray[np.uint8]:
    """All frames [T, H, W, 3] of a video, decoded by PyAV."""
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def there_and_back(codec: Codec, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Video frames [T, H, W, 3] through an autoencoder."""
    video = torch.from_numpy(frames).permute(0, 3, 1, 2)[None] / 255
    decoded = codec.decoder()(codec.encode(video))
    return np.rint(decoded.permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8)


@pytest.fixture
def generate(command):
    """`hforce generate` with the model that comes with hforce: a second, in one denoising step."""
    return lambda *rest: command("generate", "--upscale", 1, "-d", "1s", "--set", "sample.steps=[1000]", *rest)


@pytest.fixture
def codec() -> Codec:
    """Its autoencoder, put together without the rest of it."""
    tiny = TinyModel.load(PACKAGED)
    return TaehvCodec(tiny.codec, tiny.latent_mean, tiny.latent_std)


@pytest.fixture
def image(tmp_path: Path) -> str:
    Image.fromarray(render(SCENE, 1)[0]).save(tmp_path / "first.png")
    return "first.png"


@pytest.fixture
def video(tmp_path: Path) -> str:
    save_video(tmp_path / "before.mp4", render(SCENE, 17))
    return "before.mp4"


# The video that comes out


def test_a_video_begins_with_the_picture_as_the_codec_gives_it_back(generate, codec, image, tmp_path):
    done = generate("-p", PROMPT, "--init-image", image, "-o", "a.mp4")
    assert done.code == 0, done.err
    assert done.err.count("\n") == 1  # a picture of the model's size is taken as it is
    expected = there_and_back(codec, render(SCENE, 1))[0]
    with Image.open(tmp_path / "a.png") as sheet:  # its first picture, without a loss
        assert np.array_equal(np.asarray(sheet)[6:70, 6:70], expected)
    assert abs(frames_of(tmp_path / "a.mp4")[0] @ LUMA - expected @ LUMA).mean() < 2


def test_a_video_begins_with_the_frames_of_the_other_as_the_codec_gives_them_back(generate, codec, video, tmp_path):
    assert generate("-p", PROMPT, "--init-video", video, "-d", "2s", "--set", "video.crf=1", "-o", "a.mp4").code == 0
    made, expected = frames_of(tmp_path / "a.mp4"), there_and_back(codec, frames_of(tmp_path / video))
    off = [[abs(frame @ LUMA - true @ LUMA).mean() for true in expected] for frame in made[:17]]
    assert np.argmin(off, axis=1).tolist() == [*range(17)]
    assert np.diag(off).max() < 2


@pytest.mark.parametrize(("given", "duration", "latents", "frames", "dropped"), [
    (1, "1s", 1, 25, 0),
    (4, "1s", 1, 25, 3),
    (5, "1s", 2, 17, 0),
    (17, "2s", 5, 41, 0),
    (20, "2s", 5, 41, 3),
    (24, "2s", 6, 33, 3),
])  # fmt: skip
def test_what_is_given_counts_towards_the_length(generate, tmp_path, given, duration, latents, frames, dropped):
    save_video(tmp_path / "before.mp4", render(SCENE, given))
    done = generate("-p", PROMPT, "--init-video", "before.mp4", "-d", duration, "-o", "a.mp4")
    assert done.code == 0, done.err
    assert len(frames_of(tmp_path / "a.mp4")) == frames
    told = json.loads((tmp_path / "a.mp4.json").read_text())
    assert (told["frames"], told["init"]["latents"], told["result"]["frames"]) == (frames, latents, frames)
    assert 3 * told["chunks"] + latents == (frames - 1) / 4 + 1
    assert (f"its last {dropped} video frames are left out" in done.err) == bool(dropped)


def test_what_comes_depends_on_what_was_given(generate, image, tmp_path):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "white.png")
    for name, init in (("one", image), ("two", "white.png")):
        assert generate("-p", PROMPT, "--init-image", init, "-o", f"{name}.mp4").code == 0
    one, two = (frames_of(tmp_path / f"{name}.mp4").astype(float) for name in ("one", "two"))
    assert (abs(one - two).mean(axis=(1, 2, 3)) > 1).all()


def test_the_prompt_changes_at_its_time_counted_from_the_beginning(generate, video, tmp_path):
    points = [{"at": "0s", "prompt": PROMPT}, {"at": "2s", "prompt": OTHER}]
    line = {"schedule": points, "duration": "4s", "init_video": video, "name": "two"}
    (tmp_path / "p.jsonl").write_text(json.dumps(line))
    assert generate("-f", "p.jsonl", "-o", "out").code == 0
    told = json.loads((tmp_path / "out" / "meta" / "two-0.json").read_text())
    # 17 frames are given; chunks begin at frame 17, 29, 41, of which 29 is nearest to 2 s.
    assert [shot["chunk"] for shot in told["schedule"]] == [0, 1]
    assert (told["chunks"], told["frames"]) == (4, 65)


def test_all_of_the_first_prompt_may_be_given(generate, video, tmp_path):
    points = [{"at": "0s", "prompt": PROMPT}, {"at": "1s", "prompt": OTHER}]
    line = {"schedule": points, "duration": "2s", "init_video": video, "name": "two"}
    (tmp_path / "p.jsonl").write_text(json.dumps(line))
    assert generate("-f", "p.jsonl", "-o", "out").code == 0
    told = json.loads((tmp_path / "out" / "meta" / "two-0.json").read_text())
    assert [shot["chunk"] for shot in told["schedule"]] == [0, 0]


@pytest.mark.parametrize("policy", ["full", "window", "sink"])
def test_every_cache_has_room_for_what_is_given(generate, tmp_path, policy):
    save_video(tmp_path / "before.mp4", render(SCENE, 101))
    options = ("--init-video", "before.mp4", "-d", "7s", "--policy", policy, "-o", "a.mp4")
    assert generate("-p", PROMPT, *options).code == 0
    assert len(frames_of(tmp_path / "a.mp4")) == 113


def test_the_trained_model_goes_on_with_what_it_is_shown(command, tmp_path):
    """Colour, shape, ground, the mark and the landmark, of which the prompt does not say the last two."""
    given = render(SCENE, 17)
    save_video(tmp_path / "world.mp4", upscale(given, 4))
    done = command("generate", "-p", sentence(SCENE.words), "--init-video", "world.mp4", "-d", "3s", "-o", "a.mp4")
    assert done.code == 0, done.err
    made = frames_of(tmp_path / "a.mp4")[:, 2::4, 2::4]
    assert abs(made[:17].astype(int) - given).mean() < 6
    after = read_frames(made[17:])
    scores = score(after, SCENE.words)
    names = ("color_right", "shape_right", "ground_right", "pattern_right", "one_object")
    means = {name: np.nanmean(getattr(scores, name)) for name in names}
    assert {name: mean for name, mean in means.items() if mean < 0.6} == {}
    assert np.mean(after.mark == SCENE.mark) > 0.8
    assert np.mean((after.landmark == SCENE.landmark) & (after.corner == SCENE.corner)) > 0.8
    # It moves on from where it was, and does not appear somewhere else.
    before = read_frames(given)
    assert np.hypot(after.x[0] - before.x[-1], after.y[0] - before.y[-1]) < 4


# Lists


def test_every_prompt_of_a_command_starts_from_the_same_picture(generate, codec, image, tmp_path):
    assert generate("-p", PROMPT, "-p", OTHER, "--init-image", image, "-o", "out").code == 0
    expected = there_and_back(codec, render(SCENE, 1))[0]
    sheets = sorted((tmp_path / "out" / "previews").iterdir())
    assert len(sheets) == 2
    for path in sheets:
        with Image.open(path) as sheet:
            assert np.array_equal(np.asarray(sheet)[6:70, 6:70], expected)


def test_a_line_of_a_prompt_file_may_say_what_its_video_starts_from(generate, image, video, tmp_path):
    lines = [{"prompt": PROMPT, "name": "a", "init_video": video}, {"prompt": PROMPT, "name": "b"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert generate("-f", "p.jsonl", "--init-image", image, "-d", "2s", "-o", "out").code == 0
    told = [json.loads((tmp_path / "out" / "meta" / f"{name}.json").read_text())["init"] for name in ("a-0", "b-1")]
    assert [(init["path"], init["is_video"], init["latents"]) for init in told] == [(video, True, 5), (image, False, 1)]
    assert generate("-f", "p.jsonl", "-d", "2s", "-o", "other").code == 0
    assert json.loads((tmp_path / "other" / "meta" / "b-1.json").read_text())["init"] is None


@pytest.mark.parametrize(("line", "told"), [
    ({"prompt": "red", "init_image": "a.png", "init_video": "a.mp4"}, "init_image and init_video exclude each other"),
    ({"prompt": "red", "init_image": 3}, "init_image: expected text, got '3'"),
    ({"prompt": "red", "init_video": " "}, "init_video: empty"),
    ({"prompt": "red", "init_imag": "a.png"}, "unknown key 'init_imag' (did you mean 'init_image'?)"),
])  # fmt: skip
def test_a_line_that_says_it_wrongly_is_told(generate, tmp_path, line, told):
    (tmp_path / "p.jsonl").write_text(json.dumps(line))
    generate("-f", "p.jsonl").fails(65, f"p.jsonl:1: {told}")


# What was made before


def test_the_same_bytes_are_done_and_other_bytes_are_not(generate, image, tmp_path):
    line = ("-p", PROMPT, "--init-image", image, "-o", "out")
    first, again = generate(*line), generate(*line)
    assert (first.code, again.code, again.out) == (0, 0, first.out)
    assert "was there already" in again.err
    made = (tmp_path / first.out.splitlines()[0]).read_bytes()
    Image.new("RGB", (64, 64), "white").save(tmp_path / image)
    generate(*line).fails(73, "exists and was not made by this very command")
    generate(*line[:2], "-o", "out").fails(73, "exists and was not made by this very command")
    assert (tmp_path / first.out.splitlines()[0]).read_bytes() == made
    assert generate(*line, "--on-exists", "overwrite").code == 0
    assert (tmp_path / first.out.splitlines()[0]).read_bytes() != made


def test_the_settings_in_a_sidecar_start_from_the_same_file(generate, video, tmp_path):
    assert generate("-p", PROMPT, "--init-video", video, "-d", "2s", "-o", "one.mp4").code == 0
    told = json.loads((tmp_path / "one.mp4.json").read_text())
    (tmp_path / "again.yaml").write_text(json.dumps({"video": told["video"]}))
    assert generate("-p", PROMPT, "-c", "again.yaml", "-d", "2s", "-o", "two.mp4").code == 0
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()


# What cannot be meant


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("rule", ["error", "skip", "overwrite"])
def test_what_a_video_starts_from_is_never_written_over(generate, tmp_path, kind, rule):
    """Not by the contact sheet of a video of its name, and not by the video itself."""
    path = tmp_path / {"image": "fox.png", "video": "fox.mp4"}[kind]
    if kind == "image":
        Image.fromarray(render(SCENE, 1)[0]).save(path)
    else:
        save_video(path, render(SCENE, 5))
    before = path.read_bytes()
    done = generate("-p", PROMPT, f"--init-{kind}", path.name, "-o", "fox.mp4", "--on-exists", rule)
    told = "a video starts from it" if rule == "overwrite" else "exists and was not made by this very command"
    done.fails(73, told)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_picture_that_a_sheet_would_replace_is_spared_or_the_sheet_left_out(generate, tmp_path):
    (tmp_path / "fox.png").write_bytes(b"a picture of somebody")
    generate("-p", PROMPT, "-o", "fox.mp4").fails(73, "fox.png exists and was not made by this very command")
    assert generate("-p", PROMPT, "-o", "fox.mp4", "--set", "video.contact_sheet=false").code == 0
    assert (tmp_path / "fox.png").read_bytes() == b"a picture of somebody"


@pytest.mark.parametrize(("options", "code", "told"), [
    (["--init-image", "first.png", "--init-video", "before.mp4"], 2, "--init-video: a video starts from a picture or"),
    (["--init-image", "gone.png"], 66, "gone.png"),
    (["--init-image", "."], 66, ". is no file"),
    (["--init-video", "gone.mp4"], 66, "gone.mp4"),
    (["--init-image", "before.mp4"], 65, "before.mp4 is no picture that can be read"),
    (["--init-video", "first.png"], 65, "a picture is given with --init-image"),
])  # fmt: skip
def test_what_it_cannot_start_from_is_told_before_a_model_is_loaded(
    generate, image, video, tmp_path, options, code, told
):
    done = generate("-p", PROMPT, *options, "-m", "missing.safetensors", "-o", "out")
    done.fails(code, told)
    assert "missing.safetensors" not in done.err
    assert len(done.err.splitlines()) <= 2
    assert not list(tmp_path.glob("out/videos/*"))


@pytest.mark.parametrize("duration", ["0.05s", "1s", "1.06s"])
def test_a_video_with_nothing_left_to_be_made_is_refused(generate, video, duration):
    done = generate("-p", PROMPT, "--init-video", video, "-d", duration, "-o", "a.mp4")
    done.fails(65, f"fills all of its {duration}", "make it longer with --duration, which counts the whole")


def test_a_configuration_that_sets_both_is_refused_with_its_line(generate, tmp_path):
    (tmp_path / "run.yaml").write_text("video:\n  init_image: a.png\n  init_video: a.mp4\n")
    generate("-p", PROMPT, "-c", "run.yaml").fails(78, "run.yaml:3: video.init_video: a video starts from a picture or")
