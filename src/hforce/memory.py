"""How much memory a run takes, from sizes alone, and which memory mode fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from hforce.attention.layout import MOST_TURNED
from hforce.attention.rope import rotary_pairs
from hforce.cache.heads import LOOK_EVERY
from hforce.errors import SMALLER, RoomError
from hforce.geometry import Geometry
from hforce.models.base import Needs
from hforce.models.dit import WanConfig, joins_gelu

GIB = 1 << 30
FLOAT = 4  # bytes of a float32: what norms and angles are computed in


class Mode(StrEnum):
    """What stays on the device when.

    SPEED: everything. BALANCED: the text encoder is let go of before the other weights are read. LOW: the
    autoencoder, too, is read for every chunk and let go of; beside a GPU, it works on the CPU.
    """

    SPEED = "speed"
    BALANCED = "balanced"
    LOW = "low"


@dataclass(frozen=True)
class Lane:
    """The heads of one role: how many in every layer, and the most frames of the past each holds.

    `looks` says whether their policy looks at pictures.
    """

    heads: tuple[int, ...]
    capacity: int
    looks: bool = False

    @property
    def looked(self) -> tuple[int, ...]:
        """The layers at which heads are looked at."""
        return tuple(layer for layer, n in enumerate(self.heads) if n)[::LOOK_EVERY] if self.looks else ()


@dataclass(frozen=True)
class Work:
    """What is made: by which transformer, computing in numbers of `itemsize` bytes, with which cache.

    `lanes` has the roles that occur; `pixels` are the numbers in the video frames of a chunk; `switches` says whether
    prompts change within a video, `here` is the type of the device. `turns_keys` says whether keys are turned in time
    as they are stored, which takes a second copy of what turns; where attention turns its queries, it does not.
    With `codec_apart` the autoencoder has a device of its own. `graphs` says whether passes are recorded, which gives
    the recorded ones memory and a prompt of their own.
    """

    config: WanConfig
    geometry: Geometry
    itemsize: int
    lanes: Mapping[str, Lane]
    needs: Needs
    pixels: int
    here: str = "cpu"
    switches: bool = False
    turns_keys: bool = True
    codec_apart: bool = False
    graphs: bool = False


@dataclass(frozen=True)
class Plan:
    """Bytes on the device, by part, in each phase of a run: "encoding", "denoising" and "decoding"."""

    mode: Mode
    phases: Mapping[str, Mapping[str, int]]

    def total(self, phase: str) -> int:
        """Of all parts in one phase."""
        return sum(self.phases[phase].values())

    @property
    def peak(self) -> int:
        """The most that is needed at once."""
        return max(map(self.total, self.phases))


def plan(work: Work, mode: Mode, text_here: bool = True) -> Plan:
    """What a run takes on its device. text_here: whether the text encoder runs there, and not beside a GPU."""
    n, stays = work.needs, mode is Mode.SPEED
    context = context_bytes(work.config, work.itemsize)
    text = {"text encoder": n.text} if text_here else {}
    codec, memory, pictures = {"autoencoder": n.codec}, {"decoder memory": n.decoder}, 3 * FLOAT * work.pixels
    transformer = {"transformer": n.transformer}
    base = transformer | {f"cache of {role} heads": size for role, size in kv_bytes(work).items()}
    base |= {"text context": context, "keys looked at": looked_bytes(work)} | (text if stays else {})
    if work.graphs:
        base |= {"recorded passes": pass_bytes(work) + context}
    denoising = base | {"work": max(pass_bytes(work), turning_bytes(work), context if work.switches else 0)}
    decoding = base | codec | memory | {"work": max(n.decoding, pictures)}
    if stays and work.here == "cuda":  # the next chunk is made while one is decoded
        decoding["work"] += denoising["work"]
    if work.codec_apart:
        decoding = denoising  # goes on meanwhile
    elif mode is Mode.LOW:
        denoising |= memory if work.here == "cpu" else {}
        decoding = decoding if work.here == "cpu" else base
    else:
        denoising |= codec | memory
    resident = transformer | ({} if work.codec_apart else codec) | text
    encoding = (resident if stays else text) | {"work": n.encoding if text_here else 0}
    return Plan(mode, {"encoding": encoding, "denoising": denoising, "decoding": decoding})


def choose(work: Work, wanted: str, available: int | None) -> Plan:
    """The plan of a mode, or with "auto" of the first that fits; of the last, where none does.

    Beside a GPU without the room for it, the text encoder runs on the CPU, unless everything is to stay on the device.
    `available` bytes on the device; None where that is not known.
    """
    modes = list(Mode) if wanted == "auto" else [Mode(wanted)]
    for mode in modes:
        made = plan(work, mode)
        if available is None or made.peak <= available:
            return made
        if work.here != "cpu" and mode is not Mode.SPEED and made.total("encoding") > available:
            made = plan(work, mode, text_here=False)
            if made.peak <= available:
                return made
    return made


def check(made: Plan, available: int | None) -> None:
    """Raises RoomError, naming every part, for a plan that needs more than is available."""
    if available is None or made.peak <= available:
        return
    phase = max(made.phases, key=made.total)
    parts = ", ".join(f"{part} {gib(size)}" for part, size in made.phases[phase].items() if size)
    other = "" if made.mode is Mode.LOW else ", or --memory-mode auto"
    raise RoomError(
        f"{phase} needs {gib(made.peak)} GiB of memory ({parts}), but {gib(available)} GiB are available",
        f"{SMALLER}{other}; --dry-run shows the whole plan",
    )


def gib(size: int) -> str:
    """Bytes in GiB, as people read them."""
    return f"{size / GIB:.2f}" if size >= GIB else f"{size / GIB:.4f}"


def kv_bytes(work: Work) -> dict[str, int]:
    """Bytes of the cache of every role, as `HeadCache` allocates it."""
    g = work.geometry
    past = 2 * rotary_pairs(g.head_dim)[0] if work.turns_keys else 0  # what turns in time is kept a second time
    token = {
        role: 2 * (g.chunk + lane.capacity) * g.head_dim + lane.capacity * past for role, lane in work.lanes.items()
    }
    return {role: sum(work.lanes[role].heads) * g.tokens * token[role] * work.itemsize for role in token}


def context_bytes(config: WanConfig, itemsize: int) -> int:
    """A prompt as the model reads it: keys and values of every layer."""
    return 2 * config.layers * config.text_len * config.dim * itemsize


def looked_bytes(work: Work) -> int:
    """Keys of the last pass, which stay for the policies that look at pictures: of the heads that are looked at."""
    g, lanes = work.geometry, work.lanes.values()
    heads = sum(lane.heads[layer] for lane in lanes for layer in lane.looked)
    return heads * g.chunk * g.tokens * g.head_dim * work.itemsize


def turning_bytes(work: Work) -> int:
    """What `HeadCache.advance` adds at most: keys that are turned or moved at once, or those that are looked at."""
    g, lanes = work.geometry, work.lanes.values()
    past = g.tokens * (2 * rotary_pairs(g.head_dim)[0] if work.turns_keys else 0)
    turned = max(max(min(sum(lane.heads) * lane.capacity * past, MOST_TURNED), lane.capacity * past) for lane in lanes)
    moved = 3 * max(sum(lane.heads) for lane in lanes) * g.tokens * g.head_dim * work.itemsize
    looked = max(sum(lane.heads[layer] for layer in lane.looked) for lane in lanes)
    looks = 2 * FLOAT * looked * g.chunk * g.tokens * g.head_dim
    return max(turned * (2 if work.itemsize == FLOAT else 3) * FLOAT, moved, looks)


def pass_bytes(work: Work) -> int:
    """What one pass of the transformer adds at most, above the weights, the cache and the text context.

    Counted in a block, in each place where most is alive: the tokens `x` that it was given, what it made of them until
    then, and modulations, alike for all frames: seven of the model, and in the block's second half four of its own.
    """
    x, c, g = _tokens(work), work.config, work.geometry
    tokens = g.chunk * g.tokens
    as_float = 0 if work.itemsize == FLOAT else tokens * c.dim * FLOAT
    inner = tokens * c.ffn_dim * work.itemsize
    calls = min(2, len({lane.capacity for lane in work.lanes.values()}))  # of several, the results are joined
    modulation = c.dim * work.itemsize
    wide = 3 if work.here == "cpu" and not as_float else 2  # see `dit.Gelu`
    if wide == 3 and joins_gelu():
        wide = 1
    return 7 * modulation + max(
        6 * x + 2 * as_float + (x if as_float else tokens * c.dim * FLOAT),  # turning keys
        (6 + calls) * x + tokens * c.heads * FLOAT,  # attention
        4 * modulation + (5 * x + 3 * as_float if as_float else 7 * x) + tokens * FLOAT,  # norm of queries to the text
        4 * modulation + max(4 * x + inner * wide, 5 * x + inner),  # feed-forward
    )


def _tokens(work: Work) -> int:
    """Bytes of the tokens of a chunk, [N, dim]."""
    return work.geometry.chunk * work.geometry.tokens * work.config.dim * work.itemsize
