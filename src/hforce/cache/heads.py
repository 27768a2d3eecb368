"""HeadCache: policies x roles x slots -> attend(), advance()."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from hforce.attention.rope import Rope3D, turn
from hforce.cache.likeness import DriftGauge, KeyLikeness
from hforce.cache.policy import CachePolicy, Clock, Frame, Placement
from hforce.cache.roles import HeadRole, RoleMap
from hforce.errors import ConfigError
from hforce.geometry import Geometry

LOOK_EVERY = 3  # likeness is read off every third layer that has such heads: neighbours agree, and it costs a third


@dataclass(frozen=True)
class CacheStats:
    """What a cache holds. nbytes is fixed when it is built; frames counts the past per role, without the chunk."""

    nbytes: int
    frames: dict[str, int]
    capacity: dict[str, int]
    mean_frames: float  # frames a head reads when all are held, the chunk included, averaged over heads


@dataclass
class Lane:
    """All heads of one role: they hold the same frames in the same slots."""

    role: HeadRole
    policy: CachePolicy
    slot: dict[int, int] = field(default_factory=dict)  # frame index -> slot
    held: list[Frame] = field(default_factory=list)
    placed: Placement = Placement((), ())
    staging: list[int] = field(default_factory=list)  # slots of the chunk being made
    writes: Tensor | None = None  # the same on the device, [chunk]
    likeness: KeyLikeness | None = None

    @property
    def live(self) -> int:
        """Slots that hold a frame of the past."""
        return len(self.held)


@dataclass
class Group:
    """Lanes with the same number of slots, whose heads lie side by side in one store per layer."""

    lanes: list[Lane]
    size: int  # slots a head owns
    heads: list[list[tuple[int, int]]]  # [layer][lane] -> first and last + 1 of its heads, in the model's order
    keys: list[Tensor]  # per layer [heads, slots, S, D], rotated for the chunk being made
    values: list[Tensor]  # per layer [heads, slots, S, D]
    times: list[Tensor]  # per layer [heads, slots, S, time dims]: the part of the keys that turns in time, unturned


class HeadCache:
    """The keys and values of the past, one store per head, sized by what its role's policy may ever hold.

    A slot holds one latent frame of one head. Each head owns `capacity + chunk` slots, allocated here and never
    again. The `chunk` free ones are *staging*: every pass, noisy or clean, overwrites them, and `advance` makes what
    the last pass left there part of the past. So noisy passes leave no trace, and there is no mode to forget.

    Temporal RoPE is re-encoded head by head: keys are stored without it, and `advance` turns the kept ones to the
    distance at which their policy places them. Attention does not care about the order of keys, so a frame stays in
    its slot until it is dropped, and all heads with equally many frames are one dense call.

    The heads of a role must be neighbours in every layer (`roles.head_order`, `CausalWan.order_heads`).
    Raises ConfigError where they are not, and where a role has no policy.
    """

    def __init__(
        self,
        geometry: Geometry,
        roles: RoleMap,
        policies: Mapping[HeadRole, CachePolicy],
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.geometry, self.roles, self.device = geometry, roles, device
        self.rope = Rope3D(geometry.grid, geometry.head_dim, geometry.rope_theta, device)
        self._own = self.rope.full(torch.arange(geometry.chunk))[:, None]  # phases of the chunk: times 0 .. F-1
        present = [role for role in HeadRole if roles.counts()[role]]
        if missing := [role for role in present if role not in policies]:
            raise ConfigError(f"{missing[0]} heads have no cache policy", mend=f"set cache.{missing[0]}.policy")
        self.lanes = [Lane(role, policies[role]) for role in present]
        self.groups = self._allocate(dtype)
        self._looks = self._choose_looks()
        self.reset()

    def reset(self) -> None:
        """Forgets everything, for a new video. The memory stays."""
        self.now = 0
        self._frames = self.geometry.chunk  # of the last pass
        self._drift = DriftGauge()
        self._seen: dict[int, Tensor] = {}  # layer -> keys of the last pass before RoPE [N, H, D], where looked at
        for lane in self.lanes:
            lane.held, lane.slot = [], {}
            lane.likeness = KeyLikeness(self.geometry.grid) if lane.policy.looks else None
        self._plan()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one layer over the past and the chunk itself.

        q, k, v [1, N, H, D] before RoPE -> [1, N, H, D]. Leaves k and v in the staging slots.
        """
        assert q.shape[0] == 1, "a cache holds one stream: batch must be 1"
        tokens = self.geometry.tokens
        self._frames = k.shape[1] // tokens
        # Held frames may lie in slots behind the staging ones; a short pass would not reach them.
        assert self._frames == self.geometry.chunk or not self.now, "only the first chunk may be short"
        phase = self._own[: k.shape[1]]
        query, key = turn(q[0], phase).transpose(0, 1), turn(k[0], phase)
        if any(layer in layers for layers in self._looks.values()):
            self._seen[layer] = k[0]
        split = "(f s) h d -> h f s d"
        key, raw, value = (rearrange(x, split, s=tokens) for x in (key, k[0, ..., : self.rope.time_dims], v[0]))
        out = torch.empty_like(query)
        for group in self.groups:
            self._write(group, layer, key, raw, value)
            for first, last, begin, live in self._calls(group, layer):
                keys, values = (
                    x[begin : begin + last - first, : live + self._frames].flatten(1, 2)[None]
                    for x in (group.keys[layer], group.values[layer])
                )
                out[first:last] = F.scaled_dot_product_attention(query[None, first:last], keys, values)[0]
        return out.transpose(0, 1)[None]

    def advance(self, shot: int = 0, latents: Tensor | None = None, settled: bool = True) -> None:
        """Makes the chunk of the last pass part of the past, asks the policies, and plans the next chunk.

        shot is the number of the prompt the chunk was made under. latents [F, C, h, w], clean, let the drift gate
        judge it; without them, or while the picture is not `settled` after a change of prompt, it stays open.
        """
        indices = range(self.now, self.now + self._frames)
        drifts = self._drift.measure(latents) if latents is not None else [0.0] * self._frames
        drifts = drifts if settled else [0.0] * self._frames
        for lane in self.lanes:
            lane.slot.update(zip(indices, lane.staging, strict=False))
            new = [Frame(i, shot, drift=d) for i, d in zip(indices, drifts, strict=True)]
            if lane.likeness is None:
                self._drop(lane, lane.policy.keep([*lane.held, *new]))
                continue
            lane.likeness.add(indices, self._looked_at(lane))
            new = [_with_surprise(f, lane.held, lane.likeness) for f in new]
            self._drop(lane, lane.policy.keep([*lane.held, *new], lane.likeness))
        self.now += self._frames
        self._plan()

    def forget(self, since: int) -> None:
        """Drops every frame from number `since` on and continues there, so that its chunks can be run again."""
        for lane in self.lanes:
            self._drop(lane, [f for f in lane.held if f.index < since])
        self.now = since
        self._plan()

    def flush(self) -> None:
        """Drops what the policies call the old scene (`CachePolicy.flush`), at a change of prompt."""
        for lane in self.lanes:
            self._drop(lane, lane.policy.flush(lane.held))
        self._plan()

    def frame_mass(self, layer: int, q: Tensor, stride: int = 1, block: int = 256) -> tuple[Tensor, list[int]]:
        """Attention mass on each frame, for profiling: softmax over tokens first, then sums over frames.

        q [1, N, H, D] before RoPE, right after `attend` saw the same pass; every `stride`-th query is measured, a
        `block` of them at a time. Returns float32 [H, frames], each row adding up to 1, and the frames' numbers,
        oldest first. All heads must share one role.
        """
        (group,) = self.groups
        (lane,) = group.lanes
        live, tokens = lane.live + self._frames, self.geometry.tokens
        numbers = sorted(lane.slot) + [*range(self.now, self.now + self._frames)]
        slots = [lane.slot[i] for i in sorted(lane.slot)] + lane.staging[: self._frames]
        query = turn(q[0], self._own[: q.shape[1]]).transpose(0, 1)[:, ::stride].float()
        keys = group.keys[layer][:, :live].flatten(1, 2).float().transpose(1, 2)
        total = torch.zeros(query.shape[0], live, device=query.device)
        for part in query.split(block, dim=1):
            weights = (part @ keys * part.shape[-1] ** -0.5).softmax(dim=-1)
            total += weights.unflatten(-1, (live, tokens)).sum(dim=(1, 3))
        return total[:, slots] / query.shape[1], numbers

    def stats(self) -> CacheStats:
        """Bytes and frames, now."""
        counts = self.roles.counts()
        read = sum(counts[lane.role] * (lane.policy.capacity + self.geometry.chunk) for lane in self.lanes)
        stores = [x for group in self.groups for x in (*group.keys, *group.values, *group.times)]
        return CacheStats(
            nbytes=sum(x.nbytes for x in stores),
            frames={lane.role.value: lane.live for lane in self.lanes},
            capacity={lane.role.value: lane.policy.capacity for lane in self.lanes},
            mean_frames=read / sum(counts.values()),
        )

    def _allocate(self, dtype: torch.dtype) -> list[Group]:
        g = self.geometry
        self.roles.check(g.layers, g.heads, "this one")
        runs = [_runs(self.roles.roles[layer]) for layer in range(g.layers)]
        groups = []
        for lanes in _neighbours(self.lanes, runs):
            size = lanes[0].policy.capacity + g.chunk
            heads = [[runs[layer].get(lane.role, (0, 0)) for lane in lanes] for layer in range(g.layers)]
            counts = [sum(last - first for first, last in spans) for spans in heads]
            stores = [
                [torch.zeros(n, size, g.tokens, width, dtype=dtype, device=self.device) for n in counts]
                for width in (g.head_dim, g.head_dim, self.rope.time_dims)
            ]
            groups.append(Group(lanes, size, heads, *stores))
        return groups

    def _write(self, group: Group, layer: int, key: Tensor, raw: Tensor, value: Tensor) -> None:
        """Puts key, raw and value [H, F, S, .] of a pass into the staging slots of the group's heads."""
        begin = 0
        for lane, (first, last) in zip(group.lanes, group.heads[layer], strict=True):
            if last == first:
                continue
            rows = slice(begin, begin + last - first)
            assert lane.writes is not None, "no slots were planned"
            where = lane.writes[: self._frames]
            group.keys[layer][rows].index_copy_(1, where, key[first:last])
            group.times[layer][rows].index_copy_(1, where, raw[first:last])
            group.values[layer][rows].index_copy_(1, where, value[first:last])
            begin = rows.stop

    def _calls(self, group: Group, layer: int) -> list[tuple[int, int, int, int]]:
        """The dense calls of a layer: first and last + 1 head, row of the store, frames of the past.

        Lanes that hold equally many frames go together.
        """
        calls: list[tuple[int, int, int, int]] = []
        begin = 0
        for lane, (first, last) in zip(group.lanes, group.heads[layer], strict=True):
            if last == first:
                continue
            if calls and calls[-1][1] == first and calls[-1][3] == lane.live:
                calls[-1] = (calls[-1][0], last, calls[-1][2], lane.live)
            else:
                calls.append((first, last, begin, lane.live))
            begin += last - first
        return calls

    def _choose_looks(self) -> dict[HeadRole, dict[int, slice]]:
        """For every role whose policy looks at pictures, the layers at which it does, and its heads there."""
        runs = [_runs(row) for row in self.roles.roles]
        looks = {}
        for lane in self.lanes:
            if lane.policy.looks:
                layers = [layer for layer, spans in enumerate(runs) if lane.role in spans]
                looks[lane.role] = {layer: slice(*runs[layer][lane.role]) for layer in layers[::LOOK_EVERY]}
        return looks

    def _looked_at(self, lane: Lane) -> list[Tensor]:
        """Keys of the last pass [N, heads, D] of the lane's heads, for the layers that are looked at."""
        return [self._seen[layer][:, heads] for layer, heads in self._looks[lane.role].items()]

    def _drop(self, lane: Lane, kept: Sequence[Frame]) -> None:
        lane.held = list(kept)
        numbers = {f.index for f in kept}
        lane.slot = {index: slot for index, slot in lane.slot.items() if index in numbers}
        if lane.likeness is not None:
            lane.likeness.keep(kept)

    def _plan(self) -> None:
        """Chooses staging slots and re-encodes the kept frames in time, before the next chunk."""
        chunk = self.geometry.chunk
        clock = Clock(self.now, chunk, self.geometry.span)
        for group in self.groups:
            turns = []
            for lane in group.lanes:
                self._close_gaps(group, lane)
                free = [s for s in range(group.size) if s not in set(lane.slot.values())]
                if len(free) < chunk:
                    raise ConfigError(f"policy of {lane.role} heads holds {lane.live} frames, more than its capacity")
                lane.staging = free[:chunk]
                lane.writes = torch.tensor(lane.staging, device=self.device)
                lane.placed = lane.policy.place(lane.held, clock)
                turns.append(self._turns(lane, group.size))
            self._re_encode(group, turns)

    def _turns(self, lane: Lane, size: int) -> Tensor:
        """Temporal phases by slot, complex64 [size, 1, time pairs]; slots without a frame keep phase 0."""
        index = torch.zeros(size)
        for frame, distance in zip(lane.placed.frames, lane.placed.distance, strict=True):
            index[lane.slot[frame.index]] = -distance
        return self.rope.time(index)[:, None]

    def _re_encode(self, group: Group, turns: list[Tensor]) -> None:
        """Turns the time part of every live key to its place, always from the unturned one: errors do not add up."""
        width = self.rope.time_dims
        for layer, spans in enumerate(group.heads):
            begin = 0
            for lane, phase, (first, last) in zip(group.lanes, turns, spans, strict=True):
                rows = slice(begin, begin + last - first)
                begin = rows.stop
                if lane.live and last > first:
                    live = slice(0, max(lane.slot.values()) + 1)
                    group.keys[layer][rows, live, :, :width] = turn(group.times[layer][rows, live], phase[live])

    def _close_gaps(self, group: Group, lane: Lane) -> None:
        """Moves frames down so that held and staging slots fill 0 .. held + chunk - 1 without a hole.

        Staging fills up to `chunk` holes by itself, so this only happens when a policy drops many frames at once.
        """
        limit = lane.live + self.geometry.chunk
        at = group.lanes.index(lane)
        used = set(lane.slot.values())
        holes = iter(s for s in range(limit) if s not in used)
        for index, slot in lane.slot.items():
            if slot < limit:
                continue
            target = next(holes)
            for layer, spans in enumerate(group.heads):
                begin = sum(last - first for first, last in spans[:at])
                rows = slice(begin, begin + spans[at][1] - spans[at][0])
                for store in (group.keys[layer], group.values[layer], group.times[layer]):
                    store[rows, target] = store[rows, slot]
            lane.slot[index] = target


def _with_surprise(frame: Frame, before: Sequence[Frame], likeness: KeyLikeness) -> Frame:
    """The frame with its novelty against the frames held before, as a z-score."""
    if not before:
        return frame
    novelty = 1 - max(likeness(frame, other) for other in before)
    return Frame(frame.index, frame.shot, likeness.surprise(novelty), frame.drift)


def _runs(roles: Sequence[HeadRole]) -> dict[HeadRole, tuple[int, int]]:
    """Where each role's heads are in a layer: first and last + 1. Raises ConfigError if a role is in pieces."""
    spans: dict[HeadRole, tuple[int, int]] = {}
    for head, role in enumerate(roles):
        first, last = spans.get(role, (head, head))
        if last != head:
            raise ConfigError(f"heads of role {role} are not neighbours: order them with roles.head_order first")
        spans[role] = (first, head + 1)
    return spans


def _neighbours(lanes: Sequence[Lane], runs: Sequence[Mapping[HeadRole, tuple[int, int]]]) -> list[list[Lane]]:
    """Lanes grouped by capacity, in the order of their heads."""
    order = {role: spot for spot, role in enumerate(dict.fromkeys(role for spans in runs for role in spans))}
    groups: dict[int, list[Lane]] = {}
    for lane in sorted(lanes, key=lambda lane: order[lane.role]):
        groups.setdefault(lane.policy.capacity, []).append(lane)
    return list(groups.values())
