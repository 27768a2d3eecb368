"""Memory: the first frames, a bank of unlike episodes, and the newest few, for heads that see far back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from hforce.cache.policy import CachePolicy, Frame, Likeness, split, unlike
from hforce.errors import ConfigError


@dataclass(frozen=True)
class Memory(CachePolicy):
    """Hierarchical memory with episodic updates (Head Forcing, arXiv 2605.14487); the rules of the bank are our own.

    Three levels: `sink` frames from the start of the stream, at most `episodes` from its middle, and the newest
    `window`. When a chunk pushes frames out of the window, at most one of them enters the bank: the one most unlike
    the sink and the bank. A full bank then gives up its most redundant frame, so that it stays a spread-out set of
    pictures and a frozen scene cannot fill it with copies.
    """

    looks: ClassVar[bool] = True
    sink: int = 3
    episodes: int = 6
    window: int = 3
    novelty: float = 0.02  # a frame enters only if it is this much unlike the sink and the bank (1 - likeness)
    gate: float = 1.5  # a frame that drifted further never enters: corruption is novel, too
    kappa: float = 1.0  # a full bank takes no frame less surprising than this many deviations below the mean
    age: float = 0.05  # redundancy a frame gains in every `horizon`, so that old episodes fade
    horizon: int = 120  # latent frames
    spacing: int = 3  # least distance between a new episode and those in the bank
    chunk: int = 3  # frames that arrive together

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.horizon == 0 or self.chunk == 0:
            raise ConfigError("policy 'memory' needs a horizon and a chunk of at least 1 frame")

    @property
    def capacity(self) -> int:
        return self.sink + self.episodes + self.window

    def keep(self, held: Sequence[Frame], likeness: Likeness = unlike) -> list[Frame]:
        sink, middle, recent = split(held, self.sink, self.window)
        if not middle or not self.episodes:
            return sink + recent
        # One chunk pushes `chunk` frames out of the window: these may enter; what is older was let in before.
        settled = held[-1].index - self.window - self.chunk
        bank = self._shed([f for f in middle if f.index <= settled], sink, held[-1], likeness)
        candidate = self._most_novel([f for f in middle if f.index > settled], sink, bank, likeness)
        if candidate is not None and (len(bank) < self.episodes or candidate.surprise > -self.kappa):
            bank = self._shed([*bank, candidate], sink, held[-1], likeness)
        return sink + bank + recent

    def flush(self, held: Sequence[Frame]) -> list[Frame]:
        """The sink and the newest two frames, as Infinity-RoPE (arXiv 2511.20649) does at a change of prompt."""
        sink, _, recent = split(held, self.sink, min(self.window, 2))
        return sink + recent

    def _most_novel(
        self, leaving: list[Frame], sink: list[Frame], bank: list[Frame], likeness: Likeness
    ) -> Frame | None:
        """The frame to let in, of those leaving the window; ties go to the older one."""
        known = sink + bank
        novelty = {f: 1.0 - max((likeness(f, other) for other in known), default=0.0) for f in leaving}
        worthy = [
            f
            for f in leaving
            if f.drift <= self.gate
            and novelty[f] > self.novelty
            and all(f.index - other.index >= self.spacing for other in bank)
        ]
        return max(worthy, key=novelty.__getitem__, default=None)

    def _shed(self, bank: list[Frame], sink: list[Frame], newest: Frame, likeness: Likeness) -> list[Frame]:
        """The bank without its most redundant frames, down to `episodes`; ties cost the older one.

        The oldest frame remembered of the shot being played is never given up: it is what the prompt looked like.
        """
        bank = list(bank)
        while len(bank) > self.episodes:
            first = next((f for f in sink + bank if f.shot == newest.shot), None)
            redundancy = {f: self._redundancy(f, sink + bank, newest, likeness) for f in bank if f != first}
            bank.remove(max(redundancy, key=redundancy.__getitem__))
        return bank

    def _redundancy(self, frame: Frame, known: list[Frame], newest: Frame, likeness: Likeness) -> float:
        """Likeness to the nearest other frame remembered, and a little for age."""
        twin = max((likeness(frame, other) for other in known if other != frame), default=0.0)
        return twin + self.age * (newest.index - frame.index) / self.horizon
