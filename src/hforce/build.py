"""The only place where a Config becomes objects."""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hforce import memory
from hforce.cache.heads import HeadCache
from hforce.cache.policies import fits, make_policy
from hforce.cache.policy import CachePolicy
from hforce.cache.roles import HeadRole, Profile, RoleMap, check_model, head_order, load_profile
from hforce.config import CacheConfig, Config, SampleConfig
from hforce.errors import DataError, InputError
from hforce.geometry import Geometry
from hforce.models.base import Backbone, Blueprint, Described, Source
from hforce.models.families import Family
from hforce.models.registry import open_model
from hforce.prompts import Shot
from hforce.resources import resource
from hforce.room import free_bytes
from hforce.sampler import make_steps
from hforce.stream import Sampling, Stream, Switch, Take, seeded
from hforce.units import parse_bytes, parse_size

log = logging.getLogger(__name__)

ROUNDING = 1e-6  # video frames by which a length in seconds may miss the whole number it was made from


@dataclass(frozen=True)
class Plan:
    """A video cut into chunks: `chunks` per shot; `frames` video frames in all."""

    chunks: tuple[int, ...]
    frames: int

    @property
    def total(self) -> int:
        """Chunks in all."""
        return sum(self.chunks)


def build_blueprint(config: Config) -> Blueprint:
    """The model of a configuration, its weights not read.

    Sets the number of CPU threads, and warns of settings that do not suit the model.
    """
    model = config.model
    set_threads(model.threads)
    source = Source(model.checkpoint, model.base, model.lora, model.vae, model.texts)
    size = parse_size(model.size) if model.size else None
    blueprint = open_model(model.name, source, size, model.device, model.dtype)
    if blueprint.family:
        advise(blueprint.family, config.sample)
    return blueprint


def build_backbone(config: Config) -> Backbone:
    """The model of a configuration, its weights read."""
    return build_blueprint(config).load()


def build_memory(config: Config, blueprint: Blueprint, chunks: int, switches: bool) -> tuple[memory.Plan, int | None]:
    """What a video of so many chunks takes in the memory mode that is set, and what there is; None: not known.

    Raises what `check_cache` raises.
    """
    geometry, roles = blueprint.geometry, build_roles(config.cache, blueprint)
    lanes = {}
    for role in (role for role, count in roles.counts().items() if count):
        policy = build_policy(config.cache, role, geometry, chunks)
        heads = tuple(row.count(role) for row in roles.roles)
        lanes[role.value] = memory.Lane(heads, policy.capacity, policy.looks)
    width, height = blueprint.size
    pixels = 3 * blueprint.stride * geometry.chunk * width * height
    kind = torch.device(blueprint.device).type
    work = memory.Work(
        blueprint.config, geometry, blueprint.dtype.itemsize, lanes, blueprint.needs, pixels, kind, switches
    )
    limit = parse_bytes(config.model.memory_limit) if config.model.memory_limit else None
    available = limit if limit is not None else free_bytes(blueprint.device)
    return memory.choose(work, config.model.memory, available), available


def advise(family: Family, sample: SampleConfig) -> None:
    """Warns of what there is to know about a release, and of its own settings if they are others and none were given.

    Nothing is changed: the settings of a run are those of its configuration.
    """
    names = ("steps", "first_steps", "warp", "shift")
    own = {name: getattr(family, name) for name in names}
    own = {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
    usual = {name: getattr(SampleConfig(), name) for name in names}
    if own != usual and all(getattr(sample, name) == usual[name] for name in names):
        texts = [f"sample.{name}={json.dumps(own[name])}" for name in names if own[name] != usual[name]]
        line = shlex.join(word for text in texts for word in ("--set", text.replace(" ", "")))
        log.warning("the weights are of %s, but its own settings are not used; give them with: %s", family.name, line)
    if family.note:
        log.warning("%s: %s", family.name, family.note)


def set_threads(wanted: int) -> None:
    """Lets torch use so many CPU threads; 0: as many as there are cores but one, if it would use them all.

    The video encoder works beside the model and takes a core of its own; where it shares one, all threads wait for the
    one that is held up (docs/results.md has the times).
    """
    cores = count_cores()
    if wanted or torch.get_num_threads() >= cores:
        torch.set_num_threads(wanted or max(1, cores - 1))


def count_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build_stream(config: Config, backbone: Backbone, chunks: int, seed: int | None = None) -> Stream:
    """A stream for a video of so many chunks. Reorders the heads of the backbone's model to suit its roles."""
    roles = build_roles(config.cache, backbone)
    order = head_order(roles)
    backbone.model.order_heads(order)
    ordered = RoleMap(tuple(tuple(roles.at(layer, head) for head in row) for layer, row in enumerate(order)))
    cache = build_cache(config.cache, backbone, ordered, chunks)
    return Stream(
        backbone.model,
        cache,
        build_sampling(config.sample),
        backbone.shape,
        seeded(config.sample.seed if seed is None else seed),
        Switch(config.cache.switch, config.cache.recache_frames),
    )


def build_sampling(sample: SampleConfig) -> Sampling:
    """The denoising steps."""
    steps, first = (make_steps(s, sample.shift, sample.warp) for s in (sample.steps, sample.first_steps))
    return Sampling(steps, first, commit_timestep=float(sample.context_noise))


def build_roles(cache: CacheConfig, backbone: Described) -> RoleMap:
    """The role of every head: from the profile, or one of the controls made from it."""
    layers, heads = backbone.geometry.layers, backbone.geometry.heads
    if cache.roles == "uniform":
        return RoleMap.uniform(HeadRole.MEMORY, layers, heads)
    profile = build_profile(cache, backbone)
    if cache.roles == "inverse":
        return profile.inverse()
    if cache.roles.startswith("random:"):
        return profile.role_map().shuffled(int(cache.roles.removeprefix("random:")))
    return profile.role_map()


def build_profile(cache: CacheConfig, backbone: Described) -> Profile:
    """The profile named, or the one that comes with the model. Raises DataError if it belongs to another model."""
    try:
        path = Path(cache.profile) if cache.profile else resource(f"profiles/{backbone.name}.json")
    except InputError as error:
        raise InputError(
            f"no head profile comes with model {backbone.name!r}",
            "measure one with: hforce profile -o FILE and the same --model, then pass --profile FILE; "
            "or do without: --roles uniform",
        ) from error
    profile = load_profile(path)
    check_model(profile, backbone.fingerprint, backbone.geometry.layers, backbone.geometry.heads)
    return profile


def check_cache(cache: CacheConfig, backbone: Described) -> None:
    """Finds out whether a cache can be built for this model, without building it.

    Raises ConfigError for a policy that cannot be, InputError or DataError for the profile.
    """
    build_roles(cache, backbone)
    for role in HeadRole:
        build_policy(cache, role, backbone.geometry, chunks=1)


def build_cache(cache: CacheConfig, backbone: Backbone, roles: RoleMap, chunks: int) -> HeadCache:
    """The cache, its memory allocated. `chunks` sizes the policy that keeps everything."""
    geometry = backbone.geometry
    policies = {role: build_policy(cache, role, geometry, chunks) for role in HeadRole}
    weight = backbone.model.patch_embedding.weight
    return HeadCache(geometry, roles, policies, weight.dtype, str(weight.device))


def build_policy(cache: CacheConfig, role: HeadRole, geometry: Geometry, chunks: int) -> CachePolicy:
    """The policy of one role, with its options checked against the model's span."""
    chosen = getattr(cache, role.value)
    options = dict(chosen.options)
    if chosen.policy == "full":
        options.setdefault("frames", chunks * geometry.chunk)
    policy = make_policy(chosen.policy, **options)
    fits(policy, geometry.chunk, geometry.span, role.value)
    return policy


def build_plan(shots: Sequence[Shot], seconds: float, fps: int, backbone: Described) -> Plan:
    """Cuts a script into chunks: the end is moved up to a whole chunk, changes of prompt to the nearest one.

    Raises DataError when two prompts would begin in the same chunk, or one after the end.
    """
    stride, chunk = backbone.stride, backbone.geometry.chunk
    latents = math.ceil((math.ceil(seconds * fps - ROUNDING) - 1) / stride) + 1
    total = math.ceil(latents / chunk)
    starts, moment = [], 0.0
    for shot in shots:
        starts.append(round(moment * fps / (stride * chunk)))
        moment += shot.seconds or 0.0
    counts = tuple(after - before for before, after in zip(starts, [*starts[1:], total], strict=True))
    if min(counts) < 1:
        late = next(i for i, count in enumerate(counts) if count < 1)
        raise DataError(
            f"prompt {late + 1} of {len(shots)} would last less than a chunk of {stride * chunk / fps:g}s",
            "give each prompt at least that long, or make the video longer",
        )
    return Plan(counts, stride * (total * chunk - 1) + 1)


def build_script(shots: Sequence[Shot], plan: Plan, backbone: Backbone) -> list[Take]:
    """The shots as the stream plays them, their prompts encoded."""
    backbone.encode_text.encode_all(shot.prompt for shot in shots)
    return [Take(backbone.encode_text(shot.prompt), n) for shot, n in zip(shots, plan.chunks, strict=True)]


