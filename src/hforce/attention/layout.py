"""What the heads of one layer read, each a run of its own length, and the one signature of every backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Protocol

import torch
from torch import Tensor

from hforce.attention.rope import turn

MOST_TURNED = 1 << 22  # values that plain operations turn at once


@dataclass(frozen=True)
class Run:
    """Neighbouring heads, first .. last - 1, that read equally many tokens: a dense block of the store."""

    first: int
    last: int
    keys: Tensor  # [heads, tokens, D], a view of the store: the tokens of the chunk first, then the past
    values: Tensor  # [heads, tokens, D], likewise


@dataclass(frozen=True)
class Turns:
    """How far the keys of every slot are still to be turned in time, where the query is turned back instead.

    A slot holds one latent frame of one head; all heads of a lane share their slots' numbers and turns.
    """

    phase: Tensor  # float32 [lanes, slots, time pairs, 2]: cosine and sine of every turn; slot 0 begins the run
    lane: Tensor  # int32 [H]: the lane of every head
    tokens: int  # S, the tokens of a slot


@dataclass(frozen=True)
class LayerView:
    """The keys and values that the heads of one layer read, the same twice: as dense runs, and as one ragged store.

    Head h reads the `length[h]` tokens of the store from token `begin[h]` on. The runs are known to the host, the
    lengths lie on the device: a backend that uses those alone never waits for it. Without `turns` keys are ready to
    be compared with queries.
    """

    runs: tuple[Run, ...]  # in the order of their heads
    keys: Tensor  # [tokens of all heads, D]
    values: Tensor  # [tokens of all heads, D]
    begin: Tensor  # int32 [H + 1], the last entry is the end of the store
    offset: Tensor  # int64 [H + 1]: the same in values, D times as much
    length: Tensor  # int32 [H]
    order: Tensor  # int32 [H]: heads, the longest first
    longest: int  # tokens that a head may read at most
    turns: Turns | None = None


class Attention(Protocol):
    """Attention of one layer in a pass over one chunk, the chunk itself being part of what is read.

    query [N, H, D], turned in full, and what its heads read -> [N, H, D], contiguous or not.
    """

    def __call__(self, query: Tensor, view: LayerView) -> Tensor: ...


class Place(Protocol):
    """Puts a chunk where its heads read it, its keys turned, and returns its queries turned.

    query, key, value [N, H, D] before RoPE, phase complex64 [N, 1, D/2] -> [N, H, D].
    """

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, phase: Tensor, view: LayerView) -> Tensor: ...


def place(query: Tensor, key: Tensor, value: Tensor, phase: Tensor, view: LayerView) -> Tensor:
    """`Place` in plain operations: the chunk goes in front of every run of heads."""
    turned, tokens = turn(key, phase), key.shape[0]
    for run in view.runs:
        heads = slice(run.first, run.last)
        run.keys[:, :tokens].copy_(turned[:, heads].transpose(0, 1))
        run.values[:, :tokens].copy_(value[:, heads].transpose(0, 1))
    return turn(query, phase)


@dataclass(frozen=True)
class Past:
    """Where the heads of one lane keep their frames, those of all layers together.

    Head h owns the slots from `first[h]` on, the first `chunk` of which are staging. `times` has no slots for those:
    its first of head h is `early[h]`. It keeps what turns in time as it was written; None where queries are turned.
    """

    keys: Tensor  # [slots of all layers, S, D]
    values: Tensor  # [slots of all layers, S, D]
    times: Tensor | None  # [slots of the past of all layers, S, time dims]
    first: Tensor  # int64 [heads]
    early: Tensor  # int64 [heads]
    chunk: int


class Move(Protocol):
    """Copies frames from slots to other slots, in every head alike; no slot is both a source and a target."""

    def __call__(self, past: Past, sources: Sequence[int], targets: Sequence[int]) -> None: ...


class TurnPast(Protocol):
    """Turns the keys in the first slots of the past in time, from how they were written: phase complex64 [n, pairs]."""

    def __call__(self, past: Past, phase: Tensor) -> None: ...


def move(past: Past, sources: Sequence[int], targets: Sequence[int]) -> None:
    """`Move` in plain operations."""
    for source, target in zip(sources, targets, strict=True):
        old, new = past.first + source, past.first + target
        moving = past.keys.index_select(0, old)
        past.keys.index_copy_(0, new, moving)
        past.values.index_copy_(0, new, past.values.index_select(0, old))
        if past.times is not None:
            is_new, early = source < past.chunk, past.early - past.chunk
            times = moving[..., : past.times.shape[-1]] if is_new else past.times.index_select(0, early + source)
            past.times.index_copy_(0, early + target, times)


def turn_past(past: Past, phase: Tensor) -> None:
    """`TurnPast` in plain operations, so many heads at a time that what lies in between stays small."""
    assert past.times is not None, "keys that stay as they were written are not turned"
    slots, (tokens, width) = torch.arange(len(phase), device=phase.device), past.times.shape[1:]
    heads = max(1, MOST_TURNED // (len(phase) * tokens * width))
    for first, early in zip(past.first.split(heads), past.early.split(heads), strict=True):
        old, new = ((begin[:, None] + slots).flatten() for begin in (early, first + past.chunk))
        turned = turn(past.times.index_select(0, old), phase.repeat(len(first), 1)[:, None])
        past.keys[..., :width].index_copy_(0, new, turned)


@dataclass(frozen=True)
class Keeping:
    """How keys and values are written, moved and turned: the same in plain operations as in kernels of ours."""

    place: Place = place
    move: Move = move
    turn_past: TurnPast = turn_past


PLAIN = Keeping()


@dataclass(frozen=True)
class Backend:
    """A way to attend. One that `turns_queries` wants keys as they were written, and `LayerView.turns` beside them.

    One that `waits` asks the device for something in a pass, which can then not be recorded.
    """

    name: str
    attend: Attention
    turns_queries: bool = False
    keeping: Keeping = PLAIN
    waits: bool = False


def view_of(keys: Tensor, values: Tensor, counts: Sequence[int], turns: Turns | None = None) -> LayerView:
    """A view of heads whose tokens lie one after the other: keys, values [tokens of all heads, D], tokens per head."""
    begins, runs, first = [0, *accumulate(counts)], [], 0
    for count, group in groupby(counts):
        last = first + len([*group])
        tokens = slice(begins[first], begins[last])
        runs.append(Run(first, last, *(x[tokens].unflatten(0, (-1, count)) for x in (keys, values))))
        first = last
    begin = torch.tensor(begins, dtype=torch.int32, device=keys.device)
    ((length, order),) = tables([counts], keys.device)
    offset = begin.long() * keys.shape[-1]
    return LayerView(tuple(runs), keys, values, begin, offset, length, order, max(counts), turns)


def tables(counts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """`length` and `order` of the view of every layer, given what its heads read: int32 [L, 2, H], in one transfer."""
    orders = [sorted(range(len(row)), key=lambda head: -row[head]) for row in counts]
    return torch.tensor([*zip(counts, orders, strict=True)], dtype=torch.int32, device=device)
