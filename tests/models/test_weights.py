"""Weight files: what is read, what is refused and how it is told, and the fingerprint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.builders import random_wan
from torch import nn

from hforce.errors import CheckpointError, InputError
from hforce.models.dit import CausalWan
from hforce.models.weights import fingerprint, load_strictly, read_safetensors


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2, dtype=torch.float16)}, path, {"made": "here"})
    return path


def refusal(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_safetensors(path)
    assert caught.value.exit_code == 65
    assert str(path) in str(caught.value)
    return caught.value


def test_tensors_and_metadata_come_back(saved):
    state, metadata = read_safetensors(saved)
    assert state["a"].equal(torch.arange(12.0).reshape(3, 4))
    assert (state["b"].dtype, metadata) == (torch.float16, {"made": "here"})


def test_a_file_without_metadata_has_none(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "w.safetensors")
    assert read_safetensors(tmp_path / "w.safetensors")[1] == {}


def test_a_missing_file_and_a_folder_are_no_input(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(InputError, match="there is no weight file"):
            read_safetensors(path)


@given(kept=st.floats(0, 0.999))
def test_a_file_cut_anywhere_is_refused(tmp_path_factory, kept):
    path = tmp_path_factory.mktemp("cut") / "w.safetensors"
    save_file({"a": torch.ones(64), "b": torch.zeros(3)}, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    error = refusal(path)
    assert f"({int(kept * len(data))} bytes" in str(error)
    assert error.mend == "it was probably cut short: copy or download it again"


@pytest.mark.parametrize("header", [
    b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
    b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}',
    b'{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}',
    b'{"a":{"dtype":"F32","shape":[99],"data_offsets":[0,8]}}',
    b'{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}',
    b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4611686018427387904]}}',
    b"[[[[[[",
])  # fmt: skip
def test_a_header_that_lies_is_refused(tmp_path, header):
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 12)
    assert "is not a whole safetensors file" in str(refusal(path))


@pytest.mark.parametrize("size", [2**62, 2**64 - 1, 2**31])
def test_a_header_of_absurd_size_is_refused_before_it_is_read(saved, size):
    saved.write_bytes(size.to_bytes(8, "little") + saved.read_bytes()[8:])
    assert "is not a whole safetensors file" in str(refusal(saved))


@pytest.mark.parametrize(("content", "mend"), [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 34\n", "git lfs pull"),
    (b"<!DOCTYPE html><html><body>Not found</body></html>", "web page"),
    (b"PK\x03\x04" + b"\0" * 60, "pickle"),
    (b"", "cut short"),
])  # fmt: skip
def test_what_only_has_the_name_of_weights_is_recognised(tmp_path, content, mend):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    assert mend in refusal(path).mend


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_is_recognised_and_never_run(tmp_path, legacy):
    path = tmp_path / "w.safetensors"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=not legacy)
    assert "pickle" in refusal(path).mend


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
def test_numbers_that_are_no_plain_floats_are_named(tmp_path, dtype):
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.ones(2), "odd": torch.ones(2).to(dtype)}, path)
    error = refusal(path)
    assert f"tensor odd is {dtype}" in str(error)
    assert "convert it" in error.mend


# Loading


def linear() -> nn.Linear:
    return nn.Linear(2, 3)


def test_loading_takes_every_tensor():
    module, state = linear(), {"weight": torch.full((3, 2), 2.0), "bias": torch.full((3,), 5.0)}
    load_strictly(module, state, "w")
    assert module(torch.ones(2)).tolist() == [9.0] * 3


@pytest.mark.parametrize(("state", "told"), [
    ({"weight": torch.ones(3, 2)}, "1 missing (bias)"),
    ({"weight": torch.ones(3, 2), "bias": torch.ones(3), "scale": torch.ones(1)}, "1 unexpected (scale)"),
    ({"weight": torch.ones(2, 3), "bias": torch.ones(3)}, "1 of another shape (weight)"),
    ({"weight": torch.full((3, 2), torch.inf), "bias": torch.ones(3)}, "1 not finite (weight)"),
    ({"weight": torch.full((3, 2), torch.nan), "bias": torch.ones(3)}, "1 not finite (weight)"),
    ({f"x{i}": torch.ones(1) for i in range(9)}, "2 missing (bias, weight); 9 unexpected (x0, x1, x2, x3, x4)"),
])  # fmt: skip
def test_what_does_not_fit_is_counted_and_named_and_nothing_is_loaded(state, told):
    module = linear()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_strictly(module, state, "w.safetensors")
    assert str(caught.value) == f"w.safetensors does not fit the model: tensors {told}"
    assert all(value.equal(before[name]) for name, value in module.state_dict().items())


# Fingerprint


def changed(name: str) -> CausalWan:
    model = random_wan()
    dict(model.named_parameters())[name].data[0] += 1
    return model


def test_a_fingerprint_is_that_of_the_queries_and_keys():
    own = fingerprint(random_wan())
    assert own == fingerprint(random_wan())
    assert len(own) == 64
    assert own != fingerprint(random_wan(seed=1))
    for layer in (0, 1):
        for name in ("q", "k"):
            assert own != fingerprint(changed(f"blocks.{layer}.self_attn.{name}.weight"))
    assert own == fingerprint(changed("blocks.0.self_attn.v.weight"))
    assert own == fingerprint(changed("head.head.weight"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_fingerprint_does_not_depend_on_the_precision_of_the_file(dtype, tmp_path):
    model = random_wan().to(torch.bfloat16)
    own = fingerprint(model)
    save_file({name: value.to(dtype) for name, value in model.state_dict().items()}, tmp_path / "w.safetensors")
    other = random_wan(seed=5).to(dtype)
    load_strictly(other, load_file(tmp_path / "w.safetensors"), "w")
    assert fingerprint(other) == own
