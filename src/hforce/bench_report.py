"""What a bench found: rows out of raw samples, and the table and the JSON of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from types import MappingProxyType
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

KIND = "hforce.bench/1"
REFERENCE = "window"  # the setup that others are compared with, where it takes part
EARLY, LATE = 10, 10  # `growth` is the last LATE chunks of a run over as many of a young one, from number EARLY on
FEWEST = 30  # chunks of a run from which growth is told: the two stretches and as many between them
FEWEST_STEADY = 10  # chunks with full windows from which their percentiles say something
SHOWN_DRIFT = ("one_object", "motion_right", "ground_error")  # what plain caches lose first
MB = 1e6
LARGE = 999.95  # from here the table rounds to whole numbers

DEFINITIONS: Mapping[str, str] = MappingProxyType({
    "timing": "setups take turns chunk by chunk in one process, every second round in reverse, on the same script and "
    "seed, after one untimed chunk each; the first bench.warmup chunks count nowhere but in first_frame_ms, the last "
    "chunk is weighed instead of timed; with several prompts times and speeds are the median over them, bytes the most",
    "frames_read": "latent frames a head reads once its cache is full, the chunk included; mean over heads",
    "denoise_fps": "D: video frames / seconds of denoising and of the clean pass that commits the chunk to the cache; "
    "a chunk is 12 video frames, the first one 9",
    "denoise_only_fps": "D-: the same without the clean pass",
    "e2e_fps": "E2E: video frames / wall time, with prompts, cache, decoding and conversion to bytes; without encoding",
    "speed": "denoise_fps over that of the other setup in the same prompt, by the other's name",
    "chunk_ms": "wall time of a chunk as in e2e_fps, of chunks from number max(bench.warmup, span / chunk) on, when "
    "windows are full; of all timed chunks where fewer than ten would be left",
    "first_frame_ms": "wall time from the prompt's text to the bytes of the first chunk, in a warm process",
    "kv_bytes": "keys and values of the past and of the chunk, as allocated",
    "peak_bytes": "weights of transformer and codec + kv_bytes + what else a stream holds after its first chunk + the "
    "most bytes of new tensors alive at once in the last chunk; without text encoder; null where it cannot be told",
    "growth": "median wall time of the last ten timed chunks / that of chunks 10 to 19 of a second run of the same "
    "script that takes turns with them, so that a machine that slows down slows both; null below 30 timed chunks",
    "spread": "largest minus smallest denoise_fps over prompts / its median",
    "resident_growth_bytes": "resident memory of the process at the end minus that after chunk 20, all setups "
    "together, largest over prompts; `full` fills memory that was reserved before",
    "drift": "judge of the tiny world: mean of the last five seconds minus that of the first five, mean over prompts "
    "of a single shot; *_right, *_kept and one_object are fractions of frames, ground_error and residual rms 0..1",
})


@dataclass(frozen=True)
class Sample:
    """One timed chunk: its number, the video frames it became, and seconds by stage; `whole` is the wall time."""

    number: int
    frames: int
    denoise: float
    commit: float
    decode: float
    whole: float


@dataclass(frozen=True)
class Trial:
    """One setup on one prompt. `steady` is the number of the chunk from which windows are full; first_frame in seconds.

    young: chunks 10 to 19 of a second run, which took turns with the last ones; none in a short video. drift is None
    where there is no judge, peak_bytes where it cannot be told.
    """

    prompt: str
    seed: int
    samples: tuple[Sample, ...]
    young: tuple[Sample, ...]
    steady: int
    first_frame: float
    frames_read: float
    kv_bytes: int
    peak_bytes: int | None
    drift: Mapping[str, float] | None


@dataclass(frozen=True)
class Row:
    """The numbers of one setup, as DEFINITIONS says."""

    setup: str
    frames_read: float
    denoise_fps: float
    denoise_only_fps: float
    e2e_fps: float
    speed: dict[str, float]
    chunk_ms: dict[str, float]
    first_frame_ms: float
    kv_bytes: int
    peak_bytes: int | None
    growth: float | None
    spread: float
    drift: dict[str, float | None] | None


@dataclass(frozen=True)
class BenchResult:
    """Everything a bench found: a row a setup, the trials they come from (one a prompt), and where it ran."""

    rows: tuple[Row, ...]
    trials: Mapping[str, Sequence[Trial]]
    warmup: int
    reference: str
    resident_growth_bytes: int | None
    environment: Mapping[str, Any]
    config: Mapping[str, Any]


def make_rows(trials: Mapping[str, Sequence[Trial]], warmup: int) -> tuple[Row, ...]:
    """A row for every setup, from its trials; those of different setups are paired by prompt."""
    speeds = {name: [_denoise_fps(_timed(trial, warmup)) for trial in own] for name, own in trials.items()}
    return tuple(_row(name, own, warmup, speeds) for name, own in trials.items())


def choose_reference(setups: Sequence[str]) -> str:
    """The setup that the others are compared with."""
    return REFERENCE if REFERENCE in setups else setups[0]


def _row(name: str, trials: Sequence[Trial], warmup: int, speeds: Mapping[str, Sequence[float]]) -> Row:
    runs = [_timed(trial, warmup) for trial in trials]
    own = speeds[name]
    steady = [_steady_ms(run, trial.steady) for run, trial in zip(runs, trials, strict=True)]
    grown = [growth for trial in trials if (growth := _growth(trial)) is not None]
    peaks = [trial.peak_bytes for trial in trials if trial.peak_bytes is not None]
    return Row(
        setup=name,
        frames_read=max(trial.frames_read for trial in trials),
        denoise_fps=median(own),
        denoise_only_fps=median(_fps(run, lambda s: s.denoise) for run in runs),
        e2e_fps=median(_fps(run, lambda s: s.whole) for run in runs),
        speed={other: median(a / b for a, b in zip(own, theirs, strict=True)) for other, theirs in speeds.items()},
        chunk_ms={f"p{p}": median(float(np.percentile(ms, p)) for ms in steady) for p in (50, 90)},
        first_frame_ms=1e3 * median(trial.first_frame for trial in trials),
        kv_bytes=max(trial.kv_bytes for trial in trials),
        peak_bytes=max(peaks, default=None),
        growth=median(grown) if grown else None,
        spread=(max(own) - min(own)) / median(own),
        drift=_mean_drift([trial.drift for trial in trials if trial.drift is not None]),
    )


def _timed(trial: Trial, warmup: int) -> Sequence[Sample]:
    return trial.samples[warmup:]


def _fps(samples: Sequence[Sample], seconds: Callable[[Sample], float]) -> float:
    return sum(s.frames for s in samples) / sum(map(seconds, samples))


def _denoise_fps(samples: Sequence[Sample]) -> float:
    return _fps(samples, lambda s: s.denoise + s.commit)


def _steady_ms(samples: Sequence[Sample], steady: int) -> list[float]:
    """Wall times of the chunks with full windows, or of all if those are too few to speak of."""
    times = [1e3 * s.whole for s in samples if s.number >= steady]
    return times if len(times) >= FEWEST_STEADY else [1e3 * s.whole for s in samples]


def _growth(trial: Trial) -> float | None:
    if not trial.young:
        return None
    late, early = (median(s.whole for s in samples) for samples in (trial.samples[-LATE:], trial.young))
    return late / early


def _mean_drift(drifts: Sequence[Mapping[str, float]]) -> dict[str, float | None] | None:
    """The mean of every measure over the prompts that have it."""
    if not drifts:
        return None
    known = {name: [d[name] for d in drifts if np.isfinite(d[name])] for name in drifts[0]}
    return {name: sum(values) / len(values) if values else None for name, values in known.items()}


def table(result: BenchResult) -> Table:
    """The rows as a table of at most 120 columns; speed is against the reference, drift as far as it is measured."""
    judged = any(row.drift for row in result.rows)
    caption = Text(_caption(result))
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=caption, caption_justify="left")
    shown.add_column("setup", no_wrap=True)
    drifts = ["Δ" + name.replace("_", "\n") for name in SHOWN_DRIFT] if judged else []
    for head in ("frames\nread", "D\nFPS", "E2E\nFPS", f"speed vs\n{result.reference}", "p50\nms", "p90\nms",
                 "first\nms", "KV\nMB", "peak\nMB", "growth", *drifts):
        shown.add_column(head, justify="right", no_wrap=True)
    for row in result.rows:
        peak = None if row.peak_bytes is None else row.peak_bytes / MB
        numbers = [row.frames_read, row.denoise_fps, row.e2e_fps, row.speed[result.reference], row.chunk_ms["p50"],
                   row.chunk_ms["p90"], row.first_frame_ms, row.kv_bytes / MB, peak, row.growth]
        forms = ["", "", "", ".2f", "", "", "", "", "", ".2f"]
        told = [_told(value, form) for value, form in zip(numbers, forms, strict=True)]
        drift = [_told((row.drift or {}).get(name), "+.3f") for name in SHOWN_DRIFT] if judged else []
        shown.add_row(row.setup, *told, *drift)
    return shown


def _told(value: float | None, form: str) -> str:
    """A number for the table; without a form with one decimal, or none where it is large."""
    if value is None:
        return "–"
    return format(value, form or (".1f" if abs(value) < LARGE else ".0f"))


def _caption(result: BenchResult) -> str:
    place, bench = result.environment, result.config["bench"]
    prompts = len(result.trials[result.reference])
    noise = max(row.spread for row in result.rows)
    lines = [
        f"{bench['seconds']:g} s of video, {prompts} prompt{'s' * (prompts > 1)}, seed {bench['seed']}, "
        f"{place['device']}, {place['dtype']}, {place['threads']} thread{'s' * (place['threads'] != 1)}",
        "D: denoising and clean pass. E2E: with decoding to bytes, without encoding. "
        f"First {result.warmup} chunks not counted.",
    ]
    if any(row.drift for row in result.rows):
        lines.append("Δ: last five seconds minus the first five, as fractions of frames, ground error as rms 0..1.")
    if prompts > 1:
        lines.append(f"D of one setup differs by up to {noise:.0%} from prompt to prompt.")
    if result.resident_growth_bytes is not None:
        grown = result.resident_growth_bytes / MB
        lines.append(f"The process grew by {grown:.1f} MB from chunk 20 to the end, all setups together.")
    return "\n".join(lines)


def to_json(result: BenchResult) -> str:
    """The document `hforce.bench/1`: environment, config, definitions, a row a setup, and the raw samples in ms."""
    document = {
        "kind": KIND,
        "environment": dict(result.environment),
        "config": dict(result.config),
        "definitions": dict(DEFINITIONS),
        "reference": result.reference,
        "resident_growth_bytes": result.resident_growth_bytes,
        "rows": [asdict(row) for row in result.rows],
        "samples": {name: [_raw(trial) for trial in trials] for name, trials in result.trials.items()},
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _raw(trial: Trial) -> dict[str, Any]:
    stages = {"denoise_ms": "denoise", "commit_ms": "commit", "decode_ms": "decode", "chunk_ms": "whole"}
    columns = {key: [round(1e3 * getattr(s, stage), 4) for s in trial.samples] for key, stage in stages.items()}
    return {
        "prompt": trial.prompt,
        "seed": trial.seed,
        "first_frame_ms": 1e3 * trial.first_frame,
        "kv_bytes": trial.kv_bytes,
        "peak_bytes": trial.peak_bytes,
        "drift": _mean_drift([trial.drift]) if trial.drift is not None else None,
        "frames": [s.frames for s in trial.samples],
        **columns,
        "young_chunk_ms": [round(1e3 * s.whole, 4) for s in trial.young],
    }
