"""Every backend against plain attention in float64, and what is said where one cannot be had."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tests.attention.ragged import CPU, Ragged, agree, places_a_chunk

from hforce.attention import backends
from hforce.attention.backends import (
    AUTO,
    BACKENDS,
    SDPA,
    VENDOR,
    check_backend,
    choose_backend,
    make_backend,
    reasons,
)
from hforce.attention.layout import place
from hforce.attention.timing import Layer, enter, race
from hforce.config import load_config
from hforce.errors import BackendError, HforceError

HERE = [name for name, reason in reasons(CPU, torch.float32, 16).items() if not reason]
LAYER = Layer(queries=12, tokens=4, head_dim=12, frames=(3, 5, 5))
LENGTHS = [(3, 3, 3), (9, 9, 9), (3, 9, 6), (9, 6, 6), (4,), (5, 8, 8, 8, 3)]


def test_a_cpu_has_the_dense_calls_and_the_reference() -> None:
    assert HERE == ["sdpa", "reference"]


@pytest.mark.parametrize("width", [6, 12, 64])
@pytest.mark.parametrize("slots", LENGTHS)
@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_a_backend_is_softmax_attention(
    name: str, slots: Sequence[int], width: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Lengths from a first chunk alone to all that there is room for; what lies behind them in the store is poison."""
    agree(make_backend(name), Ragged(slots, width=width, room=9, dtype=dtype), tolerance)


@pytest.mark.parametrize("name", HERE)
def test_the_order_of_slots_does_not_matter(name: str) -> None:
    ragged, backend = Ragged((9, 5, 7)), make_backend(name)
    out = backend.attend(ragged.query, ragged.view(backend.turns_queries))
    for seed in range(3):
        shuffled = ragged.shuffled(seed)
        torch.testing.assert_close(
            backend.attend(ragged.query, shuffled.view(backend.turns_queries)), out, atol=1e-5, rtol=0
        )


def test_the_times_of_slots_do() -> None:
    """The control of the test above: the same keys at exchanged times are something else."""
    ragged, backend = Ragged((9, 5, 7)), make_backend("reference")
    moved = replace(ragged, times=ragged.times.flip(1))
    difference = backend.attend(ragged.query, moved.view(True)) - backend.attend(ragged.query, ragged.view(True))
    assert float(difference.abs().max()) > 1e-2


def test_a_chunk_is_written_where_every_head_reads_it() -> None:
    places_a_chunk(place, torch.float32, 12)


# Which one


def test_the_configuration_knows_exactly_the_backends_there_are() -> None:
    for name in (*BACKENDS, VENDOR, AUTO):
        assert load_config("tiny", [], [f"cache.backend={name}"]).cache.backend == name
    with pytest.raises(HforceError, match="unknown 'sdpaa' .did you mean 'sdpa'.") as caught:
        load_config("tiny", [], ["cache.backend=sdpaa"])
    listed = str(caught.value).partition("known are ")[2]
    assert sorted(listed.split(", ")) == sorted((*BACKENDS, VENDOR, AUTO))


def test_an_unknown_backend_is_refused_with_those_there_are() -> None:
    with pytest.raises(BackendError, match="did you mean 'triton'") as caught:
        choose_backend("tritn", LAYER, CPU, torch.float32)
    assert all(name in caught.value.mend for name in (*BACKENDS, VENDOR, AUTO))
    assert caught.value.exit_code == 69


@pytest.mark.parametrize("name", ["cudnn", "varlen", "triton", "triton-key"])
def test_a_backend_that_cannot_run_here_says_why_and_what_can(name: str) -> None:
    with pytest.raises(BackendError, match=f"'{name}' needs (a CUDA device|the package triton)") as caught:
        choose_backend(name, LAYER, CPU, torch.float32)
    assert caught.value.mend == "can be had here: sdpa, reference, vendor, auto"


def test_what_can_run_is_checked_without_being_loaded() -> None:
    assert [check_backend(name, CPU, torch.float32, 12) for name in ("sdpa", "reference", VENDOR, AUTO)] == [None] * 4


def test_auto_on_a_cpu_is_sdpa() -> None:
    assert choose_backend(AUTO, LAYER, CPU, torch.float32) == SDPA == make_backend("sdpa")
    assert choose_backend(VENDOR, LAYER, CPU, torch.float32) == SDPA


def test_auto_takes_the_one_that_was_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a second fast backend that waits: whatever the machine does, it is the slower one."""

    def dawdle(query: torch.Tensor, view: object) -> torch.Tensor:
        torch.randn(400, 400) @ torch.randn(400, 400 * 20)
        return query

    slow = replace(BACKENDS["sdpa"], load=lambda: dawdle)
    monkeypatch.setattr(backends, "BACKENDS", {"slow": slow, "sdpa": BACKENDS["sdpa"]})
    assert choose_backend(AUTO, LAYER, CPU, torch.float32).name == "sdpa"


def test_a_race_runs_every_call_once_to_warm_up_and_then_in_turns() -> None:
    run: list[str] = []

    def call(name: str) -> torch.Tensor:
        run.append(name)
        return torch.zeros(1)

    seconds = race([lambda: call("a"), lambda: call("b")], CPU, rounds=3)
    assert "".join(run) == "ab" + "ab" + "ba" + "ab"
    assert len(seconds) == 2 and min(seconds) > 0


@pytest.mark.parametrize("name", HERE)
def test_timed_layers_are_as_large_as_they_say(name: str) -> None:
    contest = enter(make_backend(name), LAYER, CPU, torch.float32)
    assert contest().shape == (12, 3, 12)
    assert contest.view.length.tolist() == [12, 20, 20]
    assert [(run.first, run.last) for run in contest.view.runs] == [(0, 1), (1, 3)]
    products = sum(2 * 12 * 12 * length for length in (12, 20, 20))  # of queries and keys; as many with values
    assert LAYER.flops == 2 * products
