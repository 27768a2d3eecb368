"""CausalWan: the one diffusion transformer, any size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Attend(Protocol):
    """How tokens see each other and the past: the only thing the model asks of the world around it."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B, N, H, D], normalised, before RoPE -> [B, N, H, D]."""
        ...


@dataclass(frozen=True)
class TextContext:
    """Prompts as the model reads them: cross-attention keys and values of every layer, [B, H, T, D] each.

    With more prompts than items, say two for each, every item's tokens are cut into as many equal runs, and each run
    reads its own: that is how clips with cuts in them are trained on.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


@dataclass(frozen=True)
class WanConfig:
    """Sizes of a Wan2.1 transformer. dim = heads x head_dim; the defaults that never change follow the release."""

    dim: int
    ffn_dim: int
    layers: int
    heads: int
    text_dim: int = 4096
    text_len: int = 512
    in_channels: int = 16
    out_channels: int = 16
    freq_dim: int = 256
    patch: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


class RMSNorm(nn.Module):
    """RMS norm over the full width, before the split into heads; float32 inside, rounded before and after the weight.

    So does the release: in half precision the two roundings are part of what the weights were trained with.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight


class Gelu(nn.Module):
    """GELU in the tanh form. (1 + tanh u) / 2 = sigmoid(2 u), and on a CPU a sigmoid takes a third of a tanh's time."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled():
            return F.gelu(x, approximate="tanh")
        cubic = torch.addcmul(x, x * x, x, value=0.044715)
        return cubic.mul_(2 * math.sqrt(2 / math.pi)).sigmoid_().mul_(x)


class Linear(nn.Linear):
    """A linear layer, on a CPU by oneDNN: MKL, which torch asks by itself, leaves half of an AMD core idle."""

    def forward(self, x: Tensor) -> Tensor:
        if not is_for_onednn(x):
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class FeedForward(nn.Sequential):
    """Two linear layers and GELU in between, which oneDNN may join to the first one."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, dim] -> [B, N, dim]."""
        if not is_for_onednn(x) or not joins_gelu():
            return super().forward(x)
        up, _, down = self
        return down(torch.ops.mkldnn._linear_pointwise(x, up.weight, up.bias, "gelu", [], "tanh"))


def is_for_onednn(x: Tensor) -> bool:
    """Whether linear layers of x are oneDNN's: in float32 on a CPU whose torch has it, where nothing is learned.

    torch.compile cannot join it to a program that many blocks share.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    return not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())


def joins_gelu() -> bool:
    """Whether oneDNN is to apply GELU where it multiplies: on registers of less than 512 bits, `Gelu` is faster."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


class Projections(nn.Module):
    """The q, k, v, o of an attention with norms on q and k (names as in the checkpoints)."""

    def __init__(self, c: WanConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.q, self.k, self.v, self.o = (Linear(c.dim, c.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(c.dim, c.eps), RMSNorm(c.dim, c.eps)

    def split(self, x: Tensor) -> Tensor:
        """[B, N, dim] -> [B, N, H, D]."""
        return x.unflatten(-1, (self.heads, -1))


class SelfAttention(Projections):
    """Attention of video tokens to each other and the past; `attend` stands between its two halves."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, N, dim] -> queries, keys and values [B, N, H, D]."""
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)
        return self.split(q), self.split(k), self.split(v)


class CrossAttention(Projections):
    """Attention of video tokens to the text. Padding rows take part, unmasked, as in the reference."""

    def project(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """text [B, T, dim] -> keys and values [B, H, T, D]."""
        keys, values = self.split(self.norm_k(self.k(text))), self.split(self.v(text))
        return keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous()

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """x [B, N, dim], keys and values [B runs, H, T, D] -> [B, N, dim]."""
        q = self.split(self.norm_q(self.q(x)).reshape(keys.shape[0], -1, x.shape[-1])).transpose(1, 2)
        return self.o(F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward, cut in two where tokens meet the past.

    norm3 stands before the text, norm2 before the feed-forward.
    """

    def __init__(self, c: WanConfig) -> None:
        super().__init__()
        self.dim, self.eps = c.dim, c.eps
        self.self_attn, self.cross_attn = SelfAttention(c), CrossAttention(c)
        self.norm3 = nn.LayerNorm(c.dim, eps=c.eps)
        self.ffn = FeedForward(Linear(c.dim, c.ffn_dim), Gelu(), Linear(c.ffn_dim, c.dim))
        self.modulation = nn.Parameter(torch.zeros(1, 6, c.dim))

    def before(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All that comes before self-attention. x [B, N, dim], time [B, F, 6, dim] -> q, k, v [B, N, H, D]."""
        shift, scale = (self.modulation[:, None, :2] + time[:, :, :2]).chunk(2, dim=2)
        return self.self_attn.project(modulate(x, shift, scale, self.eps))

    def after(self, x: Tensor, heads: Tensor, time: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """All that comes after it: heads [B, N, dim], text keys and values [B, H, T, D] -> [B, N, dim]."""
        gate1, shift, scale, gate2 = (self.modulation[:, None, 2:] + time[:, :, 2:]).chunk(4, dim=2)
        x = add_gated(x, self.self_attn.o(heads), gate1)
        x = x + self.cross_attn(self.norm3(x), keys, values)
        return add_gated(x, self.ffn(modulate(x, shift, scale, self.eps)), gate2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm, then scale and shift frame by frame: x [B, N, dim], shift and scale [B, F, 1, dim] -> [B, N, dim].

    Where all frames are alike (F = 1), a CPU does it in one step.
    """
    if x.device.type == "cpu" and shift.shape[:2] == (1, 1):
        return F.layer_norm(x, x.shape[-1:], (1 + scale).flatten(), shift.flatten(), eps)
    frames = F.layer_norm(x, x.shape[-1:], eps=eps).unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift, frames, 1 + scale).flatten(1, 2)


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate y with a gate [B, F, 1, dim] per frame; x, y [B, N, dim]."""
    frames = gate.shape[1]
    return torch.addcmul(x.unflatten(1, (frames, -1)), y.unflatten(1, (frames, -1)), gate).flatten(1, 2)


Before = Callable[[Block, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
After = Callable[[Block, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Head(nn.Module):
    """The last norm and projection to patches."""

    def __init__(self, c: WanConfig) -> None:
        super().__init__()
        self.eps = c.eps
        self.head = nn.Linear(c.dim, c.patch[1] * c.patch[2] * c.out_channels)
        self.modulation = nn.Parameter(torch.zeros(1, 2, c.dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, N, dim], time [B, F, dim] -> [B, N, patch values]."""
        shift, scale = (self.modulation[:, None] + time[:, :, None]).chunk(2, dim=2)
        return self.head(modulate(x, shift, scale, self.eps))


class CausalWan(nn.Module):
    """The Wan2.1 text-to-video transformer (parameter names of the release) with one timestep per latent frame.

    It is stateless and knows neither positions nor caches: whatever `attend` is passed decides what a token sees.
    Training, streaming and profiling differ in that argument alone.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        c = self.config = config
        self.patch_embedding = nn.Conv3d(c.in_channels, c.dim, c.patch, c.patch)
        self.text_embedding = nn.Sequential(nn.Linear(c.text_dim, c.dim), nn.GELU("tanh"), nn.Linear(c.dim, c.dim))
        self.time_embedding = nn.Sequential(nn.Linear(c.freq_dim, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 6 * c.dim))
        self.blocks = cast(Sequence[Block], nn.ModuleList(Block(c) for _ in range(c.layers)))
        self.head = Head(c)
        self.before: Before
        self.after: After
        self.separate_blocks()
        self.head_order = [list(range(c.heads)) for _ in range(c.layers)]
        """[L][H] which head of the checkpoint stands where: see `order_heads`."""

    def separate_blocks(self) -> None:
        """Runs every small operation by itself, from the next pass on."""
        self.before, self.after = Block.before, Block.after

    def compile_blocks(self) -> None:
        """Lets torch.compile join norms, modulations, gates and activations to few kernels, from the next pass on.

        All blocks share two programs, one for each half; a pass over another number of frames compiles them anew, and
        after eight such numbers torch goes on without.
        """
        self.before = torch.compile(Block.before, dynamic=False)
        self.after = torch.compile(Block.after, dynamic=False)

    def project_text(self, text: Tensor) -> TextContext:
        """text [B, T, text_dim], T <= text_len -> what every layer's cross-attention reads; once a prompt.

        Short texts are filled up with zero rows, which become one non-zero vector and take part (reference, 1.3).
        """
        padded = F.pad(text, (0, 0, 0, self.config.text_len - text.shape[1]))
        embedded = self.text_embedding(padded)
        pairs = [block.cross_attn.project(embedded) for block in self.blocks]
        return TextContext(tuple(k for k, _ in pairs), tuple(v for _, v in pairs))

    def forward(self, x: Tensor, t: Tensor, text: TextContext, attend: Attend) -> Tensor:
        """Flow (noise - clean) [B, F, C, h, w] of noisy latents x [B, F, C, h, w].

        t [B, F] timesteps in 0..1000, or [B, 1] where all frames have the same; F is 1 then in all that follows from t.
        """
        frames, rows, columns = x.shape[1], x.shape[3] // self.config.patch[1], x.shape[4] // self.config.patch[2]
        tokens = rearrange(self.patch_embedding(x.transpose(1, 2)), "b d f h w -> b (f h w) d").contiguous()
        time = self.time_embedding(sinusoid(t, self.config.freq_dim).to(x.dtype))
        per_block = self.time_projection(time).unflatten(-1, (6, -1))
        for layer, block in enumerate(self.blocks):
            heads = attend(layer, *self.before(block, tokens, per_block)).flatten(2)
            tokens = self.after(block, tokens, heads, per_block, text.keys[layer], text.values[layer])
        patches = self.head(tokens, time)
        _, p, q = self.config.patch
        return rearrange(patches, "b (f h w) (p q c) -> b f c (h p) (w q)", f=frames, h=rows, w=columns, p=p, q=q)

    @torch.no_grad()
    def order_heads(self, order: Sequence[Sequence[int]]) -> None:
        """Puts the self-attention heads of every layer in place: head i becomes head order[layer][i] of the checkpoint.

        The model computes the same function; heads that share a cache policy become neighbours, so that the cache
        works on slices instead of gathers.
        """
        width = self.config.head_dim
        for layer, (block, heads) in enumerate(zip(self.blocks, order, strict=True)):
            present = self.head_order[layer]
            rows = torch.cat([torch.arange(width) + present.index(h) * width for h in heads])
            rows, attention = rows.to(block.self_attn.q.weight.device), block.self_attn
            for linear in (attention.q, attention.k, attention.v):
                linear.weight.copy_(linear.weight[rows])
                linear.bias.copy_(linear.bias[rows])
            for norm in (attention.norm_q, attention.norm_k):
                norm.weight.copy_(norm.weight[rows])
            attention.o.weight.copy_(attention.o.weight[:, rows])
            self.head_order[layer] = list(heads)


def sinusoid(t: Tensor, width: int) -> Tensor:
    """Timesteps [...] in 0..1000 -> [..., width] float64, cosines first, then sines."""
    half = width // 2
    ladder = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angles = t.to(torch.float64)[..., None] * ladder
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
