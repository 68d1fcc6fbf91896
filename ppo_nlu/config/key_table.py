"""Every key of a config with its default, what it allows and what it means, from the dataclasses.

Type, default and limits come from the fields. The meaning is the comment that stands at the field:
on the lines right above it and behind its last line.
"""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import UnionType
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

import yaml

from ppo_nlu.config import METHOD_DEFAULTS, Config, defaults
from ppo_nlu.config.fields import Leaf, schema

SLIP = 1000  # a bound from here on only catches slips, so it is not listed
WORDS: dict[Any, str] = {
    bool: "true or false", int: "whole number", float: "number", str: "text",
    type(None): "null", list: "list", dict: "mapping",
}  # fmt: skip


@dataclass(frozen=True)
class Key:
    """One key: defaults as YAML writes them, words to choose from in backquotes."""

    name: str
    default: str
    by_method: dict[str, str]  # the default under methods that have another one
    allowed: str
    meaning: str


def sections() -> dict[str, tuple[str, list[Key]]]:
    """What each section is for, and its keys; "" holds the keys outside of a section."""
    kinds, said = get_type_hints(Config), meanings(Config)
    found: dict[str, tuple[str, list[Key]]] = {}
    for name, leaf in schema(Config).items():
        section = name.rpartition(".")[0]
        purpose = inspect.getdoc(kinds[section]) or "" if section else ""
        found.setdefault(section, (purpose, []))[1].append(_key(name, leaf, said[name]))
    return found


def _key(name: str, leaf: Leaf, comment: str) -> Key:
    lower = comment[1:2].islower()  # no acronym
    meaning = f"{comment[:1].lower() if lower else comment[:1]}{comment[1:]}".rstrip(".")
    other = {method: own[name] for method, own in METHOD_DEFAULTS.items() if name in own}
    by_method = {method: as_yaml(value) for method, value in other.items()}
    return Key(name, as_yaml(defaults()[name]), by_method, _allowed(leaf), meaning)


def as_yaml(value: Any) -> str:
    """A value on one line of YAML."""
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")


def meanings(cls: type, prefix: str = "") -> dict[str, str]:
    """The meaning of every dotted key."""
    kinds, said = get_type_hints(cls), comments(cls)
    found: dict[str, str] = {}
    for item in fields(cls):
        key, kind = prefix + item.name, kinds[item.name]
        inside = is_dataclass(kind)
        found |= meanings(cast(type, kind), f"{key}.") if inside else {key: said[item.name]}
    return found


def comments(cls: type) -> dict[str, str]:
    """The comment at each field of a dataclass."""
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    said = {t.start: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    behind = {line: text for (line, _), text in said.items()}
    own_line = {line for line, column in said if not source.splitlines()[line - 1][:column].strip()}
    found = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in own_line:
                first -= 1
            lines = [*range(first, node.lineno), node.end_lineno or first]
            found[node.target.id] = " ".join(behind[line] for line in lines if line in behind)
    return found


def _allowed(leaf: Leaf) -> str:
    """The type, and the limits where there are any."""
    if "choices" in leaf.limits:
        return ", ".join(f"`{choice}`" for choice in leaf.limits["choices"])
    return ", ".join([_type(leaf.kind), *_bounds(leaf.limits)])


def _type(kind: Any) -> str:
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_type(arm) for arm in get_args(kind))
    return WORDS.get(kind) or WORDS[get_origin(kind)]


def _bounds(limits: Mapping[str, Any]) -> Iterator[str]:
    """The ends of a range, but for those that only catch slips."""
    for end, inclusive, exclusive in (("min", "≥", ">"), ("max", "≤", "<")):
        bound = limits.get(end)
        if bound is not None and abs(bound) < SLIP:
            yield f"{exclusive if limits.get(f'exclusive_{end}') else inclusive} {bound:g}"
