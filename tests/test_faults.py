"""Faults met while a model is loaded and while it works, and docs/faults.md, which says where each is proven."""

from __future__ import annotations

import ast
import logging
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.weightfiles import small_wan, write
from torch import Tensor

from hforce import generate
from hforce.build import build_backbone, build_blueprint, build_plan, build_script, build_stream
from hforce.config import load_config
from hforce.decoding import decoded, warm_up
from hforce.documents import file_digest
from hforce.errors import CheckpointError, RoomError, UnavailableError, memory_for
from hforce.memory import Mode, Plan
from hforce.models.base import Backbone, Blueprint, Decoder
from hforce.models.checkpoints import load_transformer, open_checkpoint
from hforce.models.registry import choose_dtype, has_bfloat16
from hforce.prompts import Item, Shot
from hforce.settings import Config

ROOT = Path(__file__).parents[1]
PROMPT = "a red circle bouncing sideways on a green striped background"
TOO_MUCH = 2**50  # bytes


@pytest.mark.slow
def test_compiling_without_a_compiler_is_refused_before_anything_is_made(weights, heads, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "CXX": str(tmp_path / "none")}
    line = [sys.executable, "-m", "hforce.cli", "generate", "-m", weights, "--profile", heads, "-p", PROMPT,
            "--set", "model.compile=true", "-o", tmp_path / "out"]  # fmt: skip
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 69
    assert "torch.compile does not work here: InvalidCxxCompiler" in done.stderr
    assert "leave model.compile out" in done.stderr
    assert not (tmp_path / "out" / "videos").exists() or not any((tmp_path / "out" / "videos").iterdir())


# A damaged file


def flip(path: Path, name: str, place: int, bit: int) -> None:
    """Turns one bit of a float32 tensor in a safetensors file; bit 31 is the sign, 30 the highest of the exponent."""
    data = bytearray(path.read_bytes())
    value = load_file(path)[name].flatten()[place].numpy().tobytes()
    start = data.index(load_file(path)[name].numpy().tobytes()) + 4 * place
    assert data[start : start + 4] == value
    data[start + bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("place", [0, 77, 300])
def test_a_flipped_bit_that_makes_a_weight_absurd_is_found_in_any_file(place, tmp_path, caplog):
    caplog.set_level(logging.INFO, "hforce")
    path, name = write(small_wan().state_dict(), tmp_path / "w.safetensors"), "blocks.1.ffn.0.weight"
    load_transformer(open_checkpoint(path), torch.float32, "cpu")
    assert f"no checksum is known of {path}" in caplog.text
    assert 0 < abs(float(load_file(path)[name].flatten()[place])) < 1
    flip(path, name, place, bit=30)
    with pytest.raises(CheckpointError, match=rf"1 tensors are not finite .*or above 100000 \({name}\)") as caught:
        load_transformer(open_checkpoint(path), torch.float32, "cpu")
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("folder", [False, True])
def test_any_flipped_bit_is_found_in_a_file_of_the_hub(folder, tmp_path, caplog):
    """The hub's cache keeps a large file under its SHA-256, and links to it from the commits that have it."""
    caplog.set_level(logging.INFO, "hforce")
    draft = write(small_wan().state_dict(), tmp_path / "draft")
    blob, link = tmp_path / "blobs" / file_digest(draft), tmp_path / "snapshots" / ("a" * 40) / "w.safetensors"
    blob.parent.mkdir()
    link.parent.mkdir(parents=True)
    draft.rename(blob)
    link.symlink_to(Path("../../blobs") / blob.name)
    found = open_checkpoint(link.parent if folder else link)
    load_transformer(found, torch.float32, "cpu")
    assert "no checksum" not in caplog.text
    flip(blob, "blocks.1.ffn.0.weight", 5, bit=0)
    with pytest.raises(CheckpointError, match=f"is damaged: its SHA-256 is .*, not {blob.name}") as caught:
        load_transformer(found, torch.float32, "cpu")
    assert str(blob) in caught.value.mend


def test_a_file_cut_short_says_how_long_it_should_be(tmp_path):
    save_file({"a": torch.ones(64)}, tmp_path / "w.safetensors")
    data = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(data[:-9])
    with pytest.raises(CheckpointError, match=rf"\({len(data) - 9} bytes, of {len(data)} that it should have\)"):
        open_checkpoint(tmp_path / "w.safetensors")


# Memory


@contextmanager
def room(more: int) -> Iterator[None]:
    """A machine on which this process may take so many bytes more than it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def config(weights: Path, heads: Path) -> Config:
    own = [f"model.checkpoint={weights}", f"cache.profile={heads}", "video.seconds=1", "video.upscale=1"]
    return load_config(overrides=[*own, "sample.steps=[1000]", "cache.setup=full"])


def test_a_video_without_room_for_its_cache_fails_and_the_others_are_made(config, tmp_path):
    items = [Item("long", (Shot(PROMPT),), line=1, seconds=86_400.0), Item("short", (Shot(PROMPT),), line=2)]
    config = replace(config, model=replace(config.model, memory_limit="10000GiB"))  # so that it is tried at all
    with room(1 << 30):
        result = generate.run(config, items, tmp_path, "error", lambda _: None)
    ((target, error),) = result.failed
    assert (type(error), error.exit_code, target.video.name) == (RoomError, 71, "long-0.mp4")
    assert "out of memory while laying out the cache" in str(error)
    assert "--size" in error.mend
    assert [made.video.name for made in result.made] == ["short-1.mp4"]


def test_a_single_video_without_room_is_71(command, weights, heads):
    line = ["generate", "-m", weights, "--profile", heads, "-p", "red", "--size", "4096x4096", "-o", "out"]
    line += ["--set", "model.memory_limit=10000GiB", "--memory-mode", "low"]
    with room(1 << 30):
        command(*line).fails(71, "out of memory while laying out the cache", "hint: make the video smaller")


class Once:
    """Somebody who is told of chunks, and for whom memory runs out at the first one."""

    def __init__(self) -> None:
        self.told = 0

    def __call__(self, progress: generate.Progress) -> None:
        self.told += 1
        if self.told == 1:
            with memory_for("telling"):
                torch.empty(TOO_MUCH, dtype=torch.uint8)


def test_a_video_that_ran_out_of_memory_is_made_once_more_in_a_lighter_mode(config, tmp_path, caplog):
    caplog.set_level(logging.INFO, "hforce")
    items = [Item("a", (Shot(PROMPT),), line=1), Item("b", (Shot(PROMPT),), line=2)]
    result = generate.run(config, items, tmp_path, "error", tell := Once())
    assert "a-0.mp4: out of memory while telling" in caplog.text
    assert "trying once more in memory mode balanced" in caplog.text
    assert (result.failed, len(result.made), tell.told) == ([], 2, 5)
    calm = generate.run(config, items, tmp_path / "calm", "error", lambda _: None)
    for one, other in zip(result.made, calm.made, strict=True):
        assert one.video.read_bytes() == other.video.read_bytes()


@pytest.mark.parametrize("may_lighten", [True, False])
def test_memory_that_runs_out_while_the_model_is_read_leads_to_a_lighter_mode(config, caplog, may_lighten):
    blueprint, tries = build_blueprint(config), []

    def read(blueprint: Blueprint, rests: bool) -> Backbone:
        tries.append(rests)
        return whole.read(blueprint, rests) if tries[1:] else torch.empty(TOO_MUCH, dtype=torch.uint8)

    whole, plan = blueprint, Plan(Mode.BALANCED, {})
    studio = generate.Studio(replace(blueprint, read=read), [PROMPT], frozenset({0}), plan, Mode.BALANCED, may_lighten)
    if may_lighten:
        assert studio.open() is studio.open()
        assert (studio.mode, tries, studio.may_lighten) == (Mode.LOW, [False, True], False)
        assert "out of memory while loading the model; trying once more in memory mode low" in caplog.text
    else:
        with pytest.raises(RoomError, match="out of memory while loading the model"):
            studio.open()


@pytest.mark.parametrize("first", [0, 1, 2])
def test_warming_up_decodes_two_chunks_and_leaves_nothing(config, first):
    backbone, decoded = build_backbone(config), []
    latents = torch.randn(1, 3, *backbone.shape)
    frames = backbone.codec.decoder()(latents)
    with torch.inference_mode():  # in which hooks see what is decoded
        hook = backbone.codec.net.decoder[0].register_forward_hook(lambda _, given, __: decoded.append(len(given[0])))
        warm_up(backbone, {first})
        hook.remove()
    assert decoded == [first or 3, 3]
    assert torch.equal(backbone.codec.decoder()(latents), frames)


def test_a_mode_that_was_asked_for_is_kept(config, tmp_path):
    config = replace(config, model=replace(config.model, memory="speed"))
    result = generate.run(config, [Item("a", (Shot(PROMPT),), line=1)], tmp_path, "error", tell := Once())
    ((_, error),) = result.failed
    assert (type(error), result.made, tell.told) == (RoomError, [], 1)
    assert re.search(r"out of memory while telling.*; planned were 0\.0\d+ GiB", str(error))


class Greedy:
    """A codec whose decoder wants more memory than any machine has, from its second chunk on."""

    def __init__(self, decoder: Decoder) -> None:
        self.own, self.calls = decoder, 0

    def decoder(self) -> Greedy:
        return self

    def __call__(self, latents: Tensor) -> Tensor:
        self.calls += 1
        return self.own(latents) if self.calls == 1 else torch.empty(TOO_MUCH, dtype=torch.uint8)


def playing(config: Config, greedy_in: str):
    """What a video of two chunks yields, in which one stage wants too much memory."""
    backbone, shots = build_backbone(config), [Shot(PROMPT)]
    plan = build_plan(shots, 1, 16, backbone)
    stream = build_stream(config, backbone, plan.total)
    if greedy_in == "denoising":
        stream.attend = lambda layer, q, k, v: torch.empty(TOO_MUCH, dtype=torch.uint8)
    else:
        backbone = replace(backbone, codec=Greedy(backbone.codec.decoder()))
    return decoded(stream, build_script(shots, plan, backbone), backbone)


@pytest.mark.parametrize(("stage", "good"), [("denoising", 0), ("decoding", 1)])
def test_want_of_memory_names_the_stage_and_the_chunk(config, stage, good):
    frames = playing(config, stage)
    for _ in range(good):
        next(frames)
    with pytest.raises(RoomError, match=f"out of memory while {stage} chunk {good}"):
        next(frames)


@pytest.mark.parametrize("take", [
    lambda: torch.empty(TOO_MUCH, dtype=torch.uint8),
    lambda: np.ones(2**60, dtype=np.uint8),
    lambda: bytearray(2**60),
])  # fmt: skip
def test_every_way_to_run_out_of_memory_is_known_and_lets_go_of_what_was_held(take):
    held = []

    def work() -> None:
        big = torch.zeros(4)
        held.append(big.data_ptr())
        take()

    with pytest.raises(RoomError, match="out of memory while working") as caught:
        with memory_for("working"):
            work()
    frames = [f for f in _frames(caught.value.__cause__) if f.f_code.co_name == "work"]
    assert held
    assert [f.f_locals for f in frames] == [{}]


def _frames(error: BaseException):
    step = error.__traceback__
    while step:
        yield step.tb_frame
        step = step.tb_next


def test_other_errors_are_not_taken_for_want_of_memory():
    with pytest.raises(RuntimeError, match="size"):
        with memory_for("working"):
            torch.ones(2) + torch.ones(3)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
])  # fmt: skip
def test_a_gpu_says_it_in_words_of_its_own(error):
    with pytest.raises(RoomError):
        with memory_for("working"):
            raise error


# Devices


def test_a_device_without_bfloat16_computes_in_float32_unless_it_was_asked_for(caplog):
    assert choose_dtype("auto", "cuda", False) == "float32"
    assert "device cuda does not compute in bfloat16: using float32" in caplog.text
    assert [choose_dtype(name, "cuda", False) for name in ("float16", "float32")] == ["float16", "float32"]
    assert [choose_dtype(name, "cuda", True) for name in ("auto", "bfloat16")] == ["auto", "bfloat16"]
    with pytest.raises(UnavailableError, match="device cuda does not compute in bfloat16") as caught:
        choose_dtype("bfloat16", "cuda", False)
    assert caught.value.exit_code == 69
    assert has_bfloat16("cpu")


# The table


def test_the_table_of_faults_names_tests_that_exist():
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in text.splitlines() if re.match(r"\| \d+ ", line)]
    assert [int(row[0]) for row in rows] == [*range(1, 20), *range(45, 65)]
    for number, *_, proof in rows:
        named = re.findall(r"`(\w+)`", proof)
        files = re.findall(r"`(tests/[\w/]+\.py)`", proof)
        known = {node.name for file in files for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
                 if isinstance(node, ast.FunctionDef)}
        assert named, number
        assert [name for name in named if name not in known] == [], number
