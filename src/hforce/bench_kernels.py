"""Attention backends on the layers of a model and its cache, in turns: what each costs, and how exact it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from hforce.attention import reference
from hforce.attention.backends import make_backend, reasons
from hforce.attention.layout import Backend
from hforce.attention.timing import ROUNDS, Contest, Layer, enter, race
from hforce.attention.vendor import vendor_kernels
from hforce.build import build_bench_backbone, build_policy, build_roles, usual_layer
from hforce.cache.roles import HeadRole
from hforce.errors import UsageError
from hforce.machine import device_of, environment, paused_collector
from hforce.models.base import Backbone
from hforce.settings import Config

KIND = "hforce.bench-kernels/1"
DTYPES = (torch.float32, torch.bfloat16)
SPARED = 64  # queries of every head that are compared with the reference: it is slow, and one is like another

DEFINITIONS: Mapping[str, str] = MappingProxyType(
    {
        "timing": f"one layer's attention in one pass over a chunk, on random normal tensors; backends, dtypes and "
        f"layers take turns in one process, {ROUNDS} times after one untimed call, every second round in reverse; on "
        "CUDA by events around the call, caches of the device as the calls before left them",
        "cache": "the layer of the model whose heads read the median number of frames in this configuration, all held",
        "window": "as many heads that all read the frames of the model's span, the chunk included",
        "ms": "median wall time of a call",
        "tflops": "4 x queries x head dim x keys, over ms",
        "speedup": "ms on `window` over ms on `cache`, same backend and dtype",
        "error": "largest absolute difference to the reference computed in float64 from the same tensors, over the "
        f"largest absolute value there; the first {SPARED} queries",
    }
)


@dataclass(frozen=True)
class KernelProgress:
    """Told before every part: parts done and in all."""

    done: int
    total: int
    label: str = "kernels"


@dataclass(frozen=True)
class KernelRow:
    """One backend in one dtype on both layers. Times in ms, rates in TFLOP/s, error relative (see DEFINITIONS)."""

    backend: str
    dtype: str
    cache_ms: float
    window_ms: float
    cache_tflops: float
    window_tflops: float
    speedup: float
    error: float


@dataclass(frozen=True)
class KernelResult:
    """All rows; the layers they speak of; and which backends are not among them, and why."""

    rows: tuple[KernelRow, ...]
    cache: Layer
    window: Layer
    left_out: Mapping[tuple[str, str], tuple[str, ...]]  # backend and reason -> dtypes
    environment: Mapping[str, Any]
    config: Mapping[str, Any]


def run(config: Config, tell: Callable[[KernelProgress], None]) -> KernelResult:
    """Times every backend that can run on the model's device, on the model's heads with and without their roles.

    Raises whatever stops the model or its profile from being loaded.
    """
    backbone, _ = build_bench_backbone(config)
    device = device_of(backbone)
    cache = choose_layer(config, backbone)
    window = replace(cache, frames=(backbone.geometry.span,) * len(cache.frames))
    entrants, left_out = choose_entrants(device, cache.head_dim)
    tell(KernelProgress(0, 2))
    contests = [enter(backend, layer, device, dtype) for backend, dtype in entrants for layer in (cache, window)]
    with paused_collector(), torch.inference_mode(), vendor_kernels(device):
        errors = [measure_error(contest) for contest in contests[::2]]
        tell(KernelProgress(1, 2))
        seconds = race(contests, device)
    tell(KernelProgress(2, 2))
    times = zip(seconds[::2], seconds[1::2], strict=True)
    rows = (make_row(*one, cache, window) for one in zip(entrants, times, errors, strict=True))
    return KernelResult(tuple(rows), cache, window, left_out, environment(backbone), asdict(config))


def choose_layer(config: Config, backbone: Backbone) -> Layer:
    """A usual layer of the model under the configured cache."""
    geometry = backbone.geometry
    chunks = geometry.span // geometry.chunk  # of a video for which `full` would keep everything
    policies = {role: build_policy(config.cache, role, backbone, chunks) for role in HeadRole}
    return usual_layer(build_roles(config.cache, backbone), policies, geometry)


def choose_entrants(
    device: torch.device, head_dim: int
) -> tuple[list[tuple[Backend, torch.dtype]], dict[tuple[str, str], tuple[str, ...]]]:
    """Backends with the dtypes in which they can run here, and the reasons why others cannot."""
    entrants, left_out = [], dict[tuple[str, str], tuple[str, ...]]()
    for dtype in DTYPES:
        for name, reason in reasons(device, dtype, head_dim).items():
            if reason:
                left_out[name, reason] = (*left_out.get((name, reason), ()), _short(dtype))
            else:
                entrants.append((make_backend(name), dtype))
    return entrants, left_out


def measure_error(contest: Contest) -> float:
    """How far a backend is from the reference in float64, relative to the largest value."""
    few = replace(contest, query=contest.query[:SPARED])
    truth = reference.attend(few.query.double(), few.view)
    return float((few().double() - truth).abs().max() / truth.abs().max())


def make_row(
    entrant: tuple[Backend, torch.dtype], seconds: tuple[float, float], error: float, cache: Layer, window: Layer
) -> KernelRow:
    """The row of a backend and dtype that took so many seconds on the layer of the cache and on the window."""
    backend, dtype = entrant
    return KernelRow(
        backend=backend.name,
        dtype=_short(dtype),
        cache_ms=1e3 * seconds[0],
        window_ms=1e3 * seconds[1],
        cache_tflops=cache.flops / seconds[0] / 1e12,
        window_tflops=window.flops / seconds[1] / 1e12,
        speedup=seconds[1] / seconds[0],
        error=error,
    )


def table(result: KernelResult) -> Table:
    """The rows as a table; below it the sizes, and what could not run."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=Text(_caption(result)))
    shown.caption_justify = "left"
    span = result.window.frames[0]
    for head in ("backend", "dtype"):
        shown.add_column(head, no_wrap=True)
    for head in (
        "cache\nms",
        f"window {span}\nms",
        "times as\nfast",
        "cache\nTFLOP/s",
        f"window {span}\nTFLOP/s",
        "error",
    ):
        shown.add_column(head, justify="right", no_wrap=True)
    for row in result.rows:
        times, rates = (row.cache_ms, row.window_ms, row.speedup), (row.cache_tflops, row.window_tflops)
        numbers = [f"{x:.3g}" for x in (*times, *rates)]
        shown.add_row(row.backend, row.dtype, *numbers, f"{row.error:.1e}")
    return shown


def to_json(result: KernelResult) -> str:
    """The document `hforce.bench-kernels/1`: environment, config, definitions, the two layers, and a row a backend."""
    document = {
        "kind": KIND,
        "environment": dict(result.environment),
        "config": dict(result.config),
        "definitions": dict(DEFINITIONS),
        "layers": {"cache": asdict(result.cache), "window": asdict(result.window)},
        "left_out": [
            {"backend": name, "reason": reason, "dtypes": list(dtypes)}
            for (name, reason), dtypes in result.left_out.items()
        ],
        "rows": [asdict(row) for row in result.rows],
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def check_plot(path: object) -> None:
    """Raises UsageError: there is no picture of kernels."""
    raise UsageError("--kernels and --plot exclude each other", "write the numbers with --json")


def _caption(result: KernelResult) -> str:
    layer, place = result.cache, result.environment
    lines = [
        f"One layer: {layer.queries} queries, {len(layer.frames)} heads of {layer.head_dim}, {layer.tokens} tokens a "
        f"frame; frames read {_listed(layer.frames)}, against {result.window.frames[0]} for all.",
        f"{place['device']}, {place['threads']} thread{'s' * (place['threads'] != 1)}. Error: relative, to float64.",
        *(f"Not run in {', '.join(dtypes)}: {name} {reason}" for (name, reason), dtypes in result.left_out.items()),
    ]
    return "\n".join(lines)


def _listed(frames: Sequence[int]) -> str:
    """ "15 x 7, 6 x 5": frames times heads."""
    return ", ".join(f"{frames.count(n)} x {n}" for n in sorted(set(frames), reverse=True))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
