"""Run with Probe -> frame mass -> RoleMap -> profiles/*.json.

Videos are made as always, but all heads follow one plain policy, and a Probe notes how much of every head's attention
falls on the first frame, on the chunk being made, and between. The heads that look at the first frame most are
anchors, those of the rest that look at the chunk most are local, all others memory (Head Forcing, arXiv 2605.14487).
How many are anchors and local is set (`profile.anchor`, `profile.local`), for there is no natural cut.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

import hforce
from hforce.attention.backends import attends_by
from hforce.build import build_backbone, build_sampling, build_stream
from hforce.cache.heads import HeadCache
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
    label,
    margins,
    save_profile,
)
from hforce.errors import DataError, HforceError
from hforce.models.base import Backbone
from hforce.plots import check_plot as check_plot
from hforce.plots import plot as plot
from hforce.plots import show as show
from hforce.probe import GROUPS, MODES, Probe, RollOut, plan
from hforce.prompts import load_prompts
from hforce.resources import resource
from hforce.settings import Config, ProfileConfig, RolePolicy
from hforce.stream import Take
from hforce.video import check_place

log = logging.getLogger(__name__)

FEWEST = 2  # prompts: halves of them are compared
SINK, CURRENT = GROUPS.index("sink"), GROUPS.index("current")


@dataclass(frozen=True)
class ProfileProgress:
    """Told after every chunk: chunks done and in all, and the roll-out it belongs to."""

    done: int
    total: int
    rollout: RollOut
    label: str = "chunks"


@dataclass(frozen=True)
class Sample:
    """What a roll-out showed: attention mass float64 [L, H, 4] by GROUPS, the mean over `maps` chunks x steps."""

    rollout: RollOut
    mass: Tensor
    maps: int


@dataclass(frozen=True)
class Finding:
    """What all samples of a mode say; tensors are float64.

    `roles`, the `vote` [L, H] of the prompts for them, the `mass` [L, H, 4] by GROUPS with its standard deviation
    `sd` [L, H, 4] over prompts, and `split_half`, the share of heads that even and odd prompts label alike.
    """

    roles: RoleMap
    vote: Tensor
    mass: Tensor
    sd: Tensor
    split_half: float


def run(config: Config, output: Path | None, tell: Callable[[ProfileProgress], None], compare: bool = False) -> Profile:
    """Measures the role of every head of the configured model, and saves the profile to `output`, if given.

    With `compare` the other mode is measured, too, and the profile tells how far the labels of both agree.
    Raises HforceError; what can be known before the model runs is found out before.
    """
    settings = config.profile
    prompts = read_prompts(settings.prompts)
    if output is not None:
        check_place(output)
    backbone = build_backbone(config)
    modes = [settings.mode, *(mode for mode in MODES if compare and mode != settings.mode)]
    seeds = tuple(dict.fromkeys(settings.seeds))
    plans = [plan(mode, prompts, seeds, backbone.geometry, settings.sink_frames) for mode in modes]
    samples = measure_all(config, backbone, [rollout for part in plans for rollout in part], tell)
    own, *others = (summarise([s for s in samples if s.rollout.mode == mode], settings) for mode in modes)
    agreed = agreement(own.roles, others[0].roles) if others else None
    profile = compose(config, backbone, samples[: len(plans[0])], own, agreed)
    if output is not None:
        try:
            save_profile(profile, output)
        except HforceError:
            log.error("what was measured, but could not be written:\n%s", show(profile))
            raise
    return profile


def read_prompts(path: str) -> tuple[str, ...]:
    """The calibration prompts of a file, or of the packaged one ("" for path), each once.

    Raises DataError for fewer than two, and for lines that ask for more than a prompt.
    """
    source = path or resource("prompts/profile.txt")
    items = load_prompts(source)
    for item in items:
        if len(item.shots) > 1 or item.init or item.seed is not None or item.seconds is not None:
            mend = "give one prompt a line; seeds are set by profile.seeds, lengths by profile.mode"
            raise DataError(f"{source}:{item.line}: a calibration prompt has no schedule, seed, duration or init", mend)
    prompts = tuple(dict.fromkeys(item.shots[0].prompt for item in items))
    if len(prompts) < len(items):
        log.warning("%s: repeated prompts (%d) are measured once", source, len(items) - len(prompts))
    if len(prompts) < FEWEST:
        raise DataError(f"{source}: one prompt cannot tell whether roles are stable", "give at least two; 20 are good")
    return prompts


def measuring(config: Config, backbone: Backbone, mode: str) -> Config:
    """The configuration in which every head follows the policy of a mode."""
    policy = RolePolicy(*MODES[mode].policy(backbone.geometry, config.profile.sink_frames))
    return replace(config, cache=replace(config.cache, roles="uniform", memory=policy))


def measure_all(
    config: Config, backbone: Backbone, rollouts: Sequence[RollOut], tell: Callable[[ProfileProgress], None]
) -> list[Sample]:
    """Makes all roll-outs, one after the other. Prompts are encoded before the first, so that faults come early."""
    prompts = list(dict.fromkeys(rollout.prompt for rollout in rollouts))
    backbone.encode_text.encode_all(prompts)
    texts = {prompt: backbone.encode_text(prompt) for prompt in prompts}
    total, begun, samples = sum(rollout.length for rollout in rollouts), 0, []
    for rollout in rollouts:
        start = ProfileProgress(begun, total, rollout)
        samples.append(measure(config, backbone, texts[rollout.prompt], start, tell))
        begun += rollout.length
    return samples


def measure(
    config: Config, backbone: Backbone, text: Tensor, start: ProfileProgress, tell: Callable[[ProfileProgress], None]
) -> Sample:
    """Makes the roll-out of `start` under its encoded prompt, text [1, T, text_dim], and looks at it."""
    rollout, settings = start.rollout, config.profile
    stream = build_stream(measuring(config, backbone, rollout.mode), backbone, rollout.length, rollout.seed)
    wanted = [(chunk, step) for chunk in rollout.chunks for step in range(len(stream.sampling.steps))]
    assert isinstance(stream.cache, HeadCache), "attention is measured through the cache of the method"
    probe = Probe(stream.cache, wanted, settings.sink_frames, settings.query_stride)
    stream.attend, stream.graphs = probe, None  # which would not ask the probe in every pass
    for chunk in stream.play([Take(text, rollout.length)]):
        tell(replace(start, done=start.done + chunk.number + 1))
    return Sample(rollout, probe.mean(), len(wanted))


def summarise(samples: Sequence[Sample], settings: ProfileConfig) -> Finding:
    """Sums up the samples of one mode, with as many for every prompt; all weigh the same.

    Heads on which less than `min_vote` of the prompts agree become memory heads, the role that forgets least.
    """
    prompts = dict.fromkeys(sample.rollout.prompt for sample in samples)
    each = torch.stack([_mean([s.mass for s in samples if s.rollout.prompt == prompt]) for prompt in prompts])
    apart = [label_mass(mass, settings) for mass in each]
    roles = settle(label_mass(each.mean(dim=0), settings), apart, settings.min_vote)
    even, odd = (label_mass(half.mean(dim=0), settings) for half in (each[0::2], each[1::2]))
    return Finding(roles, votes(roles, apart), each.mean(dim=0), each.std(dim=0), agreement(even, odd))


def label_mass(mass: Tensor, settings: ProfileConfig) -> RoleMap:
    """Roles from mass [L, H, 4], by the configured rule (`roles.label`)."""
    return label(*_deciding(mass), settings.anchor, settings.local, settings.threshold)


def votes(roles: RoleMap, apart: Sequence[RoleMap]) -> Tensor:
    """Share of the maps `apart` that give a head the role it has in `roles`, float64 [L, H]."""
    return _mean([_equal(roles, other) for other in apart])


def settle(roles: RoleMap, apart: Sequence[RoleMap], min_vote: float) -> RoleMap:
    """The same roles, but memory where less than `min_vote` (0..1) of the maps `apart` agree."""
    sure = (votes(roles, apart) >= min_vote).tolist()
    rows = (zip(*row, strict=True) for row in zip(roles.roles, sure, strict=True))
    return RoleMap(tuple(tuple(role if is_sure else HeadRole.MEMORY for role, is_sure in row) for row in rows))


def agreement(one: RoleMap, other: RoleMap) -> float:
    """Share of heads with the same role in both maps, 0..1."""
    return float(_equal(one, other).mean())


def compose(
    config: Config, backbone: Backbone, samples: Sequence[Sample], finding: Finding, agreed: float | None
) -> Profile:
    """The profile of a finding, with everything needed to measure it again."""
    settings, geometry = config.profile, backbone.geometry
    return Profile(
        created_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        generator={"hforce": hforce.__version__, "torch": torch.__version__},
        model=ProfiledModel(
            id=backbone.name,
            arch=type(backbone.model).__name__,
            num_layers=geometry.layers,
            num_heads=geometry.heads,
            head_dim=geometry.head_dim,
            tokens_per_frame=geometry.tokens,
            frames_per_chunk=geometry.chunk,
            fingerprint=Fingerprint(value=backbone.fingerprint),
        ),
        calibration=_calibration(config, backbone, [sample.rollout for sample in samples]),
        method=Method(
            threshold="absolute" if settings.threshold == "absolute" else "quantile",
            thresholds=Thresholds(anchor=settings.anchor, local=settings.local),
            sink_frames=settings.sink_frames,
            min_vote=settings.min_vote,
        ),
        heads=_records(finding, settings, sum(sample.maps for sample in samples)),
        summary=Summary(counts=finding.roles.counts(), split_half_agreement=finding.split_half, mode_agreement=agreed),
    )


def _calibration(config: Config, backbone: Backbone, rollouts: Sequence[RollOut]) -> Calibration:
    """What was generated: num_frames of the longest roll-out, and the chunks that were measured in any of them."""
    prompts = tuple(dict.fromkeys(rollout.prompt for rollout in rollouts))
    policy = measuring(config, backbone, config.profile.mode).cache.memory
    options = ", ".join(f"{name}={value}" for name, value in policy.options.items())
    weight = backbone.model.patch_embedding.weight
    return Calibration(
        num_prompts=len(prompts),
        prompts_sha256=hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        prompts=prompts,
        seeds=tuple(dict.fromkeys(rollout.seed for rollout in rollouts)),
        num_frames=max(rollout.length for rollout in rollouts) * backbone.geometry.chunk,
        size=backbone.size,
        timesteps=tuple(step.timestep for step in build_sampling(config.sample, backbone.family).steps),
        dtype=str(weight.dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(weight.device) if weight.is_cuda else str(weight.device),
        attention=attends_by(config.cache.backend, weight.device, weight.dtype, backbone.geometry.head_dim),
        mode=config.profile.mode,
        policy=f"{policy.policy}({options})" if options else policy.policy,
        chunks=tuple(sorted({chunk for rollout in rollouts for chunk in rollout.chunks})),
        query_stride=config.profile.query_stride,
    )


def _records(finding: Finding, settings: ProfileConfig, maps: int) -> tuple[HeadRecord, ...]:
    """One record a head, in the order of (layer, head)."""
    margin = margins(*_deciding(finding.mass), settings.anchor, settings.local, settings.threshold)
    mass, sd, vote = finding.mass.tolist(), finding.sd.tolist(), finding.vote.tolist()

    def record(layer: int, head: int) -> HeadRecord:
        means = {f"{group}_mass": value for group, value in zip(GROUPS, mass[layer][head], strict=True)}
        spread = sd[layer][head]
        return HeadRecord(
            layer=layer,
            head=head,
            role=finding.roles.at(layer, head),
            margin=margin[layer][head],
            vote=vote[layer][head],
            stats=HeadStats(**means, sd_sink=spread[SINK], sd_current=spread[CURRENT], n=maps),
        )

    return tuple(record(layer, head) for layer, row in enumerate(mass) for head in range(len(row)))


def _deciding(mass: Tensor) -> tuple[list[list[float]], list[list[float]]]:
    """The two masses that decide, on the sink and on the chunk, [L][H] each."""
    return mass[..., SINK].tolist(), mass[..., CURRENT].tolist()


def _equal(one: RoleMap, other: RoleMap) -> Tensor:
    """1 where two maps agree, else 0: float64 [L, H]."""
    rows = zip(one.roles, other.roles, strict=True)
    return torch.tensor([[a is b for a, b in zip(*row, strict=True)] for row in rows], dtype=torch.float64)


def _mean(parts: Sequence[Tensor]) -> Tensor:
    """Mean of tensors of one shape."""
    return torch.stack(list(parts)).mean(dim=0)
