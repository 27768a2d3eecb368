"""Weight files: reading them, loading them strictly, and the fingerprint of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hforce.errors import CheckpointError, InputError, PermissionDenied
from hforce.models.dit import CausalWan

SHOWN = 5  # names listed in a message
FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
IMPOSTORS = {  # first bytes of what is often found under the name of weights -> what to do about it
    b"version https://git-lfs": "it only points to the weights: fetch them with git lfs pull",
    b"PK\x03\x04": "it is a pickle (.pt): convert it to safetensors",
    b"\x80\x02\x8a": "it is a pickle (.pt): convert it to safetensors",
    b"<": "it is a web page: download the file itself",
}


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises InputError when it is not there, PermissionDenied when it may not be read, CheckpointError when it is
    damaged, something else, or holds numbers other than floats.
    """
    if not path.is_file():
        raise InputError(f"there is no weight file {path}", "check the path")
    try:
        with path.open("rb") as opened:
            start = opened.read(64)
        with safe_open(path, framework="pt") as file:
            state, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    except PermissionError as error:
        raise PermissionDenied(f"may not read {path}", "check who owns the file") from error
    except (SafetensorError, OSError) as error:
        reason = str(error).partition("\n")[0]
        message = f"{path} is not a whole safetensors file ({path.stat().st_size} bytes): {reason}"
        raise CheckpointError(message, _way_out(start)) from error
    if odd := next((name for name, value in state.items() if value.dtype not in FLOATS), None):
        raise CheckpointError(f"{path}: tensor {odd} is {state[odd].dtype}", "convert it to float16 or float32")
    return state, dict(metadata or {})


def _way_out(start: bytes) -> str:
    """What to do about a file that begins like this and is no safetensors file."""
    found = (mend for mark, mend in IMPOSTORS.items() if start.startswith(mark))
    return next(found, "it was probably cut short: copy or download it again")


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Loads a state dict in which nothing may be missing, surplus, of another shape, or not finite.

    A module built on the meta device takes the tensors themselves, so that memory is paid once; others copy them.
    Raises CheckpointError naming the first few of each.
    """
    expected = module.state_dict()
    wrong = [n for n in expected.keys() & state.keys() if expected[n].shape != state[n].shape]
    faults = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "of another shape": sorted(wrong),
        "not finite": sorted(n for n, value in state.items() if not bool(torch.isfinite(value).all())),
    }
    told = [f"{len(names)} {kind} ({', '.join(names[:SHOWN])})" for kind, names in faults.items() if names]
    if told:
        message = f"{name} does not fit the model: tensors {'; '.join(told)}"
        raise CheckpointError(message, "is it another model's file, or damaged?")
    module.load_state_dict(state, assign=any(value.is_meta for value in expected.values()))


def fingerprint(model: CausalWan) -> str:
    """SHA-256 over the self-attention query and key weights in layer order, as bfloat16 ("qk-sha256-v1").

    It is the same for every file format and precision of the same weights. Take it before heads are reordered.
    """
    digest = hashlib.sha256()
    for block in model.blocks:
        for linear in (block.self_attn.q, block.self_attn.k):
            weight = linear.weight.detach().to(device="cpu", dtype=torch.bfloat16).contiguous()
            digest.update(weight.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
