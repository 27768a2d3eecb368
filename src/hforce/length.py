"""The length experiment: how well the tiny model keeps to its prompts under every cache, the longer the video gets."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from hforce.bench import BenchProgress, choose_setups, find_schedule
from hforce.build import build_backbone, build_plan, build_roles, build_script, build_stream, check_cache, count_cores
from hforce.decoding import decoded
from hforce.documents import file_digest, read_document
from hforce.errors import ConfigError, HforceError, OutputError, UnavailableError, cannot_write
from hforce.length_report import FILMS, MEASURES, Case, LengthResult, at_lengths, summarise
from hforce.length_report import plot as plot
from hforce.length_report import table as table
from hforce.length_report import to_json as to_json
from hforce.machine import environment
from hforce.models.base import Backbone
from hforce.models.tiny import PACKAGED
from hforce.plots import check_plot as check_plot
from hforce.prompts import Shot
from hforce.settings import OWN, Config, ModelConfig, SampleConfig
from hforce.toy.metrics import read_frames, score
from hforce.toy.words import LOOKS, sentence
from hforce.toy.world import FPS, PIXELS, Scene

log = logging.getLogger(__name__)

VERSION = 3  # of the experiment: raise it when the films, the stream or the judge change what the same settings give
LENGTHS = (5, 15, 30, 60, 120)  # seconds
TURN = 10.0  # seconds of a prompt that takes turns, which is twice what the model is trained on
SCENE_SEED = 40_000_000  # of the prompts. Training has 0 and 1 000 000, evaluation 20 000 000, the judge 30 000 000
UNTOLD = ("setup", "profile", "strict", "backend")  # settings of a cache that no result depends on, but for rounding
DIGITS = 5  # of a measure in the notes
MOST_NOTES_BYTES = 1 << 30
MODEL, SIZES = "tiny", ("", f"{PIXELS}x{PIXELS}")

Tell = Callable[[BenchProgress], None]


class Note(BaseModel):
    """A line of the notes: one video under one setup, and every measure of every second of it."""

    model_config = ConfigDict(frozen=True, strict=True)

    video: int
    setup: str
    seconds: int
    fingerprint: str
    scores: dict[str, list[float | None]]


@dataclass(frozen=True)
class Task:
    """One video to make under one setup. fingerprint: of all that the result depends on but video, setup and length."""

    case: Case
    setup: str
    config: Config
    seconds: int
    fingerprint: str

    @property
    def key(self) -> tuple[int, str]:
        """Video and setup."""
        return self.case.number, self.setup

    def is_met(self, note: Note) -> bool:
        """Whether this is what a note tells of."""
        is_full = {name: len(values) for name, values in note.scores.items()} == dict.fromkeys(MEASURES, self.seconds)
        told = ((note.video, note.setup), note.seconds, note.fingerprint)
        return is_full and told == (self.key, self.seconds, self.fingerprint)


def run(config: Config, tell: Tell, output: Path | None = None, lengths: Sequence[int] = LENGTHS) -> LengthResult:
    """Makes and judges config.bench.videos videos under all its setups, and sums up at every length.

    Lengths beyond config.bench.seconds are left out. Every finished video is noted at once in a file beside `output`,
    if that is given, and what is noted there is not made again. Raises ConfigError for what does not go with the
    experiment, and whatever stops a video.
    """
    config = replace(config, model=replace(config.model, threads=1))  # of each worker
    chosen = choose_lengths(config, lengths)
    configs = choose_setups(config)
    backbone = build_backbone(config)
    for each in configs.values():
        check_cache(each.cache, backbone)
    cases = [draw_case(number, config.bench.seed) for number in range(config.bench.videos)]
    marks = {name: fingerprint_of(each, backbone) for name, each in configs.items()}
    tasks = [Task(case, name, configs[name], chosen[-1], marks[name]) for case in cases for name in configs]
    workers = config.bench.workers or count_cores()
    with Notes(notes_path(output) if output else None, tasks) as notes:
        work_off(tasks, notes, backbone, workers, tell)
    rows = [at_lengths(notes.found[task.key].scores[measure], chosen) for task in tasks for measure in MEASURES]
    values = np.array(rows).reshape(len(cases), len(configs), len(MEASURES), len(chosen))
    kinds = np.array([case.kind for case in cases])
    return LengthResult(
        cases=tuple(cases),
        setups=tuple(configs),
        lengths=chosen,
        values=values,
        summary={kind: summarise(values[kinds == kind], tuple(configs)) for kind in FILMS},
        fingerprints=marks,
        environment={**environment(backbone), "workers": workers},
        config=asdict(config),
    )


def choose_lengths(config: Config, lengths: Sequence[int] = LENGTHS) -> tuple[int, ...]:
    """The lengths up to config.bench.seconds. Raises ConfigError for what does not go with the experiment."""
    if config.model.name != MODEL or config.model.size not in SIZES:
        told = f"{config.model.name!r}" + (f" at {config.model.size}" if config.model.size else "")
        raise ConfigError(f"the length experiment judges the model {MODEL!r} at {SIZES[1]}, not {told}",
                          "leave --model and --size out")  # fmt: skip
    if config.bench.random_weights or config.bench.layers or config.bench.decoders != [OWN]:
        raise ConfigError("the length experiment judges videos, which takes the model's own weights and decoder",
                          "leave --random-weights, bench.layers and bench.decoders out")  # fmt: skip
    if config.bench.prompts:
        raise ConfigError("the length experiment draws its own prompts", "leave bench.prompts out")
    if config.video.fps != FPS:
        raise ConfigError(f"the tiny world has {FPS} frames a second, video.fps is {config.video.fps}", "leave it out")
    chosen = tuple(length for length in lengths if length <= config.bench.seconds)
    if not chosen:
        raise ConfigError(f"the shortest length is {lengths[0]}s, bench.seconds is {config.bench.seconds:g}")
    return chosen


def draw_case(number: int, seed: int) -> Case:
    """Video number so and so: films that hold one scene and films that return to it in turns, of held-out scenes."""
    rng, kind = np.random.default_rng((SCENE_SEED, number)), tuple(FILMS)[number % len(FILMS)]
    scenes = [Scene.sample(rng, held_out=True)]
    while kind == "return" and len(scenes) < 2:
        other = Scene.sample(rng, held_out=True)
        if any(other.words[slot] != scenes[0].words[slot] for slot in LOOKS):
            scenes.append(other)
    return Case(number, kind, tuple(sentence(scene.words) for scene in scenes), seed + number)


def plan_shots(case: Case, seconds: float) -> tuple[Shot, ...]:
    """The prompts of a video of this length, each with its time."""
    turn = TURN if len(case.prompts) > 1 else seconds
    turns = range(math.ceil(seconds / turn))
    return tuple(Shot(case.prompts[i % len(case.prompts)], min(turn, seconds - turn * i)) for i in turns)


def fingerprint_of(config: Config, backbone: Backbone) -> str:
    """SHA-256 of everything that the result of a video depends on, but for its number, its setup and its length."""
    place = environment(backbone)
    cache = {key: value for key, value in asdict(config.cache).items() if key not in UNTOLD}
    told = {
        "version": VERSION,
        "weights": file_digest(Path(config.model.checkpoint or PACKAGED)),
        "roles": build_roles(config.cache, backbone).letters(),
        "cache": cache,
        "sample": asdict(config.sample),
        "seed": config.bench.seed,
        **{key: place[key] for key in ("hforce", "torch", "device", "dtype")},
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def make(task: Task, backbone: Backbone) -> Note:
    """Makes one video and judges every second of it. Raises what stops it, with its number and setup in the message."""
    shots = plan_shots(task.case, task.seconds)
    plan = build_plan(shots, task.seconds, FPS, backbone)
    try:
        stream = build_stream(task.config, backbone, plan.total, task.case.seed)
        script = build_script(shots, plan, backbone)
        video = np.concatenate([frames for _, frames, _ in decoded(stream, script, backbone)])
    except HforceError as error:
        error.say_where(f"video {task.case.number}, setup {task.setup!r}")
        raise
    scores = asdict(score(read_frames(video), find_schedule(shots, plan, backbone)))
    rounded = {
        name: [round(float(value), DIGITS) if np.isfinite(value) else None for value in values]
        for name, values in scores.items()
    }
    number, setup = task.key
    return Note(video=number, setup=setup, seconds=task.seconds, fingerprint=task.fingerprint, scores=rounded)


def notes_path(output: Path) -> Path:
    """Where the notes of an experiment lie: beside its result."""
    return output.with_name(f"{output.name}.part.jsonl")


class Notes:
    """What is known of every task: a file of lines, read when it is entered and written as videos are finished.

    found: (video, setup) -> its note. Without a path nothing is read or written. Lines that are torn, and those of
    other settings, models or versions, are told of in the log and left alone. Raises InputError, PermissionDenied or
    DataError where the file cannot be read, OutputError or its kin where it cannot be written.
    """

    def __init__(self, path: Path | None, tasks: Sequence[Task]) -> None:
        self.path, self.found = path, dict[tuple[int, str], Note]()
        self._tasks = {task.key: task for task in tasks}
        self._file: Any = None

    def __enter__(self) -> Notes:
        if self.path is None:
            return self
        data = read_document(self.path, MOST_NOTES_BYTES) if self.path.exists() else b""
        self._read(data.splitlines())
        try:
            self._file = self.path.open("ab")
        except OSError as error:
            raise cannot_write(self.path, error) from error
        if data and not data.endswith(b"\n"):
            self._write(b"\n")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file:
            self._file.close()

    def add(self, note: Note) -> None:
        """Notes a finished video; when this returns, it is on the disk."""
        self.found[note.video, note.setup] = note
        if self._file:
            self._write(note.model_dump_json().encode() + b"\n")

    def _read(self, lines: Sequence[bytes]) -> None:
        torn = foreign = 0
        for line in filter(None, lines):
            try:
                note = Note.model_validate_json(line)
            except ValidationError:
                torn += 1
                continue
            task = self._tasks.get((note.video, note.setup))
            if task and task.is_met(note):
                self.found[task.key] = note
            elif task:
                foreign += 1
        if not next(filter(None, lines), b"{").startswith(b"{"):
            raise OutputError(f"{self.path} is no file of notes", "name another result: --json FILE")
        if torn:
            log.warning("%s: torn lines left out: %d", self.path, torn)
        if foreign:
            log.warning("%s: lines of other settings, models or lengths left out: %d", self.path, foreign)
        if self.found:
            log.info("%s: %d of %d videos were there already", self.path, len(self.found), len(self._tasks))

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self.path or "", error) from error


def work_off(tasks: Sequence[Task], notes: Notes, backbone: Backbone, workers: int, tell: Tell) -> None:
    """Makes what is not in the notes yet; one worker is this process, several are processes of their own."""
    left = [task for task in tasks if task.key not in notes.found]
    prompts = {task.case.number: task.case.prompts[0] for task in tasks}

    def take(note: Note) -> None:
        notes.add(note)
        tell(BenchProgress(len(notes.found), len(tasks), note.setup, prompts[note.video], "videos"))

    if min(workers, len(left)) > 1:
        spread(left, min(workers, len(left)), take)
        return
    for task in left:
        take(make(task, backbone))


def spread(tasks: Sequence[Task], workers: int, take: Callable[[Note], None]) -> None:
    """Makes the videos in so many processes and hands each to `take` as it is finished. Whatever stops one stops all.

    Raises UnavailableError when a process dies.
    """
    before = multiprocessing.active_children()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            with unheard(signal.SIGINT):  # from the keyboard, which reaches every process: only this one answers
                futures = [pool.submit(make_apart, task) for task in tasks]
            for future in as_completed(futures):
                take(future.result())
        except BrokenProcessPool as error:
            raise UnavailableError("a worker process died, perhaps for want of memory",
                                   "set bench.workers lower; what is done is kept") from error  # fmt: skip
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                if process not in before:
                    process.terminate()
            raise


def make_apart(task: Task) -> Note:
    """`make` in a process of its own."""
    return make(task, _loaded(astuple(task.config.model), task.config.sample.chunk))


@lru_cache(maxsize=1)
def _loaded(model: tuple[Any, ...], chunk: int | None) -> Backbone:
    """The model of a worker, loaded once in its life."""
    return build_backbone(Config(model=ModelConfig(*model), sample=SampleConfig(chunk=chunk)))


@contextmanager
def unheard(number: signal.Signals) -> Iterator[None]:
    """Keeps a signal waiting, and for ever from processes that are started meanwhile, where the system can do that."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
