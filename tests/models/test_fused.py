"""Our kernels for small operations against the plain ones: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.builders import close, draw, random_wan

from hforce.models import wan_decode
from hforce.models.dit import Block, CausalWan
from hforce.models.wan_decode import Sum

pytest.importorskip("triton", reason='the kernels are tested where there is triton: pip install "hforce[kernels]"')

HERE = "cuda" if torch.cuda.is_available() else "cpu"
FRAMES, TOKENS = 3, 4
# float32 on a GPU may multiply matrices in fewer bits, which is not what is tested here: their inputs are alike
CASES = [(torch.float32, 1e-5), (torch.bfloat16, 0.03)] if HERE == "cuda" else [(torch.float32, 1e-5)]


def block_and_inputs(dtype: torch.dtype) -> tuple[CausalWan, Block, dict[str, torch.Tensor]]:
    """A block of random weights whose norms and modulations say something, two items, and text for two runs each."""
    wan = random_wan()
    block, dim = wan.blocks[0], wan.config.dim
    with torch.no_grad():
        for number, weight in enumerate((block.norm3.weight, block.norm3.bias, block.modulation)):
            weight.copy_(draw(*weight.shape, seed=10 + number))
    heads = wan.config.heads
    given = {
        "x": draw(2, FRAMES * TOKENS, dim),
        "heads": draw(2, FRAMES * TOKENS, dim, seed=1),
        "time": draw(2, FRAMES, 6, dim, seed=2),
        "keys": draw(2, heads, 5, dim // heads, seed=3),
        "values": draw(2, heads, 5, dim // heads, seed=4),
    }
    return wan, block.to(HERE, dtype), {name: x.to(HERE, dtype) for name, x in given.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), CASES)
@torch.inference_mode()
def test_both_halves_of_a_block_are_what_they_are_in_single_steps(dtype: torch.dtype, tolerance: float) -> None:
    from hforce.models import fused

    _, block, given = block_and_inputs(dtype)
    x, heads, time, keys, values = given.values()
    before = [part.clone() for part in given.values()]
    for found, true in zip(fused.before(block, x, time), block.before(x, time), strict=True):
        assert found.shape == true.shape
        near(found, true, tolerance)
    near(fused.after(block, x, heads, time, keys, values), block.after(x, heads, time, keys, values), tolerance)
    assert all(torch.equal(*pair) for pair in zip(before, given.values(), strict=True)), "nothing given was changed"


@pytest.mark.parametrize("times", [[900.0, 500.0, 0.0], [700.0]], ids=["of every frame", "of the chunk"])
@torch.inference_mode()
def test_a_model_with_fused_blocks_is_the_same_model(times: list[float]) -> None:
    from hforce.models import fused

    wan, x, t = random_wan().to(HERE), draw(1, 3, 4, 4, 6).to(HERE), torch.tensor([times], device=HERE)
    text = wan.project_text(draw(1, 4, 8, seed=1).to(HERE))

    def see_itself(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return q * k.sigmoid() + v

    plain = wan(x, t, text, see_itself)
    fused.fuse(wan)
    near(wan(x, t, text, see_itself), plain, 1e-3 if HERE == "cuda" else 1e-5)
    wan.separate_blocks()
    assert torch.equal(wan(x, t, text, see_itself), plain)


@pytest.mark.parametrize(("dtype", "tolerance"), CASES)
@pytest.mark.parametrize(("channels", "frames"), [(6, 1), (24, 3)])
@pytest.mark.parametrize("parts", [*itertools.product([False, True], repeat=3)])
def test_sum_norm_and_activation_are_one_step(
    parts: tuple[bool, bool, bool], channels: int, frames: int, dtype: torch.dtype, tolerance: float
) -> None:
    """With and without a second summand, a bias, and frames before."""
    from hforce.models.wan_join import KERNELS

    shape = (1, channels, frames, 3, 5)
    x, y, past = (draw(*shape[:2], n, 3, 5, seed=i).to(HERE, dtype) for i, n in enumerate((frames, frames, 2)))
    bias, gain = (draw(channels, seed=i).to(HERE, dtype) for i in (3, 4))
    adds, biased, follows = parts
    given = Sum(x, y if adds else None, bias if biased else None)
    true_total, true_normed = wan_decode.PLAIN.join(given, gain, past if follows else None)
    total, normed = KERNELS.join(given, gain, past if follows else None)
    near(total, true_total, tolerance)
    near(normed, true_normed, tolerance)
    if adds:
        assert torch.equal(x, draw(*shape).to(HERE, dtype)), "only the last summand may be written over"


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (3, 6, 5, 4), (2, 40, 3, 7)])
def test_a_picture_is_doubled_pixel_by_pixel(shape: tuple[int, ...]) -> None:
    from hforce.models.wan_join import KERNELS

    x = draw(*shape).to(HERE)
    assert torch.equal(KERNELS.double(x), x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    assert torch.equal(KERNELS.double(x), wan_decode.PLAIN.double(x))


def near(found: torch.Tensor, true: torch.Tensor, tolerance: float) -> None:
    """As close as rounding in their type allows, relative to the largest value."""
    assert found.shape == true.shape and found.dtype == true.dtype
    largest = true.float().abs().max()
    close((found.float() / largest).cpu(), (true.float() / largest).cpu(), tolerance)
