"""The Triton kernel against plain attention in float64: run by Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from tests.attention.ragged import CPU, Ragged, agree, places_a_chunk

from hforce.attention.backends import make_backend

pytest.importorskip("triton", reason='the kernel is tested where there is triton: pip install "hforce[kernels]"')

# The interpreter multiplies bfloat16 as if it were whole numbers, so float16 stands for half precision here.
DTYPES = [(torch.float32, 1e-5), (torch.float16, 1e-2)]
NAMES = ["triton", "triton-key"]
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hforce.attention import triton_kernel as kernel

for element, turns, capability, most in (("bf16", True, 90, 227), ("bf16", False, 90, 227), ("fp32", True, 80, 163)):
    tiles = kernel.FULL_TILES if element == "fp32" else kernel.HALF_TILES
    constants = dict(TURNS=turns, S=1560, D=128, BD=128, BM=tiles.queries, BN=tiles.keys)
    kinds = ["*" + element] * 4 + ["*i32"] * 4 + ["*fp32" if turns else "*i32"] + ["i32"] * 8 + ["fp32"]
    names = kernel._attend_tile.arg_names
    signature = dict(zip(names, kinds)) | dict.fromkeys(constants, "constexpr")
    assert list(signature) == names
    source = ASTSource(kernel._attend_tile, signature, constants)
    options = dict(num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"] and compiled.metadata.shared <= most * 1024, (element, turns, capability)
for element, capability in (("bf16", 90), ("fp32", 80)):
    kinds = ["*" + element] * 6 + ["*i32", "*fp32", "i32", "i32", "constexpr"]
    signature = dict(zip(kernel._place_row.arg_names, kinds, strict=True))
    source = ASTSource(kernel._place_row, signature, dict(B=kernel.PLACED))
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
from hforce.models import fused, wan_join
half, whole, number, real = "*bf16", "*i64", "i32", "fp32"
small = {
    kernel._move_slots: ([half] * 3 + [whole] * 4 + [number] * 4, dict(KEEPS=True, B=kernel.MOVED)),
    kernel._turn_slots: ([half] * 2 + [whole] * 2 + ["*fp32"] + [number] * 4, dict(B=kernel.MOVED)),
    fused._add_and_norm: ([half] * 8 + [number] * 2 + [real], dict(ADDS=True, GATE=2, NORMS=True, SHIFT=3, B=2048)),
    fused._rms_norm: ([half] * 2 + [number, real], dict(B=2048)),
    wan_join._join_pixels: ([half] * 6 + [number] * 2 + [real], dict(ADDS=True, BIASED=True, P=32, B=128)),
    wan_join._double_pixels: ([half] * 2 + [number] * 3, dict(P=32, B=128)),
}
for function, (kinds, constants) in small.items():
    for capability in (80, 90):
        signature = dict(zip(function.arg_names, [*kinds, *["constexpr"] * len(constants)], strict=True))
        source = ASTSource(function, signature, constants)
        assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"], (function, capability)
sys.stdout.write("compiled")
"""


@pytest.mark.parametrize("width", [12, 16, 40, 128])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_the_kernel_is_softmax_attention(name: str, width: int, dtype: torch.dtype, tolerance: float) -> None:
    """Head dims that are a power of two and such that are not; frames of 5 tokens fit no tile."""
    agree(make_backend(name), Ragged((3, 9, 6), width=width, tokens=5, queries=7, dtype=dtype, device=HERE), tolerance)


@pytest.mark.parametrize("slots", [(1,), (3, 3), (9, 9, 9), (1, 9, 4, 9)])
@pytest.mark.parametrize("name", NAMES)
def test_heads_may_read_anything_from_one_frame_to_all_there_is_room_for(name: str, slots: Sequence[int]) -> None:
    agree(make_backend(name), Ragged(slots, seed=1, device=HERE), 1e-5)


@pytest.mark.parametrize(("queries", "tokens"), [(1, 1), (33, 4), (40, 33), (12, 70)])
@pytest.mark.parametrize("name", NAMES)
def test_queries_and_frames_need_not_fill_a_tile(name: str, queries: int, tokens: int) -> None:
    """Tiles are 32 by 32: one that is hardly begun, several, and a frame that ends within one."""
    agree(make_backend(name), Ragged((3, 2), queries=queries, tokens=tokens, room=3, device=HERE), 1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_every_slot_is_turned_by_its_own_time(seed: int) -> None:
    """Times are a random choice out of 0 .. 20 frames back, in any order, another for every head and seed."""
    agree(make_backend("triton"), Ragged((9, 5), seed=seed, device=HERE), 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_slots_does_not_matter(name: str) -> None:
    ragged, backend = Ragged((9, 5, 7), device=HERE), make_backend(name)
    for seed in range(3):
        agree(backend, ragged.shuffled(seed), 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_large_logits_do_not_overflow(name: str) -> None:
    ragged = Ragged((9, 5), device=HERE)
    ragged.query *= 100
    agree(make_backend(name), ragged, 1e-4)


@pytest.mark.parametrize("width", [12, 768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_chunk_is_turned_and_written_where_every_head_reads_it(dtype: torch.dtype, width: int) -> None:
    """Rows of 36 values, of which a program takes all, and of 2304, which take three."""
    from hforce.attention.triton_kernel import place

    places_a_chunk(place, dtype, width, HERE)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_kernel_compiles_for_gpus_and_its_tiles_fit() -> None:
    """For the heads of Wan2.1, to machine code of two generations of GPUs, none of which need be here."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=590)
    assert (done.returncode, done.stdout) == (0, "compiled"), done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [5, 1560])
@pytest.mark.parametrize("width", [12, 64, 128])
@pytest.mark.parametrize("name", ["sdpa", "cudnn", "varlen", "triton", "triton-key", "reference"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)])
def test_backends_are_softmax_attention_on_a_gpu(
    name: str, tokens: int, width: int, dtype: torch.dtype, tolerance: float
) -> None:
    from hforce.attention.backends import reasons

    device = torch.device("cuda")
    if reason := reasons(device, dtype, width)[name]:
        pytest.skip(f"{name} {reason}")
    queries = 3 * tokens
    agree(make_backend(name), Ragged((3, 9, 6), width, tokens, queries, dtype=dtype, device=device), tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [12, 768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_chunk_is_placed_on_a_gpu(dtype: torch.dtype, width: int) -> None:
    from hforce.attention.triton_kernel import place

    places_a_chunk(place, dtype, width, torch.device("cuda"))


def test_the_interpreter_is_what_runs_without_a_gpu() -> None:
    """Or else the tests above would have failed to launch; this says which of the two they spoke of."""
    assert (os.environ.get("TRITON_INTERPRET") == "1") == (not torch.cuda.is_available())
    assert Ragged((3,)).query.device == CPU
