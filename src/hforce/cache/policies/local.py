"""Local: the newest frames and nothing else, for heads that refine detail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hforce.cache.policy import CachePolicy, Frame, Likeness, newest, unlike


@dataclass(frozen=True)
class Local(CachePolicy):
    """What a local head needs (Head Forcing, arXiv 2605.14487): the `window` frames right before the chunk.

    One chunk's worth carries nearly all motion; with none, motion collapses; 0 reads the chunk alone, for ablations.
    """

    window: int = 3

    @property
    def capacity(self) -> int:
        return self.window

    def keep(self, held: Sequence[Frame], likeness: Likeness = unlike) -> list[Frame]:
        return newest(held, self.window)
