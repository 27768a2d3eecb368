"""Model name -> what opens it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

import torch

from hforce.errors import ConfigError, UnavailableError
from hforce.models.base import Backbone, Blueprint, Opener, Source
from hforce.models.tiny import open_tiny
from hforce.models.wan import LARGE, SMALL, open_wan
from hforce.rules import nearest

log = logging.getLogger(__name__)

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

    Raises ConfigError for an unknown one, UnavailableError for a device that is not there or lacks the dtype, and what
    its opener raises.
    """
    if name not in MODELS:
        raise ConfigError(f"unknown model {name!r}{nearest(name, MODELS)}", f"known models: {', '.join(MODELS)}")
    place = find_device(device)
    return MODELS[name](source, size, place, choose_dtype(dtype, place, has_bfloat16(place)))


def load_backbone(
    name: str,
    source: Source = PACKAGED,
    size: tuple[int, int] | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Backbone:
    """A model by name, its weights read. Raises what `open_model` raises, and CheckpointError."""
    return open_model(name, source, size, device, dtype).load()


def find_device(name: str, mend: str = "use --device cpu") -> str:
    """A device that works: "auto" takes a GPU where there is one. Raises UnavailableError, with `mend`."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        found = torch.cuda.device_count()
        message = f"device {name!r} cannot be used here ({found} CUDA devices)"
        raise UnavailableError(message, mend) from error
    return name


def has_bfloat16(device: str) -> bool:
    """Whether a device computes in bfloat16; GPUs older than NVIDIA's Ampere only imitate it, slowly."""
    return torch.device(device).type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def choose_dtype(wanted: str, device: str, supported: bool) -> str:
    """The dtype name that a model is asked for, where bfloat16 is `supported` or not: then "auto" is float32.

    Raises UnavailableError where bfloat16 itself was wanted.
    """
    if supported or wanted not in ("auto", "bfloat16"):
        return wanted
    if wanted == "bfloat16":
        raise UnavailableError(f"device {device} does not compute in bfloat16", "use model.dtype=float32 or float16")
    log.warning("device %s does not compute in bfloat16: using float32; model.dtype=float16 takes less memory", device)
    return "float32"
