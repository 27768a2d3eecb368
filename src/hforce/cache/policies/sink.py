"""Sink: the first frames and a rolling window, the same for every head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hforce.cache.policy import CachePolicy, Frame, Likeness, split, unlike


@dataclass(frozen=True)
class Sink(CachePolicy):
    """The usual training-free baseline: StreamingLLM's attention sink (arXiv 2309.17453), three frames of it.

    `sink` frames from the start of the stream stay for good, beside the newest `window`. The defaults fill the
    span of Wan2.1 together with a chunk of three.
    """

    sink: int = 3
    window: int = 15

    @property
    def capacity(self) -> int:
        return self.sink + self.window

    def keep(self, held: Sequence[Frame], likeness: Likeness = unlike) -> list[Frame]:
        first, _, recent = split(held, self.sink, self.window)
        return first + recent
