"""The table of releases: each line that can be recognised is, and docs/models.md says the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from hforce.models.families import FAMILIES, Facts, Family, recognise

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
EMA, BOTH = frozenset({"generator_ema"}), frozenset({"generator", "generator_ema"})
KNOWN = {family.name: family for family in FAMILIES}
CONTENT = [
    (Facts(EMA, "generator_ema", "model.", dim=1536), "self-forcing"),
    (Facts(BOTH | {"critic"}, "generator_ema", "model.", dim=1536), "self-forcing"),
    (Facts(BOTH, "generator_ema", "model.", dim=1536), "self-forcing-style"),
    (Facts(frozenset({"generator"}), "generator", "model.", dim=1536), "self-forcing-style"),
    (Facts(frozenset({"model"}), "model", dim=1536), "self-forcing-style"),
    (Facts(prefix="model.", dim=1536), "self-forcing-style"),
    (Facts(is_diffusers=True, dim=1536, class_name="CausalWanTransformer3DModel"), "self-forcing-style"),
    (Facts(prefix="model.", dim=5120), "krea-realtime-14b"),
    (Facts(frozenset({"generator"}), "generator", "model.", dim=5120), "self-forcing-style"),
    (Facts(frozenset({"generator"}), "generator", "model.", dim=1536, adapter="generator_lora"), "longlive"),
    (Facts(frozenset({"generator"}), "generator", "model.", dim=1536, adapter="base_model.model."), "longlive"),
    (Facts(EMA, "generator_ema", "model.", dim=1536, adapter="base_model.model."), "self-forcing"),
    (Facts(EMA, "generator_ema", "model.", dim=1536, adapter="diffusion_model."), "self-forcing"),
    (Facts(is_diffusers=True, dim=1536, class_name="WanTransformer3DModel"), "wan2.1-diffusers"),
    (Facts(dim=1536, class_name="WanModel"), "wan2.1"),
    (Facts(prefix="model.diffusion_model.", dim=5120), "wan2.1"),
]


@pytest.mark.parametrize(("facts", "name"), CONTENT)
def test_content_tells_the_family(facts, name):
    assert recognise(facts).name == name


def test_every_line_is_reached_or_says_what_it_is_taken_for():
    reached = {name for _, name in CONTENT}
    assert {family.name for family in FAMILIES if family.claims} == reached
    assert {family.taken_for for family in FAMILIES if not family.claims} <= reached
    assert [family.name for family in FAMILIES if bool(family.claims) == bool(family.taken_for)] == []
    assert len(KNOWN) == len(FAMILIES)


def test_what_cannot_be_told_gets_the_settings_of_self_forcing():
    plain = KNOWN["self-forcing"].recipe
    assert KNOWN["self-forcing-style"].recipe == plain
    assert (plain.steps, plain.warp, plain.shift, plain.chunk, plain.window) == ((1000, 750, 500, 250), True, 5.0, 3, 0)


def line(family: Family) -> str:
    """A family as a row of the table in docs/models.md."""
    told = family.told or f"cannot be told, taken for {family.taken_for}"
    own = family.recipe
    steps = " ".join(map(str, own.steps)) + ("" if own.warp else ", not warped")
    if own.first_steps:
        steps += f"; first chunk {' '.join(map(str, own.first_steps))}"
    memory = f"{own.window}, {own.sink}" if own.window else "all"
    cells = (family.name, told, family.prefix, steps, f"{own.shift:g}", str(own.chunk), memory, family.note)
    return f"| {' | '.join(cells)} |".replace("  ", " ")


def test_the_documentation_has_the_same_table():
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    start = next(number for number, text in enumerate(lines) if text.startswith("| release | recognised by"))
    expected = [line(family) for family in FAMILIES]
    assert lines[start + 2 : start + 2 + len(expected)] == expected
    assert not lines[start + 2 + len(expected)].startswith("|")
