"""Embeddings of prompts kept on disk: written whole, read back checked, made again when damaged."""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

log = logging.getLogger(__name__)

KIND = "hforce.text/1"


class EmbeddingStore:
    """Embeddings [n, dim] by key, each a file of its own in one folder; several runs may share it.

    What the disk does not take is kept in memory for as long as the store lives.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._unwritten: dict[str, Tensor] = {}

    def get(self, key: str) -> Tensor | None:
        """What was put under a key; None where nothing was, or (with a warning) where it has been damaged since."""
        path = self._path(key)
        try:
            return _read(path) if path.is_file() else self._unwritten.get(key)
        except (SafetensorError, OSError, ValueError) as error:
            log.warning("the kept embedding %s is damaged (%s); its prompt is encoded again", path, error)
            return self._unwritten.get(key)

    def put(self, key: str, rows: Tensor) -> None:
        """Keeps an embedding, contiguous and on the CPU, under a key, in place of what was there."""
        try:
            self._write(self._path(key), rows)
        except (SafetensorError, OSError, ValueError) as error:
            log.warning("cannot keep the embedding %s (%s); it is kept for this run alone", self._path(key), error)
            self._unwritten[key] = rows

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _write(self, path: Path, rows: Tensor) -> None:
        """A reader, or a crash, sees the old file, none, or the whole new one. Raises ValueError if it reads badly."""
        metadata = {"kind": KIND, "sha256": _digest(rows)}
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with draft.open("wb") as file:
                file.write(save({"rows": rows}, metadata))
                file.flush()
                os.fsync(file.fileno())
            _read(draft)
            draft.replace(path)
        finally:
            with suppress(OSError):  # it has got its name, or there was no room for it
                draft.unlink()


def _read(path: Path) -> Tensor:
    """Raises SafetensorError, OSError or ValueError unless the file is what was written."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("kind") != KIND or list(file.keys()) != ["rows"]:
            raise ValueError("it is no embedding of hforce")
        rows = file.get_tensor("rows").clone()
    if rows.dim() != 2 or _digest(rows) != metadata.get("sha256"):
        raise ValueError("its checksum does not fit")
    return rows


def _digest(rows: Tensor) -> str:
    return hashlib.sha256(rows.view(torch.uint8).numpy().tobytes()).hexdigest()
