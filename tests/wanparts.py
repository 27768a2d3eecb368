"""The parts of a Wan2.1 release beside the transformer, tiny and random, in both layouts. Needs the extra `wan`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

SPECIAL = ("<pad>", "</s>", "<unk>")  # numbers 0, 1 and 2
WORDS = ["▁", *"abcdefghijklmnopqrstuvwxyz&<>'.é", "▁a", "▁red", "▁fox", "ing", "▁the"]


def write_tokenizer(folder: Path) -> None:
    """A tokenizer made like umT5's, without its size, in a folder as transformers keeps it."""
    folder.mkdir(parents=True)
    tokens = [*((token, -9.0) for token in SPECIAL), *((word, -float(i)) for i, word in enumerate(WORDS))]
    made = Tokenizer(models.Unigram(tokens, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": "right"}))


def random_text_encoder(width: int) -> UMT5EncoderModel:
    vocabulary = len(SPECIAL) + len(WORDS)
    config = UMT5Config(
        vocab_size=vocabulary, d_model=width, d_kv=6, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    encoder, generator = UMT5EncoderModel(config), torch.Generator().manual_seed(0)
    for name, weight in encoder.named_parameters():
        spread = 0.5 if weight.dim() == 1 or "shared" in name or "bias" in name else weight[0].numel() ** -0.5
        nn.init.normal_(weight, std=spread, generator=generator)
    return encoder.eval().requires_grad_(False)


def released_text(encoder: UMT5EncoderModel) -> dict[str, Tensor]:
    """As in models_t5_umt5-xxl-enc-bf16.pth (reference, 5.3)."""
    state, released = encoder.state_dict(), {}
    released["token_embedding.weight"] = state["shared.weight"]
    released["norm.weight"] = state["encoder.final_layer_norm.weight"]
    for layer in range(2):
        old, new = f"encoder.block.{layer}.layer", f"blocks.{layer}"
        for part in "qkvo":
            released[f"{new}.attn.{part}.weight"] = state[f"{old}.0.SelfAttention.{part}.weight"]
        bias = state[f"{old}.0.SelfAttention.relative_attention_bias.weight"]
        released[f"{new}.pos_embedding.embedding.weight"] = bias
        for number in (0, 1):
            released[f"{new}.norm{number + 1}.weight"] = state[f"{old}.{number}.layer_norm.weight"]
        for theirs, ours in (("gate.0", "wi_0"), ("fc1", "wi_1"), ("fc2", "wo")):
            released[f"{new}.ffn.{theirs}.weight"] = state[f"{old}.1.DenseReluDense.{ours}.weight"]
    return released


def random_vae() -> AutoencoderKLWan:
    """diffusers' own, narrow, with random weights in which nothing is zero or one."""
    net, generator = AutoencoderKLWan(base_dim=8), torch.Generator().manual_seed(0)
    for name, weight in net.named_parameters():
        if name.endswith("gamma"):
            nn.init.uniform_(weight, 0.5, 1.5, generator=generator)
        else:
            spread = 0.1 if weight.dim() == 1 else 0.9 * weight[0].numel() ** -0.5
            nn.init.normal_(weight, std=spread, generator=generator)
    return net.eval().requires_grad_(False)


def released_vae_names() -> list[str]:
    """The 194 names in Wan2.1_VAE.pth (reference, 5.1)."""

    def residual(block: str, shortcut: bool = False) -> list[str]:
        convs = ["residual.2", "residual.6", *(["shortcut"] if shortcut else [])]
        norms = [f"{block}.residual.{i}.gamma" for i in (0, 3)]
        return norms + [f"{block}.{conv}.{part}" for conv in convs for part in ("weight", "bias")]

    def convolution(*names: str) -> list[str]:
        return [f"{name}.{part}" for name in names for part in ("weight", "bias")]

    names = convolution("conv1", "conv2")
    for side in ("encoder", "decoder"):
        middle = f"{side}.middle"
        names += convolution(f"{side}.conv1", f"{side}.head.2") + [f"{side}.head.0.gamma", f"{middle}.1.norm.gamma"]
        names += residual(f"{middle}.0") + residual(f"{middle}.2")
        names += convolution(f"{middle}.1.to_qkv", f"{middle}.1.proj")
    for i in (0, 1, 3, 4, 6, 7, 9, 10):
        names += residual(f"encoder.downsamples.{i}", shortcut=i in (3, 6))
    for i in (0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14):
        names += residual(f"decoder.upsamples.{i}", shortcut=i == 4)
    names += convolution(*(f"encoder.downsamples.{i}.resample.1" for i in (2, 5, 8)))
    names += convolution(*(f"encoder.downsamples.{i}.time_conv" for i in (5, 8)))
    names += convolution(*(f"decoder.upsamples.{i}.resample.1" for i in (3, 7, 11)))
    return names + convolution(*(f"decoder.upsamples.{i}.time_conv" for i in (3, 7)))


def released_vae(net: AutoencoderKLWan) -> dict[str, Tensor]:
    """As in Wan2.1_VAE.pth."""
    new = convert_wan_vae_to_diffusers({name: name for name in released_vae_names()})
    state = net.state_dict()
    assert len(new) == len(state) == 194
    return {old: state[name] for name, old in new.items()}
