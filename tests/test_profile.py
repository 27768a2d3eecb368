"""Profiling: the probe against brute force, what the rule makes of masses, and what is told of it."""

from __future__ import annotations

import copy
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.builders import close, draw, rotate
from torch import Tensor, nn

from hforce.build import build_backbone, build_profile, build_roles, build_stream
from hforce.cache.roles import HeadRole, Profile, RoleMap, load_profile, save_profile
from hforce.errors import ConfigError, DataError, InputError, OutputError, UnavailableError
from hforce.geometry import Geometry
from hforce.models.base import Backbone
from hforce.models.dit import WanConfig
from hforce.models.tiny import CODEC, TinyModel
from hforce.plots import levels
from hforce.probe import GROUPS, MODES, Probe, RollOut, group_mass, plan, rolling_chunks
from hforce.profile import (
    Finding,
    ProfileProgress,
    Sample,
    agreement,
    measure,
    measuring,
    plot,
    read_prompts,
    run,
    settle,
    show,
    summarise,
    votes,
)
from hforce.settings import Config, ModelConfig, ProfileConfig, SampleConfig
from hforce.stream import Take

LOCAL, ANCHOR, MEMORY = HeadRole
PROMPTS = ("a red circle circling", "a blue square passing left", "a slow green triangle bouncing up and down")
LAYERS, HEADS = 2, 4
WAN = Geometry(30, 12, 128, (30, 52))


def save_tiny(path: Path, seed: int) -> Path:
    """A tiny model whose weights are all random, so that its heads differ."""
    sizes = WanConfig(48, 48, LAYERS, HEADS, text_dim=8, text_len=8, in_channels=12, out_channels=12, freq_dim=16)
    tiny, generator = TinyModel(sizes, CODEC), torch.Generator().manual_seed(seed)
    for name, weight in tiny.dit.named_parameters():
        spread = 0.5 if weight.dim() == 1 or "modulation" in name else weight[0].numel() ** -0.5
        nn.init.normal_(weight.data, std=spread, generator=generator)
        if "norm_q" in name:
            weight.data *= 3  # attention that is far from even
    tiny.save(path)
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("tiny")
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    return Config(
        model=ModelConfig(checkpoint=str(save_tiny(folder / "tiny.safetensors", 0)), size="32x32", device="cpu"),
        sample=SampleConfig(steps=[1000, 500]),
        profile=ProfileConfig(prompts=str(prompts)),
    )


@pytest.fixture(scope="module")
def backbone(config: Config) -> Backbone:
    return build_backbone(config)


@pytest.fixture(scope="module")
def measured(config: Config) -> Profile:
    return run(config, None, nobody)


@pytest.fixture(scope="module")
def rolling(config: Config) -> Profile:
    return run(with_profile(config, mode="rolling30"), None, nobody)


def nobody(progress: ProfileProgress) -> None:
    """Whom progress is told when nobody listens."""


def with_profile(config: Config, **changes: object) -> Config:
    return replace(config, profile=replace(config.profile, **changes))  # type: ignore[arg-type]


# Measuring


class Recorder:
    """Passes everything on to a cache, and keeps queries and keys of every pass by (first frame, pass, layer)."""

    def __init__(self, cache: object) -> None:
        self.cache, self.seen, self.passes = cache, {}, {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        now = self.cache.now
        self.passes[now] = self.passes.get(now, 0) + (layer == 0)
        self.seen[now, self.passes[now] - 1, layer] = q[0].clone(), k[0].clone()
        return self.cache.attend(layer, q, k, v)


def brute_mass(recorder: Recorder, geometry: Geometry, chunks: Sequence[int], sinks: int, stride: int) -> Tensor:
    """Mean mass [L, H, 4] from recorded queries and keys, one head, step and chunk after the other, in float64."""
    frames, tokens, grid = geometry.chunk, geometry.tokens, geometry.grid
    total, maps = torch.zeros(LAYERS, HEADS, 4, dtype=torch.float64), 0
    for now in (chunk * frames for chunk in chunks):
        past = list(range(now)) if now <= 18 else [*range(sinks), *range(now - 18 + sinks, now)]
        times = [-(len(past) - i) for i in range(len(past))] + [*range(frames)]
        numbers = [*past, *range(now, now + frames)]
        sets = [range(sinks), range(sinks, now), range(now, now + frames), numbers[-4:]]
        for step in range(recorder.passes[now] - 1):
            maps += 1
            for layer in range(LAYERS):
                q, k = (x.unflatten(0, (frames, tokens)) for x in recorder.seen[now, step, layer])
                clean = {n: recorder.seen[n - n % frames, recorder.passes[n - n % frames] - 1, layer][1] for n in past}
                keys = [clean[n].unflatten(0, (frames, tokens))[n % frames] for n in past]
                query = rotate(q, range(frames), grid).flatten(0, 1)[::stride]
                key = rotate(torch.stack([*keys, *k]), times, grid).flatten(0, 1)
                for head in range(HEADS):
                    weights = (query[:, head] @ key[:, head].T / geometry.head_dim**0.5).softmax(dim=1)
                    mass = weights.mean(dim=0).unflatten(0, (len(numbers), tokens)).sum(dim=1)
                    member = [[n in group for n in numbers] for group in sets]
                    total[layer, head] += torch.tensor(member, dtype=torch.float64) @ mass
    return total / maps


@pytest.mark.parametrize(
    ("mode", "chunks", "first_steps", "sinks", "stride"),
    [
        ("native21", (3, 4, 5, 6), [], 1, 1),
        ("native21", (3, 6), [1000, 700, 400], 3, 5),
        ("rolling30", (4, 7, 11), [1000], 1, 1),
        ("rolling30", (10,), [], 2, 1),
    ],
)
def test_masses_are_those_of_brute_force(
    config: Config,
    backbone: Backbone,
    mode: str,
    chunks: tuple[int, ...],
    first_steps: list[int],
    sinks: int,
    stride: int,
) -> None:
    config = with_profile(config, sink_frames=sinks, query_stride=stride)
    config = replace(config, sample=replace(config.sample, first_steps=first_steps))
    rollout, text = RollOut(mode, PROMPTS[0], 7, chunks), backbone.encode_text(PROMPTS[0])
    sample = measure(config, backbone, text, ProfileProgress(0, rollout.length, rollout), nobody)

    stream = build_stream(measuring(config, backbone, mode), backbone, rollout.length, 7)
    stream.attend = recorder = Recorder(stream.cache)
    list(stream.play([Take(text, rollout.length)]))
    assert recorder.passes[0] == (len(first_steps) or 2) + 1
    close(sample.mass, brute_mass(recorder, backbone.geometry, chunks, sinks, stride), 1e-5)
    assert sample.maps == 2 * len(chunks)


def test_a_probe_does_not_change_what_is_made(config: Config, backbone: Backbone) -> None:
    text = backbone.encode_text(PROMPTS[1])
    rollout, made = RollOut("native21", PROMPTS[1], 0, (1, 2)), []
    for probed in (False, True):
        stream = build_stream(measuring(config, backbone, "native21"), backbone, 3, 0)
        if probed:
            stream.attend = Probe(stream.cache, [(c, s) for c in rollout.chunks for s in (0, 1)], 1, 1)
        made.append(torch.cat([chunk.latents for chunk in stream.play([Take(text, 3)])]))
    assert torch.equal(*made)


def test_groups_part_the_frames_and_the_newest_four_overlap() -> None:
    mass = torch.tensor([[0.4, 0.1, 0.05, 0.15, 0.1, 0.2]])
    sums = group_mass(mass, [0, 1, 7, 8, 9, 10], now=8, sink_frames=2)
    close(sums, torch.tensor([[0.5, 0.05, 0.45, 0.5]]), 1e-6)
    close(group_mass(mass[:, :3], [0, 1, 2], now=0, sink_frames=0), torch.tensor([[0.0, 0.0, 0.55, 0.55]]), 1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_shares_of_every_head_add_up_to_one(config: Config, backbone: Backbone, mode: str) -> None:
    rollout = RollOut(mode, PROMPTS[2], 0, (3, 5))
    start = ProfileProgress(0, 6, rollout)
    mass = measure(config, backbone, backbone.encode_text(PROMPTS[2]), start, nobody).mass
    close(mass[..., :3].sum(dim=-1), torch.ones(LAYERS, HEADS), 1e-5)
    assert bool((mass >= 0).all()) and bool(
        (mass[..., GROUPS.index("last4")] >= mass[..., GROUPS.index("current")]).all()
    )


def test_native_chunks_are_the_second_half_of_the_trained_span() -> None:
    assert MODES["native21"].chunks(WAN, "any", 0) == (3, 4, 5, 6)


@given(st.text(max_size=20), st.integers(0, 2**63 - 1))
def test_long_roll_outs_draw_three_later_chunks_from_prompt_and_seed(prompt: str, seed: int) -> None:
    chunks = rolling_chunks(WAN, prompt, seed)
    assert chunks == rolling_chunks(WAN, prompt, seed) == tuple(sorted(set(chunks)))
    assert len(chunks) == 3 and chunks[0] >= 4 and chunks[-1] < 40


def test_draws_differ_between_prompts_and_seeds() -> None:
    assert len({rolling_chunks(WAN, prompt, seed) for prompt in PROMPTS for seed in range(5)}) > 10


def test_every_prompt_meets_every_seed() -> None:
    plans = plan("native21", PROMPTS, (0, 5), WAN, 1)
    assert [(r.prompt, r.seed) for r in plans] == [(p, s) for p in PROMPTS for s in (0, 5)]
    assert {r.length for r in plans} == {7}


@pytest.mark.parametrize(("mode", "most"), [("native21", 9), ("rolling30", 12)])
def test_a_sink_that_reaches_into_the_chunks_is_refused(mode: str, most: int) -> None:
    plan(mode, PROMPTS, (0,), WAN, most)
    with pytest.raises(ConfigError, match=f"sink_frames is {most + 1}, .* from frame {most}") as caught:
        plan(mode, PROMPTS, (0,), WAN, most + 1)
    assert f"{most} or less" in caught.value.mend


# Summing up


def sample(prompt: str, sink: Sequence[float], current: Sequence[float], seed: int = 0) -> Sample:
    """One layer of heads with these masses."""
    rows = [[s, 1 - s - c, c, c] for s, c in zip(sink, current, strict=True)]
    return Sample(RollOut("native21", prompt, seed, (3,)), torch.tensor([rows], dtype=torch.float64), 4)


def test_votes_spread_and_halves_of_a_known_case() -> None:
    """Head 0 is the anchor of two prompts, head 1 of one; head 2 looks at the chunk most."""
    samples = [
        sample("a", [0.8, 0.1, 0.0, 0.0], [0.1, 0.1, 0.6, 0.2]),
        sample("b", [0.3, 0.6, 0.0, 0.0], [0.1, 0.1, 0.9, 0.2]),
        sample("c", [0.7, 0.2, 0.0, 0.0], [0.1, 0.1, 0.6, 0.2]),
    ]
    found = summarise(samples, ProfileConfig(anchor=0.25, local=1 / 3))
    assert found.roles.letters() == ("AMLM",)
    assert found.vote.tolist() == [[2 / 3, 2 / 3, 1, 1]]
    close(found.mass[0, :, 0], torch.tensor([0.6, 0.3, 0, 0]), 1e-7)
    close(found.sd[0, 2, [0, 2]], torch.tensor([0, np.std([0.6, 0.9, 0.6], ddof=1)]), 1e-7)
    assert found.split_half == 0.5  # even prompts say AMLM, the odd one MALM


def test_seeds_weigh_as_much_as_prompts() -> None:
    samples = [
        sample(p, [s, 0.2], [0.1, 0.1], seed)
        for p, seed, s in (("a", 0, 0.1), ("a", 1, 0.2), ("b", 0, 0.6), ("b", 1, 0.5))
    ]
    found = summarise(samples, ProfileConfig())
    close(found.mass[0, 0, 0], torch.tensor(0.35), 1e-7)
    close(found.sd[0, 0, 0], torch.tensor(0.4 / 2**0.5), 1e-7)  # between prompts: 0.15 and 0.55


def test_heads_without_enough_votes_become_memory() -> None:
    roles = RoleMap(((ANCHOR, LOCAL, MEMORY),))
    apart = [RoleMap(((ANCHOR, MEMORY, MEMORY),)), RoleMap(((ANCHOR, LOCAL, LOCAL),)), roles, roles, roles]
    assert votes(roles, apart).tolist() == [[1.0, 0.8, 0.8]]
    assert settle(roles, apart, 0.8).letters() == ("ALM",)
    assert settle(roles, apart, 0.81).letters() == ("AMM",)


def test_min_vote_counts_the_votes_for_the_role_that_is_given() -> None:
    samples = [sample("a", [0.9, 0.1], [0.0, 0.0]), sample("b", [0.3, 0.4], [0.0, 0.0])]
    for min_vote, letters, vote in ((0.0, "AM", [0.5, 0.5]), (0.6, "MM", [0.5, 0.5])):
        found = summarise(samples, ProfileConfig(anchor=0.5, local=0.0, min_vote=min_vote))
        assert (found.roles.letters(), found.vote.tolist()) == ((letters,), [vote])


def test_agreement_is_the_share_of_equal_heads() -> None:
    one, other = RoleMap(((ANCHOR, LOCAL, MEMORY, MEMORY),)), RoleMap(((ANCHOR, MEMORY, MEMORY, MEMORY),))
    assert (agreement(one, one), agreement(one, other)) == (1.0, 0.75)


# The whole command


def test_counts_are_those_of_the_quantiles(measured: Profile, config: Config) -> None:
    assert measured.summary.counts == {ANCHOR: 2, LOCAL: 1, MEMORY: 5}  # of 8 heads; of the 6 that are left
    more = run(with_profile(config, anchor=0.5, local=0.5), None, nobody)
    assert more.summary.counts == {ANCHOR: 4, LOCAL: 2, MEMORY: 2}
    assert [h.stats for h in more.heads] == [h.stats for h in measured.heads]


def test_a_profile_tells_how_it_was_measured(measured: Profile, config: Config, backbone: Backbone) -> None:
    seen = measured.calibration
    assert (seen.mode, seen.policy, seen.chunks, seen.num_frames) == ("native21", "full", (3, 4, 5, 6), 21)
    assert (seen.prompts, seen.num_prompts, seen.seeds, seen.size) == (PROMPTS, 3, (0,), (32, 32))
    assert (seen.dtype, seen.device, seen.query_stride) == ("float32", "cpu", 1)
    assert seen.timesteps == pytest.approx((1000.0, 833.33), abs=0.01)  # 1000 and 500 in the schedule shifted by 5
    assert measured.model.fingerprint.value == backbone.fingerprint
    assert {head.stats.n for head in measured.heads} == {3 * 4 * 2}
    assert measured.generator["torch"] == torch.__version__
    assert measured.summary.mode_agreement is None


def test_measuring_again_gives_the_same_file(config: Config, rolling: Profile, tmp_path: Path) -> None:
    save_profile(rolling, tmp_path / "one.json")
    run(with_profile(config, mode="rolling30"), tmp_path / "new" / "two.json", nobody)
    one, two = (json.loads((tmp_path / name).read_text(encoding="utf-8")) for name in ("one.json", "new/two.json"))
    for document in (one, two):
        del document["created_at"], document["content_sha256"]
    assert one == two


def test_long_roll_outs_are_told_as_they_were(rolling: Profile) -> None:
    seen, drawn = rolling.calibration, {chunk for prompt in PROMPTS for chunk in rolling_chunks(WAN, prompt, 0)}
    assert (seen.mode, seen.policy) == ("rolling30", "sink(sink=1, window=17, positions=rank)")
    assert (seen.chunks, seen.num_frames) == (tuple(sorted(drawn)), 3 * (max(drawn) + 1))
    assert {head.stats.n for head in rolling.heads} == {3 * 3 * 2}


def test_labels_do_not_depend_on_the_order_of_prompts(measured: Profile, config: Config, tmp_path: Path) -> None:
    path = tmp_path / "turned.txt"
    path.write_text("\n".join(reversed(PROMPTS)), encoding="utf-8")
    turned = run(with_profile(config, prompts=str(path)), None, nobody)
    assert turned.role_map() == measured.role_map()
    assert [head.vote for head in turned.heads] == [head.vote for head in measured.heads]
    assert turned.calibration.prompts_sha256 != measured.calibration.prompts_sha256


def test_a_profile_is_read_as_it_was_written_and_gives_its_model_roles(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "heads.json"
    with caplog.at_level(logging.WARNING):
        made, read = run(config, path, nobody), load_profile(path)
    assert read.model_copy(update={"content_sha256": ""}) == made and caplog.text == ""
    settings = replace(config.cache, profile=str(path))
    assert build_roles(settings, build_backbone(config)) == made.role_map()


def test_the_profile_of_another_model_is_refused_with_both_fingerprints(
    measured: Profile, config: Config, tmp_path: Path
) -> None:
    path = tmp_path / "heads.json"
    run(config, path, nobody)
    other = build_backbone(replace(config, model=replace(config.model, checkpoint=str(save_tiny(tmp_path / "b", 1)))))
    with pytest.raises(DataError) as caught:
        build_profile(replace(config.cache, profile=str(path)), other)
    assert measured.model.fingerprint.value[:12] in str(caught.value) and other.fingerprint[:12] in str(caught.value)


def test_both_modes_are_compared_on_request(measured: Profile, rolling: Profile, config: Config) -> None:
    told: list[ProfileProgress] = []
    both = run(config, None, told.append, compare=True)
    assert both.summary.mode_agreement == agreement(measured.role_map(), rolling.role_map())
    assert (both.heads, both.calibration) == (measured.heads, measured.calibration)
    assert [p.done for p in told] == [*range(1, told[0].total + 1)]
    assert {p.rollout.mode for p in told} == set(MODES) and told[0].label == "chunks"


def test_the_configuration_is_left_alone_and_its_cache_settings_do_not_matter(
    measured: Profile, config: Config
) -> None:
    changed = replace(config, cache=replace(config.cache, roles="random:1", profile="nowhere.json"))
    before = copy.deepcopy(changed)
    assert run(changed, None, nobody).heads == measured.heads
    assert changed == before


# What is refused, before the model is loaded where possible


def test_prompts_are_packaged() -> None:
    assert len(read_prompts("")) == 20


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("one.txt", "a red circle\n", "one prompt cannot tell"),
        ("twice.txt", "a red circle\na red circle\n", "one prompt cannot tell"),
        ("shots.jsonl", '{"prompts": ["a red circle", "a blue circle"]}\n', ":1: a calibration prompt has no schedule"),
        (
            "seed.jsonl",
            '{"prompt": "a red circle"}\n{"prompt": "a blue circle", "seed": 3}\n',
            ":2: .* seed, duration or init",
        ),
    ],
)
def test_prompt_files_that_cannot_be_meant(tmp_path: Path, name: str, text: str, match: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=match) as caught:
        read_prompts(str(tmp_path / name))
    assert caught.value.mend


def test_repeated_prompts_count_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([*PROMPTS, PROMPTS[0]]), encoding="utf-8")
    assert read_prompts(str(path)) == PROMPTS
    assert "repeated prompts (1) are measured once" in caplog.text


def test_a_prompt_without_a_known_word_is_refused_before_anything_is_made(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(f"{PROMPTS[0]}\nxyzzy\n", encoding="utf-8")
    told: list[ProfileProgress] = []
    with pytest.raises(DataError, match="xyzzy"):
        run(with_profile(config, prompts=str(path)), None, told.append)
    assert not told


def test_an_output_that_cannot_be_written_is_found_out_before_the_model_is_loaded(
    config: Config, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    lost = replace(config, model=replace(config.model, checkpoint="nowhere.safetensors"))
    for path, match in ((tmp_path, "is a folder"), (tmp_path / "file" / "heads.json", "cannot create")):
        with pytest.raises(OutputError, match=match):
            run(lost, path, nobody)
    with pytest.raises(InputError, match="nowhere"):
        run(lost, tmp_path / "heads.json", nobody)


# Text and picture


def pictured(measured: Profile, threshold: str = "quantile", **cuts: float) -> Profile:
    """The measured profile under another rule, its roles left as they are."""
    thresholds = measured.method.thresholds.model_copy(update=cuts)
    method = measured.method.model_copy(update={"threshold": threshold, "thresholds": thresholds})
    return measured.model_copy(update={"method": method})


def test_the_text_is_the_map_and_what_it_rests_on(measured: Profile) -> None:
    lines = show(measured).split("\n")
    assert lines[0] == "tiny, 2 x 4 heads: native21, 3 prompts x 1 seed"
    assert lines[2:4] == [f"layer {n}  {' '.join(row)}" for n, row in enumerate(measured.role_map().letters())]
    cuts, agreed = levels(measured), measured.summary.split_half_agreement
    assert lines[5:8] == [
        f"L local  1 of 8  mass on the chunk above {cuts.local:.3f} (top 20% of the rest)",
        f"A anchor 2 of 8  mass on the first frame above {cuts.anchor:.3f} (top 25% of all)",
        "M memory 5 of 8  all others",
    ]
    assert lines[9] == f"halves of the prompts agree on {agreed:.0%} of the heads"


def test_the_text_names_the_head_on_which_prompts_agree_least(measured: Profile) -> None:
    vote = [1.0, 0.9, 1.0, 1.0, 1.0, 1.0, 0.6, 0.8]
    heads = tuple(head.model_copy(update={"vote": v}) for head, v in zip(measured.heads, vote, strict=True))
    text = show(measured.model_copy(update={"heads": heads}))
    assert text.endswith("least sure: layer 1 head 2, 60% of the prompts agree")
    heads = tuple(head.model_copy(update={"vote": 1.0}) for head in heads)
    assert show(measured.model_copy(update={"heads": heads})).endswith(
        "every prompt by itself gives every head this role"
    )


def test_the_text_fits_the_terminal_and_says_nothing_to_it(measured: Profile) -> None:
    model = measured.model.model_copy(update={"id": "\x1b[31m" + "x" * 300})
    seen = measured.calibration.model_copy(update={"mode": "\x07" * 99, "seeds": tuple(range(10)), "num_prompts": 1000})
    summary = measured.summary.model_copy(update={"mode_agreement": 1.0})
    method = measured.method.model_copy(update={"sink_frames": 3, "min_vote": 0.7})
    heads = tuple(head.model_copy(update={"vote": 0.7}) for head in measured.heads)
    changes = {"model": model, "calibration": seen, "summary": summary, "method": method, "heads": heads}
    text = show(measured.model_copy(update=changes))
    assert max(map(len, text.split("\n"))) <= 80
    assert "both modes on 100%" in text and "the first 3 frames" in text and "below 70%" in text
    assert all(char.isprintable() for char in text.replace("\n", ""))


@given(seed=st.integers(0, 1000), anchor=st.floats(0, 1), local=st.floats(0, 1))
@settings(max_examples=25)
def test_levels_part_the_heads_by_their_roles(measured: Profile, seed: int, anchor: float, local: float) -> None:
    rows, rule = (
        draw(2, LAYERS, HEADS, 4, seed=seed).abs().softmax(dim=-1).double(),
        ProfileConfig(anchor=anchor, local=local),
    )
    found = summarise(
        [Sample(RollOut("native21", p, 0, (3,)), row, 8) for p, row in zip("ab", rows, strict=True)], rule
    )
    cuts = levels(pictured(with_mass(measured, found), anchor=anchor, local=local))
    for role, mass in zip(sum(found.roles.roles, ()), found.mass.flatten(0, 1).tolist(), strict=True):
        if cuts.anchor is not None:
            assert (mass[GROUPS.index("sink")] > cuts.anchor) == (role is ANCHOR)
        if cuts.local is not None and role is not ANCHOR:
            assert (mass[GROUPS.index("current")] > cuts.local) == (role is LOCAL)


def with_mass(profile: Profile, found: Finding) -> Profile:
    """The profile with the roles and masses of a finding."""
    heads = []
    for record in profile.heads:
        told = zip((f"{group}_mass" for group in GROUPS), found.mass[record.layer, record.head].tolist(), strict=True)
        stats = record.stats.model_copy(update=dict(told))
        heads.append(record.model_copy(update={"role": found.roles.at(record.layer, record.head), "stats": stats}))
    return profile.model_copy(update={"heads": tuple(heads)})


def test_absolute_levels_are_those_that_were_set(measured: Profile) -> None:
    assert levels(pictured(measured, "absolute", anchor=0.4, local=0.6)) == (0.4, 0.6)
    assert "mass on the chunk above 0.600\n" in show(pictured(measured, "absolute", anchor=0.4, local=0.6))


def test_nothing_parts_roles_that_no_head_has(measured: Profile) -> None:
    assert levels(pictured(measured, anchor=0.0, local=1.0)) == (None, None)
    for threshold in ("quantile", "absolute"):
        assert "of 8  none are asked for\n" in show(pictured(measured, threshold, anchor=0.0))
    assert levels(pictured(measured, "absolute", anchor=0.0, local=0.6)) == (None, 0.6)


@pytest.mark.parametrize("threshold", ["quantile", "absolute"])
def test_the_plot_is_a_picture_of_both_halves(measured: Profile, tmp_path: Path, threshold: str) -> None:
    path = tmp_path / "plots" / "heads.png"
    plot(pictured(measured, threshold), path)
    with Image.open(path) as picture:
        assert picture.format == "PNG" and 1200 <= picture.width <= 2000 and 700 <= picture.height <= 1200
        pixels = np.asarray(picture.convert("RGB"))
    for half in np.array_split(pixels, 2, axis=1):
        assert 0.01 < (half != 255).any(axis=2).mean() < 0.7
    assert all((pixels == color).all(axis=2).sum() > 100 for color in ((0, 114, 178), (230, 159, 0)))


def test_a_plot_needs_a_png_name_a_place_and_matplotlib(
    measured: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutputError, match="PNG"):
        plot(measured, tmp_path / "heads.pdf")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot create"):
        plot(measured, tmp_path / "file" / "heads.png")
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnavailableError) as caught:
        plot(measured, tmp_path / "heads.png")
    assert "hforce[plot]" in caught.value.mend
