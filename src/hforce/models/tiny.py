"""The tiny model: a CausalWan of 2.2 M parameters, its codec and its words, trained on the procedural world."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hforce.models.dit import CausalWan, WanConfig
from hforce.models.taehv import TAEHV, TaehvConfig

WORDS = 31  # of the world's vocabulary
DIT = WanConfig(
    dim=144, ffn_dim=576, layers=6, heads=6, text_dim=32, text_len=8, in_channels=12, out_channels=12
)  # fmt: skip
CODEC = TaehvConfig(
    latent_channels=12, encoder_width=32, decoder_widths=(64, 48, 32, 32), space_down=(1, 2, 1), space_up=(2, 1, 1), patch=4
)  # fmt: skip


class TinyModel(nn.Module):
    """Everything in tiny.safetensors: transformer, codec, word embeddings, and the statistics of the latents."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, dit: WanConfig = DIT, codec: TaehvConfig = CODEC) -> None:
        super().__init__()
        self.dit, self.codec = CausalWan(dit), TAEHV(codec)
        self.words = nn.Embedding(WORDS, dit.text_dim)
        self.register_buffer("latent_mean", torch.zeros(codec.latent_channels, 1, 1))
        self.register_buffer("latent_std", torch.ones(codec.latent_channels, 1, 1))

    def save(self, path: Path, dtype: torch.dtype = torch.float16) -> None:
        """Writes all tensors, and the sizes as metadata."""
        sizes = {"dit": json.dumps(asdict(self.dit.config)), "codec": json.dumps(asdict(self.codec.config))}
        save_file({name: value.to(dtype).contiguous() for name, value in self.state_dict().items()}, path, sizes)
