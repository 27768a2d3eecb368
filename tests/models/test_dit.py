"""What the transformer does with frames, text and time, seen from outside."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tests.builders import Loop, close, draw, geometry_of, placed, random_wan, role_map
from torch import Tensor

from hforce.attention.dense import BlockCausal
from hforce.attention.rope import Rope3D
from hforce.cache.heads import HeadCache
from hforce.cache.policies.local import Local
from hforce.cache.policies.memory import Memory
from hforce.cache.policies.sink import Sink
from hforce.cache.roles import HeadRole, RoleMap, head_order
from hforce.models.dit import CausalWan, Gelu, WanConfig, add_gated, modulate, sinusoid

GRID, WIDTH = (2, 3), 12
DENSE = BlockCausal(Rope3D(GRID, WIDTH), [3])


def alone(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in which every token sees itself only."""
    return v


def run(wan: CausalWan, x: Tensor, t: Tensor, text: Tensor, attend=DENSE) -> Tensor:  # type: ignore[no-untyped-def]
    return wan(x, t, wan.project_text(text), attend)


def inputs(batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, 3, 4, 4, 6], t [B, 3], text [B, 4, 8]."""
    return draw(batch, 3, 4, 4, 6), torch.tensor([[900.0, 500.0, 0.0]]).expand(batch, -1), draw(batch, 4, 8, seed=1)


def test_without_attention_a_frame_depends_on_its_own_picture_and_timestep_alone() -> None:
    wan, (x, t, text) = random_wan(), inputs()
    before = run(wan, x, t, text, alone)
    for changed in (run(wan, x + torch.tensor([0.0, 1, 0])[:, None, None, None], t, text, alone),
                    run(wan, x, t + torch.tensor([0.0, 50, 0]), text, alone)):  # fmt: skip
        close(changed[:, [0, 2]], before[:, [0, 2]], 1e-6)
        assert (changed[:, 1] - before[:, 1]).abs().max() > 0.01


def test_without_attention_a_patch_of_the_flow_comes_from_the_same_patch_of_the_picture() -> None:
    wan, (x, t, text) = random_wan(), inputs()
    before, moved = run(wan, x, t, text, alone), x.clone()
    moved[:, 1, :, 2:4, 4:6] += 1
    difference = (run(wan, moved, t, text, alone) - before).abs().sum(dim=2)
    assert bool((difference[0, 1, 2:4, 4:6] > 1e-3).all())
    difference[0, 1, 2:4, 4:6] = 0
    close(difference, torch.zeros_like(difference), 1e-4)


def test_items_of_a_batch_do_not_meet() -> None:
    wan, (x, t, text) = random_wan(), inputs(2)
    both = run(wan, x, t, text)
    for item in range(2):
        close(both[item : item + 1], run(wan, x[item : item + 1], t[:1], text[item : item + 1]))


def test_attention_is_asked_once_a_layer_in_order_with_heads_split() -> None:
    wan, asked = random_wan(layers=3), []

    def watch(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        asked.append((layer, tuple(q.shape), tuple(k.shape), tuple(v.shape)))
        return v

    run(wan, *inputs(), watch)
    assert asked == [(layer, *[(1, 18, 3, WIDTH)] * 3) for layer in range(3)]


def test_padding_of_the_text_takes_part() -> None:
    """A short text is the same text with zero rows up to text_len, and those rows are heard."""
    wan, (x, t, text) = random_wan(), inputs()
    short = run(wan, x, t, text)
    close(run(wan, x, t, F.pad(text, (0, 0, 0, 1))), short, 0)
    longer = CausalWan(type(wan.config)(**{**vars(wan.config), "text_len": 9})).requires_grad_(False)
    longer.load_state_dict(wan.state_dict())
    assert (run(longer, x, t, text) - short).abs().max() > 1e-3


def test_text_and_pass_leave_nothing_in_the_model() -> None:
    wan, (x, t, text) = random_wan(), inputs()
    first = run(wan, x, t, text)
    run(wan, x + 1, t * 0, text - 1)
    close(run(wan, x, t, text), first, 0)
    assert not (run(wan, x, t, text - 1) == first).any()


def test_modulation_and_gates_are_per_frame() -> None:
    x, y, shift, scale, gate = draw(2, 6, 8), draw(2, 6, 8, seed=1), *(draw(2, 3, 1, 8, seed=s) for s in (2, 3, 4))
    moved, gated = modulate(x, shift, scale, 1e-6), add_gated(x, y, gate)
    for item in range(2):
        for token in range(6):
            one, frame = x[item, token], token // 2
            norm = (one - one.mean()) / (one.var(correction=0) + 1e-6).sqrt()
            close(moved[item, token], norm * (1 + scale[item, frame, 0]) + shift[item, frame, 0])
            close(gated[item, token], one + gate[item, frame, 0] * y[item, token])


def test_one_timestep_for_a_chunk_is_the_same_for_each_of_its_frames() -> None:
    wan, (x, _, text) = random_wan(), inputs(2)
    for items in (1, 2):
        one, many = (run(wan, x[:items], torch.full((items, n), 700.0), text[:items]) for n in (1, 3))
        close(one, many)


@pytest.mark.parametrize("registers", ["AVX2", "AVX512"])
def test_linear_layers_give_the_same_where_nothing_is_learned(monkeypatch: pytest.MonkeyPatch, registers: str) -> None:
    """They are oneDNN's then, and where registers are wide, it applies GELU in the product."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: registers)
    forward, x = random_wan(heads=2).blocks[0].ffn, 3 * draw(2, 7, 2 * WIDTH)
    up, _, down = forward.double()
    truth = down(F.gelu(up(x.double()), approximate="tanh")).float()
    with torch.inference_mode():
        close(forward.float()(x), truth, 1e-5)
        close(forward(x[:, ::2]), truth[:, ::2], 1e-5)
    close(forward(x), truth, 1e-5)


def test_the_norms_of_queries_and_keys_span_all_heads() -> None:
    block, x = random_wan().blocks[0].self_attn, draw(1, 5, 3 * WIDTH)
    for made, linear, norm in zip(block.project(x)[:2], (block.q, block.k), (block.norm_q, block.norm_k), strict=True):
        one = linear(x)
        truth = one / (one.pow(2).mean(dim=2, keepdim=True) + 1e-6).sqrt() * norm.weight
        close(made, truth.unflatten(2, (3, WIDTH)))


def test_the_sinusoid_of_zero_is_ones_then_zeros_and_its_first_pair_is_the_timestep() -> None:
    close(sinusoid(torch.zeros(1), 8), torch.tensor([[1.0] * 4 + [0.0] * 4]), 0)
    wave = sinusoid(torch.tensor([[3.0]]), 8)[0, 0].tolist()
    assert wave[0] == pytest.approx(math.cos(3)) and wave[4] == pytest.approx(math.sin(3))
    assert wave[3] == pytest.approx(math.cos(3 * 10000**-0.75))


@pytest.mark.parametrize("heads", [2, 3])
def test_any_order_of_heads_is_the_same_model(heads: int) -> None:
    wan, (x, t, text) = random_wan(layers=2, heads=heads), inputs()
    before = run(wan, x, t, text)
    for order in ([[1, 0], [0, 1]], [[0, 1], [1, 0]]) if heads == 2 else ([[2, 0, 1], [1, 0, 2]], [[0, 1, 2]] * 2):
        wan.order_heads(order)
        close(run(wan, x, t, text), before)


def test_an_order_names_the_heads_of_the_checkpoint_whatever_came_before() -> None:
    once, twice = random_wan(heads=3), random_wan(heads=3)
    plain = {name: weight.clone() for name, weight in once.state_dict().items()}
    once.order_heads([[2, 0, 1], [1, 2, 0]])
    twice.order_heads([[1, 0, 2], [2, 1, 0]])
    twice.order_heads([[2, 0, 1], [1, 2, 0]])
    for name, weight in once.state_dict().items():
        close(twice.state_dict()[name], weight, 0)
    assert not torch.equal(once.blocks[0].self_attn.q.weight, plain["blocks.0.self_attn.q.weight"])
    once.order_heads([[0, 1, 2]] * 2)
    for name, weight in once.state_dict().items():
        close(weight, plain[name], 0)


def test_head_i_becomes_the_head_that_the_order_names() -> None:
    wan, seen = random_wan(heads=3), []

    def watch(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(torch.cat([q, k, v], dim=-1))
        return DENSE(layer, q, k, v)

    run(wan, *inputs(), watch)
    wan.order_heads([[2, 0, 1], [1, 2, 0]])
    run(wan, *inputs(), watch)
    close(seen[2], seen[0][:, :, [2, 0, 1]])
    close(seen[3], seen[1][:, :, [1, 2, 0]])


def test_half_precision_stays_half_and_near() -> None:
    wan, (x, t, text) = random_wan(), inputs()
    exact = run(wan, x, t, text)
    half = run(wan.bfloat16(), x.bfloat16(), t, text.bfloat16())
    assert half.dtype is torch.bfloat16
    assert (half.float() - exact).norm() < 0.05 * exact.norm()


@torch.inference_mode()
def test_what_half_precision_costs_at_the_depth_of_the_release() -> None:
    """docs/models.md: rounding the weights, a float32 residual stream around bfloat16 products, and all in bfloat16."""
    torch.manual_seed(1)
    wan = CausalWan(WanConfig(dim=256, ffn_dim=1024, layers=30, heads=2, text_dim=64, text_len=16)).eval()
    for name, value in wan.named_parameters():
        if value.ndim > 1:
            value.normal_(std=(wan.config.dim if "modulation" in name else value[0].numel()) ** -0.5)
    x, text = draw(1, 6, 16, 8, 12), draw(1, 16, 64)
    attend, t = BlockCausal(Rope3D((4, 6), 128), [3, 3]), torch.full((1, 6), 500.0)

    def flow(model: CausalWan, dtype: torch.dtype) -> Tensor:
        return run(model, x.bfloat16().to(dtype), t, text.bfloat16().to(dtype), attend).float()

    def error(found: Tensor) -> float:
        return float((found - exact).norm() / exact.norm())

    exact = run(wan, x, t, text, attend)
    rounded = copy.deepcopy(wan).bfloat16().float()
    with torch.autocast("cpu", torch.bfloat16):
        kept = error(flow(rounded, torch.float32))
    errors = error(flow(rounded, torch.float32)), kept, error(flow(wan.bfloat16(), torch.bfloat16))
    assert 0.002 < errors[0] < errors[1] < 0.01 < errors[2] < 0.02


def test_permuted_model_and_roles_are_the_model_as_it_was() -> None:
    """Heads ordered by role, in weights and map, through the cache; the model in its own order, head by head."""
    roles = role_map("MLAM", "ALAL", "LMLM")
    policies = {HeadRole.LOCAL: Local(), HeadRole.ANCHOR: Sink(2, 3), HeadRole.MEMORY: Memory(episodes=2)}
    plain, permuted = random_wan(layers=3, heads=4), random_wan(layers=3, heads=4)
    order = head_order(roles)
    permuted.order_heads(order)
    ordered = RoleMap(tuple(tuple(row[i] for i in heads) for row, heads in zip(roles.roles, order, strict=True)))
    geometry = geometry_of(plain)
    cache, loop = HeadCache(geometry, ordered, policies), Loop(geometry, roles)
    text = draw(1, 4, 8)
    for number in range(8):
        x, t = draw(1, 3, 4, 4, 6, seed=number), torch.full((1, 3), 40.0 * number)
        flow = permuted(x, t, permuted.project_text(text), cache.attend)
        close(flow, plain(x, t, plain.project_text(text), loop.attend), 2e-5)
        cache.advance()
        loop.advance(placed(cache))


def test_the_quick_gelu_is_the_tanh_form() -> None:
    x = torch.cat([torch.linspace(-12, 12, 2001), torch.tensor([1e4, -1e4])])
    with torch.inference_mode():
        close(Gelu()(x), F.gelu(x, approximate="tanh"), 1e-5)
