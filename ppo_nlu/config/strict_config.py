"""Strict reading of YAML into any tree of frozen dataclasses, with `section.key=value` overrides.

Sections are nested dataclasses. A file states only what differs from the defaults. Every mistake is
a UserError of one line: where (the file and line, or "command line"), the dotted key, what is
wrong, how to mend it. Nothing here imports torch or knows a key by name; a dataclass may hold
`foreign_names`, {name elsewhere: keys of its own}, and `foreign_notes`, for its "did you mean";
and `foreign_absent`, {name elsewhere without such a key: what there is instead}.

Of YAML, what can hide or multiply values is not read: anchors and aliases, merges, tags, a second
document. A file holds at most `LARGEST` bytes, a text `LONGEST` characters, a list `MOST` items.
"""

from __future__ import annotations

import math
import re
import types
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from operator import attrgetter
from pathlib import Path
from reprlib import repr as short
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml

from ppo_nlu.errors import UserError, one_line
from ppo_nlu.storage.access import irregular
from ppo_nlu.storage.files import atomic_write_text

T = TypeVar("T")

COMMAND_LINE = "command line"
LARGEST, LONGEST, MOST = 1_000_000, 4096, 10_000
TEXT = "\t\n\r\x85"  # the control characters of ordinary text
Given = Mapping[str, tuple[str, Any]]  # {dotted key: (where it was said, value)}


# --- fields with limits ---------------------------------------------------------------------------


def number(
    default: Any,
    min: float | None = None,
    max: float | None = None,
    exclusive_min: bool = False,
    exclusive_max: bool = False,
) -> Any:
    """A field with a range; a bound counts as allowed unless it is called exclusive."""
    ends = {"min": min, "max": max, "exclusive_min": exclusive_min, "exclusive_max": exclusive_max}
    return field(default=default, metadata=ends)


def positive(default: Any, max: float | None = None) -> Any:
    """A field above 0."""
    return number(default, min=0, max=max, exclusive_min=True)


def count(default: int, min: int = 0) -> Any:
    """A field of so many things that no machine has more."""
    return number(default, min=min, max=10**9)


def share(default: Any) -> Any:
    """A field from 0 to 1, both allowed."""
    return number(default, min=0, max=1)


def below_one(default: Any) -> Any:
    """A field from 0 (allowed) to 1 (not allowed)."""
    return number(default, min=0, max=1, exclusive_max=True)


def long_text(default: Any) -> Any:
    """A field that takes pages of text."""
    return field(default=default, metadata={"longest": 100_000})


def one_of(default: str, *choices: str) -> Any:
    """A field that takes one of a few words."""
    return field(default=default, metadata={"choices": choices})


# --- what programs call ---------------------------------------------------------------------------


def load_dataclass(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """An instance of the dataclass `cls`, from a YAML file and overrides; of a key the last wins.

    Its `__post_init__` may raise UserError("section.key: what is wrong"); the place is put before.
    """
    return build(cls, given(cls, path, overrides), str(path))


def parse_overrides(overrides: Sequence[str], cls: type) -> dict[str, Any]:
    """`section.key=value` texts as {dotted key: YAML value}; of a repeated key the last wins."""
    found: dict[str, Any] = {}
    for text in overrides:
        found |= _override(cls, text)
    return found


def _override(cls: type, text: str) -> dict[str, Any]:
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not key:
        raise _error(COMMAND_LINE, short(text), "expected section.key=value, as in seed=3")
    tree, _ = _parse(value, lambda _: f"{COMMAND_LINE}: {key}")
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return dict(_flatten(cls, tree, lambda _: COMMAND_LINE))


def to_dict(cfg: Any) -> dict[str, Any]:
    """Nested plain values, sections in their order."""
    return asdict(cfg)


def values(cfg: Any) -> dict[str, Any]:
    """Every value by its dotted key; a mapping that is a value of its own stays one."""
    return {key: attrgetter(key)(cfg) for key in schema(cast(type, type(cfg)))}


def dump(cfg: Any) -> str:
    """YAML text with every value; loading it gives an equal configuration."""
    return yaml.safe_dump(to_dict(cfg), sort_keys=False, allow_unicode=True, width=1000)


def save_config(cfg: Any, path: str | Path) -> None:
    """Write `dump(cfg)`; whoever reads the file sees the old text or the new, never a part."""
    atomic_write_text(path, dump(cfg))


def diff(a: Any, b: Any, allowed: Collection[str] = ()) -> list[str]:
    """The dotted keys whose values differ, apart from the allowed ones (keys or whole sections)."""
    left, right = _leaves(to_dict(a)), _leaves(to_dict(b))
    missing = object()
    return [
        key
        for key in dict.fromkeys([*left, *right])
        if left.get(key, missing) != right.get(key, missing)
        and key not in allowed
        and key.partition(".")[0] not in allowed
    ]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        nested = isinstance(value, Mapping)
        found |= _leaves(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return found


# --- YAML, without its surprises ------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Plain words stay words: only true/false are booleans, and 1:30, 010, dates are text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # this class's own; the global one is untouched

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        problem = ""
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            problem = "anchors and aliases (&, *) are not read; write the value out"
        elif getattr(event, "tag", None) is not None:
            problem = f"tags such as {event.tag} are not read; write the plain value"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",  # no wider than PyYAML's own, so that what it writes as text is read as text
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+][0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first
    )

# 1e-5 has no dot, so YAML 1.1 calls it text; where a number is wanted it is one.
_EXPONENT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")


def _read_file(path: Path) -> tuple[Any, dict[str, int]]:
    """The value in a YAML file, and the line of each dotted key."""
    try:
        mode = path.stat().st_mode  # before opening: a pipe would wait, a device never end
        if kind := irregular(mode):
            raise _error(str(path), "", f"cannot be read: is {kind}; name a YAML file")
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise _error(str(path), "", f"is larger than {LARGEST:,} bytes, so it is no config")
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise _error(str(path), "", f"no such file; {_similar_file(path)}") from None
    except OSError as error:
        raise _error(str(path), "", f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise _error(str(path), "", "is not UTF-8 text; save it as UTF-8") from None
    except _Placed:
        raise
    except ValueError as error:  # a NUL in the path
        raise _error(str(path), "", f"is no path: {error}") from None
    tree, lines = _parse(text, lambda line: f"{path}:{line}" if line else str(path))
    if tree is not None and not isinstance(tree, dict):
        raise _error(str(path), "", "expected `key: value` lines at the top level")
    return tree or {}, lines


def _parse(text: str, place: Callable[[int], str]) -> tuple[Any, dict[str, int]]:
    """The value of a YAML text, and the line of each dotted key; `place` names a line (0: none)."""
    lines: dict[str, int] = {}
    mend = "check indentation, colons, quotes and brackets there"
    try:
        node = yaml.compose(text, Loader=_Loader)
        if isinstance(node, yaml.MappingNode):
            _note_lines(node, place, "", lines)
        return yaml.load(text, Loader=_Loader), lines
    except _Placed:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = min(mark.line + 1, len(text.splitlines())) if mark else 0  # the end is past the last
        raise _error(place(line), "", f"not valid YAML: {error.problem}; {mend}") from None
    except RecursionError:
        raise _error(place(0), "", f"not valid YAML: nested too deeply; {mend}") from None
    except (yaml.YAMLError, ValueError, OverflowError, LookupError, AttributeError) as error:
        raise _error(place(0), "", f"not valid YAML: {error}; {mend}") from None


def _note_lines(
    node: yaml.MappingNode, place: Callable[[int], str], prefix: str, lines: dict[str, int]
) -> None:
    """Note where each key stands; refuse a repeated one (PyYAML would let the last win)."""
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if key_node.tag != "tag:yaml.org,2002:str":
            name = short(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "a list"
            raise _error(place(line), "", f"{name} cannot be a key; keys are words")
        key = prefix + key_node.value
        if key in lines:
            again = f"is given twice (first on line {lines[key]}); keep one"
            raise _error(place(line), key, again)
        lines[key] = line
        if isinstance(value_node, yaml.MappingNode):
            _note_lines(value_node, place, f"{key}.", lines)


def _similar_file(path: Path) -> str:
    try:
        names = [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")]
    except OSError:
        names = []
    near = get_close_matches(path.name, names, n=1)
    return f"did you mean {path.with_name(near[0])}?" if near else "check the path"


# --- from plain values to dataclasses -------------------------------------------------------------


@dataclass(frozen=True)
class Leaf:
    """One key that takes a value: its type and its metadata."""

    kind: Any
    limits: Mapping[str, Any]


@cache
def schema(cls: Any, prefix: str = "") -> dict[str, Leaf]:
    """Every key of a tree of dataclasses, dotted, in order."""
    kinds = get_type_hints(cls)
    found: dict[str, Leaf] = {}
    for item in fields(cls):
        key, kind = prefix + item.name, kinds[item.name]
        leaf = {key: Leaf(kind, item.metadata)}
        found |= schema(cast(type, kind), f"{key}.") if is_dataclass(kind) else leaf
    return found


def given(cls: type, path: str | Path, overrides: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """{dotted key: (where it was said, value)} of the file and the overrides, keys checked."""
    tree, lines = _read_file(Path(path))

    def place(key: str) -> str:
        return f"{path}:{lines[key]}" if key in lines else str(path)

    found = {key: (place(key), value) for key, value in _flatten(cls, tree, place)}
    said = parse_overrides(overrides, cls)
    return found | {key: (COMMAND_LINE, value) for key, value in said.items()}


def _flatten(
    cls: Any, tree: Mapping[str, Any], place: Callable[[str], str], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a nested mapping; unknown keys and misused sections are errors."""
    known = schema(cls)
    for name, value in tree.items():
        key = f"{prefix}{name}"
        inside = [other for other in known if other.startswith(f"{key}.")]
        if key in known and "." not in str(name):
            yield key, value
        elif not inside or "." in str(name):
            raise _error(place(key), key, f"unknown key; {_nearest(cls, key, known)}")
        elif isinstance(value, Mapping):
            yield from _flatten(cls, value, place, f"{key}.")
        elif value is not None:  # an empty section is one with all its lines commented out
            mend = f"it is a section; set keys inside it, such as {inside[0]}"
            raise _error(place(key), key, f"got {short(value)}, but {mend}")


def _nearest(cls: Any, key: str, known: Collection[str]) -> str:
    """What was probably meant, or which keys there are."""
    section, _, name = key.lstrip("-").rpartition(".")
    if section and f"{section}.{name}" in known:
        return f"in a file, write `{name}:` indented under `{section}:`"
    if text := meant(cls, key):
        return text
    here = [other for other in known if other.rpartition(".")[0] == section]
    return f"known keys: {', '.join(here or known)}"


def meant(cls: Any, key: str) -> str:
    """Which key an unknown one probably stands for: the same name elsewhere or its name in other
    libraries, then a similar one here, then anywhere; "" where nothing is near."""
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


def build(cls: Any, said: Given, path: str) -> Any:
    """The instance; a problem found by a `__post_init__` gets the place of the key it names."""
    try:
        return _section(cls, said, path, "", None)
    except _Placed:
        raise
    except UserError as error:
        where = said.get(str(error).partition(":")[0], (path, None))[0]
        raise _Placed(f"{where}: {error}") from None


def _section(cls: Any, said: Given, path: str, prefix: str, base: Any) -> Any:
    """One dataclass of the tree; `base`, where there is one, holds what was not said."""
    kinds = get_type_hints(cls)
    values: dict[str, Any] = {}
    for item in fields(cls):
        key, kind = prefix + item.name, kinds[item.name]
        default = _default(item) if base is None else getattr(base, item.name)
        if is_dataclass(kind):
            start = None if default is MISSING else default
            values[item.name] = _section(kind, said, path, f"{key}.", start)
        elif key in said:
            where, value = said[key]
            values[item.name] = checked(Leaf(kind, item.metadata), value, where, key)
        elif default is MISSING:
            raise _error(path, key, f"is missing; add `{item.name}: ...`")
        else:
            values[item.name] = default
    return cls(**values)


def _default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def checked(leaf: Leaf, value: Any, where: str, key: str) -> Any:
    """The value in its field's type and within its limits."""
    try:
        value = _convert(leaf.kind, value)
    except TypeError:
        hint = _type_hint(leaf.kind, value, where, key)
        raise _error(
            where, key, f"expected {_describe(leaf.kind)}, got {_name(value)}{hint}"
        ) from None
    problem = _out_of_limits(leaf.limits, value)
    if problem:
        raise _error(where, key, f"{_name(value)} {problem}")
    return value


def _convert(kind: Any, value: Any) -> Any:
    """The value as that type, or TypeError; the only changes are to float, and in a mapping from
    a value to a list of texts (`Yes: 1` is `Yes: ["1"]`)."""
    if get_origin(kind) in (Union, types.UnionType):
        for arm in get_args(kind):
            try:
                return _convert(arm, value)
            except TypeError:
                continue
    elif get_origin(kind) is list and isinstance(value, list):
        return [_convert(get_args(kind)[0], item) for item in value]
    elif get_origin(kind) is dict and isinstance(value, dict):
        return {key: [_text(item) for item in _listed(items)] for key, items in value.items()}
    elif kind is float and not isinstance(value, bool):
        if isinstance(value, str) and _EXPONENT.fullmatch(value):
            value = float(value)
        if isinstance(value, int) and abs(value) < 1e300:
            value = float(value)
        if isinstance(value, float) and math.isfinite(value):
            return value
    elif kind is str and isinstance(value, str) and value.strip() and value != "None":
        return value
    elif kind in (bool, int, type(None)) and type(value) is kind:
        return value
    raise TypeError


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text(value: Any) -> str:
    """A scalar as the data files write it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    raise TypeError


def _describe(kind: Any) -> str:
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_describe(arm) for arm in get_args(kind))
    if get_origin(kind) is list:
        return f"a list of {_describe(get_args(kind)[0]).removeprefix('a ')}s"
    if get_origin(kind) is dict:
        return "a mapping of words to values"
    return {
        float: "a number",
        int: "a whole number",
        bool: "true or false",
        str: "a text",
        type(None): "null",
    }[kind]


def _type_hint(kind: Any, value: Any, where: str, key: str) -> str:
    """How to mend the commonest wrong types."""
    kinds = get_args(kind) or (kind,)
    number_like = _EXPONENT.fullmatch(value) if isinstance(value, str) else type(value) is not bool
    if value == "None" and type(None) in kinds:
        return "; write null"
    if str in kinds and isinstance(value, bool | int | float):
        quoted = f"'{key}=\"{_name(value)}\"'" if where == COMMAND_LINE else f"'{_name(value)}'"
        return f"; quote it: {quoted}"
    if float in kinds and isinstance(value, str | int | float) and number_like:
        return "; it must be finite"
    if bool in kinds and str(value).lower() in ("yes", "no", "on", "off"):
        return f"; write {'true' if str(value).lower() in ('yes', 'on') else 'false'}"
    return ""


def _name(value: Any) -> str:
    """A value as YAML writes it, shortened."""
    words = {True: "true", False: "false", None: "null"}
    return words[value] if value is None or isinstance(value, bool) else short(value)


def _out_of_limits(limits: Mapping[str, Any], value: Any) -> str:
    """What a value breaks of its field's metadata, and the mend; "" when nothing."""
    if value is None or isinstance(value, bool):
        return ""
    if problem := _too_long(value, limits.get("longest", LONGEST)):
        return problem
    if isinstance(value, list | dict):
        return ""
    if "choices" in limits and value not in limits["choices"]:
        near = get_close_matches(str(value), [str(c) for c in limits["choices"]], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"is not a choice; {hint}use {' or '.join(map(str, limits['choices']))}"
    low, high = limits.get("min"), limits.get("max")
    over = limits.get("exclusive_min", False)
    under = limits.get("exclusive_max", False)
    too_low = low is not None and (value <= low if over else value < low)
    too_high = high is not None and (value >= high if under else value > high)
    if not (too_low or too_high):
        return ""
    bounds = []
    if low is not None:
        bounds.append(f"more than {low}" if over else f"at least {low}")
    if high is not None:
        bounds.append(f"less than {high}" if under else f"at most {high}")
    return f"is out of range; it must be {' and '.join(bounds)}"


def _too_long(value: Any, longest: int) -> str:
    """What is wrong with the texts of a value: their length, or a character in them."""
    if isinstance(value, list | dict):
        if len(value) > MOST:
            return f"has {len(value):,} items; at most {MOST:,} are allowed"
        inside = value if isinstance(value, list) else [*value, *value.values()]
        return next(filter(None, (_too_long(item, longest) for item in inside)), "")
    if not isinstance(value, str):
        return ""
    if len(value) > longest:
        return f"has {len(value):,} characters; at most {longest:,} are allowed"
    # Cc: control characters; Cs: half of a character, which no file can hold.
    odd = next((c for c in value if unicodedata.category(c) in ("Cc", "Cs") and c not in TEXT), "")
    return f"holds the control character U+{ord(odd):04X}; leave it out" if odd else ""


class _Placed(UserError):
    """A UserError whose message already starts with the place."""


def _error(where: str, key: str, text: str) -> UserError:
    """`where: key: text` on one line."""
    parts = [part for part in (where, key, text) if part]
    return _Placed(one_line(": ".join(parts)))
