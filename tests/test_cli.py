"""The command line as people and scripts meet it: results, messages, exit codes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import pytest
import yaml
from safetensors.torch import load_file, save_file

import hforce
from hforce.models.weights import read_safetensors
from hforce.settings import SETUPS

PROMPT = "a red circle bouncing sideways on a green striped background"
ROOT = Path(__file__).parents[1]


def frames_of(path: Path) -> int:
    """Frames that PyAV can decode."""
    with av.open(path) as container:
        return sum(1 for _ in container.decode(video=0))


# Help, version, settings


def test_without_arguments_it_helps_and_fails(command):
    bare, asked = command(), command("--help")
    assert (bare.code, asked.code) == (2, 0)
    assert bare.out == asked.out
    assert bare.err == asked.err == ""
    assert [name in asked.out for name in ("generate", "profile", "bench", "--version")] == [True] * 4


@pytest.mark.parametrize("name", ["generate", "profile", "bench"])
def test_every_command_explains_itself_with_an_example_within_80_columns(command, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = command(name, "-h")
    assert done.code == 0
    assert f"Example: hforce {name} " in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    assert "<" not in done.out  # no Python types


def test_the_version_is_told(command):
    assert command("--version") == (0, f"hforce {hforce.__version__}\n", "")


def test_the_printed_configuration_is_one_that_can_be_read(generate, tmp_path):
    options = ("--seed", 7, "--size", "128x128", "--policy", "sink", "--roles", "uniform", "--print-config")
    first = generate(*options)
    (tmp_path / "run.yaml").write_text(first.out)
    settings = yaml.safe_load(first.out)
    assert (settings["sample"]["seed"], settings["model"]["size"]) == (7, "128x128")
    assert (settings["cache"]["setup"], settings["video"]["upscale"]) == ("sink", 1)
    again = generate("-c", "run.yaml", "--print-config")
    assert (first.code, again.code) == (0, 0)
    assert again.out == first.out


def test_frames_are_a_length_too(command):
    told = yaml.safe_load(command("generate", "--frames", "81", "--set", "video.fps=8", "--print-config").out)
    assert told["video"]["seconds"] == 81 / 8


# Making videos


def test_results_are_paths_on_standard_output_and_nothing_else(generate, tmp_path):
    done = generate("-p", PROMPT, "-p", "a blue square", "-o", "out")
    assert done.code == 0
    names = [f"out/{folder}" for name in (f"{PROMPT}-0", "a blue square-1")
             for folder in (f"videos/{name}.mp4", f"previews/{name}.png")]
    assert done.out.splitlines() == names
    assert all((tmp_path / name).is_file() for name in names)
    assert [frames_of(tmp_path / name) for name in names[::2]] == [21, 21]
    assert len(done.err.splitlines()) == 2  # where no terminal is, a line for each
    assert all("21/21 frames" in line for line in done.err.splitlines())


@pytest.mark.parametrize("place", ["before", "after"])
def test_quiet_is_quiet_before_and_after_the_command(command, weights, heads, place):
    rest = ["generate", "-m", weights, "--profile", heads, "-p", "a red zebra", "-d", "0.1s", "-o", "a.mp4"]
    done = command(*(["-q", *rest] if place == "before" else [*rest, "-q"]))
    assert done == (0, "a.mp4\na.png\n", "")


def test_length_seed_size_and_enlargement(generate, tmp_path):
    options = ("--seed", 5, "--size", "128x128", "--upscale", 2, "-o", "a.mp4")
    done = generate("-p", PROMPT, "--frames", "22", *options)
    assert done.code == 0
    with av.open(tmp_path / "a.mp4") as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.frames, stream.average_rate) == (256, 256, 33, 16)
    told = json.loads((tmp_path / "a.mp4.json").read_text())
    assert (told["seed"], told["size"], told["frames"]) == (5, [128, 128], 33)


@pytest.mark.parametrize("policy", [setup for setup in SETUPS if not setup.startswith("hf-")])
def test_every_policy_has_a_flag(generate, tmp_path, policy):
    assert generate("-p", PROMPT, "-d", "2s", "--policy", policy, "-o", "a.mp4").code == 0
    assert json.loads((tmp_path / "a.mp4.json").read_text())["cache"]["setup"] == policy
    assert frames_of(tmp_path / "a.mp4") == 33


def test_prompts_come_from_a_file_or_from_standard_input(generate, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_bytes("\ufeffa red circle\r\n\r\na blue square".encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a red circle\na blue square\n")))
    from_file, piped = generate("-f", "p.txt", "-o", "one"), generate("-f", "-", "-o", "two")
    assert from_file.code == piped.code == 0
    names = sorted(path.name for path in (tmp_path / "one" / "videos").iterdir())
    assert names == ["a blue square-1.mp4", "a red circle-0.mp4"]
    for name in names:
        assert (tmp_path / "one/videos" / name).read_bytes() == (tmp_path / "two/videos" / name).read_bytes()


def test_the_same_command_again_does_nothing(generate, tmp_path):
    first = generate("-p", PROMPT, "-o", "out")
    again = generate("-p", PROMPT, "-o", "out")
    assert (again.code, again.out) == (0, first.out)
    assert "was there already" in again.err
    generate("-p", PROMPT, "-o", "out", "--seed", 1).fails(73, "exists", "--on-exists overwrite")
    generate("-p", PROMPT, "-o", "out", "--on-exists", "error").fails(73, "exists")
    assert generate("-p", PROMPT, "-o", "out", "--seed", 1, "--on-exists", "overwrite").code == 0


def test_unknown_words_are_named_with_those_that_are_known(generate):
    done = generate("-p", "a red \x1b[31m zebra [/bold] <b>", "-o", "out")
    assert done.code == 0
    assert "the tiny model does not know: 31m, zebra, bold, b. It knows" in done.err
    assert "motion: bouncing sideways, bouncing up and down" in done.err
    assert "\x1b" not in done.out + done.err


def test_a_list_of_which_some_fail_ends_with_1(generate, weights, tmp_path):
    state = {name: value.float() for name, value in load_file(weights).items()}
    state["words.weight"][2] = 3e38  # the first colour, red
    save_file(state, tmp_path / "loud.safetensors", read_safetensors(weights)[1])
    done = generate("-m", "loud.safetensors", "-p", "a red circle", "-p", "a blue square", "-o", "out")
    assert done.code == 1
    assert done.out.splitlines()[0] == "out/videos/a blue square-1.mp4"
    assert "a red circle-0.mp4: chunk 0 holds values that are not finite" in done.err
    assert "1 of 2 videos failed" in done.err


@pytest.mark.parametrize("verb", [("profile", "-o"), ("profile", "--plot"), ("bench", "--json"), ("bench", "--plot")])
def test_results_replace_neither_what_is_read_nor_what_is_not_ours(command, tmp_path, verb):
    prompts = tmp_path / "prompts.png"
    (tmp_path / "p.txt").write_text("a red circle\na blue square")
    prompts.write_text("a red circle\na blue square")
    (tmp_path / "link.png").symlink_to("p.txt")
    command(verb[0], "-f", "p.txt", verb[1], "link.png").fails(73, "is read or written by the same command")
    command(verb[0], "-f", "p.txt", verb[1], prompts).fails(73, "exists, and is no profile, table or plot of hforce")
    assert prompts.read_text() == "a red circle\na blue square"


def test_moments_are_counted_in_the_chunks_that_are_set(generate, tmp_path):
    schedule = [{"at": "0s", "prompt": "a red circle"}, {"at": "4c", "prompt": "a blue square"}]
    (tmp_path / "p.jsonl").write_text(json.dumps({"duration": "2s", "schedule": schedule}))
    assert generate("-f", "p.jsonl", "--set", "sample.chunk=1", "-o", "a.mp4").code == 0
    schedule = json.loads((tmp_path / "a.mp4.json").read_text())["schedule"]
    assert [shot["chunk"] for shot in schedule] == [0, 4]


def test_a_file_of_prompts_that_has_no_name_is_not_the_demo(generate):
    generate("-f", "", "--dry-run").fails(2, "--prompt-file is empty")


def test_an_empty_value_is_that_of_an_unset_variable(command, tmp_path):
    command("generate", "-p", "red", "--init-image", "").fails(2, "--init-image is empty")
    command("bench", "--setups", "").fails(2, "--setups is empty")
    command("generate", "-p", "red", "-o", "").fails(2, "--output is empty")
    command("generate", "-p", "red", "-c", "").fails(2, "--config is empty")
    command("bench", "--json=").fails(2, "--json is empty")


def test_options_that_would_do_nothing_are_refused(command):
    command("bench", "--kernels", "-d", "3h").fails(2, "--duration does nothing beside --kernels")
    command("profile", "--show", "x.json", "--compare").fails(2, "--compare does nothing beside --show")


def test_a_dry_run_tells_what_the_run_would_say_of_prompts_and_places(generate, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a red circle on mars", "seed": 7}\n{"prompt": "a blue square"}\n')
    done = generate("-f", "p.jsonl", "--dry-run", "-o", "new/out")
    assert (done.code, (tmp_path / "new").exists()) == (0, False)
    assert "does not know: mars" in done.err
    first, second = (line for line in done.out.splitlines() if line.startswith("output"))
    assert first.endswith("chunks to make, seed 7") and "seed" not in second
    generate("-p", "xyzzy", "--dry-run").fails(65, "knows no word of the prompt 'xyzzy'")
    (tmp_path / "file").write_text("")
    generate("-p", "red", "-o", "file/a.mp4", "--dry-run").fails(73, "cannot create")


def test_what_is_there_already_needs_no_memory(generate):
    options = ("-p", PROMPT, "-o", "a.mp4", "--set", "model.memory_limit=1MiB")
    assert generate(*options, "--dry-run").code == 71
    assert generate(*options[:4]).code == 0
    done = generate(*options, "--dry-run")
    assert (done.code, "it does not fit" in done.out) == (0, False)


def test_a_dry_run_is_refused_where_the_run_would_be(generate, tmp_path):
    (tmp_path / "a.mp4").write_text("precious")
    generate("-p", PROMPT, "-o", "a.mp4", "--dry-run").fails(73, "exists and was not made by this very command")
    assert generate("-p", PROMPT, "-o", "b.mp4").code == 0
    assert "b.mp4: 21 video frames" in generate("-p", PROMPT, "-o", "b.mp4", "--dry-run").out
    assert "; there already" in generate("-p", PROMPT, "-o", "b.mp4", "--dry-run").out


# In a process of its own


def start(*arguments: object, **options: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "hforce.cli", *map(str, arguments)]
    return subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, **{"stdout": subprocess.PIPE, **options})


def test_a_stopped_run_keeps_what_it_made(weights, heads, tmp_path):
    signals = {signal.SIGTERM: 75, signal.SIGINT: 130}
    options = ["-m", weights, "--profile", heads, "--upscale", 1, "-p", "a red circle", "-p", "a blue square"]
    options += ["--set", "sample.steps=[1000]", "--set", "video.preset=ultrafast"]
    running = {number: start("generate", *options, "-o", tmp_path / number.name) for number in signals}
    for number, process in running.items():
        part = tmp_path / number.name / "work" / "a red circle-0.part.mp4"
        while not (part.exists() and part.stat().st_size > 2000):  # some seconds of video have been encoded
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
    for number, process in running.items():
        out, err = process.communicate(timeout=60)
        part = tmp_path / number.name / "work" / "a red circle-0.part.mp4"
        told = f"hforce: error: stopped by signal {number.name}; what was made until then is in {part}"
        assert err.decode().splitlines()[-2:] == [told, "  hint: run the same command again"]
        assert process.returncode == signals[number]
        assert out == b""
        assert frames_of(part) > 9
        assert not list((tmp_path / number.name / "videos").iterdir())
        assert not list((tmp_path / number.name / "meta").iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_benchmark_says_so_with_the_code_of_the_signal(weights, heads, tmp_path, number):
    options = ("-m", weights, "--set", f"cache.profile={heads}", "--setups", "window", "-d", "24h")
    process = start("bench", *options, "--json", tmp_path / "b.json")
    while b"benchmark" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGTERM: 75, signal.SIGINT: 130}[number]
    assert (err.decode().splitlines()[-1], out) == ("  hint: run the same command again", b"")
    assert f"stopped by signal {number.name}" in err.decode()


@pytest.fixture(params=["", "1"], ids=["buffered", "unbuffered"])
def buffering(request, monkeypatch):
    """What is written waits for a flush, which Python tries once more as it ends, or is written at once."""
    monkeypatch.setenv("PYTHONUNBUFFERED", request.param)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that is always full")
@pytest.mark.parametrize("streams", ["2>/dev/full", "2>&-", ">&- 2>&- <&-"])
def test_messages_that_cannot_be_written_cost_no_video(weights, heads, tmp_path, streams):
    """Nor do streams that a daemon has closed, whose numbers the files of a video would get."""
    prompts = ("-p", "a red circle", "-p", "a blue square")
    options = ["-m", weights, "--profile", heads, "--upscale", 1, "-d", "1s", *prompts]
    line = [sys.executable, "-m", "hforce.cli", "generate", *options, "-o", tmp_path / "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    shell = ["sh", "-c", f'exec "$@" {streams}', "sh", *map(str, line)]
    assert subprocess.run(shell, env=environment, check=False, timeout=100).returncode == 0
    assert [frames_of(path) for path in (tmp_path / "out" / "videos").iterdir()] == [21, 21]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that is always full")
def test_the_numbers_of_a_bench_are_written_though_its_table_cannot_be(weights, heads, tmp_path):
    options = ("-m", weights, "--set", f"cache.profile={heads}", "--setups", "window", "-d", "3s")
    with Path("/dev/full").open("wb") as full:
        process = start("bench", *options, "--json", tmp_path / "b.json", stdout=full.fileno())
        told = process.communicate(timeout=100)[1].decode()
    assert process.returncode == 74, told
    assert json.loads((tmp_path / "b.json").read_text())["rows"][0]["setup"] == "window"


def test_two_processes_share_a_list(weights, heads, tmp_path):
    """Each makes what the other has not begun, waits for what it has, and both tell of all videos."""
    (tmp_path / "p.txt").write_text("".join(f"a red circle {number}\n" for number in range(4)))
    options = ["-m", weights, "--profile", heads, "--upscale", 1, "-d", "4s", "-f", tmp_path / "p.txt"]
    both = [start("generate", *options, "-o", tmp_path / "out") for _ in range(2)]
    told = [process.communicate(timeout=100) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    videos = sorted(str(path) for path in (tmp_path / "out" / "videos").iterdir())
    assert len(videos) == 4
    for out, _ in told:
        assert sorted(line for line in out.decode().splitlines() if line.endswith(".mp4")) == videos


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that is always full")
def test_an_output_that_is_full_is_told(buffering):
    with Path("/dev/full").open("wb") as full:
        process = start("generate", "--print-config", stdout=full.fileno())
        told = process.communicate()[1].decode()
    assert told.splitlines() == ["hforce: error: writing to standard output failed: No space left on device",
                                 "  hint: free some space"]  # fmt: skip
    assert process.returncode == 74


def test_a_reader_that_goes_away_is_no_error(buffering):
    reading, writing = os.pipe()
    os.close(reading)
    process = start("generate", "--print-config", stdout=writing)
    os.close(writing)
    assert process.communicate() == (None, b"")
    assert process.returncode == 141


def test_a_usage_error_does_not_wait_for_heavy_libraries():
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "hforce.cli", "generate", "--policy", "windw"],
                          capture_output=True, text=True, check=False, cwd=ROOT / "src")
    assert done.returncode == 2
    lines = (line.rpartition("|")[2] for line in done.stderr.splitlines() if "import time:" in line)
    imported = {name.strip().split(".")[0] for name in lines}
    assert "omegaconf" in imported
    assert imported.isdisjoint({"torch", "numpy", "transformers", "diffusers", "matplotlib"})


# The model that comes with hforce


def test_the_demo_runs_as_it_is(command, tmp_path):
    done = command("generate", "-d", "5s", "-o", "out")
    assert done.code == 0
    video, sheet = (tmp_path / line for line in done.out.splitlines())
    assert (frames_of(video), sheet.suffix) == (81, ".png")


def test_head_forcing_and_a_window_differ_on_the_packaged_model(command, tmp_path):
    videos = []
    for policy in ("head-forcing", "window"):
        assert command("generate", "-p", PROMPT, "-d", "8s", "--policy", policy, "-o", f"{policy}.mp4", "-q").code == 0
        videos.append((tmp_path / f"{policy}.mp4").read_bytes())
    assert videos[0] != videos[1]
