"""What a command would make, and whether it fits into memory: told without reading weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hforce import memory
from hforce.build import build_blueprint, build_policy, build_roles, effective
from hforce.generate import (
    check_prompts,
    choose_targets,
    choose_wanted,
    find_openings,
    outputs,
    picture_size,
    plan_jobs,
    plan_memory,
)
from hforce.memory import gib
from hforce.models.base import Blueprint
from hforce.models.families import Family
from hforce.models.tiny import WordEncoder
from hforce.prompts import Item
from hforce.settings import Config
from hforce.sidecar import Job
from hforce.video import check_reach, check_size


@dataclass(frozen=True)
class Told:
    """The text for people, and whether the memory will do."""

    text: str
    fits: bool


def run(config: Config, items: Sequence[Item], output: Path, on_exists: str) -> Told:
    """Looks at the files of a model and plans its videos. Raises HforceError as `generate.run` would."""
    targets = choose_targets(items, output)
    for target in targets:
        for path in (*outputs(target, config.video), target.sheet):
            check_reach(path)
    openings = find_openings(config.video, items)
    blueprint = build_blueprint(config)
    check_size(picture_size(config, blueprint))
    jobs = plan_jobs(config, blueprint, items, openings, targets, on_exists == "overwrite")
    to_make = choose_wanted(config, blueprint, jobs, on_exists)
    if isinstance(blueprint.encode_text, WordEncoder):  # others read any prompt, with what need not be installed here
        check_prompts(blueprint, to_make)
    wanted = {job.target.video for job in to_make}
    planned = to_make or jobs
    plan, available = plan_memory(config, blueprint, planned)
    chunks = max(job.plan.held(blueprint.geometry.chunk) for job in planned)
    fits = available is None or plan.peak <= available or not wanted
    lines = [
        *_model(blueprint), *_sampling(config, blueprint.family), *_cache(config, blueprint, chunks),
        *(_video(job, job.target.video in wanted) for job in jobs), "",
        *_table(plan), *_verdict(blueprint, plan, available, fits),
    ]  # fmt: skip
    return Told("\n".join(lines), fits)


def _model(b: Blueprint) -> list[str]:
    g = b.geometry
    dtype = str(b.dtype).removeprefix("torch.")
    return [
        f"model        {b.name}",
        f"heads        {g.layers} layers x {g.heads} heads x {g.head_dim}",
        f"precision    {dtype} on {b.device}" + (f", autoencoder on {b.codec_device}" if b.is_apart else ""),
        f"video        {b.size[0]}x{b.size[1]} pixels",
        f"latent       {b.shape[2]}x{b.shape[1]}, {b.shape[0]} channels; {g.tokens} tokens per frame",
        f"fingerprint  {b.fingerprint}",
    ]


def _sampling(config: Config, family: Family | None) -> list[str]:
    """The release and the settings in effect; those that were set, and not left to the release, are marked."""
    sample, recipe = config.sample, effective(config.sample, family)
    whose = "as model.release says" if config.model.release else "as the weights were recognised"
    sees = f"; sees {recipe.window} frames, the first {recipe.sink} among them" if recipe.window else ""

    def mark(*keys: str) -> str:
        return " (set)" if any(getattr(sample, key) is not None for key in keys) else ""

    shown = (
        f"steps {[*recipe.steps]}{mark('steps')}",
        f"a shot's first chunk {[*recipe.first_steps] or 'the same'}{mark('first_steps')}",
        (f"shift {recipe.shift:g}" if recipe.warp else "not warped") + mark("shift", "warp"),
        f"chunk {recipe.chunk}{mark('chunk')}",
    )
    return [
        f"release      {family.name}, {whose}{sees}" if family else "release      none: Self-Forcing's settings",
        f"sampling     {', '.join(shown)}",
        f"noise        seed {sample.seed}, context noise {sample.context_noise}",
    ]


def _cache(config: Config, blueprint: Blueprint, chunks: int) -> list[str]:
    cache = config.cache
    lines = [f"setup        {cache.setup}, roles {cache.roles}, new prompt: {cache.switch}, backend {cache.backend}"]
    for role, count in build_roles(config.cache, blueprint).counts().items():
        if count:
            policy = build_policy(config.cache, role, blueprint, chunks)
            lines.append(f"cache        {count} {role} heads: {policy}, at most {policy.capacity} frames of the past")
    return lines


def _video(job: Job, is_wanted: bool) -> str:
    many = f", {len(job.shots)} prompts" if len(job.shots) > 1 else ""
    begin = f", from {job.opening.init.path} (latent frames given: {job.plan.given})" if job.opening else ""
    made = f"{job.plan.frames} video frames, {job.plan.total} chunks to make"
    seed = f", seed {job.seed}" if job.item.seed is not None else ""
    return f"output       {job.target.video}: {made}{many}{begin}{seed}" + ("" if is_wanted else "; there already")


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


def _verdict(blueprint: Blueprint, plan: memory.Plan, available: int | None, fits: bool) -> list[str]:
    there = "not known" if available is None else f"{gib(available)} GiB"
    lines = [f"memory mode  {plan.mode}; peak {gib(plan.peak)} GiB; available on {blueprint.device}: {there}"]
    return lines if fits else [*lines, "it does not fit"]
