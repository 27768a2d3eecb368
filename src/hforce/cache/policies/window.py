"""Window: the newest frames, first in, first out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hforce.cache.policy import CachePolicy, Frame, Likeness, newest, unlike
from hforce.errors import ConfigError


@dataclass(frozen=True)
class Window(CachePolicy):
    """The rolling cache of Self-Forcing (arXiv 2506.08009): the baseline for every head.

    `frames` counts the chunk being made, as Self-Forcing's `local_attn_size` does, so frames - chunk of the past stay.
    Raises ConfigError when the chunk alone does not fit.
    """

    frames: int = 21
    chunk: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames < self.chunk:
            raise ConfigError(
                f"policy 'window' has {self.frames} frames, fewer than the chunk of {self.chunk} it counts",
                mend=f"set cache.<role>.options.frames to {self.chunk} or more",
            )

    @property
    def capacity(self) -> int:
        return self.frames - self.chunk

    def keep(self, held: Sequence[Frame], likeness: Likeness = unlike) -> list[Frame]:
        return newest(held, self.capacity)
