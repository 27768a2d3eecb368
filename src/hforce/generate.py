"""Script -> stream -> decoder -> video file."""

from __future__ import annotations

import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hforce import memory
from hforce.build import (
    build_blueprint,
    build_memory,
    build_plan,
    build_script,
    build_stream,
    check_cache,
    pin_model,
)
from hforce.decoding import decoded, warm_up
from hforce.errors import HforceError, InterruptedRun, OutputError, RoomError, TakenError, memory_for
from hforce.memory import Mode, check, gib
from hforce.models.base import Backbone, Blueprint, Described
from hforce.opening import Opening, check_kept, examine, read_opening
from hforce.prompts import Init, Item, file_stem
from hforce.settings import Config, VideoConfig
from hforce.sidecar import Job, Target, certify, is_done, record
from hforce.video import FfmpegSink, check_size, contact_sheet, is_taken, preflight, unfinished, upscale

log = logging.getLogger(__name__)

SHEET_COLUMNS, SHEET_ROWS = 6, 4
LOOK_AGAIN = 1.0  # seconds between two looks at a video that another process is making
OTHER_VIDEOS = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mpg", ".webm")


@dataclass(frozen=True)
class Progress:
    """Told after every chunk: video frames done and in all, and seconds spent on this chunk by stage."""

    job: Job
    done: int
    seconds: dict[str, float]


@dataclass
class Result:
    """What became of every item."""

    made: list[Target] = field(default_factory=list)
    skipped: list[Target] = field(default_factory=list)
    failed: list[tuple[Target, HforceError]] = field(default_factory=list)


def run(
    config: Config, items: Sequence[Item], output: Path, on_exists: str, tell: Callable[[Progress], None]
) -> Result:
    """Makes every item's video. An item that fails does not stop the others; a request to stop ends them all.

    output is an .mp4 file for a single item, else a folder. on_exists says what to do about a video that is there:
    skip it if the same command made it, overwrite it, or call it an error.
    Raises HforceError for what concerns all items, before any is begun.
    """
    targets = choose_targets(items, output)
    preflight(*(path for target in targets for path in (*outputs(target, config.video), target.sheet)))
    openings = find_openings(config.video, items)
    config = replace(config, model=pin_model(config.model))
    blueprint = build_blueprint(config)
    blueprint.check_packages()
    check_size(picture_size(config, blueprint))
    jobs = plan_jobs(config, blueprint, items, openings, targets, on_exists == "overwrite")
    missing = [job for job in jobs if on_exists == "overwrite" or not job.target.video.exists()]
    planned = choose_plan(config, blueprint, missing) if missing else None
    wanted = choose_wanted(config, blueprint, jobs, on_exists)
    to_make = {job.target.video for job in wanted}
    result = Result(skipped=[job.target for job in jobs if job.target.video not in to_make])
    if not planned:
        return result
    prompts = [shot.prompt for job in wanted for shot in job.shots]
    check_prompts(blueprint, wanted)
    firsts = frozenset(job.plan.given % blueprint.geometry.chunk for job in wanted)
    studio = Studio(blueprint, prompts, firsts, planned, planned.mode, may_lighten=config.model.memory == "auto")
    studio.open()
    with ThreadPoolExecutor(1) as studio.worker:
        make_all(studio, config, wanted, on_exists, tell, result, is_list=len(jobs) > 1)
    return result


def make_all(
    studio: Studio, config: Config, jobs: Sequence[Job], on_exists: str, tell: Callable[[Progress], None],
    result: Result, is_list: bool,
) -> None:  # fmt: skip
    """Makes one video after the other, and enters into the result what became of it.

    Of a list, those that another process is making come last: it may have made them by then.
    """
    waiting, put_off = deque(jobs), set[Path]()
    while waiting:
        job = waiting.popleft()
        video = job.target.video
        try:
            if video in put_off:
                time.sleep(LOOK_AGAIN)
            if is_list and is_taken(video):
                raise TakenError(f"another hforce is making {video}")
            if video.exists() and is_done(config, studio.blueprint, job, on_exists):
                result.skipped.append(job.target)
                continue
            make_in(studio, config, job, tell)
            result.made.append(job.target)
        except HforceError as error:
            traceback.clear_frames(error.__traceback__)  # what they hold is memory that the next video needs
            if is_list and isinstance(error, TakenError):
                if video not in put_off:
                    log.warning("%s; it is looked for again at the end", error)
                put_off.add(video)
                waiting.append(job)
                continue
            result.failed.append((job.target, error))
            if isinstance(error, InterruptedRun):
                break
            if is_list:
                log.error("%s: %s", video.name, error)


def choose_wanted(config: Config, model: Described, jobs: Sequence[Job], on_exists: str) -> list[Job]:
    """The jobs whose videos are not there yet. Raises OutputError where one would replace what it must not."""
    wanted = [job for job in jobs if not is_done(config, model, job, on_exists)]
    written = [path for job in wanted for path in outputs(job.target, config.video)]
    check_kept([job.opening for job in wanted if job.opening], written)
    return wanted


def check_prompts(model: Blueprint, jobs: Sequence[Job]) -> None:
    """Raises DataError where a prompt says nothing to the model; what it cannot read of one is told in the log."""
    for job in jobs:
        with job.item.blamed(len(jobs)):
            for shot in job.shots:
                model.encode_text.reads(shot.prompt)


def picture_size(config: Config, model: Described) -> tuple[int, int]:
    """Width and height of the video in pixels."""
    width, height = (side * config.video.upscale for side in model.size)
    return width, height


def choose_plan(config: Config, blueprint: Blueprint, jobs: Sequence[Job]) -> memory.Plan:
    """The memory, and its mode, in which all jobs fit. Raises RoomError where one does not."""
    made, available = plan_memory(config, blueprint, jobs)
    check(made, available)
    log.info("memory mode %s: %s GiB at most", made.mode, gib(made.peak))
    return made


def plan_memory(config: Config, blueprint: Blueprint, jobs: Sequence[Job]) -> tuple[memory.Plan, int | None]:
    """What the largest of the jobs takes, and what there is."""
    longest = max(job.plan.held(blueprint.geometry.chunk) for job in jobs)
    return build_memory(config, blueprint, longest, switches=any(len(job.shots) > 1 for job in jobs))


@dataclass
class Studio:
    """The model of a run in a memory mode, read again in a lighter one where the plan was too hopeful."""

    blueprint: Blueprint
    prompts: Sequence[str]
    firsts: frozenset[int]  # latent frames of first chunks; 0: as many as of any other
    planned: memory.Plan
    mode: Mode
    may_lighten: bool  # no mode was asked for
    backbone: Backbone | None = None
    worker: Executor | None = None  # for all videos: plans that cuDNN makes are its thread's own

    def open(self) -> Backbone:
        """The model, its weights read, in a lighter mode if memory runs out meanwhile. Raises RoomError."""
        if self.backbone is None:
            try:
                self.backbone = self._load()
            except RoomError as error:
                traceback.clear_frames(error.__traceback__)  # what they hold is memory that the next try needs
                if not self.lighten():
                    raise
                log.warning("%s; trying once more in memory mode %s", error, self.mode)
                self.backbone = self._load()
        return self.backbone

    def _load(self) -> Backbone:
        with memory_for("loading the model"):
            backbone = load(self.blueprint, self.mode, self.prompts)
            if self.makes_ahead and torch.device(self.blueprint.codec_device).type == "cuda":
                warm_up(backbone, self.firsts)
        return backbone

    @property
    def makes_ahead(self) -> bool:
        """Whether the next chunk is made while one is decoded. On a CPU both share the cores, and nothing is gained."""
        has_room = self.mode is Mode.SPEED or self.blueprint.is_apart
        return has_room and self.blueprint.device.startswith("cuda")

    def lighten(self) -> bool:
        """Goes on to the next lighter mode, once and if there is one, and lets go of the model."""
        lighter = [*Mode][[*Mode].index(self.mode) + 1 :]
        if not self.may_lighten or not lighter:
            return False
        self.mode, self.backbone, self.may_lighten = lighter[0], None, False
        if self.blueprint.device.startswith("cuda"):
            torch.cuda.empty_cache()  # else what it held stays with torch, and counts as taken
        return True


def make_in(studio: Studio, config: Config, job: Job, tell: Callable[[Progress], None]) -> None:
    """`make`, and once more in a lighter memory mode where memory ran out. Raises RoomError with what was planned."""
    try:
        make(config, studio.open(), job, tell, studio.worker if studio.makes_ahead else None)
    except RoomError as error:
        traceback.clear_frames(error.__traceback__)  # what they hold is memory that the next try needs
        if not studio.lighten():
            raise RoomError(f"{error}; planned were {gib(studio.planned.peak)} GiB", error.mend) from error
        log.warning("%s: %s; trying once more in memory mode %s", job.target.video.name, error, studio.mode)
        make_in(studio, config, job, tell)


def load(blueprint: Blueprint, mode: Mode, prompts: Sequence[str]) -> Backbone:
    """The backbone, with the prompts encoded: before the weights are read, or after, if the encoder is to stay."""
    blueprint.encode_text.stay(mode is Mode.SPEED)
    if mode is Mode.SPEED:
        backbone = blueprint.load()
        backbone.encode_text.encode_all(prompts)
        return backbone
    blueprint.encode_text.encode_all(prompts)
    return blueprint.load(rests=mode is Mode.LOW)


def choose_targets(items: Sequence[Item], output: Path) -> list[Target]:
    """A file of its own for every item. Raises OutputError if several would share one, or for another format."""
    if str(output) == "-" or (output.suffix.lower() in OTHER_VIDEOS and not output.is_dir()):
        raise OutputError(f"videos are written as .mp4, not to {output}", "name an .mp4 file, or a folder")
    if output.suffix.lower() == ".mp4":
        if len(items) > 1:
            raise OutputError(f"{len(items)} videos cannot go into one file {output}", "name a folder: -o outputs")
        return [Target(output, output.with_name(output.name + ".json"), output.with_suffix(".png"))]
    taken: set[str] = set()
    stems = [file_stem(item.name or item.shots[0].prompt, number, taken) for number, item in enumerate(items)]
    return [
        Target(output / "videos" / f"{s}.mp4", output / "meta" / f"{s}.json", output / "previews" / f"{s}.png")
        for s in stems
    ]


def outputs(target: Target, video: VideoConfig) -> list[Path]:
    """The files that the making of a video writes."""
    sheets = [target.sheet] if video.contact_sheet else []
    return [target.video, target.sidecar, *sheets, *unfinished(target.video)]


def find_openings(video: VideoConfig, items: Sequence[Item]) -> list[Opening | None]:
    """What every item starts from, its own or that of the configuration. Raises what `examine` raises."""
    path = video.init_video or video.init_image
    usual = Init(path, bool(video.init_video)) if path else None
    longest = max(item.seconds or video.seconds for item in items)
    inits = [item.init or usual for item in items]
    found: dict[Init, Opening] = {}
    for item, init in zip(items, inits, strict=True):
        if init and init not in found:
            with item.blamed(len(items)) if item.init else nullcontext():
                found[init] = examine(init, video.fps, longest)
    return [found[init] if init else None for init in inits]


def plan_jobs(
    config: Config,
    model: Described,
    items: Sequence[Item],
    openings: Sequence[Opening | None],
    targets: Sequence[Target],
    replaces: bool,
) -> list[Job]:
    """The job of every item. Raises what `check_cache` and `plan_job` raise."""
    check_cache(config.cache, model)
    jobs = []
    for item, opening, target in zip(items, openings, targets, strict=True):
        with item.blamed(len(items)):
            jobs.append(replace(plan_job(config, model, item, opening, target), replaces=replaces))
    return jobs


def plan_job(config: Config, backbone: Described, item: Item, opening: Opening | None, target: Target) -> Job:
    """The item's shots with their lengths, cut into chunks."""
    seconds = item.seconds or config.video.seconds
    shots = item.timed(seconds)
    seed = config.sample.seed if item.seed is None else item.seed
    given = (len(opening.picks) - 1) // backbone.stride + 1 if opening else 0
    return Job(item, shots, build_plan(shots, seconds, config.video.fps, backbone, given), seed, target, opening)


def make(
    config: Config, backbone: Backbone, job: Job, tell: Callable[[Progress], None], worker: Executor | None
) -> None:
    """Generates, decodes and encodes one video; its sidecar and contact sheet are written before it gets its name.

    With a worker the next chunk is made while one is decoded.
    """
    started = time.monotonic()
    with memory_for("laying out the cache"):
        stream = build_stream(config, backbone, job.plan.held(backbone.geometry.chunk), job.seed)
    script = build_script(job.shots, job.plan, backbone)
    given = encode_opening(job.opening, job.plan.given, backbone) if job.opening else None
    factor = config.video.upscale
    video, sheet = config.video, Sheet(job.plan.frames, config.video.fps)
    done, spent = 0, {"denoise": 0.0, "commit": 0.0, "decode": 0.0, "encode": 0.0}

    def finish(whole: Path) -> None:
        outcome = {"frames": done, "seconds": round(time.monotonic() - started, 3), "stages": _rounded(spent),
                   "attention": stream.attention}  # fmt: skip
        picture = sheet.draw(max(1, factor // 2)) if video.contact_sheet else None
        certify(whole, job.target, record(config, backbone, job), outcome, picture)

    size, expected = picture_size(config, backbone), job.plan.frames
    sink = FfmpegSink(job.target.video, size, video.fps, video.crf, video.preset, expected, job.replaces, finish)
    try:
        with sink:
            for chunk, frames, seconds in decoded(stream, script, backbone, given, worker):
                begin = time.perf_counter()
                with memory_for(f"enlarging chunk {chunk.number} for the video", "choose a smaller --upscale"):
                    sink.write(upscale(frames, factor))
                seconds["encode"] = time.perf_counter() - begin
                sheet.look(done, frames)
                done += len(frames)
                spent = {stage: spent[stage] + seconds[stage] for stage in spent}
                tell(Progress(job, done, seconds))
    except HforceError as error:
        raise _telling(error, sink.kept) from error.__cause__


def encode_opening(opening: Opening, latents: int, backbone: Backbone) -> Tensor:
    """What a video starts from, as so many latent frames [1, F, C, h, w]; video frames that are over are left out."""
    frames = read_opening(opening, backbone.size)
    taken = backbone.codec.stride * (latents - 1) + 1
    if taken < len(frames):
        told = (opening.init.path, len(frames) - taken, backbone.codec.stride)
        log.warning("%s: its last %d video frames are left out, for latent frames take %d", *told)
    with torch.inference_mode():
        return backbone.codec.encode(torch.from_numpy(frames[:taken]).permute(0, 3, 1, 2)[None] / 255)


class Sheet:
    """Collects evenly spaced pictures for a contact sheet, the first and the last frame among them."""

    def __init__(self, frames: int, fps: int) -> None:
        count = min(SHEET_COLUMNS * SHEET_ROWS, frames)
        self._wanted = [round(i * (frames - 1) / max(count - 1, 1)) for i in range(count)]
        self._fps = fps
        self.pictures: list[tuple[float, NDArray[np.uint8]]] = []

    def look(self, first: int, frames: NDArray[np.uint8]) -> None:
        """Takes what is wanted of frames [T, H, W, 3], the first of which is number `first`."""
        inside = [n for n in self._wanted if first <= n < first + len(frames)]
        self.pictures += [(n / self._fps, frames[n - first].copy()) for n in inside]

    def draw(self, factor: int) -> bytes:
        """The pictures, enlarged, as one PNG."""
        pictures = [(moment, upscale(picture[None], factor)[0]) for moment, picture in self.pictures]
        return contact_sheet(pictures, SHEET_COLUMNS)


def _telling(error: HforceError, kept: Path | None) -> HforceError:
    """The error, made to say where the part that was made lies."""
    if kept and str(kept) not in error.mend:
        error.args = (f"{error}; what was made until then is in {kept}",)
    return error


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {stage: round(value, 3) for stage, value in seconds.items()}
