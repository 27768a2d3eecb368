"""The few-step sampler against a loop, and noise that depends on nothing but its key."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.builders import close, draw
from torch import Tensor

from hforce.sampler import Step, few_step, keyed_noise, make_steps, sigma_at, sigma_table, warp

SHAPE = (1, 3, 4, 4, 6)


def flow(x: Tensor, timestep: float) -> Tensor:
    return torch.tanh(x) * timestep / 1000 + 0.1


@pytest.mark.parametrize("uniform", [[1000], [1000, 500], [1000, 750, 500, 250]])
def test_few_steps_are_a_loop_of_cleaning_and_noising_again(uniform: list[float]) -> None:
    steps, draws = make_steps(uniform, 5.0, warped=True), [draw(*SHAPE, seed=i) for i in range(len(uniform))]
    x, number = draws[0], 0
    while True:
        clean = x - steps[number].sigma * flow(x, steps[number].timestep)
        number += 1
        if number == len(steps):
            break
        x = clean + steps[number].sigma * (draws[number] - clean)
    close(few_step(flow, steps, iter(draws)), clean, 1e-6)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_flow_that_knows_the_answer_gives_it_from_any_noise(count: int) -> None:
    """Flow is noise - clean: the model that returns it makes `clean`, whatever the levels, in any number of steps."""
    clean, steps = draw(*SHAPE, seed=9), [Step(1000 - 100 * i, 1 - i / 10) for i in range(count)]
    levels = {step.timestep: step.sigma for step in steps}

    def exact(x: Tensor, timestep: float) -> Tensor:
        return (x - clean) / levels[timestep]

    close(few_step(exact, steps, keyed_noise(1, 0, SHAPE)), clean)


def test_the_model_is_called_once_a_step_and_noise_is_drawn_once_a_step() -> None:
    told: list[float] = []
    noise = keyed_noise(0, 0, SHAPE)

    def watch(x: Tensor, timestep: float) -> Tensor:
        told.append(timestep)
        return flow(x, timestep)

    few_step(watch, [Step(900, 0.9), Step(600, 0.6), Step(100, 0.1)], noise)
    assert told == [900, 600, 100]
    close(next(noise), list(islice(keyed_noise(0, 0, SHAPE), 4))[3], 0)


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one step"):
        few_step(flow, [], keyed_noise(0, 0, SHAPE))


@given(st.floats(0.5, 12))
def test_levels_fall_from_one_and_never_reach_zero(shift: float) -> None:
    table = sigma_table(shift).tolist()
    assert len(table) == 1000 and table[0] == 1 and table[-1] > 0
    assert all(later < earlier for earlier, later in pairwise(table))


@given(shift=st.floats(0.5, 12), timestep=st.floats(0, 1000))
def test_the_level_of_a_timestep_is_the_nearest_in_the_table(shift: float, timestep: float) -> None:
    level, table = sigma_at(timestep, shift), sigma_table(shift).tolist()
    nearest = min(abs(1000 * entry - timestep) for entry in table)
    assert level in table
    assert abs(1000 * level - timestep) <= nearest + 1e-3


@given(steps=st.lists(st.integers(1, 1000), min_size=1, max_size=6, unique=True), shift=st.floats(1, 12))
def test_warped_steps_are_shifted_and_their_level_is_their_share_of_noise(steps: list[float], shift: float) -> None:
    for n, step in zip(steps, make_steps(steps, shift, warped=True), strict=True):
        s = n / 1000
        assert math.isclose(step.sigma, shift * s / (1 + (shift - 1) * s), abs_tol=1e-6)
        assert math.isclose(step.timestep, 1000 * step.sigma, abs_tol=1e-3)


def test_zero_is_the_end_of_the_warped_schedule_and_unwarped_steps_stay_as_they_are() -> None:
    assert warp([0], 5.0) == (0.0,)
    assert [step.timestep for step in make_steps([1000, 300], 5.0, warped=False)] == [1000, 300]


def first(noise: Iterator[Tensor], count: int = 3) -> Tensor:
    return torch.stack(list(islice(noise, count)))


@given(seed=st.integers(0, 2**63), chunk=st.integers(0, 10_000))
def test_noise_is_the_same_for_the_same_seed_and_chunk_and_differs_for_any_other(seed: int, chunk: int) -> None:
    one = first(keyed_noise(seed, chunk, (1, 3)))
    torch.randn(5)
    assert torch.equal(one, first(keyed_noise(seed, chunk, (1, 3))))
    assert not torch.equal(one, first(keyed_noise(seed + 1, chunk, (1, 3))))
    assert not torch.equal(one, first(keyed_noise(seed, chunk + 1, (1, 3))))


def test_noise_is_standard_normal_and_unrelated_from_draw_to_draw_and_chunk_to_chunk() -> None:
    draws = torch.cat([first(keyed_noise(7, chunk, (20_000,)), 2) for chunk in (0, 1, 11)])
    close(draws.mean(dim=1), torch.zeros(6), 0.03)
    close(torch.corrcoef(draws), torch.eye(6), 0.03)
    close(draws.std(dim=1), torch.ones(6), 0.03)


def test_noise_leaves_the_generator_of_everybody_else_alone() -> None:
    before = torch.random.get_rng_state()
    first(keyed_noise(3, 1, SHAPE))
    assert torch.equal(torch.random.get_rng_state(), before)
