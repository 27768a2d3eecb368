"""Which passes are measured, and the Probe that notes what heads look at in them."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from hforce.cache.heads import HeadCache
from hforce.errors import ConfigError
from hforce.geometry import Geometry

GROUPS: Final = ("sink", "middle", "current", "last4")  # the last one overlaps with the others
NEWEST = 4  # frames of the last group, the chunk included

ROLLING_FRAMES = 120  # latent frames in 30 s
ROLLING_FIRST = 4  # number of the first chunk that may be measured in a long roll-out
ROLLING_CHUNKS = 3  # chunks measured in each


@dataclass(frozen=True)
class Mode:
    """A way of measuring.

    first: geometry -> number of the first chunk that may be measured.
    chunks: geometry, prompt, seed -> numbers of the chunks measured, ascending.
    policy: geometry, sink frames -> name and options of the policy that all heads follow.
    """

    first: Callable[[Geometry], int]
    chunks: Callable[[Geometry, str, int], tuple[int, ...]]
    policy: Callable[[Geometry, int], tuple[str, dict[str, Any]]]


def native_first(geometry: Geometry) -> int:
    """The first chunk of the second half of the trained span."""
    return geometry.span // geometry.chunk // 2


def native_chunks(geometry: Geometry, prompt: str, seed: int) -> tuple[int, ...]:
    """All chunks of the second half of the trained span: 3 to 6 of the seven of Wan2.1."""
    return tuple(range(native_first(geometry), geometry.span // geometry.chunk))


def native_policy(geometry: Geometry, sink_frames: int) -> tuple[str, dict[str, Any]]:
    """Nothing is dropped or moved, so what is measured is the model as it was trained."""
    return "full", {}


def rolling_chunks(geometry: Geometry, prompt: str, seed: int) -> tuple[int, ...]:
    """Three chunks of a roll-out of 30 s, drawn from a generator keyed by (seed, prompt)."""
    legal = range(ROLLING_FIRST, ROLLING_FRAMES // geometry.chunk)
    return tuple(sorted(random.Random(f"hforce profile {seed} {prompt}").sample(legal, ROLLING_CHUNKS)))


def rolling_policy(geometry: Geometry, sink_frames: int) -> tuple[str, dict[str, Any]]:
    """The sink and the newest frames, without a gap in the span. A window alone would leave no sink to look at."""
    window = geometry.span - geometry.chunk - sink_frames
    return "sink", {"sink": sink_frames, "window": window, "positions": "rank"}


MODES: Mapping[str, Mode] = MappingProxyType(
    {
        "native21": Mode(native_first, native_chunks, native_policy),
        "rolling30": Mode(lambda geometry: ROLLING_FIRST, rolling_chunks, rolling_policy),
    }
)


@dataclass(frozen=True)
class RollOut:
    """A video to make and to look at: `chunks`, ascending, are the numbers of those measured."""

    mode: str
    prompt: str
    seed: int
    chunks: tuple[int, ...]

    @property
    def length(self) -> int:
        """Chunks to make: none is needed after the last one measured."""
        return self.chunks[-1] + 1


def plan(
    mode: str, prompts: Sequence[str], seeds: Sequence[int], geometry: Geometry, sink_frames: int
) -> list[RollOut]:
    """The roll-outs of a mode: every prompt with every seed.

    Raises ConfigError when the sink reaches into the chunks measured, for then the two are no longer apart.
    """
    way = MODES[mode]
    earliest = way.first(geometry) * geometry.chunk
    if sink_frames > earliest:
        raise ConfigError(
            f"profile.sink_frames is {sink_frames}, but mode {mode} measures from frame {earliest} on",
            f"set profile.sink_frames to {earliest} or less",
        )
    return [RollOut(mode, prompt, seed, way.chunks(geometry, prompt, seed)) for prompt in prompts for seed in seeds]


class Probe:
    """Stands in for the attention of a cache, and sums up what heads look at in the `wanted` (chunk, step) passes.

    The pass that commits a chunk comes after its last step, so it is not among them. Every `stride`-th query counts.
    """

    def __init__(self, cache: HeadCache, wanted: Collection[tuple[int, int]], sink_frames: int, stride: int) -> None:
        self.cache, self.wanted, self.sink_frames, self.stride = cache, frozenset(wanted), sink_frames, stride
        sizes = (cache.geometry.layers, cache.geometry.heads, len(GROUPS))
        self._sum = torch.zeros(sizes, device=cache.device)
        self._now, self._step = -1, 0

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [1, N, H, D] before RoPE -> [1, N, H, D], exactly as the cache would."""
        now = self.cache.now
        if layer == 0:
            self._now, self._step = now, self._step + 1 if now == self._now else 0
        out = self.cache.attend(layer, q, k, v)
        if (now // self.cache.geometry.chunk, self._step) in self.wanted:
            mass, numbers = self.cache.frame_mass(layer, q, self.stride)
            self._sum[layer] += group_mass(mass, numbers, now, self.sink_frames)
        return out

    def mean(self) -> Tensor:
        """Mean mass over the wanted passes, float64 [L, H, 4] on the CPU, by GROUPS."""
        return self._sum.cpu().double() / len(self.wanted)


def group_mass(mass: Tensor, numbers: Sequence[int], now: int, sink_frames: int) -> Tensor:
    """Sums the mass [H, frames] of frames with these ascending numbers by GROUPS -> [H, 4].

    sink are the first frames of the stream, current those of the chunk, which begins at `now`, middle all between;
    last4 the newest four.
    """
    newest = numbers[-NEWEST:]
    member = [[n < sink_frames, sink_frames <= n < now, n >= now, n in newest] for n in numbers]
    return mass @ torch.tensor(member, dtype=mass.dtype, device=mass.device)
