"""Adapters (LoRA) for a transformer: read under any of their names, and merged into its weights tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from hforce.documents import parse_document, read_document
from hforce.errors import CheckpointError
from hforce.models.mapped import NO_QUANTS, Contents, Entry, LazyState, open_weights, shown
from hforce.models.naming import PREFIXES, bare, from_diffusers
from hforce.models.weights import FLOATS

MEMBERS = ("generator_lora",)
FLAT = "lora_unet_"  # before names in which every dot became an underscore
LORA_PREFIXES = ("base_model.model.", FLAT, "transformer.", *PREFIXES)
PARTS = {
    ".lora_A.weight": "down", ".lora_A.default.weight": "down", ".lora_down.weight": "down",
    ".lora_B.weight": "up", ".lora_B.default.weight": "up", ".lora_up.weight": "up",
    ".alpha": "alpha",
}  # fmt: skip
LONGEST_CONFIG = 2**20  # bytes


@dataclass(frozen=True)
class Pair:
    """What is added to one weight [out, in]: scale * up [out, rank] @ down [rank, in]."""

    down: Entry
    up: Entry
    scale: float


@dataclass(frozen=True)
class Adapter:
    """Pairs by the name of the weight they change, and what the file told: the dict they were in, their prefix."""

    pairs: Mapping[str, Pair]
    member: str
    prefix: str


class PeftConfig(BaseModel):
    """The adapter_config.json that PEFT writes beside the weights, where alpha stands nowhere else."""

    lora_alpha: float = Field(allow_inf_nan=False)
    r: int = Field(gt=0)
    use_rslora: bool = False
    use_dora: bool = False
    alpha_pattern: dict[str, float] = {}
    rank_pattern: dict[str, int] = {}


def read_adapter(path: Path, state: LazyState) -> Adapter:
    """The adapter at `path` for the transformer `state`; only headers and scales are read.

    Raises what `open_weights` raises, and CheckpointError for pairs that are not whole, that fit no weight of `state`,
    and for tensors that are no part of a pair.
    """
    contents = open_weights(path)
    member, raw = contents.choose(MEMBERS)
    found, prefix = _sort(raw, state, path)
    default = _default_scale(contents)
    pairs, odd = {}, []
    for name, parts in found.items():
        pair = _pair(parts, default)
        if pair and name in state and _fits(pair, state.entries[name]):
            pairs[name] = pair
        else:
            odd.append(name)
    if odd:
        message = f"{path}: {len(odd)} pairs do not fit the transformer, or lack a half ({shown(odd)})"
        raise CheckpointError(message, "is it an adapter for another model, or damaged?")
    return Adapter(pairs, member, prefix)


def merged(state: LazyState, adapter: Adapter) -> LazyState:
    """`state` with the adapter's pairs added to the weights they change, as float32, when these are asked for.

    Products are summed in float64: rounded once, they are the same numbers on every machine, and so is the fingerprint.
    """
    entries = dict(state.entries)
    for name, pair in adapter.pairs.items():
        entries[name] = replace(entries[name], dtype=torch.float32, read=partial(_add, entries[name], pair))
    return LazyState(entries)


def _add(base: Entry, pair: Pair) -> Tensor:
    update = pair.up.read().double() @ pair.down.read().double()
    return base.read().double().add(update, alpha=pair.scale).float()


def _sort(raw: LazyState, state: LazyState, path: Path) -> tuple[dict[str, dict[str, Entry]], str]:
    """The parts of all pairs by the name of the weight they belong to, and the prefix they had."""
    flat = {name.removesuffix(".weight").replace(".", "_"): name for name in state}
    found: dict[str, dict[str, Entry]] = {}
    strange, prefix = [], ""
    for name, entry in raw.entries.items():
        suffix = next((s for s in PARTS if name.endswith(s)), "")
        prefix, rest = bare(name.removesuffix(suffix), LORA_PREFIXES)
        module = bare(rest)[1]  # PEFT's prefix may stand before that of the wrapper class
        target = flat.get(module, module) if prefix == FLAT else from_diffusers(f"{module}.weight")
        if not suffix or entry.dtype not in FLOATS or PARTS[suffix] in found.get(target, {}):
            strange.append(name)
        else:
            found.setdefault(target, {})[PARTS[suffix]] = entry
    if strange or not found:
        message = f"{path} is no adapter of plain pairs: {len(strange)} tensors are no part of one ({shown(strange)})"
        raise CheckpointError(message, f"merge it with the tool it was made for; {NO_QUANTS}")
    return found, prefix


def _pair(parts: Mapping[str, Entry], default: float) -> Pair | None:
    """The pair of these parts, or None when one is missing or they do not fit each other."""
    down, up, alpha = parts.get("down"), parts.get("up"), parts.get("alpha")
    if down is None or up is None or len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != up.shape[1]:
        return None
    if alpha is None:
        return Pair(down, up, default)
    scale = float(alpha.read()) / down.shape[0] if math.prod(alpha.shape) == 1 and down.shape[0] else math.nan
    return Pair(down, up, scale) if math.isfinite(scale) else None


def _fits(pair: Pair, weight: Entry) -> bool:
    return (pair.up.shape[0], pair.down.shape[1]) == weight.shape


def _default_scale(contents: Contents) -> float:
    """The scale of pairs without an alpha: that of PEFT's adapter_config.json beside them, or else 1."""
    path = contents.folder / "adapter_config.json"
    if not path.is_file():
        return 1.0
    told = parse_document(PeftConfig, read_document(path, LONGEST_CONFIG), path)
    if told.use_dora or told.alpha_pattern or told.rank_pattern:
        raise CheckpointError(f"{path} asks for DoRA or for scales of each tensor", "merge it with PEFT")
    return told.lora_alpha / (math.sqrt(told.r) if told.use_rslora else told.r)
