"""The tables of every config key in `configs/README.md`, made from the dataclasses of
`ppo_nlu.config`.

    python -m tests.config_table [--write]

What stands in them comes from `ppo_nlu.config.key_table`, as in `python -m ppo_nlu keys`. `--write`
puts the tables between the two markers of the document; without it they are printed.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from ppo_nlu.config import METHOD_DEFAULTS, PRESETS, defaults, key_table

DOCUMENT = Path(__file__).parents[1] / "configs" / "README.md"
BEGIN = "<!-- written by: python -m tests.config_table --write -->"
END = "<!-- end of what is written -->"
HEAD = "| key | default | allowed | meaning |\n|---|---|---|---|\n"


def tables() -> str:
    """Markdown: the keys outside of a section, each section, and what the presets set."""
    return "\n\n".join([*_sections(), _method_defaults(), _presets()])


def _sections() -> Iterator[str]:
    for name, (purpose, keys) in key_table.sections().items():
        title = f"### {name}\n\n{purpose}" if name else "### No section"
        yield f"{title}\n\n{HEAD}" + "\n".join(map(_row, keys))


def _row(key: key_table.Key) -> str:
    allowed = key.allowed.replace("<", "&lt;")
    said = key.meaning.replace("<", "&lt;").replace("|", "\\|")
    return f"| `{key.name}` | `{key.default}` | {allowed} | {said} |"


def _method_defaults() -> str:
    """A table of the keys whose default depends on the method."""
    keys = sorted({key for own in METHOD_DEFAULTS.values() for key in own})
    values = defaults()
    rows = []
    for key in keys:
        own = [METHOD_DEFAULTS[method].get(key, values[key]) for method in METHOD_DEFAULTS]
        rows.append(f"| `{key}` | {' | '.join(f'`{key_table.as_yaml(value)}`' for value in own)} |")
    head = f"| key | {' | '.join(f'`{method}`' for method in METHOD_DEFAULTS)} |"
    lines = [head, "|---" * (1 + len(METHOD_DEFAULTS)) + "|", *rows]
    return "### Defaults by method\n\n" + "\n".join(lines)


def _presets() -> str:
    """What each preset sets, apart from the one that sets nothing."""
    parts = []
    for name, own in PRESETS.items():
        said = ", ".join(f"`{key}: {key_table.as_yaml(value)}`" for key, value in own.items())
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
