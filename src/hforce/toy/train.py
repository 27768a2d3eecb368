"""`make tiny`: trains the codec and the transformer of the tiny model and writes tiny.safetensors.

    python -m hforce.toy.train --out build/tiny

Five stages, each resumed from its last checkpoint: the codec, the encoded clips, the transformer on coarse tokens
(2 x 2 latent cells each, a quarter of the work), the transformer on the tokens it ships with, and the same once more
with the rate of learning raised again. Every batch is drawn from a generator keyed by (seed, step), so an interrupted
run continues as if nothing had happened. Curves go to log.jsonl.
The transformer is trained by flow matching with teacher forcing (clean clip beside the noisy one, a noise level per
chunk, the clean side lightly noised half of the time so that it forgives its own mistakes).
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hforce.attention.dense import BlockCausal, plain_softmax
from hforce.attention.rope import Rope3D
from hforce.models.dit import WanConfig
from hforce.models.tiny import LATENT_PIXELS, TinyModel
from hforce.toy.data import CHUNKS, LATENTS, Clips, encode_clips, load_clips, save_clips, video_batch
from hforce.toy.optimizer import Optimizer
from hforce.toy.world import PIXELS

log = logging.getLogger(__name__)
CHUNK, TRAIN_STEPS = 3, 1000  # latent frames per chunk; timesteps run 0..1000


@dataclass(frozen=True)
class Phase:
    """One stretch of training of the transformer."""

    name: str
    patch: int  # latent cells that a token is wide and high
    steps: int
    batch: int  # clips in a step
    first_batch: int  # first chunks on their own, extra in every step: they are the hardest
    begin: int = 0  # number of its first batch: a phase that begins where another ended draws batches of its own
    peak: float = 1.0  # of the recipe's rate of learning


@dataclass(frozen=True)
class Recipe:
    """Every number of the recipe. The defaults are those of the shipped weights."""

    seed: int = 0
    codec_steps: int = 900
    codec_batch: int = 12
    codec_frames: int = 9
    codec_lr: float = 4e-3
    latent_noise: float = 0.04  # added to latents while the codec learns, so that it forgives the transformer's errors
    clips: int = 5000
    coarse: Phase = Phase("coarse", patch=2, steps=1150, batch=12, first_batch=32)
    fine: Phase = Phase("fine", patch=1, steps=640, batch=8, first_batch=16)
    longer: Phase = Phase("longer", patch=1, steps=700, batch=8, first_batch=16, begin=640, peak=0.8)
    parts: int = 4  # of every batch, each worked on by one thread: faster than many threads inside an operation
    views: int = 2  # noisy copies of every clip, beside one clean
    lr: float = 2.5e-3
    adam_lr: float = 2e-3
    warmup: int = 40
    decay_from: float = 0.3  # share of the steps after which the rate falls linearly to zero
    shift: float = 5.0
    context_noise: float = 0.35
    object_weight: float = 5.0  # of object cells in a loss, against 1 for the background
    ema: float = 0.995
    save_every: int = 100


def rate(step: int, steps: int, recipe: Recipe) -> float:
    """Learning rate at `step` as a share of its peak: warm-up, plateau, linear fall to zero."""
    left = (steps - step) / (steps * (1 - recipe.decay_from))
    return min(1.0, (step + 1) / recipe.warmup, left)


class Run:
    """Where a training run lives: its folder, device, log and checkpoints."""

    def __init__(self, out: Path, recipe: Recipe, device: str) -> None:
        self.out, self.recipe, self.device = out, recipe, device
        self.started = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)

    def note(self, **values: object) -> None:
        """Appends a line to log.jsonl and shows it."""
        line = json.dumps({"seconds": round(time.monotonic() - self.started, 1), **values})
        with (self.out / "log.jsonl").open("a") as file:
            file.write(line + "\n")
        log.info(line)

    def save(self, name: str, values: dict[str, object]) -> None:
        """Writes a checkpoint in one piece."""
        part = self.out / f"{name}.part"
        torch.save(values, part)
        part.replace(self.out / name)

    def load(self, name: str) -> dict[str, object] | None:
        """The checkpoint of that name, if there is one."""
        path = self.out / name
        return torch.load(path, map_location=self.device, weights_only=True) if path.exists() else None


def train_codec(run: Run, model: TinyModel) -> None:
    """Stage 1: reconstruct short clips; objects count more, latents are slightly noised."""
    recipe, codec = run.recipe, model.codec
    optimizer = Optimizer(codec, recipe.codec_lr, recipe.adam_lr, lambda n, p: p.ndim == 4 and p.shape[0] > 16)
    start = _resume(run, "codec.pt", codec, optimizer)
    for step in range(start, recipe.codec_steps):
        generator = torch.Generator(run.device).manual_seed(recipe.seed * 1_000_003 + step)
        batch = video_batch(recipe.seed, step, recipe.codec_batch, recipe.codec_frames)
        video, mask = (x.to(run.device) for x in batch)
        with _autocast(run.device):
            latents = codec.encode_clip(video)
            noise = torch.randn(latents.shape, generator=generator, device=run.device)
            raw, _ = codec.decode_raw(latents + recipe.latent_noise * noise)
        error = (raw.float()[:, codec.config.stride - 1 :] - video) ** 2
        loss = _weighted(error, mask, recipe.object_weight) + 1e-4 * latents.float().pow(2).mean()
        gradients = torch.autograd.grad(loss, optimizer.parameters)
        optimizer.step(gradients, rate(step, recipe.codec_steps, recipe))
        if step % 25 == 0 or step + 1 == recipe.codec_steps:
            run.note(stage="codec", step=step, loss=loss.item(), psnr=-10 * error.mean().log10().item())
        if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.codec_steps:
            run.save("codec.pt", {"step": step + 1, "model": codec.state_dict(), "optimizer": optimizer.state()})


def make_clips(run: Run, model: TinyModel) -> Clips:
    """Stage 2: the data set as normalised latents; their statistics go into the model."""
    path = run.out / "clips.pt"
    if not path.exists():
        save_clips(encode_clips(model.codec.eval(), run.recipe.seed, run.recipe.clips, run.device), path)
        run.note(stage="clips", count=run.recipe.clips)
    clips = load_clips(path)
    sample = clips.latents[:1000].float()
    model.latent_mean.copy_(sample.mean(dim=(0, 1, 3, 4))[:, None, None])
    model.latent_std.copy_(sample.std(dim=(0, 1, 3, 4))[:, None, None])
    mean, std = model.latent_mean.cpu(), model.latent_std.cpu()
    for part in clips.latents.split(500):
        part.copy_((part.float() - mean) / std)
    return clips


class Trainer:
    """The losses of the transformer."""

    def __init__(self, model: TinyModel, recipe: Recipe, device: str) -> None:
        self.model, self.recipe, self.device = model, recipe, device
        config = model.dit.config
        cells = PIXELS // LATENT_PIXELS
        rope = Rope3D((cells // config.patch[1], cells // config.patch[2]), config.head_dim, device=device)
        self.clip = BlockCausal(rope, [CHUNK] * CHUNKS, noisy=recipe.views, kernel=plain_softmax)
        self.first = BlockCausal(rope, [CHUNK], kernel=plain_softmax)

    def clip_loss(self, batch: tuple[Tensor, Tensor, Tensor], generator: torch.Generator) -> Tensor:
        """Whole clips: every chunk at its own noise level, given the clean chunks before it.

        Each clip is noised in several views, which share the clean side: half of the cost of a clip.
        """
        views, past = self.recipe.views, LATENTS - CHUNK
        x0, mask, words = (x.repeat(1, views, *[1] * (x.ndim - 2)) for x in batch)
        sigma = self._sigmas(x0.shape[0], views * CHUNKS, generator).repeat_interleave(CHUNK, dim=1)
        noise = self._randn(x0.shape, generator)
        noisy = torch.lerp(x0, noise, sigma[:, :, None, None, None])
        joined = torch.cat([self._context(x0[:, :past], generator), noisy], dim=1)
        t = torch.cat([sigma[:, :past] * 0, sigma], dim=1)
        flow = self._flow(joined, t, torch.cat([words[:, : CHUNKS - 1], words], dim=1), self.clip)[:, past:]
        return _weighted((flow - (noise - x0)) ** 2, mask, self.recipe.object_weight)

    def first_loss(self, batch: tuple[Tensor, Tensor, Tensor], generator: torch.Generator) -> Tensor:
        """First chunks alone, from text."""
        x0, mask, words = batch[0][:, :CHUNK], batch[1][:, :CHUNK], batch[2][:, :1]
        sigma = self._sigmas(x0.shape[0], 1, generator).expand(-1, CHUNK)
        noise = self._randn(x0.shape, generator)
        flow = self._flow(torch.lerp(x0, noise, sigma[:, :, None, None, None]), sigma, words, self.first)
        return _weighted((flow - (noise - x0)) ** 2, mask, self.recipe.object_weight)

    def _flow(self, x: Tensor, sigma: Tensor, words: Tensor, attend: BlockCausal) -> Tensor:
        with _autocast(self.device):
            text = self.model.dit.project_text(self.model.words(words).flatten(0, 1))
            return self.model.dit(x, sigma * TRAIN_STEPS, text, attend).float()

    def _context(self, x0: Tensor, generator: torch.Generator) -> Tensor:
        """The clean side, half of the time noised by up to `context_noise`, without telling the model."""
        shape = (x0.shape[0], 1, 1, 1, 1)
        level = self.recipe.context_noise * torch.rand(shape, generator=generator, device=self.device)
        used = torch.rand(shape, generator=generator, device=self.device) < 0.5
        return torch.lerp(x0, self._randn(x0.shape, generator), level * used)

    def _sigmas(self, batch: int, chunks: int, generator: torch.Generator) -> Tensor:
        """Noise levels [B, chunks]: three in four shifted to where sampling meets them, one in four uniform."""
        s = torch.rand((batch, chunks), generator=generator, device=self.device)
        shift = 1 + (self.recipe.shift - 1) * (torch.rand(s.shape, generator=generator, device=self.device) < 0.75)
        return shift * s / (1 + (shift - 1) * s)

    def _randn(self, shape: Iterable[int], generator: torch.Generator) -> Tensor:
        return torch.randn(tuple(shape), generator=generator, device=self.device)


def train_transformer(run: Run, model: TinyModel, clips: Clips) -> TinyModel:
    """Stages 3 to 5: the transformer and the words, on coarse tokens first, which cost a quarter.

    Returns the moving average of the weights, which is what ships.
    """
    coarse = TinyModel(with_patch(model.dit.config, run.recipe.coarse.patch), model.codec.config).to(run.device)
    same = {name: value for name, value in model.state_dict().items() if not name.startswith("dit.")}
    coarse.load_state_dict(same, strict=False)
    init_weights(coarse, run.recipe.seed)
    coarse = train_phase(run, coarse, clips, run.recipe.coarse)
    refine(model, coarse)
    for phase in (run.recipe.fine, run.recipe.longer):
        model = train_phase(run, model, clips, phase)
    return model


def train_phase(run: Run, model: TinyModel, clips: Clips, phase: Phase) -> TinyModel:
    """Trains transformer and words. Returns the moving average of the weights."""
    recipe, file = run.recipe, f"{phase.name}.pt"
    average = copy.deepcopy(model)
    learned = nn.ModuleDict({"dit": model.dit, "words": model.words})
    optimizer = Optimizer(learned, recipe.lr, recipe.adam_lr, lambda n, p: "blocks" in n and p.ndim == 2)
    start = _resume(run, file, model, optimizer, average)
    trainer, judge = Trainer(model, recipe, run.device), Trainer(average, recipe, run.device)
    held_out = encode_held_out(run, model)
    # The plain form of attention to the text: its backward pass is much faster on a CPU.
    with sdpa_kernel(SDPBackend.MATH), ThreadPoolExecutor(min(recipe.parts, os.cpu_count() or 1)) as workers:
        for step in range(start, phase.steps):
            batch = phase.begin + step
            numbers = range(batch * recipe.parts, (batch + 1) * recipe.parts)
            work = [workers.submit(part_of_step, trainer, clips, phase, optimizer, number) for number in numbers]
            results = [part.result() for part in work]
            gradients = [torch.stack(shares).mean(dim=0) for shares in zip(*(r[0] for r in results), strict=True)]
            optimizer.step(gradients, phase.peak * rate(step, phase.steps, recipe))
            _follow(average, model, min(recipe.ema, (step + 1) / (step + 10)))
            if step % 20 == 0:
                losses = (sum(values) / recipe.parts for values in zip(*(r[1] for r in results), strict=True))
                run.note(stage=phase.name, step=step, **dict(zip(("loss", "first"), losses, strict=True)))
            if (step + 1) % recipe.save_every == 0 or step + 1 == phase.steps:
                run.note(stage=f"{phase.name} held out", step=step + 1, **validate(judge, held_out, run.device))
                state = {"step": step + 1, "model": model.state_dict(), "average": average.state_dict()}
                run.save(file, {**state, "optimizer": optimizer.state()})
    return average


def part_of_step(
    trainer: Trainer, clips: Clips, phase: Phase, optimizer: Optimizer, number: int
) -> tuple[Sequence[Tensor], tuple[float, float]]:
    """The gradients of part `number` of the phase, counted over all steps; its losses on clips and on first chunks."""
    recipe, device = trainer.recipe, trainer.device
    generator = torch.Generator(device).manual_seed(recipe.seed * 1_000_003 + number)
    batch, first_batch = phase.batch // recipe.parts, phase.first_batch // recipe.parts
    drawing = torch.Generator().manual_seed(number)
    picks = torch.randint(recipe.clips, (batch + first_batch,), generator=drawing)
    loss = trainer.clip_loss(clips.batch(picks[:batch], device), generator)
    first = trainer.first_loss(clips.batch(picks[batch:], device), generator)
    return torch.autograd.grad(loss + first, optimizer.parameters), (loss.item(), first.item())


def with_patch(config: WanConfig, side: int) -> WanConfig:
    """The same sizes with tokens of side x side latent cells."""
    return replace(config, patch=(1, side, side))


@torch.no_grad()
def refine(fine: TinyModel, coarse: TinyModel) -> None:
    """Gives a model with tokens of one latent cell the weights of one with larger tokens.

    A cell is read as if the whole larger patch were like it, and drawn as the mean of that patch.
    """
    state = coarse.state_dict()
    embedding, (_, p, q) = state["dit.patch_embedding.weight"], coarse.dit.config.patch
    state["dit.patch_embedding.weight"] = embedding.sum(dim=(3, 4), keepdim=True)
    for name in ("dit.head.head.weight", "dit.head.head.bias"):
        state[name] = state[name].unflatten(0, (p * q, -1)).mean(dim=0)
    fine.load_state_dict(state)


def encode_held_out(run: Run, model: TinyModel, count: int = 32) -> Clips:
    """Clips of another seed, for validation."""
    clips = encode_clips(model.codec.eval(), run.recipe.seed + 1_000_000, count, run.device)
    normal = (clips.latents.float() - model.latent_mean.cpu()) / model.latent_std.cpu()
    return Clips(normal.half(), clips.mask, clips.words)


@torch.no_grad()
def validate(trainer: Trainer, clips: Clips, device: str) -> dict[str, float]:
    """The two losses on held-out clips with fixed noise."""
    batch = clips.batch(torch.arange(clips.latents.shape[0]), device)
    losses = [f(batch, torch.Generator(device).manual_seed(7)).item() for f in (trainer.clip_loss, trainer.first_loss)]
    return {"clip": losses[0], "first": losses[1]}


def init_weights(model: TinyModel, seed: int) -> None:
    """Xavier for linear layers, zero for biases and the last layer, small normal for modulation and words (Wan2.1)."""
    torch.manual_seed(seed)
    for name, parameter in model.dit.named_parameters():
        if "modulation" in name:
            nn.init.normal_(parameter, std=model.dit.config.dim**-0.5)
        elif name.endswith("bias") or name.startswith("head.head"):
            nn.init.zeros_(parameter)
        elif parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter.flatten(1))
    nn.init.normal_(model.words.weight)


def _weighted(error: Tensor, mask: Tensor, weight: float) -> Tensor:
    weights = 1 + (weight - 1) * mask
    return (error * weights).sum() / weights.expand_as(error).sum()


def _autocast(device: str) -> torch.autocast:
    # No cache of weights cast: the threads that work on parts of a batch would share it, and its graph.
    kind = device.split(":")[0]
    is_slow = kind == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"  # bfloat16: 15 times slower
    return torch.autocast(kind, torch.bfloat16, enabled=not is_slow, cache_enabled=False)


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)


def _resume(run: Run, name: str, model: nn.Module, optimizer: Optimizer, average: nn.Module | None = None) -> int:
    """Loads a checkpoint if there is one. Returns the step to go on from."""
    saved = run.load(name)
    if saved is None:
        return 0
    model.load_state_dict(saved["model"])  # type: ignore[arg-type]
    optimizer.restore(saved["optimizer"])  # type: ignore[arg-type]
    if average is not None:
        average.load_state_dict(saved["average"])  # type: ignore[arg-type]
    return int(saved["step"])  # type: ignore[call-overload]


def main() -> None:
    """Command line of the recipe: `python -m hforce.toy.train --help`."""
    parser = argparse.ArgumentParser(description="Train the tiny model.")
    parser.add_argument("--out", type=Path, default=Path("build/tiny"), help="folder for checkpoints and curves")
    parser.add_argument("--weights", type=Path, default=Path("src/hforce/models/tiny.safetensors"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=Recipe.longer.steps, help="of the last stage")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: all)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.threads:
        torch.set_num_threads(options.threads)
    run = Run(options.out, Recipe(longer=replace(Recipe.longer, steps=options.steps)), options.device)
    torch.manual_seed(run.recipe.seed)
    model = TinyModel().to(run.device)
    train_codec(run, model)
    train_transformer(run, model, make_clips(run, model)).save(options.weights)


if __name__ == "__main__":
    main()
