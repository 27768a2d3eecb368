"""The window of every head as the reference implementation keeps it, for the bench to compare with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hforce.attention.rope import ladder, rotary_pairs
from hforce.cache.heads import CacheStats
from hforce.geometry import Geometry


class EagerWindow:
    """A rolling window for all heads alike, with nothing but plain operations of torch.

    It computes what `HeadCache` computes under the policy `window`, in the way of the public code: keys are kept as
    they come, every pass rotates all of them in complex128, and a full cache is rolled by a copy of a copy. What the
    bench finds between the two is the gain of engineering; what it finds between policies is the gain of the method.
    """

    def __init__(self, geometry: Geometry, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.geometry = geometry
        self._past = geometry.span - geometry.chunk  # frames kept beside the chunk
        shape = (1, geometry.span * geometry.tokens, geometry.heads, geometry.head_dim)
        self.keys, self.values = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(geometry.layers)] for _ in range(2)
        )
        self._phase = phases(geometry).to(device)[:, None]
        self.reset()

    def reset(self) -> None:
        """Forgets everything, for a new video. The memory stays."""
        self.now = 0
        self._frames = 0  # of the last pass
        self._held = [0] * self.geometry.layers  # frames of the past, which lie at the start of each store

    def open(self, frames: int) -> None:
        """Nothing to get ready, and no two passes are alike: the first one over a chunk moves the past."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [1, N, H, D] before RoPE -> [1, N, H, D], over the past and the chunk itself."""
        tokens = self.geometry.tokens
        self._frames = q.shape[1] // tokens
        self._roll(layer, max(0, self._held[layer] + self._frames - self.geometry.span))
        begin, end = (tokens * n for n in (self._held[layer], self._held[layer] + self._frames))
        keys, values = self.keys[layer], self.values[layer]
        keys[:, begin:end], values[:, begin:end] = k, v
        query, key = rotate(q, self._phase[begin:end]), rotate(keys[:, :end], self._phase[:end])
        query, key, value = (x.transpose(1, 2) for x in (query, key, values[:, :end]))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)

    def advance(self, shot: int = 0, latents: Tensor | None = None, settled: bool = True) -> None:
        """Makes the chunk of the last pass part of the past. A window asks neither for shots nor for pictures."""
        self._held = [held + self._frames for held in self._held]
        self.now += self._frames

    def forget(self, since: int) -> None:
        """Drops every frame from number `since` on and continues there."""
        for layer, held in enumerate(self._held):
            self._roll(layer, max(0, held - self._past))  # a window had dropped these when the last chunk came
            self._held[layer] = max(0, self._held[layer] - (self.now - since))
        self.now = since

    def flush(self) -> None:
        """A window keeps the old scene."""

    def stats(self) -> CacheStats:
        """Bytes and frames, now."""
        held, chunk = min(self._held[0], self._past), self.geometry.chunk
        return CacheStats(
            nbytes=sum(x.nbytes for x in (*self.keys, *self.values)),
            frames={"memory": held},
            capacity={"memory": self._past},
            mean_frames=self._past + chunk,
            next_frames=held + chunk,
        )

    def _roll(self, layer: int, frames: int) -> None:
        """Drops the oldest frames of a layer: what is left moves to the front."""
        if not frames:
            return
        tokens = self.geometry.tokens
        begin, end = frames * tokens, self._held[layer] * tokens
        for store in (self.keys[layer], self.values[layer]):
            store[:, : end - begin] = store[:, begin:end].clone()
        self._held[layer] -= frames


def phases(geometry: Geometry) -> Tensor:
    """Rotary phases of a whole window, complex128 [span S, D / 2]: in time, height and width."""
    pairs = rotary_pairs(geometry.head_dim)
    axes = (geometry.span, *geometry.grid)
    places = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in axes), indexing="ij")
    angles = [
        place.reshape(-1, 1) * ladder(count, geometry.rope_theta) for place, count in zip(places, pairs, strict=True)
    ]
    angle = torch.cat(angles, dim=1)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, phase: Tensor) -> Tensor:
    """Turns neighbouring pairs of x [1, N, H, D] by phase, complex128 [N, 1, D / 2], in double precision."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * phase).flatten(-2).to(x.dtype)
