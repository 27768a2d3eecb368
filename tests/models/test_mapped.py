"""Weight files that are damaged, unsafe, or no weight files: refused with our own words, and nothing in them is run."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import zipfile
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.weightfiles import small_wan, wrapped, write, write_shards
from torch import Tensor
from torch.torch_version import TorchVersion

from hforce.errors import CheckpointError, DataError, HforceError, InputError, UnavailableError
from hforce.models.checkpoints import open_checkpoint
from hforce.models.mapped import open_weights

CUT_SHORT = "it was probably cut short: copy or download it again"


@cache
def weights() -> dict[str, Tensor]:
    return wrapped(small_wan(layers=1).state_dict())


@cache
def as_safetensors(folder: Path) -> bytes:
    return write(weights(), folder / "whole.safetensors").read_bytes()


@cache
def as_pickle() -> bytes:
    file = io.BytesIO()
    torch.save({"generator": weights()}, file)
    return file.getvalue()


def refusal(content: object, path: Path) -> CheckpointError:
    """Why a file with this content (bytes, or what is pickled) is refused, and by nothing of PyTorch's own words."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert caught.value.exit_code == 65
    assert str(path) in str(caught.value)
    assert "weights_only" not in f"{caught.value} {caught.value.mend}"
    return caught.value


@given(kept=st.floats(0, 0.9999))
def test_a_file_cut_anywhere_is_refused(kept, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    for data in (as_safetensors(folder), as_pickle()):
        error = refusal(data[: int(kept * len(data))], folder / "cut")
        assert error.mend == CUT_SHORT
        assert f"{int(kept * len(data))} bytes" in str(error)


@pytest.mark.parametrize("size", [2**62, 2**64 - 1, 2**31])
def test_a_header_of_absurd_size_is_refused_before_it_is_read(size, tmp_path):
    error = refusal(size.to_bytes(8, "little") + as_safetensors(tmp_path)[8:], tmp_path / "w.safetensors")
    assert error.mend == CUT_SHORT


@pytest.mark.parametrize(("field", "value"), [
    ("data_offsets", [0, 2**62]), ("data_offsets", [4, 12]), ("data_offsets", [8, 0]), ("data_offsets", [-8, 0]),
    ("data_offsets", [0]), ("dtype", "F99"), ("dtype", 7), ("shape", [-1]), ("shape", [2**40, 2**40]), ("shape", "x"),
])  # fmt: skip
def test_a_header_that_lies_is_refused(field, value, tmp_path):
    data = as_safetensors(tmp_path)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["model.head.head.bias"][field] = value
    text = json.dumps(header).encode()
    assert refusal(len(text).to_bytes(8, "little") + text + data[end:], tmp_path / "w.safetensors").mend == CUT_SHORT


@given(data=st.data())
def test_a_header_changed_anywhere_is_read_or_refused(data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    whole = bytearray(as_safetensors(folder))
    end = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, end - 1))] = data.draw(st.sampled_from(b'0123456789"{}[],:-.eF\0\xff'))
    path = folder / "changed"
    path.write_bytes(whole)
    try:
        list(open_checkpoint(path).state.values())
    except HforceError as error:
        assert str(path) in str(error)


@given(data=st.data())
def test_a_pickle_changed_anywhere_is_read_or_refused(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "changed.pt"
    with zipfile.ZipFile(io.BytesIO(as_pickle())) as old, zipfile.ZipFile(path, "w") as new:
        for part in old.infolist():
            content = bytearray(old.read(part))
            for _ in range(data.draw(st.integers(1, 3)) if part.filename.endswith("data.pkl") else 0):
                content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
            new.writestr(part.filename, bytes(content))
    try:
        list(open_checkpoint(path).state.values())
    except HforceError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(("content", "mend"), [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 34\n", "git lfs pull"),
    (b"<!DOCTYPE html><html><body>Not found</body></html>", "web page"),
    (b'{"error":"Repository not found"}', "what a server answered"),
    (b"GGUF\3\0\0\0" + b"\0" * 60, "get the safetensors"),
    (b"", "cut short"),
    (b"\0" * 100, "cut short"),
    (b"random bytes that mean nothing", "cut short"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_what_only_has_the_name_of_weights_is_recognised(content, mend, name, tmp_path):
    assert mend in refusal(content, tmp_path / name).mend


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_runs_something_is_refused_and_nothing_is_run(tmp_path):
    content = {"generator": weights(), "bomb": Bomb(tmp_path / "ran")}
    error = refusal(content, tmp_path / "w.pt")
    assert f"{os.system.__module__}.system" in str(error)
    assert "nothing in it was run" in str(error)
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    for name in ("old.pt", "bare.pt"):
        refusal((tmp_path / name).read_bytes(), tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_objects_beside_the_weights_are_named(tmp_path):
    content = {"generator": weights(), "args": argparse.Namespace(lr=1), "path": Path("x")}
    told = str(refusal(content, tmp_path / "w.pt"))
    assert "argparse.Namespace" in told
    assert "pathlib" in told


def test_what_is_a_list_of_steps_and_states_beside_the_weights_does_no_harm(tmp_path):
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    torch.save({"generator": weights(), "optimizer": optimizer, "step": 3, "name": "run"}, tmp_path / "w.pt")
    assert open_checkpoint(tmp_path / "w.pt").member == "generator"


def test_pickles_from_before_zip_files_are_refused_with_a_way_out(tmp_path):
    torch.save({"generator": weights()}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    error = refusal((tmp_path / "w.pt").read_bytes(), tmp_path / "w.pt")
    assert "before 1.6" in str(error)
    assert "save it again" in error.mend


def test_a_pickle_under_the_name_of_safetensors_is_refused_by_content(tmp_path):
    assert "ends in .pt" in refusal({"generator": weights()}, tmp_path / "w.safetensors").mend


def test_an_old_torch_opens_no_pickle(tmp_path, monkeypatch):
    torch.save({"generator": weights()}, tmp_path / "w.pt")
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.9.1+cu128"))
    with pytest.raises(UnavailableError, match=r"PyTorch 2\.9\.1") as caught:
        open_checkpoint(tmp_path / "w.pt")
    assert caught.value.exit_code == 69
    assert "2.10" in caught.value.mend
    save_file(weights(), tmp_path / "w.safetensors")
    assert open_checkpoint(tmp_path / "w.safetensors")


@pytest.mark.parametrize(("content", "told"), [
    ({"critic": {"a": torch.ones(1)}, "step": 3}, "none of generator_ema, generator, model: it holds critic"),
    ({"generator": {}, "step": 3}, "it holds generator"),
    ([torch.ones(1)], "holds a list"),
    ({"generator": {"a": 3}}, "a in generator is a int"),
    ({"generator": {"a": torch.ones(2).to_sparse()}}, "a in generator is a Tensor"),
    ({"generator": {5: torch.ones(2)}}, "5 in generator"),
    ({"generator": {"a": torch.ones(1).expand(10**12)}}, "tensor a is larger than"),
    ({"a": torch.ones(2), "b": "text"}, "b in its top level is a str"),
])  # fmt: skip
def test_pickles_of_something_else_are_refused(content, told, tmp_path):
    assert told in str(refusal(content, tmp_path / "w.pt"))


def test_zip_files_of_something_else_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "plain.pt", "w") as archive:
        archive.writestr("notes.txt", "hello")
    refusal((tmp_path / "plain.pt").read_bytes(), tmp_path / "plain.pt")
    with zipfile.ZipFile(io.BytesIO(as_pickle())) as old:
        for name, method in (("packed.pt", zipfile.ZIP_DEFLATED), ("script.pt", zipfile.ZIP_STORED)):
            with zipfile.ZipFile(tmp_path / name, "w", method) as new:
                for part in old.infolist():
                    new.writestr(part.filename, old.read(part))
                new.writestr("archive/constants.pkl", b"")
    assert "is compressed" in str(refusal((tmp_path / "packed.pt").read_bytes(), tmp_path / "packed.pt"))
    assert "TorchScript" in str(refusal((tmp_path / "script.pt").read_bytes(), tmp_path / "script.pt"))


# Folders


def test_a_missing_path_and_a_folder_without_weights_are_no_input(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    for path, told in ((tmp_path / "none", "there is no weight file"), (tmp_path, "no transformer in the folder")):
        with pytest.raises(InputError, match=told) as caught:
            open_checkpoint(path)
        assert caught.value.exit_code == 66
    assert "*.safetensors" in caught.value.mend


def test_of_several_files_one_has_to_be_named(tmp_path):
    for name in ("a.pt", "b.pt"):
        torch.save({"generator": weights()}, tmp_path / name)
    with pytest.raises(InputError, match=r"several weight files in the folder .*a\.pt, b\.pt"):
        open_checkpoint(tmp_path)
    write(weights(), tmp_path / "w.safetensors")
    (tmp_path / "._w.safetensors").write_bytes(b"what macOS leaves on a disk of others")
    assert open_checkpoint(tmp_path).member == ""


def test_a_folder_with_two_transformers_is_another_model(tmp_path):
    for name in ("transformer", "transformer_2"):
        write(weights(), tmp_path / name / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"it is Wan2\.2"):
        open_checkpoint(tmp_path)


INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHARD = "diffusion_pytorch_model-0000{}-of-00002.safetensors"


def test_a_shard_that_is_missing_or_cut_is_named(tmp_path):
    write_shards(weights(), tmp_path)
    second = tmp_path / SHARD.format(2)
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=second.name):
        open_checkpoint(tmp_path)
    second.unlink()
    with pytest.raises(InputError, match=f"1 of the 2 shards .* are missing: {second.name}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("change", ["drop", "move", "invent"])
def test_an_index_has_to_agree_with_its_shards(change, tmp_path):
    write_shards(weights(), tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    places = index["weight_map"]
    changed = {"drop": None, "move": SHARD.format(1), "invent": None}
    name = next(name for name, file in places.items() if file == SHARD.format(2))
    if change == "move":
        places[name] = changed[change]
    elif change == "drop":
        del places[name]
    else:
        name = "x.weight"
        places[name] = SHARD.format(1)
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"do not agree on [12] tensors: {name}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 10**5])
def test_an_index_that_is_none_is_refused(text, tmp_path):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(DataError, match=INDEX):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("file", ["../w.safetensors", "/etc/passwd", "..\\w.safetensors", "sub/w.safetensors", ".."])
def test_an_index_leads_nowhere_else(file, tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises((CheckpointError, InputError)):
        open_weights(tmp_path)
