"""Everything that can be wrong with a command: its exit code, and a line with a way out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import hforce
from hforce import cli, shell
from hforce.cache.roles import Fingerprint, load_profile, save_profile
from hforce.errors import HforceError
from hforce.ffmpeg import find_ffmpeg
from hforce.models.weights import read_safetensors

PROMPT = "a red circle bouncing sideways on a green striped background"
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("arguments", "code", "told"), [
    (["--policy", "windw"], 2, "--policy: unknown 'windw' (did you mean 'window'?)"),
    (["--roles", "some"], 2, "--roles: unknown 'some'; known are profile, inverse, uniform, random:SEED"),
    (["--seed", "-1"], 2, "--seed: -1 is outside 0 to 9223372036854775807"),
    (["--seed", str(2**63)], 2, "--seed"),
    (["--seed", "abc"], 2, "--seed"),
    (["--upscale", "0"], 2, "--upscale: 0 is outside 1 to 16"),
    (["--size", "833x481"], 2, "the nearest is 832 or 848"),
    (["--size", "0x64"], 2, "multiples of 16"),
    (["--size", "65536x65536"], 2, "from 16 to 4096"),
    (["-d", "10"], 2, "write it with a unit: 30s"),
    (["-d", "nan"], 2, "is not a length of time"),
    (["-d", "25h"], 2, "at most 24h"),
    (["--frames", "0"], 2, "--frames: 0 is outside 1 to"),
    (["--frames", "100000000"], 2, "which is 24 h"),
    (["--frames", "9", "-d", "2s"], 2, "--frames and --duration exclude each other"),
    (["--on-exists", "ask"], 2, "expected skip, overwrite or error"),
    (["--set", "video.fsp=3"], 2, "unknown key 'video.fsp' (did you mean 'video.fps'?)"),
    (["--set", "video.crf=99"], 2, "99 is outside 0 to 51"),
    (["--set", "video.fps=0"], 2, "0 is outside 1 to 240"),
    (["--set", "video.crf"], 2, "expected section.key=value"),
    (["--set", "cache.memory.policy=nope"], 2, "cache.memory: unknown cache policy 'nope'"),
    (["--set", "cache.local.options.window=-1"], 2, "cache.local: policy option 'window' is -1"),
    (["--policy", "full", "--set", "cache.memory.options.frames=3"], 2, "the video comes to at least 4"),
    (["--set", "model.name=[]"], 2, "model.name: expected text"),
    (["--set", "cache.setup=${nope.x}"], 2, "leads nowhere"),
    (["--set", "cache.memory.options.episode=3"], 2, "did you mean 'episodes'?"),
    (["--set", "cache.memory.options.window=40"], 2, "leaves room for 18"),
    (["--device", "cuda:99"], 69, "use --device cpu"),
    (["--device", "gpu"], 2, "--device: unknown 'gpu' (did you mean 'cpu'?); known are auto, cpu,"),
    (["-m", "huge"], 2, "known models: tiny"),
    (["-m", "tny"], 2, "unknown model 'tny' (did you mean 'tiny'?)"),
    (["--revision", "v2"], 2, "revision v2 goes with a name on the hub, not with "),
    (["-m", "missing.safetensors"], 66, "there is no weight file missing.safetensors"),
    (["-m", "."], 66, "no transformer in the folder ."),
    (["--profile", "missing.json"], 66, "missing.json"),
    (["-c", "missing.yaml"], 66, "missing.yaml"),
    (["-p", " "], 2, "is empty"),
    (["-p", "a red \udcff circle"], 2, "is not UTF-8"),
    (["-p", "red", "-f", "p.txt"], 2, "exclude each other"),
    (["-p", "xyzzy"], 65, "for example: a slow red circle bouncing sideways"),
    (["-f", "missing.txt"], 66, "missing.txt"),
    (["-f", "."], 66, "Is a directory"),
    (["--num-frames", "9"], 2, "hforce generate --help"),
    (["-p"], 2, "requires an argument"),
])  # fmt: skip
def test_what_cannot_be_meant_is_one_line_with_a_way_out(generate, arguments, code, told, tmp_path):
    own = [] if "-p" in arguments or "-f" in arguments else ["-p", "red"]
    done = generate(*own, "-o", "out", *arguments)
    done.fails(code, told)
    assert len(done.err.splitlines()) <= 2 or "xyzzy" in arguments
    assert not list(tmp_path.glob("**/*.mp4"))


def test_a_misspelt_command_is_recognised(command):
    command("generat").fails(2, "Did you mean 'generate'?", "hforce --help")


@pytest.mark.parametrize(("name", "data", "told"), [
    ("p.txt", b"", "p.txt: no prompts in it"),
    ("p.txt", b"\n \r\n\n", "p.txt: no prompts in it"),
    ("p.txt", b"a red circle\na \xff\n", "p.txt:2: not UTF-8: byte 15 is 0xff"),
    ("p.txt", "a red circle\n".encode("utf-16"), "it looks like UTF-16"),
    ("p.txt", b"a red \0 circle", "p.txt:1: prompt: NUL character at column 7"),
    ("p.txt", b"a red circle " * 100_000, "1299999 bytes long, at most 1048576 are read"),
    ("p.jsonl", b'{"prompt": "a red circle"}\n{oops\n', "p.jsonl:2: not JSON"),
    ("p.jsonl", b'{"prompt": "red"}\n{"promt": "x"}\n', "p.jsonl:2: unknown key 'promt' (did you mean 'prompt'?)"),
    ("p.jsonl", b'{"prompt": "red", "name": "../../etc/x"}', "is not a file name everywhere"),
    ("p.jsonl", b'{"prompt": "red", "name": "a"}\n{"prompt": "blue", "name": "A"}', "is taken by line 1"),
    ("p.jsonl", b'{"schedule": [{"at": "0s", "prompt": "red"}, {"at": "0s", "prompt": "blue"}]}', "is not after 0s"),
    ("p.jsonl", b'{"schedule": [{"at": "0s", "prompt": "red"}, {"at": "60s", "prompt": "blue"}]}', "the video has 1s"),
    ("p.csv", b"a red circle", "prompt files end in .txt or .jsonl"),
])  # fmt: skip
def test_a_bad_prompt_file_is_told_by_line(generate, tmp_path, name, data, told):
    (tmp_path / name).write_bytes(data)
    generate("-f", name, "-o", "out").fails(65, told)
    assert not list(tmp_path.glob("**/*.mp4"))


def test_several_faults_of_a_file_are_told_together(generate, tmp_path):
    (tmp_path / "p.jsonl").write_text('{oops\n{"prompt": "red"}\n{"prompt": 3}\n')
    generate("-f", "p.jsonl").fails(65, "p.jsonl:1: ", "p.jsonl:3: ")


@pytest.mark.parametrize(("text", "told"), [
    ("video:\n  fsp: 3\n", "run.yaml:2: unknown key 'video.fsp' (did you mean 'video.fps'?)"),
    ("cache:\n  setup: windw\n", "cache.setup: unknown 'windw' (did you mean 'window'?)"),
    ("cache: {memory: {policy: nope}}\n", "unknown cache policy 'nope'"),
    ("model: {name: huge}\n", "known models: tiny"),
    ("video: {crf: high}\n", "expected a whole number, got 'high'"),
    ("model: {name: '${oc.env:HOME}'}\n", "only plain references"),
    ("- a\n- b\n", "run.yaml"),
    ("video:\n\tcrf: 3\n", "run.yaml:2"),
    ("a: &a [x]\nb: !!python/object:os.system {}\n", "run.yaml"),
])  # fmt: skip
def test_a_bad_configuration_file_is_78(generate, tmp_path, text, told):
    (tmp_path / "run.yaml").write_text(text)
    generate("-c", "run.yaml", "-p", "red", "-o", "out").fails(78, told)


@pytest.mark.parametrize("output", ["file", "file/a.mp4", "file/out", "/proc/out", "/proc/a.mp4", "dir.mp4", "link"])
def test_a_place_that_cannot_be_written_is_found_out_first(generate, tmp_path, output):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "dir.mp4").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    done = generate("-p", "red", "-o", output, "-m", "missing.safetensors")
    assert done.code in (73, 77)
    done.fails(done.code, "hint: ")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_profile_of_another_model_is_refused_with_both_fingerprints(generate, heads, tmp_path):
    """A list of several prompts used to end with 1, after failing with each of them."""
    profile = load_profile(heads)
    other = profile.model.model_copy(update={"fingerprint": Fingerprint(value="ab" * 32)})
    save_profile(profile.model_copy(update={"model": other}), tmp_path / "other.json")
    done = generate("-p", "red", "-p", "blue", "--profile", "other.json")
    done.fails(65, profile.model.fingerprint.value[:12], "ab" * 6, "hforce profile")
    assert len(done.err.splitlines()) == 2


@pytest.mark.parametrize(("change", "told"), [
    (lambda p: p["heads"].pop(), "layer 7 head 5 is missing"),
    (lambda p: p["heads"][3].update(role="elder"), "heads[3].role"),
    (lambda p: p["heads"][3]["stats"].update(sink_mass="much"), "heads[3].stats.sink_mass"),
    (lambda p: p.update(schema_version=2), "upgrade hforce"),
    (lambda p: p.update(mood="good"), "mood"),
])  # fmt: skip
def test_a_damaged_profile_is_told_by_its_place(generate, heads, tmp_path, change, told):
    profile = json.loads(heads.read_text())
    change(profile)
    (tmp_path / "bad.json").write_text(json.dumps(profile))
    generate("-p", "red", "--profile", "bad.json").fails(65, told)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "nonsense"])
def test_what_is_no_profile_is_refused(generate, tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    generate("-p", "red", "--profile", "bad.json").fails(65, "bad.json")


def test_an_edited_profile_is_used_with_a_warning(generate, heads, tmp_path):
    profile = json.loads(heads.read_text())
    profile["created_at"] = "2025-01-01T00:00:00Z"
    (tmp_path / "edited.json").write_text(json.dumps(profile))
    done = generate("-p", "red", "--profile", "edited.json", "-o", "a.mp4")
    assert done.code == 0
    assert "was changed after it was measured" in done.err
    generate("-p", "red", "--profile", "edited.json", "--strict", "-o", "b.mp4").fails(65, "was changed", "--strict")
    assert generate("-p", "red", "--strict", "-o", "c.mp4").code == 0


@pytest.mark.parametrize(("damage", "told"), [
    (lambda data: data[: len(data) // 2], "is not a whole safetensors file"),
    (lambda data: data[:100], "download it again"),
    (lambda data: b"", "(0 bytes"),
    (lambda data: (2**62).to_bytes(8, "little") + data[8:], "is not a whole safetensors file"),
    (lambda data: b"version https://git-lfs.github.com/spec/v1\n" * 3, "git lfs pull"),
    (lambda data: b"<!DOCTYPE html><html>" * 9, "web page"),
])  # fmt: skip
def test_damaged_weights_are_refused(generate, weights, tmp_path, damage, told):
    (tmp_path / "bad.safetensors").write_bytes(damage(weights.read_bytes()))
    generate("-p", "red", "-m", "bad.safetensors").fails(65, "bad.safetensors", told)


def test_weights_that_are_no_numbers_are_named(generate, weights, tmp_path):
    state = load_file(weights)
    state["dit.blocks.2.self_attn.v.weight"][3, 4] = float("nan")
    save_file(state, tmp_path / "bad.safetensors", read_safetensors(weights)[1])
    generate("-p", "red", "-m", "bad.safetensors").fails(65, "1 not finite (dit.blocks.2.self_attn.v.weight)")


def test_an_encoder_that_dies_is_74(generate, tmp_path, monkeypatch):
    encodes, dies = 'case "$*" in *pipe:0*)', "head -c 9000 >/dev/null; exit 228;; esac"
    program = tmp_path / "ffmpeg"
    program.write_text(f'#!/bin/sh\n{encodes} {dies}\nexec {find_ffmpeg()} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    generate("-p", "red", "-o", "out").fails(74, "No space left on device", "hint: ")
    assert not list(tmp_path.glob("out/**/*.mp4"))


def test_a_missing_encoder_is_69(generate, tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "none"))
    generate("-p", "red", "-o", "out").fails(69, "cannot run ffmpeg", "IMAGEIO_FFMPEG_EXE")


def test_debug_shows_where_an_error_comes_from(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hforce", "generate", "-m", "missing.safetensors", "-o", "/proc/x", "--debug"])
    assert cli._run() == 73
    assert "Traceback" in capsys.readouterr().err


def test_bugs_are_70_and_want_of_memory_is_71(capsys):
    assert shell.fail_otherwise(KeyError("x")) == HforceError.exit_code == 70
    told = capsys.readouterr().err
    assert told.startswith("KeyError")
    assert f"this is a bug of hforce {hforce.__version__}: KeyError" in told
    assert shell.fail_otherwise(MemoryError()) == 71
    assert shell.fail_otherwise(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")) == 71
    assert capsys.readouterr().err.count("hforce: error: out of memory") == 2


def test_messages_cannot_command_the_terminal(capsys):
    assert shell.fail(HforceError("a \x1b[31m b \u202e c \x07 d\n[/e]")) == 70
    assert capsys.readouterr().err == "hforce: error: a \\x1b[31m b \\u202e c \\x07 d\n[/e]\n"


SETPRIV = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


def as_others() -> list[str] | None:
    """What to begin a command with so that file permissions hold for it; None where there is no way."""
    if os.geteuid() != 0:
        return []
    can = shutil.which("setpriv") and subprocess.run([*SETPRIV, "true"], capture_output=True, check=False)
    return SETPRIV if can and can.returncode == 0 else None


@pytest.mark.parametrize("options", [
    ("-o", "closed/out"), ("-o", "closed/a.mp4"), ("-m", "closed/x.safetensors"), ("-m", "closed/x"),
])  # fmt: skip
def test_what_may_not_be_looked_at_is_said_in_a_line(tmp_path, options):
    if (others := as_others()) is None:
        pytest.skip("everything is permitted to root")
    (tmp_path / "closed").mkdir(mode=0)
    try:
        line = [*others, sys.executable, "-m", "hforce.cli", "generate", "-p", "red", "-d", "1s", *options]
        environment = {**os.environ, "PYTHONPATH": str(Path(hforce.__file__).parents[1])}
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    finally:
        (tmp_path / "closed").chmod(0o700)
    told = done.stderr.splitlines()
    assert (done.returncode, done.stdout, len(told)) == (77, "", 2), done.stderr
    assert told[0].startswith("hforce: error: may not ") and "closed" in told[0]


def test_a_model_whose_name_is_too_long_is_told_of(generate):
    for name in ("x" * 300 + ".safetensors", "./" + "x" * 300):
        generate("-p", "red", "-m", name).fails(66, "")
