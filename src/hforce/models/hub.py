"""Where weights are: a path, or the name of a repository on the Hugging Face hub that is fetched once."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from hforce.errors import InputError, UnavailableError

HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<file>[\w-][\w./ -]*))?")
FILES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".json")  # a name that ends so is a file, not a repository
WANTED = ["*.safetensors", "*.json", "*.pt", "*.pth", "*.model", "*.txt"]  # of a whole repository


def resolve(path_or_id: str, revision: str = "", offline: bool = False) -> Path:
    """The file or folder that is meant: a path that exists, or else `org/name` or `org/name:file` on the hub.

    What is on the hub is fetched into its cache, at `revision` (a commit, tag or branch) where one is given; with
    `offline` only the cache is looked into. Raises InputError for what is neither a path nor such a name,
    UnavailableError when it cannot be had.
    """
    path = Path(path_or_id).expanduser()
    if os.path.exists(path):  # noqa: PTH110 (Path.exists fails for what is too long to be a path)
        return path
    found = HUB_ID.fullmatch(path_or_id)
    if not found or ".." in path_or_id or (path.parent != Path() and path.parent.is_dir()):
        raise _absent(path_or_id)
    repo, file = found["repo"], found["file"] or ""
    if not file and repo.endswith(FILES):
        raise _absent(path_or_id)
    return _fetch(repo, file, revision, offline)


def _absent(path: str) -> InputError:
    mend = "check the path, or name a repository of the hub: org/name, or org/name:file"
    return InputError(f"there is no file or folder {path}", mend)


def _fetch(repo: str, file: str, revision: str, offline: bool) -> Path:
    try:
        from huggingface_hub import constants, hf_hub_download, snapshot_download
    except ImportError as error:
        message = f"{repo} is no path here, and fetching it from the hub needs huggingface_hub, which is not installed"
        raise UnavailableError(message, 'pip install "hforce[wan]"') from error
    pinned = revision or None
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
