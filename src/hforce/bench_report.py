"""What a bench found: rows out of raw samples, and the JSON of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from types import MappingProxyType
from typing import Any

import numpy as np

from hforce.errors import InterruptedRun
from hforce.roofline import Ceiling, Stage

KIND = "hforce.bench/1"
REFERENCE = "window"  # the setup that others are compared with, where it takes part
EARLY, LATE = 10, 10  # `growth` is the last LATE chunks of a run over as many of a young one, from number EARLY on
FEWEST = 30  # chunks of a run from which growth is told: the two stretches and as many between them
FEWEST_STEADY = 10  # chunks with full windows from which they are told of alone
PERCENTILES = (50, 95, 99)  # of the times of chunks

DEFINITIONS: Mapping[str, str] = MappingProxyType({
    "timing": "setups take turns chunk by chunk in one process, every second round in reverse, on the same script and "
    "seed, after one untimed chunk each; the first bench.warmup chunks count nowhere but in first_frame_ms, the last "
    "chunk is weighed instead of timed; with several prompts times and speeds are the median over them, bytes the most",
    "steady": "speeds and times are of steady chunks alone: from number max(bench.warmup, span / chunk) on, when "
    "windows are full; of all timed chunks where fewer than ten would be left",
    "steady_chunks": "how many those are, over all prompts; 30 or more tell percentiles",
    "frames_read": "latent frames a head reads once its cache is full, the chunk included; mean over heads",
    "denoise_fps": "D: video frames / seconds of denoising and of the clean pass that commits the chunk to the cache; "
    "a chunk is 12 video frames, the first one 9",
    "denoise_only_fps": "D-: the same without the clean pass",
    "e2e_fps": "E2E: video frames / wall time, with prompts, cache, decoding and conversion to bytes, without "
    "encoding; with the decoder that environment.decoder names",
    "decoders": "for every decoder its median ms a chunk, and e2e_fps with it: each decodes the same chunks in turn",
    "speed": "denoise_fps over that of the other setup in the same prompt, by the other's name",
    "chunk_ms": "wall time of a chunk as in e2e_fps: median, 95th and 99th percentile",
    "jitter": "p99 / p50 of chunk_ms",
    "first_frame_ms": "wall time from the prompt's text to the bytes of the first chunk, in a warm process; with "
    "random weights the prompt's embedding is drawn and not encoded",
    "kv_bytes": "keys and values of the past and of the chunk, as allocated",
    "peak_bytes": "weights of transformer and codec + kv_bytes + what recorded passes keep + what else a stream holds "
    "after its first chunk + the most bytes of new tensors alive at once in the last chunk; without text encoder; null "
    "where it cannot be told",
    "growth": "median wall time of the last ten timed chunks / that of chunks 10 to 19 of a second run of the same "
    "script that takes turns with them, so that a machine that slows down slows both; null below 30 timed chunks",
    "spread": "largest minus smallest denoise_fps over prompts / its median",
    "resident_growth_bytes": "resident memory of the process at the end minus that after chunk 20, all setups "
    "together, largest over prompts; `full` fills memory that was reserved before",
    "roofline": "of a mean steady chunk: operations of matrix products and convolutions, bytes that at least must "
    "move, seconds taken, and the share of the ceiling: the least time for the parts, each as slow as the slower of "
    "arithmetic and memory, over the time taken. The ceiling is measured in the same process: a large matrix product "
    "and a large copy. self-attention includes turning keys and queries and writing them to the cache",
    "drift": "judge of the tiny world: mean of the last five seconds minus that of the first five, or of the halves of "
    "a video of less than ten seconds; mean over prompts; *_right, *_kept and one_object are fractions of frames, "
    "ground_error and residual rms 0..1",
})


@dataclass(frozen=True)
class Sample:
    """One timed chunk: its number, the video frames it became, and seconds by stage; `whole` is the wall time.

    attend: seconds of self-attention, part of denoise and commit; frames_read: latent frames a head read in the mean;
    beside: seconds that other decoders took for the same chunk, by name, which are not in `whole`.
    """

    number: int
    frames: int
    denoise: float
    commit: float
    decode: float
    whole: float
    attend: float
    frames_read: float
    beside: Mapping[str, float]


@dataclass(frozen=True)
class Trial:
    """One setup on one prompt. `steady` is the number of the chunk from which windows are full; first_frame in seconds.

    frames: video frames of the whole. young: chunks 10 to 19 of a second run, which took turns with the last ones; none
    in a short video. drift is None where there is no judge, peak_bytes where it cannot be told.
    """

    prompt: str
    seed: int
    frames: int
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
    decoders: dict[str, dict[str, float]]
    steady_chunks: int
    speed: dict[str, float]
    chunk_ms: dict[str, float]
    jitter: float
    first_frame_ms: float
    kv_bytes: int
    peak_bytes: int | None
    growth: float | None
    spread: float
    drift: dict[str, float | None] | None


@dataclass(frozen=True)
class BenchResult:
    """Everything a bench found: a row a setup, the trials they come from (one a prompt), and where it ran.

    stopped: the request that ended it before all prompts were played; those that were are in it.
    """

    rows: tuple[Row, ...]
    trials: Mapping[str, Sequence[Trial]]
    stages: Mapping[str, Mapping[str, Stage]]
    ceiling: Ceiling
    warmup: int
    reference: str
    resident_growth_bytes: int | None
    environment: Mapping[str, Any]
    config: Mapping[str, Any]
    stopped: InterruptedRun | None = None


def make_rows(trials: Mapping[str, Sequence[Trial]], warmup: int, decoder: str) -> tuple[Row, ...]:
    """A row for every setup, from its trials; those of different setups are paired by prompt.

    decoder: the name of the one that they were made with.
    """
    runs = {name: [steady(trial, warmup) for trial in own] for name, own in trials.items()}
    speeds = {name: [_denoise_fps(run) for run in own] for name, own in runs.items()}
    return tuple(_row(name, own, runs[name], decoder, speeds) for name, own in trials.items())


def steady(trial: Trial, warmup: int) -> Sequence[Sample]:
    """The chunks with full windows, or all but the first `warmup` if those are too few to speak of."""
    timed = trial.samples[warmup:]
    full = [sample for sample in timed if sample.number >= trial.steady]
    return full if len(full) >= FEWEST_STEADY else timed


def mean_sample(samples: Sequence[Sample]) -> Sample:
    """The mean of every number of the samples, but for the decoders beside; it has the number of the first."""
    names = ("denoise", "commit", "decode", "whole", "attend", "frames_read")
    means = {name: sum(getattr(sample, name) for sample in samples) / len(samples) for name in names}
    return replace(samples[0], **means, beside={})


def choose_reference(setups: Sequence[str]) -> str:
    """The setup that the others are compared with."""
    return REFERENCE if REFERENCE in setups else setups[0]


def _row(
    name: str,
    trials: Sequence[Trial],
    runs: Sequence[Sequence[Sample]],
    decoder: str,
    speeds: Mapping[str, Sequence[float]],
) -> Row:
    own = speeds[name]
    chunk_ms = {
        f"p{p}": median(float(np.percentile([1e3 * s.whole for s in run], p)) for run in runs) for p in PERCENTILES
    }
    grown = [growth for trial in trials if (growth := _growth(trial)) is not None]
    peaks = [trial.peak_bytes for trial in trials if trial.peak_bytes is not None]
    return Row(
        setup=name,
        frames_read=max(trial.frames_read for trial in trials),
        denoise_fps=median(own),
        denoise_only_fps=median(_fps(run, lambda s: s.denoise) for run in runs),
        e2e_fps=median(_fps(run, lambda s: s.whole) for run in runs),
        decoders=_decoders(runs, decoder),
        steady_chunks=sum(map(len, runs)),
        speed={other: median(a / b for a, b in zip(own, theirs, strict=True)) for other, theirs in speeds.items()},
        chunk_ms=chunk_ms,
        jitter=chunk_ms["p99"] / chunk_ms["p50"],
        first_frame_ms=1e3 * median(trial.first_frame for trial in trials),
        kv_bytes=max(trial.kv_bytes for trial in trials),
        peak_bytes=max(peaks, default=None),
        growth=median(grown) if grown else None,
        spread=(max(own) - min(own)) / median(own),
        drift=_mean_drift([trial.drift for trial in trials if trial.drift is not None]),
    )


def _decoders(runs: Sequence[Sequence[Sample]], own: str) -> dict[str, dict[str, float]]:
    """By decoder, its median ms a chunk, and the frames a second end to end with it."""

    def measured(name: str) -> dict[str, float]:
        def taken(sample: Sample) -> float:
            return sample.decode if name == own else sample.beside[name]

        speeds = [_fps(run, lambda s: s.whole - s.decode + taken(s)) for run in runs]
        return {"ms": median(1e3 * taken(s) for run in runs for s in run), "e2e_fps": median(speeds)}

    return {name: measured(name) for name in (own, *runs[0][0].beside)}


def _fps(samples: Sequence[Sample], seconds: Callable[[Sample], float]) -> float:
    return sum(s.frames for s in samples) / sum(map(seconds, samples))


def _denoise_fps(samples: Sequence[Sample]) -> float:
    return _fps(samples, lambda s: s.denoise + s.commit)


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


def to_json(result: BenchResult) -> str:
    """The document `hforce.bench/1`: environment, config, definitions, a row a setup, and the raw samples in ms."""
    document = {
        "kind": KIND,
        "environment": dict(result.environment),
        "config": dict(result.config),
        "definitions": dict(DEFINITIONS),
        "reference": result.reference,
        "resident_growth_bytes": result.resident_growth_bytes,
        "ceiling": asdict(result.ceiling),
        "roofline": {
            setup: {name: _measured(stage) for name, stage in stages.items()} for setup, stages in result.stages.items()
        },
        "rows": [asdict(row) for row in result.rows],
        "samples": {name: [_raw(trial) for trial in trials] for name, trials in result.trials.items()},
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _measured(stage: Stage) -> dict[str, float]:
    return {**asdict(stage), "flops_per_second": stage.flops_per_second, "share": stage.share}


def _raw(trial: Trial) -> dict[str, Any]:
    stages = {"denoise_ms": "denoise", "commit_ms": "commit", "attention_ms": "attend", "decode_ms": "decode"}
    stages["chunk_ms"] = "whole"
    columns = {key: [round(1e3 * getattr(s, stage), 4) for s in trial.samples] for key, stage in stages.items()}
    return {
        "prompt": trial.prompt,
        "seed": trial.seed,
        "first_frame_ms": 1e3 * trial.first_frame,
        "kv_bytes": trial.kv_bytes,
        "peak_bytes": trial.peak_bytes,
        "drift": _mean_drift([trial.drift]) if trial.drift is not None else None,
        "frames": [s.frames for s in trial.samples],
        "frames_read": [s.frames_read for s in trial.samples],
        **columns,
        "beside_ms": [{name: round(1e3 * t, 4) for name, t in s.beside.items()} for s in trial.samples],
        "young_chunk_ms": [round(1e3 * s.whole, 4) for s in trial.young],
    }
