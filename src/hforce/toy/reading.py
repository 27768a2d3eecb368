"""What a video of the procedural world shows, from its pixels alone.

Analysis by synthesis: the background is taken from the picture itself (it repeats every 16 pixels), what differs from
it is cut out, the three shapes are drawn at the measured centre and size, and the one that explains it best wins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hforce.errors import DataError
from hforce.toy.blobs import LEAST_AREA, areas, largest
from hforce.toy.motion import likeliest_path
from hforce.toy.world import (
    CELL,
    GROUNDS,
    HUES,
    MARK_COLORS,
    MARK_RADIUS,
    PIXELS,
    SHADE,
    SLOTS,
    SQUARE_HALF,
    TRIANGLE_INNER,
    distance,
)

BATCH = 256  # video frames read at once: bounds memory
CONTRAST = 40.0  # RGB distance from the background (0..441) at which a pixel belongs to an object
GHOST_CONTRAST = 70.0  # the same for whatever else is there: a codec's halo reaches 60, a faint copy of an object 100
SPARE = 2.5  # pixels around the fitted outline that still count as its (blurred) edge
FAINT = 0.08  # coverage below this is noise
POOR = 0.2  # squared error over area at which a fit by moments is not believed
NEAR_GROUND = 22.0  # rms RGB distance at which a background still is called by the nearest word
LEAST_CHROMA = 60.0  # of 255; below, an object has no colour word
WHOLE = 0.97  # visible fraction from which an object counts as fully in the picture
COMMON_SIZE = 8.5  # pixels: taken for a cut object that was never seen whole
AREAS = {"circle": np.pi, "square": 4 * SQUARE_HALF**2, "triangle": 3 * np.sqrt(3) * TRIANGLE_INNER**2}  # at size 1
PAD = 16  # pixels around the picture in which the search for a cut object may put its centre

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a video of T frames shows. Words are "" and numbers nan where nothing can be said.

    cells [T, 4, 3] RGB in 0..255 of the four quarters of the background's 16 x 16 tile; ground, pattern [T] its words;
    tint [T] its brightness over the word's; objects [T] how many there are; ghosts [T] the area of all but the main
    one, in areas of the main one; visible [T] the fraction of the main one inside the picture; color, shape, mark [T]
    its words; hue [T] in degrees 0..360; size [T] in pixels and sharpness [T], the steepness of its edge, where it is
    in plain view; x, y [T] in pixels; residual [T] rms 0..1 between the frame and its re-synthesis.
    motion, speed, lane are the words that fit the whole clip best.
    """

    cells: Array
    ground: Array
    pattern: Array
    tint: Array
    objects: Array
    ghosts: Array
    visible: Array
    color: Array
    shape: Array
    mark: Array
    hue: Array
    size: Array
    x: Array
    y: Array
    sharpness: Array
    residual: Array
    motion: str
    speed: str
    lane: str

    @property
    def whole(self) -> Array:
        """Frames in which the main object is fully inside the picture: bool [T]."""
        return np.asarray(self.visible >= WHOLE)


def read_frames(video: NDArray[np.uint8]) -> Reading:
    """What a video shows: uint8 [T, 64, 64, 3] -> Reading, in one to two milliseconds a frame.

    Raises DataError for another shape or type.
    """
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[1:] != (PIXELS, PIXELS, 3) or not len(video):
        raise DataError(f"the judge reads uint8 [T, {PIXELS}, {PIXELS}, 3], got {video.dtype} {list(video.shape)}")
    parts = [_read(video[begin : begin + BATCH]) for begin in range(0, len(video), BATCH)]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    motion, speed, lane = likeliest_path(arrays["x"], arrays["y"])
    return Reading(**arrays, motion=motion, speed=speed, lane=lane)


@dataclass(frozen=True, slots=True)
class _Figure:
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


def _read(video: NDArray[np.uint8]) -> dict[str, Array]:
    """The arrays of a Reading, for a short stretch of video."""
    pixels = video.astype(np.float32)
    cells, ground = _ground(video)
    figure = _figure(pixels, ground)
    cover = np.nan_to_num(np.clip(0.5 - figure.outline, 0, 1))
    area = np.nan_to_num(figure.size**2 * _per_word(figure.shape, AREAS), nan=AREAS["circle"] * COMMON_SIZE**2)
    visible = np.minimum(cover.sum((1, 2)) / area, 1)
    whole = visible >= WHOLE
    others = [areas(rest) for rest in figure.rest]
    dot = np.clip(0.5 + MARK_RADIUS * figure.size[:, None, None] - _radius(figure), 0, 1).astype(np.float32)
    mark, mark_paint = _marks(pixels, figure)
    color, hue = _color_words(figure.paint)
    drawn = _over(_over(_spread(cells), figure.paint, cover), mark_paint, np.minimum(dot, cover))
    return {
        "cells": cells,
        **_ground_words(cells),
        "objects": np.isfinite(figure.size) + np.array([len(each) for each in others]),
        "ghosts": np.array([sum(each) for each in others]) / area,
        "visible": visible,
        "color": color,
        "shape": np.where(whole, figure.shape, ""),
        "mark": np.where(whole, mark, ""),
        "hue": hue,
        "size": np.where(figure.plain, figure.size, np.nan),
        "x": figure.x,
        "y": figure.y,
        "sharpness": np.where(figure.plain, _steepness(figure.alpha) / np.sqrt(area), np.nan),
        "residual": np.sqrt(np.mean(np.square(pixels - drawn), axis=(1, 2, 3))) / 255,
    }


# --- background ------------------------------------------------------------------------------------------------------


def _ground(video: NDArray[np.uint8]) -> tuple[Array, Array]:
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
    sharp, soft = _spread(cells), np.tile(tile, (1, count, count, 1))
    far = np.square(soft - sharp).sum(-1, keepdims=True) > CONTRAST**2
    return cells, np.where(far, sharp, soft)


def _spread(cells: Array) -> Array:
    """The background with these four tones and sharp edges: [T, 4, 3] -> [T, 64, 64, 3]."""
    count = PIXELS // (2 * CELL)
    return np.tile(cells.reshape(-1, 2, 2, 3).repeat(CELL, 1).repeat(CELL, 2), (1, count, count, 1))


def _ground_words(cells: Array) -> dict[str, Array]:
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


# --- object ----------------------------------------------------------------------------------------------------------


def _figure(pixels: Array, ground: Array) -> _Figure:
    """Cut the main object out of frames [T, 64, 64, 3] on their backgrounds, and fit its shape."""
    away = pixels - ground
    contrast = np.sqrt(np.einsum("tyxc,tyxc->tyx", away, away))
    mask = contrast > CONTRAST
    main = np.stack([largest(each) for each in mask])
    paint = np.stack([_paint(frame[each]) for frame, each in zip(pixels, main, strict=True)])
    alpha = _coverage(away, paint[:, None, None] - ground, main, mask & ~main)
    shape, size, x, y, plain = _fit(alpha)
    outline = _outline(shape, size, x, y)
    return _Figure((contrast > GHOST_CONTRAST) & ~(outline <= SPARE), paint, alpha, shape, size, x, y, plain, outline)


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


def _outline(shape: Array, size: Array, x: Array, y: Array) -> Array:
    """Signed distance [T, 64, 64] of every pixel from the outline of shape, size, centre [T]; nan where size is nan."""
    centers = np.arange(PIXELS, dtype=np.float32) + 0.5
    dx, dy = ((centers - at[:, None]).astype(np.float32) for at in (x, y))
    outline = np.full((len(x), PIXELS, PIXELS), np.nan, np.float32)
    for word in SLOTS["shape"]:
        these = (shape == word) & np.isfinite(size)
        scale = size[these, None, None].astype(np.float32)
        outline[these] = distance(word, scale, dx[these, None, :], dy[these, :, None])
    return outline


def _fit(alpha: Array) -> tuple[Array, Array, Array, Array, Array]:
    """Shape word, size, x, y, and whether in plain view, each [T], of coverages [T, 64, 64]; "" and nan = no object.

    An object in plain view has its centre at the centroid and its size from the area. One that is cut by the edge, or
    melted into another, is searched for at the size of the nearest frame in plain view.
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
        scale = size[known[np.abs(known - t).argmin()]] if len(known) else COMMON_SIZE
        best[t], x[t], y[t] = _search(alpha[t], scale)
        size[t] = scale
    return np.where(there, np.array(SLOTS["shape"])[best], ""), size, x, y, plain


def _rim(cover: Array) -> Array:
    """The largest coverage [T] on the edge of the picture: from one half, the object is cut there, or as good as."""
    rim: Array = np.maximum(cover[:, :, [0, -1]].max((1, 2)), cover[:, [0, -1]].max((1, 2)))
    return rim


def _misfit(alpha: Array, word: str, size: Array, x: Array, y: Array) -> Array:
    """Squared error [T], in pixels, between coverages [T, 64, 64] and one shape drawn at size, x, y [T].

    The drawing is a little blurred: an autoencoder rounds the corners of a square, and should not make it a circle.
    """
    drawn = _blurred(np.clip(0.5 - _outline(np.full(len(x), word), size, x, y), 0, 1))
    error: Array = np.einsum("tyx,tyx->t", alpha - drawn, alpha - drawn)
    return error


def _blurred(pictures: Array) -> Array:
    """Pictures [T, 64, 64] after a binomial blur of three pixels each way, up to their edges."""
    soft = pictures.copy()
    soft[:, 1:-1] = (pictures[:, :-2] + 2 * pictures[:, 1:-1] + pictures[:, 2:]) / 4
    both = soft.copy()
    both[:, :, 1:-1] = (soft[:, :, :-2] + 2 * soft[:, :, 1:-1] + soft[:, :, 2:]) / 4
    return both


def _search(alpha: Array, size: float) -> tuple[int, float, float]:
    """The shape (its place in SLOTS) and centre (x, y) that explain a coverage [64, 64] best; it may be cut off."""
    side = PIXELS + 2 * PAD
    inside = np.pad(np.ones((PIXELS, PIXELS), np.float32), PAD)
    have, where = np.fft.rfft2(np.pad(alpha, PAD)), np.fft.rfft2(inside)
    near = (np.arange(side) + side // 2) % side - side // 2 + 0.5  # offsets from a centre at the corner, wrapped round
    found = []
    for number, word in enumerate(SLOTS["shape"]):
        drawn = np.clip(0.5 - distance(word, size, near, near[:, None]), 0, 1).astype(np.float32)
        match = np.fft.irfft2(have * np.fft.rfft2(drawn).conj(), (side, side))
        amount = np.fft.irfft2(where * np.fft.rfft2(drawn**2).conj(), (side, side))
        error = amount - 2 * match
        y, x = divmod(int(error.argmin()), side)
        column, row = error[:, x], error[y]
        found.append((error[y, x], number, x + _dip(row, x) - PAD, y + _dip(column, y) - PAD))
    return min(found)[1:]


def _dip(line: Array, lowest: int) -> float:
    """Where between the samples a line has its minimum: offset -0.5..0.5 from the lowest one, by a parabola."""
    before, here, after = line[lowest - 1], line[lowest], line[(lowest + 1) % len(line)]
    bend = before - 2 * here + after
    return float(np.clip((before - after) / (2 * bend), -0.5, 0.5)) if bend > 0 else 0.0


# --- looks -----------------------------------------------------------------------------------------------------------


def _per_word(words: Array, values: dict[str, float]) -> Array:
    """The value of each word [T]; nan for a word without one."""
    return np.array([values.get(word, np.nan) for word in words.tolist()])


def _color_words(paint: Array) -> tuple[Array, Array]:
    """Colour word and hue in degrees, each [T], of RGB in 0..255 [T, 3]: the nearest hue, if it is vivid enough."""
    known_paint = np.nan_to_num(paint.astype(np.float64))
    chroma = np.ptp(known_paint, axis=1)
    turns = (np.roll(known_paint, -1, 1) - np.roll(known_paint, 1, 1)) / chroma.clip(1)[:, None] + [0, 2, 4]
    hue = 60 * np.take_along_axis(turns, known_paint.argmax(1)[:, None], 1)[:, 0] % 360
    vivid = chroma >= LEAST_CHROMA
    known = np.array(list(HUES.values()))
    nearest = np.abs((hue[:, None] - known + 180) % 360 - 180).argmin(1)
    return np.where(vivid, np.array(list(HUES))[nearest], ""), np.where(vivid, hue, np.nan)


def _radius(figure: _Figure) -> Array:
    """Distance [T, 64, 64] of every pixel from the object's centre."""
    centers = np.arange(PIXELS, dtype=np.float32) + 0.5
    x, y = (axis[:, None, None].astype(np.float32) for axis in (figure.x, figure.y))
    radius: Array = np.hypot(centers - x, centers[:, None] - y)
    return radius


def _marks(pixels: Array, figure: _Figure) -> tuple[Array, Array]:
    """Mark word [T] and its colour [T, 3], by what the middle of the mark's place is most like."""
    core = _radius(figure) < np.maximum(MARK_RADIUS * figure.size - 1, 1)[:, None, None]
    mean = np.einsum("tyx,tyxc->tc", core.astype(np.float32), pixels) / core.sum((1, 2)).clip(1)[:, None]
    choices = np.stack([figure.paint, *(np.broadcast_to(rgb, mean.shape) for rgb in MARK_COLORS.values())], axis=1)
    best = np.nan_to_num(np.square(mean[:, None] - choices).sum(-1)).argmin(1)
    words = np.where(np.isfinite(figure.size), np.array(["none", *MARK_COLORS])[best], "")
    return words, np.take_along_axis(choices, best[:, None, None], 1)[:, 0]


def _over(under: Array, color: Array, cover: Array) -> Array:
    """Colours [T, 3] painted over pictures [T, 64, 64, 3] as far as cover [T, 64, 64] goes."""
    painted: Array = under + np.nan_to_num(cover)[..., None] * (np.nan_to_num(color)[:, None, None] - under)
    return painted


def _steepness(alpha: Array) -> Array:
    """Sum [T] of the squared slope of coverages [T, 64, 64]: the steeper the edge, the more."""
    down, across = alpha[:, 2:] - alpha[:, :-2], alpha[:, :, 2:] - alpha[:, :, :-2]
    slope: Array = np.einsum("tyx,tyx->t", down, down) + np.einsum("tyx,tyx->t", across, across)
    return slope
