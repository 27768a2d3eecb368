"""How much work a chunk is, counted from shapes, and how much of it the device could do in the time it took."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from hforce.geometry import Geometry
from hforce.models.base import Codec
from hforce.models.dit import Linear, WanConfig
from hforce.weigh import tensors_of

MULTIPLY_ADD = 2  # operations
ATTENTION, OTHERS, DECODER = "self-attention", "transformer without it", "decoder"  # what a bench times
# Tensors [N, dim] that a block reads and writes when every elementwise step goes over its own once: two modulated norms
# (2 each), one before the text (2), norms of q and k to the video (4) and of q to the text (2), three sums (3 each).
BLOCK_TRAFFIC = 21
TURN_TRAFFIC = 8  # likewise around self-attention: q and k turned (4), k and v put into the cache (4)
CEILING_ROUNDS = 5
LARGE, SMALL = (8192, 1 << 30), (1024, 1 << 26)  # width of the matrices and bytes copied: on a GPU, on a CPU


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes that must at least move."""

    flops: float
    nbytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.nbytes + other.nbytes)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.nbytes * times)


@dataclass(frozen=True)
class Ceiling:
    """What a device does at its best: operations of a large matrix product, and bytes read and written by a copy."""

    flops_per_second: float
    bytes_per_second: float

    def seconds(self, work: Work) -> float:
        """The least time for it, with arithmetic and memory at work together."""
        return max(work.flops / self.flops_per_second, work.nbytes / self.bytes_per_second)


@dataclass(frozen=True)
class Stage:
    """A stage of a chunk: its work, the seconds it took, and the least the ceiling allows for."""

    flops: float
    nbytes: float
    seconds: float
    least_seconds: float

    @property
    def flops_per_second(self) -> float:
        """Achieved."""
        return self.flops / self.seconds

    @property
    def share(self) -> float:
        """Of the ceiling, 0..1."""
        return self.least_seconds / self.seconds


def pass_work(config: WanConfig, geometry: Geometry, frames_read: float, itemsize: int) -> dict[str, Work]:
    """Work of one forward pass over a chunk, by part.

    frames_read: latent frames a head reads in the mean, the chunk included; itemsize: bytes of a number. Counted are
    matrix products, exactly; bytes as weights read once, inputs read once and results written once.
    """
    c, tokens = config, geometry.chunk * geometry.tokens
    wide = tokens * c.dim  # numbers in [N, dim]
    keys = frames_read * geometry.tokens
    per_token = c.layers * c.dim * (6 * c.dim + 2 * c.ffn_dim)  # weights: six projections and the feed-forward
    per_token += c.dim * c.patch[1] * c.patch[2] * (c.in_channels + c.out_channels)
    once = c.dim * (c.freq_dim + 7 * c.dim)  # of the timestep's embedding
    moved = c.layers * tokens * (14 * c.dim + 2 * c.ffn_dim)  # what all of these read and write
    return {
        "linear": Work(MULTIPLY_ADD * (tokens * per_token + once), itemsize * (per_token + once + moved)),
        "self_attention": Work(
            MULTIPLY_ADD * 2 * c.layers * wide * keys, itemsize * c.layers * 2 * (wide + keys * c.dim)
        ),
        "turning": Work(0, itemsize * c.layers * TURN_TRAFFIC * wide),
        "cross_attention": Work(
            MULTIPLY_ADD * 2 * c.layers * wide * c.text_len, itemsize * c.layers * 2 * (wide + c.text_len * c.dim)
        ),
        "elementwise": Work(0, itemsize * c.layers * (BLOCK_TRAFFIC * wide + 2 * tokens * c.ffn_dim)),
    }


def decoder_work(codec: Codec, shape: tuple[int, int, int], chunk: int, itemsize: int) -> Work:
    """Work of decoding a chunk that is not the first, of latents [1, chunk, *shape].

    Operations are counted by torch on tensors without memory; bytes are weights, latents and video frames once each,
    which is less than any decoder moves.
    """
    from torch.utils.flop_counter import FlopCounterMode

    decoder = without_memory(codec).decoder()
    latents = torch.empty(1, chunk, *shape, device="meta")
    decoder(latents)
    with FlopCounterMode(display=False) as counter:
        frames = decoder(latents)
    numbers = sum(weight.numel() for weight in decoder_weights(codec)) + latents.numel() + frames.numel()
    return Work(counter.get_total_flops(), itemsize * numbers)


def without_memory(codec: Codec) -> Codec:
    """A copy on the meta device."""
    memo: dict[int, object] = {}
    for tensor in tensors_of(codec):
        blank = torch.empty_like(tensor, device="meta")
        is_weight = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(blank, requires_grad=False) if is_weight else blank
    return copy.deepcopy(codec, memo)


def decoder_weights(codec: Codec) -> list[torch.Tensor]:
    """The weights of a codec that decoding reads."""
    modules = [value for value in vars(codec).values() if isinstance(value, nn.Module)]
    return [w for module in modules for name, w in module.named_parameters() if not name.startswith("encoder.")]


def chunk_stages(
    work: Mapping[str, Work], decoding: Work, seconds: Mapping[str, float], passes: int, ceiling: Ceiling
) -> dict[str, Stage]:
    """The stages that a bench times: work of one pass by part, and mean seconds of a chunk by stage."""
    parts = {
        ATTENTION: [work["self_attention"] * passes, work["turning"] * passes],
        OTHERS: [work[name] * passes for name in ("linear", "cross_attention", "elementwise")],
        DECODER: [decoding],
    }
    stages = {}
    for name, works in parts.items():
        total = sum(works, Work(0, 0))
        stages[name] = Stage(total.flops, total.nbytes, seconds[name], sum(map(ceiling.seconds, works)))
    return stages


def measure_ceiling(device: torch.device, dtype: torch.dtype, clock: Callable[[], float]) -> Ceiling:
    """The fastest of a few large linear layers of random numbers, and of as many copies; after one untimed each."""
    width, nbytes = SMALL if device.type == "cpu" else LARGE
    generator = torch.Generator(device).manual_seed(0)
    left = torch.randn(width, width, device=device, generator=generator).to(dtype)
    layer = Linear(width, width, bias=False, device=device, dtype=dtype)
    layer.weight.data.copy_(torch.randn(width, width, device=device, generator=generator))
    source = torch.randn(nbytes // 4, device=device, generator=generator)
    target = torch.empty_like(source)

    def fastest(step: Callable[[], object]) -> float:
        step()
        times = []
        for _ in range(CEILING_ROUNDS):
            begin = clock()
            step()
            times.append(clock() - begin)
        return min(times)

    with torch.inference_mode():
        multiply = fastest(lambda: layer(left))
    return Ceiling(MULTIPLY_ADD * width**3 / multiply, 2 * nbytes / fastest(lambda: target.copy_(source)))
