"""The tiny autoencoder: TAEHV for Wan latents, and the codec of the tiny model.

Inside, frames are [B, T, h, w, C], channels last: so convolutions take them as they are, and joining or parting
neighbours in time is a copy of whole rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hforce.errors import CheckpointError, InputError
from hforce.models.base import DecoderNeeds
from hforce.models.mapped import Entry
from hforce.models.wan_files import read_weights
from hforce.models.weights import count_values, load_strictly

TAEW = ("taew2_1.safetensors", "taew2_1.pth", "vae/taew2_1.safetensors", "vae/taew2_1.pth")
TAEHV_MARK = "encoder.0.weight"  # a tensor that other autoencoders do not have
WIDENED = (1, 8, 14, 20)  # layers of the decoder that set its widths
Memory = list[Tensor]
"""What a streamed pass remembers: for every MemBlock the last frame it was given, [B, h, w, C]."""


@dataclass(frozen=True)
class TaehvConfig:
    """Sizes of one TAEHV. The defaults are those of the released Wan2.1 file (taew2_1)."""

    latent_channels: int = 16
    encoder_width: int = 64
    decoder_widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    time_down: tuple[int, int, int] = (2, 2, 1)
    space_down: tuple[int, int, int] = (2, 2, 2)
    time_up: tuple[int, int, int] = (1, 2, 2)
    space_up: tuple[int, int, int] = (2, 2, 2)
    patch: int = 1  # pixel (un)shuffle around the network, for small and fast codecs

    @property
    def stride(self) -> int:
        """Video frames per latent frame."""
        return self.time_up[0] * self.time_up[1] * self.time_up[2]


class MemBlock(nn.Module):
    """A residual block that sees its own input of the previous time step (zeros before the first)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, T, h, w, C], past [B, h, w, C] or None -> the same shape, and the frame to remember."""
        first = torch.zeros_like(x[:, :1]) if past is None else past[:, None]
        joined = torch.cat([x, torch.cat([first, x[:, :-1]], dim=1)], dim=-1)
        return F.relu(each(self.conv, joined) + x), x[:, -1].clone()  # a view would keep all of x in memory


class TPool(nn.Module):
    """Joins `stride` neighbouring frames into one."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width * stride, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, h, w, C] -> [B, T / stride, h, w, C]."""
        return each(self.conv, rearrange(x, "b (t s) h w c -> b t h w (s c)", s=self.stride))


class TGrow(nn.Module):
    """Makes `stride` frames of one; the first share of the output channels is the earliest frame."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, h, w, C] -> [B, T stride, h, w, C]."""
        return rearrange(each(self.conv, x), "b t h w (s c) -> b (t s) h w c", s=self.stride)


class Bound(nn.Module):
    """Keeps latents within (-3, 3), softly."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


def each(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer for pictures [.., C, h, w] on every frame of x [B, T, h, w, C]."""
    return layer(x.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def _run(layers: nn.Sequential, x: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
    """Runs x [B, T, C, h, w] through layers, handing each MemBlock its past. Returns the new memory."""
    x, remembered = x.permute(0, 1, 3, 4, 2).contiguous(), Memory()
    for layer in layers:
        if isinstance(layer, MemBlock):
            past = None if memory is None else memory[len(remembered)]
            x, last = layer(x, past)
            remembered.append(last)
        elif isinstance(layer, TPool | TGrow):
            x = layer(x)
        else:
            x = each(layer, x)
    return x.permute(0, 1, 4, 2, 3), remembered


class TAEHV(nn.Module):
    """Causal autoencoder, 4 video frames per latent frame (github.com/madebyollin/taehv, MIT; key names as released).

    One code path serves whole clips and streams: `decode_stream` of a clip in pieces equals the clip at once.
    """

    def __init__(self, config: TaehvConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = self._build_encoder(config)
        self.decoder = self._build_decoder(config)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """In what it computes."""
        return next(self.parameters()).dtype

    @staticmethod
    def _build_encoder(c: TaehvConfig) -> nn.Sequential:
        width = c.encoder_width
        layers: list[nn.Module] = [nn.Conv2d(3 * c.patch**2, width, 3, padding=1), nn.ReLU()]
        for time, space in zip(c.time_down, c.space_down, strict=True):
            layers += [TPool(width, time), nn.Conv2d(width, width, 3, padding=1, stride=space, bias=False)]
            layers += [MemBlock(width) for _ in range(3)]
        return nn.Sequential(*layers, nn.Conv2d(width, c.latent_channels, 3, padding=1))

    @staticmethod
    def _build_decoder(c: TaehvConfig) -> nn.Sequential:
        first, *others = c.decoder_widths
        layers: list[nn.Module] = [Bound(), nn.Conv2d(c.latent_channels, first, 3, padding=1), nn.ReLU()]
        width = first
        for time, space, narrower in zip(c.time_up, c.space_up, others, strict=True):
            layers += [MemBlock(width) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=space), TGrow(width, time)]
            layers += [nn.Conv2d(width, narrower, 3, padding=1, bias=False)]
            width = narrower
        return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(width, 3 * c.patch**2, 3, padding=1))

    def encode(self, video: Tensor) -> Tensor:
        """video [B, T, 3, H, W] in 0..1 -> latents [B, ceil(T / stride), C, h, w]; the last frame fills up."""
        return self.encode_stream(video, None)[0]

    def encode_stream(self, video: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        """As `encode`, for the next frames of a video; memory is what an earlier call returned, None at its start."""
        missing = -video.shape[1] % self.config.stride
        if missing:
            video = torch.cat([video, video[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
        return _run(self.encoder, F.pixel_unshuffle(video, self.config.patch), memory)

    def encode_clip(self, video: Tensor) -> Tensor:
        """video [B, 4(n - 1) + 1, 3, H, W] -> [B, n, C, h, w]: the first frame alone becomes the first latent."""
        return self.encode(self.lead_in(video))

    def lead_in(self, video: Tensor) -> Tensor:
        """A video [B, T, 3, H, W] whose first frame is repeated until it fills a latent: [B, T + stride - 1, ...]."""
        first = video[:, :1].expand(-1, self.config.stride - 1, -1, -1, -1)
        return torch.cat([first, video], dim=1)

    def decode_stream(self, latents: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        """latents [B, n, C, h, w] and what an earlier call returned (None at the start of a video).

        Returns video frames [B, T, 3, H, W] in 0..1 and the memory for the next call: T = 4n, or 4n - 3 at the start,
        where the first latent stands for a single frame.
        """
        raw, remembered = self.decode_raw(latents, memory)
        skip = self.config.stride - 1 if memory is None else 0
        return raw[:, skip:].clamp(0, 1), remembered

    def decode_raw(self, latents: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """The network's own output [B, 4n, 3, H, W], neither trimmed nor clamped."""
        raw, remembered = _run(self.decoder, latents, memory)
        return F.pixel_shuffle(raw, self.config.patch), remembered


class TaehvCodec:
    """A TAEHV between video and the transformer's latents, which are its own less a mean and divided by a deviation."""

    name = "taehv"

    def __init__(self, net: TAEHV, mean: Tensor | float = 0.0, std: Tensor | float = 1.0) -> None:
        self.net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.mean, self.std = mean, std
        self.stride = net.config.stride

    @property
    def channels(self) -> int:
        """Of a latent."""
        return self.net.config.latent_channels

    def encode(self, video: Tensor) -> Tensor:
        """video [B, T, 3, H, W] in 0..1 -> latents [B, n, C, h, w]. What it needs does not grow with the video."""
        parts, memory = [], None
        for part in self.net.lead_in(video).split(self.stride, dim=1):
            latents, memory = self.net.encode_stream(part.to(self.net.device, self.net.dtype), memory)
            parts.append(latents.float())
        return (torch.cat(parts, dim=1) - self.mean) / self.std

    def decoder(self) -> TaehvDecoder:
        """A decoder for a new video."""
        return TaehvDecoder(self)


class TaehvDecoder:
    """Decodes one video, chunk by chunk."""

    def __init__(self, codec: TaehvCodec) -> None:
        self._codec = codec
        self.memory: Memory | None = None

    @torch.inference_mode()
    def __call__(self, latents: Tensor) -> Tensor:
        """latents [1, F, C, h, w] -> frames [T, 3, H, W] in 0..1."""
        net = self._codec.net
        raw = latents.to(net.device, torch.float32) * self._codec.std + self._codec.mean
        video, self.memory = net.decode_stream(raw.to(net.dtype), self.memory)
        return video[0].float()


def find_taew(base: Path) -> Path:
    """taew2_1 in the folder of a release, or in its vae/. Nothing is downloaded.

    Raises InputError, with all that was looked for, where there is none; CheckpointError where the file is no TAEHV.
    """
    path = next((base / name for name in TAEW if (base / name).is_file()), None)
    if path is None:
        mend = "get taew2_1.pth or .safetensors from madebyollin/taehv, put it there, or name it: --vae FILE"
        raise InputError(f"no tiny autoencoder in {base}: looked in vain for {', '.join(TAEW)}", mend)
    if TAEHV_MARK not in read_weights(path):
        raise _no_taehv(path, TAEHV_MARK)
    return path


def load_taew(path: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> TaehvCodec:
    """The codec in taew2_1.safetensors or .pth. It works on the transformer's latents as they are.

    Widths are read off the tensors. Raises CheckpointError when they are not those of a TAEHV for Wan2.1.
    """
    read = read_weights(path)
    net = TAEHV(_config_of(read.entries, path))
    state = {name: value.to(dtype) for name, value in read.items()}
    load_strictly(net, _trim(net, state), str(path))
    return TaehvCodec(net.to(device, dtype).eval().requires_grad_(False))


def codec_needs(path: Path, cells: tuple[int, int], dtype: torch.dtype) -> tuple[int, DecoderNeeds]:
    """Bytes of the weights, and the needs of a decoder of latents h x w.

    Only headers are read. Raises what `load_taew` raises.
    """
    config = _config_of(read_weights(path).entries, path)
    with torch.device("meta"):
        weights = count_values(TAEHV(config)) * dtype.itemsize
    return weights, partial(decoder_needs, config, cells, dtype)


def decoder_needs(c: TaehvConfig, cells: tuple[int, int], dtype: torch.dtype, chunk: int) -> tuple[int, int]:
    """Bytes that a decoder remembers, and those that decoding a chunk of latents h x w adds.

    Every MemBlock remembers a frame, the old one until the chunk is done, and holds its input five times while it
    works. A step up holds what it grew and what a convolution makes of it; the end, the pictures twice.
    """
    frames, area, remembered, peak = chunk, cells[0] * cells[1], 0, 0
    for (width, narrower), time, space in zip(pairwise(c.decoder_widths), c.time_up, c.space_up, strict=True):
        remembered += 3 * width * area
        peak = max(peak, 5 * width * frames * area)
        frames, area = frames * time, area * space**2
        peak = max(peak, (width + narrower) * frames * area, 2 * narrower * frames * area)
    pictures = 3 * frames * area * c.patch**2
    held = remembered * dtype.itemsize
    as_float = 0 if dtype == torch.float32 else 4 * pictures
    shown = pictures * dtype.itemsize
    return held, max(peak * dtype.itemsize + held, 2 * shown + held, shown + as_float)


def _config_of(entries: Mapping[str, Entry], path: Path) -> TaehvConfig:
    """The sizes of a TAEHV for Wan2.1. Raises CheckpointError when they are not those of one."""
    names = [f"decoder.{layer}.weight" for layer in WIDENED]
    if missing := [name for name in (TAEHV_MARK, *names) if name not in entries]:
        raise _no_taehv(path, missing[0])
    first, second, third, last = (entries[name].shape[0] for name in names)
    expected, channels = TaehvConfig(), entries[names[0]].shape[1]
    if channels != expected.latent_channels:
        message = f"the latents of {path} have {channels} channels, those of Wan2.1 have {expected.latent_channels}"
        raise CheckpointError(message, "use taew2_1")
    return TaehvConfig(channels, entries[TAEHV_MARK].shape[0], (first, second, third, last))


def _no_taehv(path: Path, missing: str) -> CheckpointError:
    return CheckpointError(f"{path} holds no TAEHV: it has no tensor {missing}", "download taew2_1 again")


def _trim(net: TAEHV, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Old files grow more frames than are wanted; those that are not come first."""
    own = net.state_dict()
    grown = [f"decoder.{i}.conv.weight" for i, layer in enumerate(net.decoder) if isinstance(layer, TGrow)]
    return {name: value[-len(own[name]) :] if name in grown else value for name, value in state.items()}
