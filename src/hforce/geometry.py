"""The numbers on which model and cache agree."""

from dataclasses import dataclass

from hforce.errors import ConfigError


@dataclass(frozen=True)
class Geometry:
    """Shape of a model as its cache sees it.

    Fields: `layers` L, `heads` H, `head_dim` D; `grid` (gh, gw) tokens of one latent frame; `chunk` F latent frames
    denoised together; `span` temporal positions, in latent frames, on which the base model was trained (21 for
    Wan2.1); `rope_theta` base of the rotary frequencies. Raises ConfigError where no such model can exist.
    """

    layers: int
    heads: int
    head_dim: int
    grid: tuple[int, int]
    chunk: int = 3
    span: int = 21
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        counts = (self.layers, self.heads, self.head_dim, *self.grid, self.chunk)
        if min(counts) < 1:
            raise ConfigError(f"a model needs at least one of everything, got {self}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; rotary positions need an even number")
        if self.span <= self.chunk:
            raise ConfigError(f"a span of {self.span} leaves no room for the past beside a chunk of {self.chunk}")

    @property
    def tokens(self) -> int:
        """S, the tokens of one latent frame."""
        return self.grid[0] * self.grid[1]
