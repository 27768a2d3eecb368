"""How alike two frames are, read off the keys; how far the stream has drifted, read off the latents."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from hforce.cache.policy import Frame

CELLS = (3, 4)  # a frame's keys are pooled over this many rows and columns
STILLNESS = 0.02  # spread of the keys, as a share of their mean square, below which frames count as the same picture
MEMORY = 0.9  # of the moving average of novelty


class KeyLikeness:
    """Likeness of the frames a role holds: cosine of pooled, centred keys, averaged over its heads.

    Keys are taken before any rotation, for rotation mixes place and time into them, and centred on their mean over
    the stream, for keys have a strong common part. Bases differ from head to head, so cosines are averaged, not keys.
    """

    def __init__(self, grid: tuple[int, int]) -> None:
        self.grid = grid
        self._cells = min(CELLS[0], grid[0]), min(CELLS[1], grid[1])
        self._pooled: dict[int, Tensor] = {}  # frame index -> [heads, cells D]
        self._sum: Tensor | None = None
        self._count = 0
        self._table: dict[tuple[int, int], float] = {}
        self._mean, self._deviation = 0.0, 0.0  # of novelty

    def add(self, frames: Iterable[int], keys: Sequence[Tensor]) -> None:
        """New frames with their keys, one tensor [N, H, D] for every layer looked at."""
        rows, columns = self.grid
        stacked = torch.cat([k.float() for k in keys], dim=1)
        pictures = rearrange(stacked, "(f r c) h d -> f (h d) r c", r=rows, c=columns)
        pooled = F.adaptive_avg_pool2d(pictures, self._cells)
        pooled = rearrange(pooled, "f (h d) r c -> f h (r c d)", h=stacked.shape[1])
        for index, frame in zip(frames, pooled, strict=True):
            self._pooled[index] = frame
            self._sum = frame.clone() if self._sum is None else self._sum + frame
            self._count += 1
        self._compare()

    def keep(self, frames: Iterable[Frame]) -> None:
        """Forgets every frame but these."""
        kept = {f.index for f in frames}
        self._pooled = {index: value for index, value in self._pooled.items() if index in kept}

    def surprise(self, novelty: float) -> float:
        """Novelty as a z-score against the stream so far; takes it into the running mean and deviation."""
        score = (novelty - self._mean) / self._deviation if self._deviation > 0 else 0.0
        if self._mean == 0.0 and self._deviation == 0.0:
            self._mean = novelty
        step = novelty - self._mean
        self._mean += (1 - MEMORY) * step
        self._deviation = math.sqrt(MEMORY * (self._deviation**2 + (1 - MEMORY) * step**2))
        return score

    def __call__(self, one: Frame, other: Frame) -> float:
        return self._table[one.index, other.index]

    def _compare(self) -> None:
        """Likeness of every pair, in one transfer from the device.

        1 - |x - y|^2 / (|x|^2 + |y|^2 + e) is the cosine when x and y are equally long; the small e makes frames of
        a still scene, which differ by noise alone, alike instead of unrelated.
        """
        assert self._sum is not None, "likeness of no frames"
        mean = self._sum / self._count
        x = torch.stack(list(self._pooled.values())) - mean
        square = x.pow(2).sum(dim=-1)
        apart = torch.cdist(x.transpose(0, 1), x.transpose(0, 1)).pow(2).permute(1, 2, 0)
        spread = square[:, None] + square[None, :] + STILLNESS * mean.pow(2).sum(dim=-1)
        alike = (1 - apart / spread.clamp_min(torch.finfo(spread.dtype).tiny)).mean(dim=-1).tolist()
        names = list(self._pooled)
        self._table = {(a, b): alike[i][j] for i, a in enumerate(names) for j, b in enumerate(names)}


class DriftGauge:
    """How far each frame's latent statistics (mean and deviation per channel) lie from the first chunk's.

    The distance is divided by its running 95th percentile, so 1 is the far end of the usual. A novelty rule prefers
    corrupted frames, for corruption is novel; this is what keeps them out.
    """

    def __init__(self, recent: int = 60) -> None:
        self._start: Tensor | None = None
        self._scale: Tensor | None = None
        self._distances: deque[float] = deque(maxlen=recent)

    def measure(self, latents: Tensor) -> list[float]:
        """latents [F, C, h, w], clean -> drift of every frame; the first chunk is the reference and has none."""
        statistics = torch.cat([latents.float().mean(dim=(2, 3)), latents.float().std(dim=(2, 3))], dim=1)
        if self._start is None or self._scale is None:
            self._start = statistics.mean(dim=0)
            self._scale = statistics.std(dim=0, correction=0) + 0.1 * self._start.abs() + 1e-3
            return [0.0] * len(latents)
        apart = ((statistics - self._start) / self._scale).pow(2).mean(dim=1).sqrt().tolist()
        drifts = [d / self._usual() if self._distances else 0.0 for d in apart]
        self._distances.extend(apart)
        return drifts

    def _usual(self) -> float:
        ordered = sorted(self._distances)
        return max(ordered[math.ceil(0.95 * len(ordered)) - 1], 1e-6)
