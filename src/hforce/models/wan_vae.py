"""The autoencoder of Wan2.1 (diffusers' AutoencoderKLWan): encoded latent by latent, decoded chunk by chunk."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hforce.attention.backends import can_launch
from hforce.errors import CheckpointError, DataError
from hforce.extras import optional
from hforce.models.base import DecoderNeeds
from hforce.models.mapped import Entry
from hforce.models.wan_decode import PAST, PLAIN, Between, Steps, to_channels_last
from hforce.models.wan_files import read_weights
from hforce.models.weights import load_strictly

CHANNELS = 16  # of a latent
STRIDE = 4  # video frames per latent frame
JOINED_TENSORS, PLAIN_TENSORS = 6, 7  # of the size of all video frames, alive at once in a residual block, as weighed
SIZED = (  # names in either layout of the tensors that sizes are read from, and the axis
    (("conv2.weight", "post_quant_conv.weight"), 0),
    (("encoder.conv1.weight", "encoder.conv_in.weight"), 0),
    (("decoder.head.2.weight", "decoder.conv_out.weight"), 1),
)
MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

Features = list[Any]
"""What a stream remembers: for every convolution in time the last two frames it was given; None before the first."""


class WanCodec:
    """AutoencoderKLWan between video and normalised latents."""

    name, stride, channels = "wan-vae", STRIDE, CHANNELS

    def __init__(self, net: Any) -> None:
        self.net = net
        self.mean, self.std = (torch.tensor(x, device=self.device)[:, None, None] for x in (MEAN, STD))
        to_channels_last(net.decoder)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.net.post_quant_conv.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """In what it computes."""
        return self.net.post_quant_conv.weight.dtype

    @property
    def between(self) -> Between:
        """What stands between its decoder's convolutions, where it is now."""
        return choose_between(self.device)

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
    """Decodes one video chunk by chunk, equal to decoding it whole: its memory does not grow with it."""

    def __init__(self, codec: WanCodec) -> None:
        self._codec = codec
        self.memory: Features = fresh(codec.net.decoder)

    @torch.inference_mode()
    def __call__(self, latents: Tensor) -> Tensor:
        """latents [1, F, C, h, w] -> frames [T, 3, H, W] in 0..1, T = 4F, or 4F - 3 at the start of a video."""
        begins = self.memory[0] is None
        sizes = [1, latents.shape[1] - 1] if begins and latents.shape[1] > 1 else [latents.shape[1]]
        return torch.cat([self._decode(part) for part in latents.split(sizes, dim=1)])

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents [1, F, C, h, w], the first one of a video alone -> their video frames [4 F or 1, 3, H, W]."""
        codec = self._codec
        raw = latents.to(codec.device, torch.float32) * codec.std + codec.mean
        x = codec.net.post_quant_conv(raw.to(codec.dtype).transpose(1, 2))
        x = Steps(self.memory, codec.between).decode(codec.net.decoder, x)
        return (0.5 * x[0].float().clamp(-1, 1) + 0.5).transpose(0, 1)


def choose_between(device: torch.device) -> Between:
    """What stands between convolutions: kernels of ours where Triton can run, else plain operations."""
    if not can_launch(device):
        return PLAIN
    from hforce.models.wan_join import KERNELS

    return KERNELS


def fresh(part: nn.Module) -> Features:
    """The features of an encoder or a decoder that has seen nothing."""
    return [None] * sum(isinstance(layer, nn.Conv3d) for layer in part.modules())


def load_wan_codec(path: Path, dtype: torch.dtype, device: str) -> WanCodec:
    """The codec in vae/diffusion_pytorch_model.safetensors, Wan2.1_VAE.pth, or one file with the names of either.

    Sizes are read off the tensors. Raises CheckpointError when they are not those of Wan2.1's autoencoder,
    UnavailableError without diffusers.
    """
    read = read_weights(path)
    sizes, state = codec_sizes(read.entries, path), rename(read)
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


def codec_sizes(entries: Mapping[str, Entry], path: Path) -> dict[str, int]:
    """The sizes of an AutoencoderKLWan, as diffusers names them. Raises CheckpointError for another autoencoder."""
    try:
        channels, width, decoder_width = (
            next(entries[name] for name in names if name in entries or name == names[-1]).shape[axis]
            for names, axis in SIZED
        )
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"{path} holds no autoencoder of Wan2.1: {error} is missing") from error
    if channels != CHANNELS:
        message = f"the latents of {path} have {channels} channels, those of Wan2.1 have {CHANNELS}"
        raise CheckpointError(message, "use the autoencoder of Wan2.1 (that of Wan2.2 is another)")
    return {"base_dim": width, "decoder_base_dim": decoder_width, "z_dim": channels}


def codec_needs(
    path: Path, cells: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> tuple[int, DecoderNeeds]:
    """Bytes of the weights, and the needs of a decoder of latents h x w on a device.

    Only headers are read. Raises CheckpointError for another autoencoder.
    """
    entries = read_weights(path).entries
    width = codec_sizes(entries, path)["decoder_base_dim"]
    weights = sum(torch.Size(entry.shape).numel() for entry in entries.values()) * dtype.itemsize
    return weights, partial(decoder_needs, width, cells, dtype, can_launch(device))


def decoder_needs(
    width: int, cells: tuple[int, int], dtype: torch.dtype, joined: bool, chunk: int
) -> tuple[int, int]:
    """Bytes that a decoder `width` channels wide at full size remembers, and those that decoding a chunk adds.

    It remembers the last two inputs of every convolution in time: channels at latent size and 2, 4 and 8 times that.
    The peak lies at full size, in a residual block: so many tensors of all video frames of the chunk, fewer where
    kernels of ours join small operations, and the frames themselves in float32.
    """
    area, frames = cells[0] * cells[1], STRIDE * chunk
    remembered = (CHANNELS + 11 * 4 * width) + 4 * (2 * width + 6 * 4 * width) + 16 * 6 * 2 * width + 64 * 7 * width
    tensors = (JOINED_TENSORS if joined else PLAIN_TENSORS) * frames + PAST
    return PAST * remembered * area * dtype.itemsize, 64 * area * (tensors * width * dtype.itemsize + frames * 3 * 4)
