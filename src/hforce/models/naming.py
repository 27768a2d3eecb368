"""Names of tensors: wrappers and prefixes taken off, Diffusers' names turned into those of the release."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import product
from types import MappingProxyType

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""What training leaves in names, anywhere: FSDP, activation checkpointing, torch.compile."""

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
"""What stands before all names, the longest first: ComfyUI's single files, and the wrapper class of Self-Forcing."""

PROJECTIONS = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "norm_q": "norm_q", "norm_k": "norm_k"}
ATTENTIONS = {"attn1": "self_attn", "attn2": "cross_attn"}
DIFFUSERS: Mapping[str, str] = MappingProxyType({
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "scale_shift_table": "head.modulation",
    "proj_out": "head.head",
})  # fmt: skip
DIFFUSERS_BLOCK: Mapping[str, str] = MappingProxyType({
    **{f"{a}.{p}": f"{ATTENTIONS[a]}.{PROJECTIONS[p]}" for a, p in product(ATTENTIONS, PROJECTIONS)},
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
})
DIFFUSERS_MARK = "condition_embedder.time_embedder.linear_1.weight"  # a name that only Diffusers' naming has
PARTS = re.compile(r"(blocks\.\d+\.)?(.+?)(\.weight|\.bias)?")


def bare(name: str, prefixes: tuple[str, ...] = PREFIXES) -> tuple[str, str]:
    """A name without wrappers, as (the prefix it began with or "", the rest)."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    prefix = next((p for p in prefixes if name.startswith(p)), "")
    return prefix, name.removeprefix(prefix)


def is_diffusers(names: Iterable[str]) -> bool:
    """Whether these names, with or without prefixes, are Diffusers'."""
    return any(name.endswith(DIFFUSERS_MARK) for name in names)


def from_diffusers(name: str) -> str:
    """Diffusers' name of a tensor -> that of the release; other names come back as they are."""
    parts = PARTS.fullmatch(name)
    if not parts:
        return name
    block, module, kind = (part or "" for part in parts.groups())
    return f"{block}{(DIFFUSERS_BLOCK if block else DIFFUSERS).get(module, module)}{kind}"
