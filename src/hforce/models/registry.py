"""Model name -> what opens it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

import torch

from hforce.errors import ConfigError, UnavailableError
from hforce.models.base import Backbone, Blueprint, Opener, Source
from hforce.models.tiny import open_tiny
from hforce.models.wan import LARGE, SMALL, open_wan

PACKAGED = Source()  # weights that come with hforce, where there are any
MODELS: Mapping[str, Opener] = MappingProxyType({
    "tiny": open_tiny,
    "wan2.1": partial(open_wan, ""),  # whichever the checkpoint is
    SMALL: partial(open_wan, SMALL),
    LARGE: partial(open_wan, LARGE),
})


def open_model(
    name: str,
    source: Source = PACKAGED,
    size: tuple[int, int] | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Blueprint:
    """A model by name, its weights not read.

    Raises ConfigError for an unknown one, UnavailableError for a device that is not there, and what its opener raises.
    """
    if name not in MODELS:
        raise ConfigError(f"unknown model {name!r}", f"known models: {', '.join(MODELS)}")
    return MODELS[name](source, size, find_device(device), dtype)


def load_backbone(
    name: str,
    source: Source = PACKAGED,
    size: tuple[int, int] | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Backbone:
    """A model by name, its weights read. Raises what `open_model` raises, and CheckpointError."""
    return open_model(name, source, size, device, dtype).load()


def find_device(name: str) -> str:
    """A device that works: "auto" takes a GPU where there is one. Raises UnavailableError."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        found = torch.cuda.device_count()
        message = f"device {name!r} cannot be used here ({found} CUDA devices)"
        raise UnavailableError(message, "use model.device=cpu") from error
    return name
