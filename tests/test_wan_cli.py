"""`hforce generate` on models of the Wan2.1 family, small and random: which one -m means, and videos made with them."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import av
import pytest
import torch
import yaml
from safetensors.torch import save_file
from tests.weightfiles import diffusers, hollow_release, shapes_of, wrapped, write, write_hollow, write_shards
from torch import nn

from hforce.build import advise
from hforce.config import SampleConfig, load_config
from hforce.models.dit import CausalWan, WanConfig
from hforce.models.families import FAMILIES
from hforce.models.sizes import KNOWN
from hforce.which_model import which_model

with torch.random.fork_rng():
    torch.manual_seed(0)
    MODEL = CausalWan(WanConfig(256, 256, 2, 2, text_dim=32))
    nn.init.normal_(MODEL.head.head.weight, std=0.05)
STATE = {name: value.detach() for name, value in MODEL.state_dict().items()}
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


# Settings of a release


def advice(caplog, name: str, sample: SampleConfig) -> list[str]:
    caplog.clear()
    advise(next(family for family in FAMILIES if family.name == name), sample)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_settings_that_belong_to_a_release_are_a_line_to_paste(caplog, family):
    lines = [told.partition("give them with: ")[2] for told in advice(caplog, family.name, SampleConfig())]
    words = [word for line in lines for word in shlex.split(line) if word != "--set"]
    sample = load_config("wan2.1", overrides=words).sample
    wanted = (list(family.steps), list(family.first_steps), family.warp, family.shift)
    assert (sample.steps, sample.first_steps, sample.warp, sample.shift) == wanted
    assert [told for told in advice(caplog, family.name, sample) if "give them with" in told] == []
    assert len(lines) == bool(words) + bool(family.note)


def test_settings_that_somebody_gave_are_left_alone(caplog):
    assert len(advice(caplog, "causvid", SampleConfig())) == 1
    assert advice(caplog, "causvid", SampleConfig(shift=7.0)) == []


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
