"""The picture of a bench."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hforce.bench_report import BenchResult, Row
from hforce.plots import check_plot, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOTTED_DRIFT = (
    "color_right", "shape_right", "ground_right", "pattern_right", "motion_right", "one_object", "mark_kept"
)  # fmt: skip
SMOOTH = 9  # chunks of the running median in the picture
DPI = 130
# Okabe and Ito: apart for all kinds of colour vision, and as many as there are setups.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#22262B")
LEAST_SCALE = 0.1  # of the axis of drift, so that next to nothing looks like it


def plot(result: BenchResult, path: Path) -> None:
    """A PNG of chunk time over the video, frames a second and, where it is judged, drift.

    Raises what `check_plot` raises, and OutputError or its kin when the file cannot be written.
    """
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    times, speeds, *drifts = _panels(figure, any(row.drift for row in result.rows))
    _draw_times(times, result)
    _draw_speeds(speeds, result.rows)
    for axes in drifts:
        _draw_drift(axes, result.rows)
    save_figure(figure, path)


def _panels(figure: Any, judged: bool) -> list[Axes]:
    """One wide panel above; below one, or two of which the second has more room."""
    grid = figure.add_gridspec(2, 2, width_ratios=(2, 3))
    wide = figure.add_subplot(grid[0, :])
    places = [grid[1, 0], grid[1, 1]] if judged else [grid[1, :]]
    return [wide, *(figure.add_subplot(place) for place in places)]


def _draw_times(axes: Axes, result: BenchResult) -> None:
    """Median over prompts of every chunk's time, thin, and a running median of it."""
    fps = result.config["video"]["fps"]
    tops = []
    for number, row in enumerate(result.rows):
        runs = [trial.samples for trial in result.trials[row.setup]]
        length = min(map(len, runs))
        times = 1e3 * np.median([[s.whole for s in run[:length]] for run in runs], axis=0)
        seconds = np.cumsum([s.frames for s in runs[0][:length]]) / fps
        color = COLORS[number % len(COLORS)]
        axes.plot(seconds, times, color=color, alpha=0.3, linewidth=0.8)
        axes.plot(seconds, _running_median(times), color=color, linewidth=1.8, label=row.setup)
        tops.append(np.percentile(times[result.warmup :], 99))
    axes.set(xlabel="seconds of video", ylabel="ms a chunk", title="Time of a chunk", ylim=(0, 1.15 * max(tops)))
    axes.legend(loc="upper left", ncols=len(result.rows), frameon=False)
    _tidy(axes)


def _running_median(values: Any) -> Any:
    padded = np.pad(values, SMOOTH // 2, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, SMOOTH), axis=-1)


def _draw_speeds(axes: Axes, rows: Sequence[Row]) -> None:
    _draw_bars(axes, [row.setup for row in rows], {
        "D: denoising and clean pass": ([row.denoise_fps for row in rows], "0.35"),
        "E2E: with decoding": ([row.e2e_fps for row in rows], "0.7"),
    })
    for container in axes.containers:
        axes.bar_label(container, fmt="%.0f", fontsize=8)  # type: ignore[arg-type]
    axes.set(ylabel="video frames a second", title="Speed")
    axes.margins(y=0.25)


def _draw_drift(axes: Axes, rows: Sequence[Row]) -> None:
    series, top = {}, LEAST_SCALE
    for row, color in zip(rows, COLORS, strict=False):
        values = [(row.drift or {}).get(name) for name in PLOTTED_DRIFT]
        series[row.setup] = ([np.nan if value is None else value for value in values], color)
        top = max([top, *(abs(value) for value in values if value is not None)])
    _draw_bars(axes, [name.replace("_", "\n") for name in PLOTTED_DRIFT], series)
    axes.axhline(0, color="0.2", linewidth=0.8)
    axes.set(ylabel="change of the share of frames", title="Drift: last five seconds minus first five")
    axes.set_ylim(-1.15 * top, 1.15 * top)


def _draw_bars(axes: Axes, groups: Sequence[str], series: Mapping[str, tuple[Iterable[float], str]]) -> None:
    """Bars side by side: a group for every name, in it a bar of every series (heights and colour)."""
    width = 0.8 / len(series)
    for number, (label, (heights, color)) in enumerate(series.items()):
        spots = np.arange(len(groups)) + (number - (len(series) - 1) / 2) * width
        axes.bar(spots, list(heights), width, color=color, label=label)
    axes.set_xticks(range(len(groups)), groups, fontsize=8)
    axes.legend(frameon=False, fontsize=8)
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
