"""Reads YAML without its surprises, and notes the line of each key.

It refuses what can hide or multiply values: anchors and aliases, merges, tags, a second document.
A file holds at most `LARGEST` bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from reprlib import repr as short
from typing import Any, cast

import yaml

from ppo_nlu.config.mistakes import Placed, mistake
from ppo_nlu.storage.access import irregular

LARGEST = 1_000_000


class _Loader(yaml.SafeLoader):
    """Plain words stay text: only true and false are booleans, and 1:30, 010 and dates are text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (its own; the global one stays)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = cast(Any, self).peek_event()  # PyYAML has no types for it
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


def read_file(path: Path) -> tuple[Any, dict[str, int]]:
    """The value in a YAML file, and the line of each dotted key."""
    try:
        mode = path.stat().st_mode  # before opening: a pipe would wait, a device would never end
        if kind := irregular(mode):
            raise mistake(str(path), "", f"cannot be read: is {kind}; name a YAML file")
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise mistake(str(path), "", f"is larger than {LARGEST:,} bytes, so it is not a config")
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise mistake(str(path), "", f"no such file; {_similar_file(path)}") from None
    except OSError as error:
        raise mistake(str(path), "", f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise mistake(str(path), "", "is not UTF-8 text; save it as UTF-8") from None
    except Placed:
        raise
    except ValueError as error:  # a NUL in the path
        raise mistake(str(path), "", f"is not a path: {error}") from None
    tree, lines = parse(text, lambda line: f"{path}:{line}" if line else str(path))
    if tree is not None and not isinstance(tree, dict):
        raise mistake(str(path), "", "expected `key: value` lines at the top level")
    return tree or {}, lines


def parse(text: str, place: Callable[[int], str]) -> tuple[Any, dict[str, int]]:
    """The value of a YAML text, and the line of each dotted key; `place` names a line (0: none)."""
    lines: dict[str, int] = {}
    mend = "check indentation, colons, quotes and brackets there"
    try:
        node = yaml.compose(text, Loader=_Loader)
        if isinstance(node, yaml.MappingNode):
            _note_lines(node, place, "", lines)
        return yaml.load(text, Loader=_Loader), lines
    except Placed:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = min(mark.line + 1, len(text.splitlines())) if mark else 0  # the end is past the last
        raise mistake(place(line), "", f"not valid YAML: {error.problem}; {mend}") from None
    except RecursionError:
        raise mistake(place(0), "", f"not valid YAML: nested too deeply; {mend}") from None
    except (yaml.YAMLError, ValueError, OverflowError, LookupError, AttributeError) as error:
        raise mistake(place(0), "", f"not valid YAML: {error}; {mend}") from None


def _note_lines(
    node: yaml.MappingNode, place: Callable[[int], str], prefix: str, lines: dict[str, int]
) -> None:
    """Note where each key stands; refuse a repeated one (PyYAML would let the last win)."""
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if key_node.tag != "tag:yaml.org,2002:str":
            name = short(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "a list"
            raise mistake(place(line), "", f"{name} cannot be a key; keys are words")
        key = prefix + key_node.value
        if key in lines:
            again = f"is given twice (first on line {lines[key]}); keep one"
            raise mistake(place(line), key, again)
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
