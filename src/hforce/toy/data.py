"""Training clips of the procedural world: rendered, encoded, and cut into batches."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hforce.models.taehv import TAEHV
from hforce.models.tiny import LATENT_PIXELS, WORD_INDEX
from hforce.toy.film import Cut, Film, Layout, chunk_start, layout, render_film
from hforce.toy.world import EMBLEM, PIXELS, SLOTS, Scene

FRAMES = 81  # video frames of a clip: 5 s
LATENTS, CHUNKS = 21, 7  # the same in latent frames and in chunks
REACH = 6.0  # pixels around an object's edge that still count as the object when a loss is weighted
LANDMARK_REACH = 3.0  # the same for a landmark
CUT_SHARE = 0.3  # of the codec's pieces that have a cut in them
STRIDE = 4  # video frames of a latent frame, but for the first one of a clip

Array = NDArray[Any]


def word_ids(words: dict[str, str]) -> list[int]:
    """A complete prompt -> one index into the vocabulary per slot, in the order of SLOTS."""
    return [WORD_INDEX[slot, words[slot]] for slot in SLOTS]


def film_of(seed: int, index: int) -> Film:
    """Clip number `index` of the data set with this seed."""
    return Film.sample(np.random.default_rng((seed, index)), FRAMES)


def chunk_words(film: Film) -> Tensor:
    """What the prompt of every chunk says: [CHUNKS, slots]."""
    scenes = [part.scene for part in film.segments(FRAMES) for _ in range(_chunks(part.begin, part.end))]
    return torch.tensor([word_ids(scene.words) for scene in scenes])


def _chunks(begin: int, end: int) -> int:
    return sum(begin <= chunk_start(chunk) < end for chunk in range(CHUNKS))


def thing_mask(where: Layout, cells: int) -> Tensor:
    """Where object and landmark are: bool [T, cells, cells], per video frame, on a coarse grid over the picture."""
    centres = (np.arange(cells) + 0.5) * (PIXELS / cells)
    thing = _near(centres, where.x, where.y, where.size + REACH) & (where.presence > 0)[:, None, None]
    reach = np.full(len(where.x), EMBLEM + LANDMARK_REACH)
    return torch.from_numpy(thing | _near(centres, where.landmark_x, where.landmark_y, reach))


def _near(centres: Array, x: Array, y: Array, reach: Array) -> Array:
    """Which cells lie in the square of side 2 reach [T] around (x, y) [T]: bool [T, cells, cells]."""
    across, down = (np.abs(centres[None] - axis[:, None]) < reach[:, None] for axis in (x, y))
    near: Array = across[:, None, :] & down[:, :, None]
    return near


def latent_mask(film: Film, cells: int) -> Tensor:
    """`thing_mask` per latent frame (its first video frame alone, then groups of four): bool [n, cells, cells]."""
    mask = thing_mask(layout(film, FRAMES), cells)
    return torch.cat([mask[:1], mask[1:].unflatten(0, (-1, STRIDE)).any(dim=1)])


def video_batch(seed: int, step: int, size: int, frames: int) -> tuple[Tensor, Tensor]:
    """Short pieces of fresh films for the codec: video [B, T, 3, 64, 64] in 0..1, mask of things [B, T, 1, 64, 64].

    Some have a cut in them, where a latent frame begins.
    """
    rng = np.random.default_rng((seed, 1, step))
    videos, masks = [], []
    for _ in range(size):
        first, cuts = int(rng.integers(0, 200)), [Cut(0, Scene.sample(rng))]
        if rng.random() < CUT_SHARE:
            cuts.append(Cut(first + 1 + STRIDE * int(rng.integers(0, frames // STRIDE)), Scene.sample(rng)))
        film = Film(tuple(cuts))
        videos.append(torch.from_numpy(render_film(film, frames, first)))
        masks.append(thing_mask(layout(film, frames, first), PIXELS))
    video = torch.stack(videos).permute(0, 1, 4, 2, 3).float() / 255
    return video, torch.stack(masks)[:, :, None]


@dataclass(frozen=True)
class Clips:
    """Encoded clips. latents float16 [K, 21, C, 8, 8] (normalised), mask bool [K, 21, 8, 8], words [K, 7, slots]."""

    latents: Tensor
    mask: Tensor
    words: Tensor

    def batch(self, index: Tensor, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Clips `index` [B] as float32 latents, mask [B, 21, 1, 8, 8] and words [B, 7, slots] on `device`."""
        latents, mask, words = self.latents[index].float(), self.mask[index][:, :, None], self.words[index]
        return latents.to(device), mask.to(device), words.to(device)


def encode_clips(codec: TAEHV, seed: int, count: int, device: str, at_once: int = 8, workers: int = 2) -> Clips:
    """Renders and encodes clips 0 .. count - 1 of the data set. Latents come as the codec gives them."""
    cells = PIXELS // LATENT_PIXELS
    latents = torch.empty(count, LATENTS, codec.config.latent_channels, cells, cells, dtype=torch.float16)
    mask = torch.empty(count, LATENTS, cells, cells, dtype=torch.bool)
    words = torch.empty(count, CHUNKS, len(SLOTS), dtype=torch.long)

    @torch.no_grad()
    def encode(start: int) -> None:
        films = [film_of(seed, i) for i in range(start, min(start + at_once, count))]
        video = torch.from_numpy(np.stack([render_film(film, FRAMES) for film in films]))
        video = video.to(device).permute(0, 1, 4, 2, 3).float() / 255
        latents[start : start + len(films)] = codec.encode_clip(video).half().cpu()
        for i, film in enumerate(films, start):
            mask[i], words[i] = latent_mask(film, cells), chunk_words(film)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(encode, range(0, count, at_once)))
    return Clips(latents, mask, words)


def save_clips(clips: Clips, path: Path) -> None:
    """Keeps clips for a later start (a working file, not a format for others)."""
    torch.save({"latents": clips.latents, "mask": clips.mask, "words": clips.words}, path)


def load_clips(path: Path) -> Clips:
    """The clips that `save_clips` kept."""
    return Clips(**torch.load(path, weights_only=True))
