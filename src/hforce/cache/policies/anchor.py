"""Anchor: the first frame and the newest few, for heads that stabilise structure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hforce.cache.policy import CachePolicy, Frame, Likeness, split, unlike


@dataclass(frozen=True)
class Anchor(CachePolicy):
    """What an anchor head needs (Head Forcing, arXiv 2605.14487, fig. 4): the first latent frame, and `window` recent.

    With the default positions the sink lies as far back as the model can express and the recent frames at their true
    distance. A sink placed near looks like the recent past, and the video jumps back to its beginning.
    The default budget equals that of `Local`, so that both roles share one attention call.
    """

    sink: int = 1
    window: int = 2

    @property
    def capacity(self) -> int:
        return self.sink + self.window

    def keep(self, held: Sequence[Frame], likeness: Likeness = unlike) -> list[Frame]:
        first, _, recent = split(held, self.sink, self.window)
        return first + recent
