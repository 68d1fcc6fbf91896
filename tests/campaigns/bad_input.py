"""Wrong input for every program: `python -m tests.campaigns.bad_input [--seed N] [--per-key M]`.

Wrong values for every key of the config by its type, wrong YAML, wrong command lines, odd data
files and odd paths. Each case must end with exit code 2 and one short line on stderr, without a
traceback, and leave no file behind. All run in forked processes that have the programs loaded.
Prints what failed and a line of counts; exit code 1 where anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ppo_nlu import evaluate, export, predict, submit, teach_form, train
from ppo_nlu.config import FOREIGN_NAMES, Config, dump, load_config
from ppo_nlu.config.fields import Leaf, schema
from ppo_nlu.data import __main__ as data_program
from ppo_nlu.model import peft_format
from ppo_nlu.pretrain import __main__ as pretrain
from ppo_nlu.reproduce import __main__ as reproduce
from ppo_nlu.reproduce import report
from ppo_nlu.runtime import cli, run_folder
from ppo_nlu.training import run as training

LONGEST, SECONDS, CHUNK = 600, 20, 400
PROGRAMS: dict[str, Any] = {
    "train": train.main,
    "evaluate": evaluate.main,
    "predict": predict.main,
    "export": export.main,
    "submit": submit.main,
    "reproduce": reproduce.main,
    "report": report.main,
    "data": data_program.main,
    "pretrain": pretrain.main,
    "teach_form": teach_form.main,
}
NOTES = ("note: ", "warning: ")  # what may stand on stderr beside the error
# A task of the user's own, so that its data files can be spoilt.
CONFIG = """\
task: mine
custom: {name: mine, fields: [text], query: 'Judge "{text}".', labels: [good, bad], train: t.csv}
train: {steps: 1}
log: {plot: false, progress: false}
"""
ROWS = [("a fine film", "good"), ("a dull film", "bad")] * 6


@dataclass(frozen=True)
class Case:
    """A command line in a folder with these files beside those that are in order."""

    kind: str
    program: str
    arguments: tuple[str, ...]
    files: tuple[tuple[str, bytes], ...] = ()
    prepare: Callable[[], object] | None = None

    @property
    def name(self) -> str:
        words = " ".join(text if len(text) < 60 else f"{text[:57]}..." for text in self.arguments)
        return f"{self.kind}: {self.program} {words!r} {[name for name, _ in self.files]}"


# ---- values ----------------------------------------------------------------------------------

# (type, YAML text); "odd" is right for no key at all.
VALUES = [
    ("int", "7000000000000"), ("int", "-3000000001"), ("int", "1" + "0" * 40),
    ("float", "1.5e+300"), ("float", "-2.5e+300"), ("odd", ".nan"), ("odd", "-.inf"),
    ("text", "1e400"), ("text", "-1e400"), ("odd", "9" * 5000), ("bool", "true"), ("bool", "False"),
    ("null", "null"), ("null", ""), ("text", "abc"), ("text", "yes"), ("text", "0x10"),
    ("text", "\u0661\u0662"), ("text", "1:30"), ("text", "'3'"), ("odd", "''"), ("odd", "'  '"),
    ("odd", "a" * 5000 + "b" * 96_000), ("odd", '"a\\0b"'), ("odd", '"\\e[2J"'),
    ("odd", '"\\ud800"'), ("odd", "a\0b"), ("odd", "\x07"), ("list", "[]"), ("list", "[1, 2]"),
    ("odd", "[[a]]"), ("odd", "[null]"), ("dict", "{a: b}"), ("odd", "{1: 2}"),
    ("odd", "[" * 3000), ("odd", "!!int x"), ("odd", "!!bool maybe"), ("odd", "!!timestamp x"),
    ("odd", "!!python/object:os.system x"), ("odd", "&a [*a]"), ("odd", "*a"), ("odd", "{"),
    ("odd", "'"), ("odd", "a: b: c"), ("odd", "- a"), ("odd", "%x"), ("odd", "@x"), ("odd", "`x"),
    ("odd", "[" + "a," * 10_001 + "]"),
]  # fmt: skip


def accepted_types(leaf: Leaf) -> set[str]:
    """The types of VALUES that may be right for a key; numbers are tried by their range."""
    kinds = {getattr(kind, "__origin__", kind) for kind in (leaf.kind, *get_args(leaf.kind))}
    found = {"text"} if str in kinds and "choices" not in leaf.limits else set()
    named = {bool: "bool", type(None): "null", list: "list", dict: "dict"}
    return found | {named[kind] for kind in kinds if kind in named}


def wrong_values(draw: random.Random, per_key: int) -> Iterator[Case]:
    """For every key, on the command line and in the file."""
    for key, leaf in schema(Config).items():
        right = accepted_types(leaf)
        wrong = [text for kind, text in VALUES if kind not in right]
        if leaf.limits.get("choices"):
            wrong += [choice.upper() + "x" for choice in leaf.limits["choices"]]
        if leaf.limits.get("max") is not None:
            wrong.append(repr(leaf.limits["max"] + max(1, abs(leaf.limits["max"]))))
        for text in draw.sample(wrong, min(per_key, len(wrong))):
            program = draw.choice(("train", "evaluate", "teach_form"))
            if key.startswith("lora."):  # which teach_form, that trains all weights, does not use
                program = "train"
            output = ("--output", "out")
            if draw.random() < 0.7:
                yield Case("value", program, ("c.yaml", f"{key}={text}", *output))
                continue
            *sections, name = key.split(".")
            indented = "\n".join(f"{'  ' * i}{s}:" for i, s in enumerate((*sections, name)))
            content = f"task: sst2\n{indented} {text}\n" if key != "task" else f"task: {text}\n"
            raw = content.encode("utf-8", "surrogatepass")
            yield Case("value", program, ("odd.yaml", *output), (("odd.yaml", raw),))


# ---- YAML ------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(12)
)
YAML = [
    b"",
    b"\n\n",
    b"- task\n",
    b"task\n",
    b"3\n",
    b"null\n",
    b"[a, b]\n",
    b"task: [\n",
    b"{",
    b"\xff",
    b"task: sst2\n\tseed: 1\n",
    b"task: sst2\n  seed: 1\n",
    b"task: sst2\ntask: cola\n",
    b"task: sst2\n---\nseed: 1\n",
    b"task: sst2\nseed: 1: 2\n",
    b"1: 2\n",
    b"? [a]\n: b\n",
    b"task: sst2\n<<: {seed: 1}\n",
    b"x: &x {seed: 1}\ntask: sst2\n<<: *x\n",
    b"a: &a {b: *a}\n",
    LAUGHS.encode(),
    b"task: \x00\n",
    b"task: sst2\x1b[31m\n",
    b"task: s\xe9\n",
    b"'",
    b'"\\q"',
    "task: sst2\n".encode("utf-16"),
    "task: sst2\n".encode("utf-16-le"),
    b"task: " + b"[" * 5000,
    b"task: sst2\n" + b"x" * 5000 + b": 1\n",
    b"%YAML 9.9\n---\ntask: sst2\n",
    b"task: !!x y\n",
    b"task: sst2\nseed: !!int x\n",
    b"#" * 1_100_000,
    b"task: sst2\nppo: 3\n",
    b"task: sst2\nppo: []\n",
    b"task: sst2\nppo.clip: 0.1\n",
    b"task: sst2\nseed: " + b"9" * 6000,
    b"task: |\n",
    b"task: >\n",
    b"task: sst2\nmodel:\n - a\n",
    b"!!python/object/apply:os.system ['true']\n",
    b"task: *x\n",
]


def wrong_yaml(draw: random.Random) -> Iterator[Case]:
    for content in YAML:
        program = draw.choice(("train", "evaluate", "teach_form", "data"))
        first = ("check",) if program == "data" else ()
        last = () if program == "data" else ("--output", "out")
        yield Case("yaml", program, (*first, "odd.yaml", *last), (("odd.yaml", content),))
    for name, make in (
        ("a.yaml", lambda: os.mkfifo("a.yaml")),
        ("b.yaml", lambda: os.mkdir("b.yaml")),
        ("c2.yaml", lambda: os.symlink("/dev/zero", "c2.yaml")),
        ("d.yaml", lambda: os.symlink("d.yaml", "d.yaml")),
        ("e.yaml", lambda: os.symlink("/dev/null", "e.yaml")),
    ):
        for program in ("train", "teach_form", "pretrain"):
            yield Case("yaml", program, (name, "--output", "out"), prepare=make)


# ---- command lines ---------------------------------------------------------------------------


def typo(draw: random.Random, word: str) -> str:
    place = draw.randrange(len(word))
    letter = draw.choice("qxzj")
    return word[:place] + letter + word[place + draw.randrange(2) :]


def wrong_commands(draw: random.Random, per_key: int) -> Iterator[Case]:
    start: dict[str, tuple[str, ...]] = {
        "train": ("c.yaml",),
        "evaluate": ("run",),
        "predict": ("run",),
        "export": ("run", "--output", "out"),
        "submit": ("run", "--benchmark", "glue", "--output", "o.zip"),
        "reproduce": ("glue",),
        "report": (".",),
        "data": ("check",),
        "pretrain": ("c.yaml",),
        "teach_form": ("c.yaml", "--output", "out"),
    }
    flags = ["--ouptut", "--learning_rate", "--x" * 900, "--\x1b[2J", "--é", "-q", "--se-ed", "---"]
    for program, words in start.items():
        for flag in flags:
            yield Case("command", program, (*words, flag, "1"))
        yield Case("command", program, (*words, "--output"))
        yield Case("command", program, () if program != "data" else ("nothing",))
        yield Case("command", program, (*words, "a\0b=1"))
    overridden = ["train", "evaluate", "predict", "export", "teach_form"]
    known = schema(Config)
    names = [typo(draw, key) for key in known for _ in range(max(1, per_key // 8))]
    foreign = [n for name in FOREIGN_NAMES for n in (name, f"log.{name}", f"nothing.{name}")]
    odd = ["=1", "=", "a=b=c", "x" * 5000 + "=1", "ppo=1", "ppo.clip.x=1", "\x1b=1", "ppo.=1"]
    odd += [".=1", "..=1", "ppo..clip=1", "é=1", "\udcff=1", "seed=\udcff", "--=1", "[a]=1"]
    for key in (*names, *foreign):
        if key not in known:
            program = draw.choice(overridden)
            yield Case("command", program, (*start[program], f"{key}=1"))
    for text in odd:
        for program in overridden:
            yield Case("command", program, (*start[program], text))
    for name in FOREIGN_NAMES:
        yield Case("command", draw.choice(overridden[:3]), ("run", f"--{name}", "1"))
    for words in (("--decode", "beam"), ("--split", "no/where"), ("--split", "x" * 5000)):
        yield Case("command", "evaluate", ("c.yaml", *words, "--output", "out"))
    for words in (
        ("glue", "--seeds", "x"), ("glue", "--seeds", "-1"), ("glue", "--jobs", "0"), ("blue",),
        ("glue", "--budget", "-3"), ("glue", "--methods", "x"), ("glue", "--tasks", "x" * 5000),
        ("glue", "seed=3"), ("glue", "--seeds", "9" * 5000), ("glue", "--preset", "\x1b"),
        ("glue", "--jobs", "1" * 5000),
    ):  # fmt: skip
        yield Case("command", "reproduce", (*words, "--output", "out", "--dry-run"))


# ---- paths -----------------------------------------------------------------------------------

BELOW = ("c.yaml/out", "c.yaml/a/b/out", "x" * 300, "x" * 5000, "loop/out", "loop", "a/" * 3000)


def odd_paths(draw: random.Random) -> Iterator[Case]:
    def loop() -> None:
        os.symlink("loop", "loop")

    places: dict[str, tuple[str, ...]] = {
        "train": ("c.yaml",),
        "evaluate": ("run",),
        "predict": ("run", "--input", "in.txt"),
        "export": ("run",),
        "submit": ("run", "--benchmark", "glue"),
        "reproduce": ("glue",),
        "report": (".",),
        "data": ("get", "sst2"),
        "pretrain": ("tiny.yaml",),
        "teach_form": ("c.yaml",),
    }
    for program, words in places.items():
        for path in BELOW:
            suffix = {"predict": ".jsonl", "submit": ".zip"}.get(program, "")
            target = path if path in ("loop", "a/" * 3000) else path + suffix
            yield Case("path", program, (*words, "--output", target), prepare=loop)
    for program in ("evaluate", "predict", "export", "train"):
        for path in (*BELOW, "nowhere", "~nobody", "", "empty", "/dev/null", "\x1b[2J", "é" * 400):
            last = ("--output", "out") if program == "export" else ()
            words = ("c.yaml", "--resume", path) if program == "train" else (path, *last)
            yield Case("path", program, words, prepare=lambda: (loop(), os.mkdir("empty")))
    for path in (*BELOW, "nowhere.csv", "run", "x.doc", "/dev/null", "c.yaml"):
        yield Case("path", "predict", ("run", "--input", path), prepare=loop)
    keys = ("custom.train", "custom.dev", "data.path", "init_from", "model.name_or_path")
    for key in keys:
        for path in ("c.yaml/x.csv", "x" * 300, "nowhere/x.csv", "~nobody/x.csv", "loop/x.csv"):
            words = ("c.yaml", f"{key}={path}", "--output", "out")
            words += ("task=sst2",) * (key == "data.path")  # the files of `mine` have their own
            yield Case("path", "train", words, prepare=loop)


# ---- data ------------------------------------------------------------------------------------


def table(separator: str, rows: Sequence[Sequence[str]] = ROWS, head: str = "text,label") -> bytes:
    lines = [head.replace(",", separator), *(separator.join(row) for row in rows)]
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def lines(*rows: Any) -> bytes:
    return "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows).encode()


GOOD = [{"text": text, "label": label} for text, label in ROWS]
DATA: list[tuple[str, bytes]] = [
    ("t.csv", b""), ("t.csv", b"\n"), ("t.csv", b"text,label\n"), ("t.csv", b"\xff\xfe"),
    ("t.csv", table(",", head="text,lable")), ("t.csv", table(",", head="txt,label")),
    ("t.csv", table(",", head="text")), ("t.csv", table(",", [*ROWS, ("a", "ugly")])),
    ("t.csv", table(",", [*ROWS, ("a", "")])), ("t.csv", table(",").decode().encode("utf-16")),
    ("t.csv", table(",") + b"\xe9,good\n"), ("t.csv", table(",") + b"a\0b,ugly\n"),
    ("t.csv", table(",") + b'"never closed,good\n'), ("t.csv", table(";")),
    ("t.csv", table(",", head="text,label,label", rows=[(*row, "x") for row in ROWS])),
    ("t.tsv", b""), ("t.tsv", table(",")), ("t.tsv", table("\t", head="a,b")),
    ("t.tsv", table("\t", [*ROWS, ("a", "ugly")])), ("t.tsv", b"\x00" * 400),
    ("t.jsonl", b""), ("t.jsonl", lines(*GOOD, "{")), ("t.jsonl", lines(*GOOD, "[1]")),
    ("t.jsonl", lines(*GOOD, "3")), ("t.jsonl", lines(*GOOD, {"label": "good"})),
    ("t.jsonl", lines(*GOOD, {"text": "a"})), ("t.jsonl", lines(*GOOD, {"text": "a", "label": []})),
    ("t.jsonl", lines(*GOOD, "[" * 100_000)), ("t.jsonl", lines(*GOOD, "\x00")),
    ("t.jsonl", lines(*GOOD, {"text": "a", "label": "ugly\x1b[2J" + "x" * 5000})),
    ("t.jsonl", lines(*GOOD, '{"text": "a", "label": ' + "9" * 5000 + "}")),
    ("t.csv.gz", gzip.compress(table(","))[:30]), ("t.csv.gz", b"no gzip"), ("t.csv.gz", b""),
    ("t.parquet", b"PAR1"), ("t.parquet", b""), ("t.doc", b"x"), ("t", b"x"),
]  # fmt: skip


def odd_data(draw: random.Random) -> Iterator[Case]:
    for name, content in DATA:
        words = ("c.yaml", f"custom.train={name}", "--output", "out")
        yield Case("data", "train", words, ((name, content),))
        if "." in name and content:
            cut = content[: draw.randint(1, min(len(content), 5))]
            yield Case("data", "train", words, ((name, cut),))


# ---- running ---------------------------------------------------------------------------------


def cases(seed: int, per_key: int) -> list[Case]:
    draw = random.Random(seed)
    found = [*wrong_values(draw, per_key), *wrong_yaml(draw), *wrong_commands(draw, per_key)]
    return [*found, *odd_paths(draw), *odd_data(draw)]


class Accepted(BaseException):
    """The input was taken, and the model would be loaded now."""


def _accepted(*arguments: Any, **options: Any) -> Any:
    raise Accepted("the input was accepted")


def furnish(folder: Path) -> None:
    """What every case finds: a config that is in order, its data, and a finished run."""
    (folder / "c.yaml").write_text(CONFIG)
    (folder / "tiny.yaml").write_text("task: sst2\n")
    (folder / "t.csv").write_bytes(table(","))
    (folder / "in.txt").write_text("a film\n")
    cfg = load_config(folder / "c.yaml", ["task=sst2"])
    run_folder.claim(folder / "run", dump(cfg)).release()
    (folder / "run" / "adapter").mkdir()
    (folder / "run" / "adapter" / peft_format.CONFIG_FILE).write_text("{}")


def snapshot() -> dict[str, int]:
    paths = list(Path().rglob("*"))
    return {str(p): p.lstat().st_mtime_ns if p.is_file() else 0 for p in paths}


def failure(case: Case) -> str:
    """What is wrong with how a case ends; "" when it ends as it should."""
    with tempfile.TemporaryDirectory() as made:
        os.chdir(made)
        try:
            furnish(Path(made))
            for name, content in case.files:
                Path(name).write_bytes(content)
            if case.prepare:
                case.prepare()
            return _judged(case)
        finally:
            os.chdir("/")


def _judged(case: Case) -> str:
    before, out, err = snapshot(), io.StringIO(), io.StringIO()
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.run(PROGRAMS[case.program], list(case.arguments))
    except SystemExit as error:
        code = f"SystemExit({error.code})"  # type: ignore[assignment]
    finally:
        signal.alarm(0)
    said = [line for line in err.getvalue().splitlines() if not line.startswith(NOTES)]
    if code != 2:
        return f"exit code {code}: {said[-1:]}"
    if len(said) != 1 or not said[0].startswith("error: "):
        return f"{len(said)} lines: {said[:3]}"
    if len(said[0]) > LONGEST or not said[0].isprintable():
        return f"{len(said[0])} characters, or some that cannot be printed: {said[0]!r}"
    if "Traceback" in err.getvalue() + out.getvalue():
        return "a traceback"
    left = {name for name, when in snapshot().items() if before.get(name) != when}
    return f"left behind or changed: {sorted(left)}" if left else ""


def _too_long(number: int, frame: object) -> None:
    raise Accepted(f"not over after {SECONDS} s")


def _child(chunk: list[Case], results: Any) -> None:
    os.environ.pop("PPO_NLU_DATA", None)
    os.environ["XDG_CACHE_HOME"] = os.environ["HOME"] = "/nowhere"
    os.environ["HF_HUB_OFFLINE"] = "1"
    signal.signal(signal.SIGALRM, _too_long)
    for module, name in (
        (training, "plan_memory"),
        (evaluate, "load_base"),
        (evaluate, "load_trained"),
        (predict, "load_trained"),
        (teach_form, "load_base"),
        (pretrain, "run"),
        (reproduce, "settle"),
    ):
        assert hasattr(module, name), (
            f"{module.__name__}.{name} has moved: nothing is stopped there"
        )
        setattr(module, name, _accepted)
    for number, case in enumerate(chunk):
        results.send((number, failure(case)))
    results.close()


def run(chunk: list[Case]) -> list[str]:
    """What is wrong with each case, by a child process; one that dies is the case's failure."""
    fork = multiprocessing.get_context("fork")
    found: list[str] = []
    while len(found) < len(chunk):
        receiving, sending = fork.Pipe(duplex=False)
        process = fork.Process(target=_child, args=(chunk[len(found) :], sending))
        process.start()
        sending.close()
        with contextlib.suppress(EOFError):
            while True:
                found.append(receiving.recv()[1])
        process.join()
        if len(found) < len(chunk):
            found.append(f"the process died with {process.exitcode}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.bad_input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-key", type=int, default=16, help="wrong values for each key")
    args = parser.parse_args(argv)
    every = cases(args.seed, args.per_key)
    failed, counts = 0, Counter(case.kind for case in every)
    for start in range(0, len(every), CHUNK):
        chunk = every[start : start + CHUNK]
        for case, problem in zip(chunk, run(chunk), strict=True):
            if problem:
                failed += 1
                print(f"FAILED {case.name}\n       {problem}", flush=True)
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    print(f"bad input, seed {args.seed}: {len(every)} cases ({kinds}), {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
