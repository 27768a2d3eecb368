"""What a model brings along: text encoder, codec and decoder (protocols), Backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from hforce.extras import require
from hforce.geometry import Geometry
from hforce.models.dit import CausalWan, WanConfig
from hforce.models.families import Family


class TextEncoder(Protocol):
    """Turns prompts into what the transformer's cross-attention starts from."""

    def __call__(self, prompt: str) -> Tensor:
        """prompt -> [1, T, text_dim]. Raises DataError for a prompt that says nothing the model knows."""
        ...

    def encode_all(self, prompts: Iterable[str]) -> None:
        """Gets the prompts of a run ready, so that what encodes them need not stay in memory while it lasts."""
        ...

    def stay(self, stays: bool) -> None:
        """From now on keeps what encodes prompts in memory, once it is there, or lets go of it after `encode_all`."""
        ...

    def reads(self, prompt: str) -> str:
        """The prompt as the model understands it, for the records. The same as `prompt` where nothing is lost."""
        ...


class Decoder(Protocol):
    """One video being decoded: all state of the stream is in here."""

    memory: Any
    """What it remembers of the latents before, tensors in lists and tuples; given to another decoder, that goes on."""

    def __call__(self, latents: Tensor) -> Tensor:
        """The next latents [1, F, C, h, w] -> the video frames that are ready, [T, 3, H, W] in 0..1."""
        ...


class Codec(Protocol):
    """Between video and latents. `stride` video frames make a latent frame, but the first latent is one video frame.

    `name` is what it is called in reports, `channels` C.
    """

    name: str
    stride: int

    @property
    def channels(self) -> int: ...

    def encode(self, video: Tensor) -> Tensor:
        """video [B, T, 3, H, W] in 0..1, T = stride (n - 1) + 1 -> latents [B, n, C, h, w], normalised."""
        ...

    def decoder(self) -> Decoder:
        """A decoder for a new video."""
        ...


@dataclass(frozen=True)
class Source:
    """Where a model comes from, as the configuration names it: paths, or names on the hub; empty where none is given.

    `checkpoint` is the transformer, `base` a release for the other parts, `lora` an adapter to merge into it, `vae` an
    autoencoder instead of the release's, `texts` the folder in which embeddings of prompts are kept.
    """

    checkpoint: str = ""
    base: str = ""
    lora: str = ""
    vae: str = ""
    texts: str = ""


@dataclass(frozen=True)
class Backbone:
    """A model ready to stream: shape is (C, h, w) of a latent frame, size (W, H) of the video in pixels.

    `family` is what its weights were recognised as, where they come from one of several releases. With is_random they
    mean nothing: they are there to be timed.
    """

    name: str
    model: CausalWan
    encode_text: TextEncoder
    codec: Codec
    geometry: Geometry
    shape: tuple[int, int, int]
    size: tuple[int, int]
    fingerprint: str
    family: Family | None = None
    is_random: bool = False

    @property
    def stride(self) -> int:
        """Video frames per latent frame."""
        return self.codec.stride

    @property
    def dtype(self) -> torch.dtype:
        """In what the transformer computes."""
        return self.model.patch_embedding.weight.dtype

    @property
    def device(self) -> str:
        """Where the transformer is."""
        return str(self.model.patch_embedding.weight.device)


@dataclass(frozen=True)
class Needs:
    """Bytes of memory that the parts of a model take: their weights as they are held, and what work with them adds.

    `encoding` is added while a prompt is encoded, `decoding` while a chunk is decoded; a decoder holds `decoder`
    between two chunks.
    """

    transformer: int
    text: int
    codec: int
    encoding: int
    decoder: int
    decoding: int


DecoderNeeds = Callable[[int], tuple[int, int]]
"""Latent frames in a chunk -> bytes that a decoder holds between two chunks, and those that decoding one adds."""


@dataclass(frozen=True)
class Blueprint:
    """A model that was found and checked, but whose weights were not read: all that can be known of it before.

    `stride` video frames make a latent frame; the transformer computes in `dtype` on `device`. `weigh` tells what it
    needs with chunks of so many latent frames. `identify` reads what the fingerprint is made of. `read` makes the
    backbone; told True, with a codec that works on the CPU and is in memory only while it does. `family` and the chunk
    of the geometry may be replaced: the backbone has those of its blueprint. `packages` are those of the extra `wan`
    that it takes to run it. `vae_device` is where the codec is to be, if not beside the transformer.
    """

    name: str
    config: WanConfig
    geometry: Geometry
    shape: tuple[int, int, int]
    size: tuple[int, int]
    stride: int
    dtype: torch.dtype
    device: str
    weigh: Callable[[int], Needs]
    encode_text: TextEncoder
    identify: Callable[[], str]
    read: Callable[[Blueprint, bool], Backbone]
    family: Family | None = None
    packages: tuple[str, ...] = ()
    vae_device: str = ""
    is_random: bool = field(default=False, init=False)

    @property
    def needs(self) -> Needs:
        """Bytes of memory that its parts take."""
        return self.weigh(self.geometry.chunk)

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights. Reads the queries and keys of every layer."""
        return self.identify()

    @property
    def codec_device(self) -> str:
        """Where the codec works, unless it rests."""
        return self.vae_device or self.device

    @property
    def is_apart(self) -> bool:
        """Whether the codec has a device of its own."""
        here, there = torch.device(self.device), torch.device(self.codec_device)
        return (here.type, here.index or 0) != (there.type, there.index or 0)

    def check_packages(self) -> None:
        """Raises UnavailableError for packages that are not installed."""
        require("wan", *self.packages)

    def load(self, rests: bool = False) -> Backbone:
        """Reads the weights. Raises UnavailableError for lacking packages, CheckpointError for weights."""
        self.check_packages()
        return self.read(self, rests)


class Described(Protocol):
    """What is known of a model alike before and after its weights were read."""

    @property
    def name(self) -> str: ...
    @property
    def geometry(self) -> Geometry: ...
    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def stride(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> str: ...
    @property
    def family(self) -> Family | None: ...
    @property
    def is_random(self) -> bool: ...
    @property
    def encode_text(self) -> TextEncoder: ...
    @property
    def fingerprint(self) -> str: ...


Opener = Callable[[Source, tuple[int, int] | None, str, str], Blueprint]
"""source, size (W, H) or None, device, dtype name ("auto" too) -> Blueprint."""
