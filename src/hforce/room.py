"""How much memory a device has free."""

from __future__ import annotations

from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
GROUPS = (  # limit of a control group and what it uses, in its two versions
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
KIB = 1 << 10


def free_bytes(device: str) -> int | None:
    """Memory that can be had on a device; None where the system does not tell.

    Of a GPU what its driver says; of the CPU what can be had without swapping, or, where that is less, what the control
    group of the process has left.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if kind != "cpu":
        return None
    told = [read_available(MEMINFO), *(read_left(limit, used) for limit, used in GROUPS)]
    return min((size for size in told if size is not None), default=None)


def read_available(path: Path) -> int | None:
    """MemAvailable in a file like /proc/meminfo, in bytes; None where it is not there."""
    try:
        lines = dict(line.partition(":")[::2] for line in path.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * KIB
    except (OSError, KeyError, ValueError, IndexError):
        return None


def read_left(limit: Path, used: Path) -> int | None:
    """What the limit of a control group leaves, in bytes; None where there is none ("max")."""
    try:
        return max(0, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):
        return None
