"""Is the judge to be believed: right on true films, and every corruption seen by the measure meant for it.

python -m hforce.toy.judge --out docs/tiny-model/judge.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hforce.toy.corruptions import CORRUPTIONS, Corruption
from hforce.toy.film import Film, Segment, render_film
from hforce.toy.metrics import HUE_TOLERANCE, SIZE_TOLERANCE, TINT_TOLERANCE, Reading, Scores, read_frames, score
from hforce.toy.world import CORNERS, EMBLEM, HUES, Scene, distance, position, presence

SEED = 30_000_000  # of the films that are judged
FRAMES = 81  # video frames of a true film
TRUTH = 0.99  # an attribute is to be right in so much of the frames that show it
EDGE = 3  # seconds, from the beginning and from the end of a corrupted video, that are compared
NEAR = 1.0  # pixels by which a centre may be off
CLEAR = 2.0  # pixels from the object at which a landmark is surely not behind it
HALVED = {"sharpness": 0.8, "continuity": 0.98}  # what a corruption brings its measure below, if not one half
SHARP = 0.05  # by which sharpness may differ from 1 on the truth

Array = NDArray[Any]
Video = NDArray[np.uint8]
Tally = dict[str, tuple[float, float]]  # measure -> how often it was right, out of how many frames or seconds


@dataclass(frozen=True)
class Finding:
    """What its measure made of a corruption: the mean over videos before it and after it."""

    corruption: Corruption
    before: float
    after: float

    @property
    def is_seen(self) -> bool:
        """Whether the measure found nothing before, and something after."""
        good = abs(self.before - 1) < SHARP if self.corruption.measure == "sharpness" else self.before >= TRUTH
        return good and self.after < HALVED.get(self.corruption.measure, 0.5)


def film_of(number: int) -> Film:
    """A film to judge: those with an odd number show what training never does."""
    return Film.sample(np.random.default_rng((SEED, number)), FRAMES, held_out=number % 2 == 1)


def judge_truth(films: Iterable[Film], through: Callable[[Video], Video] = np.asarray) -> dict[str, float]:
    """How much of what is judged is right on true films: attributes by the frame, measures of Scores by the second."""
    right: dict[str, float] = {}
    total: dict[str, float] = {}
    for film in films:
        reading = read_frames(through(render_film(film, FRAMES)))
        tallies = [compare(reading, part) for part in film.segments(FRAMES)]
        for tally in [*tallies, measured(score(reading, film.cuts))]:
            for name, (good, judged) in tally.items():
                right[name] = right.get(name, 0) + good
                total[name] = total.get(name, 0) + judged
    return {name: right[name] / total[name] for name in right if total[name]}


def compare(reading: Reading, part: Segment) -> Tally:
    """What is read in a stretch of a film, against its scene."""
    scene, frames = part.scene, slice(part.begin, part.end)
    t = part.clock + np.arange(part.end - part.begin)
    (x, y), seen = position(scene, t), presence(scene, t)
    always, full, gone = np.ones(len(t), bool), seen > 0.9999, seen == 0
    values = {field.name: getattr(reading, field.name) for field in fields(Reading)}
    read = {name: value[frames] for name, value in values.items() if isinstance(value, np.ndarray)}
    plain, claimed = full & np.isfinite(read["size"]), read["landmark"] != ""
    turn = np.abs((read["hue"] - HUES[scene.color] - scene.hue + 180) % 360 - 180)
    checks = {
        "color": (read["color"] == scene.color, full),
        "shape": (read["shape"] == scene.shape, full),
        "mark": (read["mark"] == scene.mark, full),
        "hue": (turn <= HUE_TOLERANCE / 2, full),
        "size": (np.abs(read["size"] - scene.size) <= SIZE_TOLERANCE / 2, plain),
        "centre": (np.hypot(read["x"] - x, read["y"] - y) <= NEAR, full),
        "objects": (read["objects"] == full, full | gone),
        "ground": (read["ground"] == scene.ground, always),
        "pattern": (read["pattern"] == scene.pattern, always),
        "tint": (np.abs(read["tint"] / scene.tint - 1) <= TINT_TOLERANCE / 2, always),
        "landmark": (read["landmark"] == scene.landmark, claimed | landmark_is_clear(scene, t)),
        "corner": (read["corner"] == scene.corner, claimed | landmark_is_clear(scene, t)),
    }
    return {name: (float((good & counted).sum()), float(counted.sum())) for name, (good, counted) in checks.items()}


def landmark_is_clear(scene: Scene, t: Array) -> Array:
    """Whether the object is well away from the landmark at video frames t [T]: bool [T]."""
    (x, y), (at_x, at_y) = position(scene, t), CORNERS[scene.corner]
    near = np.arange(-EMBLEM, EMBLEM + 1)
    dx, dy = (at_x + near - x[:, None])[:, None, :], (at_y + near - y[:, None])[:, :, None]
    return np.asarray(distance(scene.shape, scene.size, dx, dy).min((1, 2)) > CLEAR)


def measured(scores: Scores) -> Tally:
    """The measures that are fractions, over the seconds that have something to judge."""
    names = [field.name for field in fields(Scores)]
    values = {name: getattr(scores, name) for name in names if name.endswith(("_right", "_kept", "continuity"))}
    values |= {name: getattr(scores, name) for name in ("one_object", "one_landmark", "on_path", "on_time")}
    return {name: (float(np.nansum(value)), float(np.isfinite(value).sum())) for name, value in values.items()}


def judge_corruption(corruption: Corruption, count: int) -> Finding:
    """What its measure makes of so many corrupted videos. A jump or a late return is short: its worst second counts."""
    ends = []
    for number in range(count):
        video, asked = corruption.make(np.random.default_rng((SEED, CORRUPTIONS.index(corruption), number)))
        values = getattr(score(read_frames(video), asked), corruption.measure)
        if corruption.measure in ("continuity", "on_time"):
            ends.append((np.nanmin(values[: len(values) // 2]), np.nanmin(values[len(values) // 2 :])))
        else:
            ends.append((_mean(values[:EDGE]), _mean(values[-EDGE:])))
    before, after = (_mean(np.array(column)) for column in zip(*ends, strict=True))
    return Finding(corruption, before, after)


def report(truth: Mapping[str, Mapping[str, float]], findings: Iterable[Finding]) -> str:
    """Both tables as markdown. truth: kind of video -> measure -> how much of it is right."""
    lines = ["| right, of what is judged | " + " | ".join(truth) + " |", "|---" * (len(truth) + 1) + "|"]
    for name in next(iter(truth.values())):
        lines.append(f"| {name} | " + " | ".join(f"{column.get(name, np.nan):.4f}" for column in truth.values()) + " |")
    lines += ["", "| corruption | measure | before | after | seen |", "|---|---|---|---|---|"]
    for found in findings:
        told = "yes" if found.is_seen else "NO"
        name, measure = found.corruption.name, found.corruption.measure
        lines.append(f"| {name} | {measure} | {found.before:.3f} | {found.after:.3f} | {told} |")
    return "\n".join(lines) + "\n"


def _mean(values: Array) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else np.nan


def main() -> int:
    """Command line: `python -m hforce.toy.judge --help`. Exit code 1 when the judge fails."""
    parser = argparse.ArgumentParser(description="Try the judge of the tiny world on true and on corrupted videos.")
    parser.add_argument("--videos", type=int, default=64, help="true films; an eighth as many for every corruption")
    parser.add_argument("--out", type=Path, help="write the tables to this file too")
    parser.add_argument("--codec", action="store_true", help="read the films through the packaged codec too")
    options = parser.parse_args()
    films = [film_of(number) for number in range(options.videos)]
    truth = {"truth": judge_truth(films)}
    if options.codec:
        from hforce.models.registry import load_backbone
        from hforce.toy.evaluate import through_codec

        backbone = load_backbone("tiny", device="cpu")
        truth["truth through the codec"] = judge_truth(films, lambda video: through_codec(backbone, video))
    findings = [judge_corruption(each, max(1, options.videos // 8)) for each in CORRUPTIONS]
    text = report(truth, findings)
    sys.stdout.write(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    return int(min(truth["truth"].values()) < TRUTH or not all(found.is_seen for found in findings))


if __name__ == "__main__":
    sys.exit(main())
