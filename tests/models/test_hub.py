"""Paths and names on the hub: without a network."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hforce.errors import ConfigError, InputError, UnavailableError
from hforce.models.hub import HubId, pin, read_id, resolve

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


@pytest.mark.parametrize(("text", "expected"), [
    ("org/name", HubId("org/name")),
    ("org/name@v2", HubId("org/name", revision="v2")),
    ("org/name@refs/pr/1:sub/w.pt", HubId("org/name", "sub/w.pt", "refs/pr/1")),
    ("org/w.pt:w.pt", HubId("org/w.pt", "w.pt")),
    ("org/w.pt", None), ("huge", None), ("", None), ("org/name@:w.pt", None), ("a" * 5000, None),
])  # fmt: skip
def test_a_name_on_the_hub_reads_back(text, expected):
    assert read_id(text) == expected
    assert expected is None or str(expected) == text


def test_a_revision_goes_with_one_name_on_the_hub():
    assert read_id("org/name:w.pt", "v2") == read_id("org/name@v2:w.pt", "v2") == HubId("org/name", "w.pt", "v2")
    with pytest.raises(ConfigError, match="names one revision, v3 is another"):
        read_id("org/name@v2", "v3")
    with pytest.raises(ConfigError, match="goes with a name on the hub, not with w.pt"):
        read_id("w.pt", "v2")


def test_a_name_is_pinned_to_the_commit_that_was_found(cache):
    for text, revision in (("org/name:sub/w.pt", ""), ("org/name:sub/w.pt", "main"), ("org/name@main:sub/w.pt", "")):
        assert pin(text, revision, offline=True) == f"org/name@{COMMIT}:sub/w.pt"
    assert pin("org/name", offline=True) == f"org/name@{COMMIT}"
    assert pin("w.pt", offline=True) == "w.pt"


@pytest.mark.parametrize("switch", ["offline", "HF_HUB_OFFLINE"])
def test_offline_no_socket_is_opened(switch, cache, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr("socket.socket", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", switch == "HF_HUB_OFFLINE")
    offline = switch == "offline"
    assert resolve("org/name:sub/w.pt", offline=offline) == cache / "sub" / "w.pt"
    assert resolve("org/name", offline=offline) == cache
    with pytest.raises(UnavailableError, match="offline, and not in the cache"):
        resolve("org/name:other.pt", offline=offline)


def test_a_network_that_is_down_is_told_with_the_command(cache, monkeypatch):
    def unreachable(*_: object, **__: object) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr("socket.getaddrinfo", unreachable)
    monkeypatch.setattr("socket.socket.connect", unreachable)
    with pytest.raises(UnavailableError, match="cannot be had") as caught:
        resolve("org/name:other.pt")
    assert caught.value.mend == "with a network: hf download org/name other.pt"


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
