"""Training clips of the procedural world: rendered, encoded, and cut into batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hforce.models.taehv import TAEHV
from hforce.models.tiny import LATENT_PIXELS, WORD_INDEX
from hforce.toy.world import PIXELS, SLOTS, Scene, position, presence, render

FRAMES = 81  # video frames of a clip: 5 s
LATENTS = 21
REACH = 6.0  # pixels around an object's edge that still count as the object when a loss is weighted


def word_ids(words: dict[str, str]) -> list[int]:
    """A complete prompt -> one index into the vocabulary per slot, in the order of SLOTS."""
    return [WORD_INDEX[slot, words[slot]] for slot in SLOTS]


def scene_of(seed: int, index: int) -> Scene:
    """Clip number `index` of the data set with this seed."""
    return Scene.sample(np.random.default_rng((seed, index)))


def object_mask(scene: Scene, cells: int, first: int = 0, frames: int = FRAMES) -> Tensor:
    """Where the object is: bool [T, cells, cells], per video frame, on a coarse grid over the picture."""
    t = np.arange(first, first + frames)
    x, y = position(scene, t)
    centres = (np.arange(cells) + 0.5) * (PIXELS / cells)
    across, down = centres[None, None, :] - x[:, None, None], centres[None, :, None] - y[:, None, None]
    far = np.maximum(np.abs(across), np.abs(down))
    return torch.from_numpy((far < scene.size + REACH) & (presence(scene, t) > 0)[:, None, None])


def latent_mask(scene: Scene, cells: int) -> Tensor:
    """The same per latent frame (its first video frame alone, then groups of four): bool [n, cells, cells]."""
    mask = object_mask(scene, cells)
    return torch.cat([mask[:1], mask[1:].unflatten(0, (-1, 4)).any(dim=1)])


def video_batch(seed: int, step: int, size: int, frames: int) -> tuple[Tensor, Tensor]:
    """Short pieces of fresh clips for the codec: video [B, T, 3, 64, 64] in 0..1, object mask [B, T, 1, 64, 64]."""
    rng = np.random.default_rng((seed, 1, step))
    videos, masks = [], []
    for _ in range(size):
        scene, first = Scene.sample(rng), int(rng.integers(0, 200))
        videos.append(torch.from_numpy(render(scene, frames, first)))
        masks.append(object_mask(scene, PIXELS, first, frames))
    video = torch.stack(videos).permute(0, 1, 4, 2, 3).float() / 255
    return video, torch.stack(masks)[:, :, None]


@dataclass(frozen=True)
class Clips:
    """Encoded clips. latents float16 [K, 21, C, 8, 8] (normalised), mask bool [K, 21, 8, 8], words [K, 8]."""

    latents: Tensor
    mask: Tensor
    words: Tensor

    def batch(self, index: Tensor, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Clips `index` [B] as float32 latents, mask [B, 21, 1, 8, 8] and words on `device`."""
        latents, mask, words = self.latents[index].float(), self.mask[index][:, :, None], self.words[index]
        return latents.to(device), mask.to(device), words.to(device)


@torch.no_grad()
def encode_clips(codec: TAEHV, seed: int, count: int, device: str, at_once: int = 8) -> Clips:
    """Renders and encodes clips 0 .. count - 1 of the data set. Latents come as the codec gives them."""
    cells = PIXELS // LATENT_PIXELS
    latents = torch.empty(count, LATENTS, codec.config.latent_channels, cells, cells, dtype=torch.float16)
    mask = torch.empty(count, LATENTS, cells, cells, dtype=torch.bool)
    words = torch.empty(count, len(SLOTS), dtype=torch.long)
    for start in range(0, count, at_once):
        batch = range(start, min(start + at_once, count))
        scenes = [scene_of(seed, i) for i in batch]
        video = torch.from_numpy(np.stack([render(scene, FRAMES) for scene in scenes]))
        video = video.to(device).permute(0, 1, 4, 2, 3).float() / 255
        latents[batch.start : batch.stop] = codec.encode_clip(video).half().cpu()
        for i, scene in zip(batch, scenes, strict=True):
            mask[i] = latent_mask(scene, cells)
            words[i] = torch.tensor(word_ids(scene.words))
    return Clips(latents, mask, words)


def save_clips(clips: Clips, path: Path) -> None:
    """Keeps clips for a later start (a working file, not a format for others)."""
    torch.save({"latents": clips.latents, "mask": clips.mask, "words": clips.words}, path)


def load_clips(path: Path) -> Clips:
    """The clips that `save_clips` kept."""
    return Clips(**torch.load(path, weights_only=True))
