"""What a command would make, and whether it fits into memory: told without reading weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hforce import memory
from hforce.build import build_blueprint, build_policy, build_roles
from hforce.config import Config
from hforce.generate import Job, choose_targets, plan_job, plan_memory
from hforce.memory import gib
from hforce.models.base import Blueprint
from hforce.prompts import Item


@dataclass(frozen=True)
class Told:
    """The text for people, and whether the memory will do."""

    text: str
    fits: bool


def run(config: Config, items: Sequence[Item], output: Path) -> Told:
    """Looks at the files of a model and plans its videos. Raises HforceError as `generate.run` would."""
    targets = choose_targets(items, output)
    blueprint = build_blueprint(config)
    jobs = [plan_job(config, blueprint, item, target) for item, target in zip(items, targets, strict=True)]
    plan, available = plan_memory(config, blueprint, jobs)
    fits = available is None or plan.peak <= available
    lines = [
        *_model(blueprint), *_sampling(config), *_cache(config, blueprint, max(job.plan.total for job in jobs)),
        *map(_video, jobs), "", *_table(plan), *_verdict(blueprint, plan, available),
    ]  # fmt: skip
    return Told("\n".join(lines), fits)


def _model(b: Blueprint) -> list[str]:
    g = b.geometry
    dtype = str(b.dtype).removeprefix("torch.")
    return [
        f"model        {b.name}" + (f", recognised as {b.family.name}" if b.family else ""),
        f"heads        {g.layers} layers x {g.heads} heads x {g.head_dim}",
        f"precision    {dtype} on {b.device}",
        f"video        {b.size[0]}x{b.size[1]} pixels",
        f"latent       {b.shape[2]}x{b.shape[1]}, {b.shape[0]} channels; {g.tokens} tokens per frame, "
        f"{g.chunk} frames per chunk",
        f"fingerprint  {b.fingerprint}",
    ]


def _sampling(config: Config) -> list[str]:
    s = config.sample
    first = f", first chunk of a shot {s.first_steps}" if s.first_steps else ""
    warp = f"shift {s.shift:g}" if s.warp else "not warped"
    return [f"sampling     steps {s.steps}{first}, {warp}, context noise {s.context_noise}, seed {s.seed}"]


def _cache(config: Config, blueprint: Blueprint, chunks: int) -> list[str]:
    lines = []
    for role, count in build_roles(config.cache, blueprint).counts().items():
        if count:
            policy = build_policy(config.cache, role, blueprint.geometry, chunks)
            lines.append(f"cache        {count} {role} heads: {policy}, at most {policy.capacity} frames of the past")
    return lines


def _video(job: Job) -> str:
    many = f", {len(job.shots)} prompts" if len(job.shots) > 1 else ""
    return f"output       {job.target.video}: {job.plan.frames} frames, {job.plan.total} chunks{many}"


def _table(plan: memory.Plan) -> list[str]:
    """Parts by phases, in GiB."""
    phases = list(plan.phases)
    parts = list(dict.fromkeys(part for sizes in plan.phases.values() for part in sizes))
    lines = [f"{'memory (GiB)':<24}" + "".join(f"{phase:>12}" for phase in phases)]
    for part in parts:
        sizes = (plan.phases[phase].get(part) for phase in phases)
        lines.append(f"{part:<24}" + "".join(f"{'-' if size is None else gib(size):>12}" for size in sizes))
        if part.startswith("cache of") and not parts[parts.index(part) + 1].startswith("cache of"):
            totals = [sum(n for p, n in plan.phases[phase].items() if p.startswith("cache of")) for phase in phases]
            lines.append(f"{'cache, all heads':<24}" + "".join(f"{gib(n) if n else '-':>12}" for n in totals))
    return [*lines, f"{'total':<24}" + "".join(f"{gib(plan.total(phase)):>12}" for phase in phases)]


def _verdict(blueprint: Blueprint, plan: memory.Plan, available: int | None) -> list[str]:
    there = "not known" if available is None else f"{gib(available)} GiB"
    lines = [f"memory mode  {plan.mode}; peak {gib(plan.peak)} GiB; available on {blueprint.device}: {there}"]
    return lines if available is None or plan.peak <= available else [*lines, "it does not fit"]
