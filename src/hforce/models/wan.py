"""The Wan2.1 backbone: a transformer of its family and the parts of a release, put together for one size of video."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import torch

from hforce.errors import CheckpointError, ConfigError
from hforce.geometry import Geometry
from hforce.models import taehv, wan_vae
from hforce.models.base import Backbone, Blueprint, Codec, Needs, Source, TextEncoder
from hforce.models.checkpoints import Checkpoint, load_transformer, open_checkpoint
from hforce.models.dit import CausalWan, WanConfig
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
TINY_VAE = "tiny"  # a file of this name is ./tiny
SIZE = (832, 480)  # pixels, width and height the model was trained on
CELL = 8  # pixels a latent cell is wide and high
SPAN = 21  # latent frames the model was trained on
STEP = 16  # pixels that sides are multiples of: two cells, a patch


def open_wan(name: str, source: Source, size: tuple[int, int] | None, device: str, dtype: str) -> Blueprint:
    """A model of the Wan2.1 family; dtype "auto" is bfloat16 on a GPU, float32 on a CPU. Only headers are read.

    `name` is the size that the checkpoint must have, "" for any; the model is named for what it has. Raises ConfigError
    for a source without a checkpoint or without a base, CheckpointError for a transformer and an autoencoder that do
    not fit each other, and what `resolve`, `open_checkpoint`, `find_vae`, `find_parts` and `check_size` raise.
    """
    size = size or SIZE
    check_size(*size)
    if not source.checkpoint:
        mend = "give them with: -m PATH, or --set model.checkpoint=PATH"
        raise ConfigError(f"model {name or 'wan2.1'} needs the weights of its transformer", mend)
    place = resolve(source.checkpoint)
    checkpoint = open_checkpoint(place, resolve(source.lora) if source.lora else None)
    c = checkpoint.config
    log.info("%s: %s of %d layers", place, checkpoint.family.name, c.layers)
    name = check_name(name, checkpoint)
    base = find_base(source.base, place)
    parts = find_parts(base, find_vae(source.vae, base))
    check_channels(checkpoint, parts)
    precision = choose_precision(device, dtype)
    # As it is stored: float16 overflows in umT5, float32 takes twice the memory.
    kept = torch.float32 if dtype == "float32" else torch.bfloat16
    texts = Path(source.texts).expanduser() if source.texts else Path.home() / TEXTS
    text = WanText(parts.text, parts.tokenizer, EmbeddingStore(texts), (c.text_len, c.text_dim), kept, device)
    geometry, shape = lay_out(c, size)
    if is_taehv(parts.vae):
        codec, decoder_needs = taehv.codec_needs(parts.vae, shape[1:], precision)
    else:
        codec, decoder_needs = wan_vae.codec_needs(parts.vae, shape[1:], precision, torch.device(device))
    encoder, encoding = encoder_needs(parts.text, kept, c.text_len)
    transformer = count_values(blank(c)) * precision.itemsize
    return Blueprint(
        name, c, geometry, shape, size, wan_vae.STRIDE, precision, device,
        lambda chunk: Needs(transformer, encoder, codec, encoding, *decoder_needs(chunk)), text,
        partial(fingerprint_of, checkpoint.state), partial(_read, checkpoint, parts.vae), checkpoint.family, PACKAGES,
    )  # fmt: skip


def _read(checkpoint: Checkpoint, vae: Path, blueprint: Blueprint, rests: bool) -> Backbone:
    b = blueprint
    model = load_transformer(checkpoint, b.dtype, b.device)
    name = (taehv.TaehvCodec if is_taehv(vae) else wan_vae.WanCodec).name
    resting = RestingCodec(partial(load_codec, vae, b.dtype, "cpu"), name, b.stride, wan_vae.CHANNELS)
    codec = resting if rests and not b.is_apart else load_codec(vae, b.dtype, b.codec_device)
    return Backbone(b.name, model, b.encode_text, codec, b.geometry, b.shape, b.size, b.fingerprint, b.family)


def check_channels(checkpoint: Checkpoint, parts: Parts) -> None:
    """Raises CheckpointError for a transformer of other latents than those of Wan2.1's autoencoder."""
    channels = checkpoint.config.in_channels
    if channels != wan_vae.CHANNELS:
        message = f"{checkpoint.path} makes latents of {channels} channels, {parts.vae} reads {wan_vae.CHANNELS}"
        raise CheckpointError(message, "give a transformer of Wan2.1")


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
        return taehv.find_taew(base)
    return resolve(vae) if vae else None


def load_codec(path: Path, dtype: torch.dtype, device: str) -> Codec:
    """The autoencoder in a file, told by its content: Wan2.1's own, or TAEHV."""
    return (taehv.load_taew if is_taehv(path) else wan_vae.load_wan_codec)(path, dtype, device)


def is_taehv(path: Path) -> bool:
    """Whether the autoencoder in a file is a TAEHV. Only its header is read."""
    return taehv.TAEHV_MARK in read_weights(path)


def lay_out(config: WanConfig, size: tuple[int, int]) -> tuple[Geometry, tuple[int, int, int]]:
    """For videos of a size (width, height) in pixels: the geometry, and the shape (C, h, w) of a latent frame."""
    c, shape = config, (config.in_channels, size[1] // CELL, size[0] // CELL)
    grid = (shape[1] // c.patch[1], shape[2] // c.patch[2])
    return Geometry(c.layers, c.heads, c.head_dim, grid, span=SPAN), shape


def assemble(
    name: str, model: CausalWan, text: TextEncoder, codec: Codec, size: tuple[int, int] | None, fingerprint: str
) -> Backbone:
    """A transformer and its parts, for videos of a size (width, height) in pixels; None: as it was trained.

    Raises ConfigError for a size that the model cannot make.
    """
    size = size or SIZE
    check_size(*size)
    geometry, shape = lay_out(model.config, size)
    return Backbone(name, model, text, codec, geometry, shape, size, fingerprint)


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
