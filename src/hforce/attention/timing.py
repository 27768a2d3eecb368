"""How long backends take for the same layer of random keys and queries, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from hforce.attention.layout import Backend, LayerView, Turns, view_of
from hforce.attention.rope import rotary_pairs
from hforce.attention.vendor import vendor_kernels

ROUNDS = 7  # timed calls of every backend


@dataclass(frozen=True)
class Layer:
    """The sizes of one layer's attention: `queries` N, `tokens` S, `head_dim` D, latent frames that each head reads."""

    queries: int
    tokens: int
    head_dim: int
    frames: tuple[int, ...]

    @property
    def flops(self) -> int:
        """Floating-point operations of its two matrix products."""
        return 4 * self.queries * self.head_dim * self.tokens * sum(self.frames)


@dataclass(frozen=True)
class Contest:
    """One call to time: a backend and what it is given."""

    backend: Backend
    query: Tensor
    view: LayerView

    def __call__(self) -> Tensor:
        return self.backend.attend(self.query, self.view)


def enter(backend: Backend, layer: Layer, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Contest:
    """The backend with a layer of random normal tensors (never zeros: some chips multiply those faster)."""
    draw = torch.Generator().manual_seed(seed)
    total = layer.tokens * sum(layer.frames)
    shapes = ((layer.queries, len(layer.frames), layer.head_dim), (total, layer.head_dim), (total, layer.head_dim))
    query, keys, values = (torch.randn(shape, generator=draw).to(device, dtype) for shape in shapes)
    counts = [frames * layer.tokens for frames in layer.frames]
    turns = _random_turns(layer, device, draw) if backend.turns_queries else None
    return Contest(backend, query, view_of(keys, values, counts, turns))


def _random_turns(layer: Layer, device: torch.device, draw: torch.Generator) -> Turns:
    """Every head in a lane of its own, every slot at a random distance."""
    heads, slots, pairs = len(layer.frames), max(layer.frames), rotary_pairs(layer.head_dim)[0]
    angle = 6.3 * torch.rand(heads, slots, pairs, generator=draw)
    phase = torch.stack([angle.cos(), angle.sin()], dim=-1)
    return Turns(phase.to(device), torch.arange(heads, dtype=torch.int32, device=device), layer.tokens)


def race(calls: Sequence[Callable[[], Tensor]], device: torch.device, rounds: int = ROUNDS) -> list[float]:
    """Median seconds of every call. All are warmed up, then take turns, every second round backwards."""
    times: list[list[float]] = [[] for _ in calls]
    with vendor_kernels(device):
        for call in calls:
            call()
        for number in range(rounds):
            turn = range(len(calls)) if number % 2 == 0 else reversed(range(len(calls)))
            for place in turn:
                times[place].append(_seconds(calls[place], device))
    return [median(x) for x in times]


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
