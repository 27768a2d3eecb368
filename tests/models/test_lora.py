"""Adapters under every naming: W + scale B A, and what fits no transformer."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from tests.weightfiles import diffusers, small_wan, wrapped, write
from torch import Tensor

from hforce.errors import CheckpointError
from hforce.models.checkpoints import load_transformer, open_checkpoint
from hforce.models.weights import fingerprint, fingerprint_of

RANK = 4
MODULES = [f"self_attn.{x}" for x in "qkvo"] + [f"cross_attn.{x}" for x in "qkvo"] + ["ffn.0", "ffn.2"]
LONGLIVE = "base_model.model."


@cache
def base() -> dict[str, Tensor]:
    return dict(small_wan().state_dict())


@cache
def drawn() -> dict[str, tuple[Tensor, Tensor]]:
    """A [rank, in] and B [out, rank] for every linear layer of the blocks, as LongLive adapts them."""
    generator = torch.Generator().manual_seed(3)
    pairs = {}
    for module in (f"blocks.{layer}.{module}" for layer in (0, 1) for module in MODULES):
        out, into = base()[f"{module}.weight"].shape
        pairs[module] = tuple(torch.randn(s, generator=generator) / 20 for s in ((RANK, into), (out, RANK)))
    return pairs


def expected(scale: float) -> dict[str, Tensor]:
    """The merged weights, in float64 and without hforce."""
    state = {name: value.double() for name, value in base().items()}
    for module, (a, b) in drawn().items():
        update = torch.einsum("or,ri->oi", b.double(), a.double())
        state[f"{module}.weight"] = state[f"{module}.weight"] + scale * update
    return state


def peft(infix: str = "") -> dict[str, Tensor]:
    names = {f"{LONGLIVE}{module}.lora_{half}{infix}.weight": i for module in drawn() for i, half in enumerate("AB")}
    return {name: drawn()[name.removeprefix(LONGLIVE).partition(".lora")[0]][i] for name, i in names.items()}


def community(prefix: str, halves: tuple[str, str], alpha: float | None, flat: bool = False) -> dict[str, Tensor]:
    found = {}
    for module, pair in drawn().items():
        name = prefix + (module.replace(".", "_") if flat else module)
        found |= {f"{name}.{half}.weight": value for half, value in zip(halves, pair, strict=True)}
        if alpha is not None:
            found[f"{name}.alpha"] = torch.tensor(alpha)
    return found


def in_diffusers() -> dict[str, Tensor]:
    renamed = diffusers({f"{module}.{half}": torch.ones(1) for module in drawn() for half in "AB"})
    return {
        f"transformer.{new[:-2]}.lora_{new[-1]}.weight": drawn()[old][new[-1] == "B"]
        for new, old in zip(renamed, (module for module in drawn() for _ in "AB"), strict=True)
    }


def open_with(adapter: object, folder: Path, member: str = "generator"):
    """The transformer with the adapter: a .pt where it is a dict of dicts, else safetensors."""
    torch.save({member: wrapped(base())}, folder / "base.pt")
    path = folder / "lora"
    if any(isinstance(value, dict) for value in adapter.values()):
        torch.save(adapter, path)
    else:
        write(adapter, path)
    return open_checkpoint(folder / "base.pt", path)


@pytest.mark.parametrize(("adapter", "scale", "family"), [
    ({"generator_lora": peft(), "critic_lora": {"x": torch.ones(1)}}, 1, "longlive"),
    ({"generator_lora": {k: v.bfloat16().float() for k, v in peft().items()}}, None, "longlive"),
    (peft(), 1, "longlive"),
    (peft(".default"), 1, "longlive"),
    (community("diffusion_model.", ("lora_down", "lora_up"), 2.0), 0.5, "self-forcing-style"),
    (community("diffusion_model.", ("lora_A", "lora_B"), None), 1, "self-forcing-style"),
    (community("lora_unet_", ("lora_down", "lora_up"), 16.0, flat=True), 4, "self-forcing-style"),
    (community("", ("lora_down", "lora_up"), None), 1, "self-forcing-style"),
    (in_diffusers(), 1, "self-forcing-style"),
])  # fmt: skip
def test_an_adapter_is_merged_under_every_naming(adapter, scale, family, tmp_path):
    found = open_with(adapter, tmp_path)
    assert found.family.name == family
    assert set(found.state) == set(base())
    tolerance = 1e-6 if scale else 1e-3
    for name, value in expected(scale or 1).items():
        torch.testing.assert_close(found.state[name].double(), value, atol=tolerance, rtol=0)
    assert not found.state["blocks.1.ffn.2.weight"].equal(base()["blocks.1.ffn.2.weight"])
    assert fingerprint_of(found.state) not in ("", fingerprint(small_wan()))


def test_longlive_brings_its_window_and_loads(tmp_path):
    found = open_with({"generator_lora": peft()}, tmp_path)
    own = found.family.recipe
    assert (own.window, own.sink, own.steps, own.shift) == (12, 3, (1000, 750, 500, 250), 5.0)
    loaded = load_transformer(found, torch.float32, "cpu")
    assert fingerprint(loaded) == fingerprint_of(found.state)
    assert all(value.equal(found.state[name]) for name, value in loaded.state_dict().items())
    half = load_transformer(found, torch.bfloat16, "cpu")
    weight = expected(1)["blocks.0.self_attn.q.weight"].float().bfloat16()
    torch.testing.assert_close(half.blocks[0].self_attn.q.weight.data, weight, atol=0, rtol=2**-7)


def test_an_adapter_may_change_only_some_weights(tmp_path):
    some = {name: value for name, value in peft().items() if "blocks.1.cross_attn.v" in name}
    found = open_with(some, tmp_path, "generator_ema")
    assert found.family.name == "self-forcing"
    changed = [name for name, value in base().items() if not found.state[name].equal(value)]
    assert changed == ["blocks.1.cross_attn.v.weight"]


@pytest.mark.parametrize(("told", "scale"), [
    ({"lora_alpha": 8, "r": RANK}, 2), ({"lora_alpha": 8, "r": RANK, "use_rslora": True}, 4),
])  # fmt: skip
def test_the_scale_of_peft_lies_beside_its_weights(told, scale, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **told}))
    found = open_with(peft(), tmp_path)
    torch.testing.assert_close(
        found.state["blocks.0.ffn.0.weight"].double(), expected(scale)["blocks.0.ffn.0.weight"], atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("more", [{"use_dora": True}, {"alpha_pattern": {"q": 3}}])
def test_a_peft_config_that_asks_for_more_is_refused(more, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": RANK, **more}))
    with pytest.raises(CheckpointError, match="DoRA or"):
        open_with(peft(), tmp_path)


def broken(**changes: Tensor | None) -> dict[str, Tensor]:
    """The adapter of one layer, with other tensors in it, or without some."""
    a, b = drawn()["blocks.0.ffn.0"]
    name = "diffusion_model.blocks.0.ffn.0."
    whole = {"lora_A.weight": a, "lora_B.weight": b} | {k.replace("__", "."): v for k, v in changes.items()}
    return {name + key: value for key, value in whole.items() if value is not None}


@pytest.mark.parametrize(("adapter", "told"), [
    (broken(lora_A__weight=None), "1 pairs do not fit the transformer, or lack a half (blocks.0.ffn.0.weight)"),
    (broken(lora_B__weight=None), "lack a half"),
    (broken(lora_B__weight=torch.ones(512, 3)), "do not fit"),
    (broken(lora_A__weight=torch.ones(RANK, 7)), "do not fit"),
    (broken(lora_A__weight=torch.ones(RANK)), "do not fit"),
    (broken(alpha=torch.ones(2)), "do not fit"),
    (broken(alpha=torch.tensor(torch.nan)), "do not fit"),
    (broken(lora_A__weight=torch.ones(0, 256), lora_B__weight=torch.ones(512, 0), alpha=torch.tensor(1.0)), "do not"),
    (broken(dora_scale=torch.ones(1)), "1 tensors are no part of one (diffusion_model.blocks.0.ffn.0.dora_scale)"),
    (broken(lora_down__weight=torch.ones(RANK, 256)), "are no part of one"),
    (broken(lora_A__weight=torch.ones(RANK, 256).to(torch.int8)), "are no part of one"),
    ({"diffusion_model.blocks.9.ffn.0.lora_A.weight": torch.ones(1, 1)}, "(blocks.9.ffn.0.weight)"),
    ({"w": torch.ones(1)}, "is no adapter"),
])  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused_by_name(adapter, told, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        open_with(adapter, tmp_path)
    assert told in str(caught.value)
    assert str(tmp_path / "lora") in str(caught.value)
    assert caught.value.exit_code == 65


def test_a_transformer_is_no_adapter(tmp_path):
    with pytest.raises(CheckpointError, match="no adapter"):
        open_with(wrapped(base()), tmp_path)


def test_an_adapter_of_infinite_numbers_is_seen_when_it_is_loaded(tmp_path):
    found = open_with(broken(lora_A__weight=torch.full((RANK, 256), torch.inf)), tmp_path)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.ffn\.0\.weight"):
        load_transformer(found, torch.float32, "cpu")
