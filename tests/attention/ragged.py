"""Heads that read unequally much, drawn at random, and attention over them in float64 for comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from tests.builders import close, draw, rotate, softmax_attention
from torch import Tensor

from hforce.attention.layout import Backend, LayerView, Place, Run, Turns, tables
from hforce.attention.rope import Rope3D

CPU = torch.device("cpu")


@dataclass
class Ragged:
    """Heads of `slots` frames each, in a store with `room` for more, where all that no head reads is NaN.

    Keys are drawn as they were written; frame i of a head is placed at times[head, i].
    """

    slots: Sequence[int]
    width: int = 12
    tokens: int = 4
    queries: int = 12
    room: int = 9
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    seed: int = 0
    times: Tensor | None = None  # [heads, room]
    order: Tensor | None = None  # [heads, room]: which frame lies in which slot

    def __post_init__(self) -> None:
        heads = len(self.slots)
        shape = (heads, self.room, self.tokens, self.width)
        self.query = self._draw(self.queries, heads, self.width, seed=0)
        self.raw, self.values = self._draw(*shape, seed=1), self._draw(*shape, seed=2)
        if self.times is None:
            draws = torch.Generator().manual_seed(self.seed)
            rows = [torch.randperm(21, generator=draws)[: self.room] for _ in range(heads)]
            self.times = -torch.stack(rows).double()
        if self.order is None:
            self.order = torch.arange(self.room).expand(heads, -1)

    def shuffled(self, seed: int) -> Ragged:
        """The same frames in other slots."""
        draws = torch.Generator().manual_seed(seed)
        rows = [[*torch.randperm(n, generator=draws).tolist(), *range(n, self.room)] for n in self.slots]
        return replace(self, order=torch.tensor(rows))

    def truth(self) -> Tensor:
        """Float64 [N, H, D], one head after the other."""
        keys = self._turned()
        outs = [
            softmax_attention(self.query[:, head], *(x[head, :n].flatten(0, 1) for x in (keys, self.values)))
            for head, n in enumerate(self.slots)
        ]
        return torch.stack(outs, dim=1)

    def view(self, turning: bool) -> LayerView:
        """What a backend reads: with turned keys, or (turning) with raw ones and their turns."""
        keys = self.raw if turning else self._turned().to(self.dtype)
        keys, values = (self._stored(x).flatten(0, 2) for x in (keys, self.values))
        size, heads = self.room * self.tokens, len(self.slots)
        begins, counts = [*accumulate([size] * heads, initial=0)], [n * self.tokens for n in self.slots]
        runs = tuple(
            Run(head, head + 1, *(x[begin : begin + count][None] for x in (keys, values)))
            for head, (begin, count) in enumerate(zip(begins, counts, strict=False))
        )
        turns = self._turns() if turning else None
        begin = torch.tensor(begins, dtype=torch.int32, device=self.device)
        ((length, order),) = tables([counts], self.device)
        return LayerView(runs, keys, values, begin, begin.long() * self.width, length, order, size, turns)

    def _turns(self) -> Turns:
        """Lanes in reverse, so that a lane is no head."""
        phase = torch.view_as_real(Rope3D((1, self.tokens), self.width).time(self.times.gather(1, self.order)))
        lane = torch.arange(len(self.slots), dtype=torch.int32).flip(0)
        return Turns(phase.flip(0).contiguous().to(self.device), lane.to(self.device), self.tokens)

    def _turned(self) -> Tensor:
        """Keys at the times of their frames, float64 [heads, room, S, D]; raw ones have their place in space."""
        frames = zip(self.raw.cpu(), self.times.tolist(), strict=True)
        return torch.stack([rotate(x[:, None], t, (1, 1))[:, 0] for x, t in frames]).to(self.device)

    def _stored(self, x: Tensor) -> Tensor:
        spots = self.order.to(self.device)[:, :, None, None].expand_as(x)
        stored = x.gather(1, spots).clone()
        for head, n in enumerate(self.slots):
            stored[head, n:] = torch.nan
        return stored

    def _draw(self, *shape: int, seed: int) -> Tensor:
        return draw(*shape, seed=3 * self.seed + seed).to(self.device, self.dtype)


def agree(backend: Backend, ragged: Ragged, tolerance: float) -> None:
    """The backend gives softmax attention over the ragged heads, and nothing of what lies beside them."""
    out = backend.attend(ragged.query, ragged.view(backend.turns_queries))
    assert out.shape == ragged.query.shape and out.dtype == ragged.dtype
    torch.testing.assert_close(out.double(), ragged.truth(), atol=tolerance, rtol=0)


def places_a_chunk(place: Place, dtype: torch.dtype, width: int, device: torch.device = CPU) -> None:
    """It turns queries and keys as the rotation in float64 does, writes where every head reads, and nowhere else."""
    ragged, tokens = Ragged((9, 5, 7), width, dtype=dtype, device=device), 8
    view = ragged.view(turning=False)
    keys, values = view.keys.clone(), view.values.clone()
    query, key, value = (draw(tokens, 3, width, seed=seed).to(device, dtype) for seed in (3, 4, 5))
    angle = 6.3 * draw(tokens, 1, width // 2, seed=6).double()
    turned = place(query, key, value, torch.polar(torch.ones_like(angle), angle).to(device, torch.complex64), view)
    rounding = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    close(turned.double(), _turn(query, angle), rounding)
    for head, begin in enumerate(view.begin[:-1].tolist()):
        own = slice(begin, begin + tokens)
        close(view.keys[own].double(), _turn(key, angle)[:, head], rounding)
        assert torch.equal(view.values[own], value[:, head])
        keys[own], values[own] = view.keys[own], value[:, head]
    torch.testing.assert_close(view.keys, keys, atol=0, rtol=0, equal_nan=True)
    torch.testing.assert_close(view.values, values, atol=0, rtol=0, equal_nan=True)


def _turn(x: Tensor, angle: Tensor) -> Tensor:
    """Pairs (2i, 2i + 1) of x [N, H, D] turned by angle [N, 1, D/2], float64."""
    even, odd = x.double()[..., ::2], x.double()[..., 1::2]
    cosine, sine = angle.cos().to(x.device), angle.sin().to(x.device)
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2)
