"""The machine that a bench runs on: its clock, its memory, its name, and nothing that disturbs."""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import hforce
from hforce.models.base import Backbone

Clock = Callable[[], float]


@contextmanager
def paused_collector() -> Iterator[None]:
    """Keeps Python's garbage collector from running in between."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def device_of(backbone: Backbone) -> torch.device:
    """Where the transformer is."""
    return backbone.model.patch_embedding.weight.device


def device_clock(device: torch.device) -> Clock:
    """Seconds, read when all work queued on the device is done."""
    if device.type == "cpu":
        return time.perf_counter

    def clock() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return clock


def resident_bytes() -> int | None:
    """Memory of this process that is in RAM; None on systems without /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def environment(backbone: Backbone) -> dict[str, Any]:
    """Where and on what a bench ran."""
    device = device_of(backbone)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "hforce": hforce.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(backbone.model.patch_embedding.weight.dtype).removeprefix("torch."),
        "model": backbone.name,
        "size": list(backbone.size),
        "fingerprint": backbone.fingerprint,
    }


def cpu_name() -> str:
    """The processor as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
