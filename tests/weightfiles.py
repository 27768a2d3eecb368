"""Weight files as they go round, written from one state dict in the names of the release."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from tests.builders import random_wan
from torch import Tensor

from hforce.models.dit import CausalWan, WanConfig
from hforce.models.taehv import TAEHV, TaehvConfig

State = Mapping[str, Tensor]


def small_wan(seed: int = 0, layers: int = 2) -> CausalWan:
    """A transformer with heads as wide as Wan2.1's."""
    return random_wan(layers, heads=2, head_dim=128, seed=seed)


def wrapped(state: State, prefix: str = "model.", inside: str = "") -> dict[str, Tensor]:
    """The names behind a prefix, and `inside` after every block's number."""
    return {prefix + re.sub(r"^(blocks\.\d+\.)", rf"\1{inside}", name): value for name, value in state.items()}


def diffusers(state: State) -> dict[str, Tensor]:
    """The names of WanTransformer3DModel."""
    table = [
        (r"^text_embedding\.0", "condition_embedder.text_embedder.linear_1"),
        (r"^text_embedding\.2", "condition_embedder.text_embedder.linear_2"),
        (r"^time_embedding\.0", "condition_embedder.time_embedder.linear_1"),
        (r"^time_embedding\.2", "condition_embedder.time_embedder.linear_2"),
        (r"^time_projection\.1", "condition_embedder.time_proj"),
        (r"^head\.modulation", "scale_shift_table"),
        (r"^head\.head", "proj_out"),
        (r"\.norm3\.", ".norm2."),
        (r"\.modulation$", ".scale_shift_table"),
        (r"\.(self|cross)_attn\.(q|k|v)\.", r".\1_attn.to_\2."),
        (r"_attn\.o\.", "_attn.to_out.0."),
        (r"\.self_attn\.", ".attn1."),
        (r"\.cross_attn\.", ".attn2."),
        (r"\.ffn\.0\.", ".ffn.net.0.proj."),
        (r"\.ffn\.2\.", ".ffn.net.2."),
    ]
    renamed = {}
    for name, value in state.items():
        new = name
        for old, other in table:
            new = re.sub(old, other, new)
        renamed[new] = value
    return renamed


def write(state: State, path: Path) -> Path:
    """A safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(state), path)
    return path


def write_shards(state: State, folder: Path) -> Path:
    """Two shards and their index, named as in the 14B releases."""
    names = sorted(state)
    shard = "diffusion_pytorch_model-0000{}-of-00002.safetensors"
    places = {name: shard.format(1 + index % 2) for index, name in enumerate(names)}
    for file in set(places.values()):
        write({name: state[name] for name in names if places[name] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_config(folder: Path, config: WanConfig, **others: object) -> None:
    """The config.json of an original Wan2.1 folder."""
    c = asdict(config)
    same = {name: c[name] for name in ("dim", "ffn_dim", "freq_dim", "text_len", "eps")}
    told = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "model_type": "t2v", **same}
    told |= {"in_dim": c["in_channels"], "out_dim": c["out_channels"]}
    told |= {"num_heads": c["heads"], "num_layers": c["layers"]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(told | others))


def write_hollow(shapes: Mapping[str, tuple[int, ...]], path: Path, dtype: str = "BF16") -> Path:
    """A safetensors file of zeros that takes no room on the disk, however large it is."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def shapes_of(config: WanConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in CausalWan(config).state_dict().items()}


def hollow_release(folder: Path, width: int = 32) -> Path:
    """A folder with every part of a release but the transformer: of the right shapes, and all zeros."""
    inner, vocabulary = 24, 40
    text = {"shared.weight": (vocabulary, width), "encoder.final_layer_norm.weight": (width,)}
    block = "encoder.block.0.layer."
    text |= {f"{block}0.SelfAttention.{part}.weight": (inner, width) for part in "qkv"}
    text |= {f"{block}0.SelfAttention.o.weight": (width, inner), f"{block}0.layer_norm.weight": (width,)}
    text |= {f"{block}0.SelfAttention.relative_attention_bias.weight": (32, 4), f"{block}1.layer_norm.weight": (width,)}
    text |= {f"{block}1.DenseReluDense.{part}.weight": (48, width) for part in ("wi_0", "wi_1")}
    text |= {f"{block}1.DenseReluDense.wo.weight": (width, 48)}
    with torch.device("meta"):
        vae = {name: tuple(value.shape) for name, value in TAEHV(TaehvConfig()).state_dict().items()}
    for name, shapes in (("text_encoder/model.safetensors", text), ("Wan2.1_VAE.safetensors", vae)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_hollow(shapes, folder / name)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").touch()
    return folder
