"""Models with random weights in the shape of a release, to measure speed on: no file and no hub is needed."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor, nn

from hforce.errors import ConfigError
from hforce.extras import optional
from hforce.models.base import Backbone, Codec
from hforce.models.dit import CausalWan, WanConfig
from hforce.models.sizes import KNOWN
from hforce.models.taehv import TAEHV, TaehvCodec, TaehvConfig
from hforce.models.tiny import DIT, TinyModel, assemble_tiny
from hforce.models.wan import LARGE, SMALL, assemble, choose_precision
from hforce.models.wan_vae import WanCodec

SEED = 0
SPREAD = 0.1  # deviation of a bias from zero, and of a gain from one
SHAPES: Mapping[str, WanConfig] = MappingProxyType({
    "tiny": DIT, SMALL: KNOWN["Wan2.1 1.3B"], LARGE: KNOWN["Wan2.1 14B"],
})  # fmt: skip

Module = TypeVar("Module", bound=nn.Module)


def random_backbone(name: str, size: tuple[int, int] | None, device: str, dtype: str, layers: int = 0) -> Backbone:
    """A model as large as the one called `name`, with random weights, random text, and a random TAEHV as codec.

    size (width, height) in pixels, None: as it was trained; dtype "auto" as `load_backbone` has it; layers: only the
    first so many of the transformer, 0: all. Raises ConfigError for a model whose shape is not known, for more layers
    than it has, and for a size that it cannot make.
    """
    if name not in SHAPES:
        raise ConfigError(f"the shape of model {name!r} is not known without its weights", f"name {', '.join(SHAPES)}")
    shape = SHAPES[name]
    if layers > shape.layers:
        raise ConfigError(f"model {name!r} has {shape.layers} layers, not {layers}", "set bench.layers lower")
    shape = replace(shape, layers=layers or shape.layers)
    if name == "tiny":
        tiny = fill(TinyModel(shape)).eval().requires_grad_(False).to(device)
        made = assemble_tiny(tiny, size, dtype)
    else:
        precision = choose_precision(device, dtype)
        with torch.device("meta"):
            blank = CausalWan(shape)
        model = materialise(blank, precision, device)
        made = assemble(name, model, RandomText(shape), random_taehv(precision, device), size, "")
    return replace(made, encode_text=RandomText(shape), fingerprint="", is_random=True)


def materialise(blank: Module, dtype: torch.dtype, device: str) -> Module:
    """A module that was made on the meta device, on a real one and with random weights."""
    nn.Module.to(blank, dtype)  # that of diffusers warns of casts, which could only matter to weights with a meaning
    return fill(blank.to_empty(device=device)).eval().requires_grad_(False)


@torch.no_grad()
def fill(module: Module) -> Module:
    """Draws all weights, none of them zero: normal, scaled by what flows in, so that values keep their size.

    Zeros would not do: hardware takes less power on them and runs faster. Biases lie around 0, gains of norms around 1.
    """
    generator = torch.Generator(next(module.parameters()).device).manual_seed(SEED)
    for name, weight in module.named_parameters():
        fan_in = weight[0].numel()
        mean, spread = (0.0, fan_in**-0.5) if fan_in > 1 else (float(not name.endswith("bias")), SPREAD)
        weight.normal_(mean, spread, generator=generator)
    return module


class RandomText:
    """Embeddings drawn from a hash of the prompt: a row for every token that the model reads, none of them padding."""

    def __init__(self, shape: WanConfig) -> None:
        self._size = (1, shape.text_len, shape.text_dim)

    def __call__(self, prompt: str) -> Tensor:
        """prompt -> [1, T, text_dim], float32."""
        generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        return torch.randn(self._size, generator=generator)

    def encode_all(self, prompts: object) -> None:
        """Nothing to do ahead."""

    def stay(self, stays: bool) -> None:
        """Nothing to keep: it holds nothing."""

    def reads(self, prompt: str) -> str:
        """The prompt itself."""
        return prompt


def random_taehv(dtype: torch.dtype, device: str) -> TaehvCodec:
    """A TAEHV as large as taew2_1."""
    with torch.device("meta"):
        blank = TAEHV(TaehvConfig())
    return TaehvCodec(materialise(blank, dtype, device))


def random_wan_vae(dtype: torch.dtype, device: str) -> WanCodec:
    """An autoencoder as large as Wan2.1's. Raises UnavailableError without diffusers."""
    models = optional("diffusers.models.autoencoders.autoencoder_kl_wan", "wan")
    with torch.device("meta"):
        blank = models.AutoencoderKLWan()
    return WanCodec(materialise(blank, dtype, device))


DECODERS: Mapping[str, Callable[[torch.dtype, str], Codec]] = MappingProxyType({
    TaehvCodec.name: random_taehv, WanCodec.name: random_wan_vae,
})  # fmt: skip
