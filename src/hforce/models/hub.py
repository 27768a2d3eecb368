"""Where weights are: a path, or the name of a repository on the Hugging Face hub that is fetched once."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from hforce.errors import ConfigError, InputError, UnavailableError

HUB_ID = re.compile(
    r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>\w[\w./-]*))?(:(?P<file>[\w-][\w./ -]*))?"
)
FILES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".json")  # a name that ends so is a file, not a repository
WANTED = ["*.safetensors", "*.json", "*.pt", "*.pth", "*.model", "*.txt"]  # of a whole repository


@dataclass(frozen=True)
class HubId:
    """A repository on the hub, or one `file` of it, at a `revision` (a commit, tag or branch; "" for the newest)."""

    repo: str
    file: str = ""
    revision: str = ""

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "") + (f":{self.file}" if self.file else "")


def read_id(text: str, revision: str = "") -> HubId | None:
    """What `org/name`, `org/name:file` or either with `@revision` after the name means; None for all that is a path.

    A path is what exists, ends like a weight file, or lies in a folder that exists. Raises ConfigError when `revision`
    says another one than the text, or is said of a path.
    """
    path, found = Path(text).expanduser(), HUB_ID.fullmatch(text)
    is_there = os.path.exists(path)  # noqa: PTH110 (Path.exists fails for what is too long to be a path)
    is_path = is_there or not found or ".." in text or (path.parent != Path() and path.parent.is_dir())
    if is_path or not found or (not found["file"] and found["repo"].endswith(FILES)):
        if revision:
            raise ConfigError(f"revision {revision} goes with a name on the hub, not with {text or 'none'}")
        return None
    own = found["revision"] or ""
    if revision and own not in ("", revision):
        raise ConfigError(f"{text} names one revision, {revision} is another", "give one of them")
    return HubId(found["repo"], found["file"] or "", revision or own)


def resolve(path_or_id: str, revision: str = "", offline: bool = False) -> Path:
    """The file or folder that is meant: a path that exists, or else what `read_id` reads, on the hub.

    What is on the hub is fetched into its cache, at `revision` where one is given; with `offline` only the cache is
    looked into. Raises InputError for what is neither a path nor such a name, UnavailableError when it cannot be had.
    """
    found = read_id(path_or_id, revision)
    if found:
        return _fetch(found, offline)
    path = Path(path_or_id).expanduser()
    if os.path.exists(path):  # noqa: PTH110
        return path
    mend = "check the path, or name a repository of the hub: org/name, or org/name:file"
    raise InputError(f"there is no file or folder {path_or_id}", mend)


def pin(path_or_id: str, revision: str = "", offline: bool = False) -> str:
    """A name on the hub with the commit that it stands for now, which is fetched; what is no such name as it is.

    Raises what `read_id` and `resolve` raise.
    """
    found = read_id(path_or_id, revision)
    if not found:
        return path_or_id
    folder = _fetch(found, offline)  # .../snapshots/COMMIT, or the file in it
    for _ in Path(found.file).parts:
        folder = folder.parent
    return str(replace(found, revision=folder.name))


def _fetch(wanted: HubId, offline: bool) -> Path:
    try:
        from huggingface_hub import constants, hf_hub_download, snapshot_download
    except ImportError as error:
        message = f"{wanted.repo} is no path here, and fetching it needs huggingface_hub, which is not installed"
        raise UnavailableError(message, 'pip install "hforce[wan]"') from error
    repo, file, revision = wanted.repo, wanted.file, wanted.revision
    pinned, offline = revision or None, offline or constants.HF_HUB_OFFLINE
    try:
        if file:
            return Path(hf_hub_download(repo, file, revision=pinned, local_files_only=offline))
        return Path(snapshot_download(repo, revision=pinned, local_files_only=offline, allow_patterns=WANTED))
    except (OSError, ValueError) as error:
        absent = f"offline, and not in the cache {constants.HF_HUB_CACHE}"
        reason = absent if offline else str(error).strip().partition("\n")[0]
        what = f"{file or 'the files'} of {repo}" + (f" at {revision}" if revision else "")
        words = ["hf", "download", repo, file, *(["--revision", revision] if revision else [])]
        command = shlex.join(word for word in words if word)
        raise UnavailableError(f"{what} cannot be had: {reason}", f"with a network: {command}") from error
