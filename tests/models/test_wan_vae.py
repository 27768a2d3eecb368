"""The autoencoder of Wan2.1 in pieces is diffusers' in one, from every format."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.builders import close, draw
from torch import Tensor

from hforce.errors import CheckpointError, DataError
from hforce.models.wan_vae import MEAN, STD, WanCodec, codec_needs, load_wan_codec
from hforce.weigh import weigh

pytest.importorskip("diffusers")
from diffusers import AutoencoderKLWan
from tests.wanparts import random_vae, released_vae


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    return random_vae()


@pytest.fixture(scope="module")
def files(vae: AutoencoderKLWan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder / "vae")
    torch.save(released_vae(vae), folder / "Wan2.1_VAE.pth")
    save_file(released_vae(vae), folder / "Wan2.1_VAE.safetensors")
    return {
        "folder": folder / "vae" / "diffusion_pytorch_model.safetensors",
        "pth": folder / "Wan2.1_VAE.pth",
        "safetensors": folder / "Wan2.1_VAE.safetensors",
    }


def clip(frames: int, batch: int = 1) -> Tensor:
    return draw(batch, frames, 3, 16, 24).sigmoid()


def scale(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latents, [C, 1, 1]."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (vae.config.latents_mean, vae.config.latents_std))
    return mean, std


def whole_decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Normalised latents [1, n, C, h, w] -> [T, 3, H, W] in 0..1 by diffusers, all at once."""
    mean, std = scale(vae)
    return (vae.decode((latents * std + mean).transpose(1, 2)).sample[0].transpose(0, 1) + 1) / 2


@pytest.mark.parametrize("kind", ["folder", "pth", "safetensors"])
def test_every_format_decodes_and_encodes_as_diffusers_does(files, vae, kind):
    codec, latents, video = load_wan_codec(files[kind], torch.float32, "cpu"), draw(1, 4, 16, 2, 3), clip(9, batch=2)
    frames = codec.decoder()(latents)
    assert (frames.shape, codec.stride) == ((13, 3, 16, 24), 4)
    assert float(frames.std()) > 0.1
    close(frames, whole_decode(vae, latents), 1e-4)
    mean, std = scale(vae)
    expected = vae.encode(2 * video.transpose(1, 2) - 1).latent_dist.mode().transpose(1, 2)
    assert float(expected.std(dim=1).mean()) > 0.01
    close(codec.encode(video), (expected - mean) / std, 1e-4)


@pytest.mark.parametrize("pieces", [(4,), (1, 1, 1, 1), (3, 1), (1, 2, 1)])
def test_a_video_in_pieces_is_the_video_at_once(vae, pieces):
    latents, decoder = draw(1, 4, 16, 2, 3), WanCodec(deepcopy(vae)).decoder()
    parts = [decoder(part) for part in latents.split(list(pieces), dim=1)]
    assert [len(part) for part in parts] == [4 * n - (0 if i else 3) for i, n in enumerate(pieces)]
    close(torch.cat(parts), whole_decode(vae, latents), 1e-5)


def test_memory_does_not_grow_with_the_video_and_streams_do_not_mix(vae):
    codec, latents = WanCodec(deepcopy(vae)), draw(1, 12, 16, 2, 3)
    one, other = codec.decoder(), codec.decoder()

    def held() -> int:
        return sum(value.untyped_storage().nbytes() for value in one.memory if isinstance(value, Tensor))

    first = one(latents[:, :3])
    after_3 = held()
    close(other(latents[:, :3]), first, 0)
    one(latents[:, 3:])
    assert held() == after_3 > 0
    assert sum(value is None for value in one.memory) == 1  # 33 convolutions, one of which has no past
    close(codec.decoder()(latents[:, :3]), first, 0)


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_takes_what_was_planned(files, dtype, chunk):
    codec, latents = load_wan_codec(files["folder"], dtype, "cpu"), draw(1, chunk, 16, 4, 6)
    decoder = codec.decoder()
    decoder(latents)
    decoder(latents)
    found = weigh(lambda: decoder(latents), torch.device("cpu"))
    held, work = codec_needs(files["folder"], (4, 6), dtype, torch.device("cpu"))[1](chunk)
    assert found is not None and held == sum(value.nbytes for value in decoder.memory if isinstance(value, Tensor))
    # What is remembered is replaced piece by piece; the weigher sees the new ones alone.
    assert 0.9 <= (held + work) / found.peak <= 1.1


def test_bf16_is_near_float32(files, vae):
    codec, latents, video = load_wan_codec(files["pth"], torch.bfloat16, "cpu"), draw(1, 3, 16, 2, 3), clip(9)
    assert {weight.dtype for weight in codec.net.parameters()} == {torch.bfloat16}
    frames, encoded = codec.decoder()(latents), codec.encode(video)
    assert frames.dtype == encoded.dtype == torch.float32
    off = (frames - whole_decode(vae, latents)).abs()
    assert float(off.max()) < 0.1 and float(off.mean()) < 0.01
    off = (encoded - WanCodec(deepcopy(vae)).encode(video)).abs()
    assert float(off.max()) < 0.05


def test_latents_are_normalised_with_the_numbers_of_the_release(vae):
    assert (list(MEAN), list(STD)) == (list(vae.config.latents_mean), list(vae.config.latents_std))


@pytest.mark.parametrize(("frames", "nearest"), [(0, "give 1 or 5"), (4, "give 1 or 5"), (8, "give 5 or 9")])
def test_frames_that_fill_no_latent_frame_are_refused(vae, frames, nearest):
    with pytest.raises(DataError, match=f"{frames} video frames do not fill") as caught:
        WanCodec(deepcopy(vae)).encode(clip(frames))
    assert caught.value.mend == nearest


def test_other_autoencoders_are_refused(tmp_path, vae):
    state = vae.state_dict()
    path = tmp_path / "v.safetensors"
    save_file({**state, "post_quant_conv.weight": torch.zeros(48, 48, 1, 1, 1)}, path)
    with pytest.raises(CheckpointError, match="48 channels") as caught:
        load_wan_codec(path, torch.float32, "cpu")
    assert "Wan2.2" in caught.value.mend
    save_file({"decoder.1.weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"no autoencoder of Wan2.1: 'post_quant_conv.weight' is missing"):
        load_wan_codec(path, torch.float32, "cpu")
    del state["decoder.norm_out.gamma"]
    save_file(state, path)
    with pytest.raises(CheckpointError, match=r"1 missing \(decoder.norm_out.gamma\)"):
        load_wan_codec(path, torch.float32, "cpu")
