"""The table of cache policies, and making one by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from hforce.cache.policies.anchor import Anchor
from hforce.cache.policies.full import Full
from hforce.cache.policies.local import Local
from hforce.cache.policies.memory import Memory
from hforce.cache.policies.sink import Sink
from hforce.cache.policies.window import Window
from hforce.cache.policy import CachePolicy
from hforce.errors import ConfigError

POLICIES: Mapping[str, type[CachePolicy]] = {
    "full": Full,
    "window": Window,
    "sink": Sink,
    "local": Local,
    "anchor": Anchor,
    "memory": Memory,
}


def make_policy(name: str, /, **options: Any) -> CachePolicy:
    """The policy called `name`, its defaults overridden by `options`.

    Raises ConfigError when the policy or an option does not exist, or an option has an impossible value.
    """
    if name not in POLICIES:
        raise ConfigError(f"unknown cache policy {name!r}{_nearest(name, POLICIES)}", mend=_known(POLICIES))
    legal = options_of(name)
    for option in options:
        if option not in legal:
            message = f"cache policy {name!r} has no option {option!r}{_nearest(option, legal)}"
            raise ConfigError(message, mend=_known(legal))
    if options.get("positions") is True:  # YAML's reading of the word
        options["positions"] = "true"
    return POLICIES[name](**options)


def options_of(name: str) -> list[str]:
    """The options that a policy has; none where there is no such policy."""
    return [option.name for option in fields(POLICIES[name])] if name in POLICIES else []


def fits(policy: CachePolicy, chunk: int, span: int, role: str = "<role>") -> None:
    """Check that all a policy may hold, and a chunk, have places of their own in the model's span (latent frames).

    `full` and the positions `true` are let through: they are the controls that leave the span on purpose.
    Raises ConfigError when they have not, or when the policy was made for chunks of another length.
    """
    name = next((known for known, kind in POLICIES.items() if type(policy) is kind), type(policy).__name__)
    if getattr(policy, "chunk", chunk) != chunk:
        raise ConfigError(
            f"policy {name!r} expects chunks of {getattr(policy, 'chunk', chunk)} frames, the model makes {chunk}",
            mend=f"set cache.{role}.options.chunk to {chunk}",
        )
    room = span - chunk
    if policy.capacity > room and policy.positions != "true" and not isinstance(policy, Full):
        raise ConfigError(
            f"policy {name!r} holds {policy.capacity} frames, but a chunk of {chunk} leaves room for {room} "
            f"in the model's span of {span}",
            mend=f"lower the frames in cache.{role}.options until they add up to {room} or less",
        )


def _nearest(name: str, names: Iterable[str]) -> str:
    found = get_close_matches(name, list(names), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def _known(names: Iterable[str]) -> str:
    return f"use one of: {', '.join(names)}"
