"""Script -> stream -> decoder -> video file."""

from __future__ import annotations

import json
import logging
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import hforce
from hforce import memory
from hforce.build import (
    Plan,
    build_blueprint,
    build_memory,
    build_plan,
    build_script,
    build_stream,
    check_cache,
    effective,
    pin_model,
)
from hforce.decoding import decoded
from hforce.documents import file_digest, read_document, write_document
from hforce.errors import DataError, HforceError, InterruptedRun, OutputError, RoomError, memory_for
from hforce.memory import Mode, check, gib
from hforce.models.base import Backbone, Blueprint, Described
from hforce.opening import Opening, check_kept, examine, read_opening
from hforce.prompts import Init, Item, Shot, file_stem
from hforce.settings import Config, VideoConfig
from hforce.video import FfmpegSink, contact_sheet, preflight, upscale

log = logging.getLogger(__name__)

SHEET_COLUMNS, SHEET_ROWS = 6, 4
SIDECAR = "hforce.video/1"
MOST_SIDECAR_BYTES = 64 << 20


@dataclass(frozen=True)
class Target:
    """Where one video and what belongs to it go."""

    video: Path
    sidecar: Path
    sheet: Path


@dataclass(frozen=True)
class Job:
    """One video to make, from nothing or from an `opening`."""

    item: Item
    shots: tuple[Shot, ...]
    plan: Plan
    seed: int
    target: Target
    opening: Opening | None = None


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
    preflight(*(path for target in targets for path in (target.video, target.sidecar, target.sheet)))
    openings = find_openings(config.video, items)
    config = replace(config, model=pin_model(config.model))
    blueprint = build_blueprint(config)
    blueprint.check_packages()
    jobs = plan_jobs(config, blueprint, items, openings, targets)
    missing = [job for job in jobs if on_exists == "overwrite" or not job.target.video.exists()]
    planned = choose_plan(config, blueprint, missing) if missing else None
    done = [is_done(job, record(config, blueprint, job), on_exists) for job in jobs]
    result = Result(skipped=[job.target for job, is_there in zip(jobs, done, strict=True) if is_there])
    wanted = [job for job, is_there in zip(jobs, done, strict=True) if not is_there]
    written = [path for job in wanted for path in outputs(job.target, config.video)]
    check_kept([job.opening for job in wanted if job.opening], written)
    if not planned:
        return result
    prompts = [shot.prompt for job in wanted for shot in job.shots]
    studio = Studio(blueprint, prompts, planned, planned.mode, may_lighten=config.model.memory == "auto")
    studio.open()
    for job in wanted:
        try:
            make_in(studio, config, job, tell)
            result.made.append(job.target)
        except HforceError as error:
            traceback.clear_frames(error.__traceback__)  # what they hold is memory that the next video needs
            result.failed.append((job.target, error))
            if isinstance(error, InterruptedRun):
                break
            if len(jobs) > 1:
                log.error("%s: %s", job.target.video.name, error)
    return result


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
    planned: memory.Plan
    mode: Mode
    may_lighten: bool  # no mode was asked for
    backbone: Backbone | None = None

    def open(self) -> Backbone:
        """The model, its weights read. Raises RoomError."""
        if self.backbone is None:
            with memory_for("loading the model"):
                self.backbone = load(self.blueprint, self.mode, self.prompts)
        return self.backbone

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
        return True


def make_in(studio: Studio, config: Config, job: Job, tell: Callable[[Progress], None]) -> None:
    """`make`, and once more in a lighter memory mode where memory ran out. Raises RoomError with what was planned."""
    try:
        make(config, studio.open(), job, studio.makes_ahead, tell)
    except RoomError as error:
        traceback.clear_frames(error.__traceback__)  # what they hold is memory that the next try needs
        if not studio.lighten():
            raise RoomError(f"{error}; planned were {gib(studio.planned.peak)} GiB", error.mend) from error
        log.warning("%s: %s; trying once more in memory mode %s", job.target.video.name, error, studio.mode)
        make_in(studio, config, job, tell)


def load(blueprint: Blueprint, mode: Mode, prompts: Sequence[str]) -> Backbone:
    """The backbone, with the prompts encoded: before the weights are read, or after, if the encoder is to stay."""
    if mode is Mode.SPEED:
        blueprint.encode_text.stay()
        backbone = blueprint.load()
        backbone.encode_text.encode_all(prompts)
        return backbone
    blueprint.encode_text.encode_all(prompts)
    return blueprint.load(rests=mode is Mode.LOW)


def choose_targets(items: Sequence[Item], output: Path) -> list[Target]:
    """A file of its own for every item. Raises OutputError if several would have to share one."""
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
    """The files that a video makes."""
    return [target.video, target.sidecar, *([target.sheet] if video.contact_sheet else [])]


def find_openings(video: VideoConfig, items: Sequence[Item]) -> list[Opening | None]:
    """What every item starts from, its own or that of the configuration. Raises what `examine` raises."""
    path = video.init_video or video.init_image
    usual = Init(path, bool(video.init_video)) if path else None
    longest = max(item.seconds or video.seconds for item in items)
    inits = [item.init or usual for item in items]
    found = {init: examine(init, video.fps, longest) for init in dict.fromkeys(inits) if init}
    return [found[init] if init else None for init in inits]


def plan_jobs(
    config: Config,
    model: Described,
    items: Sequence[Item],
    openings: Sequence[Opening | None],
    targets: Sequence[Target],
) -> list[Job]:
    """The job of every item. Raises what `check_cache` and `plan_job` raise."""
    check_cache(config.cache, model)
    parts = zip(items, openings, targets, strict=True)
    return [plan_job(config, model, item, opening, target) for item, opening, target in parts]


def plan_job(config: Config, backbone: Described, item: Item, opening: Opening | None, target: Target) -> Job:
    """The item's shots with their lengths, cut into chunks."""
    seconds = item.seconds or config.video.seconds
    shots = item.timed(seconds)
    seed = config.sample.seed if item.seed is None else item.seed
    given = (len(opening.picks) - 1) // backbone.stride + 1 if opening else 0
    return Job(item, shots, build_plan(shots, seconds, config.video.fps, backbone, given), seed, target, opening)


def make(config: Config, backbone: Backbone, job: Job, ahead: bool, tell: Callable[[Progress], None]) -> None:
    """Generates, decodes and encodes one video, then writes its contact sheet and sidecar.

    With `ahead` the next chunk is made while one is decoded.
    """
    started = time.monotonic()
    with memory_for("laying out the cache"):
        stream = build_stream(config, backbone, job.plan.held(backbone.geometry.chunk), job.seed)
    script = build_script(job.shots, job.plan, backbone)
    given = encode_opening(job.opening, job.plan.given, backbone) if job.opening else None
    factor = config.video.upscale
    width, height = (side * factor for side in backbone.size)
    video = config.video
    sink = FfmpegSink(job.target.video, (width, height), video.fps, video.crf, video.preset, job.plan.frames)
    sheet = Sheet(job.plan.frames, video.fps)
    done, spent = 0, {"denoise": 0.0, "commit": 0.0, "decode": 0.0, "encode": 0.0}
    try:
        with sink:
            for _, frames, seconds in decoded(stream, script, backbone, given, ahead):
                begin = time.perf_counter()
                sink.write(upscale(frames, factor))
                seconds["encode"] = time.perf_counter() - begin
                sheet.look(done, frames)
                done += len(frames)
                spent = {stage: spent[stage] + seconds[stage] for stage in spent}
                tell(Progress(job, done, seconds))
            if video.contact_sheet:
                pictures = [(t, upscale(f[None], max(1, factor // 2))[0]) for t, f in sheet.pictures]
                contact_sheet(pictures, job.target.sheet, SHEET_COLUMNS)
    except HforceError as error:
        raise _telling(error, sink.kept) from error.__cause__
    outcome = {"frames": done, "seconds": round(time.monotonic() - started, 3), "stages": _rounded(spent)}
    _write_record(sink, record(config, backbone, job), outcome, job.target.sidecar)


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


def record(config: Config, backbone: Described, job: Job) -> dict[str, Any]:
    """Everything needed to make the same video again: the sidecar without its result."""
    starts = [sum(job.plan.chunks[:i]) for i in range(len(job.shots))]
    schedule = [
        {"chunk": start, "prompt": shot.prompt, "reads": backbone.encode_text.reads(shot.prompt)}
        for start, shot in zip(starts, job.shots, strict=True)
    ]
    family, recipe = backbone.family, asdict(effective(config.sample, backbone.family))
    seen = {name: recipe.pop(name) for name in ("window", "sink")}
    opening = job.opening
    init = opening and {**asdict(opening.init), "sha256": opening.sha256, "latents": job.plan.given}
    # How the files came here and what was held in memory say nothing of the video.
    model = replace(config.model, offline=False, memory="auto", memory_limit="")
    settings = {"model": asdict(model), "cache": asdict(config.cache), "sample": asdict(config.sample) | recipe}
    return {
        "kind": SIDECAR,
        "schedule": schedule,
        "init": init,
        "seed": job.seed,
        "frames": job.plan.frames,
        "chunks": job.plan.total,
        "size": list(backbone.size),
        "video": asdict(config.video),
        **settings,
        "fingerprint": backbone.fingerprint,
        "release": {"name": family.name if family else "", **seen},
        "versions": {"hforce": hforce.__version__, "torch": torch.__version__},
    }


def is_done(job: Job, wanted: dict[str, Any], on_exists: str) -> bool:
    """Whether the video is there, whole and made by the same settings.

    Raises OutputError where it may not be touched, DataError for a sidecar that is no JSON.
    """
    video, sidecar, sheet = job.target.video, job.target.sidecar, job.target.sheet
    if on_exists == "overwrite":
        return False
    known = _read_sidecar(sidecar) if sidecar.exists() else None
    is_foreign = not known and sheet.exists() and wanted["video"]["contact_sheet"]  # somebody's picture
    if not (video.exists() or is_foreign):
        return False
    if on_exists == "skip" and known and known[0] == json.loads(json.dumps(wanted)):
        if known[1].get("sha256") == file_digest(video):
            return True
    raise OutputError(
        f"{video if video.exists() else sheet} exists and was not made by this very command",
        "choose another output, or use --on-exists overwrite",
    )


def _write_record(sink: FfmpegSink, recipe: dict[str, Any], outcome: dict[str, Any], path: Path) -> None:
    """Writes the sidecar of a finished video; where that fails, the video goes back to where unfinished ones lie."""
    try:
        result = {**outcome, "sha256": file_digest(sink.path)}
        write_document(path, json.dumps({**recipe, "result": result}, indent=1) + "\n")
    except HforceError as error:
        os.replace(sink.path, sink.part)  # without its record nobody could tell what it shows
        raise _telling(error, sink.part) from error.__cause__


def _telling(error: HforceError, kept: Path | None) -> HforceError:
    """The error, made to say where the part that was made lies."""
    if kept and str(kept) not in error.mend:
        error.args = (f"{error}; what was made until then is in {kept}",)
    return error


def _read_sidecar(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a video was made from, and what became of it. Raises DataError when the file does not hold this."""
    try:
        found = json.loads(read_document(path, MOST_SIDECAR_BYTES))
        if not found["kind"].startswith(SIDECAR.split("/")[0]):
            raise ValueError("of another kind")
        return found, found.pop("result")
    except (ValueError, RecursionError, TypeError, AttributeError, KeyError) as error:
        raise DataError(f"{path} is no sidecar of hforce", "remove it, or use --on-exists overwrite") from error


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {stage: round(value, 3) for stage, value in seconds.items()}
