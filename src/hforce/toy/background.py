"""The background of a picture, taken from the picture itself, and the words for it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hforce.toy.world import CELL, GROUNDS, PIXELS, SHADE

CONTRAST = 40.0  # RGB distance from the background (0..441) at which a pixel belongs to an object
NEAR_GROUND = 22.0  # rms RGB distance at which a background still is called by the nearest word

Array = NDArray[Any]


def find_ground(video: NDArray[np.uint8]) -> tuple[Array, Array]:
    """The background's four tones [T, 4, 3] and the background itself [T, 64, 64, 3], both float32 in 0..255.

    Each place of its tile is the median over the tile's repetitions, so a blurred pattern stays blurred. Where many
    objects stand in for the background, a place would be far from its tone; it is given its tone then.
    """
    side, count = 2 * CELL, PIXELS // (2 * CELL)
    places = video.reshape(-1, count, side, count, side, 3).transpose(0, 2, 4, 5, 1, 3).reshape(-1, count**2)
    middle = (count**2 // 2 - 1, count**2 // 2)
    tile = np.partition(places, middle, axis=1)[:, middle].mean(1, dtype=np.float32).reshape(-1, side, side, 3)
    inner = tile.reshape(-1, 2, CELL, 2, CELL, 3)[:, :, 1:-1, :, 1:-1]
    cells: Array = np.median(inner, axis=(2, 4)).reshape(-1, 4, 3)
    sharp, soft = spread(cells), np.tile(tile, (1, count, count, 1))
    far = np.square(soft - sharp).sum(-1, keepdims=True) > CONTRAST**2
    return cells, np.where(far, sharp, soft)


def spread(cells: Array) -> Array:
    """The background with these four tones and sharp edges: [T, 4, 3] -> [T, 64, 64, 3]."""
    count = PIXELS // (2 * CELL)
    return np.tile(cells.reshape(-1, 2, 2, 3).repeat(CELL, 1).repeat(CELL, 2), (1, count, count, 1))


def ground_words(cells: Array) -> dict[str, Array]:
    """Words and tint of a background [T, 4, 3]: pattern by the contrast of its quarters, colour by the nearest."""
    light = cells.mean(-1)
    signs = np.array([[1, -1, 1, -1], [1, -1, -1, 1], [1, 1, -1, -1]])  # stripes, checks, stripes lying down
    contrast = light @ signs.T / light.sum(-1, keepdims=True).clip(1)  # (1 - SHADE) / (1 + SHADE) for the full pattern
    kind = np.where(np.abs(contrast).max(-1) < (1 - SHADE) / (1 + SHADE) / 2, 3, np.abs(contrast).argmax(-1))
    right_way = np.take_along_axis(np.pad(contrast, ((0, 0), (0, 1)), constant_values=1), kind[:, None], 1)[:, 0] > 0
    pattern = np.where(right_way, np.array(["striped", "checkered", "", "plain"])[kind], "")
    bright = np.array([*(signs > 0), [True] * 4])[kind]
    tone = (cells * bright[..., None]).sum(1) / bright.sum(1, keepdims=True)
    known = np.array(list(GROUNDS.values()), np.float64)
    tints = (tone @ known.T / np.square(known).sum(1)).clip(0.5, 1.6)
    far = np.sqrt(np.square(tone[:, None] - tints[..., None] * known).mean(-1))
    nearest = far.argmin(1)
    ground = np.where(far.min(1) < NEAR_GROUND, np.array(list(GROUNDS))[nearest], "")
    return {"ground": ground, "pattern": pattern, "tint": np.take_along_axis(tints, nearest[:, None], 1)[:, 0]}


def blurred(pictures: Array) -> Array:
    """Pictures [T, 64, 64] after a binomial blur of three pixels each way, up to their edges."""
    soft = pictures.copy()
    soft[:, 1:-1] = (pictures[:, :-2] + 2 * pictures[:, 1:-1] + pictures[:, 2:]) / 4
    both = soft.copy()
    both[:, :, 1:-1] = (soft[:, :, :-2] + 2 * soft[:, :, 1:-1] + soft[:, :, 2:]) / 4
    return both
