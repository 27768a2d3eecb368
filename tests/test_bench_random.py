"""A bench on random weights needs no files, keeps to the published shares, and says what it ran on."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tests.conftest import Command

from hforce import bench
from hforce.bench_report import BenchResult, steady
from hforce.build import build_bench_backbone, build_policy, build_roles, drawn_roles
from hforce.cache.heads import HeadCache
from hforce.cache.roles import HeadRole, RoleMap, head_order
from hforce.config import with_setup
from hforce.errors import ConfigError
from hforce.geometry import Geometry
from hforce.models.random_weights import SHAPES
from hforce.models.wan import SMALL
from hforce.roofline import ATTENTION, DECODER, OTHERS
from hforce.settings import BenchConfig, Config, ModelConfig, SampleConfig

SETUPS = ["window", "head-forcing", "reference-eager"]
RELEASE = (30, 12)  # layers and heads of Wan2.1 1.3B


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    prompts = tmp_path_factory.mktemp("bench") / "prompts.txt"
    prompts.write_text("a lighthouse in a storm\n")
    plan = BenchConfig(setups=SETUPS, prompts=str(prompts), seconds=2.0, warmup=1, random_weights=True, layers=2)
    return Config(model=ModelConfig(device="cpu"), bench=plan)


@pytest.fixture(scope="module")
def result(config: Config) -> BenchResult:
    return bench.run(config, lambda _: None)


def refused(config: Config) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        build_bench_backbone(config)
    assert error.value.mend
    return error.value


def test_every_setup_runs_and_no_video_is_judged(result: BenchResult) -> None:
    assert [row.setup for row in result.rows] == SETUPS
    assert all(row.drift is None and row.first_frame_ms > 0 for row in result.rows)
    assert (result.environment["random_weights"], result.environment["layers"]) == (True, 2)


def test_the_eager_reference_makes_the_latents_of_the_window(config: Config) -> None:
    backbone, beside = build_bench_backbone(config)
    configs = bench.choose_setups(config, SETUPS)
    (item,) = bench.load_prompts(config.bench.prompts)
    course = bench.plan_course(config, backbone, item)
    made = []
    for name in ("window", "reference-eager"):
        entrant = bench.enter(name, configs[name], backbone, course, beside)
        made.append(torch.cat([chunk.latents for chunk in entrant.stream.play(course.script)]))
    torch.testing.assert_close(made[0], made[1], atol=1e-4, rtol=0)


def test_only_the_bench_knows_the_eager_reference(config: Config) -> None:
    with pytest.raises(ConfigError, match="unknown setup 'reference-eager'"):
        bench.choose_setups(config)


def test_stages_are_all_of_a_chunk(result: BenchResult) -> None:
    for row in result.rows:
        stages = result.stages[row.setup]
        (samples,) = (steady(trial, result.warmup) for trial in result.trials[row.setup])
        assert list(stages) == [ATTENTION, OTHERS, DECODER]
        spent = sum(s.denoise + s.commit + s.decode for s in samples) / len(samples)
        assert sum(stage.seconds for stage in stages.values()) == pytest.approx(spent)
        assert all(stage.least_seconds > 0 and stage.flops > 0 for stage in stages.values())
        assert all(0 < s.attend < s.denoise + s.commit for s in samples)
    window, forcing, eager = (result.stages[name] for name in SETUPS)
    assert window[OTHERS].flops == forcing[OTHERS].flops == eager[OTHERS].flops
    assert window[ATTENTION].flops == eager[ATTENTION].flops


def test_frames_read_are_those_of_each_chunk(result: BenchResult) -> None:
    """Two seconds are three chunks; nothing is dropped before a role is full."""
    for name in ("window", "reference-eager"):
        assert [s.frames_read for s in result.trials[name][0].samples] == [3, 6]
    (forcing,) = result.trials["head-forcing"]
    assert [s.frames_read for s in forcing.samples] == [3, 6]


def test_the_document_tells_the_ceiling_and_every_stage(result: BenchResult) -> None:
    document = json.loads(bench.to_json(result))
    assert document["ceiling"]["flops_per_second"] == result.ceiling.flops_per_second
    told = document["roofline"]["window"][ATTENTION]
    assert told["share"] == told["least_seconds"] / told["seconds"]
    assert told["flops_per_second"] == told["flops"] / told["seconds"]
    assert {"roofline", "decoders", "jitter", "steady_chunks"} <= set(document["definitions"])


def test_roles_have_the_published_shares_and_are_always_the_same() -> None:
    roles = drawn_roles(*RELEASE)
    assert roles.counts() == {HeadRole.LOCAL: 54, HeadRole.ANCHOR: 90, HeadRole.MEMORY: 216}
    assert roles == drawn_roles(*RELEASE)
    assert drawn_roles(1, 1).counts()[HeadRole.MEMORY] == 1


def test_roles_are_set_as_for_any_model(config: Config) -> None:
    backbone, _ = build_bench_backbone(config)
    drawn = build_roles(config.cache, backbone)
    others = {name: build_roles(replace(config.cache, roles=name), backbone) for name in ("inverse", "random:1")}
    assert all(roles.counts() == drawn.counts() and roles != drawn for roles in others.values())
    uniform = build_roles(replace(config.cache, roles="uniform"), backbone)
    assert uniform == RoleMap.uniform(HeadRole.MEMORY, 2, 6)


@dataclass(frozen=True)
class Sizes:
    """What a cache has to know of a model."""

    geometry: Geometry
    family: None = None


@pytest.mark.parametrize(("setup", "frames"), [("window", 21), ("head-forcing", 11.4), ("hf-10", 9.6), ("hf-15", 15)])
def test_bytes_of_keys_and_values_at_the_size_of_the_release(setup: str, frames: float) -> None:
    """A frame of a head is 1560 tokens of 128 values; of past keys the 44 that turn in time are kept twice."""
    cache = with_setup(Config(), setup).cache
    geometry = Geometry(*RELEASE, SHAPES[SMALL].head_dim, grid=(30, 52))
    roles = RoleMap.uniform(HeadRole.MEMORY, *RELEASE) if cache.roles == "uniform" else drawn_roles(*RELEASE)
    rows = zip(roles.roles, head_order(roles), strict=True)
    ordered = RoleMap(tuple(tuple(row[head] for head in order) for row, order in rows))
    policies = {role: build_policy(cache, role, Sizes(geometry), chunks=1) for role in HeadRole}
    stats = HeadCache(geometry, ordered, policies, torch.bfloat16, "meta").stats()
    expected = 2 * 30 * 12 * 1560 * (frames * 2 * 128 + (frames - 3) * 44)
    assert stats.nbytes == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("part", ["checkpoint", "base", "lora", "vae"])
def test_files_and_random_weights_exclude_each_other(config: Config, part: str) -> None:
    error = refused(replace(config, model=replace(config.model, **{part: "somewhere"})))
    assert f"model.{part} and random weights" in str(error)


def test_layers_are_taken_from_random_weights_alone(config: Config) -> None:
    assert "bench.layers" in str(refused(replace(config, bench=replace(config.bench, random_weights=False))))


def test_a_second_device_is_refused(config: Config) -> None:
    assert "one device" in str(refused(replace(config, model=replace(config.model, vae_device="cpu"))))


def test_a_decoder_for_other_latents_is_refused(config: Config) -> None:
    error = refused(replace(config, bench=replace(config.bench, decoders=["taehv"])))
    assert "16 channels" in str(error)
    assert "12" in str(error)


@pytest.mark.slow
@pytest.mark.timeout(400)  # on machines with other things to do
def test_wan_runs_from_the_command_line(command: Command, tmp_path: Path, config: Config) -> None:
    """One layer of the true width, at a size for tests."""
    where = tmp_path / "gpu.json"
    settings = ("bench.layers=1", "bench.warmup=0", "bench.decoders=[taehv,own]", "sample.steps=[1000]")
    done = command(
        "--quiet", "bench", "-m", SMALL, "--random-weights", "--size", "32x32", "--setups", "head-forcing",
        "-d", "1s", "-f", config.bench.prompts, "--json", where, *(x for text in settings for x in ("--set", text)),
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "random weights, 1 layer" in done.out
    document = json.loads(where.read_text())
    assert document["environment"]["model"] == SMALL
    assert [list(row["decoders"]) for row in document["rows"]] == [["taehv"]]
    assert document["config"]["bench"]["random_weights"] is True


@pytest.mark.slow
@pytest.mark.timeout(400)  # on machines with other things to do
def test_both_decoders_are_timed_on_the_same_chunks(config: Config) -> None:
    pytest.importorskip("diffusers")
    plan = replace(config.bench, layers=1, warmup=0, seconds=1.0, setups=["window"], decoders=["taehv", "wan-vae"])
    model, sample = ModelConfig(name=SMALL, size="32x32", device="cpu"), SampleConfig(steps=[1000])
    made = bench.run(Config(model=model, sample=sample, bench=plan), lambda _: None)
    (row,) = made.rows
    assert list(row.decoders) == ["taehv", "wan-vae"]
    assert row.decoders["taehv"]["e2e_fps"] == row.e2e_fps
    (trial,) = made.trials["window"]
    assert all(set(sample.beside) == {"wan-vae"} for sample in trial.samples)
    assert made.environment["decoder"] == "taehv"
