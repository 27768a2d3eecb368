"""What a run takes in memory is known before it begins, and each memory mode changes what is held."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.builders import role_map
from tests.weightfiles import hollow_release, shapes_of, write_hollow
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hforce import memory
from hforce.attention.backends import make_backend, turns_queries
from hforce.build import Plan, build_blueprint, build_memory, build_stream
from hforce.cache.heads import HeadCache
from hforce.cache.policies import make_policy
from hforce.cache.roles import HeadRole, RoleMap
from hforce.config import load_config, with_setup
from hforce.errors import RoomError
from hforce.generate import Studio, load
from hforce.geometry import Geometry
from hforce.memory import Lane, Mode, Work
from hforce.models.base import Needs
from hforce.models.dit import CausalWan, WanConfig
from hforce.models.resting import RestingCodec
from hforce.models.sizes import KNOWN
from hforce.room import free_bytes, read_available, read_left
from hforce.settings import Config
from hforce.weigh import tensor_bytes, tensors_of, weigh

CPU = torch.device("cpu")
NOTHING = Needs(0, 0, 0, 0, 0, 0)
MIXED, UNIFORM = ("AALM", "MLLA", "LLLL", "MMAL", "AMML"), ("MMMM",) * 5
POLICIES = {
    "their own": {role: make_policy(role.value) for role in HeadRole},
    "several": {
        HeadRole.LOCAL: make_policy("window"),
        HeadRole.ANCHOR: make_policy("sink"),
        HeadRole.MEMORY: make_policy("full", frames=6),
    },
}


def ordered(roles: RoleMap) -> RoleMap:
    return RoleMap(tuple(tuple(sorted(row)) for row in roles.roles))


def work_of(
    config: WanConfig, geometry: Geometry, roles: RoleMap, policies: str, dtype: torch.dtype, turns_keys: bool = True
) -> Work:
    lanes = {}
    for role in (role for role, count in roles.counts().items() if count):
        policy = POLICIES[policies][role]
        lanes[role.value] = Lane(tuple(row.count(role) for row in roles.roles), policy.capacity, policy.looks)
    return Work(config, geometry, dtype.itemsize, lanes, NOTHING, pixels=0, turns_keys=turns_keys)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policies", list(POLICIES))
@pytest.mark.parametrize("rows", [MIXED, UNIFORM])
@pytest.mark.parametrize(("grid", "width"), [((2, 3), 12), ((4, 4), 24), ((5, 3), 128)])
def test_the_cache_is_as_large_as_planned(rows, policies, dtype, grid, width, backend):
    geometry, roles = Geometry(5, 4, width, grid), ordered(role_map(*rows))
    cache = HeadCache(geometry, roles, POLICIES[policies], dtype, backend=make_backend(backend))
    work = work_of(WanConfig(4 * width, 8, 5, 4), geometry, roles, policies, dtype, not turns_queries(backend))
    assert sum(memory.kv_bytes(work).values()) == cache.stats().nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [MIXED, UNIFORM, ("LLLL",) * 5])
@pytest.mark.parametrize(("dim", "ffn", "grid"), [(144, 432, (4, 4)), (256, 256, (6, 8)), (128, 700, (8, 12))])
@torch.inference_mode()
def test_a_pass_takes_what_was_planned_or_up_to_a_tenth_less(dim, ffn, grid, rows, dtype):
    config = WanConfig(dim, ffn, 5, 4, text_dim=8, text_len=5)
    model, geometry, roles = CausalWan(config).to(dtype), Geometry(5, 4, dim // 4, grid), ordered(role_map(*rows))
    cache = HeadCache(geometry, roles, POLICIES["their own"], dtype)
    text = model.project_text(torch.ones(1, 5, 8, dtype=dtype))
    latents, t = torch.ones(1, 3, 16, 2 * grid[0], 2 * grid[1], dtype=dtype), torch.zeros(1, 1)
    for _ in range(6):
        model(latents, t, text, cache.attend)
        cache.advance()
    cache.reset()
    for _ in range(6):
        found = weigh(lambda: model(latents, t, text, cache.attend), CPU)
        cache.advance()
    work = work_of(config, geometry, roles, "their own", dtype)
    assert found is not None
    assert 0.999 <= memory.pass_bytes(work) / found.peak <= 1.11
    assert sum(x.nbytes for seen in cache._seen.values() for _, x in seen) == memory.looked_bytes(work)
    assert sum(x.nbytes for x in (*text.keys, *text.values)) == memory.context_bytes(config, dtype.itemsize)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [MIXED, UNIFORM, ("LLLL",) * 5])
@torch.inference_mode()
def test_between_two_chunks_no_more_is_taken_than_was_planned(rows, dtype):
    geometry, roles = Geometry(5, 4, 24, (6, 8)), ordered(role_map(*rows))
    cache = HeadCache(geometry, roles, POLICIES["their own"], dtype)
    q, k, v = (torch.ones(1, 3 * 48, 4, 24, dtype=dtype) for _ in range(3))
    peak = 0
    for _ in range(9):
        for layer in range(5):
            cache.attend(layer, q, k, v)
        found = weigh(cache.advance, CPU)
        assert found is not None
        peak = max(peak, found.peak)
    planned = memory.turning_bytes(work_of(WanConfig(96, 8, 5, 4), geometry, roles, "their own", dtype))
    assert 0.4 * planned < peak < 1.1 * planned + 40_000, "a few tables are not counted"


@pytest.fixture
def config(weights: Path, heads: Path) -> Config:
    return load_config(overrides=[f"model.checkpoint={weights}", f"cache.profile={heads}", "model.device=cpu"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_tiny_model_holds_what_was_planned(config, dtype):
    blueprint = build_blueprint(replace(config, model=replace(config.model, dtype=dtype)))
    backbone, needs = blueprint.load(), blueprint.needs
    assert tensor_bytes(backbone.model) == needs.transformer
    assert tensor_bytes(backbone.codec) == needs.codec
    assert tensor_bytes(backbone.encode_text) == needs.text
    decoder = backbone.codec.decoder()
    found = weigh(lambda: [decoder(torch.zeros(1, 3, *backbone.shape)) for _ in range(2)], CPU)
    assert sum(x.nbytes for x in tree_leaves(decoder.memory) if isinstance(x, Tensor)) == needs.decoder
    assert found is not None
    pictures = 3 * 4 * 3 * 64 * 64 * 4  # bytes of a chunk of video frames, of which the list above holds one more
    assert 0.9 <= (needs.decoder + needs.decoding + pictures) / found.peak <= 1.2
    stream = build_stream(config, backbone, 4)
    plan, _ = build_memory(config, blueprint, 4, switches=False)
    caches = (size for part, size in plan.phases["denoising"].items() if part.startswith("cache of"))
    assert sum(caches) == stream.cache.stats().nbytes


def test_fingerprint_and_sizes_are_known_before_weights_are_read(config):
    blueprint = build_blueprint(config)
    backbone = blueprint.load()
    sizes = ("geometry", "shape", "size", "stride", "dtype", "device")
    for name in ("name", *sizes, "family", "is_random", "fingerprint"):
        assert getattr(blueprint, name) == getattr(backbone, name)


@pytest.mark.parametrize(("chunk", "setup", "backend"), [(1, "head-forcing", "sdpa"), (2, "full", "reference")])
def test_plan_and_model_agree_on_the_chunk_and_on_what_was_given(config, chunk, setup, backend):
    whole, settings = build_blueprint(config), with_setup(config, setup)
    settings.sample.chunk, settings.cache.backend = chunk, backend
    blueprint = build_blueprint(settings)
    assert (blueprint.geometry.chunk, whole.geometry.chunk) == (chunk, 3)
    assert blueprint.needs.decoding < whole.needs.decoding
    held = Plan((2, 1), 0, given=5).held(chunk)
    assert held == {1: 8, 2: 6}[chunk]
    plan, _ = build_memory(settings, blueprint, held, switches=False)
    caches = (size for part, size in plan.phases["denoising"].items() if part.startswith("cache of"))
    assert sum(caches) == build_stream(settings, blueprint.load(), held).cache.stats().nbytes


# Modes


def work_with(needs: Needs, here: str = "cpu") -> Work:
    geometry = Geometry(2, 2, 12, (2, 2))
    return Work(WanConfig(24, 8, 2, 2, 8, 4), geometry, 4, {"memory": Lane((2, 2), 3)}, needs, 0, here)


def test_auto_takes_the_first_mode_that_fits():
    work = work_with(Needs(transformer=10**8, text=5 * 10**8, codec=10**8, encoding=10, decoder=0, decoding=10**6))
    peaks = {mode: memory.plan(work, mode).peak for mode in Mode}
    assert peaks[Mode.SPEED] > peaks[Mode.BALANCED]
    assert memory.choose(work, "auto", peaks[Mode.SPEED]).mode is Mode.SPEED
    assert memory.choose(work, "auto", peaks[Mode.SPEED] - 1).mode is Mode.BALANCED
    assert memory.choose(work, "auto", None).mode is Mode.SPEED
    low = memory.choose(work, "auto", 10)
    assert (low.mode, low.peak > 10) == (Mode.LOW, True)
    assert memory.choose(work, "speed", 10).mode is Mode.SPEED


def test_speed_has_room_for_a_pass_beside_the_decoder():
    work = work_with(Needs(transformer=10, text=0, codec=10, encoding=0, decoder=0, decoding=10**6), "cuda")
    speed, balanced = (memory.plan(work, mode) for mode in (Mode.SPEED, Mode.BALANCED))
    assert balanced.phases["decoding"]["work"] == 10**6
    assert speed.phases["decoding"]["work"] == 10**6 + speed.phases["denoising"]["work"]
    assert speed.phases["denoising"]["work"] == balanced.phases["denoising"]["work"] > 0
    assert memory.plan(replace(work, here="cpu"), Mode.SPEED).phases["decoding"]["work"] == 10**6


def test_beside_a_gpu_the_text_encoder_may_run_on_the_cpu():
    needs = Needs(transformer=10**8, text=5 * 10**8, codec=10**8, encoding=10, decoder=10**6, decoding=10**6)
    made = memory.choose(work_with(needs, "cuda"), "balanced", 3 * 10**8)
    assert made.total("encoding") == 0
    assert made.peak <= 3 * 10**8 < memory.choose(work_with(needs, "cpu"), "balanced", 3 * 10**8).peak


def test_a_plan_that_does_not_fit_names_parts_and_a_way_out():
    work = work_with(Needs(transformer=3 << 30, text=1 << 30, codec=1 << 30, encoding=0, decoder=0, decoding=0))
    made = memory.plan(work, Mode.BALANCED)
    memory.check(made, made.peak)
    memory.check(made, None)
    with pytest.raises(RoomError, match=r"needs 4\.\d\d GiB.*transformer 3.00.*but 2.00 GiB are available") as caught:
        memory.check(made, 2 << 30)
    assert caught.value.exit_code == 71
    assert [word for word in ("--size", "--policy", "--memory-mode auto") if word not in caught.value.mend] == []


def test_low_holds_no_codec_between_chunks_and_decodes_the_same(config):
    blueprint = build_blueprint(config)
    whole, low = load(blueprint, Mode.BALANCED, []), load(blueprint, Mode.LOW, [])
    assert isinstance(low.codec, RestingCodec)
    one, other = whole.codec.decoder(), low.codec.decoder()
    for seed in range(3):
        latents = torch.randn(1, 3, *low.shape, generator=torch.Generator().manual_seed(seed))
        assert one(latents).equal(other(latents))
        assert tensor_bytes(low.codec, other) == 0  # its memory is a list, not a module
        assert sum(x.nbytes for x in tree_leaves(other.memory) if isinstance(x, Tensor)) == blueprint.needs.decoder
    assert tensor_bytes(whole.codec) == blueprint.needs.codec


def test_an_autoencoder_with_a_device_of_its_own_is_there_in_every_mode_and_in_no_plan(config):
    """The meta device stands for a second GPU: all but the numbers is there."""
    blueprint = replace(build_blueprint(config), vae_device="meta")
    assert blueprint.is_apart and not replace(blueprint, vae_device="cpu:0").is_apart
    for mode in Mode:
        backbone = load(blueprint, mode, [])
        assert {x.device.type for x in tensors_of(backbone.codec)} == {"meta"}
        assert {x.device.type for x in tensors_of(backbone.model)} == {"cpu"}
    assert build_memory(config, blueprint, 4, switches=False)[0].phases["decoding"].get("autoencoder") is None


@pytest.mark.parametrize("here", ["cpu", "cuda"])
@pytest.mark.parametrize("mode", list(Mode))
def test_an_autoencoder_elsewhere_takes_nothing_here(mode, here):
    needs = Needs(transformer=10**8, text=10**7, codec=10**6, encoding=10, decoder=10**6, decoding=10**6)
    whole = memory.plan(work_with(needs, here), mode)
    apart = memory.plan(replace(work_with(needs, here), codec_apart=True), mode)
    assert apart.phases["decoding"] == apart.phases["denoising"]
    assert not {"autoencoder", "decoder memory"} & {part for phase in apart.phases.values() for part in phase}
    other = dict.fromkeys(("autoencoder", "decoder memory"))
    assert apart.phases["denoising"] == {p: n for p, n in whole.phases["denoising"].items() if p not in other}


@pytest.mark.parametrize(("device", "vae", "mode", "ahead"), [
    ("cuda", "", Mode.SPEED, True), ("cuda", "", Mode.BALANCED, False), ("cuda", "cuda:1", Mode.LOW, True),
    ("cuda:0", "cuda", Mode.LOW, False), ("cuda", "cpu", Mode.BALANCED, True), ("cpu", "cuda", Mode.SPEED, False),
])  # fmt: skip
def test_the_next_chunk_is_made_meanwhile_where_that_gains_something(config, device, vae, mode, ahead):
    blueprint = replace(build_blueprint(config), device=device, vae_device=vae)
    assert Studio(blueprint, [], frozenset(), memory.Plan(mode, {}), mode, False).makes_ahead == ahead


def test_a_second_device_that_is_not_there_is_told_of(generate):
    generate("-p", "a red circle", "--set", "model.vae_device=cuda:99").fails(69, "'cuda:99' cannot be used", "leave")


def test_low_keeps_the_autoencoder_off_a_gpu():
    needs = Needs(transformer=10**8, text=10**7, codec=10**8, encoding=10, decoder=10**8, decoding=10**8)
    balanced, low = (memory.plan(work_with(needs, "cuda"), mode) for mode in (Mode.BALANCED, Mode.LOW))
    assert balanced.total("decoding") - low.total("decoding") == 3 * 10**8
    assert low.peak < balanced.peak
    on_cpu = memory.plan(work_with(needs), Mode.LOW)
    assert on_cpu.total("denoising") == low.total("denoising") + 10**8


# The command


def test_every_mode_makes_the_same_video(generate, tmp_path):
    videos = []
    for mode in Mode:
        done = generate("-p", "a red circle", "-o", f"{mode}.mp4", "--memory-mode", mode.value)
        assert done.code == 0, done.err
        videos.append((tmp_path / f"{mode}.mp4").read_bytes())
    assert videos[0] == videos[1] == videos[2]
    again = generate("-p", "a red circle", "-o", "speed.mp4", "--memory-mode", "low")
    assert again.code == 0, again.err
    assert "was there already" in again.err


def test_a_dry_run_tells_what_would_be_made_and_makes_nothing(generate, tmp_path):
    done = generate("-p", "a red circle", "-p", "a blue square", "-o", "out", "--dry-run")
    assert done.code == 0, done.err
    wanted = ("8 layers x 6 heads x 24", "float32 on cpu", "64x64", "64 tokens per frame", "local heads",
              "21 video frames", "a red circle-0.mp4", "steps [1000] (set)", "transformer", "total",
              "memory mode  speed", "fingerprint")
    assert [text for text in wanted if text not in done.out] == []
    assert list(tmp_path.iterdir()) == []
    Image.new("RGB", (80, 60), "red").save(tmp_path / "red.png")
    line = ("--init-image", "red.png", "--policy", "full", "--set", "cache.backend=reference", "--set",
            "sample.shift=7")  # fmt: skip
    done = generate("-p", "a red circle", *line, "-d", "1.5s", "--dry-run")
    wanted = ("2 chunks to make, from red.png (latent frames given: 1)", "setup        full", "backend reference",
              "at most 9 frames of the past", "shift 7 (set)", "Self-Forcing's settings")
    assert [text for text in wanted if text not in done.out] == []
    short = generate("-p", "a red circle", "--dry-run", "--set", "model.memory_limit=1MiB")
    assert (short.code, "it does not fit" in short.out) == (71, True)
    generate("-p", "a red circle", "--set", "model.memory_limit=lots").fails(2, "is not an amount of memory")


def test_a_model_that_is_too_large_is_refused_before_it_is_read(command, tmp_path):
    """Zeros are written as a hole, so reading 57 GB of them as float32 would show."""
    write_hollow(shapes_of(KNOWN["Wan2.1 14B"]), tmp_path / "large.safetensors")
    hollow_release(tmp_path / "base")
    line = ("-q", "generate", "-m", "large.safetensors", "--set", "model.base=base", "--set", "model.memory_limit=8GiB",
            "--roles", "uniform", "-p", "a fox", "-d", "5s", "-o", "out", "--set", "model.device=cpu")
    done = command(*line)
    if done.code == 69:  # the packages of the extra are looked for first
        pytest.skip("needs the extra wan")
    done.fails(71, "GiB of memory", "transformer 5", "8.00 GiB are available", "--size", "--policy")
    assert not (tmp_path / "out" / "videos" / "a fox-0.mp4").exists()


def test_a_dry_run_needs_neither_packages_nor_a_fitting_size(command, tmp_path):
    write_hollow(shapes_of(WanConfig(256, 256, 2, 2, text_dim=32)), tmp_path / "x.safetensors")
    hollow_release(tmp_path / "base")
    line = ("-q", "generate", "-m", "x.safetensors", "--set", "model.base=base", "--dry-run", "-p", "a fox", "-d", "1s")
    done = command(*line, "--size", "64x64", "--roles", "uniform")
    assert done.code == 0, done.err
    assert "release      wan2.1, as the weights were recognised" in done.out
    command(*line, "--profile", "gone.json").fails(66, "gone.json")
    named = ("--set", "model.release=causal-forcing-2step", "--size", "64x64", "--roles", "uniform")
    wanted = ("causal-forcing-2step, as model.release says", "steps [1000, 500]", "chunk 1", "21 chunks to make")
    done = command(*line, *named, "-d", "5s")
    assert [text for text in wanted if text not in done.out] == []


# What there is


def test_free_memory_is_read_where_the_system_tells(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:   42 kB\n")
    assert read_available(tmp_path / "meminfo") == 42 * 1024
    assert read_available(tmp_path / "none") is None
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "limit").write_text("100\n")
    (tmp_path / "used").write_text("30\n")
    assert read_left(tmp_path / "max", tmp_path / "used") is None
    assert read_left(tmp_path / "limit", tmp_path / "used") == 70
    assert free_bytes("meta") is None
