"""Files of a Wan2.1 release: where the parts lie in either layout, and reading their weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hforce.errors import CheckpointError, InputError
from hforce.models.mapped import NO_QUANTS, LazyState, open_weights
from hforce.models.weights import FLOATS

INDEX = ".index.json"
GIVE_BASE = "give a folder of Wan2.1-T2V-1.3B or Wan2.1-T2V-1.3B-Diffusers: --set model.base=FOLDER"
WRAPPERS = ("state_dict", "model")  # dicts in which others save the tensors of a part
TEXT = (
    "text_encoder/model.safetensors.index.json",
    "text_encoder/model.safetensors",
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


def find_parts(base: Path, vae: Path | None = None) -> Parts:
    """The parts in the folder of a Wan2.1 release, original or in Diffusers' layout; `vae` is taken instead of its own.

    Raises InputError that lists every part that is not there and what was looked for.
    """
    wanted = {"text encoder": TEXT, "tokenizer": TOKENIZER, "autoencoder": (str(vae.absolute()),) if vae else VAE}
    there = {part: [base / name for name in names if (base / name).is_file()] for part, names in wanted.items()}
    if lacking := [f"{part} ({', '.join(wanted[part])})" for part, paths in there.items() if not paths]:
        raise InputError(
            f"{base} is no folder of Wan2.1: looked in vain for its {'; '.join(lacking)}",
            GIVE_BASE,
        )
    text, tokenizer, codec = (paths[0] for paths in there.values())
    return Parts(text, tokenizer, codec)


def read_weights(path: Path) -> LazyState:
    """The tensors of a part: a safetensors file, all files of an index, or a .pth. They are mapped, not read.

    Raises what `open_weights` raises, and CheckpointError for tensors that are quantised.
    """
    _, state = open_weights(path.parent if path.name.endswith(INDEX) else path).choose(WRAPPERS)
    if odd := next((name for name, entry in state.entries.items() if entry.dtype not in FLOATS), None):
        raise CheckpointError(f"{path}: tensor {odd} is {state.entries[odd].dtype}", NO_QUANTS)
    return state
