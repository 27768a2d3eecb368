"""Models of random weights have the shape of the release, and weights that keep values in bounds."""

from __future__ import annotations

import pytest
import torch

from hforce.errors import ConfigError
from hforce.models.dit import CausalWan
from hforce.models.random_weights import SHAPES, RandomText, random_backbone, random_taehv, random_wan_vae
from hforce.models.wan import LARGE, SMALL

SIZE = (32, 16)  # pixels


def parameters(shape: str) -> int:
    with torch.device("meta"):
        return sum(weight.numel() for weight in CausalWan(SHAPES[shape]).parameters())


def test_shapes_are_those_of_the_release() -> None:
    """1.3 and 14 thousand million, as the names have it; TAEHV's decoder and both its sides are known, too."""
    assert parameters(SMALL) / 1e9 == pytest.approx(1.42, abs=0.01)
    assert parameters(LARGE) / 1e9 == pytest.approx(14.29, abs=0.01)
    decoder = random_taehv(torch.float32, "cpu").net.decoder
    assert sum(weight.numel() for weight in decoder.parameters()) / 1e6 == pytest.approx(9.84, abs=0.01)


def test_the_autoencoder_is_as_large_as_wans() -> None:
    pytest.importorskip("diffusers")
    codec = random_wan_vae(torch.bfloat16, "cpu")
    assert sum(weight.numel() for weight in codec.net.parameters()) == 126_892_531
    assert codec.dtype is torch.bfloat16
    assert torch.isfinite(codec.decoder()(torch.zeros(1, 1, 16, 2, 2))).all()


def test_fewer_layers_have_their_true_width() -> None:
    backbone = random_backbone(SMALL, SIZE, "cpu", "auto", layers=1)
    config = backbone.model.config
    assert (config.layers, config.dim, config.heads, config.ffn_dim) == (1, 1536, 12, 8960)
    assert (backbone.geometry.layers, backbone.geometry.head_dim, backbone.geometry.grid) == (1, 128, (1, 2))
    assert (backbone.name, backbone.is_random, backbone.shape, backbone.size) == (SMALL, True, (16, 2, 4), SIZE)
    assert not any(weight.requires_grad for weight in backbone.model.parameters())


def test_weights_are_drawn_by_what_flows_in_and_none_is_zero() -> None:
    model = random_backbone(SMALL, SIZE, "cpu", "float32", layers=1).model
    for name, weight in model.named_parameters():
        assert int((weight == 0).sum()) <= 1e-6 * weight.numel() + 1, name
    up = model.blocks[0].ffn[2].weight
    assert float(up.std()) == pytest.approx(8960**-0.5, rel=0.01)
    assert float(model.blocks[0].self_attn.norm_q.weight.mean()) == pytest.approx(1, abs=0.02)
    assert float(model.blocks[0].self_attn.q.bias.mean()) == pytest.approx(0, abs=0.02)


def test_the_tiny_model_is_drawn_alike_every_time() -> None:
    one, other = (random_backbone("tiny", None, "cpu", "auto").model.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_text_fills_all_that_the_model_reads() -> None:
    encode = RandomText(SHAPES[SMALL])
    text = encode("a red fox")
    assert text.shape == (1, 512, 4096)
    assert torch.equal(text, encode("a red fox"))
    assert not torch.equal(text, encode("a blue fox"))
    assert encode.reads("a red fox") == "a red fox"


@pytest.mark.parametrize(
    ("name", "layers", "told"), [("wan2.1", 0, "the shape of model 'wan2.1'"), (SMALL, 31, "has 30 layers, not 31")]
)
def test_shapes_that_are_not_known_are_refused(name: str, layers: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as error:
        random_backbone(name, SIZE, "cpu", "auto", layers)
    assert error.value.mend
