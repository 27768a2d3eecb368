"""Transformers in every file they go round in: recognised, equal, and loaded whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.weightfiles import diffusers, shapes_of, small_wan, wrapped, write, write_config, write_hollow, write_shards
from torch import Tensor

from hforce.errors import CheckpointError
from hforce.models.checkpoints import load_transformer, open_checkpoint
from hforce.models.dit import CausalWan, WanConfig
from hforce.models.sizes import KNOWN
from hforce.models.weights import fingerprint, fingerprint_of

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
FSDP, CHECKPOINTED, COMPILED = "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."
DIFFUSERS_CONFIG = {
    "_class_name": "WanTransformer3DModel", "_diffusers_version": "0.33.0.dev0", "added_kv_proj_dim": None,
    "attention_head_dim": 128, "cross_attn_norm": True, "eps": 1e-06, "ffn_dim": 512, "freq_dim": 16, "image_dim": None,
    "in_channels": 4, "num_attention_heads": 2, "num_layers": 2, "out_channels": 4, "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024, "text_dim": 8,
}  # fmt: skip


@cache
def model() -> CausalWan:
    return small_wan()


@cache
def state() -> dict[str, Tensor]:
    return dict(model().state_dict())


@cache
def other() -> dict[str, Tensor]:
    """Weights that lie in the same file and are not the ones to take."""
    return dict(small_wan(seed=1).state_dict())


def pickled(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def self_forcing(folder: Path) -> Path:
    return pickled({"generator_ema": wrapped(state())}, folder / "self_forcing_dmd.pt")


def self_trained(folder: Path) -> Path:
    ema = wrapped(state(), inside=FSDP)
    content = {"generator": wrapped(other()), "generator_ema": ema, "critic": wrapped(other()), "step": 600}
    return pickled(content, folder / "model.pt")


def rolling_forcing(folder: Path) -> Path:
    ema = wrapped(state(), f"model.{FSDP}")
    return pickled({"generator": wrapped(other()), "generator_ema": ema}, folder / "rolling_forcing_dmd.pt")


def causvid(folder: Path) -> Path:
    return pickled({"generator": wrapped(state(), inside=CHECKPOINTED)}, folder / "model.pt")


def flat_pickle(folder: Path) -> Path:
    return pickled(wrapped(state(), f"{COMPILED}model."), folder / "w.pt")


def safetensors_called_pt(folder: Path) -> Path:
    return write(wrapped(state()), folder / "w.pt")


def original(folder: Path) -> Path:
    write(state(), folder / "Wan2.1" / "diffusion_pytorch_model.safetensors")
    (folder / "Wan2.1" / "Wan2.1_VAE.pth").write_bytes(b"not looked at")
    write_config(folder / "Wan2.1", model().config)
    return folder / "Wan2.1"


def original_shards(folder: Path) -> Path:
    write_config(folder, model().config)
    return write_shards(state(), folder)


def causal_folder(folder: Path) -> Path:
    write_config(folder, model().config, _class_name="CausalWanModel")
    return write_shards(state(), folder)


def diffusers_root(folder: Path) -> Path:
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(DIFFUSERS_CONFIG))
    write_shards(diffusers(state()), folder / "transformer")
    return folder


def diffusers_folder(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(DIFFUSERS_CONFIG))
    write(diffusers(state()), folder / "diffusion_pytorch_model.safetensors")
    return folder


def diffusers_file(folder: Path) -> Path:
    return write(diffusers(state()), folder / "w.safetensors")


def one_file(folder: Path) -> Path:
    return write(wrapped(state(), "model.diffusion_model."), folder / "w.safetensors")


def training_folder(folder: Path) -> Path:
    self_trained(folder)
    return folder


FORMATS: list[tuple[Callable[[Path], Path], str, str]] = [
    (self_forcing, "self-forcing", "generator_ema"),
    (self_trained, "self-forcing", "generator_ema"),
    (training_folder, "self-forcing", "generator_ema"),
    (rolling_forcing, "self-forcing-style", "generator_ema"),
    (causvid, "self-forcing-style", "generator"),
    (flat_pickle, "self-forcing-style", ""),
    (safetensors_called_pt, "self-forcing-style", ""),
    (causal_folder, "self-forcing-style", ""),
    (original, "wan2.1", ""),
    (original_shards, "wan2.1", ""),
    (one_file, "wan2.1", ""),
    (diffusers_root, "wan2.1-diffusers", ""),
    (diffusers_folder, "wan2.1-diffusers", ""),
    (diffusers_file, "wan2.1-diffusers", ""),
]


@pytest.mark.parametrize(("file", "family", "member"), FORMATS, ids=[file.__name__ for file, *_ in FORMATS])
def test_the_same_weights_are_found_in_every_file(file, family, member, tmp_path):
    path = file(tmp_path)
    found = open_checkpoint(path)
    assert (found.family.name, found.member, found.path) == (family, member, path)
    assert (found.dtype, found.bytes) == (torch.float32, sum(value.nbytes for value in state().values()))
    assert found.config == replace(model().config, text_len=found.config.text_len)
    assert list(found.state) != [] and set(found.state) == set(state())
    assert all(found.state[name].equal(value) for name, value in state().items())
    assert fingerprint_of(found.state) == fingerprint(model())


def test_only_a_config_tells_the_length_of_texts(tmp_path):
    assert open_checkpoint(self_forcing(tmp_path)).config.text_len == 512
    assert open_checkpoint(original(tmp_path)).config.text_len == model().config.text_len


@pytest.mark.parametrize("name", ["tiny24", "tiny128"])
def test_weights_of_the_reference_load_from_a_folder(name, tmp_path):
    told = json.loads((GOLDEN / "index.json").read_text())["configs"][name]
    golden = load_file(GOLDEN / f"{name}.weights.safetensors")
    write(golden, tmp_path / "w.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "CausalWanModel", **told}))
    loaded = load_transformer(open_checkpoint(tmp_path), torch.float32, "cpu")
    assert (loaded.config.heads, loaded.config.text_len) == (told["num_heads"], told["text_len"])
    assert all(value.equal(golden[key].float()) for key, value in loaded.state_dict().items())


def test_a_model_is_loaded_for_inference_and_leaves_the_file_alone(tmp_path):
    path = diffusers_file(tmp_path)
    before = path.read_bytes()
    found = open_checkpoint(path)
    loaded = load_transformer(found, torch.float32, "cpu")
    assert not loaded.training and not any(weight.requires_grad for weight in loaded.parameters())
    assert all(value.equal(state()[name]) for name, value in loaded.state_dict().items())
    loaded.order_heads([[1, 0], [1, 0]])
    assert not loaded.blocks[0].self_attn.q.weight.equal(state()["blocks.0.self_attn.q.weight"])
    assert fingerprint_of(found.state) == fingerprint(model())
    assert path.read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_precision_of_the_model_is_chosen_when_it_is_loaded(dtype, tmp_path):
    loaded = load_transformer(open_checkpoint(self_forcing(tmp_path)), dtype, "cpu")
    assert all(value.equal(state()[name].to(dtype)) for name, value in loaded.state_dict().items())


def test_a_file_in_bfloat16_has_the_same_fingerprint(tmp_path):
    half = {name: value.bfloat16() for name, value in state().items()}
    half["head.modulation"] = half["head.modulation"].float()  # Diffusers keeps some in float32
    found = open_checkpoint(write(wrapped(half), tmp_path / "w.safetensors"))
    assert found.dtype == torch.bfloat16
    assert fingerprint_of(found.state) == fingerprint(model())
    assert fingerprint(load_transformer(found, torch.bfloat16, "cpu")) == fingerprint(model())


def test_tensors_that_do_not_lie_on_whole_words_are_read(tmp_path):
    path = write(wrapped(state()), tmp_path / "w.safetensors")
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes((end - 7).to_bytes(8, "little") + data[8:end] + b" " + data[end:])
    found = open_checkpoint(path)
    assert all(found.state[name].equal(value) for name, value in state().items())


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize(("size", "prefix", "family"), [
    ("Wan2.1 1.3B", "", "wan2.1"), ("Wan2.1 14B", "", "wan2.1"),
    ("Wan2.1 1.3B", "model.", "self-forcing-style"), ("Wan2.1 14B", "model.", "krea-realtime-14b"),
])  # fmt: skip
def test_files_of_full_size_are_described_without_memory_for_them(size, prefix, family, tmp_path):
    shapes = {prefix + name: shape for name, shape in shapes_of(KNOWN[size]).items()}
    path = write_hollow(shapes, tmp_path / "w.safetensors")  # 14B: 28.6 GB, that take no room on the disk
    before = resident()
    found = open_checkpoint(path)
    assert (found.family.name, found.config, found.dtype) == (family, KNOWN[size], torch.bfloat16)
    assert found.bytes == 2 * sum(prod(shape) for shape in shapes.values())
    assert found.state["head.head.bias"].eq(0).all()
    assert resident() - before < 100 * 2**20


# What does not fit


def refused(weights: dict[str, Tensor], folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(write(weights, folder / "w.safetensors"))
    assert caught.value.exit_code == 65
    assert str(folder / "w.safetensors") in str(caught.value)
    assert caught.value.mend
    return caught.value


def test_missing_and_surplus_tensors_are_counted_and_the_nearest_named(tmp_path):
    weights = state() | {f"x{number}": torch.ones(1) for number in range(9)}
    weights["blocks.1.self_attn.query.weight"] = weights.pop("blocks.1.self_attn.q.weight")
    del weights["head.modulation"]
    told = str(refused(weights, tmp_path))
    assert "2 missing (blocks.1.self_attn.q.weight, head.modulation)" in told
    assert "10 surplus (blocks.1.self_attn.query.weight, perhaps blocks.1.self_attn.q.weight, x0, x1, x2, x3)" in told


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path):
    told = str(refused(state() | {"blocks.1.ffn.2.bias": torch.ones(7)}, tmp_path))
    assert "1 of another shape (blocks.1.ffn.2.bias [7] instead of [256])" in told


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("in_pickle", [False, True])
def test_quantised_weights_are_refused_by_their_kind(dtype, in_pickle, tmp_path):
    weights = {name: value.to(dtype) if value.dim() == 2 else value for name, value in state().items()}
    path = tmp_path / "w"
    pickled({"generator": weights}, path) if in_pickle else write(weights, path)
    with pytest.raises(CheckpointError, match=str(dtype).removeprefix("torch.")) as caught:
        open_checkpoint(path)
    assert "tensors are quantised" in str(caught.value)
    assert "bfloat16" in caught.value.mend


@pytest.mark.parametrize(("value", "dtype"), [
    (torch.nan, torch.float32), (torch.inf, torch.bfloat16), (1e6, torch.float16),
])  # fmt: skip
def test_weights_that_are_not_finite_are_named_when_loaded(value, dtype, tmp_path):
    weights = {name: tensor.clone() for name, tensor in state().items()}
    weights["blocks.1.ffn.0.weight"][3, 5] = value
    found = open_checkpoint(write(weights, tmp_path / "w.safetensors"))
    with pytest.raises(CheckpointError, match=r"1 tensors are not finite .*blocks\.1\.ffn\.0\.weight"):
        load_transformer(found, dtype, "cpu")


def test_two_names_of_one_tensor_are_refused(tmp_path):
    assert "1 tensors twice" in str(refused(state() | {"model.head.modulation": torch.ones(1)}, tmp_path))


def test_a_gap_in_the_blocks_is_seen(tmp_path):
    weights = {name.replace("blocks.1.", "blocks.7."): value for name, value in state().items()}
    assert "2 blocks, but they are numbered up to 7" in str(refused(weights, tmp_path))


@pytest.mark.parametrize(("shapes", "told"), [
    ({"blocks.0.attn.lora_A.weight": (4, 8)}, "adapter"),
    ({"blocks.0.attn.lora_down.weight": (4, 8)}, "adapter"),
    ({"token_embedding.weight": (8, 8), "blocks.0.attn.q.weight": (8, 8)}, "text encoder"),
    ({"encoder.conv1.weight": (8, 3), "decoder.conv1.weight": (3, 8)}, "autoencoder"),
    ({"double_blocks.0.img_attn.qkv.weight": (8, 8)}, "something else"),
    ({}, "it holds no tensors"),
])  # fmt: skip
def test_what_is_no_transformer_is_called_what_it_is(shapes, told, tmp_path):
    path = write_hollow(shapes, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=told):
        open_checkpoint(path)


SMALL = WanConfig(256, 512, 2, 2, 8, in_channels=16, out_channels=16, freq_dim=16)


@pytest.mark.parametrize(("config", "told"), [
    (replace(SMALL, in_channels=36), "takes 36 channels and gives 16: an image-to-video"),
    (replace(SMALL, dim=3072, heads=24, in_channels=48, out_channels=48), "Wan2.2 5B"),
    (replace(KNOWN["Wan2.1 1.3B"], layers=20), "of 20 layers x 12 heads.*Wan2.1 1.3B is of 30 layers x 12 heads"),
    (replace(KNOWN["Wan2.1 14B"], ffn_dim=13825), "feed-forward 13825.*Wan2.1 14B is"),
    (replace(SMALL, dim=96, ffn_dim=96, heads=4), "96 wide"),
    (replace(SMALL, patch=(2, 2, 2)), "patches of 2x2x2"),
])  # fmt: skip
def test_other_architectures_are_refused_with_what_was_found_and_expected(config, told, tmp_path):
    path = write_hollow(shapes_of(config), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=told) as caught:
        open_checkpoint(path)
    assert caught.value.exit_code == 65


def test_surplus_tensors_of_another_model_are_recognised(tmp_path):
    assert "VACE" in str(refused(state() | {"vace_patch_embedding.weight": torch.ones(1)}, tmp_path))


def test_a_config_that_contradicts_the_weights_is_refused(tmp_path):
    write(state(), tmp_path / "w.safetensors")
    write_config(tmp_path, model().config, num_layers=30, ffn_dim=8960)
    with pytest.raises(CheckpointError, match="layers 30, not 2; ffn_dim 8960, not 512"):
        open_checkpoint(tmp_path)
