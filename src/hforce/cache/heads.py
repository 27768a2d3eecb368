"""HeadCache: policies x roles x slots -> attend(), advance()."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hforce.attention.backends import SDPA
from hforce.attention.layout import Backend, LayerView
from hforce.attention.rope import Rope3D, turn
from hforce.cache.likeness import DriftGauge, KeyLikeness
from hforce.cache.policy import CachePolicy, Clock, Frame, Placement
from hforce.cache.roles import HeadRole, RoleMap
from hforce.cache.slots import SlotStore, Strip
from hforce.errors import ConfigError
from hforce.geometry import Geometry

MOST_LAID = 16  # layouts kept; a cache that still grows has a new one for every chunk
LOOK_EVERY = 3  # likeness is read off every third layer that has such heads: neighbours agree, and it costs a third


@dataclass(frozen=True)
class CacheStats:
    """What a cache holds. nbytes is fixed when it is built; frames counts the past per role, without the chunk."""

    nbytes: int
    frames: dict[str, int]
    capacity: dict[str, int]
    mean_frames: float  # frames a head reads when all are held, the chunk included, averaged over heads
    next_frames: float  # frames a head reads in the next chunk, likewise


@dataclass
class Lane:
    """All heads of one role: they hold the same frames in the same slots."""

    role: HeadRole
    policy: CachePolicy
    slot: dict[int, int] = field(default_factory=dict)  # frame index -> slot
    written: dict[int, int] = field(default_factory=dict)  # frame index -> time at which its key was written, 0 .. F-1
    held: list[Frame] = field(default_factory=list)
    placed: Placement = Placement((), ())
    likeness: KeyLikeness | None = None


class HeadCache:
    """The keys and values of the past, in slots of every head's own, as many as its role's policy may ever need.

    A slot holds one latent frame of one head. Each head owns `chunk + capacity` slots, allocated here and never
    again. The first `chunk` of them are *staging*: every pass, noisy or clean, overwrites them, and `advance` makes
    what the last pass left there part of the past. So noisy passes leave no trace, and there is no mode to forget.

    Temporal RoPE is re-encoded head by head: `advance` turns the kept keys to the distance at which their policy
    places them, always from the key as it was written. Attention does not care about the order of keys, so a frame
    stays in its slot until it is dropped, and neighbouring heads with equally many slots and frames are one dense call.

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
        backend: Backend = SDPA,
    ) -> None:
        self.geometry, self.roles, self.device, self.backend = geometry, roles, device, backend
        self.rope = Rope3D(geometry.grid, geometry.head_dim, geometry.rope_theta, device)
        self._own = self.rope.full(torch.arange(geometry.chunk))[:, None]  # phases of the chunk: times 0 .. F-1
        present = [role for role in HeadRole if roles.counts()[role]]
        if missing := [role for role in present if role not in policies]:
            raise ConfigError(f"{missing[0]} heads have no cache policy", mend=f"set cache.{missing[0]}.policy")
        self.lanes = [Lane(role, policies[role]) for role in present]
        roles.check(geometry.layers, geometry.heads, "this one")
        self._spans = [_runs(row) for row in roles.roles]
        strips = [
            Strip(lane.policy.capacity, tuple(spans.get(lane.role, (0, 0)) for spans in self._spans))
            for lane in self.lanes
        ]
        self.store = SlotStore(geometry, strips, self.rope, dtype, backend)
        self._looks = self._choose_looks()
        self._seen = self._room_for_keys(dtype)
        self._laid: dict[Hashable, list[LayerView]] = {}
        self._layout: Hashable = None
        self.reset()

    def reset(self) -> None:
        """Forgets everything, for a new video. The memory stays."""
        self.now = 0
        self._drift = DriftGauge()
        for lane in self.lanes:
            lane.held, lane.slot, lane.written = [], {}, {}
            lane.likeness = KeyLikeness(self.geometry.grid) if lane.policy.looks else None
        self._plan()

    def open(self, frames: int) -> Hashable:
        """Gets ready for passes over so many frames. As long as the answer is the same, so is the memory they use."""
        if frames != self._frames:
            # The past lies behind all staging slots; a short pass would leave stale ones in between.
            assert not self.now, "only the first chunk may be short"
            self._lay_out(frames)
        return self._layout

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one layer over the past and the chunk itself.

        q, k, v [1, N, H, D] before RoPE -> [1, N, H, D]. Leaves k and v in the staging slots.
        """
        assert q.shape[0] == 1, "a cache holds one stream: batch must be 1"
        self.open(k.shape[1] // self.geometry.tokens)
        for heads, seen in self._seen.get(layer, ()):
            seen[: k.shape[1]].copy_(k[0, :, heads])
        view = self._views[layer]
        query = self.backend.keeping.place(q[0], k[0], v[0], self._own[: k.shape[1]], view)
        return self.backend.attend(query, view)[None]

    def advance(self, shot: int = 0, latents: Tensor | None = None, settled: bool = True) -> None:
        """Makes the chunk of the last pass part of the past, asks the policies, and plans the next chunk.

        shot is the number of the prompt the chunk was made under. latents [F, C, h, w], clean, let the drift gate
        judge it; without them, or while the picture is not `settled` after a change of prompt, it stays open.
        """
        indices = range(self.now, self.now + self._frames)
        drifts = self._drift.measure(latents) if latents is not None else [0.0] * self._frames
        drifts = drifts if settled else [0.0] * self._frames
        for lane in self.lanes:
            lane.slot.update(zip(indices, range(self._frames), strict=True))
            lane.written.update(zip(indices, range(self._frames), strict=True))
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
        (lane,) = self.lanes
        live, tokens = self._frames + len(lane.held), self.geometry.tokens
        numbers = sorted(lane.slot) + [*range(self.now, self.now + self._frames)]
        slots = [lane.slot[i] for i in sorted(lane.slot)] + [*range(self._frames)]
        query = turn(q[0], self._own[: q.shape[1]]).transpose(0, 1)[:, ::stride].float()
        keys = self.store.read_keys(layer, 0, live).flatten(1, 2).transpose(1, 2)
        total = torch.zeros(query.shape[0], live, device=query.device)
        for part in query.split(block, dim=1):
            weights = (part @ keys * part.shape[-1] ** -0.5).softmax(dim=-1)
            total += weights.unflatten(-1, (live, tokens)).sum(dim=(1, 3))
        return total[:, slots] / query.shape[1], numbers

    def stats(self) -> CacheStats:
        """Bytes and frames, now."""
        counts = self.roles.counts()
        full, now = (
            sum(counts[lane.role] * past(lane) for lane in self.lanes) / sum(counts.values()) + self.geometry.chunk
            for past in (lambda lane: lane.policy.capacity, lambda lane: len(lane.held))
        )
        return CacheStats(
            nbytes=sum(x.nbytes for x in self.store.tensors),
            frames={lane.role.value: len(lane.held) for lane in self.lanes},
            capacity={lane.role.value: lane.policy.capacity for lane in self.lanes},
            mean_frames=full,
            next_frames=now,
        )

    def _lay_out(self, frames: int) -> None:
        """Lays out what every layer reads in passes of so many frames."""
        held = tuple(len(lane.held) for lane in self.lanes)
        if self._layout == (frames, held):
            return
        self._frames, self._layout = frames, (frames, held)
        self.store.tell(frames, held)
        if self._layout not in self._laid:
            if len(self._laid) == MOST_LAID:
                self._laid.clear()
            self._laid[self._layout] = self.store.views(frames, held)
        self._views = self._laid[self._layout]

    def _choose_looks(self) -> dict[HeadRole, dict[int, slice]]:
        """For every role whose policy looks at pictures, the layers at which it does, and its heads there."""
        looks = {}
        for lane in self.lanes:
            if lane.policy.looks:
                layers = [layer for layer, spans in enumerate(self._spans) if lane.role in spans]
                looks[lane.role] = {layer: slice(*self._spans[layer][lane.role]) for layer in layers[::LOOK_EVERY]}
        return looks

    def _room_for_keys(self, dtype: torch.dtype) -> dict[int, list[tuple[slice, Tensor]]]:
        """For every layer that is looked at, heads and where the keys of their last pass go, [N, heads, D]."""
        seen: dict[int, list[tuple[slice, Tensor]]] = {}
        tokens = self.geometry.chunk * self.geometry.tokens
        for looks in self._looks.values():
            for layer, heads in looks.items():
                shape = (tokens, heads.stop - heads.start, self.geometry.head_dim)
                seen.setdefault(layer, []).append((heads, torch.empty(shape, dtype=dtype, device=self.device)))
        return seen

    def _looked_at(self, lane: Lane) -> list[Tensor]:
        """Keys of the last pass before RoPE [N, heads, D] of the lane's heads, for the layers that are looked at."""
        tokens = self._frames * self.geometry.tokens
        looks = self._looks[lane.role].items()
        return [next(x for at, x in self._seen[layer] if at == heads)[:tokens] for layer, heads in looks]

    def _drop(self, lane: Lane, kept: Sequence[Frame]) -> None:
        lane.held = list(kept)
        numbers = {f.index for f in kept}
        lane.slot = {index: slot for index, slot in lane.slot.items() if index in numbers}
        lane.written = {index: time for index, time in lane.written.items() if index in numbers}
        if lane.likeness is not None:
            lane.likeness.keep(kept)

    def _plan(self) -> None:
        """Brings the kept frames to their slots and re-encodes them in time, before the next chunk."""
        clock = Clock(self.now, self.geometry.chunk, self.geometry.span)
        for number, lane in enumerate(self.lanes):
            if len(lane.held) > lane.policy.capacity:
                held = len(lane.held)
                raise ConfigError(f"policy of {lane.role} heads holds {held} frames, more than its capacity")
            lane.placed = lane.policy.place(lane.held, clock)
            if lane.held:
                self._settle(number, lane)
                self._re_encode(number, lane)
        self._lay_out(self.geometry.chunk)

    def _settle(self, number: int, lane: Lane) -> None:
        """Moves frames until they fill the slots right behind the staging ones, without a hole.

        New frames come from staging; older ones move only when a policy drops more frames than arrive.
        """
        chunk = self.geometry.chunk
        past = range(chunk, chunk + len(lane.held))
        used = set(lane.slot.values())
        holes = iter(slot for slot in past if slot not in used)
        moves = {index: next(holes) for index, slot in lane.slot.items() if slot not in past}
        if sources := [lane.slot[index] for index in moves]:
            self.store.move(number, sources, [*moves.values()])
        lane.slot.update(moves)

    def _re_encode(self, number: int, lane: Lane) -> None:
        """Brings every held key from the time it was written at to where its frame is placed."""
        times = torch.zeros(len(lane.held))
        for frame, distance in zip(lane.placed.frames, lane.placed.distance, strict=True):
            times[lane.slot[frame.index] - self.geometry.chunk] = -distance - lane.written[frame.index]
        self.store.turn(number, times)


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
