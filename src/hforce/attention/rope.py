"""3-D rotary positions in two halves: space when a key is written, time when it is read."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_pairs(head_dim: int) -> tuple[int, int, int]:
    """Rotary pairs given to time, height and width: a sixth of head_dim each for space, the rest for time (Wan2.1)."""
    space = head_dim // 6
    return head_dim // 2 - 2 * space, space, space


def ladder(pairs: int, theta: float) -> Tensor:
    """Angles per position of one axis: theta ** (-i / pairs), float64 [pairs]. Each axis has a ladder of its own."""
    return theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)


def turn(x: Tensor, phase: Tensor) -> Tensor:
    """Rotates neighbouring pairs (2i, 2i + 1) of x [..., D] by phase, complex [..., D / 2]; computed in float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * phase).flatten(-2).to(x.dtype)


class Rope3D:
    """Rotary phases of one token grid (Wan2.1: theta 10000, pairs in the order time, height, width).

    A key is rotated by its place in the frame once, when it is written; by its distance in time whenever that
    distance changes. Attention only sees differences of position, so the chunk being made always sits at
    time 0 .. F-1 and the past at negative times: angles stay small and no table ends.
    """

    def __init__(self, grid: tuple[int, int], head_dim: int, theta: float = 10000.0, device: str = "cpu") -> None:
        time, height, width = rotary_pairs(head_dim)
        self.time_dims = 2 * time
        self._ladder = ladder(time, theta)
        self._device = device
        rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
        angles = [rows.reshape(-1, 1) * ladder(height, theta), columns.reshape(-1, 1) * ladder(width, theta)]
        self.space = _phase(torch.cat(angles, dim=1), device)
        """Phases of the space pairs, complex64 [S, D/2 - time pairs]."""

    def time(self, index: Tensor) -> Tensor:
        """Phases of the time pairs at positions `index` [...], fractional or negative too: complex64 [..., pairs]."""
        return _phase(index.to(torch.float64).cpu()[..., None] * self._ladder, self._device)

    def full(self, index: Tensor) -> Tensor:
        """Phases of all pairs for whole frames at times `index` [F]: complex64 [F S, D/2], frame-major."""
        frames, tokens = index.numel(), self.space.shape[0]
        time = self.time(index)[:, None].expand(-1, tokens, -1)
        return torch.cat([time, self.space.expand(frames, -1, -1)], dim=-1).flatten(0, 1)


def _phase(angles: Tensor, device: str) -> Tensor:
    return torch.polar(torch.ones_like(angles), angles).to(device=device, dtype=torch.complex64)
