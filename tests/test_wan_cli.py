"""`hforce generate` on models of the Wan2.1 family, small and random: which one -m means, and videos made with them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.weightfiles import diffusers, hollow_release, shapes_of, wrapped, write, write_hollow, write_shards
from torch import nn

from hforce.build import choose_family
from hforce.models.checkpoints import open_checkpoint
from hforce.models.dit import CausalWan, WanConfig
from hforce.models.families import find_family
from hforce.models.sizes import KNOWN
from hforce.models.wan import load_codec
from hforce.models.weights import fingerprint, fingerprint_of
from hforce.which_model import which_model

with torch.random.fork_rng():
    torch.manual_seed(0)
    MODEL = CausalWan(WanConfig(256, 256, 2, 2, text_dim=32))
    nn.init.normal_(MODEL.head.head.weight, std=0.05)
STATE = {name: value.detach() for name, value in MODEL.state_dict().items()}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FORMATS = {
    "self_forcing.pt": lambda path: torch.save({"generator_ema": wrapped(STATE)}, path),
    "bare.safetensors": lambda path: write(STATE, path),
    "diffusers.safetensors": lambda path: write(diffusers(STATE), path),
    "folder": lambda path: write_shards(STATE, path),
}
"""Names of files and folders -> what writes a transformer there."""


# Which model


@pytest.mark.parametrize("name", ["tiny", "wan2.1", "wan2.1-t2v-1.3b", "wan2.1-t2v-14b"])
def test_the_name_of_a_preset_brings_its_settings(command, name, tmp_path):
    (tmp_path / name).mkdir()  # a name means the preset, whatever lies about
    told = yaml.safe_load(command("generate", "-m", name, "--print-config").out)
    assert (told["model"]["name"], told["model"]["checkpoint"]) == (name, "")
    own = (["", "keep", 4] if name == "tiny" else ["832x480", "recache", 1])
    assert [told["model"]["size"], told["cache"]["switch"], told["video"]["upscale"]] == own


def test_a_file_is_told_by_its_content_and_not_by_its_name(command, weights, tmp_path):
    (tmp_path / "wan2.1.safetensors").write_bytes(weights.read_bytes())
    for name, make in FORMATS.items():
        make(tmp_path / name)
    save_file({"a": torch.ones(1)}, tmp_path / "tiny.safetensors", {"dit": "{}"})
    (tmp_path / "empty.pt").touch()
    found = dict.fromkeys((*FORMATS, "tiny.safetensors", "empty.pt"), "wan2.1") | {"wan2.1.safetensors": "tiny"}
    for name, model in found.items():
        told = yaml.safe_load(command("generate", "-m", name, "--print-config").out)["model"]
        assert (told["name"], told["checkpoint"]) == (model, name)
    assert which_model("gone.pt") == ("tiny", "", "gone.pt")
    assert which_model("huge") == ("tiny", "huge", "")
    assert which_model("a" * 5000) == ("tiny", "a" * 5000, "")
    assert which_model("") == ("tiny", "", "")


def test_the_14b_model_is_known_by_its_width(command, tmp_path, monkeypatch):
    write_hollow(shapes_of(KNOWN["Wan2.1 14B"]), tmp_path / "large.safetensors")
    base = f"model.base={hollow_release(tmp_path / 'base')}"
    monkeypatch.setitem(sys.modules, "ftfy", None)
    line = ("-q", "generate", "-p", "a fox", "--set", base, "-o", "out")
    command(*line, "-m", "large.safetensors").fails(69, "ftfy")  # looked for before weights are read
    named = ("--set", "model.checkpoint=large.safetensors")
    command(*line, "-m", "wan2.1-t2v-14b", *named).fails(69, "ftfy")
    command(*line, "-m", "wan2.1-t2v-1.3b", *named).fails(65, "is no wan2.1-t2v-1.3b", "that it is, wan2.1-t2v-14b")
    named = ("-m", "large.safetensors", "--set", "model.name=wan2.1-t2v-1.3b")
    command(*line, *named).fails(65, "is no wan2.1-t2v-1.3b")


def diffusers_root(path: Path) -> None:
    (path / "transformer").mkdir(parents=True)
    write_shards(diffusers(STATE), path / "transformer")


EVERY = {  # name of a file or folder -> what writes a transformer there, and what it is recognised as
    "self_forcing.pt": (FORMATS["self_forcing.pt"], "self-forcing"),
    "trained.pt": (lambda path: torch.save({"generator": wrapped(STATE), "generator_ema": wrapped(STATE), "critic": {}},
                                           path), "self-forcing"),
    "causal.pt": (lambda path: torch.save({"generator": wrapped(STATE), "generator_ema": wrapped(STATE)}, path),
                  "self-forcing-style"),
    "rolling.pt": (lambda path: torch.save({"generator_ema": wrapped(STATE, "model._fsdp_wrapped_module."),
                                            "generator": {}}, path), "self-forcing-style"),
    "causvid.pt": (lambda path: torch.save({"generator": wrapped(STATE)}, path), "self-forcing-style"),
    "flat.safetensors": (lambda path: write(wrapped(STATE), path), "self-forcing-style"),
    "bare.safetensors": (FORMATS["bare.safetensors"], "wan2.1"),
    "comfy.safetensors": (lambda path: write(wrapped(STATE, "diffusion_model."), path), "wan2.1"),
    "original": (FORMATS["folder"], "wan2.1"),
    "diffusers.safetensors": (FORMATS["diffusers.safetensors"], "wan2.1-diffusers"),
    "diffusers": (diffusers_root, "wan2.1-diffusers"),
}  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_a_dry_run_of_every_format_names_family_size_settings_memory_and_fingerprint(command, name, tmp_path):
    make, family = EVERY[name]
    make(tmp_path / name)
    hollow_release(tmp_path / "base")
    line = ("-q", "generate", "-m", name, "--set", "model.base=base", "--roles", "uniform", "--size", "32x48")
    done = command(*line, "-p", "a fox", "-d", "1s", "--dry-run")
    assert done.code == 0, done.err
    c = MODEL.config
    wanted = (f"release      {family}, as", f"{c.layers} layers x {c.heads} heads x {c.head_dim}", "32x48 pixels",
              "steps [1000, 750, 500, 250]", "memory (GiB)", "available on cpu", fingerprint(MODEL))  # fmt: skip
    assert [text for text in wanted if text not in done.out] == []


def test_a_dry_run_of_longlive_names_the_fingerprint_of_what_is_merged(command, tmp_path):
    torch.save({"generator": wrapped(STATE)}, tmp_path / "base.pt")
    wide, module = MODEL.config.dim, "base_model.model.blocks.0.self_attn.q.lora"
    write({f"{module}_A.weight": torch.ones(2, wide), f"{module}_B.weight": torch.ones(wide, 2)}, tmp_path / "lora")
    hollow_release(tmp_path / "base")
    line = ("-q", "generate", "-m", "base.pt", "--set", "model.lora=lora", "--set", "model.base=base", "--dry-run")
    done = command(*line, "--roles", "uniform", "--size", "32x48", "-p", "a fox", "-d", "1s")
    assert done.code == 0, done.err
    merged = open_checkpoint(tmp_path / "base.pt", tmp_path / "lora")
    assert "release      longlive, as" in done.out
    assert fingerprint_of(merged.state) in done.out and fingerprint(MODEL) not in done.out


# What is missing


def test_what_is_missing_is_told_with_a_way_out(command, tmp_path, monkeypatch):
    FORMATS["self_forcing.pt"](tmp_path / "x.pt")
    line = ("-q", "generate", "-p", "a fox", "--roles", "uniform", "-o", "out")
    command(*line, "-m", "wan2.1-t2v-1.3b").fails(2, "needs the weights of its transformer", "-m PATH")
    command(*line, "-m", "x.pt").fails(2, "is a transformer alone", "--set model.base=FOLDER")
    command(*line, "-m", "x.pt", "--set", "model.base=gone").fails(66, "there is no file or folder gone")
    command(*line, "-m", "x.pt", "--set", f"model.base={'a' * 5000}").fails(66, "there is no file or folder a")
    command(*line, "-m", "x.pt", "--set", "model.base=.").fails(66, "looked in vain for its text encoder")
    hollow_release(tmp_path / "base")
    monkeypatch.setitem(sys.modules, "ftfy", None)
    done = command(*line, "-m", "x.pt", "--set", "model.base=base")
    done.fails(69, "not installed: ftfy", 'pip install "hforce[wan]"')
    assert not (tmp_path / "out" / "videos" / "a fox-0.mp4").exists()


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The hub's cache with a repository of one commit, which `main` is."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "models--org--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    return folder / "snapshots" / COMMIT


def test_a_name_on_the_hub_is_a_model_of_the_family(command):
    for name in ("org/name", "org/name:w.pt", "org/name@v2:w.pt"):
        assert which_model(name) == ("wan2.1", "", name)
    told = command("generate", "-m", "org/name", "--revision", "v2", "--offline", "--device", "cpu", "--print-config")
    model = yaml.safe_load(told.out)["model"]
    assert (model["name"], model["checkpoint"]) == ("wan2.1", "org/name")
    assert (model["revision"], model["offline"], model["device"]) == ("v2", True, "cpu")


@pytest.mark.parametrize(("options", "told"), [
    (["-m", "org/other"], "hf download org/other"),
    (["-m", "org/name:w.pt", "--revision", "v2"], "hf download org/name w.pt --revision v2"),
    (["-m", "org/name@v2:w.pt"], "hf download org/name w.pt --revision v2"),
])  # fmt: skip
def test_offline_what_is_not_cached_is_69(command, hub, tmp_path, options, told):
    done = command("generate", *options, "--offline", "-p", "a fox", "-o", "out")
    done.fails(69, f"offline, and not in the cache {tmp_path / 'cache'}", told)


# Settings of a release


def test_the_release_is_the_one_that_was_named(caplog):
    style, plain = find_family("self-forcing-style"), find_family("self-forcing")
    assert choose_family("", style) is style
    assert choose_family("causvid", style).recipe.steps == (1000, 757, 522)
    assert caplog.text == ""
    assert choose_family("causvid", plain).name == "causvid"
    assert "taken for causvid, as model.release says; it looks like self-forcing" in caplog.text


def test_a_release_that_is_not_known_names_the_nearest(command):
    line = ("generate", "-m", "wan2.1", "-p", "a fox", "--set")
    command(*line, "model.release=causvit").fails(2, "model.release: unknown 'causvit' (did you mean 'causvid'?)")
    command("generate", "-p", "red", "--set", "model.release=causvid").fails(2, "the model is of no release")


def test_a_configuration_says_what_is_left_to_the_release(command):
    told = command("generate", "-m", "wan2.1", "--set", "model.release=causvid", "--print-config").out
    assert "as causvid has it" in told
    assert "steps: [1000, 757, 522], first_steps: [], warp: false, shift: 8.0, chunk: 3" in told
    assert yaml.safe_load(told)["sample"]["steps"] is None
    told = command("generate", "--set", "sample.shift=3", "--print-config").out
    assert "steps: [1000, 750, 500, 250], first_steps: [], warp: true, shift: 5.0, chunk: 3" in told
    assert yaml.safe_load(told)["sample"]["shift"] == 3.0


# Videos


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A release as Wan2.1 was released, without its transformer."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    pytest.importorskip("ftfy")
    from tests.wanparts import random_text_encoder, random_vae, released_text, released_vae, write_tokenizer

    folder = tmp_path_factory.mktemp("base")
    write_tokenizer(folder / "google" / "umt5-xxl")
    width = STATE["text_embedding.0.weight"].shape[1]
    torch.save(released_text(random_text_encoder(width)), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(released_vae(random_vae()), folder / "Wan2.1_VAE.pth")
    return folder


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_checkpoint_becomes_a_video_of_the_exact_length(command, base, tmp_path, name):
    FORMATS[name](tmp_path / name)
    options = ["-d", "1s", "--size", "32x32", "--set", "cache.roles=uniform", "--set", f"model.base={base}"]
    done = command("generate", "-m", name, *options, "--set", "model.texts=texts", "-p", "a red fox", "-o", "out")
    assert done.code == 0, done.err
    video = tmp_path / done.out.splitlines()[0]
    with av.open(video) as container:
        assert sum(1 for _ in container.decode(video=0)) == 21  # 1 s is 5 latent frames, two chunks are 6
        assert (container.streams.video[0].width, container.streams.video[0].height) == (32, 32)
    told = json.loads((tmp_path / "out" / "meta" / f"{video.stem}.json").read_text())
    assert (told["model"]["name"], told["model"]["checkpoint"], told["frames"]) == ("wan2.1", name, 21)
    assert len(list((tmp_path / "texts").iterdir())) == 1
    assert f"hforce: {'self-forcing' if name.endswith('.pt') else 'wan2.1'}" in done.err


def test_a_release_that_was_named_brings_its_settings_but_those_given(command, base, tmp_path):
    FORMATS["bare.safetensors"](tmp_path / "student.safetensors")
    options = ["-d", "1s", "--size", "32x48", "--set", "cache.roles=uniform", "--set", f"model.base={base}"]
    options += ["--set", "model.release=causal-forcing-2step", "--set", "sample.shift=3", "--policy", "window"]
    done = command("generate", "-v", "-m", "student.safetensors", *options, "-p", "a red fox", "-o", "a.mp4")
    assert done.code == 0, done.err
    assert "streaming as causal-forcing-2step" in done.err
    told = json.loads((tmp_path / "a.mp4.json").read_text())
    assert told["release"] == {"name": "causal-forcing-2step", "window": 0, "sink": 0}
    wanted = {"steps": [1000, 500], "first_steps": [1000, 750, 500, 250], "warp": True, "shift": 3.0, "chunk": 1}
    assert {name: told["sample"][name] for name in wanted} == wanted
    assert (told["chunks"], told["frames"], told["size"]) == (5, 17, [32, 48])


def test_a_model_of_the_hub_is_kept_with_its_commit_in_the_sidecar(command, base, hub, tmp_path):
    write(STATE, hub / "w.safetensors")
    line = ["--offline", "-d", "1s", "--size", "32x32", "--set", "cache.roles=uniform", "--set", f"model.base={base}"]
    done = command("generate", "-m", "org/name:w.safetensors", *line, "-p", "a red fox", "-o", "a.mp4")
    assert done.code == 0, done.err
    told = json.loads((tmp_path / "a.mp4.json").read_text())
    assert told["model"]["checkpoint"] == f"org/name@{COMMIT}:w.safetensors"
    again = command("generate", "-m", told["model"]["checkpoint"], *line, "-p", "a red fox", "-o", "a.mp4")
    assert "was there already" in again.err
@pytest.fixture
def wan(command, base, tmp_path):
    """`hforce generate` on the small model: a second, in one denoising step."""
    write(STATE, tmp_path / "bare.safetensors")
    own = ["-m", "bare.safetensors", "-d", "1s", "--set", "sample.steps=[1000]", "--set", "model.texts=texts"]
    own += ["--roles", "uniform", "-p", "a red fox", "-q"]
    return lambda *rest: command("generate", *own, "--set", f"model.base={base}", *rest)


def release_with_taew(base: Path, folder: Path, name: str) -> Path:
    """The same release with a small TAEHV in it."""
    recorded = load_file(Path(__file__).parent / "data" / "golden" / "taehv_tiny.safetensors")
    shutil.copytree(base, folder)
    (folder / name).parent.mkdir(exist_ok=True)
    state = {key.removeprefix("w."): value for key, value in recorded.items() if key.startswith("w.")}
    (torch.save if name.endswith(".pth") else save_file)(state, folder / name)
    return folder


def frames_of(path: Path) -> np.ndarray:
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("name", ["taew2_1.pth", "vae/taew2_1.safetensors"])
def test_the_tiny_autoencoder_is_asked_for_by_a_word(wan, base, tmp_path, name):
    release = release_with_taew(base, tmp_path / "release", name)
    options = ("--size", "32x32", "--set", "model.base=release")
    for vae, output in ((), "own.mp4"), (("--vae", "tiny"), "word.mp4"), (("--vae", release / name), "path.mp4"):
        done = wan(*options, *vae, "-o", output)
        assert done.code == 0, done.err
    own, word, path = ((tmp_path / f"{name}.mp4").read_bytes() for name in ("own", "word", "path"))
    assert word == path != own


def test_a_tiny_autoencoder_that_is_not_there_is_told_with_its_origin(wan, base):
    done = wan("--vae", "tiny", "-o", "a.mp4")
    done.fails(66, f"no tiny autoencoder in {base}", "vae/taew2_1.pth", "madebyollin/taehv", "--vae FILE")
    wan("--vae", "gone.pth", "-o", "a.mp4").fails(66, "there is no file or folder gone.pth")


def test_the_tiny_model_takes_no_other_autoencoder(command):
    command("generate", "-p", "red", "--vae", "tiny").fails(2, "the tiny model takes no model.vae")
    command("profile", "--vae", "tiny").fails(2, "the tiny model takes no model.vae")


@pytest.mark.parametrize("vae", [(), ("--vae", "tiny")], ids=["own", "tiny"])
@pytest.mark.parametrize("size", [(64, 48), (48, 64)])
def test_a_wan_model_starts_from_a_picture_and_goes_on_from_a_video(wan, base, tmp_path, vae, size):
    release_with_taew(base, tmp_path / "release", "taew2_1.pth")
    picture = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "first.png")
    shape = ("--size", f"{size[0]}x{size[1]}", "--set", "model.base=release", *vae)
    assert wan(*shape, "--init-image", "first.png", "-o", "a.mp4").code == 0
    codec = load_codec(tmp_path / "release" / ("taew2_1.pth" if vae else "Wan2.1_VAE.pth"), torch.float32, "cpu")
    video = torch.from_numpy(picture).permute(2, 0, 1)[None, None] / 255
    expected = codec.decoder()(codec.encode(video))[0].permute(1, 2, 0).numpy() * 255
    made = frames_of(tmp_path / "a.mp4")
    assert made.shape == (25, size[1], size[0], 3)
    with Image.open(tmp_path / "a.png") as sheet:  # its first picture, without a loss
        shown = np.asarray(sheet)[6 : 6 + size[1], 6 : 6 + size[0]]
    assert np.array_equal(shown, np.rint(expected))
    assert wan(*shape, "--init-video", "a.mp4", "-d", "2s", "-o", "b.mp4").code == 0
    assert frames_of(tmp_path / "b.mp4").shape == (37, size[1], size[0], 3)
    assert json.loads((tmp_path / "b.mp4.json").read_text())["init"]["latents"] == 7
