"""Tiny models, clips and truths that several tests build alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hforce.cache.heads import HeadCache
from hforce.cache.policy import Placement
from hforce.cache.roles import (
    Calibration,
    Fingerprint,
    HeadRecord,
    HeadRole,
    HeadStats,
    Method,
    Profile,
    ProfiledModel,
    RoleMap,
    Summary,
    Thresholds,
)
from hforce.geometry import Geometry
from hforce.models.dit import CausalWan, WanConfig
from hforce.models.taehv import TaehvConfig
from hforce.models.tiny import TinyModel
from hforce.toy.world import SLOTS

ROLES = {role[0].upper(): role for role in HeadRole}


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), atol=tolerance, rtol=0)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def role_map(*rows: str) -> RoleMap:
    """Roles written as letters, one word a layer."""
    return RoleMap(tuple(tuple(ROLES[letter] for letter in row) for row in rows))


def random_wan(layers: int = 2, heads: int = 3, head_dim: int = 12, seed: int = 0) -> CausalWan:
    """A transformer whose weights are all random: no gate is closed and no norm is one."""
    width = heads * head_dim
    sizes = WanConfig(width, 2 * width, layers, heads, 8, 5, in_channels=4, out_channels=4, freq_dim=16)
    model, generator = CausalWan(sizes), torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        spread = 0.5 if weight.dim() == 1 or "modulation" in name else weight[0].numel() ** -0.5
        nn.init.normal_(weight.data, std=spread, generator=generator)
    return model.eval().requires_grad_(False)


def geometry_of(model: CausalWan, grid: tuple[int, int] = (2, 3), chunk: int = 3) -> Geometry:
    c = model.config
    return Geometry(c.layers, c.heads, c.head_dim, grid, chunk)


def rotate(x: Tensor, times: Sequence[float], grid: tuple[int, int], theta: float = 10000.0) -> Tensor:
    """Rotary positions as Wan2.1 defines them, with cosines and sines in float64: x [F, S, H, D] at `times` [F]."""
    width = x.shape[-1]
    space = 2 * (width // 6)
    token = torch.arange(grid[0] * grid[1], dtype=torch.float64)
    time = torch.tensor(times, dtype=torch.float64)[:, None].expand(-1, len(token))
    angles = []
    for position, size in ((time, width - 2 * space), (token // grid[1], space), (token % grid[1], space)):
        ladder = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        angles.append((position[..., None] * ladder).expand(len(times), -1, -1))
    angle = torch.cat(angles, dim=-1)[:, :, None]
    even, odd = x.double()[..., 0::2], x.double()[..., 1::2]
    return torch.stack([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], -1).flatten(-2)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head in float64: q [n, D], k and v [m, D] -> [n, D]."""
    return (q.double() @ k.double().T / q.shape[-1] ** 0.5).softmax(dim=-1) @ v.double()


def attend_clip(
    q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], blocks: Sequence[int], past: Callable[[int], Sequence[int]]
) -> Tensor:
    """Attention of a whole clip at absolute positions; a block that starts at frame t sees frames past(t) and itself.

    q, k, v [F, S, H, D] before RoPE -> float64 [F, S, H, D], one block and one head after the other.
    """
    times = range(len(q))
    q, k, v = rotate(q, times, grid), rotate(k, times, grid), v.double()
    out, start = torch.empty_like(v), 0
    for frames in blocks:
        own = list(range(start, start + frames))
        seen = [*past(start), *own]
        for head in range(q.shape[2]):
            parts = (x[index, :, head].flatten(0, 1) for x, index in ((q, own), (k, seen), (v, seen)))
            out[own, :, head] = softmax_attention(*parts).unflatten(0, (frames, -1))
        start += frames
    return out


class Loop:
    """A cache without slots, stores or groups: frames in a dict, one head after the other.

    It is told what every role sees, so roles may lie in any order.
    """

    def __init__(self, geometry: Geometry, roles: RoleMap) -> None:
        self.geometry, self.roles, self.now = geometry, roles, 0
        self.last: dict[int, tuple[Tensor, Tensor]] = {}
        self.past: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # (layer, frame) -> raw keys and values [S, H, D]
        self.placed: Mapping[HeadRole, Placement] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grid, tokens = self.geometry.grid, self.geometry.tokens
        query, key, value = (x[0].unflatten(0, (-1, tokens)) for x in (q, k, v))
        self.last[layer] = key, value
        own = range(len(key))
        query, out = rotate(query, own, grid), torch.empty_like(query)
        for head, role in enumerate(self.roles.roles[layer]):
            seen = self.placed.get(role, Placement((), ()))
            kept = [self.past[layer, frame.index] for frame in seen.frames]
            keys = torch.stack([*(pair[0][:, head] for pair in kept), *key[:, :, head]])
            values = torch.stack([*(pair[1][:, head] for pair in kept), *value[:, :, head]])
            keys = rotate(keys[:, :, None], [*(-d for d in seen.distance), *own], grid)[:, :, 0]
            flat = (x.flatten(0, 1) for x in (query[:, :, head], keys, values))
            out[:, :, head] = softmax_attention(*flat).unflatten(0, out.shape[:2]).to(out.dtype)
        return out.flatten(0, 1)[None]

    def advance(self, placed: Mapping[HeadRole, Placement]) -> None:
        for layer, (keys, values) in self.last.items():
            for frame in range(len(keys)):
                self.past[layer, self.now + frame] = keys[frame], values[frame]
        self.now, self.placed = self.now + len(self.last[0][0]), placed


def placed(cache: HeadCache) -> dict[HeadRole, Placement]:
    """What every role of a cache sees in its next chunk."""
    return {lane.role: lane.placed for lane in cache.lanes}


def held(cache: HeadCache, role: HeadRole = HeadRole.MEMORY) -> list[int]:
    """Numbers of the frames a role holds."""
    (lane,) = (lane for lane in cache.lanes if lane.role is role)
    return [frame.index for frame in lane.held]


def stored(cache: HeadCache, role: HeadRole, layer: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values [heads, S, D] of every frame that a role holds in a layer."""
    (number,) = (number for number, lane in enumerate(cache.lanes) if lane.role is role)
    keys = cache.store.read_keys(layer, number, cache.geometry.chunk + cache.lanes[number].policy.capacity)
    values = cache.store.block(cache.store.values[layer], layer, number)
    slots = cache.lanes[number].slot.items()
    return {index: (keys[:, slot].to(values.dtype, copy=True), values[:, slot].clone()) for index, slot in slots}


SMALL_ROLES = role_map("AML", "LMM")
SMALL_DIT = WanConfig(dim=36, ffn_dim=72, layers=2, heads=3, text_dim=32, text_len=len(SLOTS), in_channels=12,
                      out_channels=12, freq_dim=16)  # fmt: skip
SMALL_CODEC = TaehvConfig(latent_channels=12, encoder_width=8, decoder_widths=(8, 8, 8, 8), space_down=(1, 2, 1),
                          space_up=(2, 1, 1), patch=4)  # fmt: skip


def small_tiny() -> TinyModel:
    """A tiny model with random weights, its biases and gates too, so that attention matters to the result."""
    model, generator = TinyModel(SMALL_DIT, SMALL_CODEC), torch.Generator().manual_seed(0)
    for weight in model.parameters():
        nn.init.normal_(weight.data, std=0.1 if weight.dim() == 1 else weight[0].numel() ** -0.5, generator=generator)
    model.codec.decoder[-1].weight.data.mul_(0.02)  # a picture without contrast: the judge is slow on pure noise
    return model


def profile_of(fingerprint: str) -> Profile:
    """A made-up profile of the small model with this fingerprint."""
    stats = HeadStats(sink_mass=0.2, middle_mass=0.3, current_mass=0.5, last4_mass=0.6, sd_sink=0, sd_current=0, n=1)
    heads = tuple(
        HeadRecord(layer=layer, head=head, role=role, margin=0.1, vote=1.0, stats=stats)
        for layer, row in enumerate(SMALL_ROLES.roles)
        for head, role in enumerate(row)
    )
    model = ProfiledModel(id="tiny", arch="tiny", num_layers=2, num_heads=3, head_dim=12, tokens_per_frame=16,
                          frames_per_chunk=3, fingerprint=Fingerprint(value=fingerprint))  # fmt: skip
    calibration = Calibration(num_prompts=1, prompts_sha256="", prompts=("red",), seeds=(0,), num_frames=21,
                              size=(64, 64), timesteps=(1000.0,), dtype="float32", device="cpu", attention="sdpa",
                              mode="native21", policy="full", chunks=(3,), query_stride=1)  # fmt: skip
    method = Method(threshold="quantile", thresholds=Thresholds(anchor=0.25, local=0.2), sink_frames=1, min_vote=0.0)
    return Profile(created_at="2026-01-02T03:04:05Z", generator={}, model=model, calibration=calibration, method=method,
                   heads=heads, summary=Summary(counts=SMALL_ROLES.counts(), split_half_agreement=1.0))  # fmt: skip
