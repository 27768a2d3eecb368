"""Connected parts of a mask.

Plain Python on runs of pixels: a few dozen runs a frame, so no image library is needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAST_AREA = 16  # pixels; anything smaller is noise

Array = NDArray[Any]
Blob = list[tuple[int, int, int]]  # connected pixels, as runs: row, first column, column after the last


def areas(mask: Array) -> list[int]:
    """Sizes in pixels of the parts of a mask [h, w] that are not noise, largest first."""
    return [_area(blob) for blob in _blobs(mask)]


def largest(mask: Array) -> Array:
    """The largest part of a mask [h, w], as a mask; empty if all is noise."""
    part = np.zeros_like(mask)
    for row, start, end in next(iter(_blobs(mask)), []):
        part[row, start:end] = True
    return part


def _blobs(mask: Array) -> list[Blob]:
    """The parts, connected also over corners, of at least LEAST_AREA pixels, largest first."""
    if np.count_nonzero(mask) < LEAST_AREA:
        return []
    steps = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(steps == 1)
    runs = list(zip(rows.tolist(), starts.tolist(), np.nonzero(steps == -1)[1].tolist(), strict=True))
    owner = list(range(len(runs)))

    def root(i: int) -> int:
        while owner[i] != i:
            i = owner[i]
        return i

    above = 0
    for i, (row, start, end) in enumerate(runs):
        while runs[above][0] < row - 1:
            above += 1
        for j in range(above, i):
            if runs[j][0] == row - 1 and runs[j][1] <= end and start <= runs[j][2]:
                owner[root(j)] = root(i)
    blobs: dict[int, Blob] = {}
    for i, run in enumerate(runs):
        blobs.setdefault(root(i), []).append(run)
    return sorted((blob for blob in blobs.values() if _area(blob) >= LEAST_AREA), key=_area, reverse=True)


def _area(blob: Blob) -> int:
    return sum(end - start for _, start, end in blob)
