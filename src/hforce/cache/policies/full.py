"""Full: every frame, for as long as the video lasts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hforce.cache.policy import CachePolicy, Frame, Likeness, unlike
from hforce.errors import ConfigError


@dataclass(frozen=True)
class Full(CachePolicy):
    """Forgets nothing and moves nothing: what a model does without a policy, and the truth other policies approach.

    `frames` must hold the whole video. Its cost grows with the video, and so do its distances.
    """

    frames: int = 18
    positions: str = field(default="true", kw_only=True)

    @property
    def capacity(self) -> int:
        return self.frames

    def keep(self, held: Sequence[Frame], likeness: Likeness = unlike) -> list[Frame]:
        """All frames. Raises ConfigError past `frames`, for this policy has no way to forget."""
        if len(held) > self.frames:
            raise ConfigError(
                f"policy 'full' has room for {self.frames} frames and was given {len(held)}",
                mend="set cache.<role>.options.frames to the frames of the whole video, or choose another policy",
            )
        return list(held)
