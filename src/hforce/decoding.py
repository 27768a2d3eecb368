"""Chunks of latents -> video frames, the next chunk being made while one is decoded."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Executor, wait
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hforce.errors import DataError, memory_for
from hforce.graphs import side_queue
from hforce.models.base import Backbone
from hforce.stream import Chunk, Stream, Take

Item = TypeVar("Item")
Decoded = tuple[Chunk, NDArray[np.uint8], dict[str, float]]


def decoded(
    stream: Stream,
    script: Sequence[Take],
    backbone: Backbone,
    given: Tensor | None = None,
    worker: Executor | None = None,
) -> Iterator[Decoded]:
    """Chunks with their video frames uint8 [T, H, W, 3], and the seconds of every stage; the `given` latents first.

    With a worker the next chunk is made meanwhile: the same frames in less time, and in more memory, for both are
    at work at once. Raises DataError at a chunk whose latents or frames hold values that are not finite, RoomError for
    want of memory.
    """
    decoder, chunks = backbone.codec.decoder(), _made(stream, script, given)
    for chunk in read_ahead(chunks, worker) if worker else chunks:
        begin = time.perf_counter()
        with memory_for(f"decoding chunk {chunk.number}"), _beside(backbone.device if worker else "cpu"):
            frames = decoder(chunk.latents)
            if not bool(torch.isfinite(frames).all()):
                message = f"the video frames of chunk {chunk.number} hold values that are not finite"
                raise DataError(message, "the codec's weights do not fit the model; the chunks before it are kept")
            pictures = to_bytes(frames)
        yield chunk, pictures, {**chunk.seconds, "decode": time.perf_counter() - begin}


def warm_up(backbone: Backbone, firsts: Collection[int] = (0,)) -> None:
    """Decodes two chunks of zeros for every length of a first one. To be done before anything else is at work on a GPU.

    Our kernels are built then, and cuDNN tries out convolutions: beside a chunk being made it would time that, too, and
    keep its passes from being recorded. firsts: latent frames of the first chunk; 0: as many as of any other.
    """
    chunk = backbone.geometry.chunk
    with torch.inference_mode(), _beside(backbone.device):
        for first in firsts:
            decoder = backbone.codec.decoder()
            for frames in (first or chunk, chunk):
                shape = (1, frames, *backbone.shape)
                to_bytes(decoder(torch.zeros(shape, device=backbone.device, dtype=backbone.dtype)))


def read_ahead(items: Iterator[Item], worker: Executor) -> Iterator[Item]:
    """The same items; while one is being used, a worker makes the next, which is waited for at the end."""
    coming = worker.submit(next, items, None)
    try:
        while (item := coming.result()) is not None:
            coming = worker.submit(next, items, None)
            yield item
    finally:
        wait([coming])


def to_bytes(frames: Tensor) -> NDArray[np.uint8]:
    """Video frames [T, 3, H, W] in 0..1 -> uint8 [T, H, W, 3], rounded."""
    pictures = (frames * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    if not pictures.is_cuda:
        return pictures.cpu().numpy()
    here = torch.empty_like(pictures, device="cpu", pin_memory=True)  # to which a GPU copies several times as fast
    here.copy_(pictures, non_blocking=True)
    torch.cuda.current_stream(pictures.device).synchronize()
    return here.numpy()


def _made(stream: Stream, script: Sequence[Take], given: Tensor | None) -> Iterator[Chunk]:
    """The chunks of a stream. Raises RoomError, naming the chunk, for want of memory."""
    chunks, size = stream.play(script, given), stream.cache.geometry.chunk
    for number in count(-given.shape[1] // size if given is not None else 0):  # as the stream numbers them
        with memory_for(f"denoising chunk {number}"):
            chunk = next(chunks, None)
        if chunk is None:
            return
        yield chunk


def _beside(device: str) -> AbstractContextManager[object]:
    """On CUDA a queue of its own, so that decoding does not wait for the chunk that is being made meanwhile.

    The latents are there when it begins, for `Stream` has looked at all their values; and when it ends, `to_bytes` has
    waited for everything in it.
    """
    here = torch.device(device)
    return torch.cuda.stream(side_queue(here, "decoding")) if here.type == "cuda" else nullcontext()
