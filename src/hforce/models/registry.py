"""Model name -> loader."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

import torch

from hforce.errors import ConfigError, UnavailableError
from hforce.models.base import Backbone, Loader, Source
from hforce.models.tiny import load_tiny
from hforce.models.wan import LARGE, SMALL, load_wan
from hforce.rules import nearest

PACKAGED = Source()  # weights that come with hforce, where there are any
MODELS: Mapping[str, Loader] = MappingProxyType({
    "tiny": load_tiny,
    "wan2.1": partial(load_wan, ""),  # whichever the checkpoint is
    SMALL: partial(load_wan, SMALL),
    LARGE: partial(load_wan, LARGE),
})


def load_backbone(
    name: str,
    source: Source = PACKAGED,
    size: tuple[int, int] | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Backbone:
    """A model by name. Raises ConfigError for an unknown one, UnavailableError for a device that is not there."""
    if name not in MODELS:
        raise ConfigError(f"unknown model {name!r}{nearest(name, MODELS)}", f"known models: {', '.join(MODELS)}")
    return MODELS[name](source, size, find_device(device), dtype)


def find_device(name: str) -> str:
    """A device that works: "auto" takes a GPU where there is one. Raises UnavailableError."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        found = torch.cuda.device_count()
        message = f"device {name!r} cannot be used here ({found} CUDA devices)"
        raise UnavailableError(message, "use --device cpu") from error
    return name
