"""How good the tiny model is inside its trained five seconds: tables, its training curves, and contact sheets.

    python -m hforce.toy.evaluate --out docs/tiny-model

Two kinds of films, of held-out scenes: a single scene, and one that leaves its first scene and returns to it. What no
prompt says is judged in the last second, against when the scene was first seen. Five seconds are as long as the window,
so under that cache the model sees all that it saw in training: what another one has less is the price of that cache.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hforce.build import build_backbone, build_plan, build_script, build_stream
from hforce.config import load_config
from hforce.decoding import decoded, to_bytes
from hforce.documents import write_bytes
from hforce.models.base import Backbone
from hforce.prompts import Shot
from hforce.settings import Config
from hforce.toy.film import Cut, Film, render_film
from hforce.toy.metrics import Scores, read_frames, score
from hforce.toy.world import FPS, Scene, sentence
from hforce.video import contact_sheet

log = logging.getLogger(__name__)

PHASES = ("coarse", "fine", "longer")  # of the transformer's training, each with a panel of curves

FRAMES = 81
PROMPT_SEED = 20_000_000  # scenes are drawn from this seed; training draws its clips from seeds 0 and 1 000 000
BACK_BY = 57  # video frame by which a returning film is back in a scene it left, so that its last second is all in it
SETUPS = ("window", "head-forcing")  # that the model is judged under; pictures are of the last
SHOWN = ("color_right", "shape_right", "ground_right", "pattern_right", "one_object", "motion_right", "on_path",
         "mark_kept", "hue_kept", "size_kept", "tint_kept", "landmark_kept", "residual")  # fmt: skip

Video = NDArray[np.uint8]


def single_films(count: int) -> list[Film]:
    """Films of one held-out scene each."""
    draws = (np.random.default_rng((PROMPT_SEED, i)) for i in range(count))
    return [Film((Cut(0, Scene.sample(rng, held_out=True)),)) for rng in draws]


def returning_films(count: int) -> list[Film]:
    """Films of held-out scenes that end in one they have left before."""
    found: list[Film] = []
    number = 0
    while len(found) < count:
        film = Film.sample(np.random.default_rng((PROMPT_SEED, 1, number)), FRAMES, held_out=True)
        *before, last = film.cuts
        if last.frame <= BACK_BY and any(cut.scene == last.scene for cut in before):
            found.append(film)
        number += 1
    return found


def generate(config: Config, backbone: Backbone, film: Film, seed: int, frames: int = FRAMES) -> Video:
    """What the model makes of the prompts of a film, in whole chunks: uint8 [T, H, W, 3]."""
    shots = [Shot(sentence(p.scene.words), (p.end - p.begin) / FPS) for p in film.segments(frames)]
    plan = build_plan(shots, frames / FPS, config.video.fps, backbone)
    stream = build_stream(config, backbone, plan.total, seed)
    script = build_script(shots, plan, backbone)
    return np.concatenate([frames for _, frames, _ in decoded(stream, script, backbone)])


def _from_text(config: Config, backbone: Backbone, number: int, film: Film) -> Video:
    return generate(config, backbone, film, number)


def through_codec(backbone: Backbone, video: Video) -> Video:
    """A video encoded and decoded again: the best that any transformer on this codec could do."""
    tensor = torch.from_numpy(video).permute(0, 3, 1, 2)[None].float() / 255
    with torch.inference_mode():
        return to_bytes(backbone.codec.decoder()(backbone.codec.encode(tensor)))


def judge(films: Sequence[Film], make: Callable[[int, Film], Video]) -> tuple[dict[str, list[float]], list[Video]]:
    """Scores of every film's video, a mean over its seconds or, of what must be kept, its last; and the videos."""
    table: dict[str, list[float]] = {field.name: [] for field in fields(Scores)}
    videos = []
    for number, film in enumerate(films):
        videos.append(make(number, film))
        scores = score(read_frames(videos[-1]), film.cuts)
        for name, values in table.items():
            seconds = getattr(scores, name)
            known = seconds[np.isfinite(seconds)][-1 if name.endswith("_kept") else None :]
            values.append(float(known.mean()) if len(known) else np.nan)
        log.info("%d of %d: %s", number + 1, len(films), sentence(film.cuts[0].scene.words))
    return table, videos


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval over videos."""
    known = np.array([v for v in values if np.isfinite(v)])
    means = np.random.default_rng(0).choice(known, (draws, len(known))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(known.mean()), float(low), float(high)


def markdown(tables: dict[str, dict[str, list[float]]]) -> str:
    """One row per kind of video, one column per measure: mean [95 % interval]."""
    lines = ["| video | " + " | ".join(SHOWN) + " |", "|---" * (len(SHOWN) + 1) + "|"]
    for name, table in tables.items():
        cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*interval(table[measure])) for measure in SHOWN]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def sheet(videos: Sequence[Video], path: Path, moments: int = 8) -> None:
    """A row per video, `moments` pictures from first to last."""
    pictures = []
    for video in videos:
        for i in np.linspace(0, len(video) - 1, moments).round().astype(int):
            pictures.append((i / FPS, video[i].repeat(2, axis=0).repeat(2, axis=1)))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, contact_sheet(pictures, moments))


def curves(log_file: Path) -> Iterator[tuple[str, list[float], list[float]]]:
    """Training curves out of log.jsonl: name, steps, values."""
    lines = [json.loads(line) for line in log_file.read_text().splitlines()]
    parts = [("codec", "psnr")]
    for phase in PHASES:
        parts += [(phase, "loss"), (f"{phase} held out", "clip"), (f"{phase} held out", "first")]
    for stage, value in parts:
        chosen = [line for line in lines if line["stage"] == stage]
        yield f"{stage} {value}", [line["step"] for line in chosen], [line[value] for line in chosen]


def plot_curves(log_file: Path, path: Path) -> None:
    """A panel for each stage that is trained: quality of the codec, losses of the transformer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 1 + len(PHASES), figsize=(16, 3.5), layout="constrained")
    for axes, stage in zip(panels, ("codec", *PHASES), strict=True):
        for name, steps, values in curves(log_file):
            if name.startswith(stage):
                axes.plot(steps, values, label=name.removeprefix(f"{stage} "), linewidth=1)
        axes.set(title=stage, xlabel="step", ylabel="weighted flow loss", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0].set(ylabel="PSNR of training batches, dB", yscale="linear")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Command line: `python -m hforce.toy.evaluate --help`."""
    parser = argparse.ArgumentParser(description="Judge the tiny model inside its trained five seconds.")
    parser.add_argument("--out", type=Path, default=Path("build/evaluation"))
    parser.add_argument("--log", type=Path, default=Path("build/tiny/log.jsonl"), help="curves, if they are there")
    parser.add_argument("--videos", type=int, default=64)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.out.mkdir(parents=True, exist_ok=True)
    configs = {setup: load_config(overrides=[*options.overrides, f"cache.setup={setup}"]) for setup in SETUPS}
    backbone = build_backbone(configs[SETUPS[0]])
    makers: dict[str, Callable[[int, Film], Video]] = {
        "truth": lambda _, film: render_film(film, FRAMES),
        "truth through the codec": lambda _, film: through_codec(backbone, render_film(film, FRAMES)),
    }
    for setup, config in configs.items():
        makers[f"tiny model, {setup}"] = partial(_from_text, config, backbone)
    for kind, films in {"single": single_films, "returning": returning_films}.items():
        results = {name: judge(films(options.videos), make) for name, make in makers.items()}
        tables = {name: table for name, (table, _) in results.items()}
        (options.out / f"{kind}.md").write_text(markdown(tables))
        (options.out / f"{kind}.json").write_text(json.dumps(tables, indent=1))
        sheet(results[f"tiny model, {SETUPS[-1]}"][1][:12], options.out / f"{kind}.png")
        log.info("%s", markdown(tables))
    if options.log.exists():
        plot_curves(options.log, options.out / "curves.png")


if __name__ == "__main__":
    main()
