"""The autoregressive loop; a generator of latent chunks.

    for every chunk:
        noise -> few denoising steps -> clean latents          each step looks at the past through the cache
        one more pass over the clean latents, at timestep 0    leaves their keys and values in the cache
        cache.advance()                                        every role keeps and places what its policy wants

That is Self-Forcing (arXiv 2506.08009). Head Forcing (arXiv 2605.14487) happens in the cache alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from hforce.attention.vendor import vendor_kernels
from hforce.cache.heads import CacheStats, HeadCache
from hforce.errors import DataError
from hforce.geometry import Geometry
from hforce.graphs import Graphs
from hforce.models.dit import Attend, CausalWan, TextContext
from hforce.sampler import Step, few_step, keyed_noise

Noise = Callable[[int, Sequence[int]], Iterator[Tensor]]
"""Chunk number and shape -> draws of noise: the start, then one for every re-noising."""

SETTLING = 2  # chunks after a change of prompt in which the drift gate stays open


class Past(Protocol):
    """What a stream asks of a cache; `HeadCache` says what each of these does."""

    geometry: Geometry
    now: int

    def reset(self) -> None: ...

    def open(self, frames: int) -> Hashable | None: ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...

    def advance(self, shot: int = 0, latents: Tensor | None = None, settled: bool = True) -> None: ...

    def forget(self, since: int) -> None: ...

    def flush(self) -> None: ...

    def stats(self) -> CacheStats: ...


@dataclass(frozen=True)
class Take:
    """A stretch of video under one prompt: text [1, T, text_dim], for so many chunks (None: as long as one asks)."""

    text: Tensor
    chunks: int | None = None


@dataclass(frozen=True)
class Chunk:
    """Clean latents [1, F, C, h, w] of chunk `number`, made under prompt number `shot`; seconds spent per stage.

    Numbers below 0 are of chunks that were given, not made.
    """

    number: int
    shot: int
    latents: Tensor
    seconds: dict[str, float]


@dataclass(frozen=True)
class Sampling:
    """How a chunk is denoised.

    first_steps, where given, hold for the chunk that opens a shot, of which nothing can be copied from the past; the
    first shot of a video that starts from given latents is open already. first_frames is the number of latent frames of
    the very first chunk; 0: as many as of any other.
    """

    steps: tuple[Step, ...]
    first_steps: tuple[Step, ...] = ()
    first_frames: int = 0
    commit_timestep: float = 0.0  # what the model is told in the clean pass (Self-Forcing: context_noise)


@dataclass(frozen=True)
class Switch:
    """What happens to the cache when the prompt changes.

    keep: nothing. flush: policies drop the old scene. recache: the last `frames` latents, in whole chunks, are run
    again under the new prompt, chunk by chunk, so that their keys and values speak of it (LongLive, arXiv 2509.22622).
    """

    rule: str = "recache"
    frames: int = 6


@dataclass
class Stream:
    """Plays a script through a model and its cache. One stream makes one video at a time.

    shape is (C, h, w) of a latent frame. attend defaults to the cache's own; a profiler wraps it. clock measures
    seconds and must wait for the device where work is queued. graphs, on CUDA, launch passes whole, which `attend` is
    then not called in; kernels is entered around those that are not.
    """

    model: CausalWan
    cache: Past
    sampling: Sampling
    shape: tuple[int, int, int]
    noise: Noise
    switch: Switch = field(default_factory=Switch)
    attend: Attend | None = None
    graphs: Graphs | None = None
    kernels: Callable[[torch.device], AbstractContextManager[None]] = vendor_kernels
    clock: Callable[[], float] = time.perf_counter
    _drawn: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict, init=False)  # ahead: see `_draw_ahead`

    @property
    def attention(self) -> str:
        """What attends, as it is called in reports."""
        return self.cache.backend.name if isinstance(self.cache, HeadCache) else "sdpa"

    @torch.inference_mode()
    def play(self, script: Iterable[Take], given: Tensor | None = None) -> Iterator[Chunk]:
        """Clean chunks, one after the other, as they are made; ends with the script.

        script is any iterable, read when its next take begins: a list, or a generator that waits for a person.
        given [1, F0, C, h, w], clean latents to start from, comes first: it is taken into the cache chunk by chunk,
        and these chunks have numbers below 0.
        Raises DataError at a chunk with values that are not finite; the chunks before it are good.
        """
        self.cache.reset()
        number, recent = 0, deque[Tensor]()
        for shot, take in enumerate(script):
            text = self.model.project_text(self._to_device(take.text))
            if shot:
                self._change_prompt(recent, text, shot)
            elif given is not None:
                yield from self._take_in(given, text, recent)
            begun = number
            while take.chunks is None or number - begun < take.chunks:
                yield self._make(number, number - begun, shot, text, recent)
                number += 1

    def _make(self, number: int, in_shot: int, shot: int, text: TextContext, recent: deque[Tensor]) -> Chunk:
        """Denoises one chunk, number `in_shot` of its shot, and commits it."""
        start = self.clock()
        is_first = number == 0 and self.cache.now == 0
        opens = is_first or (shot > 0 and in_shot == 0)
        settled = not shot or in_shot >= SETTLING
        frames = (is_first and self.sampling.first_frames) or self.cache.geometry.chunk
        steps = (opens and self.sampling.first_steps) or self.sampling.steps
        clean = self._denoise(self._draw(number, frames, steps), steps, text)
        self._draw_ahead(number + 1)
        if not bool(torch.isfinite(clean).all()):
            raise DataError(
                f"chunk {number} holds values that are not finite after denoising",
                mend="try model.dtype=float32; the chunks before it are kept",
            )
        denoised = self.clock()
        self._commit(clean, text, shot, settled, recent)
        return Chunk(number, shot, clean, {"denoise": denoised - start, "commit": self.clock() - denoised})

    def _draw(self, number: int, frames: int, steps: Sequence[Step]) -> list[Tensor]:
        """All noise of a chunk, [1, F, C, h, w] each, on the device before its first pass: none waits for it."""
        drawn = self._drawn.pop((number, frames), [])
        if len(drawn) < len(steps):
            drawn = [self._to_device(x) for x in islice(self.noise(number, (1, frames, *self.shape)), len(steps))]
        return drawn[: len(steps)]

    def _draw_ahead(self, number: int) -> None:
        """Draws the noise of the next chunk, should there be one, while a GPU is busy with this one."""
        device, frames = self.model.patch_embedding.weight.device, self.cache.geometry.chunk
        if device.type == "cuda":
            draws = islice(self.noise(number, (1, frames, *self.shape)), len(self.sampling.steps))
            moved = [x.pin_memory().to(device, non_blocking=True) for x in draws]
            self._drawn = {(number, frames): [self._to_device(x) for x in moved]}

    def _denoise(self, noise: Sequence[Tensor], steps: Sequence[Step], text: TextContext) -> Tensor:
        """The denoising passes; nothing in them waits for the device."""
        return few_step(lambda x, t: self._flow(x, t, text), steps, iter(noise))

    def _commit(self, clean: Tensor, text: TextContext, shot: int, settled: bool, recent: deque[Tensor]) -> None:
        """The clean pass: what it leaves in the staging slots becomes the past."""
        self._flow(clean, self.sampling.commit_timestep, text)
        self.cache.advance(shot, clean[0], settled)
        recent.append(clean)
        while recent and sum(x.shape[1] for x in recent) - recent[0].shape[1] >= self.switch.frames:
            recent.popleft()

    def _flow(self, x: Tensor, timestep: float, text: TextContext) -> Tensor:
        t = torch.full((1, 1), timestep, device=x.device)
        layout = self.cache.open(x.shape[1])
        if self.graphs:
            return self.graphs(self._run, x, t, text, layout)
        with self.kernels(x.device):
            return self._run(x, t, text)

    def _run(self, x: Tensor, t: Tensor, text: TextContext) -> Tensor:
        return self.model(x, t, text, self.attend or self.cache.attend)

    def _take_in(self, given: Tensor, text: TextContext, recent: deque[Tensor]) -> Iterator[Chunk]:
        """Commits latents that were not made here, in chunks; the first one takes what does not divide."""
        chunk = self.cache.geometry.chunk
        first = given.shape[1] % chunk
        sizes = [first, *[chunk] * (given.shape[1] // chunk)] if first else [chunk] * (given.shape[1] // chunk)
        for number, piece in enumerate(self._to_device(given).split(sizes, dim=1), start=-len(sizes)):
            start = self.clock()
            self._commit(piece, text, 0, True, recent)
            yield Chunk(number, 0, piece, {"denoise": 0.0, "commit": self.clock() - start})

    def _change_prompt(self, recent: deque[Tensor], text: TextContext, shot: int) -> None:
        if self.switch.rule == "flush":
            self.cache.flush()
        if self.switch.rule != "recache":
            return
        again = list(recent)
        recent.clear()
        self.cache.forget(self.cache.now - sum(x.shape[1] for x in again))
        for clean in again:
            self._commit(clean, text, shot, False, recent)

    def _to_device(self, x: Tensor) -> Tensor:
        weight = self.model.patch_embedding.weight
        return x.to(device=weight.device, dtype=weight.dtype)


def seeded(seed: int) -> Noise:
    """The noise of a video with this seed (`sampler.keyed_noise`)."""
    return lambda chunk, shape: keyed_noise(seed, chunk, shape)
