"""What many tests share: settings, a tiny model of random weights, and the command line run in this process."""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import settings
from torch import nn

from hforce import cli
from hforce.cache import roles
from hforce.models.tiny import TinyModel
from hforce.models.weights import fingerprint

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels are then run in numpy; has to be known before they are imported

settings.register_profile("hforce", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("hforce")


@pytest.fixture(scope="session")
def random_tiny() -> TinyModel:
    """A tiny model that was never trained, but paints a colourful picture. It is shared: change a copy."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny = TinyModel()
        nn.init.normal_(tiny.dit.head.head.weight, std=0.05)
        last = tiny.codec.decoder[-1]
        nn.init.normal_(last.weight, std=0.5)
        nn.init.constant_(last.bias, 0.5)
    return tiny.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def weights(random_tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its file."""
    path = tmp_path_factory.mktemp("model") / "random.safetensors"
    random_tiny.save(path)
    return path


@pytest.fixture(scope="session")
def heads(weights: Path) -> Path:
    """A head profile for it, with drawn roles."""
    path = weights.with_name("heads.json")
    roles.save_profile(random_profile(TinyModel.load(weights)), path)
    return path


def random_profile(tiny: TinyModel, seed: int = 0) -> roles.Profile:
    """A profile of the model in which every head has attention masses drawn at random, and the roles they give."""
    config, draw = tiny.dit.config, random.Random(seed)
    sink, current = ([[draw.random() / 2 for _ in range(config.heads)] for _ in range(config.layers)] for _ in "ab")
    role_map, margin = roles.label(sink, current), roles.margins(sink, current)

    def record(layer: int, head: int) -> roles.HeadRecord:
        masses = {"sink_mass": sink[layer][head], "current_mass": current[layer][head], "middle_mass": 0.0}
        stats = roles.HeadStats(**masses, last4_mass=0.0, sd_sink=0.0, sd_current=0.0, n=1)
        role = role_map.at(layer, head)
        return roles.HeadRecord(layer=layer, head=head, role=role, margin=margin[layer][head], vote=1.0, stats=stats)

    return roles.Profile(
        created_at="2026-01-02T03:04:05Z",
        generator={},
        model=roles.ProfiledModel(
            id="random", arch="tiny", num_layers=config.layers, num_heads=config.heads, head_dim=config.head_dim,
            tokens_per_frame=16, frames_per_chunk=3, fingerprint=roles.Fingerprint(value=fingerprint(tiny.dit)),
        ),
        calibration=roles.Calibration(
            num_prompts=1, prompts_sha256="", prompts=("none",), seeds=(0,), num_frames=21, size=(64, 64),
            timesteps=(1000.0,), dtype="float32", device="cpu", attention="sdpa", mode="native21", policy="full",
            chunks=(6,), query_stride=1,
        ),
        method=roles.Method(
            threshold="quantile", thresholds=roles.Thresholds(anchor=0.25, local=0.2), sink_frames=1, min_vote=0.0
        ),
        heads=tuple(record(layer, head) for layer in range(config.layers) for head in range(config.heads)),
        summary=roles.Summary(counts=role_map.counts(), split_half_agreement=1.0),
    )  # fmt: skip


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    def fails(self, code: int, *told: str) -> None:
        """It ended with this code and a message of hforce's that says all this; standard output stayed empty."""
        assert self.code == code, self.err
        assert self.out == ""
        assert self.err.startswith("hforce: error: ")
        assert [text for text in told if text not in self.err] == []


Command = Callable[..., Done]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Command]:
    """Runs the command line in this process, in an empty folder; expected failures must never show a traceback."""
    monkeypatch.chdir(tmp_path)
    root, own = logging.getLogger(), logging.getLogger("hforce")
    before = root.handlers[:], root.level, own.level

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["hforce", *map(str, arguments)])
        code = cli._run()
        done = Done(code, *capsys.readouterr())
        assert "Traceback" not in done.err
        return done

    yield run
    root.handlers[:] = before[0]
    root.setLevel(before[1])  # not .level: what loggers remember of it would stay
    own.setLevel(before[2])


@pytest.fixture
def generate(command: Command, weights: Path, heads: Path) -> Command:
    """`hforce generate` with the random model: a second, in one denoising step."""
    own = ("-m", weights, "--profile", heads, "--upscale", "1", "--set", "sample.steps=[1000]")

    def run(*arguments: object) -> Done:
        length = () if "--frames" in arguments and "-d" not in arguments else ("-d", "1s")
        return command("generate", *own, *length, *arguments)

    return run
