"""A Wan2.1 backbone: where its files are looked for, which sizes it makes, and what it says about itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.weightfiles import hollow_release, shapes_of, write_hollow

from hforce import extras
from hforce.errors import CheckpointError, ConfigError, InputError, UnavailableError
from hforce.models.base import Source
from hforce.models.dit import WanConfig
from hforce.models.wan import open_wan
from hforce.models.wan_files import TEXT, TOKENIZER, VAE, Parts, find_parts, read_weights

RELEASED = ("models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/tokenizer.json", "Wan2.1_VAE.pth")
DIFFUSERS = (
    "text_encoder/model.safetensors.index.json",
    "tokenizer/tokenizer.json",
    "vae/diffusion_pytorch_model.safetensors",
)


def release(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("names", [RELEASED, DIFFUSERS], ids=["released", "diffusers"])
def test_parts_are_found_in_both_layouts(tmp_path, names):
    assert find_parts(release(tmp_path, names)) == Parts(*(tmp_path / name for name in names))


def test_parts_that_are_missing_are_told_with_what_was_looked_for(tmp_path):
    release(tmp_path, RELEASED[1:2])
    for folder, missing in ((tmp_path, TEXT + VAE), (tmp_path / "none", TEXT + TOKENIZER + VAE)):
        with pytest.raises(InputError, match="is no folder of Wan2.1") as caught:
            find_parts(folder)
        assert [name for name in missing if name not in str(caught.value)] == []
    assert "Wan2.1-T2V-1.3B" in caught.value.mend


def test_an_autoencoder_of_ones_own_is_taken_instead(tmp_path, monkeypatch):
    release(tmp_path, RELEASED[:2])
    (tmp_path / "taew2_1.pth").touch()
    monkeypatch.chdir(tmp_path)
    assert find_parts(tmp_path, Path("taew2_1.pth")).vae == tmp_path / "taew2_1.pth"
    with pytest.raises(InputError, match=r"autoencoder \(.*gone.pth\)"):
        find_parts(tmp_path, Path("gone.pth"))


def test_a_blueprint_has_the_grid_of_its_size_portrait_included(tmp_path):
    hollow_release(tmp_path)
    write_hollow(shapes_of(WanConfig(256, 256, 2, 2, text_dim=32)), tmp_path / "x.safetensors")
    source = Source(str(tmp_path / "x.safetensors"), str(tmp_path))
    made = open_wan("", source, None, "cpu", "auto")
    assert (made.size, made.shape, made.geometry.grid) == ((832, 480), (16, 60, 104), (30, 52))
    geometry = made.geometry
    assert (geometry.layers, geometry.heads, geometry.head_dim) == (2, 2, 128)
    assert (geometry.chunk, geometry.span, geometry.tokens) == (3, 21, 1560)
    portrait = open_wan("", source, (480, 832), "cpu", "auto")
    assert (portrait.size, portrait.shape, portrait.geometry.grid) == ((480, 832), (16, 104, 60), (52, 30))


def test_a_transformer_of_other_latents_is_refused_before_weights_are_read(tmp_path):
    """It used to end in an error of PyTorch, once the first chunk was decoded."""
    hollow_release(tmp_path)
    sizes = WanConfig(256, 256, 2, 2, text_dim=32, in_channels=12, out_channels=12)
    write_hollow(shapes_of(sizes), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="makes latents of 12 channels, .* reads 16"):
        open_wan("", Source(str(tmp_path / "x.safetensors"), str(tmp_path)), None, "cpu", "auto")


@pytest.mark.parametrize(("size", "below", "above"), [
    ((850, 480), "848x480", "864x480"),
    ((480, 840), "480x832", "480x848"),
    ((850, 490), "848x480", "864x496"),
    ((8, 480), "16x480", "16x480"),
])  # fmt: skip
def test_other_sizes_are_refused_with_the_nearest_two(size, below, above):
    with pytest.raises(ConfigError, match=f"{size[0]}x{size[1]} will not do") as caught:
        open_wan("", Source(), size, "cpu", "auto")
    assert caught.value.mend == f"the nearest are {below} and {above}"


# Weights


def test_weights_are_read_from_one_file_several_or_a_pickle(tmp_path):
    state = {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    save_file(state, tmp_path / "all.safetensors")
    torch.save(state, tmp_path / "all.pth")
    torch.save({"state_dict": state}, tmp_path / "wrapped.pth")
    for name, value in state.items():
        save_file({name: value}, tmp_path / f"{name}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: f"{name}.safetensors" for name in state}}))
    for name in ("all.safetensors", "all.pth", "wrapped.pth", index.name):
        read = read_weights(tmp_path / name)
        assert read.keys() == state.keys()
        assert all(read[key].equal(value) and read[key].dtype == value.dtype for key, value in state.items())


@pytest.mark.parametrize(("content", "told"), [
    ([torch.ones(1)], "not a dict of tensors"),
    ({"generator": {"a": torch.ones(1)}}, "has none of state_dict, model: it holds generator"),
    ({"a": torch.ones(1, dtype=torch.int8)}, r"tensor a is torch.int8"),
])  # fmt: skip
def test_weights_of_another_kind_are_refused(tmp_path, content, told):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=told):
        read_weights(tmp_path / "w.pth")


def test_a_package_that_is_missing_is_named_with_the_way_to_get_it():
    with pytest.raises(UnavailableError, match="nowhere is not installed") as caught:
        extras.optional("nowhere.at.all", "wan")
    assert caught.value.mend == 'pip install "hforce[wan]"'
    assert caught.value.exit_code == 69
