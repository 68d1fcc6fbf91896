"""A document of headings, texts, tables and figures, as one HTML page or as Markdown."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

# --- the parts of a document ----------------------------------------------------------------------


@dataclass(frozen=True)
class Heading:
    """A title; level 1 is that of the document."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph; **bold** and `code` are understood."""

    text: str
    strong: bool = False  # the answer to a question, set apart


@dataclass(frozen=True)
class Items:
    """A list of lines."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Group:
    """Rows under one title; `foreign` marks numbers that are not ours."""

    title: str
    rows: Sequence[Sequence[str]]
    foreign: bool = False


@dataclass(frozen=True)
class Table:
    """A table with one head and one or several groups of rows."""

    head: Sequence[str]
    groups: Sequence[Group]
    words: int = 1  # so many columns at the left hold words, the others numbers


@dataclass(frozen=True)
class Folded:
    """Parts that the reader can unfold."""

    title: str
    parts: Sequence[Part] = field(default_factory=tuple)


@dataclass(frozen=True)
class Figure:
    """A drawn figure: its file name, what it shows, and how to read it."""

    name: str
    title: str
    caption: str
    png: bytes


Part = Heading | Text | Items | Table | Figure | Folded


# --- as HTML ------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --ink: #1f2937; --soft: #5b6472; --line: #d8dce2;
  --paper: #ffffff; --tint: #f3f5f8; --foreign: #fbf5e6; --mark: #2563eb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e7eb; --soft: #a3acb9; --line: #3a4250;
  --paper: #15181d; --tint: #1e232b; --foreign: #2b2618; --mark: #7aa5ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2.2rem 1.2rem 4rem; }
p, ul { max-width: 46rem; } li { margin: .25rem 0; overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.35rem; margin: 2.6rem 0 .7rem; padding-top: .9rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
code { font: .88em/1.4 ui-monospace, "SF Mono", Menlo, Consolas, monospace; background: var(--tint);
  padding: .1em .35em; border-radius: 4px; overflow-wrap: anywhere; }
.answer { border-left: 4px solid var(--mark); background: var(--tint); padding: .7rem 1rem;
  border-radius: 0 6px 6px 0; }
.scroll { overflow-x: auto; margin: 1rem 0; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .84rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .7rem; text-align: right; white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; color: var(--soft); background: var(--tint);
  white-space: normal; min-width: 4.6rem; line-height: 1.3; }
th.word, td.word { text-align: left; white-space: nowrap; }
tbody td, tr.group th { border-top: 1px solid var(--line); }
tbody tr.same td { border-top-color: transparent; }
tr.group th { text-align: left; white-space: normal; padding-top: .6rem; color: var(--ink); }
tr.group th span { position: sticky; left: .7rem; }
tbody.foreign td, tbody.foreign tr.group th { background: var(--foreign); }
td:first-child, thead th:first-child { position: sticky; left: 0; background: var(--paper); }
thead th:first-child { background: var(--tint); }
.sd { color: var(--soft); font-size: .92em; }
details { margin: 1rem 0; } summary { cursor: pointer; font-weight: 600; }
figure { margin: 1.4rem 0; background: #ffffff; border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem; }
figure div { overflow-x: auto; }
figure img { display: block; width: 100%; min-width: 640px; height: auto; }
figcaption { color: #4b5563; font-size: .88rem; padding: .6rem .4rem 0; }
figcaption b { color: #1f2937; }
"""


def inline(text: str) -> str:
    """Escaped text with **bold** and `code`."""
    text = html.escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)


def to_html(title: str, parts: Sequence[Part]) -> str:
    """One page that needs no other file."""
    body = "\n".join(html_part(part) for part in parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{html.escape(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def html_part(part: Part) -> str:
    """One part as HTML."""
    if isinstance(part, Heading):
        return f"<h{part.level}>{inline(part.text)}</h{part.level}>"
    if isinstance(part, Text):
        mark = ' class="answer"' if part.strong else ""
        return f"<p{mark}>{inline(part.text)}</p>"
    if isinstance(part, Items):
        return f"<ul>{''.join(f'<li>{inline(text)}</li>' for text in part.texts)}</ul>"
    if isinstance(part, Folded):
        inner = "\n".join(html_part(each) for each in part.parts)
        return f"<details><summary>{inline(part.title)}</summary>\n{inner}\n</details>"
    if isinstance(part, Figure):
        data = base64.b64encode(part.png).decode()
        return (
            f'<figure><div><img alt="{html.escape(part.title)}" '
            f'src="data:image/png;base64,{data}"></div>'
            f"<figcaption><b>{inline(part.title)}.</b> {inline(part.caption)}</figcaption></figure>"
        )
    return html_table(part)


def html_table(table: Table) -> str:
    """A table that scrolls by itself; a first cell that repeats is shown once."""

    def cell(tag: str, place: int, text: str) -> str:
        mark = ' class="word"' if place < table.words else ""
        shown = re.sub(r"(± [\d.]+|\[[^\]]*\])", r'<span class="sd">\1</span>', inline(text))
        return f"<{tag}{mark}>{shown}</{tag}>"

    head = "".join(cell("th", place, text) for place, text in enumerate(table.head))
    bodies = []
    for group in table.groups:
        lines, before = [], ""
        if group.title:
            width = len(table.head)
            title = f"<span>{inline(group.title)}</span>"
            lines.append(f'<tr class="group"><th colspan="{width}">{title}</th></tr>')
        for row in group.rows:
            same = bool(row) and row[0] == before and table.words > 1
            before = row[0]
            cells = ["" if same else row[0], *row[1:]]
            inner = "".join(cell("td", place, text) for place, text in enumerate(cells))
            mark = ' class="same"' if same else ""
            lines.append(f"<tr{mark}>{inner}</tr>")
        foreign = ' class="foreign"' if group.foreign else ""
        bodies.append(f"<tbody{foreign}>{''.join(lines)}</tbody>")
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>{"".join(bodies)}</table></div>'
    )


# --- as Markdown --------------------------------------------------------------------------------


def to_markdown(title: str, parts: Sequence[Part]) -> str:
    """The same as text; figures are files beside it."""
    return "\n\n".join([f"# {title}", *(markdown_part(part) for part in parts)]) + "\n"


def markdown_part(part: Part) -> str:
    """One part as Markdown."""
    if isinstance(part, Heading):
        return f"{'#' * part.level} {part.text}"
    if isinstance(part, Text):
        return f"> {part.text}" if part.strong else part.text
    if isinstance(part, Items):
        return "\n".join(f"- {text}" for text in part.texts)
    if isinstance(part, Folded):
        inner = "\n\n".join(markdown_part(each) for each in part.parts)
        return f"<details><summary>{html.escape(part.title)}</summary>\n\n{inner}\n\n</details>"
    if isinstance(part, Figure):
        return f"![{part.title}](report_files/{part.name}.png)\n\n*{part.title}.* {part.caption}"
    return "\n\n".join(_markdown_group(part, group) for group in part.groups)


def _markdown_group(table: Table, group: Group) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"

    rule = [":--" if place < table.words else "--:" for place in range(len(table.head))]
    rows = [line(table.head), line(rule), *(line(row) for row in group.rows)]
    title = f"**{group.title}**\n\n" if group.title else ""
    return title + "\n".join(rows)
