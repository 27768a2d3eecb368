"""The main object of a picture: cut out of the background, and fitted by the drawing that explains it best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hforce.toy.background import CONTRAST, blurred
from hforce.toy.blobs import LEAST_AREA, largest
from hforce.toy.world import PIXELS, SLOTS, SQUARE_HALF, TRIANGLE_INNER, distance

GHOST_CONTRAST = (
    70.0  # like CONTRAST for whatever else is there: a codec's halo reaches 60, a faint copy of an object 100
)
SPARE = 2.5  # pixels around the fitted outline that still count as its (blurred) edge
FAINT = 0.08  # coverage below this is noise
POOR = 0.2  # squared error over area at which a fit by moments is not believed
ALIKE = 60.0  # RGB distance, of paint and of background, up to which two frames may show the same object
SIZES_TRIED = (7.0, 7.5, 8.0, 8.5, 9.0, 9.5, 10.0)  # pixels: for a cut object that was never seen whole
AREAS = {"circle": np.pi, "square": 4 * SQUARE_HALF**2, "triangle": 3 * np.sqrt(3) * TRIANGLE_INNER**2}  # at size 1
PAD = 16  # pixels around the picture in which the search for a cut object may put its centre

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Figure:
    """The main object of each frame: where it is, what it looks like, and what else differs from the background."""

    rest: Array  # [T, 64, 64] bool: unlike the background, and not the object
    paint: Array  # [T, 3] its colour; nan = no object
    alpha: Array  # [T, 64, 64] its measured coverage
    shape: Array  # [T] word
    size: Array  # [T] pixels, as are x and y
    x: Array
    y: Array
    plain: Array  # [T] bool: in plain view, so that size is a measurement
    outline: Array  # [T, 64, 64] signed distance from the fitted outline; nan = no object


def find_figure(pixels: Array, ground: Array) -> Figure:
    """Cut the main object out of frames [T, 64, 64, 3] on their backgrounds, and fit its shape."""
    away = pixels - ground
    contrast = np.sqrt(np.einsum("tyxc,tyxc->tyx", away, away))
    mask = contrast > CONTRAST
    main = np.stack([largest(each) for each in mask])
    paint = np.stack([_paint(frame[each]) for frame, each in zip(pixels, main, strict=True)])
    alpha = _coverage(away, paint[:, None, None] - ground, main, mask & ~main)
    shape, size, x, y, plain = _fit(alpha, np.stack([paint, ground.mean((1, 2))], axis=1))
    outline = outline_of(shape, size, x, y)
    return Figure((contrast > GHOST_CONTRAST) & ~(outline <= SPARE), paint, alpha, shape, size, x, y, plain, outline)


def _paint(colors: Array) -> Array:
    """The object's own colour [3], from all its pixels [n, 3]: the median of the vivid ones, so not of mark or edge."""
    if not len(colors):
        return np.full(3, np.nan, np.float32)
    chroma = colors.max(1) - colors.min(1)
    vivid: Array = np.median(colors[chroma >= 0.75 * np.quantile(chroma, 0.9)], axis=0)
    return vivid


def _coverage(away: Array, toward: Array, main: Array, others: Array) -> Array:
    """Coverage [T, 64, 64] in 0..1 of the main object: how far each pixel is on its way from background to paint.

    The mark is filled in: a pixel between covered ones in its row and in its column is covered (shapes are convex).
    """
    along = np.einsum("tyxc,tyxc->tyx", away, toward) / np.einsum("tyxc,tyxc->tyx", toward, toward).clip(1)
    near = _grown(np.any(main, 2))[:, :, None] & _grown(np.any(main, 1))[:, None, :] & ~others
    alpha = np.where(near & (along > FAINT), along.clip(0, 1), 0).astype(np.float32)
    between = []
    for axis in (1, 2):
        before = np.maximum.accumulate(alpha, axis=axis)
        after = np.flip(np.maximum.accumulate(np.flip(alpha, axis), axis=axis), axis)
        between.append(np.minimum(before, after))
    filled: Array = np.minimum(*between)
    return filled


def _grown(line: Array) -> Array:
    """A row or column mask [T, 64], two pixels wider on both sides."""
    wide = np.pad(line, ((0, 0), (2, 2)))
    grown: Array = np.logical_or.reduce([wide[:, shift : shift + PIXELS] for shift in range(5)])
    return grown


def outline_of(shape: Array, size: Array, x: Array, y: Array) -> Array:
    """Signed distance [T, 64, 64] of every pixel from the outline of shape, size, centre [T]; nan where size is nan."""
    centers = np.arange(PIXELS, dtype=np.float32) + 0.5
    dx, dy = ((centers - at[:, None]).astype(np.float32) for at in (x, y))
    outline = np.full((len(x), PIXELS, PIXELS), np.nan, np.float32)
    for word in SLOTS["shape"]:
        these = (shape == word) & np.isfinite(size)
        scale = size[these, None, None].astype(np.float32)
        outline[these] = distance(word, scale, dx[these, None, :], dy[these, :, None])
    return outline


def _fit(alpha: Array, looks: Array) -> tuple[Array, Array, Array, Array, Array]:
    """Shape word, size, x, y, and whether in plain view, each [T], of coverages [T, 64, 64]; "" and nan = no object.

    An object in plain view has its centre at the centroid and its size from the area. One that is cut by the edge, or
    melted into another, is searched for at the size of the nearest frame that shows it in plain view: one that is alike
    in looks [T, 2, 3], paint and background.
    """
    area = alpha.sum((1, 2), dtype=np.float64)
    centers = np.arange(PIXELS) + 0.5
    there = area >= LEAST_AREA / 2
    x, y = (np.where(there, alpha.sum(axis) @ centers / area.clip(1), np.nan) for axis in (1, 2))
    sizes = [np.where(there, np.sqrt(area / AREAS[word]), np.nan) for word in SLOTS["shape"]]
    error = np.stack([_misfit(alpha, word, size, x, y) for word, size in zip(SLOTS["shape"], sizes, strict=True)])
    best = np.where(there, error.argmin(0), 0)
    size = np.choose(best, sizes)
    plain = there & (error.min(0) < POOR * area) & (_rim(alpha) < 0.5)
    known = np.flatnonzero(plain)
    for t in np.flatnonzero(there & ~plain):
        alike = known[(np.linalg.norm(looks[known] - looks[t], axis=-1) < ALIKE).all(1)]
        tried = (float(size[alike[np.abs(alike - t).argmin()]]),) if len(alike) else SIZES_TRIED
        best[t], size[t], x[t], y[t] = _search(alpha[t], tried)
    return np.where(there, np.array(SLOTS["shape"])[best], ""), size, x, y, plain


def _rim(cover: Array) -> Array:
    """The largest coverage [T] on the edge of the picture: from one half, the object is cut there, or as good as."""
    rim: Array = np.maximum(cover[:, :, [0, -1]].max((1, 2)), cover[:, [0, -1]].max((1, 2)))
    return rim


def _misfit(alpha: Array, word: str, size: Array, x: Array, y: Array) -> Array:
    """Squared error [T], in pixels, between coverages [T, 64, 64] and one shape drawn at size, x, y [T].

    The drawing is a little blurred: an autoencoder rounds the corners of a square, and should not make it a circle.
    """
    drawn = blurred(np.clip(0.5 - outline_of(np.full(len(x), word), size, x, y), 0, 1))
    error: Array = np.einsum("tyx,tyx->t", alpha - drawn, alpha - drawn)
    return error


def _search(alpha: Array, sizes: Sequence[float]) -> tuple[int, float, float, float]:
    """Shape (its place in SLOTS), size and centre (x, y) that explain a coverage [64, 64] best; it may be cut off."""
    side = PIXELS + 2 * PAD
    inside = np.pad(np.ones((PIXELS, PIXELS), np.float32), PAD)
    have, where = np.fft.rfft2(np.pad(alpha, PAD)), np.fft.rfft2(inside)
    near = (np.arange(side) + side // 2) % side - side // 2 + 0.5  # offsets from a centre at the corner, wrapped round
    found = []
    for (number, word), size in product(enumerate(SLOTS["shape"]), sizes):
        drawn = np.clip(0.5 - distance(word, size, near, near[:, None]), 0, 1).astype(np.float32)
        match = np.fft.irfft2(have * np.fft.rfft2(drawn).conj(), (side, side))
        amount = np.fft.irfft2(where * np.fft.rfft2(drawn**2).conj(), (side, side))
        error = amount - 2 * match
        y, x = divmod(int(error.argmin()), side)
        column, row = error[:, x], error[y]
        found.append((error[y, x], number, size, x + _dip(row, x) - PAD, y + _dip(column, y) - PAD))
    return min(found)[1:]


def _dip(line: Array, lowest: int) -> float:
    """Where between the samples a line has its minimum: offset -0.5..0.5 from the lowest one, by a parabola."""
    before, here, after = line[lowest - 1], line[lowest], line[(lowest + 1) % len(line)]
    bend = before - 2 * here + after
    return float(np.clip((before - after) / (2 * bend), -0.5, 0.5)) if bend > 0 else 0.0
