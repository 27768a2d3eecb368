"""Noise levels and the few-step sampler; knows no model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

TRAIN_STEPS = 1000  # entries in the training schedule; timesteps run 0..1000


@dataclass(frozen=True, slots=True)
class Step:
    """One denoising step: what the model is told (0..1000) and the share of noise in its input (0..1)."""

    timestep: float
    sigma: float


def sigma_table(shift: float) -> Tensor:
    """The flow-matching noise levels shift s / (1 + (shift - 1) s), float32 [1000], falling from 1 to above zero."""
    s = 1 - torch.arange(TRAIN_STEPS, dtype=torch.float64) / TRAIN_STEPS
    return (shift * s / (1 + (shift - 1) * s)).float()


def sigma_at(timestep: float, shift: float) -> float:
    """Noise level of the table entry nearest to a timestep, the first on ties (as Self-Forcing looks it up)."""
    table = sigma_table(shift)
    return float(table[(table * TRAIN_STEPS - timestep).abs().argmin()])


def warp(steps: Sequence[float], shift: float) -> tuple[float, ...]:
    """Uniform timesteps -> those of the shifted schedule: n becomes entry 1000 - n of the table, extended by a zero."""
    extended = torch.cat([sigma_table(shift) * TRAIN_STEPS, torch.zeros(1)])
    return tuple(float(extended[TRAIN_STEPS - int(n)]) for n in steps)


def make_steps(steps: Sequence[float], shift: float, warped: bool) -> tuple[Step, ...]:
    """The steps of a configuration, noisiest first, for example [1000, 750, 500, 250] with shift 5, warped."""
    timesteps = warp(steps, shift) if warped else tuple(float(n) for n in steps)
    return tuple(Step(t, sigma_at(t, shift)) for t in timesteps)


def few_step(flow: Callable[[Tensor, float], Tensor], steps: Sequence[Step], noise: Iterator[Tensor]) -> Tensor:
    """Noise -> clean latents in a few steps (Self-Forcing, arXiv 2506.08009).

    flow(x, timestep) predicts noise - clean. Every step but the last is followed by fresh noise at the next level.
    noise yields tensors of one shape: the start, then one for every step but the last. Raises ValueError without steps.
    """
    if not steps:
        raise ValueError("a sampler needs at least one step")
    x = next(noise)
    for step, following in pairwise(steps):
        clean = x - step.sigma * flow(x, step.timestep)
        x = (1 - following.sigma) * clean + following.sigma * next(noise)
    return x - steps[-1].sigma * flow(x, steps[-1].timestep)


def keyed_noise(seed: int, chunk: int, shape: Sequence[int]) -> Iterator[Tensor]:
    """Endless draws of float32 noise for one chunk, on the CPU, from a generator keyed by (seed, chunk).

    They depend on nothing else: not on the length of the video, on what was made before, or on the device.
    """
    key = hashlib.sha256(f"hforce noise {seed} {chunk}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    while True:
        yield torch.randn(tuple(shape), generator=generator)
