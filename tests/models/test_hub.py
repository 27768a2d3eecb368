"""Paths and names on the hub: without a network."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hforce.errors import InputError, UnavailableError
from hforce.models.hub import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_path_that_exists_always_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "w.pt").write_bytes(b"x")
    assert resolve("org/name") == Path("org/name")
    assert resolve(str(tmp_path / "w.pt"), offline=True) == tmp_path / "w.pt"


@pytest.mark.parametrize("path", [
    "none.pt", "weights/none.pt", "a/b.safetensors", "./org/name", "/org/name", "a/b/c", "org/", "org/..",
    "org/name:../secret", "here/name", "here/name:w.pt", "https://huggingface.co/org/name", "org/name:",
])  # fmt: skip
def test_what_can_only_be_a_path_is_never_looked_for_elsewhere(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    (tmp_path / "here").mkdir()
    with pytest.raises(InputError, match="there is no file or folder") as caught:
        resolve(path)
    assert caught.value.exit_code == 66


@pytest.mark.parametrize("name", ["org/name", "org/name:w.pt", "org/Wan2.1-T2V-1.3B:sub/w.safetensors"])
def test_without_the_package_it_is_said_how_to_get_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UnavailableError, match="needs huggingface_hub") as caught:
        resolve(name)
    assert caught.value.exit_code == 69
    assert caught.value.mend == 'pip install "hforce[wan]"'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's own cache with one file of one commit in it, which `main` is."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repo = tmp_path / "cache" / "models--org--name"
    (repo / "snapshots" / COMMIT / "sub").mkdir(parents=True)
    (repo / "snapshots" / COMMIT / "sub" / "w.pt").write_bytes(b"x")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return repo / "snapshots" / COMMIT


@pytest.mark.parametrize("revision", ["", "main", COMMIT])
def test_what_is_cached_is_found_offline(revision, cache):
    assert resolve("org/name:sub/w.pt", revision, offline=True) == cache / "sub" / "w.pt"
    assert resolve("org/name", revision, offline=True) == cache


@pytest.mark.parametrize(("name", "revision", "command"), [
    ("org/name:other.pt", "", "hf download org/name other.pt"),
    ("org/name:sub/w.pt", "v2", "hf download org/name sub/w.pt --revision v2"),
    ("org/other", "", "hf download org/other"),
    ("org/other:a b.pt", "", "hf download org/other 'a b.pt'"),
])  # fmt: skip
def test_offline_it_is_said_what_is_missing_and_how_to_fetch_it(name, revision, command, cache):
    with pytest.raises(UnavailableError, match="offline, and not in the cache") as caught:
        resolve(name, revision, offline=True)
    assert caught.value.exit_code == 69
    assert caught.value.mend.endswith(command)
    assert all(part in str(caught.value) for part in (*name.split(":"), revision))
