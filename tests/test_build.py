"""From a configuration to objects: how a script is cut into chunks, and which head gets which role and policy."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hforce.build import (
    build_backbone,
    build_plan,
    build_policy,
    build_profile,
    build_roles,
    build_sampling,
    build_script,
    build_stream,
    check_cache,
    effective,
    set_threads,
)
from hforce.cache.policies import Anchor, Full, Local, Memory, Sink, Window
from hforce.cache.roles import HeadRole, RoleMap
from hforce.config import load_config
from hforce.errors import ConfigError, DataError, InputError
from hforce.models.base import Backbone
from hforce.models.families import Recipe, find_family
from hforce.prompts import Shot
from hforce.settings import SETUPS, CacheConfig, Config, RolePolicy, SampleConfig


@pytest.fixture(scope="module")
def config(weights: Path, heads: Path) -> Config:
    return load_config(overrides=[f"model.checkpoint={weights}", f"cache.profile={heads}"])


@pytest.fixture(scope="module")
def backbone(config: Config) -> Backbone:
    return build_backbone(config)


def cache_of(heads: Path, setup: str, *overrides: str) -> CacheConfig:
    return load_config(overrides=[f"cache.setup={setup}", f"cache.profile={heads}", *overrides]).cache


def shots(*seconds: float) -> list[Shot]:
    return [Shot("a red circle", length) for length in seconds]


# Plans


@given(seconds=st.floats(0.01, 600), fps=st.integers(1, 120))
def test_a_video_is_as_long_as_asked_and_less_than_a_chunk_longer(backbone, seconds, fps):
    plan = build_plan(shots(seconds), seconds, fps, backbone)
    latents = (plan.frames - 1) // 4 + 1
    assert (plan.frames - 1) % 4 == 0
    assert latents == 3 * plan.total
    assert plan.frames >= seconds * fps - 1e-3
    assert plan.frames - 12 < math.ceil(seconds * fps)


@given(chunks=st.integers(1, 400), fps=st.integers(1, 240))
def test_a_length_that_was_made_from_frames_is_that_many_frames(backbone, chunks, fps):
    """225 frames at 7 a second used to become 237: 225 / 7 x 7 is a little more than 225 in floating point."""
    frames = 4 * (3 * chunks - 1) + 1
    assert build_plan(shots(frames / fps), frames / fps, fps, backbone).frames == frames


@given(lengths=st.lists(st.floats(0.75, 30), min_size=1, max_size=6))
def test_prompts_change_at_the_nearest_chunk(backbone, lengths):
    try:
        plan = build_plan(shots(*lengths), sum(lengths), 16, backbone)
    except DataError:
        assert min(lengths) < 1.5  # two chunks: shorter ones may round to nothing
        return
    starts = [sum(plan.chunks[:i]) for i in range(len(lengths))]
    moments = [sum(lengths[:i]) / 0.75 for i in range(len(lengths))]
    assert all(abs(start - moment) <= 0.5 + 1e-6 for start, moment in zip(starts, moments, strict=True))
    assert min(plan.chunks) >= 1


@pytest.mark.parametrize("lengths", [(0.2, 3), (3, 0.1, 3)])
def test_a_prompt_shorter_than_a_chunk_is_refused(backbone, lengths):
    with pytest.raises(DataError, match=r"would last less than a chunk of 0.75s"):
        build_plan(shots(*lengths), sum(lengths), 16, backbone)


def test_a_script_has_the_prompts_encoded(backbone):
    script = [Shot("a red circle", 3.0), Shot("a blue square", 1.5)]
    takes = build_script(script, build_plan(script, 4.5, 16, backbone), backbone)
    assert [take.chunks for take in takes] == [4, 3]
    assert all(take.text.equal(backbone.encode_text(shot.prompt)) for take, shot in zip(takes, script, strict=True))


# Roles and policies


def test_roles_come_from_the_profile_and_its_controls_have_as_many_of_each(backbone, heads):
    measured = build_roles(cache_of(heads, "head-forcing"), backbone)
    assert measured == build_profile(cache_of(heads, "head-forcing"), backbone).role_map()
    layers, heads_a_layer = backbone.geometry.layers, backbone.geometry.heads
    anchors = round(layers * heads_a_layer / 4)
    local = round((layers * heads_a_layer - anchors) / 5)
    assert (measured.counts()[HeadRole.ANCHOR], measured.counts()[HeadRole.LOCAL]) == (anchors, local)
    controls = [build_roles(cache_of(heads, "head-forcing", f"cache.roles={name}"), backbone)
                for name in ("random:1", "random:2", "inverse")]
    assert len({measured, *controls}) == 4
    assert all(control.counts() == measured.counts() for control in controls)
    assert build_roles(cache_of(heads, "window"), backbone) == RoleMap.uniform(HeadRole.MEMORY, layers, heads_a_layer)


def test_uniform_roles_need_no_profile(backbone):
    check_cache(CacheConfig(roles="uniform", profile="missing.json"), backbone)
    with pytest.raises(InputError, match=r"missing.json"):
        check_cache(CacheConfig(profile="missing.json"), backbone)


def test_a_model_without_a_profile_says_how_to_measure_one(backbone):
    with pytest.raises(InputError, match="no head profile comes with model 'other'") as caught:
        build_profile(CacheConfig(), replace(backbone, name="other"))
    assert "hforce profile -o FILE" in caught.value.mend
    assert "--roles uniform" in caught.value.mend


def test_a_profile_of_other_weights_is_refused(backbone, heads):
    with pytest.raises(DataError, match="belongs to another model"):
        build_profile(CacheConfig(profile=str(heads)), replace(backbone, fingerprint="ef" * 32))


@pytest.mark.parametrize(("setup", "kind"), [
    ("head-forcing", Memory), ("random", Memory), ("inverse", Memory),
    ("uniform", Sink), ("uniform-memory", Memory), ("sink", Sink), ("window", Window), ("full", Full),
    ("hf-10", Memory), ("hf-11", Memory), ("hf-15", Memory),
])  # fmt: skip
def test_a_setup_names_the_policy_of_every_role(backbone, heads, setup, kind):
    cache = cache_of(heads, setup)
    policies = {role: build_policy(cache, role, backbone, 9) for role in HeadRole}
    assert type(policies[HeadRole.MEMORY]) is kind
    assert (type(policies[HeadRole.LOCAL]), type(policies[HeadRole.ANCHOR])) == (Local, Anchor)
    if setup == "full":
        assert policies[HeadRole.MEMORY].capacity == 27  # all frames of all nine chunks


def test_every_setup_is_tested_above():
    assert len(SETUPS) == 11


@pytest.mark.parametrize(("setup", "mean"), [("hf-10", 9.6), ("hf-11", 11.4), ("hf-15", 15.0)])
def test_a_budget_is_the_documented_mean_where_15_percent_are_local_and_25_anchors(backbone, heads, setup, mean):
    cache = cache_of(heads, setup)
    shares = {HeadRole.LOCAL: 0.15, HeadRole.ANCHOR: 0.25, HeadRole.MEMORY: 0.60}
    past = {role: build_policy(cache, role, backbone, 9).capacity for role in HeadRole}
    assert sum(shares[role] * (past[role] + backbone.geometry.chunk) for role in HeadRole) == pytest.approx(mean)
    assert max(past.values()) + backbone.geometry.chunk <= backbone.geometry.span
    lines = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
    row = next(line for line in lines if line.startswith(f"| `{setup}` "))
    assert row.endswith(f" = {past[HeadRole.MEMORY] + backbone.geometry.chunk} | {mean} |")


def test_what_is_set_wins_and_what_is_left_alone_is_the_releases():
    causvid = find_family("causvid")
    assert effective(SampleConfig(), causvid) == causvid.recipe
    assert effective(SampleConfig(shift=5.0), causvid) == replace(causvid.recipe, shift=5.0)
    first = effective(SampleConfig(first_steps=[]), find_family("causal-forcing-1step"))
    assert (first.steps, first.first_steps, first.chunk) == ((1000,), (), 1)
    assert effective(SampleConfig(), None).steps == (1000, 750, 500, 250)


def test_the_window_of_a_release_is_what_it_was_trained_with(backbone, heads):
    trained = replace(backbone, family=find_family("longlive"))
    assert build_policy(cache_of(heads, "window"), HeadRole.MEMORY, trained, 9) == Sink(sink=3, window=6)
    narrow = cache_of(heads, "window", "cache.memory.options.frames=9")
    assert build_policy(narrow, HeadRole.MEMORY, trained, 9) == Window(frames=9)
    assert build_policy(cache_of(heads, "full"), HeadRole.MEMORY, trained, 9).capacity == 27
    unsunk = replace(trained.family, recipe=Recipe(window=12))
    assert build_policy(cache_of(heads, "window"), HeadRole.MEMORY, replace(backbone, family=unsunk), 9) == Window(12)


@pytest.mark.parametrize("setup", SETUPS)
def test_every_setup_suits_a_model_that_makes_one_frame_at_a_time(config, heads, setup):
    one = build_backbone(replace(config, sample=SampleConfig(chunk=1)))
    assert one.geometry.chunk == 1
    check_cache(cache_of(heads, setup), one)
    policy = build_policy(cache_of(heads, setup), HeadRole.MEMORY, one, 9)
    assert getattr(policy, "chunk", 1) == 1


def test_a_chunk_that_fills_the_span_is_refused(config):
    with pytest.raises(ConfigError, match="leaves no room for the past"):
        build_backbone(replace(config, sample=SampleConfig(chunk=21)))


def test_a_policy_that_holds_more_than_the_model_can_place_is_refused(backbone):
    cache = CacheConfig(memory=RolePolicy("memory", {"window": 30}))
    with pytest.raises(ConfigError, match=r"leaves room for 18") as caught:
        build_policy(cache, HeadRole.MEMORY, backbone, 1)
    assert "cache.memory.options" in caught.value.mend


# Streams


def test_heads_lie_in_the_order_of_their_roles(config, backbone):
    stream = build_stream(config, backbone, 2)
    roles = build_roles(config.cache, backbone)
    order = backbone.model.head_order
    letters = ["".join(roles.at(layer, head)[0] for head in row) for layer, row in enumerate(order)]
    assert letters == ["".join(sorted(row, key="mal".index)) for row in letters]
    assert stream.shape == (12, 8, 8)


@pytest.mark.parametrize(("setup", "grows"), [("head-forcing", False), ("window", False), ("full", True)])
def test_only_a_cache_that_keeps_everything_grows_with_the_video(config, backbone, heads, setup, grows):
    settings = replace(config, cache=cache_of(heads, setup))
    short, long = (build_stream(settings, backbone, chunks).cache.stats().nbytes for chunks in (10, 40))
    assert (long > short) is grows


def test_a_seed_of_its_own_comes_before_the_configured_one(config, backbone):
    def noise(seed: int | None, configured: int) -> torch.Tensor:
        settings = replace(config, sample=SampleConfig(seed=configured))
        return next(build_stream(settings, backbone, 1, seed).noise(0, (1, 3, 12, 8, 8)))

    assert noise(5, 0).equal(noise(None, 5))
    assert not noise(0, 5).equal(noise(None, 5))


def test_sampling_is_as_configured():
    sample = SampleConfig(steps=[1000, 500], first_steps=[1000, 750, 250], context_noise=7, warp=False)
    sampling = build_sampling(sample)
    assert [step.timestep for step in sampling.steps] == [1000, 500]
    assert [step.timestep for step in sampling.first_steps] == [1000, 750, 250]
    assert sampling.commit_timestep == 7.0


def test_threads_are_those_asked_for(config):
    before = torch.get_num_threads()
    try:
        build_backbone(load_config(overrides=[f"model.checkpoint={config.model.checkpoint}", "model.threads=1"]))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("others", [0, 1])
def test_without_a_wish_one_core_is_left_to_the_encoder(others):
    """Torch takes all cores; whoever told it to take fewer (OMP_NUM_THREADS) is heeded."""
    before = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        torch.set_num_threads(max(1, cores - others))
        set_threads(0)
        assert torch.get_num_threads() == max(1, cores - 1)
    finally:
        torch.set_num_threads(before)


def test_positions_may_be_true_without_quotes(backbone, heads):
    """Which YAML reads as a truth value."""
    config = cache_of(heads, "head-forcing", "cache.memory.options.positions=true")
    assert build_policy(config, HeadRole.MEMORY, backbone, 1).positions == "true"
