"""A codec that is in memory only while it works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hforce.models.base import Codec, Decoder


class RestingCodec:
    """Reads the weights of a codec for every piece of work, and lets go of them after it."""

    def __init__(self, load: Callable[[], Codec], name: str, stride: int, channels: int) -> None:
        self._load, self.name, self.stride, self._channels = load, name, stride, channels

    @property
    def channels(self) -> int:
        """Of a latent."""
        return self._channels

    def encode(self, video: Tensor) -> Tensor:
        """video [B, T, 3, H, W] in 0..1 -> latents [B, n, C, h, w]."""
        return self._load().encode(video)

    def decoder(self) -> Decoder:
        """A decoder for a new video."""
        return RestingDecoder(self._load)


class RestingDecoder:
    """Decodes one video; between two chunks it holds what it remembers, but no weights."""

    def __init__(self, load: Callable[[], Codec]) -> None:
        self._load = load
        self.memory: Any = None

    def __call__(self, latents: Tensor) -> Tensor:
        """latents [1, F, C, h, w] -> frames [T, 3, H, W] in 0..1."""
        decoder = self._load().decoder()
        if self.memory is not None:
            decoder.memory = self.memory
        frames = decoder(latents)
        self.memory = decoder.memory
        return frames
