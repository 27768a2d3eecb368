"""What a length experiment found: means and paired differences with intervals, and their tables, JSON and picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from hforce.bench_plot import COLORS, DPI
from hforce.plots import check_plot, save_figure
from hforce.toy.metrics import Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KIND = "hforce.length/1"
MEASURES = tuple(field.name for field in fields(Scores))
SHOWN = ("color_right", "shape_right", "tint_kept", "landmark_kept", "mark_kept", "hue_kept", "size_kept", "one_object",
         "motion_right", "on_path", "on_time", "residual")  # fmt: skip
FILMS: Mapping[str, str] = MappingProxyType({
    "hold": "one prompt for the whole video",
    "return": "two prompts that take turns, each for ten seconds",
})
EDGE = 5  # seconds before a length over which a measure is averaged
REFERENCE = "window"  # every setup is compared with this one,
RIVALS = (("head-forcing", "uniform"), ("head-forcing", "uniform-memory"))  # and these pairs, each of nearly one budget
DRAWS, SEED = 4000, 0  # of the bootstrap
FEWEST = 6  # videos that have an interval: of five, all may change the same way by chance more often than 1 in 20 times
QUANTILES = (0.025, 0.975)
DIGITS = 6  # of the numbers in the JSON document
PANELS = 6  # in a row of the picture
DODGE = 1.015  # factor by which the lines of the picture are apart, so that none hides another

DEFINITIONS: Mapping[str, str] = MappingProxyType({
    "films": "kinds of film: " + "; ".join(f"{kind}: {told}" for kind, told in FILMS.items()) + ". Scenes have "
    "combinations of words that training never shows. A change of prompt is moved to the nearest chunk, so the last "
    "frames before a length may show the next scene already; they are judged by its words",
    "pairing": "every setup makes the same videos, from the same prompts and the same noise (seed)",
    "lengths": "seconds T. Each video is made once, at the longest; its beginning is the shorter video",
    "videos": "of each video: measure -> its value at every length, for every setup. The value at T is the mean of the "
    f"judge's measure over the last {EDGE} seconds before T, of the seconds that have something to judge; null where "
    "none has. The judge sees the whole video: what was first seen is that of the whole video, and the motion of a "
    "second shows in the 64 frames around it",
    "mean": "over the videos with a value",
    "low, high": f"95 % interval: quantiles {QUANTILES[0]:g} and {QUANTILES[1]:g} of the mean over {DRAWS} bootstrap "
    f"samples of the videos (as many, drawn with repetition; the same draws for all numbers of a kind of film); null "
    f"where fewer than {FEWEST} videos are known",
    "known": "how many videos have a value; an object that is not seen has neither colour nor shape nor mark, so where "
    "this number falls those who are left are the better ones: see one_object",
    "at": "the measure at each length",
    "change": "its value at each length minus that at the shortest one, of the same video; over videos that have both",
    "against": f"its value under the setup minus that under another, of the same video, at each length: every setup "
    f"against {REFERENCE}, and {' and '.join(' against '.join(pair) for pair in RIVALS)}",
    "clear": "the interval does not hold zero. Nothing is corrected for the number of comparisons: of those without "
    "any difference, about one in twenty is marked",
    "*_right, *_kept, one_object, one_landmark, continuity": "fractions 0..1 of frames, 1 is best: as the prompt says; "
    "as when the scene was first seen; exactly one in sight where one should be; no jump since the frame before",
    "on_time": "of the returns of a passing object to the picture, the fraction that is neither early nor late; not to "
    "come back counts too. The second in which that happens has the value, others have none",
    "motion_right": "fraction of seconds in which no motion, speed and lane fits the movement better than the prompt's",
    "on_path": "fraction of seconds in which the movement is within 3 pixels rms of the prompt's",
    "ghosts": "area of what should not be there, in areas of the object; 0 is best",
    "hue_error, size_error, ground_error": "degrees, pixels and rms 0..1 from when the scene was first seen",
    "residual": "rms 0..1 between the frame and a clean drawing of what is seen in it; 0 is best",
    "sharpness": "steepness of the object's edge over that when the scene was first seen; 1 is unchanged",
})

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """A video that every setup makes: its kind, and the prompts that take turns in it."""

    number: int
    kind: str
    prompts: tuple[str, ...]
    seed: int


class Estimate(NamedTuple):
    """Means over videos, their intervals, and how many videos are known: arrays of one shape."""

    mean: Floats
    low: Floats
    high: Floats
    known: NDArray[np.int64]

    @property
    def clear(self) -> NDArray[np.bool_]:
        """Where the interval does not hold zero."""
        return np.asarray((self.low > 0) | (self.high < 0))

    def part(self, *index: int) -> Estimate:
        """The estimates of one setup, or of one measure of it."""
        return Estimate(*(array[index] for array in self))


class Summary(NamedTuple):
    """One kind of film. at, change: [setups, measures, lengths]; against: (setup, other) -> [measures, lengths]."""

    at: Estimate
    change: Estimate
    against: Mapping[tuple[str, str], Estimate]


@dataclass(frozen=True)
class LengthResult:
    """Everything a length experiment found. values: float [videos, setups, measures, lengths], nan where unknown.

    summary: kind of film -> what its videos say.
    """

    cases: tuple[Case, ...]
    setups: tuple[str, ...]
    lengths: tuple[int, ...]
    values: Floats
    summary: Mapping[str, Summary]
    fingerprints: Mapping[str, str]
    environment: Mapping[str, Any]
    config: Mapping[str, Any]


def at_lengths(seconds: Sequence[float | None], lengths: Sequence[int]) -> list[float]:
    """A measure of every second -> its mean over the last five seconds before each length; nan where none is known."""
    values = np.array([np.nan if value is None else value for value in seconds], np.float64)
    ends = [values[max(0, length - EDGE) : length] for length in lengths]
    known = [end[np.isfinite(end)] for end in ends]
    return [round(float(end.mean()), DIGITS) if len(end) else np.nan for end in known]


def estimate(values: Floats) -> Estimate:
    """Mean over videos and its 95 % bootstrap interval: [videos, ...] -> [...]. What is nan does not count.

    Fewer than six known videos have no interval.
    """
    videos, shape = len(values), values.shape[1:]
    flat = values.reshape(videos, -1)
    is_known = np.isfinite(flat)
    draws = np.random.default_rng(SEED).multinomial(videos, [1 / videos] * videos, DRAWS).astype(np.float64)
    low, high, mean = (np.full(flat.shape[1], np.nan) for _ in range(3))
    for column, (own, known) in enumerate(zip(flat.T, is_known.T, strict=True)):
        if known.any():
            mean[column] = own[known].mean()
        if known.sum() >= FEWEST:
            weights = draws[:, known]
            drawn = weights.sum(1) > 0  # a sample may hold none of the few that are known
            means = weights[drawn] @ own[known] / weights[drawn].sum(1)
            low[column], high[column] = np.quantile(means, QUANTILES)
    return Estimate(*(array.reshape(shape) for array in (mean, low, high, is_known.sum(0))))


def summarise(values: Floats, setups: Sequence[str]) -> Summary:
    """The estimates of one kind of film, from its values [videos, setups, measures, lengths]."""
    place = {setup: number for number, setup in enumerate(setups)}
    differences = {(a, b): estimate(values[:, place[a]] - values[:, place[b]]) for a, b in comparisons(setups)}
    return Summary(estimate(values), estimate(values - values[..., :1]), differences)


def comparisons(setups: Sequence[str]) -> list[tuple[str, str]]:
    """Which setup is compared with which."""
    pairs = [(setup, REFERENCE) for setup in setups if setup != REFERENCE] + [*RIVALS]
    return [pair for pair in dict.fromkeys(pairs) if set(pair) <= set(setups)]


def table(result: LengthResult) -> Group:
    """A table for every kind of film, of at most 120 columns: a block a measure, in it a row a setup."""
    parts = [(Text(_title(result, kind), style="bold"), _film_table(result, kind)) for kind in result.summary]
    return Group(*(part for pair in parts for part in pair), _caption(result))


def _film_table(result: LengthResult, kind: str) -> Table:
    first, last = result.lengths[0], result.lengths[-1]
    shown = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    shown.add_column("setup", no_wrap=True)
    for length in result.lengths:
        shown.add_column(f"{length} s", justify="right", no_wrap=True)
    shown.add_column(f"{last} s minus {first} s", justify="right", no_wrap=True)
    shown.add_column(f"at {last} s minus {REFERENCE}", justify="right", no_wrap=True)
    for measure in SHOWN:
        shown.add_section()
        shown.add_row(Text(measure, style="bold"))
        for row in _rows(result.summary[kind], MEASURES.index(measure), result.setups):
            shown.add_row(*row)
    return shown


def _title(result: LengthResult, kind: str) -> str:
    count = sum(case.kind == kind for case in result.cases)
    return f"{kind}: {FILMS[kind]}; {count} video{'s' * (count != 1)}"


def _rows(summary: Summary, measure: int, setups: Sequence[str]) -> list[list[str]]:
    """The cells of one measure: a row a setup, then one for the rivals, whose numbers are differences."""
    rows = []
    for number, setup in enumerate(setups):
        at, change = summary.at.part(number, measure), summary.change.part(number, measure)
        against = summary.against.get((setup, REFERENCE))
        told = _told(against.part(measure)) if against else ""
        rows.append([f"  {setup}", *(_number(mean) for mean in at.mean), _told(change), told])
    for pair in RIVALS:
        if pair in summary.against:
            found = summary.against[pair].part(measure)
            marks = np.where(found.clear, "*", "")
            cells = [_number(mean, "+") + mark for mean, mark in zip(found.mean, marks, strict=True)]
            rows.append([f"  hf - {pair[1]}", *cells, "", _told(found)])
    return rows


def _told(found: Estimate) -> str:
    """A difference at the longest length with its interval, marked where that does not hold zero."""
    mean, low, high = (array[-1] for array in found[:3])
    if not np.isfinite(mean):
        return "–"
    interval = f" [{_number(low, '+')}, {_number(high, '+')}]" if np.isfinite(low) else ""
    return f"{_number(mean, '+')}{interval}{'*' if found.clear[-1] else ' '}"


def _number(value: float, sign: str = "") -> str:
    return format(round(value, 3) + 0.0, f"{sign}.3f") if np.isfinite(value) else "–"  # no minus before a zero


def _caption(result: LengthResult) -> Text:
    place, bench = result.environment, result.config["bench"]
    lines = [
        f"Mean of the last {EDGE} s before each length; [95 % bootstrap interval over videos], *: zero is not in it.",
        f"Differences are paired by video: the same prompts and noise, seeds from {bench['seed']}.",
        f"residual: rms 0..1, 0 is best; all others fractions, 1 is best. {place['device']}, {place['dtype']}.",
    ]
    if set(RIVALS) & set(comparisons(result.setups)):
        lines.append("hf - other: head-forcing minus that setup at each length, in the last column with an interval.")
    return Text("\n".join(lines))


def to_json(result: LengthResult) -> str:
    """The document `hforce.length/1`: environment, config, definitions, the value of every video, and the summary."""
    document = {
        "kind": KIND,
        "environment": dict(result.environment),
        "config": dict(result.config),
        "definitions": dict(DEFINITIONS),
        "fingerprints": dict(result.fingerprints),
        "lengths": list(result.lengths),
        "summary": {kind: _summary(found, result.setups) for kind, found in result.summary.items()},
        "videos": [
            {**asdict(case), "values": _by_setup(own, result.setups)}
            for case, own in zip(result.cases, result.values, strict=True)
        ],
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _by_setup(values: Floats, setups: Sequence[str]) -> dict[str, dict[str, list[float | None]]]:
    """values [setups, measures, lengths] by their names."""
    return {
        setup: {measure: _plain(row) for measure, row in zip(MEASURES, own, strict=True)}
        for setup, own in zip(setups, values, strict=True)
    }


def _summary(summary: Summary, setups: Sequence[str]) -> dict[str, Any]:
    """kind of estimate -> setup, or pair of them -> measure -> mean, low, high and known at each length."""
    found = {
        name: {setup: _by_measure(estimates.part(number)) for number, setup in enumerate(setups)}
        for name, estimates in (("at", summary.at), ("change", summary.change))
    }
    return {**found, "against": {f"{a} - {b}": _by_measure(found) for (a, b), found in summary.against.items()}}


def _by_measure(found: Estimate) -> dict[str, dict[str, list[Any]]]:
    rows = {}
    for number, measure in enumerate(MEASURES):
        own = found.part(number)
        rows[measure] = {"mean": _plain(own.mean), "low": _plain(own.low), "high": _plain(own.high),
                         "known": own.known.tolist(), "clear": own.clear.tolist()}  # fmt: skip
    return rows


def _plain(values: Floats) -> list[float | None]:
    """Numbers for JSON; None for nan."""
    return [round(value, DIGITS) if np.isfinite(value) else None for value in values.tolist()]


def plot(result: LengthResult, path: Path) -> None:
    """A PNG: a panel a measure and kind of film, in it a line a setup over the lengths, with its interval.

    Raises what `check_plot` raises, and OutputError or its kin when the file cannot be written.
    """
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(20, 11), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(len(result.summary), 1, hspace=0.04, squeeze=False)
    for part, (kind, summary) in zip(parts[:, 0], result.summary.items(), strict=True):
        part.suptitle(f"{_title(result, kind)}; last {EDGE} s, mean and 95 % interval")
        panels = part.subplots(-(-len(SHOWN) // PANELS), PANELS, sharex=True).flat
        for axes, measure in zip(panels, SHOWN, strict=True):
            _draw(axes, summary.at, measure, result)
    lines, names = axes.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=len(names), frameon=False)
    save_figure(figure, path)


def _draw(axes: Axes, at: Estimate, measure: str, result: LengthResult) -> None:
    """One measure over the lengths."""
    for number, setup in enumerate(result.setups):
        found, color = at.part(number, MEASURES.index(measure)), COLORS[number % len(COLORS)]
        spots = np.array(result.lengths) * DODGE ** (number - (len(result.setups) - 1) / 2)
        axes.plot(spots, found.mean, color=color, marker="o", markersize=3, linewidth=1.6, label=setup)
        axes.fill_between(spots, found.low, found.high, color=color, alpha=0.12, linewidth=0)
    axes.set_xscale("log")
    axes.set_xticks(result.lengths, [f"{length}" for length in result.lengths])
    axes.minorticks_off()
    axes.set(title=measure, ylim=(0, None) if measure == "residual" else (-0.03, 1.03))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    if axes.get_subplotspec().is_last_row():  # type: ignore[union-attr]
        axes.set_xlabel("seconds of video")
