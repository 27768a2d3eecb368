"""The Wan2.1 backbone: a transformer of its family and the parts of a release, put together for one size of video."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from hforce.errors import ConfigError
from hforce.geometry import Geometry
from hforce.models.base import Backbone, Codec, TextEncoder
from hforce.models.checkpoints import load_transformer, open_checkpoint
from hforce.models.dit import CausalWan
from hforce.models.taehv import TAEHV_MARK, load_taew
from hforce.models.text_store import EmbeddingStore
from hforce.models.wan_files import find_parts, read_weights
from hforce.models.wan_text import WanText
from hforce.models.wan_vae import load_wan_codec
from hforce.models.weights import fingerprint_of

log = logging.getLogger(__name__)

SIZE = (832, 480)  # pixels, width and height the model was trained on
CELL = 8  # pixels a latent cell is wide and high
SPAN = 21  # latent frames the model was trained on
STEP = 16  # pixels that sides are multiples of: two cells, a patch


@dataclass(frozen=True)
class Sources:
    """Where a backbone comes from: a transformer, and the folder of a Wan2.1 release for the other parts.

    `texts` is the folder in which embeddings of prompts are kept; `lora` an adapter to merge into the transformer;
    `vae` an autoencoder to take instead of the release's, which may be taew2_1.
    """

    checkpoint: Path
    base: Path
    texts: Path
    lora: Path | None = None
    vae: Path | None = None


def load_wan(name: str, sources: Sources, size: tuple[int, int] | None, device: str, dtype: str) -> Backbone:
    """A model of the Wan2.1 family; dtype "auto" is bfloat16 on a GPU, float32 on a CPU.

    Everything that can be found out without reading weights is found out first. Raises what `open_checkpoint`,
    `find_parts`, `check_size` and the loaders of the parts raise.
    """
    check_size(*(size or SIZE))
    parts = find_parts(sources.base, sources.vae)
    checkpoint = open_checkpoint(sources.checkpoint, sources.lora)
    log.info("%s: %s of %d layers", sources.checkpoint, checkpoint.family.name, checkpoint.config.layers)
    auto = "bfloat16" if torch.device(device).type == "cuda" else "float32"
    precision = getattr(torch, auto if dtype == "auto" else dtype)
    model = load_transformer(checkpoint, precision, device)
    shape = (checkpoint.config.text_len, checkpoint.config.text_dim)
    # As it is stored: float16 overflows in umT5, float32 takes twice the memory.
    texts = torch.float32 if dtype == "float32" else torch.bfloat16
    text = WanText(parts.text, parts.tokenizer, EmbeddingStore(sources.texts), shape, texts, device)
    codec = load_codec(parts.vae, precision, device)
    return assemble(name, model, text, codec, size, fingerprint_of(checkpoint.state))


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
