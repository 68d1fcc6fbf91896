"""Messages about mistakes in a config: where one is, and what was probably meant."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from ppo_nlu.config.fields import schema
from ppo_nlu.errors import UserError, one_line

COMMAND_LINE = "command line"


class Placed(UserError):
    """A UserError whose message already starts with the place."""


def mistake(where: str, key: str, text: str) -> UserError:
    """`where: key: text` on one line."""
    parts = [part for part in (where, key, text) if part]
    return Placed(one_line(": ".join(parts)))


def nearest(cls: Any, key: str, known: Collection[str]) -> str:
    """A hint: the key that was probably meant, else the keys of its section."""
    section, _, name = key.lstrip("-").rpartition(".")
    if section and f"{section}.{name}" in known:
        return f"in a file, write `{name}:` indented under `{section}:`"
    if text := meant(cls, key):
        return text
    here = [other for other in known if other.rpartition(".")[0] == section]
    return f"known keys: {', '.join(here or known)}"


def meant(cls: Any, key: str) -> str:
    """Which key an unknown one probably stands for; "" where nothing is near.

    First come the near misses of a table, then the same name in another section and the name that
    other libraries have for it, then a similar name in this section, then one anywhere.
    """
    known = schema(cls)
    if key in known:
        return f"write {key}=value"
    section, _, name = key.lstrip("-").rpartition(".")
    if absent := getattr(cls, "foreign_absent", {}).get(name.lower()):
        return f"there is no such thing here: {absent}"
    foreign: Mapping[str, Sequence[str]] = getattr(cls, "foreign_names", {})
    parts = [(*other.rpartition(".")[::2], other) for other in known]  # (section, name, dotted)
    here = {own: other for where, own, other in parts if where == section}
    names = {own: other for _, own, other in parts}
    near = list(getattr(cls, "near_misses", {}).get(key.lstrip("-").lower(), ()))
    if not near:
        near = [other for _, own, other in parts if own == name]
        near += [other for other in foreign.get(name.lower(), ()) if other not in near]
    near = near or [here[own] for own in get_close_matches(name, here, n=1)]
    near = near or [names[own] for own in get_close_matches(name, names, n=1)]
    near = near or _sections_like(key, known) * (not section)
    for similar in [] if near else get_close_matches(name.lower(), foreign, n=1):
        near = list(foreign[similar])
    if not near:
        return ""
    own_section = [other for other in near if section and other.startswith(f"{section}.")]
    note = getattr(cls, "foreign_notes", {}).get(name.lower())
    return f"did you mean {' or '.join(own_section or near)}?" + (f" ({note})" if note else "")


def _sections_like(key: str, known: Collection[str]) -> list[str]:
    sections = dict.fromkeys(other.rpartition(".")[0] for other in known if "." in other)
    return get_close_matches(key, sections, n=1)
