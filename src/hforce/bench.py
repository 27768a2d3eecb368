"""The same script under several caches, in turns: what each costs, and how far it drifts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray

from hforce.bench_plot import plot as plot
from hforce.bench_report import (
    EARLY,
    FEWEST,
    LATE,
    BenchResult,
    Sample,
    Trial,
    choose_reference,
    make_rows,
    mean_sample,
    steady,
)
from hforce.bench_report import to_json as to_json
from hforce.bench_table import table as table
from hforce.build import Plan, build_bench_backbone, build_plan, build_roles, build_script, build_stream, effective
from hforce.cache.eager import EagerWindow
from hforce.cache.roles import head_order
from hforce.config import with_setup
from hforce.decoding import Decoded, decoded, to_bytes
from hforce.errors import ConfigError, HforceError, InterruptedRun
from hforce.machine import (
    Clock,
    Stopwatch,
    device_clock,
    device_of,
    environment,
    paused_collector,
    resident_bytes,
    weight_type,
)
from hforce.models.base import Backbone, Codec, Decoder
from hforce.plots import check_plot as check_plot
from hforce.prompts import Item, Shot, load_prompts
from hforce.resources import resource
from hforce.roofline import (
    ATTENTION,
    DECODER,
    OTHERS,
    Ceiling,
    Stage,
    chunk_stages,
    decoder_work,
    measure_ceiling,
    pass_work,
)
from hforce.rules import nearest
from hforce.settings import EAGER, SETUPS, Config
from hforce.stream import Chunk, Stream, Take
from hforce.toy.metrics import Edges, drift, read_frames
from hforce.toy.words import Prompt, parse
from hforce.toy.world import PIXELS
from hforce.weigh import tensor_bytes, weigh

JUDGED = "tiny"  # the model whose world is known well enough to judge its videos
NO_CODECS: Mapping[str, Codec] = MappingProxyType({})
SETTLED = 20  # chunks after which the process should not grow any more


@dataclass(frozen=True)
class BenchProgress:
    """Told after every chunk: chunks done and in all, over all setups and prompts, and who made it for which prompt."""

    done: int
    total: int
    setup: str
    prompt: str
    label: str = "chunks"


@dataclass(frozen=True)
class Course:
    """What all setups play: the shots of a prompt, cut into chunks and encoded once, which took so many seconds."""

    shots: tuple[Shot, ...]
    plan: Plan
    seed: int
    script: list[Take]
    encoding: float


@dataclass
class Entrant:
    """One setup on its way through a course."""

    setup: str
    stream: Stream
    backbone: Backbone
    course: Course
    edges: Edges | None
    clock: Clock
    beside: Mapping[str, Codec]  # whose decoders are timed as well, by name
    samples: list[Sample] = field(default_factory=list)
    opening: int | None = None  # bytes a stream keeps after its first chunk
    done: int = 0  # video frames
    young: Entrant | None = None  # the same, begun again, to compare the end of the course with

    def __post_init__(self) -> None:
        self._player: Iterator[Decoded] = iter(())
        self._decoders: dict[str, Decoder] = {}
        self._watch = Stopwatch(device_of(self.backbone), self.stream.graphs)
        self._halves = self.stream.model.before, self.stream.model.after
        self.stream.attend = self._watch.around(self.stream.cache.attend)

    def open(self, device: torch.device) -> None:
        """Makes the first chunk twice, untimed: so that all is warm, and to weigh what stays; then goes back."""
        self._player = self._play()
        self._next()
        self.stream.cache.reset()
        self._player = self._play()
        weighed = weigh(self._next, device)
        self.opening = weighed.left if weighed else None
        self.stream.cache.reset()  # playing does so, too, but only once the first chunk is asked for
        self._player = self._play()

    def advance(self) -> Chunk:
        """Makes and times the next chunk."""
        frames_read = self.stream.cache.stats().next_frames
        self._watch.restart()
        begin = self.clock()
        chunk, frames, seconds = self._next()
        whole = self.clock() - begin
        stages = (seconds["denoise"], seconds["commit"], seconds["decode"])
        watched = self._watch.read(), frames_read, self._decode_beside(chunk)
        self.samples.append(Sample(chunk.number, len(frames), *stages, whole, *watched))
        self._look(frames)
        return chunk

    def _decode_beside(self, chunk: Chunk) -> dict[str, float]:
        """Seconds that every other decoder takes to make the video frames of a chunk, by its name."""
        seconds = {}
        for name, decoder in self._decoders.items():
            begin = self.clock()
            to_bytes(decoder(chunk.latents))
            seconds[name] = self.clock() - begin
        return seconds

    def again(self) -> Entrant:
        """The same setup with a cache of its own, from the start to chunk number EARLY, untimed."""
        graphs = self.stream.graphs and self.stream.graphs.again()
        stream = replace(self.stream, cache=copy.deepcopy(self.stream.cache), graphs=graphs)
        young = replace(self, stream=stream, edges=None, samples=[], done=0, beside={})
        young._player = young._play()
        for _ in range(EARLY):
            young._next()
        return young

    def finish(self, device: torch.device) -> Trial:
        """Makes the last chunk, untimed but weighed, and sums up."""
        weighed = weigh(lambda: self._look(self._next()[1]), device)
        stats, geometry = self.stream.cache.stats(), self.stream.cache.geometry
        fixed = tensor_bytes(self.backbone.model, self.backbone.codec) + stats.nbytes
        fixed += self.stream.graphs.nbytes if self.stream.graphs else 0
        return Trial(
            prompt=" | ".join(shot.prompt for shot in self.course.shots),
            seed=self.course.seed,
            frames=self.course.plan.frames,
            samples=tuple(self.samples),
            young=tuple(self.young.samples) if self.young else (),
            steady=geometry.span // geometry.chunk,
            first_frame=self.course.encoding + self.samples[0].whole,
            frames_read=stats.mean_frames,
            kv_bytes=stats.nbytes,
            peak_bytes=fixed + weighed.peak + self.opening if weighed and self.opening is not None else None,
            drift=self._judge(),
        )

    def _play(self) -> Iterator[Decoded]:
        self._decoders = {name: codec.decoder() for name, codec in self.beside.items()}
        return decoded(self.stream, self.course.script, self.backbone)

    def _next(self) -> Decoded:
        self.stream.model.before, self.stream.model.after = self._halves  # of a model that others run otherwise
        try:
            return next(self._player)
        except HforceError as error:
            error.say_where(f"setup {self.setup!r}")
            raise

    def _look(self, frames: NDArray[np.uint8]) -> None:
        if self.edges:
            self.edges.look(self.done, frames)
        self.done += len(frames)

    def _judge(self) -> dict[str, float] | None:
        if self.edges is None:
            return None
        return drift(read_frames(self.edges.video), self.edges.schedule)


@dataclass
class Tally:
    """Counts chunks, and tells of each."""

    tell: Callable[[BenchProgress], None]
    total: int
    done: int = 0

    def __call__(self, entrant: Entrant) -> None:
        self.done += 1
        self.tell(BenchProgress(self.done, self.total, entrant.setup, entrant.course.shots[0].prompt))


def run(config: Config, tell: Callable[[BenchProgress], None]) -> BenchResult:
    """Plays every prompt of config.bench under all its setups, chunk by chunk in turn, and times and weighs them.

    A request to stop ends it with the prompts that were played, if there are any. Raises ConfigError for an unknown or
    repeated setup and for a video too short to time, and whatever stops a stream.
    """
    configs = choose_setups(config, (*SETUPS, EAGER))
    backbone, beside = build_bench_backbone(config)
    items = load_prompts(config.bench.prompts or resource("prompts/bench.txt"))
    courses = []
    for item in items:
        with item.blamed(len(items)):
            courses.append(plan_course(config, backbone, item))
    backbones = share_backbones(configs, backbone)
    count = Tally(tell, sum(course.plan.total for course in courses) * len(configs))
    races, stopped = [], None
    for course in courses:
        try:
            with paused_collector():
                entrants = [enter(name, configs[name], backbones[name], course, beside) for name in configs]
                races.append(race(entrants, count))
                del entrants  # their caches go before the next ones come
        except InterruptedRun as error:
            if not races:
                raise
            stopped = error
            break
    trials = {name: tuple(finished[name] for finished, _ in races) for name in configs}
    ceiling = measure_ceiling(device_of(backbone), weight_type(backbone), device_clock(device_of(backbone)))
    return BenchResult(
        rows=make_rows(trials, config.bench.warmup, backbone.codec.name),
        trials=trials,
        stages=find_stages(config, backbone, trials, ceiling),
        ceiling=ceiling,
        warmup=config.bench.warmup,
        reference=choose_reference(list(configs)),
        resident_growth_bytes=max((grown for _, grown in races if grown is not None), default=None),
        environment=environment(backbone),
        config=asdict(config),
        stopped=stopped,
    )


def choose_setups(config: Config, known: Collection[str] = SETUPS) -> dict[str, Config]:
    """A configuration for every setup to compare; the eager one compiles and records nothing.

    Raises ConfigError where one is unknown, named twice, or none is.
    """
    names = config.bench.setups
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown setup {name!r}{nearest(name, known)}", f"known are {', '.join(known)}")
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"bench.setups names {', '.join(names) or 'nothing'}", "name at least one, and each once")
    eager = replace(config, model=replace(config.model, compile=False, graphs=False))
    return {name: with_setup(eager, "window") if name == EAGER else with_setup(config, name) for name in names}


def plan_course(config: Config, backbone: Backbone, item: Item) -> Course:
    """The item cut into chunks and encoded. Raises ConfigError where nothing is left to time, or a file comes first."""
    if item.init:
        raise ConfigError(f"what is timed starts from nothing, not from {item.init.path}")
    seconds = item.seconds or config.bench.seconds
    shots = item.timed(seconds)
    plan = build_plan(shots, seconds, config.video.fps, backbone)
    warmup = config.bench.warmup
    fewest = warmup + 2  # one is timed, and the last one weighed
    if plan.total < fewest:
        raise ConfigError(
            f"a video of {seconds:g}s has {plan.total} chunks; with bench.warmup={warmup} it takes {fewest}",
            "make it longer, or lower bench.warmup",
        )
    seed = config.bench.seed if item.seed is None else item.seed
    clock = device_clock(device_of(backbone))
    begin = clock()
    script = build_script(shots, plan, backbone)
    return Course(shots, plan, seed, script, clock() - begin)


def share_backbones(configs: Mapping[str, Config], backbone: Backbone) -> dict[str, Backbone]:
    """A backbone for every setup. Those that order the heads alike share one; others get copies of it."""
    found: dict[tuple[tuple[int, ...], ...], Backbone] = {}
    chosen = {}
    for name, config in configs.items():
        kind = head_order(build_roles(config.cache, backbone))
        if kind not in found:
            found[kind] = replace(backbone, model=copy.deepcopy(backbone.model)) if found else backbone
        chosen[name] = found[kind]
    return chosen


def enter(
    setup: str, config: Config, backbone: Backbone, course: Course, beside: Mapping[str, Codec] = NO_CODECS
) -> Entrant:
    """A setup at the start of a course, with a cache of its own."""
    stream = build_stream(config, backbone, course.plan.total, course.seed)
    if setup == EAGER:
        backbone.model.separate_blocks()
        stream.kernels = lambda device: nullcontext()
        stream.cache = EagerWindow(backbone.geometry, weight_type(backbone), str(device_of(backbone)))
    clock = stream.clock = device_clock(device_of(backbone))
    judged = backbone.name == JUDGED and not backbone.is_random and backbone.size == (PIXELS, PIXELS)
    edges = Edges(course.plan.frames, find_schedule(course.shots, course.plan, backbone)) if judged else None
    return Entrant(setup, stream, backbone, course, edges, clock, beside)


def find_stages(
    config: Config, backbone: Backbone, trials: Mapping[str, Sequence[Trial]], ceiling: Ceiling
) -> dict[str, dict[str, Stage]]:
    """Of every setup, the stages of a mean steady chunk: their work, and how near the ceiling they come."""
    geometry, itemsize = backbone.geometry, weight_type(backbone).itemsize
    decoding = decoder_work(backbone.codec, backbone.shape, geometry.chunk, itemsize)
    passes = len(effective(config.sample, backbone.family).steps) + 1
    found = {}
    for name, own in trials.items():
        mean = mean_sample([sample for trial in own for sample in steady(trial, config.bench.warmup)])
        work = pass_work(backbone.model.config, geometry, mean.frames_read, itemsize)
        seconds = {ATTENTION: mean.attend, OTHERS: mean.denoise + mean.commit - mean.attend, DECODER: mean.decode}
        found[name] = chunk_stages(work, decoding, seconds, passes, ceiling)
    return found


def find_schedule(shots: Sequence[Shot], plan: Plan, backbone: Backbone) -> list[tuple[int, Prompt]]:
    """The video frame with which every shot begins, and the words that the tiny model reads in its prompt."""
    stride, chunk = backbone.codec.stride, backbone.geometry.chunk
    latents = [chunk * sum(plan.chunks[:number]) for number in range(len(shots))]
    begins = [stride * (latent - 1) + 1 if latent else 0 for latent in latents]  # the first latent is one video frame
    words = [parse(backbone.encode_text.reads(shot.prompt)).words for shot in shots]
    return list(zip(begins, words, strict=True))


def race(entrants: Sequence[Entrant], count: Callable[[Entrant], None]) -> tuple[dict[str, Trial], int | None]:
    """All entrants to the end of their course: their trials, and bytes by which the process grew after 20 chunks.

    count is called after every chunk with the one who made it.
    """
    device = device_of(entrants[0].backbone)
    for entrant in entrants:
        entrant.open(device)
    rounds, settled = entrants[0].course.plan.total - 1, None
    late = LATE if rounds >= FEWEST else 0
    for entrant, chunk in take_turns(entrants, rounds - late):
        if chunk.number == SETTLED and settled is None:
            settled = resident_bytes()
        count(entrant)
    final = resident_bytes()
    if late:
        close_race(entrants, late, count)
    trials = {}
    for entrant in entrants:
        trials[entrant.setup] = entrant.finish(device)
        count(entrant)
    return trials, final - settled if final is not None and settled is not None else None


def close_race(entrants: Sequence[Entrant], rounds: int, count: Callable[[Entrant], None]) -> None:
    """The last rounds, in turn with every entrant's `young` self, so that growth is no reading of the machine."""
    for entrant in entrants:
        entrant.young = entrant.again()
    pairs = [runner for entrant in entrants for runner in (entrant, entrant.young) if runner]
    for runner, _ in take_turns(pairs, rounds):
        if runner.young:
            count(runner)


def take_turns(entrants: Sequence[Entrant], rounds: int) -> Iterator[tuple[Entrant, Chunk]]:
    """Lets every entrant make a chunk a round; every second round backwards, so that nobody always follows the same."""
    for number in range(rounds):
        for entrant in entrants if number % 2 == 0 else reversed(entrants):
            yield entrant, entrant.advance()
