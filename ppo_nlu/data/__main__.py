"""Look at the data, or fetch it: `python -m ppo_nlu.data check [TASK...]` prints what is there, and
`python -m ppo_nlu.data get TASK... [--output FOLDER]` downloads the official files into the cache,
or into FOLDER in the layout glue/SST-2/, superglue/CB/. Both take `data.key=value`; a config file
in place of a TASK stands for its tasks and its data section.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import nlargest
from pathlib import Path

from ppo_nlu import data
from ppo_nlu.config import Config, DataConfig, load_config, strict_config
from ppo_nlu.config.mistakes import COMMAND_LINE
from ppo_nlu.data import download
from ppo_nlu.data.archives import archive_of
from ppo_nlu.errors import UserError, printable
from ppo_nlu.model.shape import context_of
from ppo_nlu.model.tokens import Codec
from ppo_nlu.runtime import arguments, cli
from ppo_nlu.tasks import TASKS, Example, TaskSpec, get_task
from ppo_nlu.tasks.custom import specs_of
from ppo_nlu.tasks.prompts import render

HEADER = ("task", "split", "file", "rows", "labels", "left out", "words", "tokens", "cut", "state")
RIGHT = ("rows", "left out", "words", "tokens", "cut")  # columns of numbers
TOKENIZER = Path(__file__).parents[1] / "assets" / "tiny"
LONGEST = 32  # the rows of a split, those with the most letters, whose tokens are counted


def main(argv: list[str] | None = None) -> int:
    """The program."""
    parser = arguments.Parser("python -m ppo_nlu.data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=arguments.Parser)
    checked = commands.add_parser("check", help="what is there, split by split")
    checked.add_argument("words", nargs="*", metavar="TASK", help="default: every task")
    fetched = commands.add_parser("get", help="download the official files")
    fetched.add_argument("words", nargs="+", metavar="TASK")
    fetched.add_argument("--output", type=Path, metavar="FOLDER", help="default: the cache")
    fetched.add_argument(
        "--unverified", action="store_true", help="take files whose sha256 is not the known one"
    )
    args = parser.parse_args(argv)
    specs, cfg = _asked(args.words)
    if args.command == "get":
        return get(specs, cfg.data, args.output, not args.unverified)
    return check(specs or list(TASKS.values()), cfg, named=bool(specs))


def _asked(words: Sequence[str]) -> tuple[list[TaskSpec], Config]:
    """The tasks that are named, by themselves or by a config file, and the config."""
    files = [word for word in words if word.endswith((".yaml", ".yml")) and "=" not in word]
    names = [word for word in words if "=" not in word and word not in files]
    overrides = [word for word in words if "=" in word]
    if len(files) > 1:
        raise UserError(f"{files[1]}: one config file at a time; {files[0]} is given already")
    if files:
        cfg = load_config(arguments.config_file(files[0]), overrides)
        return [*specs_of(cfg).values(), *map(get_task, names)], cfg
    given = strict_config.parse_overrides(overrides, Config)
    said = {key: (COMMAND_LINE, value) for key, value in given.items()}
    any_task = {"task": ("", next(iter(TASKS)))}
    cfg = strict_config.build(Config, any_task | said, COMMAND_LINE)
    return [get_task(name) for name in names], cfg


# ---- check


def check(specs: Iterable[TaskSpec], cfg: Config, named: bool) -> int:
    """Print a line for each split. A file that cannot be read is an error, and so is a task that is
    absent altogether if it was named."""
    lines, sources, absent = [], [], []
    for spec in specs:
        source = _found(spec, cfg.data, named)
        if source is None:
            absent.append(spec.name)
            continue
        sources.append(source)
        splits = dict.fromkeys(["train", "dev", *spec.files]) if _own(spec) else spec.files
        for split in splits:
            lines.append(_line(spec, split, source, cfg))
    if not lines:
        raise UserError(
            "data.path: no task is there; give data.path=FOLDER or $PPO_NLU_DATA, or fetch one: "
            "python -m ppo_nlu.data get sst2"
        )
    for kind in dict.fromkeys(source.kind for source in sources if source.kind != "custom"):
        folder = _common([str(s.folder) for s in sources if s.kind == kind])
        print(printable(f"{kind}: {folder}"))
    print(_aligned([HEADER, *(line.cells for line in lines)]))
    reader = printable(_codec(cfg.model.name_or_path)[1])
    print(f"words, tokens: of the longest prompt without examples; tokens of {reader}")
    if any(line.cut for line in lines):
        print(
            "cut: about how many prompts are longer than a run allows; their texts lose their end"
        )
    below = [line.leaks for line in lines if line.leaks]
    below += [what for line in lines for what in line.odd]
    for what in below:
        print(what)
    if absent:
        print(f"absent: {', '.join(absent)}")
    return 0


def _own(spec: TaskSpec) -> bool:
    """Whether it is the user's task, whose dev rows may be a share of train."""
    return spec.benchmark == "custom"


def _found(spec: TaskSpec, cfg: DataConfig, named: bool) -> data.Source | None:
    try:
        source = data.local(spec, cfg)
    except UserError:
        if named:
            raise
        return None
    if source is None and named:
        raise UserError(
            f"data.path: no {spec.title} data in the cache {data.cache_root(cfg)}; give "
            f"data.path=FOLDER, or fetch it: python -m ppo_nlu.data get {spec.name}"
        )
    return source


def _common(folders: Sequence[str]) -> str:
    """The nearest folder that contains all of these."""
    parts = [Path(folder).parts for folder in dict.fromkeys(folders)]
    same = [names[0] for names in zip(*parts, strict=False) if len(set(names)) == 1]
    return str(Path(*same)) if same else "."


@dataclass(frozen=True)
class Line:
    """A split's line of the table, and what is said below it: about texts that the tokenizer reads
    as control tokens, and about rows that look like a mistake."""

    cells: tuple[str, ...]
    cut: int = 0
    leaks: str = ""
    odd: tuple[str, ...] = ()


def _line(spec: TaskSpec, split: str, source: data.Source, cfg: Config) -> Line:
    if not data.has_split(spec, split, source):
        name = spec.files[split][0]
        return Line((spec.name, split, name, "-", "-", "-", "-", "-", "", "absent"))
    found = data.load_split(spec, split, cfg.data)
    codec, _ = _codec(cfg.model.name_or_path)
    cut = _cut(spec, found.examples, codec, cfg)
    cells = (*_cells(spec, split, found, codec), f"{cut:,}" if cut else "", _state(found))
    said = [*found.odd, *data.oddities(found.examples)]
    said += [data.one_label(found.examples)] * (split == "train")
    if _own(spec) and spec.labels and any(row.label for row in found.examples):
        said[:0] = [_shares(spec, found.examples)]
        said.append(data.few_rows(spec, found.examples))
    odd = tuple(f"{spec.name} {split}: {what}" for what in said if what)
    return Line(cells, cut, _leaks(f"{spec.name} {split}", found.examples, codec), odd)


def _cells(spec: TaskSpec, split: str, found: data.Dataset, codec: Codec | None) -> tuple[str, ...]:
    rows = found.examples
    words = max(len(render(spec, row.fields).split()) for row in rows)
    return (
        spec.name,
        split,
        found.file,
        f"{len(rows):,}",
        _balance(spec, rows),
        f"{found.malformed:,}" if found.malformed else "",
        f"{words:,}",
        _tokens(spec, rows, codec),
    )


def _state(found: data.Dataset) -> str:
    return "partial" if found.partial else ""


def _cut(spec: TaskSpec, rows: Sequence[Example], codec: Codec | None, cfg: Config) -> int:
    """About how many prompts a run of this config cuts; 0 where an encoder reads no prompt."""
    context = _context(cfg.model.name_or_path)
    if codec is None or not context or cfg.method == "encoder":
        return 0
    room = context - cfg.rollout.max_new_tokens
    longest = min(cfg.data.max_prompt_tokens or room, room)
    return data.about_too_long(rows, lambda row: _length(spec, row, codec) > longest)


def _leaks(place: str, rows: Sequence[Example], codec: Codec | None) -> str:
    count = sum(any(map(codec.leaks, row.fields.values())) for row in rows) if codec else 0
    said = f"{place}: {count:,} rows hold control tokens that this tokenizer cannot read as text"
    return said if count else ""


def _balance(spec: TaskSpec, rows: Sequence[Example]) -> str:
    labels = [row.label for row in rows if row.label is not None]
    if not labels:
        return "unlabelled"
    if spec.kind == "rating":
        numbers = [float(label) for label in labels]
        mean = sum(numbers) / len(numbers)
        return f"{min(numbers):g} / {mean:.2f} / {max(numbers):g} (min/mean/max)"
    if spec.kind == "text":
        return f"{len(set(labels)):,} different texts"
    if _own(spec):  # their words may be long; the shares are told below
        return f"{len(spec.words)} labels"
    counts = Counter(labels)
    return ", ".join(f"{word} {counts[word]:,}" for word in spec.words)


def _shares(spec: TaskSpec, rows: Sequence[Example]) -> str:
    """The rows of each label and their share, the largest first."""
    counts = Counter(dict.fromkeys(spec.words, 0) | Counter(row.label or "" for row in rows))
    return ", ".join(f"{w} {n:,} ({n / len(rows):.1%})" for w, n in counts.most_common())


def _tokens(spec: TaskSpec, rows: Sequence[Example], codec: Codec | None) -> str:
    if codec is None:
        return "-"
    long = nlargest(LONGEST, rows, key=lambda row: sum(map(len, row.fields.values())))
    return f"{max(_length(spec, row, codec) for row in long):,}"


def _length(spec: TaskSpec, row: Example, codec: Codec) -> int:
    """The tokens of a row's prompt without examples."""
    return len(codec.encode(render(spec, {k: codec.seal(v) for k, v in row.fields.items()})))


@lru_cache(maxsize=1)
def _codec(name: str) -> tuple[Codec | None, str]:
    """The tokenizer of a model in a folder or the cache, or else of the bundled one, and its name;
    None where there is none of either."""
    from transformers import AutoTokenizer

    places = [(TOKENIZER, "the bundled model")]
    if name != "bundled":
        places.insert(0, (data.expand(name), name))
    for place, called in places:
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(place), local_files_only=True)
        except Exception:  # nothing there, or nothing that the library can read; a run tells which
            continue
        tokenizer.model_max_length = sys.maxsize  # no warning of long texts
        return Codec(tokenizer, {tokenizer.eos_token_id}, sys.maxsize), called
    return None, "no model"


@lru_cache(maxsize=1)
def _context(name: str) -> int:
    """The context of a model in a folder or the cache; 0 where there is none."""
    from transformers import AutoConfig

    place = TOKENIZER if name == "bundled" else data.expand(name)
    try:
        config = AutoConfig.from_pretrained(str(place), local_files_only=True)
    except Exception:  # as in `_codec`
        return 0
    return context_of(config.get_text_config())


def _aligned(table: Sequence[Sequence[str]]) -> str:
    """The table as lines, without its empty columns."""
    columns = [column for column in zip(*table, strict=True) if any(column[1:])]
    padded = []
    for column in columns:
        width, pad = max(map(len, column)), str.rjust if column[0] in RIGHT else str.ljust
        padded.append([pad(cell, width) for cell in column])
    lines = ("  ".join(cells).rstrip() for cells in zip(*padded, strict=True))
    return "\n".join(map(printable, lines))


# ---- get


def get(specs: Sequence[TaskSpec], cfg: DataConfig, output: Path | None, sums: bool) -> int:
    """Fetch the official files of each task, and print where they are and how they were checked."""
    if not specs:
        raise UserError("get: no task is named; give one or more, such as sst2")
    for spec in specs:
        if archive_of(spec) is None:
            known = ", ".join(name for name, other in TASKS.items() if archive_of(other))
            raise UserError(f"get: no archive of {spec.title} is known; there is one of {known}")
    root = arguments.require_place("--output", data.cache_root(cfg) if output is None else output)
    for spec in specs:
        print(_get(spec, cfg.url, root, sums), flush=True)
    return 0


def _get(spec: TaskSpec, url: str, root: Path, sums: bool) -> str:
    folder = root / spec.benchmark / spec.folder
    archive = archive_of(spec)
    assert archive is not None
    names = archive.files
    there = [name for name in names if (folder / name).is_file()]
    if len(there) == len(names):
        return f"{spec.title}: {folder} holds it already"
    if folder.exists():
        raise UserError(
            f"--output: {folder} holds something already, but not the whole official set; "
            "move it away or give another --output"
        )
    print(f"{spec.title}: fetching {archive.name}", file=sys.stderr)
    try:
        fetched = download.fetch(spec, url, root, sums)
    except download.DownloadError as error:
        also = "; --unverified takes it all the same" if "sha256" in str(error) else ""
        raise UserError(f"get: {spec.title}: {error}{also}") from error
    unverified = ", ".join(fetched.unverified)
    proved = f"not verified by checksum: {unverified}" if unverified else "verified by checksum"
    return f"{spec.title}: {fetched.folder} ({proved})"


if __name__ == "__main__":
    sys.exit(cli.run(main, printed=True))
