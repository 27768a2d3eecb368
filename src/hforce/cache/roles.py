"""What each head is: roles, the map of a model's heads, and the profile file that carries it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from hforce.documents import parse_document, read_document, write_document
from hforce.errors import DataError

log = logging.getLogger(__name__)

Place = tuple[int, int]  # (layer, head)
Masses = Sequence[Sequence[float]]  # [L][H], share of attention in 0..1


class HeadRole(StrEnum):
    """What a head does, found by measuring (Head Forcing, arXiv 2605.14487). The set is closed; policies are not."""

    LOCAL = "local"  # refines detail: looks at the chunk being made
    ANCHOR = "anchor"  # stabilises structure: looks at the first frame
    MEMORY = "memory"  # everything else: gathers long-range context


@dataclass(frozen=True)
class RoleMap:
    """The role of every head, `roles` [L][H]. Raises DataError when it is empty or its layers differ in heads."""

    roles: tuple[tuple[HeadRole, ...], ...]

    def __post_init__(self) -> None:
        if len({len(row) for row in self.roles}) != 1 or not self.roles[0]:
            raise DataError("a role map needs layers with one and the same number of heads, at least one")

    @classmethod
    def uniform(cls, role: HeadRole, layers: int, heads: int) -> Self:
        """The map in which all `layers` x `heads` have one role: the control without heterogeneity."""
        return cls(((role,) * heads,) * layers)

    @property
    def layers(self) -> int:
        return len(self.roles)

    @property
    def heads(self) -> int:
        """Heads in one layer."""
        return len(self.roles[0])

    def at(self, layer: int, head: int) -> HeadRole:
        return self.roles[layer][head]

    def counts(self) -> dict[HeadRole, int]:
        """Heads of each role, over all layers; roles that no head has count 0."""
        return {role: sum(row.count(role) for row in self.roles) for role in HeadRole}

    def letters(self) -> tuple[str, ...]:
        """One row a layer, one letter a head: L local, A anchor, M memory."""
        return tuple("".join(role[0].upper() for role in row) for row in self.roles)

    def shuffled(self, seed: int) -> RoleMap:
        """The control with as many heads of each role, at random places (random allocation, arXiv 2605.14487)."""
        drawn = [role for row in self.roles for role in row]
        random.Random(seed).shuffle(drawn)
        return RoleMap(tuple(tuple(drawn[i : i + self.heads]) for i in range(0, len(drawn), self.heads)))

    def inverse(self, current: Masses | None = None, sink: Masses | None = None) -> RoleMap:
        """The control with as many heads of each role, given to the heads that deserve it least.

        Local go the heads with the lowest attention mass on the current chunk, anchor those of the rest with the
        lowest mass on the sink, memory the remaining. Without masses [L][H] the present role stands for them; heads
        that tie are taken by head first, then by layer, so that no layer is favoured.
        """
        places = [(layer, head) for layer in range(self.layers) for head in range(self.heads)]
        on_current = _by_place(current) if current is not None else self._standing("MAL")
        on_sink = _by_place(sink) if sink is not None else self._standing("MLA")
        counts, roles = self.counts(), dict.fromkeys(places, HeadRole.MEMORY)
        for role, mass in ((HeadRole.LOCAL, on_current), (HeadRole.ANCHOR, on_sink)):
            free = [at for at in places if roles[at] is HeadRole.MEMORY]
            lowest = sorted(free, key=lambda at: (mass[at], at[1], at[0]))[: counts[role]]
            roles.update(dict.fromkeys(lowest, role))
        return _assemble(roles)

    def check(self, layers: int, heads: int, name: str) -> None:
        """Raises DataError unless this map has the `layers` and `heads` of the model called `name`."""
        if (self.layers, self.heads) != (layers, heads):
            raise DataError(
                f"the head profile has {self.layers} x {self.heads} heads, model {name!r} has {layers} x {heads}",
                mend=f"measure one with: hforce profile --model {name}",
            )

    def _standing(self, order: str) -> dict[Place, float]:
        """A stand-in for masses: the place of each head's letter in `order`."""
        rows = enumerate(self.letters())
        return {(layer, head): order.index(letter) for layer, row in rows for head, letter in enumerate(row)}


def head_order(role_map: RoleMap) -> tuple[tuple[int, ...], ...]:
    """Per layer, its heads ordered memory, anchor, local, else as they were: [L][H] head numbers.

    Weights permuted this way make the heads of a role one slice.
    """
    first = (HeadRole.MEMORY, HeadRole.ANCHOR, HeadRole.LOCAL)
    return tuple(
        tuple(sorted(range(role_map.heads), key=lambda head: first.index(row[head]))) for row in role_map.roles
    )


def label(
    sink: Masses, current: Masses, anchor: float = 0.25, local: float = 0.20, threshold: str = "quantile"
) -> RoleMap:
    """Roles from the attention mass on the sink and on the current chunk, each [L][H] in 0..1.

    Anchor are the heads with the most mass on the sink, local those of the rest with the most on the current chunk,
    memory all others. With threshold "quantile", `anchor` is a share of all heads and `local` one of the rest; ties
    go to the lower (layer, head). With "absolute", they are the masses to exceed. Either way 0 asks for none. Raises
    DataError when a mass is not finite. Source: Head Forcing (arXiv 2605.14487) as others read it; quantiles keep the
    budget fixed.
    """
    anchors, locals_ = _cut_twice(sink, current, anchor, local, threshold)
    roles = dict.fromkeys(_by_place(sink), HeadRole.MEMORY)
    roles.update(dict.fromkeys(anchors.above, HeadRole.ANCHOR))
    roles.update(dict.fromkeys(locals_.above, HeadRole.LOCAL))
    return _assemble(roles)


def margins(
    sink: Masses, current: Masses, anchor: float = 0.25, local: float = 0.20, threshold: str = "quantile"
) -> tuple[tuple[float, ...], ...]:
    """How far each head's mass is from the nearest cut that would change its role, [L][H] in 0..1.

    Arguments as for `label`. A quantile cut lies halfway between the last head above and the first below it.
    An anchor head is judged by its sink mass alone; 1 where nothing could change the role.
    """
    anchors, locals_ = _cut_twice(sink, current, anchor, local, threshold)
    on_sink, on_current = _by_place(sink), _by_place(current)

    def margin(at: Place) -> float:
        from_anchor = abs(on_sink[at] - anchors.level)
        from_local = math.inf if at in anchors.above else abs(on_current[at] - locals_.level)
        return min(from_anchor, from_local, 1.0)

    return tuple(tuple(margin((layer, head)) for head in range(len(row))) for layer, row in enumerate(sink))


class _Cut(NamedTuple):
    above: frozenset[Place]
    level: float  # the mass that parts them from the rest, inf when nothing is parted


def _cut_twice(sink: Masses, current: Masses, anchor: float, local: float, threshold: str) -> tuple[_Cut, _Cut]:
    on_sink, on_current = _by_place(sink), _by_place(current)
    anchors = _cut(on_sink, anchor, threshold)
    rest = {at: mass for at, mass in on_current.items() if at not in anchors.above}
    return anchors, _cut(rest, local, threshold)


def _cut(mass: Mapping[Place, float], share: float, threshold: str) -> _Cut:
    ranked = sorted(mass, key=lambda at: (-mass[at], at))
    if threshold == "absolute" and share > 0:
        return _Cut(frozenset(at for at in ranked if mass[at] > share), share)
    count = round(share * len(ranked))
    parts = 0 < count < len(ranked)
    level = (mass[ranked[count - 1]] + mass[ranked[count]]) / 2 if parts else math.inf
    return _Cut(frozenset(ranked[:count]), level)


def _by_place(masses: Masses) -> dict[Place, float]:
    flat = {(layer, head): float(m) for layer, row in enumerate(masses) for head, m in enumerate(row)}
    for (layer, head), mass in flat.items():
        if not math.isfinite(mass):
            raise DataError(f"the attention mass of layer {layer} head {head} is {mass}; the model gives no numbers")
    return flat


def _assemble(roles: Mapping[Place, HeadRole]) -> RoleMap:
    layers, heads = (1 + max(at[axis] for at in roles) for axis in (0, 1))
    return RoleMap(tuple(tuple(roles[layer, head] for head in range(heads)) for layer in range(layers)))


# The profile file, `hforce.head-profile` version 1.

VERSION: Final = 1
MAX_BYTES = 8 * 2**20  # no honest profile comes near; the limit is checked before parsing

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=-1e-3, le=1 + 1e-3)]  # sums of float32 shares may pass 0 and 1 by rounding


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class Fingerprint(_Part):
    """Hash over the self-attention query and key weights, the same for every file format of one model."""

    algo: Literal["qk-sha256-v1"] = "qk-sha256-v1"
    value: str


class ProfiledModel(_Part):
    """The model that was measured."""

    id: str
    arch: str
    num_layers: Positive
    num_heads: Positive
    head_dim: Positive
    tokens_per_frame: Positive
    frames_per_chunk: Positive
    fingerprint: Fingerprint


class Calibration(_Part):
    """What was generated while measuring, and how; `size` (width, height) in pixels, `num_frames` latent."""

    num_prompts: Positive
    prompts_sha256: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    num_frames: Positive
    size: tuple[Positive, Positive]
    timesteps: tuple[float, ...]
    dtype: str
    device: str
    attention: str
    mode: str
    policy: str
    chunks: tuple[Count, ...]
    query_stride: Positive


class Thresholds(_Part):
    """The two settings of `label`: shares of heads (quantile) or attention masses (absolute)."""

    anchor: Share
    local: Share


class Method(_Part):
    """The rule that turned measurements into roles."""

    name: Literal["head-forcing"] = "head-forcing"
    version: Literal[1] = 1
    threshold: Literal["quantile", "absolute"]
    thresholds: Thresholds
    sink_frames: Positive
    min_vote: Share


class HeadStats(_Part):
    """Attention mass of one head by where it goes: mean over `n` maps, and two standard deviations."""

    sink_mass: Share
    middle_mass: Share
    current_mass: Share
    last4_mass: Share
    sd_sink: Annotated[float, Field(ge=0)]
    sd_current: Annotated[float, Field(ge=0)]
    n: Positive


class HeadRecord(_Part):
    """One head: its role, how far it is from another one, and the share of prompts that agree."""

    layer: Count
    head: Count
    role: HeadRole
    margin: Share
    vote: Share
    stats: HeadStats


class Summary(_Part):
    """The whole map in a few numbers: heads a role, and label agreement between halves of the prompts, and modes."""

    counts: dict[HeadRole, Count]
    split_half_agreement: Share
    mode_agreement: Share | None = None


class Profile(_Part):
    """A measured role map with everything needed to trust it or to measure it again. `x` is for other tools."""

    kind: Literal["hforce.head-profile"] = "hforce.head-profile"
    schema_version: Literal[1] = VERSION
    created_at: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    generator: dict[str, str]
    model: ProfiledModel
    calibration: Calibration
    method: Method
    heads: tuple[HeadRecord, ...]
    summary: Summary
    x: dict[str, JsonValue] = Field(default_factory=dict)
    content_sha256: str = ""

    @model_validator(mode="after")
    def _every_head_once(self) -> Self:
        layers, heads = self.model.num_layers, self.model.num_heads
        for i, record in enumerate(self.heads):
            place, due = (record.layer, record.head), divmod(i, heads)
            if place != due or i >= layers * heads:
                raise ValueError(f"heads[{i}]: {_misplaced(place, due, self.heads[:i], self.model)}")
        if len(self.heads) < layers * heads:
            layer, head = divmod(len(self.heads), heads)
            raise ValueError(f"heads: layer {layer} head {head} is missing")
        return self

    def role_map(self) -> RoleMap:
        """The roles of all heads."""
        return _assemble({(record.layer, record.head): record.role for record in self.heads})

    def inverse(self) -> RoleMap:
        """The roles turned round by the measured masses: `RoleMap.inverse`."""
        rows = range(0, len(self.heads), self.model.num_heads)
        stats = [[record.stats for record in self.heads[i : i + self.model.num_heads]] for i in rows]
        current = [[s.current_mass for s in row] for row in stats]
        return self.role_map().inverse(current, [[s.sink_mass for s in row] for row in stats])

    def digest(self) -> str:
        """SHA-256 over the canonical JSON of everything but the digest itself, in hex."""
        content = self.model_dump(mode="json", exclude={"content_sha256"})
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class _Header(BaseModel):
    """What can be said of a profile of any version."""

    kind: Literal["hforce.head-profile"]
    schema_version: Annotated[int, Field(ge=1, strict=True)]


def save_profile(profile: Profile, path: str | Path) -> None:
    """Write a profile with its content hash, all or nothing. Raises OutputError or WriteError when that fails."""
    sealed = profile.model_copy(update={"content_sha256": profile.digest()})
    write_document(path, json.dumps(sealed.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")


def load_profile(path: str | Path, strict: bool = False) -> Profile:
    """Read a profile. One that was changed after it was measured is read with a warning in the log.

    Raises InputError when there is no such file, DataError with the JSON path when it is not a valid profile, or if
    `strict` when it was changed.
    """
    data, mend = read_document(path, MAX_BYTES), "measure a new one with: hforce profile"
    version = parse_document(_Header, data, path, mend).schema_version
    if version > VERSION:
        message = f"{path} has profile schema {version}, newer than the {VERSION} this hforce can read"
        raise DataError(message, mend="upgrade hforce, or " + mend)
    profile = parse_document(Profile, data, path, mend)
    if profile.content_sha256 != profile.digest():
        changed = f"{path} was changed after it was measured (content_sha256 does not match)"
        if strict:
            raise DataError(changed, mend + "; or do without --strict")
        log.warning("%s; using it as it is", changed)
    return profile


def check_model(profile: Profile, fingerprint: str, layers: int, heads: int) -> None:
    """Raises DataError unless the profile was measured on the model with this fingerprint, `layers` and `heads`."""
    model, known = profile.model, profile.model.fingerprint.value
    if (model.num_layers, model.num_heads, known) != (layers, heads, fingerprint):
        raise DataError(
            f"the head profile belongs to another model: it was measured on {model.id!r}, {model.num_layers} x "
            f"{model.num_heads} heads, fingerprint {known[:12]}; this is {layers} x {heads}, {fingerprint[:12]}",
            mend="measure this model with: hforce profile",
        )


def _misplaced(place: Place, due: Place, before: Sequence[HeadRecord], model: ProfiledModel) -> str:
    """Why the head at `place` cannot stand where the head `due` should, in the order of (layer, head)."""
    layer, head = place
    if layer >= model.num_layers or head >= model.num_heads:
        return f"layer {layer} head {head} is outside the model's {model.num_layers} x {model.num_heads}"
    if any((record.layer, record.head) == place for record in before):
        return f"layer {layer} head {head} stands here a second time"
    return f"layer {due[0]} head {due[1]} is missing here, found layer {layer} head {head}"
