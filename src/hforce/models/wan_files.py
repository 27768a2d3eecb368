"""Files of a Wan2.1 release: where the parts lie in either layout, and reading their weights."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hforce.errors import CheckpointError, InputError, PermissionDenied
from hforce.models.weights import FLOATS, SHOWN, read_safetensors

TEXT = (
    "text_encoder/model.safetensors",
    "text_encoder/model.safetensors.index.json",
    "models_t5_umt5-xxl-enc-bf16.pth",
)
TOKENIZER = ("tokenizer/tokenizer.json", "google/umt5-xxl/tokenizer.json")
VAE = ("vae/diffusion_pytorch_model.safetensors", "Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors")


@dataclass(frozen=True)
class Parts:
    """Files of what a transformer checkpoint does not bring: text encoder, its tokenizer, and the autoencoder."""

    text: Path
    tokenizer: Path
    vae: Path


def find_parts(base: Path) -> Parts:
    """The parts in the folder of a Wan2.1 release, original or in Diffusers' layout.

    Raises InputError that lists every part that is not there and what was looked for.
    """
    wanted = {"text encoder": TEXT, "tokenizer": TOKENIZER, "autoencoder": VAE}
    there = {part: [base / name for name in names if (base / name).is_file()] for part, names in wanted.items()}
    if lacking := [f"{part} ({', '.join(wanted[part])})" for part, paths in there.items() if not paths]:
        raise InputError(
            f"{base} is no folder of Wan2.1: looked in vain for its {'; '.join(lacking)}",
            "give the folder of Wan2.1-T2V-1.3B, as released or as Wan2.1-T2V-1.3B-Diffusers",
        )
    text, tokenizer, vae = (paths[0] for paths in there.values())
    return Parts(text, tokenizer, vae)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, of the files an .index.json lists, or of a flat pickle (.pt, .pth).

    They are mapped from the file: what is not used is not read. Raises what the functions below raise.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    return read_index(path) if path.suffix == ".json" else read_pickle(path)


def read_index(path: Path) -> dict[str, Tensor]:
    """Tensors of a model in several files, as its index (model.safetensors.index.json) tells.

    Raises InputError when a file is not there, CheckpointError when the index is damaged or tells of other tensors.
    """
    if not path.is_file():
        raise InputError(f"there is no weight file {path}", "check the path")
    try:
        told = dict(json.loads(path.read_bytes())["weight_map"])
        files = sorted({path.with_name(Path(name).name) for name in told.values()})
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no index of weight files", "download it again") from error
    state = {name: value for file in files for name, value in read_safetensors(file)[0].items()}
    if odd := sorted(state.keys() ^ told.keys()):
        message = f"{path} and the files beside it differ in {len(odd)} tensors ({', '.join(odd[:SHOWN])})"
        raise CheckpointError(message, "they belong to different models: download them again")
    return state


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a flat .pt or .pth file. Nothing in it is run.

    Raises InputError when it is not there, PermissionDenied when it may not be read, CheckpointError when it is
    damaged, would run code, or holds anything but named float tensors.
    """
    if not path.is_file():
        raise InputError(f"there is no weight file {path}", "check the path")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except PermissionError as error:
        raise PermissionDenied(f"may not read {path}", "check who owns the file") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError) as error:
        message = f"{path} is not a whole file of weights ({path.stat().st_size} bytes), or not only weights"
        raise CheckpointError(message, "it was probably cut short: copy or download it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} is no flat table of tensors", "is it another model's file?")
    _check_floats(state, path)
    return state


def _check_floats(state: Mapping[str, Tensor], path: Path) -> None:
    if odd := next((name for name, value in state.items() if value.dtype not in FLOATS), None):
        raise CheckpointError(f"{path}: tensor {odd} is {state[odd].dtype}", "convert it to float16 or float32")
