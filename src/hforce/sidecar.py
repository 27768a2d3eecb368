"""The sidecar of a video: what it was made from, and whether it is there already."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import hforce
from hforce.build import Plan, build_roles, effective
from hforce.documents import file_digest, read_document, write_bytes, write_document
from hforce.errors import DataError, HforceError, OutputError, WriteError
from hforce.models.base import Described
from hforce.opening import Opening
from hforce.prompts import Item, Shot
from hforce.settings import Config

KIND = "hforce.video/1"
MOST_BYTES = 64 << 20
MOST_TOLD, LONGEST_TOLD = 3, 40  # differences between two recipes, and letters of a value

Parts = tuple[dict[str, Any], dict[str, Any]]


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
    replaces: bool = False  # a video that is there


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
    # How the files came here, what was held in memory and how passes were launched say nothing of the video.
    model = replace(config.model, offline=False, memory="auto", memory_limit="", graphs=True)
    settings = {"model": asdict(model), "cache": asdict(config.cache), "sample": asdict(config.sample) | recipe}
    return {
        "kind": KIND,
        "schedule": schedule,
        "init": init,
        "seed": job.seed,
        "frames": job.plan.frames,
        "chunks": job.plan.total,
        "size": list(backbone.size),
        "video": asdict(config.video),
        **settings,
        "heads": list(build_roles(config.cache, backbone).letters()),
        "fingerprint": backbone.fingerprint,
        "release": {"name": family.name if family else "", **seen},
        "versions": {"hforce": hforce.__version__, "torch": torch.__version__},
    }


def is_done(config: Config, backbone: Described, job: Job, on_exists: str) -> bool:
    """Whether the video is there, whole and made by the same settings.

    Raises OutputError where something is there that may not be touched, DataError for a sidecar that is none.
    """
    target = job.target
    if on_exists == "overwrite":
        return False
    recipe, result = _read(target.sidecar) if target.sidecar.exists() else ({}, {})
    is_whole = target.video.exists() and result.get("sha256") == file_digest(target.video)
    told = differences(recipe, json.loads(json.dumps(record(config, backbone, job)))) if is_whole else ""
    if on_exists == "skip" and is_whole and not told:
        return True
    shown = target.sheet if config.video.contact_sheet and target.sheet.exists() else None
    is_foreign = shown and result.get("sheet_sha256") != file_digest(shown)
    if target.video.exists() or is_foreign:
        what = "exists already" if is_whole and not told else f"exists and was not made by this very command{told}"
        raise OutputError(
            f"{target.video if target.video.exists() else shown} {what}",
            "choose another output, or use --on-exists overwrite",
        )
    return False


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first settings of a recipe that are others now, for a message: ": seed was 0 and is 5"; "" if none is."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    keys = [key for key in before | after if before.get(key) != after.get(key)]
    if not keys:
        return ""
    pairs = [(key, _short(before.get(key)), _short(after.get(key))) for key in keys[:MOST_TOLD]]
    told = [f"{key} was {was} and is {now}" if was != now else f"{key} is another" for key, was, now in pairs]
    return f": {', '.join(told)}" + (f", and {len(keys) - MOST_TOLD} more" if len(keys) > MOST_TOLD else "")


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted paths of everything below that is no mapping, nor a list of mappings."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        yield path, value
        return
    for key, below in value.items():
        yield from _leaves(below, f"{path}.{key}" if path else key)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= LONGEST_TOLD else text[: LONGEST_TOLD - 3] + "..."


def certify(video: Path, target: Target, recipe: dict[str, Any], outcome: dict[str, Any], sheet: bytes | None) -> None:
    """Writes the sidecar of a finished video, and its contact sheet, if there is one, before it gets its name.

    Whatever happens then, what lies there can be told from what is not ours.
    """
    shown = {"sheet_sha256": hashlib.sha256(sheet).hexdigest()} if sheet is not None else {}
    result = {**outcome, "sha256": file_digest(video), **shown}
    is_old = sheet is None and _shows(target)
    write_document(target.sidecar, json.dumps({**recipe, "result": result}, indent=1) + "\n")
    if sheet is None:
        if is_old:  # it shows the video that is being replaced
            with suppress(OSError):
                target.sheet.unlink()
        return
    try:
        write_bytes(target.sheet, sheet)
    except (OutputError, WriteError):
        target.sidecar.unlink()  # of a video that will not be there
        raise


def _shows(target: Target) -> bool:
    """Whether a contact sheet is there that belongs to the sidecar beside it."""
    try:
        return target.sheet.is_file() and _read(target.sidecar)[1].get("sheet_sha256") == file_digest(target.sheet)
    except HforceError:
        return False


def _read(path: Path) -> Parts:
    """What a video was made from, and what became of it. Raises DataError when the file does not hold this."""
    try:
        found = json.loads(read_document(path, MOST_BYTES))
        result = found.pop("result")
        if not found["kind"].startswith("hforce.video/") or not isinstance(result, dict):
            raise ValueError("of another kind")
        return found, result
    except (ValueError, RecursionError, TypeError, AttributeError, KeyError) as error:
        raise DataError(f"{path} is no sidecar of hforce", "remove it, or use --on-exists overwrite") from error
