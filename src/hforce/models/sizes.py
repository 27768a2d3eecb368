"""What a transformer's tensors say about its sizes, and whether all that belong to it are there."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType

import torch
from pydantic import AliasChoices, BaseModel, Field

from hforce.documents import parse_document, read_document
from hforce.errors import CheckpointError
from hforce.models.dit import CausalWan, WanConfig
from hforce.models.mapped import NO_QUANTS, Contents, LazyState, clip, shown
from hforce.models.weights import FLOATS, SHOWN

HEAD_DIM = 128  # of every Wan2.1; only a config.json can tell of another one
WAN22_CHANNELS = 48
LONGEST_CONFIG = 2**20  # bytes
KNOWN: Mapping[str, WanConfig] = MappingProxyType({
    "Wan2.1 1.3B": WanConfig(dim=1536, ffn_dim=8960, layers=30, heads=12),
    "Wan2.1 14B": WanConfig(dim=5120, ffn_dim=13824, layers=40, heads=40),
})
SIZED = {  # the tensors that sizes are read from, and how many dimensions they have
    "patch_embedding.weight": 5, "text_embedding.0.weight": 2, "time_embedding.0.weight": 2,
    "blocks.0.self_attn.q.weight": 2, "blocks.0.ffn.0.weight": 2, "head.head.weight": 2,
}  # fmt: skip
STRANGERS = {  # part of a name -> what a file with it is, and what to do
    "lora_": ("an adapter (LoRA) alone", "give it together with the transformer it was made for"),
    "img_emb.": ("an image-to-video model", "get a text-to-video model"),
    "k_img": ("an image-to-video model", "get a text-to-video model"),
    "vace_": ("a VACE model", "get a text-to-video model"),
    "token_embedding.": ("a text encoder", "get the transformer"),
    "shared.weight": ("a text encoder", "get the transformer"),
    "decoder.": ("an autoencoder", "get the transformer"),
}


class FolderConfig(BaseModel):
    """What the config.json of a folder says about sizes, in the words of the release or of Diffusers."""

    class_name: str = Field("", validation_alias="_class_name")
    dim: int | None = None
    heads: int | None = Field(None, gt=0, le=1024, validation_alias=AliasChoices("num_heads", "num_attention_heads"))
    layers: int | None = Field(None, validation_alias="num_layers")
    in_channels: int | None = Field(None, validation_alias=AliasChoices("in_dim", "in_channels"))
    out_channels: int | None = Field(None, validation_alias=AliasChoices("out_dim", "out_channels"))
    ffn_dim: int | None = None
    freq_dim: int | None = None
    text_dim: int | None = None
    text_len: int = Field(512, gt=0, le=65536)
    eps: float = Field(1e-6, gt=0, lt=1)


def read_folder_config(contents: Contents) -> FolderConfig:
    """The config.json beside the weights of a folder, or what holds without one. Raises DataError for a bad one."""
    path = contents.folder / "config.json"
    if not contents.path.is_dir() or not path.is_file():
        return FolderConfig.model_validate({})
    return parse_document(FolderConfig, read_document(path, LONGEST_CONFIG), path)


def sizes_of(state: LazyState, told: FolderConfig, path: Path) -> WanConfig:
    """The sizes of a transformer, read off the shapes of its tensors; `told` adds what shapes cannot say.

    Raises CheckpointError for other architectures, and when `told` contradicts the shapes.
    """
    shapes = {name: state.entries[name].shape for name in SIZED if name in state}
    if odd := [name for name, dims in SIZED.items() if len(shapes.get(name, ())) != dims or not all(shapes[name])]:
        raise _stranger(state, odd, path)
    dim, channels, *patch = shapes["patch_embedding.weight"]
    width = dim / told.heads if told.heads else HEAD_DIM
    if dim % width or width % 2 or patch[0] != 1:
        message = f"{path} is no Wan2.1 transformer: it is {dim} wide, with patches of {patch[0]}x{patch[1]}x{patch[2]}"
        raise CheckpointError(message, f"expected a whole number of heads, {width:g} wide, and patches of 1x2x2")
    config = WanConfig(
        dim=dim, ffn_dim=shapes["blocks.0.ffn.0.weight"][0], layers=_count_blocks(state, path), heads=int(dim // width),
        text_dim=shapes["text_embedding.0.weight"][1], text_len=told.text_len, in_channels=channels,
        out_channels=shapes["head.head.weight"][0] // (patch[1] * patch[2]),
        freq_dim=shapes["time_embedding.0.weight"][1], patch=(patch[0], patch[1], patch[2]), eps=told.eps,
    )  # fmt: skip
    _check_told(config, told, path)
    _check_known(config, path)
    return config


def check_fit(state: LazyState, config: WanConfig, path: Path) -> None:
    """Raises CheckpointError, naming the first few, unless the tensors are exactly those of a model of these sizes."""
    expected = {name: tuple(value.shape) for name, value in blank(config).state_dict().items()}
    entries = state.entries
    quantised = sorted({str(e.dtype).removeprefix("torch.") for e in entries.values() if e.dtype not in FLOATS})
    if quantised:
        names = [name for name, entry in entries.items() if entry.dtype not in FLOATS]
        message = f"{path}: {len(names)} tensors are quantised to {', '.join(quantised)} ({shown(names)})"
        raise CheckpointError(message, NO_QUANTS)
    wrong = [n for n, shape in expected.items() if n in entries and entries[n].shape != shape]
    missing = [name for name in expected if name not in entries]
    surplus = [name for name in entries if name not in expected]
    told = {
        "missing": missing,
        "surplus": [f"{clip(name)}{_nearest(name, missing)}" for name in surplus[:SHOWN]] + surplus[SHOWN:],
        "of another shape": [f"{n} {list(entries[n].shape)} instead of {list(expected[n])}" for n in wrong],
    }
    faults = [f"{len(names)} {kind} ({', '.join(names[:SHOWN])})" for kind, names in told.items() if names]
    if faults:
        looks = (what for part, (what, _) in STRANGERS.items() if any(part in name for name in surplus))
        hint = "".join(f"; it looks like {what}" for what in islice(looks, 1))
        message = f"{path} does not fit a transformer {describe(config)}: tensors {'; '.join(faults)}{hint}"
        raise CheckpointError(message, "is it another model's file, or damaged?")


def blank(config: WanConfig) -> CausalWan:
    """A model without weights: its parameters have shapes and take no memory."""
    with torch.device("meta"):
        return CausalWan(config)


def describe(config: WanConfig) -> str:
    """Sizes in words, for messages."""
    c = config
    sizes = f"{c.layers} layers x {c.heads} heads, width {c.dim}, feed-forward {c.ffn_dim}, text {c.text_dim}"
    return f"of {sizes}, {c.in_channels} channels"


def _count_blocks(state: Iterable[str], path: Path) -> int:
    numbers = {int(found[1]) for name in state if (found := re.match(r"blocks\.(\d{1,6})\.", name))}
    if len(numbers) != max(numbers) + 1:
        message = f"{path} has {len(numbers)} blocks, but they are numbered up to {max(numbers)}"
        raise CheckpointError(message, "some of it is missing: copy or download it again")
    return len(numbers)


def _check_told(config: WanConfig, told: FolderConfig, path: Path) -> None:
    names = ("dim", "layers", "in_channels", "out_channels", "ffn_dim", "freq_dim", "text_dim")
    said = {name: getattr(told, name) for name in names}
    odd = [f"{n} {v}, not {getattr(config, n)}" for n, v in said.items() if v is not None and v != getattr(config, n)]
    if odd:
        message = f"the config.json of {path} and the weights beside it do not agree: it says {'; '.join(odd)}"
        raise CheckpointError(message, "do they belong together?")


def _check_known(config: WanConfig, path: Path) -> None:
    """A width that is known comes with sizes that are known, and text to video takes as many channels as it gives."""
    if config.in_channels != config.out_channels:
        message = f"{path} takes {config.in_channels} channels and gives {config.out_channels}"
        raise CheckpointError(f"{message}: an image-to-video or control model?", "get a text-to-video model")
    if config.in_channels == WAN22_CHANNELS:
        raise CheckpointError(f"{path} has {WAN22_CHANNELS} channels: it looks like Wan2.2 5B", "get a model of Wan2.1")
    for name, known in KNOWN.items():
        if known.dim == config.dim and config != replace(known, text_len=config.text_len, eps=config.eps):
            message = f"{path} is {describe(config)}; {name} is {describe(known)}"
            raise CheckpointError(message, "is it another model's file, or cut short?")


def _stranger(state: LazyState, missing: list[str], path: Path) -> CheckpointError:
    """A file without the tensors that every transformer has."""
    what, mend = next(
        (told for part, told in STRANGERS.items() if any(part in name for name in state)),
        ("something else", "is it the weight file of a Wan2.1 transformer?"),
    )
    known = "; ".join(f"{name} is {describe(config)}" for name, config in KNOWN.items())
    message = f"{path} holds no Wan2.1 transformer but {what}: {len(state)} tensors ({shown(sorted(state))}), without"
    return CheckpointError(f"{message} {shown(missing)}. {known}", mend)


def _nearest(name: str, missing: list[str]) -> str:
    found = difflib.get_close_matches(name, missing, n=1)
    return f", perhaps {found[0]}" if found else ""
