"""The Wan2.1 backbone: which sizes it makes, and its parts put together."""

from __future__ import annotations

from hforce.errors import ConfigError
from hforce.geometry import Geometry
from hforce.models.base import Backbone, Codec, TextEncoder
from hforce.models.dit import CausalWan

SIZE = (832, 480)  # pixels, width and height the model was trained on
CELL = 8  # pixels a latent cell is wide and high
SPAN = 21  # latent frames the model was trained on


def assemble(
    name: str, model: CausalWan, text: TextEncoder, codec: Codec, size: tuple[int, int] | None, fingerprint: str
) -> Backbone:
    """A transformer and its parts, for videos of a size (width, height) in pixels; None: as it was trained.

    Raises ConfigError for a size that the model cannot make.
    """
    width, height = size or SIZE
    c = model.config
    check_size(width, height, CELL * c.patch[1])
    shape = (c.in_channels, height // CELL, width // CELL)
    geometry = Geometry(c.layers, c.heads, c.head_dim, (shape[1] // c.patch[1], shape[2] // c.patch[2]), span=SPAN)
    return Backbone(name, model, text, codec, geometry, shape, (width, height), fingerprint)


def check_size(width: int, height: int, step: int) -> None:
    """Raises ConfigError, naming the two nearest sizes, unless both sides are multiples of `step` pixels."""
    if min(width, height) >= step and not width % step and not height % step:
        return
    below, above = (
        "x".join(str(max(step, (side + add) // step * step)) for side in (width, height)) for add in (0, step - 1)
    )
    raise ConfigError(
        f"a size of {width}x{height} will not do: both sides must be multiples of {step}",
        f"the nearest are {below} and {above}",
    )
