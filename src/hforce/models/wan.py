"""The Wan2.1 backbone: a transformer of its family and the parts of a release, put together for one size of video."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import torch

from hforce.errors import CheckpointError, ConfigError
from hforce.geometry import Geometry
from hforce.models import taehv, wan_vae
from hforce.models.base import Backbone, Blueprint, Codec, Needs, Source
from hforce.models.checkpoints import Checkpoint, load_transformer, open_checkpoint
from hforce.models.families import WIDE
from hforce.models.hub import resolve
from hforce.models.resting import RestingCodec
from hforce.models.sizes import blank, describe
from hforce.models.text_store import EmbeddingStore
from hforce.models.wan_files import GIVE_BASE, Parts, find_parts, read_weights
from hforce.models.wan_text import WanText, encoder_needs
from hforce.models.weights import count_values, fingerprint_of

log = logging.getLogger(__name__)

SMALL, LARGE = "wan2.1-t2v-1.3b", "wan2.1-t2v-14b"
PACKAGES = ("ftfy", "tokenizers", "transformers", "diffusers")  # that it takes, or may take, to run
TEXTS = ".cache/hforce/texts"  # in the home folder: where embeddings of prompts are kept
SIZE = (832, 480)  # pixels, width and height the model was trained on
CELL = 8  # pixels a latent cell is wide and high
SPAN = 21  # latent frames the model was trained on
STEP = 16  # pixels that sides are multiples of: two cells, a patch


def open_wan(name: str, source: Source, size: tuple[int, int] | None, device: str, dtype: str) -> Blueprint:
    """A model of the Wan2.1 family; dtype "auto" is bfloat16 on a GPU, float32 on a CPU. Only headers are read.

    `name` is the size that the checkpoint must have, "" for any; the model is named for what it has. Raises ConfigError
    for a source without a checkpoint or without a base, CheckpointError for a transformer and an autoencoder that do
    not fit each other, and what `resolve`, `open_checkpoint`, `find_parts` and `check_size` raise.
    """
    width, height = size or SIZE
    check_size(width, height)
    if not source.checkpoint:
        mend = "give them with: -m PATH, or --set model.checkpoint=PATH"
        raise ConfigError(f"model {name or 'wan2.1'} needs the weights of its transformer", mend)
    place = resolve(source.checkpoint)
    checkpoint = open_checkpoint(place, resolve(source.lora) if source.lora else None)
    c = checkpoint.config
    log.info("%s: %s of %d layers", place, checkpoint.family.name, c.layers)
    name = check_name(name, checkpoint)
    parts = find_parts(find_base(source.base, place), resolve(source.vae) if source.vae else None)
    check_channels(checkpoint, parts)
    auto = "bfloat16" if torch.device(device).type == "cuda" else "float32"
    precision = getattr(torch, auto if dtype == "auto" else dtype)
    # As it is stored: float16 overflows in umT5, float32 takes twice the memory.
    kept = torch.float32 if dtype == "float32" else torch.bfloat16
    texts = Path(source.texts).expanduser() if source.texts else Path.home() / TEXTS
    text = WanText(parts.text, parts.tokenizer, EmbeddingStore(texts), (c.text_len, c.text_dim), kept, device)
    shape = (c.in_channels, height // CELL, width // CELL)
    geometry = Geometry(c.layers, c.heads, c.head_dim, (shape[1] // c.patch[1], shape[2] // c.patch[2]), span=SPAN)
    codec_needs = taehv.codec_needs if is_taehv(parts.vae) else wan_vae.codec_needs
    codec, held, decoding = codec_needs(parts.vae, geometry.chunk, shape[1:], precision)
    encoder, encoding = encoder_needs(parts.text, kept, c.text_len)
    needs = Needs(count_values(blank(c)) * precision.itemsize, encoder, codec, encoding, held, decoding)
    return Blueprint(
        name, c, geometry, shape, (width, height), wan_vae.STRIDE, precision, device, needs, text,
        partial(fingerprint_of, checkpoint.state), partial(_read, checkpoint, parts.vae), checkpoint.family, PACKAGES,
    )  # fmt: skip


def _read(checkpoint: Checkpoint, vae: Path, blueprint: Blueprint, rests: bool) -> Backbone:
    b = blueprint
    model = load_transformer(checkpoint, b.dtype, b.device)
    resting = RestingCodec(partial(load_codec, vae, b.dtype, "cpu"), b.stride)
    codec = resting if rests else load_codec(vae, b.dtype, b.device)
    return Backbone(b.name, model, b.encode_text, codec, b.geometry, b.shape, b.size, b.fingerprint, b.family)


def check_channels(checkpoint: Checkpoint, parts: Parts) -> None:
    """Raises CheckpointError for a transformer of other latents than those of Wan2.1's autoencoder."""
    channels = checkpoint.config.in_channels
    if channels != wan_vae.CHANNELS:
        message = f"{checkpoint.path} makes latents of {channels} channels, {parts.vae} reads {wan_vae.CHANNELS}"
        raise CheckpointError(message, "give a transformer of Wan2.1")


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


def load_codec(path: Path, dtype: torch.dtype, device: str) -> Codec:
    """The autoencoder in a file, told by its content: Wan2.1's own, or TAEHV."""
    return (taehv.load_taew if is_taehv(path) else wan_vae.load_wan_codec)(path, dtype, device)


def is_taehv(path: Path) -> bool:
    """Whether the autoencoder in a file is a TAEHV. Only its header is read."""
    return taehv.TAEHV_MARK in read_weights(path)


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
