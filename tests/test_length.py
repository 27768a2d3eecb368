"""The length experiment makes every video once, alike for all setups, and survives being stopped."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.builders import profile_of, small_tiny

from hforce import length
from hforce.bench import BenchProgress, find_schedule
from hforce.build import build_backbone, build_plan
from hforce.cache.roles import save_profile
from hforce.config import load_config, with_setup
from hforce.errors import ConfigError, DataError, OutputError
from hforce.length import Task, choose_lengths, draw_case, fingerprint_of, make, make_apart, notes_path, plan_shots
from hforce.length_report import FILMS, MEASURES, LengthResult
from hforce.prompts import Shot
from hforce.settings import SETUPS, BenchConfig, CacheConfig, Config, ModelConfig, SampleConfig
from hforce.toy.evaluate import generate
from hforce.toy.film import Cut, Film
from hforce.toy.metrics import read_frames, score
from hforce.toy.words import held_out, parse
from hforce.toy.world import FPS, Scene

ROOT = Path(__file__).parents[1]
LENGTHS = (1, 2)
NAMES = ["window", "head-forcing"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two seconds of two videos under two setups, in this process, on a model with random weights."""
    folder = tmp_path_factory.mktemp("length")
    weights, profile = folder / "tiny.safetensors", folder / "heads.json"
    small_tiny().save(weights)
    model = ModelConfig(checkpoint=str(weights), device="cpu", dtype="float32", threads=1)
    save_profile(profile_of(build_backbone(Config(model=model)).fingerprint), profile)
    bench = BenchConfig(setups=NAMES, seconds=2.0, seed=5, suite="tiny-length", videos=2, workers=1)
    return Config(model=model, cache=CacheConfig(profile=str(profile)), bench=bench)


def with_bench(config: Config, **changes: object) -> Config:
    return replace(config, bench=replace(config.bench, **changes))


def untold(_: BenchProgress) -> None:
    """Nobody listens."""


def settings(config: Config) -> list[str]:
    """The model of a configuration, for the command line; where presets differ from it, its own settings win."""
    set_ = [f"cache.profile={config.cache.profile}", f"cache.switch={config.cache.switch}", "model.device=cpu"]
    set_ += ["sample.first_steps=null"]
    line = ["--suite", "tiny-length", "-m", config.model.checkpoint, "--seed", str(config.bench.seed)]
    return [*line, "--setups", ",".join(NAMES), *(word for text in set_ for word in ("--set", text))]


@pytest.fixture(scope="module")
def result(config: Config) -> LengthResult:
    """An experiment that nobody disturbed, and of which nothing is written."""
    return length.run(config, untold, lengths=LENGTHS)


def same(one: LengthResult, other: LengthResult) -> bool:
    """Whether two experiments found the same numbers."""
    numbers = [(r.values, *(part for s in r.summary.values() for part in (*s.at, *s.change))) for r in (one, other)]
    equal = all(np.array_equal(a, b, equal_nan=True) for a, b in zip(*numbers, strict=True))
    return equal and (one.cases, one.setups, one.lengths) == (other.cases, other.setups, other.lengths)


# What is made


def test_prompts_are_held_out_and_alternate_between_the_kinds() -> None:
    cases = [draw_case(number, 100) for number in range(12)]
    assert cases == [draw_case(number, 100) for number in range(12)]
    assert [case.kind for case in cases] == [*FILMS] * 6
    assert [case.seed for case in cases] == [*range(100, 112)]
    assert [len(case.prompts) for case in cases] == [1, 2] * 6
    assert all(held_out(parse(prompt).words) for case in cases for prompt in case.prompts)
    assert len({case.prompts for case in cases}) == 12
    assert all(len(set(case.prompts)) == len(case.prompts) for case in cases)


def test_a_film_that_holds_has_one_shot() -> None:
    case = draw_case(0, 0)
    assert plan_shots(case, 120) == (Shot(case.prompts[0], 120),)


def test_a_film_that_returns_changes_every_ten_seconds_at_the_nearest_chunk(config: Config) -> None:
    case, backbone = draw_case(1, 0), build_backbone(config)
    first, second = case.prompts
    shots = plan_shots(case, 35)
    assert shots == (Shot(first, 10), Shot(second, 10), Shot(first, 10), Shot(second, 5))
    schedule = find_schedule(shots, build_plan(shots, 35, 16, backbone), backbone)
    begins = [9 + 12 * (round(16 * at / 12) - 1) for at in (10, 20, 30)]  # a chunk of 9 video frames, then of 12
    assert schedule == [(begin, parse(shot.prompt).words) for begin, shot in zip([0, *begins], shots, strict=True)]
    assert max(abs(begin - 16 * at) for begin, at in zip(begins, (10, 20, 30), strict=True)) <= 7
    assert plan_shots(case, 5) == (Shot(first, 5),)


def test_values_are_those_of_the_judge_on_a_film_made_alone(config: Config, result: LengthResult) -> None:
    case = result.cases[0]
    for place, setup in enumerate(NAMES):
        own = build_backbone(config)
        film = Film((Cut(0, Scene(**parse(case.prompts[0]).words)),))
        video = generate(with_setup(config, setup), own, film, case.seed, 2 * FPS)
        scores = score(read_frames(video), parse(case.prompts[0]).words)
        for number, measure in enumerate(MEASURES):
            seconds = getattr(scores, measure)
            assert len(seconds) == 2
            known = seconds[np.isfinite(seconds)]
            expected = [seconds[0], known.mean() if len(known) else np.nan]
            assert result.values[0, place, number] == pytest.approx(expected, abs=2e-5, nan_ok=True)


def test_the_result_says_under_what_it_was_found(config: Config, result: LengthResult) -> None:
    assert result.values.shape == (2, 2, len(MEASURES), 2)
    assert (result.setups, result.lengths) == (tuple(NAMES), LENGTHS)
    assert set(result.fingerprints) == set(NAMES)
    assert len(set(result.fingerprints.values())) == 2
    assert (result.environment["threads"], result.environment["workers"]) == (1, 1)
    assert result.config["bench"]["videos"] == 2


def test_lengths_beyond_the_duration_are_left_out(config: Config) -> None:
    for seconds, lengths in ((5, (5,)), (59.9, (5, 15, 30)), (600, (5, 15, 30, 60, 120))):
        assert choose_lengths(with_bench(config, seconds=seconds)) == lengths


@pytest.mark.parametrize(
    ("section", "changes", "told"),
    [
        ("model", {"name": "wan"}, "judges the model 'tiny' at 64x64, not 'wan'"),
        ("model", {"size": "128x128"}, "not 'tiny' at 128x128"),
        ("bench", {"prompts": "p.txt"}, "draws its own prompts"),
        ("bench", {"random_weights": True}, "takes the model's own weights and decoder"),
        ("bench", {"decoders": ["own", "taehv"]}, "takes the model's own weights and decoder"),
        ("bench", {"seconds": 4.0}, "the shortest length is 5s, bench.seconds is 4"),
        ("bench", {"setups": ["sink", "sink"]}, "names sink, sink"),
        ("video", {"fps": 8}, "16 frames a second, video.fps is 8"),
    ],
)
def test_what_does_not_go_with_the_experiment_is_refused(
    config: Config, section: str, changes: dict[str, object], told: str
) -> None:
    config = with_bench(config, seconds=5.0)
    with pytest.raises(ConfigError, match=told):
        length.run(replace(config, **{section: replace(getattr(config, section), **changes)}), untold)


def test_the_suite_has_defaults_of_its_own_and_explicit_settings_win() -> None:
    bench = load_config(overrides=["bench.suite=tiny-length"]).bench
    assert (bench.setups, bench.seconds, bench.videos) == ([s for s in SETUPS if "hf-" not in s], 120.0, 64)
    assert load_config(overrides=["bench.seconds=30", "bench.suite=tiny-length"]).bench.seconds == 30.0
    assert load_config().bench == BenchConfig()


# Notes


def test_a_file_of_somebody_else_is_not_written_to(tmp_path: Path) -> None:
    notes = tmp_path / "n.json.part.jsonl"
    for data in (b"my own notes\n", b"\n\nmy own\n", bytes(range(128, 255))):
        notes.write_bytes(data)
        with pytest.raises(OutputError, match="is no file of notes"), length.Notes(notes, []):
            pass
        assert notes.read_bytes() == data


def test_a_torn_file_is_taken_up_where_it_ended(
    config: Config, result: LengthResult, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "length.json"
    notes = notes_path(output)
    told: list[BenchProgress] = []
    assert same(length.run(config, told.append, output, LENGTHS), result)
    assert [(p.done, p.total, p.label) for p in told] == [(n, 4, "videos") for n in (1, 2, 3, 4)]
    lines = notes.read_bytes().splitlines(keepends=True)
    assert [(json.loads(line)["video"], json.loads(line)["setup"]) for line in lines] == [
        (video, setup) for video in (0, 1) for setup in NAMES
    ]
    foreign = lines[2].replace(result.fingerprints["window"].encode(), b"0" * 64)
    notes.write_bytes(b"".join([foreign, lines[3], lines[0], lines[1][: len(lines[1]) // 2]]))
    told.clear()
    with caplog.at_level(logging.WARNING, "hforce.length"):
        assert same(length.run(config, told.append, output, LENGTHS), result)
    assert [(p.done, p.total, p.setup) for p in told] == [(3, 4, "head-forcing"), (4, 4, "window")]
    assert notes.read_bytes().splitlines(keepends=True)[4:] == [lines[1], lines[2]]
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "torn lines left out: 1",
        "lines of other settings, models or lengths left out: 1",
    ]
    told.clear()
    assert same(length.run(config, told.append, output, LENGTHS), result)
    assert told == []


def test_notes_of_another_run_are_not_taken(config: Config, tmp_path: Path) -> None:
    output, counts = tmp_path / "length.json", []
    window = with_bench(config, setups=["window"], seconds=1.0)
    for changed in (
        window,
        with_bench(window, seed=6),
        replace(window, sample=replace(config.sample, steps=[1000])),
        with_bench(window, seconds=2.0),
        with_bench(window, setups=["sink"]),
        with_bench(window, videos=3),
        with_bench(window, workers=0, setups=["sink", "window"]),
    ):
        told: list[BenchProgress] = []
        length.run(changed, told.append, output, LENGTHS)
        counts.append(len(told))
    assert counts == [2, 2, 2, 2, 2, 1, 0]


def test_a_fingerprint_changes_with_whatever_changes_the_videos(config: Config, tmp_path: Path) -> None:
    tiny = small_tiny()
    tiny.codec.decoder[-1].bias.data.add_(1)
    tiny.save(tmp_path / "other.safetensors")
    cache, backbone = config.cache, build_backbone(config)
    base = fingerprint_of(config, backbone)
    others = [
        replace(config, model=replace(config.model, checkpoint=str(tmp_path / "other.safetensors"))),
        with_setup(config, "window"),
        replace(config, cache=replace(cache, roles="inverse")),
        replace(config, cache=replace(cache, memory=replace(cache.memory, options={"episodes": 2}))),
        replace(config, cache=replace(cache, switch="keep")),
        replace(config, sample=replace(config.sample, shift=3.0)),
        with_bench(config, seed=1),
    ]
    assert len({base, *(fingerprint_of(other, backbone) for other in others)}) == 1 + len(others)
    for changes in ({"workers": 7}, {"videos": 9}, {"seconds": 60.0}, {"setups": ["sink"]}):
        assert fingerprint_of(with_bench(config, **changes), backbone) == base


def test_notes_that_cannot_be_written_stop_before_the_first_video(config: Config, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="part.jsonl"):
        length.run(config, pytest.fail, tmp_path / "nowhere" / "length.json", LENGTHS)


# Processes


@pytest.mark.parametrize("chunk", [None, 1])
def test_a_worker_makes_what_this_process_makes(config: Config, chunk: int | None) -> None:
    config = replace(config, sample=SampleConfig(chunk=chunk, steps=[1000]))
    task = Task(draw_case(1, 5), "window", config, 1, "f")
    assert make_apart(task) == make(task, build_backbone(config))


def test_an_error_in_a_worker_is_the_error_and_names_its_video(config: Config, tmp_path: Path) -> None:
    tiny = small_tiny()
    tiny.words.weight.data.fill_(3e38)
    tiny.save(tmp_path / "loud.safetensors", torch.float32)
    loud = replace(config, model=replace(config.model, checkpoint=str(tmp_path / "loud.safetensors")))
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"video [01], setup '[\w-]+': chunk 0 holds values that are not finite"):
            length.run(with_bench(loud, workers=workers, setups=["window"]), untold, lengths=LENGTHS)


@pytest.mark.slow
def test_a_stopped_run_in_several_processes_keeps_what_is_done(config: Config, tmp_path: Path) -> None:
    output = tmp_path / "length.json"
    line = [sys.executable, "-m", "hforce.cli", "-q", "bench", *settings(config), "-d", "5s", "--json", str(output)]
    line += ["--set", "bench.videos=300", "--set", "bench.workers=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)  # fmt: skip
    while not (notes_path(output).exists() and notes_path(output).read_bytes().count(b"\n") >= 3):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    out, err = process.communicate(timeout=100)  # the 600 videos would take minutes
    told = ["hforce: error: stopped by signal SIGINT", "  hint: run the same command again"]
    assert err.decode().splitlines() == told  # and nothing of the workers
    assert (process.returncode, out) == (130, b"")
    two = with_bench(config, seconds=5.0)
    made: list[BenchProgress] = []
    again, alone = length.run(two, made.append, output, (5,)), length.run(two, untold, lengths=(5,))
    assert len(made) < 4
    assert same(again, alone)


# The command


def test_the_command_shows_tables_and_writes_files(command, config: Config, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = ["-d", "5s", "--set", "bench.videos=2", "--set", "bench.workers=1"]
    done = command("bench", *settings(config), *options, "--json", "length.json", "--plot", "length.png")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-2:] == ["length.json", "length.png"]
    assert all(f"{kind}: {told}; 1 video\n" in done.out for kind, told in FILMS.items())
    assert (tmp_path / "length.png").read_bytes().startswith(b"\x89PNG")
    assert "benchmark: 4/4 videos" in done.err
    document = json.loads((tmp_path / "length.json").read_text())
    assert (document["kind"], document["lengths"], len(document["videos"])) == ("hforce.length/1", [5], 2)
    assert len((tmp_path / "length.json.part.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--suite", "tiny-lenght"], "--suite: unknown 'tiny-lenght' (did you mean 'tiny-length'?); known are tiny"),
        (["--suite", "tiny-length", "-m", "wan"], "judges the model 'tiny' at 64x64, not 'wan'"),
        (["--suite", "tiny-length", "-f", "prompts.txt"], "draws its own prompts"),
        (["--suite", "tiny-length", "-d", "2s"], "the shortest length is 5s"),
        (["--suite", "tiny-length", "--set", "bench.videos=1"], "bench.videos: 1 is outside 2 to 1000 videos"),
        (["--suite", "tiny-length", "--set", "bench.workers=-1"], "bench.workers: -1 is outside 0 to 1024 processes"),
    ],
)
def test_a_command_that_cannot_be_meant_is_refused(command, options: list[str], told: str) -> None:
    command("bench", *options).fails(2, told)


def test_a_wrong_model_in_a_file_is_the_files_fault(command, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {name: wan}\nbench: {suite: tiny-length}\n")
    command("bench", "-c", "run.yaml").fails(78, "judges the model 'tiny'")
