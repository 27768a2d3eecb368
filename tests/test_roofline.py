"""Work is counted as torch counts it, and as the published sizes of Wan2.1 have it."""

from __future__ import annotations

import time

import pytest
import torch
from tests.builders import SMALL_CODEC, draw, random_wan
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hforce.geometry import Geometry
from hforce.models.dit import CausalWan, WanConfig
from hforce.models.random_weights import SHAPES, random_wan_vae
from hforce.models.taehv import TAEHV, TaehvCodec, TaehvConfig
from hforce.models.wan import SMALL
from hforce.roofline import (
    ATTENTION,
    DECODER,
    OTHERS,
    Ceiling,
    Work,
    chunk_stages,
    decoder_work,
    measure_ceiling,
    pass_work,
    without_memory,
)

WAN = SHAPES[SMALL]
WAN_GEOMETRY = Geometry(WAN.layers, WAN.heads, WAN.head_dim, grid=(30, 52))  # 832x480 pixels
TERA = 1e12


class Past:
    """Attends to so many frames of the past, all alike, and to the chunk."""

    def __init__(self, frames: int) -> None:
        self.frames = frames

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = (torch.cat([x[:, :1].expand(-1, self.frames, -1, -1), x], dim=1) for x in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, keys, values)))
        return out.transpose(1, 2)


def counted(model: CausalWan, geometry: Geometry, past: int) -> int:
    """Operations of one pass as torch counts them; `past` frames are seen beside the chunk."""
    c = model.config
    rows, columns = (side * cell for side, cell in zip(geometry.grid, c.patch[1:], strict=True))
    text = model.project_text(draw(1, c.text_len, c.text_dim))
    latents, times = draw(1, geometry.chunk, c.in_channels, rows, columns), torch.full((1, 1), 500.0)
    # As matrix products, and as if to learn: the counter knows neither the fused attention of the CPU nor oneDNN.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(latents, times, text, Past(past * geometry.tokens))
    return counter.get_total_flops()


@pytest.mark.parametrize(("layers", "heads", "past"), [(1, 2, 0), (2, 3, 4), (3, 2, 7)])
def test_a_pass_has_the_operations_that_torch_counts(layers: int, heads: int, past: int) -> None:
    model = random_wan(layers, heads, head_dim=16)
    geometry = Geometry(layers, heads, 16, grid=(2, 5))
    work = pass_work(model.config, geometry, past + geometry.chunk, itemsize=4)
    assert sum(part.flops for part in work.values()) == counted(model, geometry, past)


def test_a_pass_of_wan_has_the_operations_known_of_it() -> None:
    """Counted by hand from the sizes of Wan2.1 1.3B: 4680 queries, 1560 keys a frame, 512 tokens of text."""
    one, many = (pass_work(WAN, WAN_GEOMETRY, frames, itemsize=2) for frames in (1, 21))
    assert one["linear"].flops / TERA == pytest.approx(11.70, rel=1e-3)
    assert one["self_attention"].flops / TERA == pytest.approx(1.346, rel=1e-3)
    assert many["self_attention"].flops == 21 * one["self_attention"].flops
    assert one["cross_attention"].flops / TERA == pytest.approx(0.44, rel=5e-3)
    assert sum(part.flops for part in many.values()) / TERA == pytest.approx(40.4, rel=2e-3)


def test_linear_bytes_are_weights_and_what_flows() -> None:
    """With a single token next to nothing flows, and the bytes are those of the weights."""
    shape = WanConfig(dim=256, ffn_dim=1024, layers=2, heads=2, text_len=4)
    geometry = Geometry(2, 2, 128, grid=(1, 1), chunk=1)
    with torch.device("meta"):
        model = CausalWan(shape)
    once = {"text_embedding", "cross_attn.k", "cross_attn.v"}  # a prompt, not a pass
    weights = sum(
        w.numel() for name, w in model.named_parameters()
        if name.endswith("weight") and "norm" not in name and not any(part in name for part in once)
    )  # fmt: skip
    moved = pass_work(shape, geometry, 1, itemsize=2)["linear"].nbytes / 2 - weights
    assert moved == shape.layers * (14 * shape.dim + 2 * shape.ffn_dim)


def test_the_tiny_decoder_has_the_operations_known_of_it() -> None:
    with torch.device("meta"):
        codec = TaehvCodec(TAEHV(TaehvConfig()))
    assert decoder_work(codec, (16, 60, 104), 3, itemsize=2).flops / TERA == pytest.approx(1.63, rel=2e-3)


def test_the_decoder_of_wan_has_the_operations_known_of_it() -> None:
    pytest.importorskip("diffusers")
    codec = random_wan_vae(torch.bfloat16, "cpu")
    assert decoder_work(codec, (16, 60, 104), 3, itemsize=2).flops / TERA == pytest.approx(40.65, rel=1e-3)


@pytest.mark.gpu
def test_the_decoder_of_wan_is_counted_alike_on_a_gpu_where_it_runs_on_kernels_of_ours() -> None:
    pytest.importorskip("diffusers")
    here, there = (random_wan_vae(torch.bfloat16, device) for device in ("cpu", "cuda"))
    assert decoder_work(there, (16, 8, 8), 3, itemsize=2) == decoder_work(here, (16, 8, 8), 3, itemsize=2)


def test_counting_leaves_the_codec_as_it_is() -> None:
    codec = TaehvCodec(TAEHV(SMALL_CODEC).eval(), torch.zeros(12, 1, 1), torch.ones(12, 1, 1))
    latents = draw(1, 3, 12, 8, 8)
    before = codec.decoder()(latents)
    twin = without_memory(codec)
    assert twin.decoder()(latents.to("meta")).shape == before.shape
    assert all(weight.is_meta for weight in twin.net.parameters())
    torch.testing.assert_close(codec.decoder()(latents), before, atol=0, rtol=0)


def test_a_stage_is_as_slow_as_the_slower_of_arithmetic_and_memory() -> None:
    ceiling = Ceiling(flops_per_second=100, bytes_per_second=10)
    assert ceiling.seconds(Work(200, 10)) == 2
    assert ceiling.seconds(Work(200, 30)) == 3
    parts = {name: Work(0, 0) for name in ("linear", "cross_attention")}
    work = {**parts, "self_attention": Work(100, 1), "turning": Work(0, 5), "elementwise": Work(50, 20)}
    stages = chunk_stages(work, Work(1000, 1), {ATTENTION: 10.0, OTHERS: 20.0, DECODER: 40.0}, 4, ceiling)
    assert (stages[ATTENTION].flops, stages[ATTENTION].nbytes) == (400, 24)
    assert stages[ATTENTION].least_seconds == 4 * (1 + 0.5)
    assert stages[OTHERS].share == 4 * 2 / 20
    assert (stages[DECODER].flops_per_second, stages[DECODER].share) == (25, 10 / 40)


def test_the_ceiling_is_measured_here() -> None:
    began = time.perf_counter()
    ceiling = measure_ceiling(torch.device("cpu"), torch.float32, time.perf_counter)
    spent = time.perf_counter() - began
    assert 6 * 2 * 1024**3 / ceiling.flops_per_second < spent  # six products took at least as long as the fastest
    assert 6 * 2 * 2**26 / ceiling.bytes_per_second < spent
