"""Weight files: reading them, loading them strictly, and the fingerprint of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hforce.errors import CheckpointError, InputError
from hforce.models.dit import CausalWan

SHOWN = 5  # names listed in a message


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises InputError when it is not there, CheckpointError when it is damaged."""
    if not path.is_file():
        raise InputError(f"there is no weight file {path}", "check model.checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({path.stat().st_size} bytes): {reason}",
            "it was probably cut short: copy or download it again",
        ) from error


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Loads a state dict in which nothing may be missing, surplus, of another shape, or not finite.

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
        raise CheckpointError(f"{name} does not fit the model: tensors {'; '.join(told)}", "is it another model's file?")
    module.load_state_dict(state)


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
