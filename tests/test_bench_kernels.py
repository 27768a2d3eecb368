"""`hforce bench --kernels` times the layers it says on the backends there are, and tells of those there are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.attention.ragged import CPU
from tests.conftest import Command

from hforce.attention.backends import BACKENDS, make_backend
from hforce.attention.layout import Backend, LayerView
from hforce.attention.timing import Layer, enter
from hforce.bench_kernels import DEFINITIONS, KIND, choose_entrants, make_row, measure_error

LAYER = Layer(queries=12, tokens=4, head_dim=12, frames=(9, 5))


def test_a_row_divides_what_it_says() -> None:
    window = Layer(12, 4, 12, (21, 21))
    row = make_row((make_backend("sdpa"), torch.bfloat16), (0.002, 0.006), 0.25, LAYER, window)
    assert (row.backend, row.dtype, row.error) == ("sdpa", "bfloat16", 0.25)
    assert (row.cache_ms, row.window_ms) == (2, 6)
    assert row.speedup == pytest.approx(3)
    operations = 2 * 2 * 12 * 12 * 4 * 14  # two products of 12 queries of 12 values with 4 x 14 keys
    assert row.cache_tflops == pytest.approx(operations / 0.002 / 1e12)
    assert row.window_tflops == pytest.approx(operations * 3 / 0.006 / 1e12)  # 42 frames instead of 14


def test_the_error_of_a_backend_that_is_wrong_is_seen() -> None:
    exact = make_backend("sdpa")

    def halved(query: torch.Tensor, view: LayerView) -> torch.Tensor:
        return exact.attend(query, view) / 2

    assert measure_error(enter(exact, LAYER, CPU, torch.float32)) < 1e-5
    assert 1e-4 < measure_error(enter(exact, LAYER, CPU, torch.bfloat16)) < 2e-2
    assert measure_error(enter(Backend("halved", halved), LAYER, CPU, torch.float32)) == pytest.approx(0.5, abs=1e-3)


def test_every_backend_runs_or_is_told_of() -> None:
    entrants, left_out = choose_entrants(CPU, 12)
    assert [(backend.name, dtype) for backend, dtype in entrants] == [
        (name, dtype) for dtype in (torch.float32, torch.bfloat16) for name in ("sdpa", "reference")
    ]
    assert {name for name, _ in left_out} == set(BACKENDS) - {"sdpa", "reference"}
    assert set(left_out.values()) == {("float32", "bfloat16")}
    assert all(reason.startswith("needs ") for _, reason in left_out)


def test_the_command_writes_the_layers_it_timed(command: Command, weights: Path, heads: Path, tmp_path: Path) -> None:
    own = ("-m", weights, "--set", f"cache.profile={heads}", "--set", "model.device=cpu")
    done = command("bench", "--kernels", *own, "--json", "kernels.json")
    assert done.code == 0, done.err
    document = json.loads((tmp_path / "kernels.json").read_text())
    assert document["kind"] == KIND and document["definitions"] == dict(DEFINITIONS)
    cache, window = document["layers"]["cache"], document["layers"]["window"]
    assert window["frames"] == [21] * len(cache["frames"])
    assert set(cache["frames"]) <= {6, 15} and cache["queries"] == 3 * cache["tokens"]
    assert {row["backend"] for row in document["rows"]} == {"sdpa", "reference"}
    assert all(row["error"] < {"float32": 1e-5, "bfloat16": 2e-2}[row["dtype"]] for row in document["rows"])
    assert "Not run in float32, bfloat16: triton needs" in " ".join(done.out.split())


@pytest.mark.parametrize("other", [("--plot", "kernels.png"), ("--suite", "tiny-length")])
def test_kernels_and_what_does_not_go_with_them(command: Command, other: tuple[str, str]) -> None:
    command("bench", "--kernels", *other).fails(2, "--kernels and", "exclude each other")


def test_a_backend_that_cannot_run_ends_the_command(command: Command, weights: Path, heads: Path) -> None:
    own = ("-m", weights, "--profile", heads, "-p", "a red circle", "-d", "1s", "--set", "model.device=cpu")
    command("generate", *own, "--set", "cache.backend=varlen").fails(69, "varlen", "needs a CUDA device", "reference")


def test_layers_are_drawn_anew_for_every_seed() -> None:
    one, same, other = (enter(make_backend("sdpa"), LAYER, CPU, torch.float32, seed) for seed in (1, 1, 2))
    assert torch.equal(one.query, same.query) and not torch.equal(one.query, other.query)
