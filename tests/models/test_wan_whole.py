"""A whole model of the Wan2.1 family out of its files, tiny and random: from a prompt to video frames."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.builders import close
from tests.weightfiles import wrapped
from torch.utils._pytree import tree_leaves

from hforce.attention.dense import BlockCausal
from hforce.attention.rope import Rope3D
from hforce.errors import CheckpointError, ConfigError, InputError
from hforce.generate import load
from hforce.memory import Mode
from hforce.models import wan
from hforce.models.base import Source
from hforce.models.dit import CausalWan, WanConfig
from hforce.models.taehv import TaehvCodec
from hforce.models.wan import LARGE, SMALL, open_wan
from hforce.models.wan_vae import WanCodec
from hforce.models.weights import fingerprint
from hforce.weigh import tensor_bytes

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from tests.wanparts import random_text_encoder, random_vae, released_text, released_vae, write_tokenizer

TAEW = load_file(Path(__file__).parent.parent / "data" / "golden" / "taehv_tiny.safetensors")
PROMPT, SIZE = "a red fox", (48, 32)


@pytest.fixture(scope="module")
def transformer() -> CausalWan:
    torch.manual_seed(0)
    return CausalWan(WanConfig(256, 128, 2, 2, text_dim=32)).eval().requires_grad_(False)


@pytest.fixture(scope="module", params=["released", "diffusers"])
def sources(request, transformer, tmp_path_factory) -> Source:
    folder = tmp_path_factory.mktemp(request.param)
    torch.save({"generator_ema": wrapped(transformer.state_dict())}, folder / "self_forcing_dmd.pt")
    text, vae = random_text_encoder(32), random_vae()
    if request.param == "released":
        write_tokenizer(folder / "google" / "umt5-xxl")
        torch.save(released_text(text), folder / "models_t5_umt5-xxl-enc-bf16.pth")
        torch.save(released_vae(vae), folder / "Wan2.1_VAE.pth")
    else:
        write_tokenizer(folder / "tokenizer")
        text.save_pretrained(folder / "text_encoder", max_shard_size="20KB")
        vae.save_pretrained(folder / "vae")
    torch.save({name[2:]: value for name, value in TAEW.items() if name.startswith("w.")}, folder / "taew2_1.pth")
    return Source(str(folder / "self_forcing_dmd.pt"), str(folder), texts=str(folder / "texts"))


@pytest.mark.parametrize("codec", [WanCodec, TaehvCodec])
def test_a_prompt_becomes_video_frames(sources, transformer, codec):
    if codec is TaehvCodec:
        sources = replace(sources, vae=f"{sources.base}/taew2_1.pth")
    made = open_wan("", sources, SIZE, "cpu", "float32").load()
    assert isinstance(made.codec, codec)
    assert (made.name, made.family.name) == (SMALL, "self-forcing")
    assert (made.shape, made.geometry.grid, made.fingerprint) == ((16, 4, 6), (2, 3), fingerprint(transformer))
    made.encode_text.encode_all([PROMPT])
    text = made.model.project_text(made.encode_text(PROMPT))
    latents, t = torch.randn(1, 3, *made.shape), torch.tensor([[1000.0, 500.0, 0.0]])
    attend = BlockCausal(Rope3D(made.geometry.grid, made.geometry.head_dim), [3])
    flow = made.model(latents, t, text, attend)
    close(flow, transformer(latents, t, text, attend), 1e-5)
    frames = made.codec.decoder()(flow)
    assert frames.shape == (9, 3, 32, 48)
    assert bool(torch.isfinite(frames).all())
    assert made.codec.encode(frames[None]).shape == latents.shape


def test_precision_on_a_cpu_is_float32_but_that_of_texts_is_as_stored(sources):
    made = open_wan(SMALL, sources, SIZE, "cpu", "auto").load()
    assert {weight.dtype for weight in made.model.parameters()} == {torch.float32}
    assert made.encode_text(PROMPT).dtype == torch.bfloat16
    half = open_wan(SMALL, sources, SIZE, "cpu", "bfloat16").load()
    assert {weight.dtype for weight in half.model.parameters()} == {torch.bfloat16}
    assert half.fingerprint == made.fingerprint


def test_faults_are_found_before_weights_are_read(sources, monkeypatch, tmp_path):
    monkeypatch.setattr(wan, "load_transformer", None)
    with pytest.raises(ConfigError, match="50x32 will not do"):
        open_wan(SMALL, sources, (50, 32), "cpu", "auto")
    with pytest.raises(InputError, match="no folder of Wan2.1"):
        open_wan(SMALL, replace(sources, base=str(tmp_path)), SIZE, "cpu", "auto")
    with pytest.raises(InputError, match="there is no"):
        open_wan(SMALL, replace(sources, checkpoint="gone.pt"), SIZE, "cpu", "auto")
    with pytest.raises(ConfigError, match="needs the weights of its transformer") as caught:
        open_wan(SMALL, replace(sources, checkpoint=""), SIZE, "cpu", "auto")
    assert "-m PATH" in caught.value.mend
    with pytest.raises(ConfigError, match="is a transformer alone") as caught:
        open_wan(SMALL, replace(sources, base=""), SIZE, "cpu", "auto")
    assert "--set model.base=FOLDER" in caught.value.mend
    with pytest.raises(CheckpointError, match=r"is no wan2.1-t2v-14b, but a transformer of 2 layers x 2 heads"):
        open_wan(LARGE, sources, SIZE, "cpu", "auto")


def test_a_folder_with_all_parts_needs_no_base(sources):
    made = open_wan("", Source(sources.base, vae=f"{sources.base}/taew2_1.pth"), SIZE, "cpu", "auto").load()
    assert isinstance(made.codec, TaehvCodec)


@pytest.mark.parametrize("codec", [WanCodec, TaehvCodec])
def test_every_memory_mode_holds_what_was_planned(sources, codec, tmp_path):
    if codec is TaehvCodec:
        sources = replace(sources, vae=f"{sources.base}/taew2_1.pth")
    flows = []
    for mode in Mode:
        blueprint = open_wan("", replace(sources, texts=str(tmp_path / mode)), SIZE, "cpu", "bfloat16")
        made, needs = load(blueprint, mode, [PROMPT]), blueprint.needs
        assert tensor_bytes(made.model) == needs.transformer
        assert tensor_bytes(made.encode_text) == (needs.text if mode is Mode.SPEED else 0)
        decoder = made.codec.decoder()
        flows.append(torch.cat([decoder(torch.ones(1, 3, *made.shape)) for _ in range(2)]))
        kept = [x for x in tree_leaves(decoder.memory) if isinstance(x, torch.Tensor)]
        assert sum(x.nbytes for x in kept) == needs.decoder
        held = 0 if mode is Mode.LOW else tensor_bytes(made.codec.net)
        assert held == (0 if mode is Mode.LOW else needs.codec)
    assert flows[0].equal(flows[1])
    assert flows[0].equal(flows[2])
