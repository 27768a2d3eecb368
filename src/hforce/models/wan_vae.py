"""The autoencoder of Wan2.1 (diffusers' AutoencoderKLWan), driven one latent frame at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hforce.errors import CheckpointError, DataError
from hforce.extras import optional
from hforce.models.wan_files import read_weights
from hforce.models.weights import load_strictly

CHANNELS = 16  # of a latent
STRIDE = 4  # video frames per latent frame
MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

Features = list[Any]
"""What a stream remembers: for every convolution in time the last two frames it was given (or that it saw one)."""


class WanCodec:
    """AutoencoderKLWan between video and normalised latents."""

    name, stride, channels = "wan-vae", STRIDE, CHANNELS

    def __init__(self, net: Any) -> None:
        self.net = net
        self.mean, self.std = (torch.tensor(x, device=self.device)[:, None, None] for x in (MEAN, STD))

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.net.post_quant_conv.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """In what it computes."""
        return self.net.post_quant_conv.weight.dtype

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """video [B, T, 3, H, W] in 0..1 -> latents [B, n, C, h, w]. Raises DataError unless T = 4 (n - 1) + 1."""
        frames = video.shape[1]
        if frames % STRIDE != 1:
            below = max(0, frames - 1) // STRIDE * STRIDE + 1
            message = f"{frames} video frames do not fill latent frames of {STRIDE}, the first of which takes one"
            raise DataError(message, f"give {below} or {below + STRIDE}")
        features = fresh(self.net.encoder)
        parts = video.split([1] + [STRIDE] * (frames // STRIDE), dim=1)
        return torch.cat([self._encode(part, features) for part in parts], dim=1)

    def _encode(self, part: Tensor, features: Features) -> Tensor:
        """The video frames of one latent frame, [B, 1 or 4, 3, H, W] -> [B, 1, C, h, w]."""
        x = (2 * part.to(self.device, self.dtype) - 1).transpose(1, 2)
        moments = self.net.quant_conv(self.net.encoder(x, feat_cache=features, feat_idx=[0]))
        return (moments[:, :CHANNELS].transpose(1, 2).float() - self.mean) / self.std

    def decoder(self) -> WanDecoder:
        """A decoder for a new video."""
        return WanDecoder(self)


class WanDecoder:
    """Decodes one video, latent frame by latent frame, equal to decoding it whole: its memory does not grow with it."""

    def __init__(self, codec: WanCodec) -> None:
        self._codec = codec
        self._is_first = True
        self.features = fresh(codec.net.decoder)

    @torch.inference_mode()
    def __call__(self, latents: Tensor) -> Tensor:
        """latents [1, F, C, h, w] -> frames [T, 3, H, W] in 0..1, T = 4F, or 4F - 3 at the start of a video."""
        return torch.cat([self._decode(latent) for latent in latents.split(1, dim=1)])

    def _decode(self, latent: Tensor) -> Tensor:
        """One latent frame [1, 1, C, h, w] -> its video frames [1 or 4, 3, H, W]."""
        codec = self._codec
        raw = latent.to(codec.device, torch.float32) * codec.std + codec.mean
        x = codec.net.post_quant_conv(raw.to(codec.dtype).transpose(1, 2))
        x = codec.net.decoder(x, feat_cache=self.features, feat_idx=[0], first_chunk=self._is_first)
        self._is_first = False
        return (0.5 * x[0].float().clamp(-1, 1) + 0.5).transpose(0, 1)


def fresh(part: nn.Module) -> Features:
    """The features of an encoder or a decoder that has seen nothing."""
    return [None] * sum(isinstance(layer, nn.Conv3d) for layer in part.modules())


def load_wan_codec(path: Path, dtype: torch.dtype, device: str) -> WanCodec:
    """The codec in vae/diffusion_pytorch_model.safetensors, Wan2.1_VAE.pth, or one file with the names of either.

    Sizes are read off the tensors. Raises CheckpointError when they are not those of Wan2.1's autoencoder,
    UnavailableError without diffusers.
    """
    state = rename(read_weights(path))
    sizes = codec_sizes(state, path)
    models = optional("diffusers.models.autoencoders.autoencoder_kl_wan", "wan")
    with torch.device("meta"):
        net = models.AutoencoderKLWan(**sizes)
    load_strictly(net, {name: value.to(dtype) for name, value in state.items()}, str(path))
    return WanCodec(net.to(device).eval().requires_grad_(False))


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under diffusers' names."""
    if "decoder.conv1.weight" not in state:
        return dict(state)
    convert = optional("diffusers.loaders.single_file_utils", "wan").convert_wan_vae_to_diffusers
    return dict(convert(state))


def codec_sizes(state: Mapping[str, Tensor], path: Path) -> dict[str, int]:
    """The sizes of an AutoencoderKLWan, as diffusers names them. Raises CheckpointError for another autoencoder."""
    try:
        channels = state["post_quant_conv.weight"].shape[0]
        width, decoder_width = state["encoder.conv_in.weight"].shape[0], state["decoder.conv_out.weight"].shape[1]
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"{path} holds no autoencoder of Wan2.1: {error} is missing") from error
    if channels != CHANNELS:
        message = f"the latents of {path} have {channels} channels, those of Wan2.1 have {CHANNELS}"
        raise CheckpointError(message, "use the autoencoder of Wan2.1 (that of Wan2.2 is another)")
    return {"base_dim": width, "decoder_base_dim": decoder_width, "z_dim": channels}
