"""The tiny model: a CausalWan of 2 M parameters, its codec and its words, trained on the procedural world."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hforce.errors import CheckpointError, ConfigError, DataError
from hforce.geometry import Geometry
from hforce.models.base import Backbone, Blueprint, Needs, Source
from hforce.models.dit import CausalWan, WanConfig
from hforce.models.mapped import LazyState, open_weights
from hforce.models.resting import RestingCodec
from hforce.models.taehv import TAEHV, TaehvCodec, TaehvConfig, decoder_needs
from hforce.models.weights import count_values, fingerprint_of, load_strictly, open_safetensors, read_safetensors
from hforce.toy.world import PIXELS, SLOTS, complete, parse, sentence, vocabulary

log = logging.getLogger(__name__)

PACKAGED = Path(__file__).with_name("tiny.safetensors")
VOCABULARY = tuple((slot, word) for slot, words in SLOTS.items() for word in words)
WORD_INDEX = {pair: index for index, pair in enumerate(VOCABULARY)}
DIT = WanConfig(
    dim=144, ffn_dim=432, layers=8, heads=6, text_dim=32, text_len=len(SLOTS), in_channels=12, out_channels=12,
    patch=(1, 1, 1),
)  # fmt: skip
CODEC = TaehvConfig(
    latent_channels=12, encoder_width=32, decoder_widths=(64, 48, 32, 32),
    space_down=(1, 2, 1), space_up=(2, 1, 1), patch=4,
)  # fmt: skip
FLOAT = 4  # bytes of a float32
LATENT_PIXELS = 8  # pixels a latent cell is wide and high
EXAMPLE = "a slow red circle bouncing sideways on a green striped background"


class TinyModel(nn.Module):
    """Everything in tiny.safetensors: transformer, codec, word embeddings, and the statistics of the latents."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, dit: WanConfig = DIT, codec: TaehvConfig = CODEC) -> None:
        super().__init__()
        self.dit, self.codec = CausalWan(dit), TAEHV(codec)
        words = torch.empty(len(VOCABULARY), dit.text_dim)
        if not words.is_meta:  # where a normal draw would import the whole of torch's compiler: seconds at every start
            nn.init.normal_(words)
        self.words = nn.Embedding.from_pretrained(words, freeze=False)
        self.register_buffer("latent_mean", torch.zeros(codec.latent_channels, 1, 1))
        self.register_buffer("latent_std", torch.ones(codec.latent_channels, 1, 1))

    def save(self, path: Path, dtype: torch.dtype = torch.float16) -> None:
        """Writes all tensors, and the sizes as metadata."""
        sizes = {"dit": json.dumps(asdict(self.dit.config)), "codec": json.dumps(asdict(self.codec.config))}
        save_file({name: value.to(dtype).contiguous() for name, value in self.state_dict().items()}, path, sizes)

    @classmethod
    def of_sizes(cls, metadata: Mapping[str, str], path: Path) -> TinyModel:
        """A model of the sizes that the metadata of a file says. Raises CheckpointError."""
        try:
            return cls(WanConfig(**_sizes(metadata["dit"])), TaehvConfig(**_sizes(metadata["codec"])))
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
            message = f"{path} holds no tiny model: its sizes are missing, or such as no model has"
            raise CheckpointError(message, "make one with: make tiny") from error

    @classmethod
    def load(cls, path: Path) -> TinyModel:
        """Reads what `save` wrote, as float32. Raises InputError or CheckpointError."""
        state, metadata = read_safetensors(path)
        model = cls.of_sizes(metadata, path)
        load_strictly(model, {name: value.float() for name, value in state.items()}, str(path))
        return model.eval().requires_grad_(False)


def _sizes(text: str) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(text).items()}


class WordEncoder:
    """Reads a prompt as eight words and looks up their embeddings.

    What the prompt leaves open is filled in from a hash of it, as larger models have prompts extended: the model was
    trained on complete sentences. What it says beyond the vocabulary is reported in the log and left out.
    """

    def __init__(self, words: nn.Embedding) -> None:
        """words may come later, with the weights, if nothing but `reads` is asked before."""
        self.words = words
        self._told: set[str] = set()

    def __call__(self, prompt: str) -> Tensor:
        """prompt -> [1, 8, text_dim]. Raises DataError when no word of it is known."""
        words = self._understand(prompt)
        index = torch.tensor([[WORD_INDEX[slot, words[slot]] for slot in SLOTS]], device=self.words.weight.device)
        return self.words(index)

    def encode_all(self, prompts: Iterable[str]) -> None:
        """Nothing to do ahead: words are looked up at once, and what cannot be read concerns its own video alone."""

    def stay(self, stays: bool) -> None:
        """Nothing to do: the words are a table of a few thousand bytes that always stays."""

    def reads(self, prompt: str) -> str:
        """The complete sentence that is looked up."""
        return sentence(self._understand(prompt))

    def _understand(self, prompt: str) -> dict[str, str]:
        parsed = parse(prompt)
        if not parsed.words:
            raise DataError(
                f"the tiny model knows no word of the prompt {prompt[:60]!r}; it knows\n{vocabulary()}",
                f"for example: {EXAMPLE}",
            )
        if prompt not in self._told:
            self._told.add(prompt)
            if parsed.surplus:
                told = prompt[:60], ", ".join(parsed.surplus)
                log.warning("the tiny model shows one thing on one background, so of %r it leaves out: %s", *told)
            if parsed.unknown:
                log.warning("the tiny model does not know: %s. It knows\n%s", ", ".join(parsed.unknown), vocabulary())
        return complete(parsed.words, prompt)


def open_tiny(source: Source, size: tuple[int, int] | None, device: str, dtype: str) -> Blueprint:
    """The packaged tiny model, or one that `make tiny` wrote. Sizes other than 64x64 run, but were not trained.

    Only its header is read. Raises ConfigError when parts are given: the file has them all; InputError and
    CheckpointError for the file.
    """
    if odd := [f"model.{name}" for name in ("base", "lora", "vae") if getattr(source, name)]:
        raise ConfigError(f"the tiny model takes no {', '.join(odd)}", "leave it out, or name another model with -m")
    path = Path(source.checkpoint) if source.checkpoint else PACKAGED
    metadata = open_safetensors(path).metadata() or {}
    with torch.device("meta"):
        blank = TinyModel.of_sizes(metadata, path)
    config = blank.dit.config
    precision = choose_precision(dtype)
    size = size or (PIXELS, PIXELS)
    geometry, shape = lay_out(config, size)
    encoder = WordEncoder(blank.words)
    return Blueprint(
        "tiny", config, geometry, shape, size, blank.codec.config.stride, precision, device,
        partial(_weigh, blank, shape[1:], precision), encoder, partial(_identify, path), partial(_read, path, encoder),
    )  # fmt: skip


def assemble_tiny(tiny: TinyModel, size: tuple[int, int] | None, dtype: str) -> Backbone:
    """A tiny model that was made, not read, for videos of a size (width, height) in pixels; dtype "auto" is float32."""
    size = size or (PIXELS, PIXELS)
    geometry, shape = lay_out(tiny.dit.config, size)
    tiny.dit.to(choose_precision(dtype))
    codec = TaehvCodec(tiny.codec, tiny.latent_mean, tiny.latent_std)
    return Backbone("tiny", tiny.dit, WordEncoder(tiny.words), codec, geometry, shape, size, fingerprint="")


def choose_precision(dtype: str) -> torch.dtype:
    """What a dtype name stands for; "auto" is float32."""
    return getattr(torch, "float32" if dtype == "auto" else dtype)


def lay_out(config: WanConfig, size: tuple[int, int]) -> tuple[Geometry, tuple[int, int, int]]:
    """For videos of a size (width, height) in pixels: the geometry, and the shape (C, h, w) of a latent frame."""
    shape = (config.in_channels, size[1] // LATENT_PIXELS, size[0] // LATENT_PIXELS)
    grid = (shape[1] // config.patch[1], shape[2] // config.patch[2])
    return Geometry(config.layers, config.heads, config.head_dim, grid), shape


def _weigh(blank: TinyModel, cells: tuple[int, int], precision: torch.dtype, chunk: int) -> Needs:
    """What a model of these sizes needs: its transformer in `precision`, all else in float32."""
    transformer, words = count_values(blank.dit), count_values(blank.words)
    codec = count_values(blank) - transformer - words
    decoding = decoder_needs(blank.codec.config, cells, torch.float32, chunk)
    return Needs(transformer * precision.itemsize, FLOAT * words, FLOAT * codec, 0, *decoding)


def load_codec(path: Path) -> TaehvCodec:
    """The codec alone, on the CPU. Raises what `TinyModel.load` raises."""
    tiny = TinyModel.load(path)
    return TaehvCodec(tiny.codec, tiny.latent_mean, tiny.latent_std)


def _identify(path: Path) -> str:
    """The fingerprint of a file's transformer."""
    _, state = open_weights(path).choose(())
    entries = {name.removeprefix("dit."): entry for name, entry in state.entries.items() if name.startswith("dit.")}
    return fingerprint_of(LazyState(entries))


def _read(path: Path, encoder: WordEncoder, blueprint: Blueprint, rests: bool) -> Backbone:
    b = blueprint
    tiny = TinyModel.load(path).to(b.device)
    tiny.dit.to(b.dtype)
    encoder.words = tiny.words
    there = b.codec_device
    whole = TaehvCodec(tiny.codec.to(there), tiny.latent_mean.to(there), tiny.latent_std.to(there))
    resting = RestingCodec(partial(load_codec, path), whole.name, b.stride, whole.channels)
    codec = resting if rests and not b.is_apart else whole
    return Backbone(b.name, tiny.dit, encoder, codec, b.geometry, b.shape, b.size, b.fingerprint, b.family)
