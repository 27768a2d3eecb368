"""The picture of a bench."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hforce.bench_report import BenchResult, Row, Sample
from hforce.plots import check_plot, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOTTED_DRIFT = (
    "color_right", "shape_right", "ground_right", "pattern_right", "motion_right", "one_object", "mark_kept"
)  # fmt: skip
SMOOTH = 9  # chunks of the running median in the picture
DPI = 130
# Okabe and Ito, the yellow darkened: apart for all kinds of colour vision. They begin anew where there are more setups.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#22262B", "#B5A800")
STAGE_COLORS = ("#3B5B92", "#7A8FB5", "#B08A4A")
LEAST_LABELLED = 0.06  # of the axis: in less there is no room for a label
LEAST_SCALE = 0.1  # of the axis of drift, so that next to nothing looks like it


def plot(result: BenchResult, path: Path) -> None:
    """A PNG: chunk time and memory over the video, the stages of a chunk, frames a second and, where judged, drift.

    Raises what `check_plot` raises, and OutputError or its kin when the file cannot be written.
    """
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    judged = any(row.drift for row in result.rows)
    figure = Figure(figsize=(11, 10.5 if judged else 7.5), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    times, memory, stages, speeds, *drifts = _panels(figure, judged)
    _draw_times(times, result)
    _draw_memory(memory, result)
    _draw_stages(stages, result)
    _draw_speeds(speeds, result.rows)
    for axes in drifts:
        _draw_drift(axes, result.rows)
    save_figure(figure, path)


def _panels(figure: Any, judged: bool) -> list[Axes]:
    """Two rows of two panels, and a wide one below where there is drift to show."""
    grid = figure.add_gridspec(3 if judged else 2, 2, width_ratios=(3, 2))
    places = [grid[0, 0], grid[0, 1], grid[1, 0], grid[1, 1], *([grid[2, :]] if judged else [])]
    return [figure.add_subplot(place) for place in places]


def _draw_times(axes: Axes, result: BenchResult) -> None:
    """Median over prompts of every chunk's time, thin, and a running median of it."""
    tops = []
    for row, color in zip(result.rows, cycle(COLORS), strict=False):
        seconds, found = _course(result, row.setup, lambda sample: sample.whole)
        times = 1e3 * found
        axes.plot(seconds, times, color=color, alpha=0.3, linewidth=0.8)
        axes.plot(seconds, _running_median(times), color=color, linewidth=1.8, label=row.setup)
        tops.append(np.percentile(times[result.warmup :], 99))
    axes.set(xlabel="seconds of video", ylabel="ms a chunk", title="Time of a chunk", ylim=(0, 1.15 * max(tops)))
    axes.legend(loc="upper left", ncols=3, frameon=False, fontsize=8)
    _tidy(axes)


def _draw_memory(axes: Axes, result: BenchResult) -> None:
    """Keys and values that the next chunk reads, and thin what is allocated for them from the start."""
    for row, color in zip(result.rows, cycle(COLORS), strict=False):
        seconds, frames = _course(result, row.setup, lambda sample: sample.frames_read)
        allocated = row.kv_bytes / 1e6
        axes.plot(seconds, allocated * frames / row.frames_read, color=color, linewidth=1.8)
        axes.axhline(allocated, color=color, linewidth=0.8, alpha=0.6, linestyle=":")
    axes.set(xlabel="seconds of video", ylabel="MB", title="Keys and values (dotted: allocated)")
    axes.set_ylim(bottom=0)
    _tidy(axes)


def _course(result: BenchResult, setup: str, number: Callable[[Sample], float]) -> tuple[Any, Any]:
    """Seconds of video at the end of every chunk, and a number of the chunk, the median over prompts."""
    runs = [trial.samples for trial in result.trials[setup]]
    length = min(map(len, runs))
    values = np.median([[number(sample) for sample in run[:length]] for run in runs], axis=0)
    return np.cumsum([sample.frames for sample in runs[0][:length]]) / result.config["video"]["fps"], values


def _draw_stages(axes: Axes, result: BenchResult) -> None:
    """Where the time of a mean chunk goes: a bar for every setup."""
    spots = np.arange(len(result.rows))
    left = np.zeros(len(spots))
    longest = max(sum(1e3 * stage.seconds for stage in stages.values()) for stages in result.stages.values())
    for number, name in enumerate(next(iter(result.stages.values()))):
        times = np.array([1e3 * result.stages[row.setup][name].seconds for row in result.rows])
        shares = [f"{result.stages[row.setup][name].share:.0%}" if time > LEAST_LABELLED * longest else ""
                  for row, time in zip(result.rows, times, strict=True)]  # fmt: skip
        bars = axes.barh(spots, times, 0.6, left, color=STAGE_COLORS[number], label=name)
        axes.bar_label(bars, shares, label_type="center", fontsize=8, color="white")
        left += times
    axes.set_yticks(spots, [row.setup for row in result.rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="ms a chunk", title="Stages of a mean chunk, with their share of the ceiling")
    axes.set_ylim(len(spots) - 0.4, -1.1)
    axes.legend(loc="upper left", ncols=3, frameon=False, fontsize=8)
    _tidy(axes, "x")


def _running_median(values: Any) -> Any:
    padded = np.pad(values, SMOOTH // 2, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, SMOOTH), axis=-1)


def _draw_speeds(axes: Axes, rows: Sequence[Row]) -> None:
    _draw_bars(axes, [row.setup.replace("-", "-\n") for row in rows], {
        "D: denoising and clean pass": ([row.denoise_fps for row in rows], "0.35"),
        "E2E: with decoding": ([row.e2e_fps for row in rows], "0.7"),
    })
    for container in axes.containers:
        axes.bar_label(container, fmt="%.0f", fontsize=8)  # type: ignore[arg-type]
    axes.set(ylabel="video frames a second", title="Speed")
    axes.margins(y=0.25)


def _draw_drift(axes: Axes, rows: Sequence[Row]) -> None:
    series, top = {}, LEAST_SCALE
    for row, color in zip(rows, cycle(COLORS), strict=False):
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
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.legend(frameon=False, fontsize=8)
    _tidy(axes)


def _tidy(axes: Axes, along: Literal["x", "y"] = "y") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=along, alpha=0.25)
    axes.set_axisbelow(True)
