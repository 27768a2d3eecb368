"""What the heads of the tiny model look at: attention by frame, and how far prompts and seeds agree on it.

    python -m hforce.toy.heads --out docs/tiny-model

`hforce profile` asks whether a head looks at the first frame, at the chunk being made, or between. This shows all of
it, in the last chunk of five-second videos: heads.md tells whether there are sink heads, attention.png shows them.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hforce.build import build_backbone, build_stream
from hforce.cache.heads import HeadCache
from hforce.cache.roles import RoleMap
from hforce.config import load_config
from hforce.models.base import Backbone
from hforce.plots import check_plot, save_figure
from hforce.probe import group_mass
from hforce.profile import agreement, label_mass, measuring, read_prompts
from hforce.settings import Config
from hforce.stream import Take

log = logging.getLogger(__name__)

MODE = "native21"
SEEDS = (0, 1)
SINK = 2.0  # times an even share of a head's attention that its first frame must have to be called a sink


class Watch:
    """Stands in for the attention of a cache, and adds up what heads look at in all passes of one chunk, by frame."""

    def __init__(self, cache: HeadCache, chunk: int) -> None:
        geometry = cache.geometry
        self.cache, self.now = cache, chunk * geometry.chunk
        self.mass = torch.zeros(geometry.layers, geometry.heads, self.now + geometry.chunk)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [1, N, H, D] before RoPE -> [1, N, H, D], exactly as the cache would."""
        out = self.cache.attend(layer, q, k, v)
        if self.cache.now == self.now:
            self.mass[layer] += self.cache.frame_mass(layer, q)[0].cpu()
        return out


def look(config: Config, backbone: Backbone, prompt: str, seed: int) -> Tensor:
    """Attention of every head in the last chunk of the trained span, by frame: [L, H, frames], rows add up to 1."""
    chunks = backbone.geometry.span // backbone.geometry.chunk
    stream = build_stream(measuring(config, backbone, MODE), backbone, chunks, seed)
    assert isinstance(stream.cache, HeadCache), "attention is measured through the cache of the method"
    stream.graphs = None  # which would not ask the watch in every pass
    stream.attend = watch = Watch(stream.cache, chunks - 1)
    for _ in stream.play([Take(backbone.encode_text(prompt), chunks)]):
        pass
    return watch.mass / watch.mass.sum(dim=-1, keepdim=True)


def report(masses: Tensor, config: Config, chunk: int) -> str:
    """What masses [seeds, prompts, L, H, frames] say, as markdown."""
    settings, frames = config.profile, masses.shape[-1]
    numbers, now = range(frames), frames - chunk

    def roles(mass: Tensor) -> RoleMap:
        return label_mass(torch.stack([group_mass(m, numbers, now, settings.sink_frames) for m in mass]), settings)

    whole = masses.mean(dim=(0, 1))
    shares = whole * frames
    first, own = shares[..., 0], whole[..., now:].sum(dim=-1)
    last = shares[..., now - chunk : now].mean(dim=-1)
    agreed = roles(whole)
    singles = [agreement(agreed, roles(mass)) for mass in masses.flatten(0, 1)]
    seeds = agreement(*(roles(mass.mean(dim=0)) for mass in masses[:2]))
    halves = agreement(roles(masses[:, 0::2].mean(dim=(0, 1))), roles(masses[:, 1::2].mean(dim=(0, 1))))
    rows = {
        f"heads with more than {SINK:g} times an even share on the first frame": int((first > SINK).sum()),
        "most that a head has there, in even shares": f"{first.max():.2f}",
        "heads with more than half of their attention on the chunk being made": int((own > 0.5).sum()),
        "heads with more than twice an even share on the chunk before": int((last > 2).sum()),
        "heads whose labels agree: seed 0 and seed 1": f"{seeds:.3f}",
        "even and odd prompts": f"{halves:.3f}",
        "one prompt and one seed against all, median": f"{torch.tensor(singles).median():.3f}",
    }
    lines = [f"| {masses.shape[1]} prompts x {masses.shape[0]} seeds, {first.numel()} heads | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items())]) + "\n"


def plot(whole: Tensor, chunk: int, path: Path) -> None:
    """Attention [L, H, frames]: left a row a head and a column a frame, right that on the first frame and the chunk."""
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    layers, heads, frames = whole.shape
    figure = Figure(figsize=(11, 7), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    parts = figure.subplot_mosaic([["map", "first"], ["map", "own"]], width_ratios=(2.2, 1))
    shares, scale = (whole * frames).flatten(0, 1).numpy(), LogNorm(0.1, 10)
    image = parts["map"].imshow(shares, norm=scale, cmap="RdBu_r", aspect="auto", interpolation="nearest")
    parts["map"].set(xlabel="latent frame; the last three are being made", ylabel="layer",
                     title="attention in even shares (white: as if spread evenly)")  # fmt: skip
    middles = [heads * layer + (heads - 1) / 2 for layer in range(layers)]
    parts["map"].set_yticks(middles, [str(layer) for layer in range(layers)])
    parts["map"].set_xticks(range(0, frames, chunk))
    for layer in range(1, layers):
        parts["map"].axhline(heads * layer - 0.5, color="black", linewidth=0.6)
    figure.colorbar(image, ax=parts["map"])
    parts["first"].hist((whole[..., 0] * frames).flatten().numpy(), bins=24, color="#0072B2")
    parts["first"].axvline(SINK, color="black", linestyle="--", linewidth=1)
    parts["first"].set(xlabel="on the first frame, even shares", ylabel="heads")
    parts["own"].hist(whole[..., -chunk:].sum(dim=-1).flatten().numpy(), bins=24, color="#E69F00")
    parts["own"].set(xlabel="on the chunk being made, 0..1", ylabel="heads")
    save_figure(figure, path)


def measure(config: Config, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, int]:
    """Attention of the configured model by frame, [seeds, prompts, L, H, frames], and the frames of a chunk."""
    backbone = build_backbone(config)
    seen = []
    for seed in seeds:
        for prompt in prompts:
            seen.append(look(config, backbone, prompt, seed))
            log.info("%d of %d", len(seen), len(seeds) * len(prompts))
    return torch.stack(seen).unflatten(0, (len(seeds), len(prompts))), backbone.geometry.chunk


@torch.inference_mode()
def main() -> None:
    """Command line: `python -m hforce.toy.heads --help`."""
    parser = argparse.ArgumentParser(description="Show what the heads of the tiny model look at.")
    parser.add_argument("--out", type=Path, default=Path("build/heads"))
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.out.mkdir(parents=True, exist_ok=True)
    config = load_config(overrides=options.overrides)
    masses, chunk = measure(config, read_prompts(config.profile.prompts), SEEDS)
    text = report(masses, config, chunk)
    (options.out / "heads.md").write_text(text)
    log.info("%s", text)
    plot(masses.mean(dim=(0, 1)), chunk, options.out / "attention.png")


if __name__ == "__main__":
    main()
