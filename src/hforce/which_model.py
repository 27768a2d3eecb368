"""Which model -m means: a preset by its name, or weights by what is in them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from hforce.models.hub import read_id
from hforce.resources import presets

DEFAULT, FAMILY = "tiny", "wan2.1"
WEIGHT_FILES = (".safetensors", ".pt", ".pth")
LONGEST_HEADER = 1 << 26  # bytes
TINY = {"dit", "codec"}  # what the metadata of a tiny model holds


def which_model(told: str) -> tuple[str, str, str]:
    """What -m says -> preset, model.name and model.checkpoint; "" for what is left to the preset and the settings.

    A file is told by its content: what is there and no tiny model counts as Wan2.1's, and is checked when it is loaded;
    so does a name on the hub.
    It leaves the name to the preset, so that a configuration which names a model is held to it.
    """
    if told in presets():
        return told, told, ""
    if os.path.exists(told):  # noqa: PTH110 (Path.exists fails for what is too long to be a path)
        return DEFAULT if is_tiny(Path(told)) else FAMILY, "", told
    if read_id(told):
        return FAMILY, "", told
    is_path = told.endswith(WEIGHT_FILES) or os.sep in told
    return DEFAULT, "" if is_path else told, told if is_path else ""


def is_tiny(path: Path) -> bool:
    """Whether a file is safetensors whose header says the sizes of a tiny model. Imports nothing heavy."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < LONGEST_HEADER else {}
    except (OSError, ValueError, RecursionError):
        return False
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return isinstance(metadata, dict) and metadata.keys() >= TINY
