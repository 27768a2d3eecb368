"""Attention of ragged heads in one Triton kernel, which turns the query once a slot; and what keeps the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from subprocess import SubprocessError

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from hforce.attention.layout import LayerView, Past

CANNOT_BUILD = (RuntimeError, OSError, SubprocessError, TritonError)  # what building a kernel raises where that fails
LOG2_E = 1.4426950408889634  # softmax in powers of two: exp2 is one instruction
PLACED = 1024  # values of a token that a program places
MOVED = 4096  # values of a slot that a program moves or turns


@dataclass(frozen=True)
class Tiles:
    """Queries and keys of a tile, warps of a program, and stages of its software pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


HALF_TILES = Tiles(64, 64, 4, 3)
FULL_TILES = Tiles(32, 32, 4, 2)  # float32 takes twice the shared memory, and is for comparing, not for speed


@triton.jit
def _load_turned(query, base, rows, column, row_stride, is_in, phase, width, scale):
    """A tile of queries [BM, BD] x scale, turned back by one slot's phase; pairs are neighbours, only `width` turn."""
    # (re, im) turned by -t is (re c + im s, im c - re s): the value itself, and its partner with a sign.
    is_turned = column < width
    cosine = tl.load(phase + (column // 2) * 2, mask=is_turned, other=1.0)
    sine = tl.load(phase + (column // 2) * 2 + 1, mask=is_turned, other=0.0)
    signed = tl.where(column % 2 == 0, sine, -sine)
    line = query + base + rows[:, None] * row_stride
    own = tl.load(line + column[None, :], mask=is_in, other=0.0).to(tl.float32)
    partner = tl.load(line + (column ^ 1)[None, :], mask=is_in & is_turned[None, :], other=0.0).to(tl.float32)
    return (own * cosine[None, :] + partner * signed[None, :]) * scale


@triton.jit
def _see(
    turned, keys, values, begin, rest, total, top, mass,
    PARTLY: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile of keys, of which only the first `rest` count if PARTLY: what was seen before, and it."""
    row, column = tl.arange(0, BN), tl.arange(0, BD)
    spot = begin + row[:, None] * D + column[None, :]
    if PARTLY or D < BD:
        is_key = (row[:, None] < rest) & (column[None, :] < D)
        key, value = tl.load(keys + spot, mask=is_key, other=0.0), tl.load(values + spot, mask=is_key, other=0.0)
    else:
        key, value = tl.load(keys + spot), tl.load(values + spot)
    logits = tl.dot(turned, tl.trans(key), input_precision="ieee")
    if PARTLY:
        logits = tl.where(row[None, :] < rest, logits, float("-inf"))
    higher = tl.maximum(top, tl.max(logits, axis=1))
    shrink, weights = tl.exp2(top - higher), tl.exp2(logits - higher[:, None])
    total = total * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return total, higher, mass * shrink + tl.sum(weights, axis=1)


@triton.jit
def _attend_tile(
    query, keys, values, out, begin, length, order, lane, phase,
    queries, query_row, query_head, out_row, out_head, lane_stride, slot_stride, width, scale,
    TURNS: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head over all its slots. Programs of the longest head come first."""
    tiles = tl.cdiv(queries, BM)
    head = tl.load(order + tl.program_id(0) // tiles)
    rows = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    column = tl.arange(0, BD)
    is_in = (rows[:, None] < queries) & (column[None, :] < D)
    tokens = tl.load(length + head)
    slots, span = 1, tokens
    phases = phase
    if TURNS:
        slots, span = tokens // S, S
        phases += tl.load(lane + head) * lane_stride
    first = tl.load(begin + head).to(tl.int64) * D
    total = tl.zeros([BM, BD], dtype=tl.float32)
    top = tl.full([BM], float("-inf"), dtype=tl.float32)
    mass = tl.zeros([BM], dtype=tl.float32)
    for slot in range(slots):
        turned = _load_turned(
            query, head * query_head, rows, column, query_row, is_in, phases + slot * slot_stride, width, scale
        ).to(query.dtype.element_ty)
        whole = span // BN * BN
        for token in range(0, whole, BN):
            total, top, mass = _see(turned, keys, values, first + token * D, BN, total, top, mass, False, D, BD, BN)
        if whole < span:
            rest = span - whole
            total, top, mass = _see(turned, keys, values, first + whole * D, rest, total, top, mass, True, D, BD, BN)
        first += span * D
    place = out + head * out_head + rows[:, None] * out_row + column[None, :]
    tl.store(place, (total / mass[:, None]).to(out.dtype.element_ty), mask=is_in)


def attend(query: Tensor, view: LayerView) -> Tensor:
    """Attention of all heads in one launch; lengths and turns stay on the device, nothing waits for it.

    query [N, H, D], turned in full -> [N, H, D]. With `view.turns` the query is turned back once for every slot of
    keys (R(a) q . R(b) k = R(a - b) q . k), else keys are taken to be turned. `reference.attend` is its exact twin.
    """
    queries, heads, width = query.shape
    assert query.stride(2) == 1 and view.keys.is_contiguous() and view.values.is_contiguous(), "rows must be whole"
    tiles = FULL_TILES if query.dtype == torch.float32 else HALF_TILES
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    turns = view.turns
    phase, lane = (turns.phase, turns.lane) if turns else (view.length, view.length)  # never read without turns
    with torch.cuda.device_of(query):
        _attend_tile[(triton.cdiv(queries, tiles.queries) * heads,)](
            query, view.keys, view.values, out, view.begin, view.length, view.order, lane, phase,
            queries, query.stride(0), query.stride(1), out.stride(0), out.stride(1),
            phase.stride(0) if turns else 0, phase.stride(1) if turns else 0, 2 * phase.shape[2] if turns else 0,
            width**-0.5 * LOG2_E,
            TURNS=turns is not None, S=turns.tokens if turns else 1, D=width, BD=max(16, triton.next_power_of_2(width)),
            BM=tiles.queries, BN=tiles.keys, num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out


@triton.jit
def _place_row(query, key, value, turned, keys, values, begin, phase, row, width, B: tl.constexpr):
    """B values of one token's queries, keys and values, of as many heads as these are."""
    token = tl.program_id(0)
    column = tl.program_id(1) * B + tl.arange(0, B)
    is_in = column < row
    head, inner = column // width, column % width
    angle = phase + token * width + (inner // 2) * 2
    cosine = tl.load(angle, mask=is_in, other=0.0)
    sine = tl.load(angle + 1, mask=is_in, other=0.0)
    signed = tl.where(column % 2 == 0, -sine, sine)
    own, partner = token * row + column, token * row + (column ^ 1)  # re turns to re c - im s, im to im c + re s
    spot = (tl.load(begin + head, mask=is_in, other=0) + token).to(tl.int64) * width + inner
    q, q_partner = tl.load(query + own, mask=is_in).to(tl.float32), tl.load(query + partner, mask=is_in).to(tl.float32)
    tl.store(turned + own, (q * cosine + q_partner * signed).to(turned.dtype.element_ty), mask=is_in)
    k, k_partner = tl.load(key + own, mask=is_in).to(tl.float32), tl.load(key + partner, mask=is_in).to(tl.float32)
    tl.store(keys + spot, (k * cosine + k_partner * signed).to(keys.dtype.element_ty), mask=is_in)
    tl.store(values + spot, tl.load(value + own, mask=is_in), mask=is_in)


def place(query: Tensor, key: Tensor, value: Tensor, phase: Tensor, view: LayerView) -> Tensor:
    """Turns queries and keys and writes keys and values to their slots, each read and written once, in one launch.

    query, key, value [N, H, D] before RoPE, phase complex64 [N, 1, D/2] -> turned queries [N, H, D].
    `layout.place` is its exact twin.
    """
    tokens, heads, width = query.shape
    assert view.keys.is_contiguous() and view.values.is_contiguous(), "rows must be whole"
    query, key, value, phase = (x.contiguous() for x in (query, key, value, phase))
    turned, row = torch.empty_like(query), heads * width
    with torch.cuda.device_of(query):
        _place_row[(tokens, triton.cdiv(row, PLACED))](
            query, key, value, turned, view.keys, view.values, view.begin, torch.view_as_real(phase), row, width, PLACED
        )
    return turned


@triton.jit
def _move_slots(
    keys, values, times, first, early, sources, targets, chunk, size, row, width, KEEPS: tl.constexpr, B: tl.constexpr
):
    """B values of one frame of one head, copied to another slot; and what of its key turns in time, to `times`."""
    source, target = tl.load(sources + tl.program_id(1)), tl.load(targets + tl.program_id(1))
    begin = tl.load(first + tl.program_id(0))
    at = tl.program_id(2) * B + tl.arange(0, B)
    is_in = at < size
    key = tl.load(keys + (begin + source) * size + at, mask=is_in)
    tl.store(keys + (begin + target) * size + at, key, mask=is_in)
    value = tl.load(values + (begin + source) * size + at, mask=is_in)
    tl.store(values + (begin + target) * size + at, value, mask=is_in)
    if KEEPS:
        turns = is_in & (at % row < width)
        begin, size = tl.load(early + tl.program_id(0)) - chunk, size // row * width
        spot = at // row * width + at % row
        older = tl.load(times + (begin + tl.maximum(source, chunk)) * size + spot, mask=turns)
        tl.store(times + (begin + target) * size + spot, tl.where(source < chunk, key, older), mask=turns)


@triton.jit
def _turn_slots(keys, times, first, early, phase, chunk, size, row, width, B: tl.constexpr):
    """B values of one frame of one head, turned in time from how they were written, to where they are read."""
    slot = tl.program_id(1)
    at = tl.program_id(2) * B + tl.arange(0, B)
    is_in = at < size * width
    inner = at % width
    angle = phase + slot * width + (inner // 2) * 2
    cosine, sine = tl.load(angle, mask=is_in, other=0.0), tl.load(angle + 1, mask=is_in, other=0.0)
    old = times + (tl.load(early + tl.program_id(0)) + slot) * size * width
    own = tl.load(old + at, mask=is_in).to(tl.float32)
    partner = tl.load(old + (at ^ 1), mask=is_in).to(tl.float32)
    turned = own * cosine + partner * tl.where(at % 2 == 0, -sine, sine)
    new = keys + (tl.load(first + tl.program_id(0)) + chunk + slot) * size * row + (at // width) * row + inner
    tl.store(new, turned.to(keys.dtype.element_ty), mask=is_in)


def move(past: Past, sources: Sequence[int], targets: Sequence[int]) -> None:
    """`layout.move` in one launch."""
    _, tokens, row = past.keys.shape
    times, width = (past.keys, 0) if past.times is None else (past.times, past.times.shape[-1])  # or never touched
    slots = torch.tensor([sources, targets], device=past.keys.device)
    with torch.cuda.device_of(past.keys):
        _move_slots[(len(past.first), len(sources), triton.cdiv(tokens * row, MOVED))](
            past.keys, past.values, times, past.first, past.early, slots[0], slots[1],
            past.chunk, tokens * row, row, width, past.times is not None, MOVED,
        )  # fmt: skip


def turn_past(past: Past, phase: Tensor) -> None:
    """`layout.turn_past` in one launch."""
    assert past.times is not None, "keys that stay as they were written are not turned"
    tokens, row, width = *past.keys.shape[1:], past.times.shape[-1]
    with torch.cuda.device_of(past.keys):
        _turn_slots[(len(past.first), len(phase), triton.cdiv(tokens * width, MOVED))](
            past.keys, past.times, past.first, past.early, torch.view_as_real(phase.contiguous()),
            past.chunk, tokens, row, width, MOVED,
        )  # fmt: skip
