"""The bench measures without changing what is made, and its numbers agree with one another."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from rich.console import Console
from tests.builders import close, profile_of, small_tiny

from hforce import bench
from hforce.bench import BenchProgress, choose_setups, enter, plan_course, race, share_backbones, take_turns
from hforce.bench_report import DEFINITIONS, KIND, BenchResult, Sample, Trial, choose_reference, make_rows
from hforce.build import build_backbone, build_script, build_stream
from hforce.cache.roles import save_profile
from hforce.config import with_setup
from hforce.errors import ConfigError, DataError, InterruptedRun, OutputError, UnavailableError
from hforce.models.dit import Block
from hforce.prompts import Item, Shot
from hforce.settings import EAGER, BenchConfig, CacheConfig, Config, ModelConfig
from hforce.toy.film import Cut, Film, render_film
from hforce.toy.metrics import Edges, drift, read_frames
from hforce.toy.world import FPS, Scene, render
from hforce.weigh import tensor_bytes

PROMPTS = "a slow red circle, circling, on a blue background\na fast cyan square, circling, on a gray background"
CPU = torch.device("cpu")
SETUPS = ["window", "full", "head-forcing"]
CHUNKS = 5  # of three seconds


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Three seconds of two prompts under three setups, on a model with random weights and a made-up profile."""
    folder = tmp_path_factory.mktemp("bench")
    weights, profile, prompts = folder / "tiny.safetensors", folder / "heads.json", folder / "prompts.txt"
    small_tiny().save(weights)
    prompts.write_text(PROMPTS)
    model = ModelConfig(checkpoint=str(weights), device="cpu", dtype="float32")
    save_profile(profile_of(build_backbone(Config(model=model)).fingerprint), profile)
    cache = CacheConfig(profile=str(profile))
    plan = BenchConfig(setups=SETUPS, prompts=str(prompts), seconds=3.0, warmup=1)
    return Config(model=model, cache=cache, bench=plan)


@pytest.fixture(scope="module")
def told() -> list[BenchProgress]:
    return []


@pytest.fixture(scope="module")
def result(config: Config, told: list[BenchProgress]) -> BenchResult:
    return bench.run(config, told.append)


def with_bench(config: Config, **changes: object) -> Config:
    return replace(config, bench=replace(config.bench, **changes))


def drawn_table(result: BenchResult, columns: int = 120) -> str:
    console = Console(width=columns)
    with console.capture() as capture:
        console.print(bench.table(result))
    return capture.get()


def trial(seconds: Sequence[float], steady: int = 0, **changes: object) -> Trial:
    """A trial whose chunks take so long; half of that to denoise, a quarter each to commit and decode."""
    samples = tuple(
        Sample(i, 12 if i else 9, denoise=s / 2, commit=s / 4, decode=s / 4, whole=s, attend=s / 8, frames_read=21,
               beside={"wan-vae": s})
        for i, s in enumerate(seconds)
    )  # fmt: skip
    made = Trial("a red circle", 0, 144, samples, (), steady, 0.1, 21.0, 1000, 5000, None)
    return replace(made, **changes)


def test_every_setup_plays_every_prompt_and_tells_of_it(result: BenchResult, told: list[BenchProgress]) -> None:
    assert [row.setup for row in result.rows] == SETUPS == list(result.trials)
    assert all([t.prompt for t in trials] == PROMPTS.split("\n") for trials in result.trials.values())
    assert [p.done for p in told] == list(range(1, 2 * len(SETUPS) * CHUNKS + 1))
    assert {p.total for p in told} == {len(told)}


def test_turns_go_forth_and_back(result: BenchResult, told: list[BenchProgress]) -> None:
    first = [p.setup for p in told[: CHUNKS * len(SETUPS)]]
    rounds = [first[i : i + 3] for i in range(0, len(first), 3)]
    assert rounds == [SETUPS, SETUPS[::-1], SETUPS, SETUPS[::-1], SETUPS]  # the last one is weighed


def test_speeds_times_seconds_are_the_frames(result: BenchResult) -> None:
    for row in result.rows:
        fps = []
        for t in result.trials[row.setup]:
            assert [s.number for s in t.samples] == list(range(CHUNKS - 1))
            assert [s.frames for s in t.samples] == [9, 12, 12, 12]
            assert all(s.denoise > 0 and s.commit > 0 and s.denoise + s.commit + s.decode <= s.whole for s in t.samples)
            fps.append([36 / sum(map(time, t.samples[1:])) for time in (
                lambda s: s.denoise + s.commit, lambda s: s.denoise, lambda s: s.whole)])  # fmt: skip
        assert [median(x) for x in zip(*fps, strict=True)] == pytest.approx(
            [row.denoise_fps, row.denoise_only_fps, row.e2e_fps]
        )
        assert row.chunk_ms["p50"] <= row.chunk_ms["p95"] <= row.chunk_ms["p99"]
        assert row.jitter == row.chunk_ms["p99"] / row.chunk_ms["p50"]
        assert row.e2e_fps < row.denoise_fps < row.denoise_only_fps


def test_frames_and_bytes_are_those_of_the_cache(config: Config, result: BenchResult) -> None:
    backbone = build_backbone(config)
    for row in result.rows:
        stats = build_stream(with_setup(config, row.setup), backbone, CHUNKS).cache.stats()
        assert (row.kv_bytes, row.frames_read) == (stats.nbytes, stats.mean_frames)
        assert row.peak_bytes is not None
        assert row.peak_bytes > stats.nbytes + tensor_bytes(backbone.model, backbone.codec)
    window, full, forcing = result.rows
    assert window.frames_read == 21
    assert full.frames_read == 3 * CHUNKS + 3
    assert forcing.frames_read < 21
    assert forcing.kv_bytes < window.kv_bytes


def test_the_bench_makes_the_latents_of_a_plain_stream(config: Config) -> None:
    """Setups in turn share a model or have reordered copies of it; none may notice the others."""
    configs, backbone = choose_setups(config), build_backbone(config)
    course = plan_course(config, backbone, Item(None, (Shot(PROMPTS.split("\n")[0]),)))
    backbones = share_backbones(configs, backbone)
    assert backbones["window"] is backbones["full"] is backbone
    assert backbones["head-forcing"].model is not backbone.model
    entrants = [enter(name, configs[name], backbones[name], course) for name in SETUPS]
    for entrant in entrants:
        entrant.open(CPU)
    made: dict[str, list[torch.Tensor]] = {name: [] for name in SETUPS}
    for entrant, chunk in take_turns(entrants, CHUNKS - 1):
        made[entrant.setup].append(chunk.latents)
    for name in SETUPS:
        own = build_backbone(config)
        stream = build_stream(configs[name], own, CHUNKS, config.bench.seed)
        expected = [chunk.latents for chunk in stream.play(build_script(course.shots, course.plan, own))]
        assert torch.equal(torch.cat(made[name]), torch.cat(expected[:-1])), name
    assert not torch.equal(made["window"][-1], made["head-forcing"][-1])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_setups_make_the_same_latents_and_the_eager_one_compiles_nothing(config: Config) -> None:
    """All blocks, setups and chunks share what the first pass compiled: to compile anything again would fail."""
    compiled = replace(config, model=replace(config.model, compile=True))
    try:
        backbone = build_backbone(compiled)
    except UnavailableError as error:
        pytest.skip(str(error))
    names = ["window", "head-forcing", EAGER]
    configs = choose_setups(with_bench(compiled, setups=names), names)
    course = plan_course(config, backbone, Item(None, (Shot(PROMPTS.split("\n")[0]),)))
    backbones = share_backbones(configs, backbone)
    entrants = [enter(name, configs[name], backbones[name], course) for name in names]
    assert [each._halves[1] is Block.after for each in entrants] == [False, False, True]
    for entrant in entrants:
        entrant.open(CPU)  # weighed, which compiles nothing
    made: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    with ExitStack() as stack:
        for entrant, chunk in take_turns(entrants, CHUNKS - 1):
            made[entrant.setup].append(chunk.latents)
            if made["window"] and not made["head-forcing"]:
                stack.enter_context(torch.compiler.set_stance("fail_on_recompile"))
    for name, plain in zip(names, ("window", "head-forcing", "window"), strict=True):
        own = build_backbone(config)
        stream = build_stream(choose_setups(config)[plain], own, CHUNKS, config.bench.seed)
        expected = [chunk.latents for chunk in stream.play(build_script(course.shots, course.plan, own))]
        close(torch.cat(made[name]), torch.cat(expected[:-1]), 1e-4)


def test_a_bench_that_is_stopped_tells_of_the_prompts_that_were_played(config: Config, result: BenchResult) -> None:
    half = len(config.bench.setups) * CHUNKS

    def stop(progress: BenchProgress) -> None:
        if progress.done == half + 2:
            raise InterruptedRun("stopped", 130)

    found = bench.run(config, stop)
    assert found.stopped and found.stopped.exit_code == 130 and result.stopped is None
    assert [len(own) for own in found.trials.values()] == [1] * len(config.bench.setups)
    assert "1 prompt," in drawn_table(found) and json.loads(bench.to_json(found))["rows"]

    def stop_at_once(progress: BenchProgress) -> None:
        raise InterruptedRun("stopped", 75)

    with pytest.raises(InterruptedRun):
        bench.run(config, stop_at_once)


def test_json_says_what_the_result_says(config: Config, result: BenchResult) -> None:
    document = json.loads(bench.to_json(result))
    assert document["kind"] == KIND
    for row, told_row in zip(result.rows, document["rows"], strict=True):
        assert told_row["setup"] == row.setup
        for key in ("denoise_fps", "e2e_fps", "kv_bytes", "peak_bytes", "chunk_ms", "speed", "growth", "drift"):
            assert told_row[key] == getattr(row, key)
        for t, raw in zip(result.trials[row.setup], document["samples"][row.setup], strict=True):
            assert raw["frames"] == [s.frames for s in t.samples]
            assert raw["chunk_ms"] == pytest.approx([1e3 * s.whole for s in t.samples], abs=1e-4)
    measured = set(document["rows"][0]) - {"setup"}
    assert measured <= set(DEFINITIONS)
    assert document["config"]["bench"]["seconds"] == 3.0
    place = document["environment"]
    assert (place["device"], place["dtype"], place["torch"]) == ("cpu", "float32", torch.__version__)


def test_the_table_fits_120_columns_and_hides_nothing(result: BenchResult) -> None:
    text = drawn_table(result)
    assert max(map(len, text.splitlines())) <= 120
    assert "…" not in text
    for row in result.rows:
        assert f"{row.denoise_fps:.{0 if row.denoise_fps >= 99.95 else 1}f}" in text  # large numbers without decimals
        assert f"{row.speed['window']:.2f}" in text
    assert "Δone" in text


@pytest.mark.parametrize("columns", [72, 80])
def test_on_a_narrow_terminal_the_table_stands_on_end_and_hides_nothing(result: BenchResult, columns: int) -> None:
    text = drawn_table(result, columns)
    assert max(map(len, text.splitlines())) <= columns
    assert "…" not in text
    for row in result.rows:
        (speeds,) = (line for line in text.splitlines() if line.strip().startswith("D vs window"))
        assert f"{row.speed['window']:.2f}" in speeds


def test_the_table_fits_with_the_numbers_of_a_large_model(result: BenchResult) -> None:
    rows = [
        replace(row, frames_read=2406.0, denoise_fps=30.123, chunk_ms={"p50": 123456.7, "p95": 99999.9}, growth=12.3456,
                first_frame_ms=123456.7, kv_bytes=690_000_000_000, peak_bytes=700_000_000_000, drift=None)
        for row in result.rows
    ]  # fmt: skip
    text = drawn_table(replace(result, rows=tuple(rows), reference="head-forcing"))
    assert max(map(len, text.splitlines())) <= 120
    assert "…" not in text
    assert text.count("700000") == 3


def test_a_plot_is_a_picture(result: BenchResult, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "bench.png"
    bench.plot(result, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OutputError):
        bench.plot(result, tmp_path)


def test_without_matplotlib_a_plot_says_what_to_install(
    result: BenchResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnavailableError) as error:
        bench.plot(result, tmp_path / "bench.png")
    assert error.value.mend == 'pip install "hforce[plot]"'


def test_one_setup_alone_is_its_own_reference(config: Config) -> None:
    alone = bench.run(with_bench(config, setups=["sink"], seconds=1.0, warmup=0), lambda _: None)
    (row,) = alone.rows
    assert (alone.reference, row.speed, row.growth) == ("sink", {"sink": 1.0}, None)
    assert len(alone.trials["sink"][0].samples) == 1
    assert "–" in drawn_table(alone)


@pytest.mark.parametrize(
    ("setups", "match"), [(["windw"], "did you mean 'window'"), (["sink", "sink"], "sink, sink"), ([], "nothing")]
)
def test_setups_that_cannot_be_meant_are_refused(config: Config, setups: list[str], match: str) -> None:
    with pytest.raises(ConfigError, match=match) as error:
        bench.run(with_bench(config, setups=setups), lambda _: None)
    assert error.value.mend


def test_a_video_too_short_to_time_is_refused(config: Config) -> None:
    with pytest.raises(ConfigError, match="has 5 chunks; with bench.warmup=4 it takes 6"):
        bench.run(with_bench(config, warmup=4), lambda _: None)


def test_an_error_names_its_setup(config: Config) -> None:
    backbone = build_backbone(config)
    backbone.model.head.head.bias.data.fill_(float("nan"))
    course = plan_course(config, backbone, Item(None, (Shot("red"),)))
    entrant = enter("window", with_setup(config, "window"), backbone, course)
    with pytest.raises(DataError, match="setup 'window': chunk 0 holds values that are not finite"):
        race([entrant], lambda _: None)


def test_every_shot_is_judged_by_its_own_words(config: Config) -> None:
    backbone, sink = build_backbone(config), with_setup(config, "sink")
    course = plan_course(config, backbone, Item("two", (Shot("red", 1.5), Shot("blue")), seed=7, seconds=3.0))
    entrant = enter("sink", sink, backbone, course)
    trials, _ = race([entrant], lambda _: None)
    assert (trials["sink"].prompt, trials["sink"].seed) == ("red | blue", 7)
    assert trials["sink"].drift is not None
    assert entrant.edges is not None
    (begin, red), (switch, blue) = entrant.edges.schedule
    assert (begin, red["color"], blue["color"]) == (0, "red", "blue")
    frames = [sample.frames for sample in trials["sink"].samples]
    assert switch == sum(frames[: course.plan.chunks[0]])


def test_drift_is_judged_at_the_size_of_the_world_only(config: Config, result: BenchResult) -> None:
    assert all(row.drift is not None and "motion_right" in row.drift for row in result.rows)
    backbone = build_backbone(replace(config, model=replace(config.model, size="96x64")))
    course = plan_course(config, backbone, Item(None, (Shot("red"),)))
    assert enter("window", with_setup(config, "window"), backbone, course).edges is None


@pytest.mark.parametrize("motion", ["passing right", "circling"])
def test_edges_hold_all_that_drift_looks_at(motion: str) -> None:
    """In a passing film the object is out of sight where the film was cut, and at its end it is another one."""
    scene = Scene("slow", "red", "circle", "middle", motion, "second", "blue", "striped")
    frames = 24 * FPS + 9
    film = render(scene, frames)
    other = render(replace(scene, ground="green", motion="bouncing sideways", speed="fast"), frames)
    film[20 * FPS :] = other[20 * FPS :]
    film[15 * FPS : 16 * FPS] = 0  # nobody looks there
    edges = Edges(frames)
    for first in [0, *range(9, frames, 12)]:
        edges.look(first, film[first : first + (12 if first else 9)])
    assert len(edges.video) == 17 * FPS + 9
    whole, kept = (drift(read_frames(video), scene) for video in (film, edges.video))
    assert kept == pytest.approx(whole, nan_ok=True, abs=1e-4)  # a cut object is sized by the frames beside it
    assert whole["ground_right"] < -0.7


def test_edges_hold_the_beginning_of_a_scene_to_which_a_film_returns() -> None:
    """The second scene is first seen where no edge is; the last seconds are compared with that, long before."""
    scenes = [
        Scene("slow", color, "circle", "middle", "circling", "first", "blue", "plain") for color in ("red", "cyan")
    ]
    first, second = scenes
    film = Film((Cut(0, first), Cut(201, second), Cut(345, first), Cut(489, second)))
    frames = 40 * FPS + 9
    video = render_film(film, frames)
    forgotten = replace(second, landmark="cross", tint=1.15)
    video[489:] = render(forgotten, frames - 489, 288)
    schedule = [(cut.frame, cut.scene.words) for cut in film.cuts]
    edges = Edges(frames, schedule)
    for begin in [0, *range(9, frames, 12)]:
        edges.look(begin, video[begin : begin + (12 if begin else 9)])
    assert len(edges.video) < 0.7 * frames
    whole, kept = drift(read_frames(video), schedule), drift(read_frames(edges.video), edges.schedule)
    assert kept == pytest.approx(whole, nan_ok=True)
    assert (whole["landmark_kept"], whole["tint_kept"], whole["color_right"]) == (-1, -1, 0)


def test_edges_of_a_short_video_are_the_video() -> None:
    film = np.random.default_rng(0).integers(0, 256, (45, 64, 64, 3), np.uint8)
    edges = Edges(45)
    edges.look(0, film[:9])
    edges.look(9, film[9:])
    assert np.array_equal(edges.video, film)


def test_growth_compares_the_last_ten_chunks_with_those_of_a_young_run_beside_them() -> None:
    aged = trial([9.0] * 30 + [3.0] * 10)
    young = replace(aged, young=trial([2.0] * 10).samples)
    assert make_rows({"full": [young]}, 2, "taehv")[0].growth == 1.5
    assert make_rows({"full": [aged]}, 2, "taehv")[0].growth is None


def test_a_long_race_ends_beside_a_young_run_that_changes_nothing(config: Config) -> None:
    backbone, sink = build_backbone(config), with_setup(config, "sink")
    course = plan_course(config, backbone, Item(None, (Shot("red"),), seconds=24.0))  # 32 chunks
    entrant = enter("sink", sink, backbone, course)
    told: list[str] = []
    trials, _ = race([entrant], lambda who: told.append(who.setup))
    assert len(told) == course.plan.total == len(trials["sink"].samples) + 1
    assert [s.number for s in trials["sink"].samples] == [*range(course.plan.total - 1)]
    assert [s.number for s in trials["sink"].young] == [*range(10, 20)]
    assert entrant.done == course.plan.frames


def test_steady_chunks_are_those_with_full_windows() -> None:
    seconds = [9.0, 1.0, *(float(i) for i in range(11))]
    (row,) = make_rows({"window": [trial(seconds, steady=2)]}, 1, "taehv")
    assert row.chunk_ms == pytest.approx({"p50": 5000.0, "p95": 9500.0, "p99": 9900.0})
    assert row.steady_chunks == 11
    (short,) = make_rows({"window": [trial(seconds[:-2], steady=2)]}, 1, "taehv")
    assert short.chunk_ms["p50"] == 1000 * median(seconds[1:-2])


def test_speeds_are_of_steady_chunks() -> None:
    """Before windows are full, chunks are cheap and would flatter."""
    (row,) = make_rows({"window": [trial([1.0] * 7 + [2.0] * 30, steady=7)]}, 1, "taehv")
    assert (row.denoise_only_fps, row.denoise_fps, row.e2e_fps) == (12 / 1.0, 12 / 1.5, 12 / 2.0)
    assert row.steady_chunks == 30


def test_every_decoder_has_a_speed_of_its_own() -> None:
    """What the other decoder takes instead is added to what is left without the first."""
    (row,) = make_rows({"window": [trial([4.0] * 12)]}, 1, "taehv")
    assert row.decoders == {"taehv": {"ms": 1000, "e2e_fps": 12 / 4}, "wan-vae": {"ms": 4000, "e2e_fps": 12 / 7}}


def test_speed_is_paired_by_prompt() -> None:
    """A machine that slows down in the second prompt slows all setups."""
    trials = {"sink": [trial([1.0] * 4), trial([4.0] * 4)], "window": [trial([2.0] * 4), trial([8.0] * 4)]}
    rows = make_rows(trials, 1, "taehv")
    assert rows[0].speed == {"sink": 1.0, "window": 2.0}
    assert rows[0].denoise_fps == median([12 / 0.75, 12 / 3.0])
    assert rows[0].spread == pytest.approx((16 - 4) / 10)
    assert choose_reference(["sink", "window"]) == "window"


def test_drift_is_the_mean_of_the_prompts_that_have_it() -> None:
    nan = float("nan")
    drifts: list[dict[str, float]] = [{"hue": 1.0, "mark": nan}, {"hue": 2.0, "mark": nan}]
    (row,) = make_rows({"sink": [trial([1.0] * 4, drift=d) for d in drifts]}, 1, "taehv")
    assert row.drift == {"hue": 1.5, "mark": None}
