"""What a video of the procedural world shows, from its pixels alone.

Analysis by synthesis: the background is taken from the picture itself (it repeats every 16 pixels), then the landmark
in its corner; what differs from both is cut out, the three shapes are drawn at the measured centre and size, and the
one that explains it best wins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hforce.errors import DataError
from hforce.toy.background import find_ground, ground_words, spread
from hforce.toy.blobs import areas
from hforce.toy.figure import AREAS, Figure, find_figure
from hforce.toy.landmarks import read_corners, sole_landmark
from hforce.toy.motion import likeliest_path
from hforce.toy.world import HUES, MARK_COLORS, MARK_RADIUS, PIXELS

BATCH = 256  # video frames read at once: bounds memory
COMMON_AREA = 230.0  # pixels: that of an object where none is seen
LEAST_CHROMA = 60.0  # of 255; below, an object has no colour word
WHOLE = 0.97  # visible fraction from which an object counts as fully in the picture

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a video of T frames shows. Words are "" and numbers nan where nothing can be said.

    cells [T, 4, 3] RGB in 0..255 of the four quarters of the background's 16 x 16 tile; ground, pattern [T] its words;
    tint [T] its brightness over the word's; corners [T, 4] what each of CORNERS shows (a landmark, "none", "blot" for
    something pale that is none, "" where something is in front); landmark, corner [T] the only landmark in sight;
    objects [T] how many there are; ghosts [T] the area of all but the main one, in areas of the main one; visible [T]
    the fraction of the main one inside the picture; color, shape, mark [T] its words; hue [T] in degrees 0..360; size
    [T] in pixels and sharpness [T], the steepness of its edge, where it is in plain view; x, y [T] in pixels; residual
    [T] rms 0..1 between the frame and its re-synthesis. motion, speed, lane are the words that fit the whole clip best.
    """

    cells: Array
    ground: Array
    pattern: Array
    tint: Array
    corners: Array
    landmark: Array
    corner: Array
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


def _read(video: NDArray[np.uint8]) -> dict[str, Array]:
    """The arrays of a Reading, for a short stretch of video."""
    pixels = video.astype(np.float32)
    cells, ground = find_ground(video)
    corners, backdrop = read_corners(pixels, ground)
    landmark, corner = sole_landmark(corners)
    figure = find_figure(pixels, backdrop)
    cover = np.nan_to_num(np.clip(0.5 - figure.outline, 0, 1))
    area = np.nan_to_num(figure.size**2 * _per_word(figure.shape, AREAS), nan=COMMON_AREA)
    visible = np.minimum(cover.sum((1, 2)) / area, 1)
    whole = visible >= WHOLE
    others = [areas(rest) for rest in figure.rest]
    dot = np.clip(0.5 + MARK_RADIUS * figure.size[:, None, None] - _radius(figure), 0, 1).astype(np.float32)
    mark, mark_paint = _marks(pixels, figure)
    color, hue = _color_words(figure.paint)
    drawn = _over(_over(spread(cells) + (backdrop - ground), figure.paint, cover), mark_paint, np.minimum(dot, cover))
    return {
        "cells": cells,
        **ground_words(cells),
        "corners": corners,
        "landmark": landmark,
        "corner": corner,
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
        "sharpness": np.where(_is_inside(figure), _steepness(figure.alpha) / np.sqrt(area), np.nan),
        "residual": np.sqrt(np.mean(np.square(pixels - drawn), axis=(1, 2, 3))) / 255,
    }


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


def _radius(figure: Figure) -> Array:
    """Distance [T, 64, 64] of every pixel from the object's centre."""
    centers = np.arange(PIXELS, dtype=np.float32) + 0.5
    x, y = (axis[:, None, None].astype(np.float32) for axis in (figure.x, figure.y))
    radius: Array = np.hypot(centers - x, centers[:, None] - y)
    return radius


def _marks(pixels: Array, figure: Figure) -> tuple[Array, Array]:
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


def _is_inside(figure: Figure) -> Array:
    """Whether the object is in plain view [T], and no part of its edge is at the edge of the picture."""
    rim = [0, 1, -2, -1]
    free = ~(figure.alpha[:, :, rim].any((1, 2)) | figure.alpha[:, rim].any((1, 2)))
    inside: Array = figure.plain & free
    return inside


def _steepness(alpha: Array) -> Array:
    """Sum [T] of the squared slope of coverages [T, 64, 64]: the steeper the edge, the more."""
    down, across = alpha[:, 2:] - alpha[:, :-2], alpha[:, :, 2:] - alpha[:, :, :-2]
    slope: Array = np.einsum("tyx,tyx->t", down, down) + np.einsum("tyx,tyx->t", across, across)
    return slope
