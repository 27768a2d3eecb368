"""The text encoder of Wan2.1 (umT5-XXL) in both weight formats; every prompt is encoded once and then kept on disk."""

from __future__ import annotations

import gc
import hashlib
import html
import json
import logging
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hforce.documents import read_document
from hforce.errors import CheckpointError, DataError, InputError
from hforce.extras import optional
from hforce.models.text_store import EmbeddingStore
from hforce.models.wan_files import INDEX, read_weights
from hforce.models.weights import load_strictly

log = logging.getLogger(__name__)
T = TypeVar("T")

END = 1  # the token every text ends with
LARGEST_TOKENIZER = 256 << 20  # bytes; that of umT5 takes 17 MB
SAMPLES, BLOCK = 64, 1 << 16  # places looked at, and bytes read at each, to know a weight file again
ROOM = 1.2  # memory the encoder needs on a GPU, as a multiple of its weights
EMBEDDED, TIED = "shared.weight", "encoder.embed_tokens.weight"
RELEASED_NAMES = (  # names in models_t5_umt5-xxl-enc-bf16.pth -> in transformers
    (r"token_embedding\.", "shared."),
    (r"norm\.", "encoder.final_layer_norm."),
    (r"blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"blocks\.(\d+)\.attn\.([qkvo])\.", r"encoder.block.\1.layer.0.SelfAttention.\2."),
    (r"blocks\.(\d+)\.pos_embedding\.embedding\.", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
)


class WanText:
    """Turns prompts into text embeddings as Wan2.1 was trained on them: cleaned, cut at so many tokens, zero beyond.

    The encoder is loaded when a prompt is met that the store does not have, and stays until `release`.
    """

    def __init__(
        self,
        weights: Path,
        tokenizer: Path,
        store: EmbeddingStore,
        shape: tuple[int, int] = (512, 4096),
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cpu",
    ) -> None:
        """weights: what `read_weights` reads; tokenizer: a tokenizer.json; shape: tokens and width the model reads."""
        self.weights, self.tokenizer, self.store = weights, tokenizer, store
        self.shape, self.dtype, self.device = shape, dtype, device
        self._encoder: Any = None
        self._stays = False
        self._told: set[str] = set()

    def __call__(self, prompt: str) -> Tensor:
        """prompt -> [1, T, text_dim]; rows beyond the prompt are zero. Raises what `load_encoder` raises."""
        text = clean(prompt)
        ids = self._tokenise(text)
        if len(ids) > self.shape[0]:
            self._warn(text, len(ids) - self.shape[0])
            ids = [*ids[: self.shape[0] - 1], END]
        key = self._key(text)
        rows = self.store.get(key)
        if rows is None:
            rows = self._encode(ids)
            self.store.put(key, rows)
        return F.pad(rows, (0, 0, 0, self.shape[0] - len(rows)))[None].to(self.device)

    def encode_all(self, prompts: Iterable[str]) -> None:
        """Encodes what the store does not have yet, then lets go of the encoder, unless it is to stay."""
        try:
            for prompt in prompts:
                self(prompt)
        finally:
            if not self._stays:
                self.release()

    def stay(self, stays: bool) -> None:
        """From now on keeps the encoder in memory, once it is loaded, or lets go of it after `encode_all`."""
        self._stays = stays

    def release(self) -> None:
        """Frees the encoder's memory."""
        if self._encoder is not None:
            self._encoder = None
            gc.collect()
            if torch.device(self.device).type == "cuda":
                torch.cuda.empty_cache()

    def reads(self, prompt: str) -> str:
        """The prompt as it is encoded: cleaned, and without what is cut."""
        text = clean(prompt)
        offsets = self._tokens.encode(text).offsets
        return text if len(offsets) <= self.shape[0] else text[: offsets[self.shape[0] - 2][1]]

    def _warn(self, text: str, cut: int) -> None:
        if text not in self._told:
            self._told.add(text)
            read = f"the model reads {self.shape[0]} tokens of a prompt"
            log.warning("%s; the last %d of %r were cut", read, cut, text[:60])

    def _tokenise(self, text: str) -> list[int]:
        ids = self._tokens.encode(text).ids
        if not ids or ids[-1] != END:
            raise DataError(f"{self.tokenizer} ends no text with token {END}", "use the tokenizer of google/umt5-xxl")
        return ids

    def _encode(self, ids: list[int]) -> Tensor:
        """Token numbers -> [n, text_dim] on the CPU."""
        if self._encoder is None:
            self._encoder = load_encoder(self.weights, self.dtype, self.device)
        rows = embed(self._encoder, torch.tensor(ids)).cpu().contiguous()
        if rows.shape[1] != self.shape[1]:
            message = f"{self.weights} makes text vectors of {rows.shape[1]} values, the model reads {self.shape[1]}"
            raise CheckpointError(message, "use the umT5-XXL encoder of Wan2.1")
        return rows

    def _key(self, text: str) -> str:
        """Everything an embedding depends on, as a name for it."""
        facts = [text, self._fingerprint, self._tokenizer_hash, str(self.dtype), self.shape[0]]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @cached_property
    def _fingerprint(self) -> str:
        return file_fingerprint(self.weights)

    @cached_property
    def _tokenizer_hash(self) -> str:
        return hashlib.sha256(read_document(self.tokenizer, LARGEST_TOKENIZER)).hexdigest()

    @cached_property
    def _tokens(self) -> Any:
        """The tokenizer as its file describes it; transformers 5 would build another, without falling back to bytes."""
        data = read_document(self.tokenizer, LARGEST_TOKENIZER)
        try:
            tokens = optional("tokenizers", "wan").Tokenizer.from_buffer(data)
        except ValueError as error:
            raise DataError(f"{self.tokenizer} is no tokenizer: {error}", "download it again") from error
        tokens.no_padding()
        tokens.no_truncation()
        return tokens


def clean(prompt: str) -> str:
    """Broken Unicode mended, HTML unescaped twice, white space collapsed: as the prompts were in training."""
    mended = optional("ftfy", "wan").fix_text(prompt)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(mended))).strip()


@torch.no_grad()
def embed(encoder: Any, ids: Tensor) -> Tensor:
    """Token numbers [n] of one text -> [n, dim]. Without padding there is nothing to mask."""
    return encoder(ids[None].to(encoder.device)).last_hidden_state[0]


def load_encoder(weights: Path, dtype: torch.dtype, device: str) -> Any:
    """A transformers.UMT5EncoderModel from a file with its own names or those of the Wan2.1 release.

    It runs on the device if that has the room, else on the CPU. Sizes are read off the tensors. Where the file has the
    wanted precision, its tensors are used as they are mapped.
    Raises CheckpointError when they are not those of such an encoder, UnavailableError without transformers.
    """
    state = rename(read_weights(weights))
    transformers = optional("transformers", "wan")
    config = transformers.UMT5Config(**_sizes(state, weights))
    with torch.device("meta"):
        encoder = transformers.UMT5EncoderModel(config)
    load_strictly(encoder, {name: value.to(dtype) for name, value in state.items()}, str(weights))
    encoder.tie_weights()
    place = choose_place(device, sum(value.nbytes for value in encoder.parameters()))
    log.info("the text encoder %s runs on %s", weights, place)
    return encoder.to(place).eval().requires_grad_(False)


def encoder_needs(path: Path, dtype: torch.dtype, tokens: int) -> tuple[int, int]:
    """Bytes of the encoder in a file as `load_encoder` holds it in `dtype`, and what encoding so many tokens adds.

    Only headers are read. Raises CheckpointError when it is no such encoder.
    """
    state = rename(read_weights(path).entries)
    sizes = _sizes(state, path)
    values = sum(torch.Size(entry.shape).numel() for name, entry in state.items() if name != TIED)
    # Scores with their float32 copy and the bias of positions, and the widest tensors of a layer.
    scores = sizes["num_heads"] * tokens**2 * (3 * dtype.itemsize + 8)
    return values * dtype.itemsize, scores + tokens * dtype.itemsize * (8 * sizes["d_model"] + 4 * sizes["d_ff"])


def _sizes(state: Mapping[str, Any], path: Path) -> dict[str, int]:
    try:
        return encoder_sizes(state)
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path} holds no umT5 encoder (its sizes cannot be told: {error})") from error


def rename(state: Mapping[str, T]) -> dict[str, T]:
    """The tensors under transformers' names, and the embedding under both it has there."""
    renamed = {_rename(name): value for name, value in state.items()}
    for name, other in ((EMBEDDED, TIED), (TIED, EMBEDDED)):
        if other in renamed:
            renamed.setdefault(name, renamed[other])
    return renamed


def _rename(name: str) -> str:
    for pattern, replacement in RELEASED_NAMES:
        new, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return new
    return name


def encoder_sizes(state: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of an umT5 encoder, as transformers names them. Raises KeyError for a tensor that is missing."""
    attention = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = state[f"{attention}.relative_attention_bias.weight"].shape
    vocabulary, width = state[EMBEDDED].shape
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": state[f"{attention}.q.weight"].shape[0] // heads,
        "d_ff": state["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0],
        "num_layers": 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.block.")),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def choose_place(device: str, needed: int) -> str:
    """The device, unless it is a GPU without the room for an encoder of so many bytes: then the CPU."""
    if torch.device(device).type != "cuda" or torch.cuda.mem_get_info(device)[0] > ROOM * needed:
        return device
    return "cpu"


def file_fingerprint(path: Path) -> str:
    """SHA-256 over size, start, end and evenly spaced blocks of a file, or of all files beside an index.

    It takes milliseconds where reading all of an 11 GB file takes most of a minute. Raises InputError.
    """
    digest = hashlib.sha256()
    files = sorted(path.parent.glob("*.safetensors")) if path.name.endswith(INDEX) else [path]
    try:
        for file in files:
            size = file.stat().st_size
            digest.update(size.to_bytes(8, "little"))
            with file.open("rb") as opened:
                for place in range(SAMPLES):
                    opened.seek(max(0, size - BLOCK) * place // (SAMPLES - 1))
                    digest.update(opened.read(BLOCK))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}", "check the path") from error
    return digest.hexdigest()
