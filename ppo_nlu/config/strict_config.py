"""Strict reading of YAML into any tree of frozen dataclasses, with `section.key=value` overrides.

Sections are nested dataclasses. A file states only what differs from the defaults. Every mistake is
a UserError of one line: where (the file and line, or "command line"), the dotted key, what is
wrong, how to mend it. Nothing here imports torch or knows a key by name.

For its "did you mean" a dataclass may hold `foreign_names`, {name elsewhere: keys of its own},
`foreign_notes`, {name elsewhere: a remark}, and `foreign_absent`, {name elsewhere: what there is
instead of such a key}.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from operator import attrgetter
from pathlib import Path
from reprlib import repr as short
from typing import Any, TypeVar, cast, get_type_hints

import yaml

from ppo_nlu.config.checks import checked
from ppo_nlu.config.fields import Leaf, schema
from ppo_nlu.config.mistakes import COMMAND_LINE, Placed, mistake, nearest
from ppo_nlu.config.yaml_reader import parse, read_file
from ppo_nlu.errors import UserError

T = TypeVar("T")
Given = Mapping[str, tuple[str, Any]]  # {dotted key: (where it was said, value)}


def load_dataclass(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """An instance of the dataclass `cls`, from a YAML file and overrides, of which the last wins.

    Its `__post_init__` may raise UserError("section.key: what is wrong"), without the place.
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
        raise mistake(COMMAND_LINE, short(text), "expected section.key=value, as in seed=3")
    tree, _ = parse(value, lambda _: f"{COMMAND_LINE}: {key}")
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return dict(_flatten(cls, tree, lambda _: COMMAND_LINE))


def to_dict(cfg: Any) -> dict[str, Any]:
    """Nested plain values, sections in their order."""
    return asdict(cfg)


def values(cfg: Any) -> dict[str, Any]:
    """Every value by its dotted key; a value that is a mapping stays one."""
    return {key: attrgetter(key)(cfg) for key in schema(cast(type, type(cfg)))}


def dump(cfg: Any) -> str:
    """YAML text with every value; loading it gives an equal configuration."""
    return yaml.safe_dump(to_dict(cfg), sort_keys=False, allow_unicode=True, width=1000)


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


def given(cls: type, path: str | Path, overrides: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """{dotted key: (where it was said, value)} of the file and the overrides, keys checked."""
    tree, lines = read_file(Path(path))

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
            raise mistake(place(key), key, f"unknown key; {nearest(cls, key, known)}")
        elif isinstance(value, Mapping):
            yield from _flatten(cls, value, place, f"{key}.")
        elif value is not None:  # an empty section is one with all its lines commented out
            mend = f"it is a section; set keys inside it, such as {inside[0]}"
            raise mistake(place(key), key, f"got {short(value)}, but {mend}")


def build(cls: type[T], said: Given, path: str) -> T:
    """The instance; a problem found by a `__post_init__` gets the place of the key it names."""
    try:
        made: T = _section(cls, said, path, "", None)
        return made
    except Placed:
        raise
    except UserError as error:
        where = said.get(str(error).partition(":")[0], (path, None))[0]
        raise Placed(f"{where}: {error}") from None


def _section(cls: Any, said: Given, path: str, prefix: str, base: Any) -> Any:
    """One dataclass of the tree; `base` has the values of keys that were not given, if not None."""
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
            raise mistake(path, key, f"is missing; add `{item.name}: ...`")
        else:
            values[item.name] = default
    return cls(**values)


def _default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()
