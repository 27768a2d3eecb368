"""What a model brings along: text encoder, codec and decoder (protocols), Backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from hforce.geometry import Geometry
from hforce.models.dit import CausalWan
from hforce.models.families import Family


class TextEncoder(Protocol):
    """Turns prompts into what the transformer's cross-attention starts from."""

    def __call__(self, prompt: str) -> Tensor:
        """prompt -> [1, T, text_dim]. Raises DataError for a prompt that says nothing the model knows."""
        ...

    def encode_all(self, prompts: Iterable[str]) -> None:
        """Gets the prompts of a run ready, so that what encodes them need not stay in memory while it lasts."""
        ...

    def reads(self, prompt: str) -> str:
        """The prompt as the model understands it, for the records. The same as `prompt` where nothing is lost."""
        ...


class Decoder(Protocol):
    """One video being decoded: all state of the stream is in here."""

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


Loader = Callable[[Source, tuple[int, int] | None, str, str], Backbone]
"""source, size (W, H) or None, device, dtype name ("auto" too) -> Backbone."""
