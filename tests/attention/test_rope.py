"""Rotary positions against pair-by-pair rotation in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.builders import close, draw, rotate

from hforce.attention.rope import Rope3D, ladder, rotary_pairs, turn

GRID = (2, 3)


@pytest.mark.parametrize("width", [8, 12, 24, 128])
def test_every_pair_turns_by_its_own_axis_and_angle(width: int) -> None:
    x = draw(4, 6, 2, width)
    phase = Rope3D(GRID, width).full(torch.tensor([0.0, 1.0, 7.0, -3.5]))[:, None]
    close(turn(x.flatten(0, 1), phase).unflatten(0, (4, 6)), rotate(x, [0, 1, 7, -3.5], GRID))


def test_another_theta_is_another_ladder() -> None:
    x = draw(2, 6, 1, 24)
    phase = Rope3D(GRID, 24, theta=50.0).full(torch.tensor([2.0, 5.0]))[:, None]
    close(turn(x.flatten(0, 1), phase).unflatten(0, (2, 6)), rotate(x, [2, 5], GRID, theta=50.0))


@given(st.integers(2, 256).map(lambda n: 2 * n))
def test_time_height_and_width_share_all_pairs(width: int) -> None:
    time, height, column = rotary_pairs(width)
    assert time + height + column == width // 2
    assert height == column <= time


def test_wan_has_22_temporal_pairs_and_a_fastest_period_of_6_frames() -> None:
    """128 dimensions a head: 44 for time, 42 for each axis of space; periods 2 pi 10000 ** (i / 22)."""
    assert rotary_pairs(128) == (22, 21, 21)
    periods = 2 * torch.pi / ladder(22, 10000.0)
    close(periods[:4], torch.tensor([6.28, 9.55, 14.51, 22.06]), 0.01)


@pytest.mark.parametrize("origin", [0, 1, 17, 1021, 10_000])
def test_logits_do_not_depend_on_where_time_begins(origin: int) -> None:
    """A chunk at 0 .. 2 with keys at -distance attends as a chunk at `origin` with keys at origin - distance."""
    rope, q, k = Rope3D(GRID, 24), draw(3, 6, 1, 24, seed=origin), draw(4, 6, 1, 24, seed=origin + 1)
    distance = torch.tensor([18.0, 9.0, 2.0, 1.0])
    own = torch.arange(3.0)
    here = turn(q.flatten(0, 2), rope.full(own)) @ turn(k.flatten(0, 2), rope.full(-distance)).T
    absolute = rotate(q, (origin + own).tolist(), GRID), rotate(k, (origin - distance).tolist(), GRID)
    close(here, absolute[0].flatten(0, 2) @ absolute[1].flatten(0, 2).T)


def test_time_and_space_halves_make_the_whole() -> None:
    """A key written with the turn of space alone, and turned in time when read, is the key turned at once."""
    rope, x = Rope3D(GRID, 24), draw(2, 6, 24)
    index, split = torch.tensor([4.0, -11.0]), rope.time_dims
    time = turn(x[..., :split], rope.time(index)[:, None])
    space = turn(x[..., split:], rope.space)
    close(torch.cat([time, space], dim=-1), turn(x.flatten(0, 1), rope.full(index)).unflatten(0, (2, 6)), 1e-6)


def test_a_turn_keeps_lengths_and_at_zero_keeps_everything() -> None:
    rope, x = Rope3D(GRID, 24), draw(6, 24)
    close(turn(x, rope.full(torch.tensor([13.0]))).norm(dim=-1), x.norm(dim=-1))
    close(turn(x[:1], rope.full(torch.zeros(1))[:1]), x[:1], 0)


def test_phases_far_out_are_still_exact() -> None:
    """At frame 100,000, angles in float32 would be wrong in the third digit."""
    phase = Rope3D(GRID, 24).time(torch.tensor([100_000]))[0]
    angle = 100_000 * 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    close(torch.view_as_real(phase), torch.stack([angle.cos(), angle.sin()], dim=-1), 1e-6)


def test_half_precision_is_rounded_once_at_the_end() -> None:
    x, phase = draw(6, 24).bfloat16(), Rope3D(GRID, 24).full(torch.tensor([5.0]))
    turned = turn(x, phase)
    assert turned.dtype is torch.bfloat16
    close(turned, turn(x.float(), phase).bfloat16(), 0)
