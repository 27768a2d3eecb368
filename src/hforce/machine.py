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
from torch import Tensor

import hforce
from hforce.graphs import Graphs
from hforce.models.base import Backbone
from hforce.models.dit import Attend

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


def weight_type(backbone: Backbone) -> torch.dtype:
    """In what the transformer computes."""
    return backbone.model.patch_embedding.weight.dtype


def device_clock(device: torch.device) -> Clock:
    """Seconds, read when all work queued on the device is done."""
    if device.type == "cpu":
        return time.perf_counter

    def clock() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return clock


class Stopwatch:
    """Adds up the seconds that a function takes on a device, without waiting for the device in between.

    In passes that are launched from graphs it is not called. There the marks that were recorded with a pass are set
    anew by every launch, and those of the last one stand for all.
    """

    def __init__(self, device: torch.device, graphs: Graphs | None = None) -> None:
        self._device, self._graphs = device, graphs
        self._marks: list[tuple[Any, Any]] = []
        self._recorded: dict[int, list[tuple[Any, Any]]] = {}  # by the number of the recorded pass
        self._before: list[int] = []

    def around(self, attend: Attend) -> Attend:
        """The same attention, timed."""

        def timed(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            is_recording = self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
            marks = self._marks
            if is_recording and self._graphs:
                marks = self._recorded.setdefault(len(self._graphs.replays), [])
            begin = self._mark(is_recording)
            out = attend(layer, q, k, v)
            marks.append((begin, self._mark(is_recording)))
            return out

        return timed

    def restart(self) -> None:
        """Forgets what was timed until now."""
        self._marks, self._before = [], list(self._graphs.replays) if self._graphs else []

    def read(self) -> float:
        """Seconds since the last restart; the device must be done with its work."""
        if self._device.type == "cpu":
            return sum(end - begin for begin, end in self._marks)
        seconds = sum(begin.elapsed_time(end) for begin, end in self._marks)
        for number, total in enumerate(self._graphs.replays if self._graphs else []):
            if launches := total - (self._before[number] if number < len(self._before) else 0):
                seconds += launches * sum(begin.elapsed_time(end) for begin, end in self._recorded[number])
        return seconds / 1000  # events tell milliseconds

    def _mark(self, is_recording: bool) -> Any:
        if self._device.type == "cpu":
            return time.perf_counter()
        event: Any = torch.Event(self._device, enable_timing=True)
        if is_recording:
            event = torch.cuda.Event(enable_timing=True, external=True)
        event.record()
        return event


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
        "dtype": str(weight_type(backbone)).removeprefix("torch."),
        "model": backbone.name,
        "layers": backbone.geometry.layers,
        "random_weights": backbone.is_random,
        "decoder": backbone.codec.name,
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
