"""The only place where a Config becomes objects."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from hforce import memory
from hforce.attention.backends import SDPA, can_launch, check_backend, choose_backend, turns_queries
from hforce.attention.timing import Layer
from hforce.cache.heads import HeadCache
from hforce.cache.policies import fits, make_policy, options_of
from hforce.cache.policies.full import Full
from hforce.cache.policy import CachePolicy
from hforce.cache.roles import HeadRole, Profile, RoleMap, check_model, head_order, load_profile
from hforce.errors import ConfigError, DataError, InputError, UnavailableError
from hforce.geometry import Geometry
from hforce.graphs import Graphs
from hforce.models.base import Backbone, Blueprint, Codec, Described, Source
from hforce.models.families import SELF_FORCING, Family, Recipe, find_family
from hforce.models.hub import pin, read_id, resolve
from hforce.models.random_weights import DECODERS, random_backbone
from hforce.models.registry import find_device, open_model
from hforce.prompts import Shot
from hforce.resources import resource
from hforce.room import free_bytes
from hforce.sampler import make_steps
from hforce.settings import OWN, CacheConfig, Config, ModelConfig, SampleConfig
from hforce.stream import Sampling, Stream, Switch, Take, seeded
from hforce.units import parse_bytes, parse_size

log = logging.getLogger(__name__)

HUB_PARTS = ("checkpoint", "base", "lora", "vae")  # settings of a model that may be names on the hub
SHARES: Mapping[HeadRole, float] = MappingProxyType({HeadRole.LOCAL: 0.15, HeadRole.ANCHOR: 0.25})
ROUNDING = 1e-6  # video frames by which a length in seconds may miss the whole number it was made from


@dataclass(frozen=True)
class Plan:
    """A video cut into chunks: `chunks` per shot after `given` latent frames, and `frames` video frames in all."""

    chunks: tuple[int, ...]
    frames: int
    given: int = 0

    @property
    def total(self) -> int:
        """Chunks to be made in all."""
        return sum(self.chunks)

    def held(self, chunk: int) -> int:
        """Chunks of so many latent frames that the past comes to in the end, what was given included."""
        return self.total + math.ceil(self.given / chunk)


def build_blueprint(config: Config) -> Blueprint:
    """The model of a configuration, of the release named there, or else as it is recognised, with that one's chunk.

    Its weights are not read. Sets the number of CPU threads. Raises what `build_source`, `open_model`,
    `check_compiler` and `choose_family` raise.
    """
    model = config.model
    set_threads(model.threads)
    source = build_source(model)
    size = parse_size(model.size) if model.size else None
    blueprint = open_model(model.name, source, size, model.device, model.dtype)
    vae_device = find_device(model.vae_device, "leave model.vae_device out") if model.vae_device else ""
    if model.compile:
        check_compiler(blueprint.device)
    family = choose_family(model.release, blueprint.family)
    recipe = effective(config.sample, family)
    if family:
        log.info("streaming as %s: %s", family.name, json.dumps(asdict(recipe)))
    if family and family.note:
        log.warning("%s: %s", family.name, family.note)
    geometry = replace(blueprint.geometry, chunk=recipe.chunk)
    return replace(blueprint, family=family, vae_device=vae_device, geometry=geometry)


def build_backbone(config: Config) -> Backbone:
    """The model of a configuration, its weights read. Raises what `build_blueprint` and `Blueprint.load` raise."""
    return build_blueprint(config).load()


def build_memory(config: Config, blueprint: Blueprint, chunks: int, switches: bool) -> tuple[memory.Plan, int | None]:
    """What a video of so many chunks takes in the memory mode that is set, and what there is; None: not known.

    Raises what `check_cache` raises, and ConfigError where `full` has no room for the video.
    """
    geometry, roles = blueprint.geometry, build_roles(config.cache, blueprint)
    lanes = {}
    for role in (role for role, count in roles.counts().items() if count):
        policy = build_policy(config.cache, role, blueprint, chunks)
        fewest = (chunks - 1) * geometry.chunk + 1  # frames in the end: the first chunk may be short
        if isinstance(policy, Full) and policy.capacity < fewest:
            message = f"policy 'full' has room for {policy.capacity} frames, the video comes to at least {fewest}"
            raise ConfigError(message, f"leave cache.{role.value}.options.frames out, or choose another policy")
        heads = tuple(row.count(role) for row in roles.roles)
        lanes[role.value] = memory.Lane(heads, policy.capacity, policy.looks)
    width, height = blueprint.size
    work = memory.Work(
        blueprint.config, geometry, blueprint.dtype.itemsize, lanes, blueprint.needs,
        pixels=3 * blueprint.stride * geometry.chunk * width * height, here=torch.device(blueprint.device).type,
        switches=switches, turns_keys=not turns_queries(config.cache.backend), codec_apart=blueprint.is_apart,
        graphs=records_passes(config.model, blueprint.device),
    )  # fmt: skip
    limit = parse_bytes(config.model.memory_limit) if config.model.memory_limit else None
    available = limit if limit is not None else free_bytes(blueprint.device)
    return memory.choose(work, config.model.memory, available), available


def build_bench_backbone(config: Config) -> tuple[Backbone, dict[str, Codec]]:
    """The model that a bench runs, and the codecs whose decoders are timed beside its own, by name.

    Raises ConfigError for settings that do not go together, and what `build_backbone` or `random_backbone` raise.
    """
    wanted = config.bench
    if config.model.vae_device:
        raise ConfigError("a bench times one device", "leave model.vae_device out")
    if wanted.layers and not wanted.random_weights:
        raise ConfigError("bench.layers takes layers away, and weights would mean nothing", "add --random-weights")
    backbone = build_random_backbone(config) if wanted.random_weights else build_backbone(config)
    codecs: dict[str, Codec] = {}
    for name in wanted.decoders:
        codec = backbone.codec if name == OWN else DECODERS[name](backbone.dtype, backbone.device)
        if codec.channels != backbone.shape[0]:
            message = f"decoder {name!r} reads latents of {codec.channels} channels, those of {backbone.name!r} have"
            raise ConfigError(f"{message} {backbone.shape[0]}", f"set bench.decoders to [{OWN}]")
        codecs.setdefault(codec.name, codec)
    first = next(iter(codecs))
    return replace(backbone, codec=codecs.pop(first)), codecs


def build_random_backbone(config: Config) -> Backbone:
    """A model of the shape of the one named, with random weights. Raises ConfigError where files are named, too."""
    model = config.model
    if given := [name for name in ("checkpoint", "base", "lora", "vae") if getattr(model, name)]:
        raise ConfigError(f"model.{given[0]} and random weights exclude each other", "leave out one of them")
    set_threads(model.threads)
    size = parse_size(model.size) if model.size else None
    backbone = random_backbone(model.name, size, find_device(model.device), model.dtype, config.bench.layers)
    if model.compile:
        check_compiler(backbone.device)
    return replace(backbone, geometry=replace(backbone.geometry, chunk=effective(config.sample, None).chunk))


def pin_model(model: ModelConfig) -> ModelConfig:
    """The same with every name on the hub at the commit that it stands for now. Raises what `hub.pin` raises."""
    pinned: dict[str, Any] = {part: pin(getattr(model, part), offline=model.offline) for part in HUB_PARTS[1:]}
    checkpoint = pin(model.checkpoint, model.revision, model.offline)
    return replace(model, checkpoint=checkpoint, revision="", **pinned)


def build_source(model: ModelConfig) -> Source:
    """Where the parts of a model lie, those on the hub fetched. Raises what `hub.pin` raises."""
    pinned = pin_model(model)
    names = {part: getattr(pinned, part) for part in HUB_PARTS}
    places = {part: str(resolve(name, offline=True)) if read_id(name) else name for part, name in names.items()}
    return Source(**places, texts=model.texts)


def choose_family(release: str, recognised: Family | None) -> Family | None:
    """The release that was named, or else what the weights were recognised as.

    Raises ConfigError for a name given to a model that is of no release.
    """
    if not release:
        return recognised
    if not recognised:
        raise ConfigError(f"model.release names {release}, but the model is of no release", "leave it out")
    if recognised.name not in (release, find_family(release).taken_for):
        log.warning("taken for %s, as model.release says; it looks like %s", release, recognised.name)
    return find_family(release)


def effective(sample: SampleConfig, family: Family | None) -> Recipe:
    """How a model streams: as the configuration says; what is null there, as its release does, or Self-Forcing."""
    own = family.recipe if family else SELF_FORCING
    given = {name: value for name, value in vars(sample).items() if name in vars(own) and value is not None}
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return replace(own, **plain)


def set_threads(wanted: int) -> None:
    """Lets torch use so many CPU threads; 0: as many as there are cores but one, if it would use them all.

    The video encoder works beside the model and takes a core of its own; where it shares one, all threads wait for the
    one that is held up (docs/results.md has the times).
    """
    cores = count_cores()
    if wanted or torch.get_num_threads() >= cores:
        torch.set_num_threads(wanted or max(1, cores - 1))


def check_compiler(device: str) -> None:
    """Compiles something small with torch.compile. Raises UnavailableError where that fails, as without a compiler."""
    try:
        torch.compile(torch.neg)(torch.ones(1, device=device))
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise UnavailableError(f"torch.compile does not work here: {reason}", "leave model.compile out") from error


def count_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build_stream(config: Config, backbone: Backbone, chunks: int, seed: int | None = None) -> Stream:
    """A stream for a video of so many chunks. Reorders the heads of the backbone's model to suit its roles."""
    if config.model.compile:
        backbone.model.compile_blocks()
    elif can_launch(torch.device(backbone.device)):
        from hforce.models.fused import fuse

        fuse(backbone.model)
    roles = build_roles(config.cache, backbone)
    order = head_order(roles)
    backbone.model.order_heads(order)
    ordered = RoleMap(tuple(tuple(roles.at(layer, head) for head in row) for layer, row in enumerate(order)))
    cache = build_cache(config.cache, backbone, ordered, chunks)
    sampling = build_sampling(config.sample, backbone.family)
    patience = len(sampling.steps) + 2 if cache.backend.name == SDPA.name else 1  # all passes of a chunk, and one more
    records = records_passes(config.model, backbone.device)
    return Stream(
        backbone.model,
        cache,
        sampling,
        backbone.shape,
        seeded(config.sample.seed if seed is None else seed),
        Switch(config.cache.switch, config.cache.recache_frames),
        graphs=Graphs(patience) if records and not cache.backend.waits else None,
    )


def records_passes(model: ModelConfig, device: str) -> bool:
    """Whether passes of the transformer are recorded as CUDA graphs there; on GPUs of AMD that was never tried."""
    return model.graphs and torch.device(device).type == "cuda" and torch.version.cuda is not None


def build_sampling(sample: SampleConfig, family: Family | None = None) -> Sampling:
    """The denoising steps of a model of this family."""
    recipe = effective(sample, family)
    steps, first = (make_steps(s, recipe.shift, recipe.warp) for s in (recipe.steps, recipe.first_steps))
    return Sampling(steps, first, commit_timestep=float(sample.context_noise))


def build_roles(cache: CacheConfig, backbone: Described) -> RoleMap:
    """The role of every head: from the profile, or one of the controls made from it."""
    layers, heads = backbone.geometry.layers, backbone.geometry.heads
    if cache.roles == "uniform":
        return RoleMap.uniform(HeadRole.MEMORY, layers, heads)
    known = drawn_roles(layers, heads) if backbone.is_random and not cache.profile else build_profile(cache, backbone)
    if cache.roles == "inverse":
        return known.inverse()
    roles = known if isinstance(known, RoleMap) else known.role_map()
    if cache.roles.startswith("random:"):
        return roles.shuffled(int(cache.roles.removeprefix("random:")))
    return roles


def drawn_roles(layers: int, heads: int) -> RoleMap:
    """Roles for a model of random weights, which has none to measure: the published shares at drawn places.

    15 % local, 25 % anchor and 60 % memory heads (Head Forcing, arXiv 2605.14487), always drawn alike.
    """
    total = layers * heads
    counts = {role: round(share * total) for role, share in SHARES.items()}
    counts[HeadRole.MEMORY] = total - sum(counts.values())
    roles = [role for role, count in counts.items() for _ in range(count)]
    return RoleMap(tuple(tuple(roles[i : i + heads]) for i in range(0, total, heads))).shuffled(seed=0)


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
    profile = load_profile(path, cache.strict)
    check_model(profile, backbone.fingerprint, backbone.geometry.layers, backbone.geometry.heads)
    if profile.model.tokens_per_frame != backbone.geometry.tokens:
        told = path, profile.model.tokens_per_frame, backbone.geometry.tokens
        log.info("%s was measured with %d tokens a latent frame; this video has %d", *told)
    return profile


def check_cache(cache: CacheConfig, backbone: Described) -> None:
    """Finds out whether a cache can be built for this model, without building it.

    Raises ConfigError for a policy that cannot be, InputError or DataError for the profile, BackendError for the way
    to attend.
    """
    build_roles(cache, backbone)
    check_backend(cache.backend, torch.device(backbone.device), backbone.dtype, backbone.geometry.head_dim)
    for role in HeadRole:
        build_policy(cache, role, backbone, chunks=1)


def build_cache(cache: CacheConfig, backbone: Backbone, roles: RoleMap, chunks: int) -> HeadCache:
    """The cache, its memory allocated. `chunks` sizes the policy that keeps everything."""
    geometry = backbone.geometry
    policies = {role: build_policy(cache, role, backbone, chunks) for role in HeadRole}
    layer = usual_layer(roles, policies, geometry)
    backend = choose_backend(cache.backend, layer, torch.device(backbone.device), backbone.dtype)
    return HeadCache(geometry, roles, policies, backbone.dtype, backbone.device, backend)


def usual_layer(roles: RoleMap, policies: Mapping[HeadRole, CachePolicy], geometry: Geometry) -> Layer:
    """The sizes of attention where heads hold as many frames as they may, in the layer that reads the median number."""
    rows = [sorted((geometry.chunk + policies[role].capacity for role in row), reverse=True) for row in roles.roles]
    frames = tuple(sorted(rows, key=sum)[len(rows) // 2])
    return Layer(geometry.chunk * geometry.tokens, geometry.tokens, geometry.head_dim, frames)


def build_policy(cache: CacheConfig, role: HeadRole, backbone: Described, chunks: int) -> CachePolicy:
    """The policy of one role, with its options checked against the model's span.

    "window" without a number of frames is what the release was trained with, its sink included.
    """
    chosen, geometry = getattr(cache, role.value), backbone.geometry
    name, options = chosen.policy, dict(chosen.options)
    seen = backbone.family.recipe if backbone.family else SELF_FORCING
    if name == "window" and seen.window and "frames" not in options:
        if seen.sink:
            name, own = "sink", {"sink": seen.sink, "window": seen.window - seen.sink - geometry.chunk}
        else:
            own = {"frames": seen.window}
        options = own | options
    if name == "full":
        options.setdefault("frames", chunks * geometry.chunk)
    if "chunk" in options_of(name):
        options.setdefault("chunk", geometry.chunk)
    try:
        policy = make_policy(name, **options)
    except ConfigError as error:
        error.say_where(f"cache.{role.value}")
        raise
    fits(policy, geometry.chunk, geometry.span, role.value)
    return policy


def build_plan(shots: Sequence[Shot], seconds: float, fps: int, backbone: Described, given: int = 0) -> Plan:
    """Cuts a script into chunks: the end is moved up to a whole chunk, changes of prompt to the nearest one.

    The first `given` latent frames are there already, and belong to the first prompt.
    Raises DataError when two prompts would begin in the same chunk, or one after the end, or if nothing is to be made.
    """
    stride, chunk = backbone.stride, backbone.geometry.chunk
    latents = math.ceil((math.ceil(seconds * fps - ROUNDING) - 1) / stride) + 1
    total = math.ceil((latents - given) / chunk)
    if total < 1:
        raise DataError(
            f"what the video starts from fills all of its {seconds:g}s: nothing is left to be made",
            "make it longer with --duration, which counts the whole, or start from less",
        )
    starts, moment = [], 0.0
    for shot in shots:
        starts.append(max(0, round((moment * fps - given * stride) / (stride * chunk))))
        moment += shot.seconds or 0.0
    counts = tuple(after - before for before, after in zip(starts, [*starts[1:], total], strict=True))
    least = 0 if given else 1  # what is given may be all that there is of the first prompt
    late = next((i for i, count in enumerate(counts) if count < (1 if i else least)), None)
    if late is not None:
        raise DataError(
            f"prompt {late + 1} of {len(shots)} would last less than a chunk of {stride * chunk / fps:g}s",
            "give each prompt at least that long, or make the video longer",
        )
    return Plan(counts, stride * (given + total * chunk - 1) + 1, given)


def build_script(shots: Sequence[Shot], plan: Plan, backbone: Backbone) -> list[Take]:
    """The shots as the stream plays them, their prompts encoded."""
    backbone.encode_text.encode_all(shot.prompt for shot in shots)
    return [Take(backbone.encode_text(shot.prompt), n) for shot, n in zip(shots, plan.chunks, strict=True)]
