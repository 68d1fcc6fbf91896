"""The tables of every config key in `configs/README.md`, made from the dataclasses of
`ppo_nlu.config`.

    python -m tests.config_table [--write]

Type, default and limits come from the fields. The meaning is the comment that stands at the field:
on the lines right above it and behind its last line. `--write` puts the tables between the two
markers of the document; without it they are printed.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import io
import sys
import textwrap
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from ppo_nlu.config import METHOD_DEFAULTS, PRESETS, Config, strict_config
from ppo_nlu.config.fields import Leaf, schema

DOCUMENT = Path(__file__).parents[1] / "configs" / "README.md"
BEGIN = "<!-- written by: python -m tests.config_table --write -->"
END = "<!-- end of what is written -->"
SLIP = 1000  # a bound from here on only catches slips, so it is not listed
WORDS = {
    bool: "true or false", int: "whole number", float: "number", str: "text",
    type(None): "null", list: "list", dict: "mapping",
}  # fmt: skip
HEAD = "| key | default | allowed | meaning |\n|---|---|---|---|\n"


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
            lines = [*range(first, node.lineno), node.end_lineno]
            found[node.target.id] = " ".join(behind[line] for line in lines if line in behind)
    return found


def meanings(cls: type, prefix: str = "") -> dict[str, str]:
    """The meaning of every dotted key."""
    kinds, said = get_type_hints(cls), comments(cls)
    found: dict[str, str] = {}
    for item in fields(cls):  # type: ignore[arg-type]
        key, kind = prefix + item.name, kinds[item.name]
        inner = meanings(kind, f"{key}.") if is_dataclass(kind) else {key: said[item.name]}
        found |= inner
    return found


def tables() -> str:
    """Markdown: the keys outside of a section, each section, and what the presets set."""
    return "\n\n".join([*_sections(), _method_defaults(), _presets()])


def _sections() -> Iterator[str]:
    sections: dict[str, list[str]] = {}
    for key in schema(Config):
        sections.setdefault(key.rpartition(".")[0], []).append(key)
    kinds, said = get_type_hints(Config), meanings(Config)
    for name, keys in sections.items():
        title = f"### {name}\n\n{inspect.getdoc(kinds[name])}" if name else "### No section"
        yield f"{title}\n\n{HEAD}" + "\n".join(_row(key, said[key]) for key in keys)


def _row(key: str, meaning: str) -> str:
    leaf = schema(Config)[key]
    allowed = _allowed(leaf).replace("<", "&lt;")
    lower = meaning[1:2].islower()  # no acronym
    said = f"{meaning[:1].lower() if lower else meaning[:1]}{meaning[1:]}".rstrip(".")
    said = said.replace("<", "&lt;").replace("|", "\\|")
    return f"| `{key}` | `{_default(key)}` | {allowed} | {said} |"


def _default(key: str) -> str:
    values = strict_config.values(Config(task="sst2")) | {"task": None}
    return _yaml(values[key])


def _yaml(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")


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


def _method_defaults() -> str:
    """A table of the keys whose default depends on the method."""
    keys = sorted({key for own in METHOD_DEFAULTS.values() for key in own})
    values = strict_config.values(Config(task="sst2"))
    rows = []
    for key in keys:
        own = [METHOD_DEFAULTS[method].get(key, values[key]) for method in METHOD_DEFAULTS]
        rows.append(f"| `{key}` | {' | '.join(f'`{_yaml(value)}`' for value in own)} |")
    head = f"| key | {' | '.join(f'`{method}`' for method in METHOD_DEFAULTS)} |"
    lines = [head, "|---" * (1 + len(METHOD_DEFAULTS)) + "|", *rows]
    return "### Defaults by method\n\n" + "\n".join(lines)


def _presets() -> str:
    """What each preset sets, apart from the one that sets nothing."""
    parts = []
    for name, own in PRESETS.items():
        said = ", ".join(f"`{key}: {_yaml(value)}`" for key, value in own.items())
        if said:
            parts.append(f"### ppo.preset: {name}\n\n" + "\n".join(textwrap.wrap(said, 118)))
    return "\n\n".join(parts)


def written(document: str) -> str:
    """The document with the tables between its markers."""
    before, _, rest = document.partition(BEGIN)
    _, marker, after = rest.partition(END)
    if not marker:
        raise ValueError(f"{DOCUMENT} lacks a marker: {BEGIN} or {END}")
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, or write them into the document."""
    parser = argparse.ArgumentParser("python -m tests.config_table", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write them into {DOCUMENT.name}")
    if parser.parse_args(argv).write:
        DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(tables())
    return 0


if __name__ == "__main__":
    sys.exit(main())
