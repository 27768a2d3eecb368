"""Bytes are counted once, while they are needed, and nothing else is counted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from hforce.weigh import tensor_bytes, weigh


def weighed(step: Callable[[], object]) -> tuple[int, int]:
    found = weigh(step, torch.device("cpu"))
    assert found is not None
    return found.peak, found.left


@torch.inference_mode()
def test_weighing_counts_new_tensors_while_they_live() -> None:
    before, kept = torch.zeros(1000), []

    def step() -> None:
        x = torch.ones(250)  # 1000 bytes
        y = x + 1
        del x
        kept.append(y.view(5, 50)[1:])  # a view keeps the whole
        before.mul_(2)
        _ = before.view(10, 100).t(), before[5:]

    assert weighed(step) == (2000, 1000)
    assert weighed(kept.clear) == (0, 0)


def test_weighing_sees_inside_composed_operators() -> None:
    weight, bias, x = torch.ones(50, 20), torch.ones(50), torch.ones(10, 20)
    with torch.inference_mode():
        peak, left = weighed(lambda: torch.nn.functional.linear(x, weight, bias).relu())
    assert (peak, left) == (2 * 10 * 50 * 4, 0)


def test_tensors_are_counted_once() -> None:
    class Holder:
        def __init__(self) -> None:
            self.net, self.mean, self.name = nn.Linear(10, 10), torch.zeros(5), "x"

    holder = Holder()
    assert tensor_bytes(holder, holder.net, holder.mean[1:]) == 4 * (100 + 10 + 5)


def test_a_device_that_does_not_tell_still_does_the_step() -> None:
    done: list[int] = []
    assert weigh(lambda: done.append(1), torch.device("meta")) is None
    assert done == [1]
