"""The table of known releases: how each is recognised, and the recipe by which it streams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

WIDE = 5120  # dim of the 14B models
FOUR = (1000, 750, 500, 250)


@dataclass(frozen=True)
class Facts:
    """What the content of a weight file, and of an adapter given with it, tells about where they come from."""

    members: frozenset[str] = frozenset()  # named dicts in a .pt
    member: str = ""  # the one that was taken, "" for tensors on the top level
    prefix: str = ""  # what stood before the names
    is_diffusers: bool = False
    dim: int = 0
    class_name: str = ""  # in a config.json beside the weights
    adapter: str = ""  # the member taken from the adapter, or the prefix of its names; "" without one


@dataclass(frozen=True)
class Recipe:
    """How a release streams. The defaults are Self-Forcing's (arXiv 2506.08009).

    `steps` are timesteps in 0..1000, `first_steps` those of a shot's first chunk (none: the same), looked up in the
    schedule of `shift` where they are `warp`ed. `chunk` latent frames are denoised together. `window` counts the
    latent frames a chunk sees, itself included, 0 for all; `sink` of them stay for good.
    """

    steps: tuple[int, ...] = FOUR
    first_steps: tuple[int, ...] = ()
    warp: bool = True
    shift: float = 5.0
    chunk: int = 3
    window: int = 0
    sink: int = 0


SELF_FORCING = Recipe()


@dataclass(frozen=True)
class Family:
    """One line of the table.

    Of a line without `claims` nothing in the file tells: it is taken for the line `taken_for`, unless it is named.
    """

    name: str
    told: str  # how it is recognised
    prefix: str  # what its names begin with
    claims: Callable[[Facts], bool] | None = None
    taken_for: str = ""
    recipe: Recipe = SELF_FORCING
    note: str = ""


def _is_longlive(facts: Facts) -> bool:
    return facts.adapter == "generator_lora" or (facts.adapter == "base_model.model." and facts.member == "generator")


def _is_krea(facts: Facts) -> bool:
    return (facts.member, facts.prefix, facts.dim) == ("", "model.", WIDE)


def _is_self_forcing(facts: Facts) -> bool:
    return facts.member == "generator_ema" and ("generator" not in facts.members or "critic" in facts.members)


def _is_student(facts: Facts) -> bool:
    return bool(facts.member) or facts.prefix == "model." or facts.class_name.startswith("Causal")


FAMILIES: tuple[Family, ...] = (  # the first that claims a file has it; the last claims all
    Family(
        "longlive", "`generator`, with an adapter of PEFT's names or in `generator_lora`", "`model.`", _is_longlive,
        recipe=Recipe(window=12, sink=3),
    ),
    Family(
        "krea-realtime-14b", "no dict, names begin with `model.`, width 5120", "`model.`", _is_krea,
        recipe=Recipe(steps=(*FOUR, 0)),
        note="its own sampler computes the cache anew at every chunk, out of frames of the video",
    ),
    Family(
        "self-forcing", "`generator_ema` alone, or beside `generator` and `critic` where it was trained by oneself",
        "`model.`", _is_self_forcing, note="trained for 21 latent frames; its 10 s variant cannot be told from it",
    ),
    Family(
        "self-forcing-style", "any other `generator_ema`, `generator` or `model`; or else names that begin with "
        "`model.`, or a config.json with a class `Causal...`", "`model.`, or none", _is_student,
        note="which release it is cannot be told: it runs as Self-Forcing's unless `model.release` names another",
    ),
    Family(
        "causvid", "", "`model.`", taken_for="self-forcing-style",
        recipe=Recipe(steps=(1000, 757, 522), warp=False, shift=8.0),
    ),
    Family("causvid-4step", "", "`model.`", taken_for="self-forcing-style", recipe=Recipe(shift=8.0)),
    Family(
        "rolling-forcing", "", "`model.`", taken_for="self-forcing-style",
        recipe=Recipe(steps=(1000, 800, 600, 400, 200)),
        note="trained for a sampler of its own, with several chunks denoised together",
    ),
    Family("causal-forcing", "", "`model.`", taken_for="self-forcing-style", note="chunkwise"),
    Family("causal-forcing-framewise", "", "`model.`", taken_for="self-forcing-style", recipe=Recipe(chunk=1)),
    Family(
        "causal-forcing-2step", "", "`model.`", taken_for="self-forcing-style",
        recipe=Recipe(steps=(1000, 500), first_steps=FOUR, chunk=1),
    ),
    Family(
        "causal-forcing-1step", "", "`model.`", taken_for="self-forcing-style",
        recipe=Recipe(steps=(1000,), first_steps=FOUR, chunk=1),
    ),
    Family(
        "longlive-base", "", "`model.`", taken_for="self-forcing-style", recipe=Recipe(window=12, sink=3),
        note="an initialisation: give its lora.pt with it",
    ),
    Family(
        "wan2.1-diffusers", "Diffusers' names", "none", lambda facts: facts.is_diffusers,
        note="the base model streams badly, it needs 50 steps and guidance; a student saved so has the same names",
    ),
    Family(
        "wan2.1", "the release's names, in anything else", "none, `diffusion_model.` or `model.diffusion_model.`",
        lambda facts: True,
        note="the base model streams badly, it needs 50 steps and guidance; a student saved so has the same names",
    ),
)  # fmt: skip


def recognise(facts: Facts) -> Family:
    """The family a file belongs to by what it holds; its name and its size in bytes play no part."""
    return next(family for family in FAMILIES if family.claims and family.claims(facts))


def find_family(name: str) -> Family:
    """The line of the table that has this name. Raises KeyError."""
    return {family.name: family for family in FAMILIES}[name]
