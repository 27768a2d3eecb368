"""The Wan2.1 backbone: a transformer of its family and the parts of a release, put together for one size of video."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from hforce.errors import CheckpointError, ConfigError
from hforce.extras import require
from hforce.geometry import Geometry
from hforce.models.base import Backbone, Codec, Source, TextEncoder
from hforce.models.checkpoints import Checkpoint, load_transformer, open_checkpoint
from hforce.models.dit import CausalWan
from hforce.models.families import WIDE
from hforce.models.hub import resolve
from hforce.models.sizes import describe
from hforce.models.taehv import TAEHV_MARK, find_taew, load_taew
from hforce.models.text_store import EmbeddingStore
from hforce.models.wan_files import GIVE_BASE, find_parts, read_weights
from hforce.models.wan_text import WanText
from hforce.models.wan_vae import load_wan_codec
from hforce.models.weights import fingerprint_of

log = logging.getLogger(__name__)

SMALL, LARGE = "wan2.1-t2v-1.3b", "wan2.1-t2v-14b"
PACKAGES = ("ftfy", "tokenizers", "transformers", "diffusers")  # that it takes, or may take, to run
TEXTS = ".cache/hforce/texts"  # in the home folder: where embeddings of prompts are kept
TINY_VAE = "tiny"  # a file of this name is ./tiny
SIZE = (832, 480)  # pixels, width and height the model was trained on
CELL = 8  # pixels a latent cell is wide and high
SPAN = 21  # latent frames the model was trained on
STEP = 16  # pixels that sides are multiples of: two cells, a patch


def load_wan(name: str, source: Source, size: tuple[int, int] | None, device: str, dtype: str) -> Backbone:
    """A model of the Wan2.1 family; dtype "auto" is bfloat16 on a GPU, float32 on a CPU.

    `name` is the size that the checkpoint must have, "" for any; the backbone is named for what it has. Everything that
    can be found out without reading weights is found out first. Raises ConfigError for a source without a checkpoint
    or without a base, UnavailableError for packages that are not installed, and what `resolve`, `open_checkpoint`,
    `find_vae`, `find_parts`, `check_size` and the loaders of the parts raise.
    """
    check_size(*(size or SIZE))
    if not source.checkpoint:
        mend = "give them with: -m PATH, or --set model.checkpoint=PATH"
        raise ConfigError(f"model {name or 'wan2.1'} needs the weights of its transformer", mend)
    place = resolve(source.checkpoint)
    checkpoint = open_checkpoint(place, resolve(source.lora) if source.lora else None)
    log.info("%s: %s of %d layers", place, checkpoint.family.name, checkpoint.config.layers)
    name = check_name(name, checkpoint)
    base = find_base(source.base, place)
    parts = find_parts(base, find_vae(source.vae, base))
    require("wan", *PACKAGES)
    precision = choose_precision(device, dtype)
    model = load_transformer(checkpoint, precision, device)
    shape = (checkpoint.config.text_len, checkpoint.config.text_dim)
    # As it is stored: float16 overflows in umT5, float32 takes twice the memory.
    kept = torch.float32 if dtype == "float32" else torch.bfloat16
    texts = Path(source.texts).expanduser() if source.texts else Path.home() / TEXTS
    text = WanText(parts.text, parts.tokenizer, EmbeddingStore(texts), shape, kept, device)
    codec = load_codec(parts.vae, precision, device)
    made = assemble(name, model, text, codec, size, fingerprint_of(checkpoint.state))
    return replace(made, family=checkpoint.family)


def choose_precision(device: str, dtype: str) -> torch.dtype:
    """What a dtype name stands for on a device; "auto" is bfloat16 on a GPU, float32 on a CPU."""
    auto = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    return auto if dtype == "auto" else getattr(torch, dtype)


def check_name(name: str, checkpoint: Checkpoint) -> str:
    """The name of a model as wide as this. Raises CheckpointError where it was to be another one."""
    found = LARGE if checkpoint.config.dim == WIDE else SMALL
    if name in ("", found):
        return found
    message = f"{checkpoint.path} is no {name}, but a transformer {describe(checkpoint.config)}"
    raise CheckpointError(message, f"name the model that it is, {found}")


def find_base(base: str, checkpoint: Path) -> Path:
    """The release that the other parts come from: the one named, or else the folder of the checkpoint, if it is one.

    Raises ConfigError for a file alone, and what `resolve` raises.
    """
    if base:
        return resolve(base)
    if checkpoint.is_dir():
        return checkpoint
    raise ConfigError(f"{checkpoint} is a transformer alone, without text encoder and autoencoder", GIVE_BASE)


def find_vae(vae: str, base: Path) -> Path | None:
    """The autoencoder that was named, `tiny` for the TAEHV in the base, or None for the base's own.

    Raises what `find_taew` and `resolve` raise.
    """
    if vae == TINY_VAE:
        return find_taew(base)
    return resolve(vae) if vae else None


def load_codec(path: Path, dtype: torch.dtype, device: str) -> Codec:
    """The autoencoder in a file, told by its content: Wan2.1's own, or TAEHV."""
    return (load_taew if TAEHV_MARK in read_weights(path) else load_wan_codec)(path, dtype, device)


def assemble(
    name: str, model: CausalWan, text: TextEncoder, codec: Codec, size: tuple[int, int] | None, fingerprint: str
) -> Backbone:
    """A transformer and its parts, for videos of a size (width, height) in pixels; None: as it was trained.

    Raises ConfigError for a size that the model cannot make.
    """
    width, height = size or SIZE
    c = model.config
    check_size(width, height)
    shape = (c.in_channels, height // CELL, width // CELL)
    geometry = Geometry(c.layers, c.heads, c.head_dim, (shape[1] // c.patch[1], shape[2] // c.patch[2]), span=SPAN)
    return Backbone(name, model, text, codec, geometry, shape, (width, height), fingerprint)


def check_size(width: int, height: int) -> None:
    """Raises ConfigError, naming the two nearest sizes, unless both sides are multiples of 16 pixels."""
    if min(width, height) >= STEP and not width % STEP and not height % STEP:
        return
    below, above = (
        "x".join(str(max(STEP, (side + add) // STEP * STEP)) for side in (width, height)) for add in (0, STEP - 1)
    )
    raise ConfigError(
        f"a size of {width}x{height} will not do: both sides must be multiples of {STEP}",
        f"the nearest are {below} and {above}",
    )
