"""What a bench found, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, Group
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from hforce.bench_report import BenchResult, Row, steady
from hforce.toy.metrics import EDGE_SECONDS
from hforce.toy.world import FPS

SHOWN_DRIFT = ("one_object", "motion_right", "ground_error")  # what plain caches lose first
MB, GIGA, TERA = 1e6, 1e9, 1e12
LARGE = 99.95  # from here the table rounds to whole numbers
WIDEST = 1000  # columns, in which any table fits
MANY_STEADY = 30  # chunks from which percentiles say something

Column = tuple[str, str, Callable[[Row], float | None]]
"""Head, form of its numbers ("": as `_told` has it), and the number of a row."""


def table(result: BenchResult) -> Group:
    """Two tables of at most 120 columns: a row a setup, or a column where that is too wide; and where its time goes."""
    shown = Fitting(_setups(result), _setups_on_end(result))
    return Group(shown, Text(_caption(result) + "\n"), _roofline(result), Text(_ceiling(result)))


@dataclass(frozen=True)
class Fitting:
    """A table, or where it would not fit the same one in another form."""

    wide: Table
    narrow: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        fits = Measurement.get(console, options.update(width=WIDEST), self.wide).maximum <= options.max_width
        yield self.wide if fits else self.narrow


def _setups(result: BenchResult) -> Table:
    """Speed is against the reference, drift as far as it is measured."""
    shown = _blank()
    shown.add_column("setup", no_wrap=True)
    columns = _columns(result)
    for head, _, _ in columns:
        shown.add_column(head, justify="right", no_wrap=True)
    for row in result.rows:
        shown.add_row(row.setup, *(_told(number(row), form) for _, form, number in columns))
    return shown


def _setups_on_end(result: BenchResult) -> Table:
    """The same numbers, a column for every setup."""
    shown = _blank()
    shown.add_column("", no_wrap=True)
    for row in result.rows:
        shown.add_column(row.setup, justify="right", overflow="fold")
    for head, form, number in _columns(result):
        shown.add_row(head.replace("/\n", "/").replace("\n", " "), *(_told(number(row), form) for row in result.rows))
    return shown


def _columns(result: BenchResult) -> list[Column]:
    columns: list[Column] = [
        ("frames\nread", "", lambda row: row.frames_read),
        ("D-\nFPS", "", lambda row: row.denoise_only_fps),
        ("D\nFPS", "", lambda row: row.denoise_fps),
    ]
    columns += [_speed_with(decoder) for decoder in result.rows[0].decoders]
    columns += [
        (f"D vs\n{result.reference}", ".2f", lambda row: row.speed[result.reference]),
        ("p50\nms", "", lambda row: row.chunk_ms["p50"]),
        ("p95\nms", "", lambda row: row.chunk_ms["p95"]),
        ("p99/\np50", ".2f", lambda row: row.jitter),
        ("first\nms", "", lambda row: row.first_frame_ms),
        ("KV\nMB", "", lambda row: row.kv_bytes / MB),
        ("peak\nMB", "", lambda row: None if row.peak_bytes is None else row.peak_bytes / MB),
        ("late/\nearly", ".2f", lambda row: row.growth),
    ]
    if any(row.drift for row in result.rows):
        columns += [_drift_of(measure) for measure in SHOWN_DRIFT]
    return columns


def _speed_with(decoder: str) -> Column:
    return f"E2E\n{decoder}", "", lambda row: row.decoders[decoder]["e2e_fps"]


def _drift_of(measure: str) -> Column:
    return "Δ" + measure.replace("_", "\n"), "+.2f", lambda row: (row.drift or {}).get(measure)


def _roofline(result: BenchResult) -> Table:
    """Every stage of a mean steady chunk: its work, its time, and what share of the ceiling that is."""
    letter, unit = _unit(result)
    shown = _blank()
    shown.add_column("setup", no_wrap=True)
    shown.add_column("stage")
    for head in (f"{letter}FLOP", "GB", "ms", f"{letter}FLOP\n/s", "of\nceiling"):
        shown.add_column(head, justify="right", no_wrap=True)
    for setup, stages in result.stages.items():
        for name, stage in stages.items():
            work = (f"{stage.flops / unit:.4g}", f"{stage.nbytes / GIGA:.3g}", _told(1e3 * stage.seconds))
            shown.add_row(setup, name, *work, f"{stage.flops_per_second / unit:.3g}", f"{stage.share:.0%}")
    return shown


def _unit(result: BenchResult) -> tuple[str, float]:
    """Of operations, by what the device does in a second."""
    return ("T", TERA) if result.ceiling.flops_per_second >= TERA else ("G", GIGA)


def _ceiling(result: BenchResult) -> str:
    best, (letter, unit) = result.ceiling, _unit(result)
    return (
        f"A mean chunk. Ceiling, measured here: {best.flops_per_second / unit:.3g} {letter}FLOP/s in a matrix product, "
        f"{best.bytes_per_second / GIGA:.3g} GB/s in a copy."
    )


def _blank() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def _told(value: float | None, form: str = "") -> str:
    """A number for the table; without a form with one decimal, or none where it is large."""
    if value is None:
        return "–"
    return format(value, form or (".1f" if abs(value) < LARGE else ".0f"))


def _caption(result: BenchResult) -> str:
    place, trials = result.environment, result.trials[result.reference]
    frames, seeds, prompts = {trial.frames for trial in trials}, {trial.seed for trial in trials}, len(trials)
    length = " to ".join(map(str, sorted({min(frames), max(frames)})))
    seed = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, sorted(seeds)))}"
    noise = max(row.spread for row in result.rows)
    counted = min(row.steady_chunks for row in result.rows)
    layers, threads = (f"{place[word]} {word[: -1 if place[word] == 1 else None]}" for word in ("layers", "threads"))
    weights = f"random weights, {layers}" if place["random_weights"] else "its own weights"
    lines = [
        f"{place['model']} ({weights}), {length} video frames, {prompts} prompt{'s' * (prompts > 1)}, "
        f"{seed}, {place['device']}, {place['dtype']}, {threads}",
        "D-: denoising. D: with the clean pass. E2E: with this decoder, to bytes, without encoding. "
        f"Of {counted} chunks{' with full windows' * _are_full(result)}.",
    ]
    if counted < MANY_STEADY:
        lines.append(f"Percentiles of fewer than {MANY_STEADY} chunks say little: make the video longer.")
    if any(row.drift for row in result.rows):
        are_long = {count >= 2 * EDGE_SECONDS * FPS for count in frames}
        ends = "last five seconds minus the first five" if True in are_long else "second half minus the first"
        ends += " (of short videos, halves)" if len(are_long) > 1 else ""
        lines.append(f"Δ: {ends}, as fractions of frames, ground error as rms 0..1.")
    if prompts > 1:
        lines.append(f"D of one setup differs by up to {noise:.0%} from prompt to prompt.")
    if result.resident_growth_bytes is not None:
        grown = result.resident_growth_bytes / MB
        lines.append(f"The process grew by {grown:.1f} MB from chunk 20 to the end, all setups together.")
    return "\n".join(lines)


def _are_full(result: BenchResult) -> bool:
    """Whether all chunks that count are such with full windows."""
    return all(
        sample.number >= trial.steady
        for trials in result.trials.values()
        for trial in trials
        for sample in steady(trial, result.warmup)
    )
