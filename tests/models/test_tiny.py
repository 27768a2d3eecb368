"""The tiny model: its file, its words, its codec, and loading it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.builders import close, draw

from hforce.cache.roles import load_profile
from hforce.errors import CheckpointError, ConfigError, DataError, InputError, UnavailableError
from hforce.models.base import Source
from hforce.models.registry import MODELS, find_device, load_backbone
from hforce.models.taehv import TaehvCodec
from hforce.models.tiny import EXAMPLE, PACKAGED, VOCABULARY, WORD_INDEX, TinyModel, WordEncoder, open_tiny
from hforce.models.weights import fingerprint, read_safetensors
from hforce.resources import resource
from hforce.toy.world import SLOTS, parse, sentence, vocabulary

# The file


def test_a_model_comes_back_from_its_file(random_tiny, tmp_path):
    random_tiny.save(tmp_path / "m.safetensors", torch.float32)
    again = TinyModel.load(tmp_path / "m.safetensors")
    assert (again.dit.config, again.codec.config) == (random_tiny.dit.config, random_tiny.codec.config)
    assert all(value.equal(again.state_dict()[name]) for name, value in random_tiny.state_dict().items())
    assert not again.training
    assert not any(weight.requires_grad for weight in again.parameters())


def test_generating_does_not_load_the_compiler_of_torch(tmp_path):
    """A normal draw on the meta device did, which took two seconds at every start."""
    program = (
        "import sys; from hforce import cli; sys.argv = sys.argv[:1] + ['generate', '-d', '1s', '-o', sys.argv[1]];"
        "code = cli._run(); sys.exit(code or 'torch._dynamo' in sys.modules)"
    )
    line = [sys.executable, "-c", program, str(tmp_path / "frames.mp4")]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, (tmp_path / "frames.mp4").exists()) == (0, True), done.stderr


def test_half_precision_halves_the_file_and_is_read_as_float32(weights):
    assert all(value.dtype == torch.float32 for value in TinyModel.load(weights).state_dict().values())
    count = sum(value.numel() for value in load_file(weights).values())
    assert 2 * count < weights.stat().st_size < 2 * count + 40_000


@pytest.mark.parametrize("metadata", [
    None,
    {"dit": "{}"},
    {"dit": "nonsense", "codec": "{}"},
    {"dit": "[1]", "codec": "{}"},
    {"dit": json.dumps({"dim": -5, "ffn_dim": 8, "layers": 1, "heads": 1}), "codec": "{}"},
    {"dit": json.dumps({"dim": 10**9, "ffn_dim": 10**9, "layers": 1, "heads": 1}), "codec": "{}"},
    {"dit": json.dumps({"dim": "wide", "ffn_dim": 8, "layers": 1, "heads": 1}), "codec": "{}"},
    {"dit": json.dumps({"dim": 8, "ffn_dim": 8, "layers": 1, "heads": 1, "mood": 3}), "codec": "{}"},
])  # fmt: skip
def test_a_file_that_does_not_say_its_sizes_is_refused(tmp_path, metadata):
    save_file({"a": torch.ones(2)}, tmp_path / "m.safetensors", metadata)
    with pytest.raises(CheckpointError, match="holds no tiny model"):
        TinyModel.load(tmp_path / "m.safetensors")


def test_a_file_of_other_sizes_than_it_says_is_refused(weights, tmp_path):
    state, metadata = read_safetensors(weights)
    sizes = json.loads(metadata["dit"])
    metadata["dit"] = json.dumps({**sizes, "layers": sizes["layers"] - 1})
    save_file(state, tmp_path / "m.safetensors", metadata)
    with pytest.raises(CheckpointError, match=rf"\d+ unexpected \(dit.blocks.{sizes['layers'] - 1}"):
        TinyModel.load(tmp_path / "m.safetensors")


# Words


def test_every_word_of_the_world_has_an_embedding_of_its_own():
    assert len(VOCABULARY) == len(set(VOCABULARY)) == len(WORD_INDEX) == sum(map(len, SLOTS.values()))
    assert sorted(WORD_INDEX.values()) == list(range(len(VOCABULARY)))


def test_a_prompt_is_eight_words_in_their_places(random_tiny):
    encode = WordEncoder(random_tiny.words)
    text = encode(EXAMPLE)
    assert text.shape == (1, 8, 32)
    known = parse(EXAMPLE).words
    for place, slot in enumerate(SLOTS):
        if slot in known:
            assert text[0, place].equal(random_tiny.words.weight[WORD_INDEX[slot, known[slot]]])


def test_the_order_of_the_words_does_not_matter_and_the_words_do(random_tiny):
    encode = WordEncoder(random_tiny.words)
    words = ("slow", "red", "circle", "middle", "circling", "first", "green", "plain")
    complete = sentence(dict(zip(SLOTS, words, strict=True)))
    assert encode.reads(complete) == complete
    assert not encode(complete).equal(encode(complete.replace("red", "blue")))
    assert encode(complete).equal(encode(complete.replace("a slow red circle", "the circle is slow and red:")))


def test_what_a_prompt_leaves_open_is_always_filled_in_alike(random_tiny):
    encode = WordEncoder(random_tiny.words)
    read = encode.reads("a red circle")
    assert set(parse(read).words) == set(SLOTS)
    assert (parse(read).words["color"], parse(read).words["shape"]) == ("red", "circle")
    assert read == WordEncoder(random_tiny.words).reads("a red circle")
    assert len({encode.reads("a red circle" + "!" * n) for n in range(8)}) > 1


def test_unknown_words_are_reported_once_with_the_known_ones(random_tiny, caplog):
    encode = WordEncoder(random_tiny.words)
    with caplog.at_level(logging.WARNING):
        encode("a red zebra under a palm")
        encode.reads("a red zebra under a palm")
    (record,) = caplog.records
    assert record.getMessage() == f"the tiny model does not know: zebra, under, palm. It knows\n{vocabulary()}"


@pytest.mark.parametrize("prompt", ["xyzzy", "的 красный", "!?", "a the of"])
def test_a_prompt_without_a_known_word_is_refused_with_an_example(random_tiny, prompt):
    encode = WordEncoder(random_tiny.words)
    for ask in (encode, encode.reads):
        with pytest.raises(DataError, match="knows no word of the prompt") as caught:
            ask(prompt)
        assert vocabulary() in str(caught.value)
        assert not parse(caught.value.mend.removeprefix("for example: ")).unknown


# Codec


def test_latents_are_normalised_on_the_way_in_and_back_on_the_way_out(weights):
    tiny = TinyModel.load(weights)
    plain = TaehvCodec(tiny.codec, tiny.latent_mean.clone(), tiny.latent_std.clone())
    video, latents = draw(1, 9, 3, 64, 64).sigmoid(), draw(1, 3, 12, 8, 8)
    raw, frames = plain.encode(video), plain.decoder()(latents)
    tiny.latent_mean += 2
    tiny.latent_std *= 4
    codec = TaehvCodec(tiny.codec, tiny.latent_mean, tiny.latent_std)
    close(codec.encode(video), (raw - 2) / 4)
    close(codec.decoder()((latents - 2) / 4), frames, 1e-4)
    assert (raw.shape, frames.shape, codec.stride) == ((1, 3, 12, 8, 8), (9, 3, 64, 64), 4)


def test_every_decoder_is_a_video_of_its_own(random_tiny):
    codec, latents = TaehvCodec(random_tiny.codec), draw(1, 6, 12, 8, 8)
    one, other = codec.decoder(), codec.decoder()
    first = one(latents[:, :3])
    close(other(latents[:, :3]), first)
    assert (len(first), len(one(latents[:, 3:]))) == (9, 12)


# Loading


def test_a_backbone_says_all_about_itself(weights, random_tiny):
    backbone = open_tiny(Source(str(weights)), None, "cpu", "auto").load()
    assert (backbone.name, backbone.size, backbone.shape) == ("tiny", (64, 64), (12, 8, 8))
    geometry = backbone.geometry
    assert (geometry.layers, geometry.heads, geometry.head_dim, geometry.grid) == (8, 6, 24, (8, 8))
    assert (geometry.chunk, geometry.span) == (3, 21)
    assert backbone.fingerprint == fingerprint(TinyModel.load(weights).dit)


@pytest.mark.parametrize(("size", "grid"), [((128, 128), (16, 16)), ((96, 64), (8, 12)), ((16, 32), (4, 2))])
def test_another_size_is_width_by_height(weights, size, grid):
    backbone = open_tiny(Source(str(weights)), size, "cpu", "auto").load()
    assert (backbone.size, backbone.geometry.grid) == (size, grid)
    assert backbone.codec.decoder()(torch.zeros(1, 1, *backbone.shape)).shape == (1, 3, size[1], size[0])


def test_precision_is_that_of_the_transformer_alone(weights):
    backbone = open_tiny(Source(str(weights)), None, "cpu", "bfloat16").load()
    assert {weight.dtype for weight in backbone.model.parameters()} == {torch.bfloat16}
    assert backbone.codec.decoder()(torch.zeros(1, 1, *backbone.shape)).dtype == torch.float32
    assert backbone.fingerprint == open_tiny(Source(str(weights)), None, "cpu", "auto").fingerprint


def test_an_unknown_model_names_the_known_ones():
    with pytest.raises(ConfigError, match="unknown model 'huge'") as caught:
        load_backbone("huge")
    assert "tiny" in caught.value.mend
    assert list(MODELS) == ["tiny", "wan2.1", "wan2.1-t2v-1.3b", "wan2.1-t2v-14b"]


def test_parts_that_the_tiny_model_has_itself_are_refused(weights):
    with pytest.raises(ConfigError, match=r"takes no model.base, model.vae"):
        open_tiny(Source(str(weights), base="folder", vae="taew2_1.pth", texts="texts"), None, "cpu", "auto")


@pytest.mark.parametrize("name", ["cuda:99", "mps:7"])
def test_a_device_that_is_not_there_is_said_to_be_missing(name):
    with pytest.raises(UnavailableError, match="cannot be used here") as caught:
        find_device(name)
    assert caught.value.exit_code == 69


def test_a_device_is_found():
    assert find_device("cpu") == "cpu"
    assert find_device("auto") in ("cpu", "cuda")


def test_a_missing_file_is_no_input(tmp_path):
    with pytest.raises(InputError):
        open_tiny(Source(str(tmp_path / "none.safetensors")), None, "cpu", "auto")


def test_the_packaged_profile_is_that_of_the_packaged_weights():
    backbone = load_backbone("tiny", device="cpu")
    assert PACKAGED.stat().st_size < 8 << 20
    assert load_profile(resource("profiles/tiny.json")).model.fingerprint.value == backbone.fingerprint
