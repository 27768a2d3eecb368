"""SlotStore: where the keys and values of every head lie, and how frames are moved and turned in time there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from hforce.attention.layout import Backend, LayerView, Past, Run, Turns, tables
from hforce.attention.rope import Rope3D, turn
from hforce.geometry import Geometry


@dataclass(frozen=True)
class Strip:
    """The heads of one lane: how many frames of the past each may hold, and which heads they are in every layer."""

    capacity: int
    heads: tuple[tuple[int, int], ...]  # first and last + 1 per layer, in the model's order; equal where there is none


class SlotStore:
    """Keys and values of all heads, a store per layer in which the heads lie one after the other.

    A slot holds one latent frame of one head. Each head has `chunk + capacity` of them: the first `chunk` are staging,
    those of the past follow. All heads of a lane use their slots alike.

    Keys are written turned by their place in the picture and in the chunk. How those of the past come to the times at
    which they are placed depends on who attends: they are turned here, from a second copy of what turns in time (always
    the key as written, so errors do not add up), or, where the backend turns its queries (`turns_queries`), they stay
    as they were written and only the angle is noted; then there is no second copy.
    """

    def __init__(
        self, geometry: Geometry, strips: Sequence[Strip], rope: Rope3D, dtype: torch.dtype, backend: Backend
    ) -> None:
        self.geometry, self.strips, self.rope, self._keeping = geometry, strips, rope, backend.keeping
        self._device = rope.space.device
        chunk, layers = geometry.chunk, range(geometry.layers)
        self._orders = [sorted(range(len(strips)), key=lambda at: strips[at].heads[layer]) for layer in layers]
        sizes = [[(chunk + strips[at].capacity) * geometry.tokens for at in self._lanes(layer)] for layer in layers]
        self._begins = [[*accumulate(row, initial=0)] for row in sizes]  # token of each head's begin, and the end
        self._begin = torch.tensor(self._begins, dtype=torch.int32, device=self._device)
        self._offset = self._begin.long() * geometry.head_dim
        slots = [sum(self._size(layer, at) for at in order) for layer, order in enumerate(self._orders)]
        shape = (sum(slots), geometry.tokens, geometry.head_dim)
        self._keys, self._values = (self._zeros(*shape, dtype=dtype) for _ in range(2))
        self.keys, self.values = (x.split(slots) for x in (self._keys, self._values))  # per layer [slots, S, D]
        self._times = None
        if not backend.turns_queries:
            past = sum(strip.capacity * (last - first) for strip in strips for first, last in strip.heads)
            self._times = self._zeros(past, geometry.tokens, rope.time_dims, dtype=dtype)
        starts = [*accumulate(slots, initial=0)]
        self._past = [self._past_of(lane, starts) for lane in range(len(strips))]
        self._tables = torch.zeros(geometry.layers, 2, geometry.heads, dtype=torch.int32, device=self._device)
        deepest = chunk + max(strip.capacity for strip in strips)
        self._phase = self._zeros(len(strips), deepest, rope.time_dims // 2, 2, dtype=torch.float32)
        self._phase[..., 0] = 1  # no turn
        self._turns = [self._turns_of(layer) if backend.turns_queries else None for layer in layers]

    @property
    def tensors(self) -> list[Tensor]:
        """All memory that grows with the frames held."""
        return [self._keys, self._values, *([] if self._times is None else [self._times])]

    def block(self, store: Tensor, layer: int, lane: int) -> Tensor:
        """A lane's part of a layer's store -> [heads, slots, S, D], a view."""
        begin = sum(self._size(layer, at) for at in self._orders[layer][: self._orders[layer].index(lane)])
        first, last = self.strips[lane].heads[layer]
        part = store[begin : begin + self._size(layer, lane)]
        return part.unflatten(0, (last - first, self.geometry.chunk + self.strips[lane].capacity))

    def move(self, lane: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies frames from slots to slots of the past, none of which is a source, too."""
        self._keeping.move(self._past[lane], sources, targets)

    def turn(self, lane: int, times: Tensor) -> None:
        """Turns the keys in the first slots of the past by `times` [frames], each from the time it was written at."""
        phase = self.rope.time(times)
        if self._times is None:
            chunk = self.geometry.chunk
            self._phase[lane, chunk : chunk + len(times)] = torch.view_as_real(phase)
        else:
            self._keeping.turn_past(self._past[lane], phase)

    def read_keys(self, layer: int, lane: int, slots: int) -> Tensor:
        """Keys in a lane's first slots, turned to their times: float32 [heads, slots, S, D]."""
        keys, width = self.block(self.keys[layer], layer, lane)[:, :slots].float(), self.rope.time_dims
        if self._times is not None:
            return keys
        phase = torch.view_as_complex(self._phase[lane, :slots])[:, None]
        return torch.cat([turn(keys[..., :width], phase), keys[..., width:]], dim=-1)

    def tell(self, frames: int, held: Sequence[int]) -> None:
        """Writes down on the device how much the heads of every layer read in a pass; see `views`."""
        self._tables.copy_(tables(self._counts(frames, held), torch.device("cpu")))

    def views(self, frames: int, held: Sequence[int]) -> list[LayerView]:
        """What the heads of every layer read in a pass of so many frames, when every lane holds so many of the past.

        Lengths and orders are those that were told of last, in all views alike.
        """
        counts, views = self._counts(frames, held), []
        for layer, (length, order) in enumerate(self._tables):
            keys, values = (x[layer].flatten(0, 1) for x in (self.keys, self.values))
            begins = self._begins[layer]
            runs = tuple(self._runs(keys, values, begins, counts[layer]))
            longest = max(end - begin for begin, end in pairwise(begins))
            place = self._begin[layer], self._offset[layer]
            views.append(LayerView(runs, keys, values, *place, length, order, longest, self._turns[layer]))
        return views

    def _runs(self, keys: Tensor, values: Tensor, begins: Sequence[int], counts: Sequence[int]) -> Iterator[Run]:
        """Neighbouring heads with equally many slots, all of which are read or the same number of them."""
        first = 0
        alike = [(end - begin, count) for (begin, end), count in zip(pairwise(begins), counts, strict=True)]
        for last in range(1, len(counts) + 1):
            if last < len(counts) and alike[last] == alike[first]:
                continue
            size, count = alike[first]
            tokens = slice(begins[first], begins[last])
            yield Run(first, last, *(x[tokens].unflatten(0, (-1, size))[:, :count] for x in (keys, values)))
            first = last

    def _counts(self, frames: int, held: Sequence[int]) -> list[list[int]]:
        """How many tokens every head of every layer reads."""
        tokens, layers = self.geometry.tokens, range(self.geometry.layers)
        return [[(frames + held[lane]) * tokens for lane in self._lanes(layer)] for layer in layers]

    def _past_of(self, lane: int, starts: Sequence[int]) -> Past:
        """Where a lane's heads keep their frames, given the first slot of every layer."""
        strip, chunk = self.strips[lane], self.geometry.chunk
        first: list[int] = []
        for layer, start in enumerate(starts[:-1]):
            order = self._orders[layer]
            start += sum(self._size(layer, at) for at in order[: order.index(lane)])
            first += range(start, start + self._size(layer, lane), chunk + strip.capacity)
        before = sum(other.capacity * (b - a) for other in self.strips[:lane] for a, b in other.heads)
        early = [before + number * strip.capacity for number in range(len(first))]
        heads, kept = (torch.tensor(x, dtype=torch.int64, device=self._device) for x in (first, early))
        return Past(self._keys, self._values, self._times, heads, kept, chunk)

    def _turns_of(self, layer: int) -> Turns:
        lane = torch.tensor(self._lanes(layer), dtype=torch.int32, device=self._device)
        return Turns(self._phase, lane, self.geometry.tokens)

    def _lanes(self, layer: int) -> list[int]:
        """The lane of every head."""
        return [at for at in self._orders[layer] for _ in range(*self.strips[at].heads[layer])]

    def _size(self, layer: int, lane: int) -> int:
        """Slots of a lane's heads in a layer."""
        first, last = self.strips[lane].heads[layer]
        return (last - first) * (self.geometry.chunk + self.strips[lane].capacity)

    def _zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=self._device)
