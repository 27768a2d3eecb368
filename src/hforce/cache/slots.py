"""SlotStore: where the keys and values of every head lie, and how frames are moved and turned in time there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from hforce.attention.layout import LayerView, Run, Turns, tables
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
        self, geometry: Geometry, strips: Sequence[Strip], rope: Rope3D, dtype: torch.dtype, turns_queries: bool
    ) -> None:
        self.geometry, self.strips, self.rope = geometry, strips, rope
        self._device = rope.space.device
        chunk, layers = geometry.chunk, range(geometry.layers)
        self._orders = [sorted(range(len(strips)), key=lambda at: strips[at].heads[layer]) for layer in layers]
        sizes = [[(chunk + strips[at].capacity) * geometry.tokens for at in self._lanes(layer)] for layer in layers]
        self._begins = [[*accumulate(row, initial=0)] for row in sizes]  # token of each head's begin, and the end
        self._begin = torch.tensor(self._begins, dtype=torch.int32, device=self._device)
        shape = (geometry.tokens, geometry.head_dim)
        slots = [sum(self._size(layer, at) for at in order) for layer, order in enumerate(self._orders)]
        self.keys = [self._zeros(n, *shape, dtype=dtype) for n in slots]  # [slots of all heads, S, D]
        self.values = [self._zeros(n, *shape, dtype=dtype) for n in slots]
        self.times: list[list[Tensor]] = []  # [lane][layer] -> [heads, capacity, S, time dims], as written
        if not turns_queries:
            width = (geometry.tokens, rope.time_dims)
            self.times = [
                [self._zeros(last - first, strip.capacity, *width, dtype=dtype) for first, last in strip.heads]
                for strip in strips
            ]
        deepest = chunk + max(strip.capacity for strip in strips)
        self._phase = self._zeros(len(strips), deepest, rope.time_dims // 2, 2, dtype=torch.float32)
        self._phase[..., 0] = 1  # no turn
        self._turns = [self._turns_of(layer) for layer in layers] if turns_queries else [None for _ in layers]

    @property
    def tensors(self) -> list[Tensor]:
        """All memory that grows with the frames held."""
        return [*self.keys, *self.values, *(x for layers in self.times for x in layers)]

    def block(self, store: Tensor, layer: int, lane: int) -> Tensor:
        """A lane's part of a layer's store -> [heads, slots, S, D], a view."""
        begin = sum(self._size(layer, at) for at in self._orders[layer][: self._orders[layer].index(lane)])
        first, last = self.strips[lane].heads[layer]
        part = store[begin : begin + self._size(layer, lane)]
        return part.unflatten(0, (last - first, self.geometry.chunk + self.strips[lane].capacity))

    def move(self, lane: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies frames from slots to slots of the past. Sources are all staging slots, or none of them is."""
        source, target = (torch.tensor(slots, device=self._device) for slots in (sources, targets))
        chunk, width = self.geometry.chunk, self.rope.time_dims
        is_new = sources[0] < chunk
        for layer in range(self.geometry.layers):
            keys, values = (self.block(x[layer], layer, lane) for x in (self.keys, self.values))
            moving = keys.index_select(1, source)
            if self.times:
                times = self.times[lane][layer]
                old = moving[..., :width] if is_new else times.index_select(1, source - chunk)
                times.index_copy_(1, target - chunk, old)
            keys.index_copy_(1, target, moving)
            values.index_copy_(1, target, values.index_select(1, source))

    def turn(self, lane: int, times: Tensor) -> None:
        """Turns the keys in the first slots of the past by `times` [frames], each from the time it was written at."""
        past = slice(self.geometry.chunk, self.geometry.chunk + len(times))
        phase = self.rope.time(times)
        if not self.times:
            self._phase[lane, past] = torch.view_as_real(phase)
            return
        for layer in range(self.geometry.layers):
            turned = turn(self.times[lane][layer][:, : len(times)], phase[:, None])
            self.block(self.keys[layer], layer, lane)[:, past, :, : self.rope.time_dims] = turned

    def read_keys(self, layer: int, lane: int, slots: int) -> Tensor:
        """Keys in a lane's first slots, turned to their times: float32 [heads, slots, S, D]."""
        keys, width = self.block(self.keys[layer], layer, lane)[:, :slots].float(), self.rope.time_dims
        if self.times:
            return keys
        phase = torch.view_as_complex(self._phase[lane, :slots])[:, None]
        return torch.cat([turn(keys[..., :width], phase), keys[..., width:]], dim=-1)

    def views(self, frames: int, held: Sequence[int]) -> list[LayerView]:
        """What the heads of every layer read in a pass of so many frames, when every lane holds so many of the past."""
        tokens = self.geometry.tokens
        counts = [
            [(frames + held[lane]) * tokens for lane in self._lanes(layer)] for layer in range(self.geometry.layers)
        ]
        views = []
        for layer, (length, order) in enumerate(tables(counts, self._device)):
            keys, values = (x[layer].flatten(0, 1) for x in (self.keys, self.values))
            begins = self._begins[layer]
            runs = tuple(self._runs(keys, values, begins, counts[layer]))
            longest = max(end - begin for begin, end in pairwise(begins))
            view = LayerView(runs, keys, values, self._begin[layer], length, order, longest, self._turns[layer])
            views.append(view)
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
