"""Weight files: reading them, loading them strictly, and the fingerprint of a model."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hforce.documents import file_digest
from hforce.errors import CheckpointError, InputError, PermissionDenied
from hforce.models.dit import CausalWan

LONGEST_HEADER = 1 << 26  # bytes
BLOBS, SHA256 = "blobs", re.compile("[0-9a-f]{64}")  # the folder of the hub's cache that files lie in, and their names
SHOWN = 5  # names listed in a message
FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
ZIPPED, PICKLED = b"PK\x03\x04", b"\x80"  # what torch.save begins its files with, now and before PyTorch 1.6
IMPOSTORS = {  # first bytes of what is often found under the name of weights -> what to do about it
    b"version https://git-lfs": "it only points to the weights: fetch them with git lfs pull",
    b"<": "it is a web page: download the file itself",
    b"{": "it is JSON text, perhaps what a server answered: download the file itself",
    b"GGUF": "it is a GGUF file of quantised weights: get the safetensors of the same model",
}


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises what `open_safetensors` raises, and CheckpointError when it holds numbers other than floats.
    """
    file = open_safetensors(path)
    state, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    if odd := next((name for name, value in state.items() if value.dtype not in FLOATS), None):
        raise CheckpointError(f"{path}: tensor {odd} is {state[odd].dtype}", "convert it to float16 or float32")
    return state, dict(metadata or {})


def open_safetensors(path: Path, framework: str = "pt") -> Any:
    """A safetensors file with its header checked; its tensors are mapped into memory when they are asked for.

    With "pt" the system has to have memory for the whole file, should all of it be written to; with "numpy" not, but
    that knows no bfloat16. Raises InputError when it is not there, PermissionDenied when it may not be read,
    CheckpointError when it is damaged or something else.
    """
    start = first_bytes(path)
    try:
        return safe_open(path, framework=framework)
    except (SafetensorError, OSError) as error:
        reason = str(error).partition("\n")[0]
        size, due = path.stat().st_size, described_bytes(path)
        lack = f", of {due} that it should have" if due > size else ""
        message = f"{path} is not a whole safetensors file ({size} bytes{lack}): {reason}"
        pickled = start.startswith((ZIPPED, PICKLED))
        mend = "it is a pickle (.pt): convert it to safetensors" if pickled else way_out(start)
        raise CheckpointError(message, mend) from error


def described_bytes(path: Path) -> int:
    """How long a safetensors file is according to its own header; 0 where that cannot be told."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < LONGEST_HEADER else {}
        return 8 + length + max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return 0


def first_bytes(path: Path) -> bytes:
    """At most 64 bytes, enough to know a file by. Raises InputError or PermissionDenied."""
    if not path.is_file():
        raise InputError(f"there is no weight file {path}", "check the path")
    try:
        with path.open("rb") as opened:
            return opened.read(64)
    except PermissionError as error:
        raise PermissionDenied(f"may not read {path}", "check who owns the file") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}", "check the path") from error


def check_digests(files: Iterable[Path]) -> bool:
    """Whether there are files of which a checksum is known: the hub's cache names large ones by their SHA-256.

    Reads these to their end. Raises CheckpointError for one that was changed since.
    """
    named = {file: file.resolve() for file in files}
    known = {file: blob for file, blob in named.items() if blob.parent.name == BLOBS and SHA256.fullmatch(blob.name)}
    for file, blob in known.items():
        if (found := file_digest(blob)) != blob.name:
            message = f"{file} is damaged: its SHA-256 is {found}, not {blob.name}"
            raise CheckpointError(message, f"remove {blob} and fetch it again")
    return bool(known)


def way_out(start: bytes) -> str:
    """What to do about a file that begins like this and holds no weights."""
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


def count_values(module: nn.Module) -> int:
    """Numbers in a module's parameters and buffers, on the meta device too."""
    return sum(value.numel() for value in module.state_dict().values())


def fingerprint(model: CausalWan) -> str:
    """The `fingerprint_of` a model's weights. Take it before heads are reordered."""
    return fingerprint_of(model.state_dict())


def fingerprint_of(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the self-attention query and key weights in layer order, as bfloat16 ("qk-sha256-v1").

    `state` has the names of the release. The result is the same for every file format of the same weights, and for
    every precision that bfloat16 can be rounded from.
    """
    digest = hashlib.sha256()
    for layer in takewhile(lambda layer: f"blocks.{layer}.self_attn.q.weight" in state, count()):
        for part in ("q", "k"):
            weight = state[f"blocks.{layer}.self_attn.{part}.weight"].detach()
            plain = weight.to(device="cpu", dtype=torch.bfloat16).contiguous()
            digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()
