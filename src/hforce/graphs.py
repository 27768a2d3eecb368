"""Passes of the transformer recorded as CUDA graphs, and launched whole from then on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hforce.attention.vendor import vendor_kernels
from hforce.models.dit import TextContext

log = logging.getLogger(__name__)

MOST = 8  # recorded passes kept at a time

Run = Callable[[Tensor, Tensor, TextContext], Tensor]
"""A pass: latents [1, F, C, h, w], timestep [1, 1] and text -> flow [1, F, C, h, w]."""


@dataclass(frozen=True)
class Recorded:
    """A pass that reads `x` and `t` and writes `flow`, tensors of its own; `number` in the order of recording."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    t: Tensor
    flow: Tensor
    number: int


@lru_cache
def side_queue(device: torch.device, use: str) -> torch.cuda.Stream:
    """The CUDA stream of a device for one use: memory is reused within a stream alone, and torch has few of them."""
    return torch.cuda.Stream(device)


class Graphs:
    """Starting a pass of a billion weights takes Python about as long as the GPU needs for it; a recorded one, nothing.

    A graph reads and writes the memory that it was recorded with. So there is one for every layout of the cache, which
    names what a pass reads, and prompts are copied to one place. Where recording fails, passes go on in single steps.

    patience: how many passes over a layout are made in single steps first; in the last of them, libraries choose their
    kernels. Where attention plans for every shape, that is worth it only for layouts that stay for more than a chunk.
    """

    def __init__(self, patience: int = 1) -> None:
        self._patience = patience
        self.replays: list[int] = []
        """How often each recorded pass was launched, in the order of recording."""
        self.nbytes = 0
        """Memory that recorded passes keep for themselves."""
        self._met: dict[Hashable, int] = {}
        self._kept: dict[Hashable, Recorded] = {}
        self._given: TextContext | None = None
        self._text: TextContext | None = None
        self._pool: Any = None
        self._works = True

    def again(self) -> Graphs:
        """New ones, for the same model and another cache."""
        return Graphs(self._patience)

    def __call__(self, run: Run, x: Tensor, t: Tensor, text: TextContext, layout: Hashable | None) -> Tensor:
        """Makes a pass, launched from a graph where there is one. layout: of the cache; None: it is not known."""
        key = (layout, x.shape)
        met = 0 if key in self._kept else self._count(key)
        with vendor_kernels(x.device, in_haste=0 < met < self._patience):
            if 0 < met <= self._patience or layout is None or not self._works:
                return run(x, t, text)
            self._read(text)
            if met and not self._record(key, run, x, t):
                return run(x, t, text)
        kept = self._kept[key] = self._kept.pop(key)  # the last one used is the last to go
        kept.x.copy_(x)
        kept.t.copy_(t)
        kept.graph.replay()
        self.replays[kept.number] += 1
        return kept.flow.clone()

    def _count(self, key: Hashable) -> int:
        """How often a pass was met, this time included."""
        self._met[key] = self._met.pop(key, 0) + 1
        if len(self._met) > MOST:
            del self._met[next(iter(self._met))]
        return self._met[key]

    def _read(self, text: TextContext) -> None:
        """Brings a prompt to where graphs read it."""
        if text is self._given:
            return
        if self._text is None:
            self._text = TextContext(*(tuple(x.clone() for x in part) for part in (text.keys, text.values)))
        else:
            torch._foreach_copy_([*self._text.keys, *self._text.values], [*text.keys, *text.values])
        self._given = text

    def _record(self, key: Hashable, run: Run, x: Tensor, t: Tensor) -> bool:
        """Records a pass, which does not make it. Returns whether it could be."""
        x, t, graph = x.clone(), t.clone(), torch.cuda.CUDAGraph()
        if not self._pool:
            torch.cuda.empty_cache()  # a recording cannot have what others left, such as those of the video before
            self._pool = torch.cuda.graph_pool_handle()
        before = torch.cuda.memory_reserved(x.device)
        try:
            flow = self._capture(graph, run, x, t)
        except BaseException as error:
            # A recording that broke off leaves the allocator in the belief that it goes on.
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(x.device.index, self._pool)
            if not isinstance(error, RuntimeError):
                raise
            log.warning("passes run in single steps, for recording one failed: %s", str(error).partition("\n")[0])
            self._works, self._given, self._text, self.nbytes = False, None, None, 0
            self._kept.clear()
            return False
        self.nbytes += max(0, torch.cuda.memory_reserved(x.device) - before)
        self._kept[key] = Recorded(graph, x, t, flow, len(self.replays))
        self.replays.append(0)
        if len(self._kept) > MOST:
            del self._kept[next(iter(self._kept))]
        return True

    def _capture(self, graph: torch.cuda.CUDAGraph, run: Run, x: Tensor, t: Tensor) -> Tensor:
        """Puts a pass into a graph and returns where it will write the flow. Raises RuntimeError."""
        assert self._text is not None, "there is a prompt before there is a pass"
        with torch.cuda.device(x.device), torch.cuda.stream(side_queue(x.device, "recording")):
            # Not by torch.cuda.graph, which collects garbage and gives all free memory back before every recording.
            # What other threads do meanwhile, as decoding, is no part of it.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                flow = run(x, t, self._text)
            except BaseException:  # a request to stop among them
                with suppress(RuntimeError):  # what went wrong in the pass says more
                    graph.capture_end()
                raise
            graph.capture_end()
        return flow
