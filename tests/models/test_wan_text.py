"""Prompts become what transformers' umT5 makes of them, from every format; each is encoded once."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.builders import close
from torch import Tensor

from hforce.errors import CheckpointError, DataError, InputError
from hforce.models import wan_text
from hforce.models.text_store import EmbeddingStore
from hforce.models.wan_text import WanText, clean, embed, file_fingerprint, load_encoder

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
import transformers
from tests.wanparts import random_text_encoder, released_text, write_tokenizer

GOLDEN = Path(__file__).parent.parent / "data" / "golden" / "umt5_tiny.safetensors"
LENGTH, WIDTH = 24, 32
PROMPT = "a small red fox runs"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny release: the encoder in every format, and a tokenizer."""
    folder = tmp_path_factory.mktemp("release")
    write_tokenizer(folder / "tokenizer")
    encoder = random_text_encoder(WIDTH)
    encoder.save_pretrained(folder / "text_encoder")
    encoder.save_pretrained(folder / "sharded", max_shard_size="20KB")
    torch.save(released_text(encoder), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    return folder


def files_of(release: Path) -> dict[str, Path]:
    return {
        "single": release / "text_encoder" / "model.safetensors",
        "shards": release / "sharded" / "model.safetensors.index.json",
        "pth": release / "models_t5_umt5-xxl-enc-bf16.pth",
    }


def encoder_of(release: Path, folder: Path, kind: str = "pth", dtype: torch.dtype = torch.float32) -> WanText:
    tokenizer = release / "tokenizer" / "tokenizer.json"
    return WanText(files_of(release)[kind], tokenizer, EmbeddingStore(folder), (LENGTH, WIDTH), dtype)


def reference(release: Path, text: str) -> Tensor:
    """transformers' tokenizer and encoder on a text padded to full length, with the padding's rows set to zero."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(release / "tokenizer", local_files_only=True)
    encoder = transformers.UMT5EncoderModel.from_pretrained(release / "text_encoder", local_files_only=True).eval()
    read = tokenizer(text, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    with torch.no_grad():
        rows = encoder(read.input_ids, attention_mask=read.attention_mask).last_hidden_state
    return rows * read.attention_mask[..., None]


@pytest.mark.parametrize("text", [PROMPT, "", "the quick brown fox is jumping over the lazy dog again"])
@pytest.mark.parametrize("kind", ["single", "shards", "pth"])
def test_every_format_encodes_as_transformers_does(release, tmp_path, kind, text):
    made, expected = encoder_of(release, tmp_path, kind)(text), reference(release, text)
    assert made.shape == (1, LENGTH, WIDTH)
    close(made, expected, 1e-4)
    assert made.eq(0).all(-1).equal(expected.eq(0).all(-1))


def test_the_recorded_encoder_of_the_reference_is_reproduced(tmp_path):
    recorded = load_file(GOLDEN)
    torch.save({name[2:]: value for name, value in recorded.items() if name.startswith("w.")}, tmp_path / "t5.pth")
    encoder = load_encoder(tmp_path / "t5.pth", torch.float32, "cpu")
    for ids, mask, expected in zip(recorded["in.ids"], recorded["in.mask"], recorded["out.context"], strict=True):
        rows = embed(encoder, ids[: int(mask.sum())])
        close(rows, expected[: len(rows)], 1e-4)
        assert not expected[len(rows) :].any()


def test_bf16_is_near_float32_and_weights_are_in_memory_once(release, tmp_path):
    text = encoder_of(release, tmp_path, dtype=torch.bfloat16)
    made, expected = text(PROMPT), reference(release, PROMPT)
    assert made.dtype == torch.bfloat16
    assert float((made.float() - expected).abs().max()) < 0.05 * float(expected.abs().max())
    encoder = load_encoder(files_of(release)["pth"], torch.bfloat16, "cpu")
    assert {weight.dtype for weight in encoder.parameters()} == {torch.bfloat16}
    assert encoder.shared.weight.data_ptr() == encoder.encoder.embed_tokens.weight.data_ptr()


# Reading


@pytest.mark.parametrize(("prompt", "text"), [
    ("  a \t fox\n\nruns ", "a fox runs"),
    ("salt &amp;amp; &lt;pepper&gt;", "salt & <pepper>"),
    ("donâ€™t", "don't"),
    ("cafeÌ\u0081", "café"),
    ("a&nbsp;fox", "a fox"),
    ("", ""),
])  # fmt: skip
def test_prompts_are_cleaned_as_in_training(prompt, text):
    assert clean(prompt) == text


def test_a_long_prompt_is_cut_with_the_end_token_and_told_of_once(release, tmp_path, caplog):
    text, prompt = encoder_of(release, tmp_path), " ".join("abcdefghijklmnopqrstuvwxyz") + " fox"
    ids = text._tokens.encode(clean(prompt)).ids
    with caplog.at_level(logging.WARNING):
        text(prompt)
        text(prompt)
        text(PROMPT)
    [message] = caplog.messages
    assert f"reads {LENGTH} tokens" in message and f"the last {len(ids) - LENGTH} of" in message
    read = text.reads(prompt)
    assert prompt.startswith(read)
    assert text._tokens.encode(read).ids == [*ids[: LENGTH - 1], 1]
    close(text(prompt), reference(release, prompt), 1e-4)
    assert text.reads("  a &amp; b ") == "a & b"


# Keeping


def test_what_was_encoded_once_needs_no_encoder(release, tmp_path, monkeypatch):
    first = encoder_of(release, tmp_path)
    first.encode_all([PROMPT, "fox", PROMPT])
    assert first._encoder is None
    assert len(list(tmp_path.iterdir())) == 2
    made = [first(PROMPT), first("fox")]
    monkeypatch.setattr(wan_text, "load_encoder", None)
    again = encoder_of(release, tmp_path)
    again.encode_all([f"  {PROMPT}", "fox"])
    assert again("fox").equal(made[1]) and again(PROMPT).equal(made[0])
    with pytest.raises(TypeError, match="not callable"):
        again("another")


def test_the_encoder_stays_as_long_as_it_is_asked_to(release, tmp_path):
    text, held = encoder_of(release, tmp_path), []
    for number, stays in enumerate((False, True, False)):
        text.stay(stays)
        text.encode_all([f"{PROMPT} {number}"])
        held.append(text._encoder is not None)
    assert held == [False, True, False]


def test_an_embedding_is_kept_for_one_text_encoder_tokenizer_and_precision(release, tmp_path):
    encoder_of(release, tmp_path)(PROMPT)
    other = encoder_of(release, tmp_path)
    other.tokenizer = changed_tokenizer(release, tmp_path)
    others = [encoder_of(release, tmp_path, kind="single"), encoder_of(release, tmp_path, dtype=torch.bfloat16), other]
    for text in others:
        before = len(list(tmp_path.glob("*.safetensors")))
        text(PROMPT)
        assert len(list(tmp_path.glob("*.safetensors"))) == before + 1


def changed_tokenizer(release: Path, folder: Path) -> Path:
    (folder / "t").mkdir()
    path = folder / "t" / "tokenizer.json"
    path.write_text((release / "tokenizer" / "tokenizer.json").read_text() + "\n")
    return path


@pytest.mark.parametrize("damage", [
    lambda data: data[: len(data) // 2],
    lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
    lambda data: b"",
    lambda data: data.replace(b"hforce.text/1", b"hforce.text/9"),
], ids=["cut", "flipped", "empty", "foreign"])  # fmt: skip
def test_a_damaged_embedding_is_made_again(release, tmp_path, caplog, damage):
    made = encoder_of(release, tmp_path)(PROMPT)
    [path] = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert encoder_of(release, tmp_path)(PROMPT).equal(made)
    assert "is damaged" in caplog.text
    kept = EmbeddingStore(tmp_path).get(path.stem)
    assert kept is not None and kept.equal(made[0, : len(kept)])


def test_where_nothing_can_be_written_embeddings_are_kept_in_memory(release, tmp_path, caplog, monkeypatch):
    (tmp_path / "file").write_text("")
    text = encoder_of(release, tmp_path / "file")
    with caplog.at_level(logging.WARNING):
        text.encode_all([PROMPT])
    assert "kept for this run alone" in caplog.text
    monkeypatch.setattr(wan_text, "load_encoder", None)
    close(text(PROMPT), reference(release, PROMPT), 1e-4)


def test_a_write_that_fails_leaves_no_draft(release, tmp_path, monkeypatch):
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    encoder_of(release, tmp_path)(PROMPT)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_known_by_what_is_in_it(release, tmp_path):
    path, other = files_of(release)["pth"], tmp_path / "other.pth"
    other.write_bytes(path.read_bytes())
    assert file_fingerprint(other) == file_fingerprint(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    other.write_bytes(data)
    assert file_fingerprint(other) != file_fingerprint(path)
    assert file_fingerprint(files_of(release)["shards"]) != file_fingerprint(files_of(release)["single"])


# Refusing


def test_encoders_of_other_shapes_are_refused(release, tmp_path):
    text = WanText(
        files_of(release)["pth"], release / "tokenizer" / "tokenizer.json", EmbeddingStore(tmp_path), (LENGTH, 4096)
    )
    with pytest.raises(CheckpointError, match="makes text vectors of 32 values, the model reads 4096"):
        text(PROMPT)
    state = torch.load(files_of(release)["pth"])
    del state["blocks.1.ffn.fc1.weight"]
    torch.save(state, tmp_path / "lacking.pth")
    with pytest.raises(CheckpointError, match=r"1 missing \(encoder.block.1.layer.1.DenseReluDense.wi_1.weight\)"):
        load_encoder(tmp_path / "lacking.pth", torch.float32, "cpu")
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="holds no umT5 encoder"):
        load_encoder(tmp_path / "a.safetensors", torch.float32, "cpu")


def test_a_tokenizer_that_does_not_end_texts_is_refused(release, tmp_path):
    settings = json.loads((release / "tokenizer" / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**settings, "post_processor": None}))
    text = WanText(files_of(release)["pth"], tmp_path / "tokenizer.json", EmbeddingStore(tmp_path), (LENGTH, WIDTH))
    with pytest.raises(DataError, match="ends no text"):
        text(PROMPT)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    text = WanText(files_of(release)["pth"], tmp_path / "tokenizer.json", EmbeddingStore(tmp_path), (LENGTH, WIDTH))
    with pytest.raises(DataError, match="is no tokenizer"):
        text(PROMPT)


@pytest.mark.parametrize("lost", ["weights", "tokenizer"])
def test_a_file_that_is_gone_is_no_input(release, tmp_path, lost):
    text = encoder_of(release, tmp_path)
    setattr(text, lost, tmp_path / "gone")
    with pytest.raises(InputError, match=r"cannot read .*gone"):
        text(PROMPT)


def run_alone(program: str, folder: Path) -> list[str]:
    """Runs a program that prints a JSON list last, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


HEAVY = "import json, sys; print(json.dumps([m for m in ('transformers', 'diffusers') if m in sys.modules]))"


def test_the_tiny_model_needs_neither_transformers_nor_diffusers(weights, heads, tmp_path):
    arguments = ["hforce", "generate", "--prompt", "a red circle", "-m", str(weights), "--profile", str(heads)]
    arguments += ["-d", "1s", "--upscale", "1", "--set", "sample.steps=[1000]", "-o", "v.mp4"]
    program = f"import sys; sys.argv = {arguments!r}\nfrom hforce import cli\nassert cli._run() == 0\n{HEAVY}"
    assert run_alone(program, tmp_path) == []
    assert (tmp_path / "v.mp4").is_file()


def test_kept_prompts_are_had_without_transformers(release, tmp_path):
    encoder_of(release, tmp_path)(PROMPT)
    program = f"""
from pathlib import Path
import torch
from hforce.models.text_store import EmbeddingStore
from hforce.models.wan_text import WanText
files = Path({str(files_of(release)["pth"])!r}), Path({str(release / "tokenizer" / "tokenizer.json")!r})
text = WanText(*files, EmbeddingStore(Path({str(tmp_path)!r})), {(LENGTH, WIDTH)}, torch.float32)
assert text({PROMPT!r}).any()
{HEAVY}"""
    assert run_alone(program, tmp_path) == []
