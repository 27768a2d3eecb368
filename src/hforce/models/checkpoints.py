"""Transformers of the Wan2.1 family in any file: recognised by content, checked before they are read, loaded whole."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hforce.errors import CheckpointError
from hforce.models.dit import CausalWan, WanConfig
from hforce.models.families import Facts, Family, recognise
from hforce.models.lora import merged, read_adapter
from hforce.models.mapped import LazyState, open_weights, shown
from hforce.models.naming import bare, from_diffusers, is_diffusers
from hforce.models.sizes import blank, check_fit, read_folder_config, sizes_of
from hforce.models.weights import check_digests

log = logging.getLogger(__name__)

LARGEST = 1e5  # no trained weight comes near; a flipped bit in an exponent leaps over it
MEMBERS = ("generator_ema", "generator", "model")  # dicts in which transformers come, the best first


@dataclass(frozen=True)
class Checkpoint:
    """A transformer that was found and checked, but not read. `state` has the names of the release.

    `member` is the dict it was taken from ("" for none), `dtype` what most of it is stored as, `bytes` how many.
    """

    path: Path
    family: Family
    config: WanConfig
    state: LazyState
    member: str
    dtype: torch.dtype
    bytes: int


def open_checkpoint(path: Path, lora: Path | None = None) -> Checkpoint:
    """The transformer at `path`, a file or a folder, with an adapter merged into it where one is given.

    Only headers are read. Raises what `open_weights` raises, and CheckpointError for tensors that are missing, surplus,
    of another shape or quantised, and for other architectures.
    """
    contents = open_weights(path)
    member, raw = contents.choose(MEMBERS)
    state, prefix = with_release_names(raw, path)
    told = read_folder_config(contents)
    config = sizes_of(state, told, path)
    check_fit(state, config, path)
    adapter = read_adapter(lora, state) if lora else None
    facts = Facts(
        members=frozenset(contents.members) - {""}, member=member, prefix=prefix, dim=config.dim,
        is_diffusers=is_diffusers(raw), class_name=told.class_name,
        adapter=(adapter.member or adapter.prefix) if adapter else "",
    )  # fmt: skip
    whole = merged(state, adapter) if adapter else state
    return Checkpoint(path, recognise(facts), config, whole, member, most_used(state), state.bytes)


def weight_files(path: Path) -> list[Path]:
    """The file itself, or what lies in a folder where `open_weights` looks first."""
    if path.is_file():
        return [path]
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.pt")])


def with_release_names(raw: LazyState, path: Path) -> tuple[LazyState, str]:
    """The same tensors under the names of the release, and the prefix they had. Raises CheckpointError for doubles."""
    names = {name: bare(name) for name in raw}
    renamed = is_diffusers(raw)
    new = {name: from_diffusers(rest) if renamed else rest for name, (_, rest) in names.items()}
    doubles = sorted(name for name, uses in Counter(new.values()).items() if uses > 1)
    if doubles:
        message = f"{path} holds {len(doubles)} tensors twice, under several names: {shown(doubles)}"
        raise CheckpointError(message, "are two models in one file?")
    prefix = Counter(prefix for prefix, _ in names.values()).most_common(1)[0][0]
    return LazyState({new[name]: entry for name, entry in raw.entries.items()}), prefix


def most_used(state: LazyState) -> torch.dtype:
    """What most bytes are stored as."""
    sizes: Counter[torch.dtype] = Counter()
    for entry in state.entries.values():
        sizes[entry.dtype] += entry.bytes
    return sizes.most_common(1)[0][0]


def load_transformer(checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> CausalWan:
    """The model with the weights of `checkpoint`, read one tensor after the other, for inference.

    Raises CheckpointError naming the tensors that are not finite in `dtype`, or hold what no trained weight is; where a
    checksum is known, also for a file that does not have it.
    """
    if not check_digests(weight_files(checkpoint.path)):
        log.info("no checksum is known of %s", checkpoint.path)
    model = blank(checkpoint.config)
    weights: dict[str, Tensor] = {}
    odd = []
    for name in model.state_dict():
        # A copy always: what is mapped must not be written to, nor change with its file.
        weights[name] = checkpoint.state[name].to(device=device, dtype=dtype, copy=True).contiguous()
        if not float(weights[name].abs().max()) <= LARGEST:  # NaN is not, either
            odd.append(name)
    if odd:
        what = f"{len(odd)} tensors are not finite as {dtype}, or above {LARGEST:g}"
        message = f"{checkpoint.path}: {what} ({shown(odd)})"
        raise CheckpointError(message, "use model.dtype=float32, or get the file again")
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval().requires_grad_(False)
