"""Codec laws: a stream in pieces is the whole, and every latent frame but the first stands for four."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests import builders
from tests.builders import close
from torch import Tensor

from hforce.errors import CheckpointError, InputError
from hforce.models.taehv import TAEHV, TAEW, Bound, MemBlock, Memory, TaehvConfig, TGrow, TPool, find_taew, load_taew
from hforce.models.tiny import CODEC

RECORDED = load_file(Path(__file__).parent.parent / "data" / "golden" / "taehv_tiny.safetensors")
RELEASED = {name.removeprefix("w."): value for name, value in RECORDED.items() if name.startswith("w.")}
CONFIGS = {
    "wan": TaehvConfig(4, 6, (8, 6, 6, 4)),
    "folded": TaehvConfig(4, 6, (8, 6, 6, 4), space_down=(1, 2, 1), space_up=(2, 1, 1), patch=2),
    "tiny": CODEC,
}
SCALE = {"wan": 8, "folded": 4, "tiny": 8}  # pixels per latent cell


def draw(*shape: int, seed: int = 0) -> Tensor:
    return builders.draw(*shape, seed=seed).double()


@cache
def codec_of(name: str) -> TAEHV:
    """A codec of random weights in float64."""
    codec = TAEHV(CONFIGS[name]).double().requires_grad_(False)
    for weight in codec.parameters():
        weight.copy_(draw(*weight.shape) * weight[0].numel() ** -0.5)
    return codec


def video(frames: int, pixels: int = 16, seed: int = 0) -> Tensor:
    return draw(1, frames, 3, pixels, pixels, seed=seed).sigmoid()


@pytest.mark.parametrize("name", CONFIGS)
@given(pieces=st.lists(st.integers(1, 4), min_size=1, max_size=5))
@settings(max_examples=8, deadline=None)
def test_decoding_in_pieces_is_decoding_at_once(name: str, pieces: Sequence[int]) -> None:
    codec = codec_of(name)
    latents = draw(1, sum(pieces), codec.config.latent_channels, 2, 2)
    whole, _ = codec.decode_stream(latents, None)
    memory: Memory | None = None
    parts = []
    for number, part in enumerate(latents.split(list(pieces), dim=1)):
        made, memory = codec.decode_stream(part, memory)
        assert made.shape[1] == 4 * pieces[number] - (0 if number else 3)
        parts.append(made)
    close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("name", CONFIGS)
@given(pieces=st.lists(st.integers(1, 3), min_size=1, max_size=4))
@settings(max_examples=8, deadline=None)
def test_encoding_in_pieces_is_encoding_at_once(name: str, pieces: Sequence[int]) -> None:
    codec, memory, parts = codec_of(name), None, []
    clip = video(4 * sum(pieces))
    for piece in clip.split([4 * n for n in pieces], dim=1):
        latents, memory = codec.encode_stream(piece, memory)
        parts.append(latents)
    close(torch.cat(parts, dim=1), codec.encode(clip))


@pytest.mark.parametrize("name", CONFIGS)
def test_n_latents_are_4_n_minus_3_frames_and_back(name: str) -> None:
    codec = codec_of(name)
    for n in (1, 2, 5):
        latents = draw(2, n, codec.config.latent_channels, 2, 2)
        frames, _ = codec.decode_stream(latents, None)
        assert frames.shape == (2, 4 * (n - 1) + 1, 3, 2 * SCALE[name], 2 * SCALE[name])
        assert codec.encode_clip(frames).shape == latents.shape
        assert codec.decode_raw(latents)[0].shape[1] == 4 * n


@pytest.mark.parametrize("pixels", [64, 128])
def test_the_tiny_codec_halves_thrice_in_space_whatever_the_size(pixels: int) -> None:
    codec = codec_of("tiny")
    latents = codec.encode_clip(video(9, pixels))
    assert latents.shape == (1, 3, 12, pixels // 8, pixels // 8)
    assert codec.decode_stream(latents, None)[0].shape == (1, 9, 3, pixels, pixels)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_first_frame_alone_is_the_first_latent(name: str) -> None:
    """It stands for four of itself, and nothing that comes later changes it."""
    codec, clip = codec_of(name), video(9)
    close(codec.encode_clip(clip)[:, :1], codec.encode_clip(clip[:, :1]))
    close(codec.encode_clip(clip[:, :1]), codec.encode(clip[:, :1].expand(-1, 4, -1, -1, -1)))
    later = torch.cat([clip[:, :5], video(4, seed=1)], dim=1)
    close(codec.encode_clip(later)[:, :2], codec.encode_clip(clip)[:, :2])
    assert not torch.equal(codec.encode_clip(later)[:, 2], codec.encode_clip(clip)[:, 2])


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (4, 1), (5, 2), (7, 2), (8, 2)])
def test_a_rest_of_frames_is_filled_with_the_last(frames: int, latents: int) -> None:
    codec, clip = codec_of("wan"), video(frames)
    missing = 4 * latents - frames
    encoded = codec.encode(clip)
    assert encoded.shape[1] == latents
    close(encoded, codec.encode(torch.cat([clip, clip[:, -1:].repeat(1, missing, 1, 1, 1)], dim=1)), 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_looks_back_and_never_ahead(name: str) -> None:
    codec = codec_of(name)
    latents = draw(1, 4, codec.config.latent_channels, 2, 2)
    changed = latents.clone()
    changed[:, 2:] += 1
    before, after = codec.decode_raw(latents)[0], codec.decode_raw(changed)[0]
    close(after[:, :8], before[:, :8], 1e-6)
    assert not torch.equal(after[:, 8:], before[:, 8:])
    changed = latents.clone()
    changed[:, 0] += 1
    assert not torch.equal(codec.decode_raw(changed)[0][:, 4:8], before[:, 4:8])


def test_frames_are_in_0_to_1_and_raw_ones_need_not_be() -> None:
    codec, latents = codec_of("wan"), 5 * draw(1, 3, 4, 2, 2)
    frames, raw = codec.decode_stream(latents, None)[0], codec.decode_raw(latents)[0]
    assert float(frames.min()) >= 0 and float(frames.max()) <= 1
    assert float(raw.min()) < 0 or float(raw.max()) > 1
    close(frames, raw[:, 3:].clamp(0, 1), 0)


def test_a_memory_block_sees_its_own_input_one_step_ago_and_zeros_at_first() -> None:
    block, x = MemBlock(4).double().requires_grad_(False), draw(2, 3, 5, 6, 4)
    out, last = block(x, None)
    for step in range(3):
        past = x[:, step - 1] if step else torch.zeros_like(x[:, 0])
        joined = torch.cat([x[:, step], past], dim=3)
        alone = torch.relu(block.conv(joined.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) + x[:, step])
        close(out[:, step], alone)
    close(last, x[:, -1], 0)


def test_growing_and_pooling_keep_the_order_of_frames() -> None:
    """With weights that number the frames of a latent, and two channels that must stay apart."""
    grow, pool = (layer(2, 3).double().requires_grad_(False) for layer in (TGrow, TPool))
    x, factor = draw(1, 2, 1, 1, 2), torch.tensor([1.0, 10.0, 100.0]).double()
    frame_by_frame = torch.kron(factor, torch.eye(2, dtype=torch.float64))  # [2, 6]: frame, then channel
    grow.conv.weight.copy_(frame_by_frame.reshape(2, 3, 2).permute(1, 2, 0).reshape(6, 2, 1, 1))
    pool.conv.weight.copy_(frame_by_frame[..., None, None])
    grown = grow(x)
    close(grown, torch.stack([f * x[:, i] for i in range(2) for f in factor], dim=1))
    close(pool(grown), 10101 * x, 1e-9)


def test_latents_are_bounded_softly_by_three() -> None:
    close(Bound()(torch.tensor([0.0, 0.01, 1e6, -1e6])), torch.tensor([0.0, 0.01, 3.0, -3.0]), 1e-6)


# Files


def saved(path: Path, state: dict[str, Tensor]) -> Path:
    if path.suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    return path


@pytest.mark.parametrize("name", ["taew2_1.pth", "taew2_1.safetensors"])
def test_a_released_file_gives_the_recorded_pictures(tmp_path, name):
    codec = load_taew(saved(tmp_path / name, RELEASED))
    assert codec.stride == 4
    latents, decoder = RECORDED["in.latents"][:1], codec.decoder()
    parts = [decoder(part) for part in latents.split([3, 2], dim=1)]
    assert [len(part) for part in parts] == [9, 8]
    close(torch.cat(parts), RECORDED["out.video"][0], 1e-4)
    video = RECORDED["in.video"]
    expected = codec.net.encode(torch.cat([video[:, :1].repeat(1, 3, 1, 1, 1), video], dim=1))
    close(codec.encode(video), expected)


def test_of_kernels_that_grow_too_many_frames_the_last_are_kept(tmp_path):
    name = "decoder.7.conv.weight"
    large = torch.cat([torch.full_like(RELEASED[name], 9.0), RELEASED[name]])
    codec = load_taew(saved(tmp_path / "old.pth", {**RELEASED, name: large}))
    close(codec.net.state_dict()[name], RELEASED[name], 0)


def test_half_precision_is_near_float32(tmp_path):
    codec = load_taew(saved(tmp_path / "t.safetensors", RELEASED), torch.bfloat16)
    frames = codec.decoder()(RECORDED["in.latents"][:1])
    assert frames.dtype == codec.encode(RECORDED["in.video"]).dtype == torch.float32
    assert float((frames - RECORDED["out.video"][0]).abs().max()) < 0.05


@pytest.mark.parametrize(("change", "told"), [
    ({"decoder.22.bias": None}, r"1 missing \(decoder.22.bias\)"),
    ({"decoder.1.weight": None}, "holds no TAEHV"),
    ({"decoder.1.weight": torch.zeros(12, 48, 3, 3)}, "48 channels"),
    ({"decoder.23.bias": torch.zeros(3)}, r"1 unexpected \(decoder.23.bias\)"),
])  # fmt: skip
def test_other_files_are_refused(tmp_path, change, told):
    state = {name: value for name, value in {**RELEASED, **change}.items() if value is not None}
    with pytest.raises(CheckpointError, match=told):
        load_taew(saved(tmp_path / "t.pth", state))


@pytest.mark.parametrize("name", TAEW)
def test_the_tiny_autoencoder_is_found_in_a_release(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    saved(tmp_path / name, RELEASED)
    assert find_taew(tmp_path) == tmp_path / name


def test_a_release_without_a_tiny_autoencoder_tells_where_it_was_looked_for(tmp_path):
    with pytest.raises(InputError) as caught:
        find_taew(tmp_path)
    assert [name for name in (str(tmp_path), *TAEW) if name not in str(caught.value)] == []
    assert "madebyollin/taehv" in caught.value.mend


def test_another_autoencoder_of_that_name_is_not_taken_for_it(tmp_path):
    saved(tmp_path / "taew2_1.pth", {"encoder.conv1.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"taew2_1.pth holds no TAEHV: it has no tensor encoder.0.weight"):
        find_taew(tmp_path)
