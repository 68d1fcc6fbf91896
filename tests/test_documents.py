"""The documents: links resolve, lines are short, and the commands they show exist."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from short_run import QUICK

from ppo_nlu.config import load_config

ROOT = Path(__file__).parents[1]
FOLDERS = (".github", "benchmarks", "configs", "kernels", "ppo_nlu", "tests")
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]
)
COLUMNS = 120  # of a line of prose
LONGEST = 170  # lines of the front page
PLACEHOLDERS = {"CONFIG", "RUN", "FOLDER", "TASK", "NAME", "X"}  # in commands that show the form

each_document = pytest.mark.parametrize(
    "path", DOCUMENTS, ids=[path.relative_to(ROOT).as_posix() for path in DOCUMENTS]
)


def blocks(text: str) -> Iterator[tuple[str, list[str]]]:
    """(kind, lines): "prose", or the language of a fenced block ("" where none is said)."""
    kind, lines = "prose", []
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            yield kind, lines
            kind, lines = (line.strip("` ") if kind == "prose" else "prose"), []
        else:
            lines.append(line)
    yield kind, lines


def prose(text: str) -> str:
    return "\n".join(line for kind, lines in blocks(text) if kind == "prose" for line in lines)


def links(text: str) -> list[str]:
    """Targets of Markdown links and images, and of `src` and `href`; no code."""
    plain = re.sub(r"`[^`\n]*`", "code", prose(text))
    return re.findall(r"\]\(([^)\s]+)\)", plain) + re.findall(r'(?:src|href)="([^"]+)"', plain)


def anchors(text: str) -> list[str]:
    """The anchors of the headings, as GitHub makes them."""
    found: list[str] = []
    for title in re.findall(r"^#+ (.+)$", prose(text), re.M):
        title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower()
        slug = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
        same = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in found)
        found.append(f"{slug}-{same}" if same else slug)
    return found


def broken(path: Path, text: str) -> list[str]:
    """The relative links of a document that lead nowhere."""
    wrong = []
    for link in links(text):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if (
            not target.exists()
            or not target.is_relative_to(ROOT)
            or (anchor and anchor not in anchors(target.read_text("utf-8") if file else text))
        ):
            wrong.append(link)
    return wrong


def too_long(text: str) -> list[str]:
    """Lines of prose over the limit: no tables, no code, nothing that is one link."""
    return [
        line
        for line in prose(text).splitlines()
        if len(line) > COLUMNS
        and not line.lstrip().startswith("|")
        and not re.fullmatch(
            r"\s*([-*] )?(\[?!?\[[^]]*\]\([^)]*\)\S*|<[^>]+>|https?://\S+)\s*", line
        )
    ]


def commands(text: str) -> list[list[str]]:
    """Words of the shown commands: lines of shell blocks, and code in the prose."""
    shown = []
    for kind, lines in blocks(text):
        joined = "\n".join(lines).replace("\\\n", " ")
        shown += joined.splitlines() if kind in ("bash", "sh", "", "console") else []
        shown += re.findall(r"`([^`\n]+)`", joined) if kind == "prose" else []
    found = []
    for line in shown:
        for match in re.findall(r"\bpython (?:-m )?\S.*", line):
            try:
                found.append(shlex.split(match.split("|")[0].split("&&")[0], comments=True))
            except ValueError:
                continue
    return found


def exists(name: str) -> bool:
    """Whether `python -m NAME` finds something to run."""
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError:
        return False
    return spec is not None


@each_document
def test_links_lead_somewhere(path: Path) -> None:
    assert broken(path, path.read_text("utf-8")) == []


@each_document
def test_lines_of_prose_are_short(path: Path) -> None:
    assert too_long(path.read_text("utf-8")) == []


@each_document
def test_shown_programs_exist(path: Path) -> None:
    missing = []
    for words in commands(path.read_text("utf-8")):
        if words[1] == "-m":
            missing += [words[2]] * (words[2] not in PLACEHOLDERS and not exists(words[2]))
        elif words[1].endswith(".py"):
            missing += [words[1]] * (not (ROOT / words[1]).exists())
    assert missing == []


@each_document
def test_named_configs_exist(path: Path) -> None:
    names = set(re.findall(r"\bconfigs/[\w./-]+\.ya?ml", path.read_text("utf-8")))
    assert [name for name in names if not (ROOT / name).exists()] == []


@each_document
def test_shown_keys_and_values_are_taken(path: Path) -> None:
    """Every training command with a shipped config loads, with what it sets."""
    for words in commands(path.read_text("utf-8")):
        config = words[3] if len(words) > 3 else ""
        if words[1:3] == ["-m", "ppo_nlu.train"] and re.fullmatch(r"configs/\w+\.yaml", config):
            said = [word for word in words[4:] if re.match(r"[a-z_.]+=", word)]
            assert load_config(ROOT / config, said)


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= LONGEST


def test_the_front_page_links_the_other_documents() -> None:
    linked = {link.partition("#")[0] for link in links((ROOT / "README.md").read_text("utf-8"))}
    wanted = {f"{name}/README.md" for name in FOLDERS if name != ".github"}
    assert wanted <= linked


def test_the_losses_of_the_front_page_run() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    (code,) = ("\n".join(lines) for kind, lines in blocks(text) if "ppo_nlu.losses" in lines[0])
    mask = torch.tensor([[True, True, False]])
    names = ("rewards", "values", "logprobs", "old_logprobs", "old_values")
    space = {name: torch.zeros(1, 3) for name in names} | {"mask": mask}
    space["rewards"][0, 1] = 1.0
    exec(code, space)
    # By hand, values 0: the advantages are lam and 1, the ratio is 1, and 0.5 / 2 * (0.95^2 + 1).
    assert space["loss"].item() == pytest.approx(-0.975)
    assert space["critic"].item() == pytest.approx(0.475625)


SPOILT = """\
# A `title` (of two)
# A title of two
[here](#a-title-of-two-1) [file](test_documents.py) [web](https://a.b/c)
[gone](nothing.md) [anchor](#nothing) [outside](../../nothing) <img src="no.svg">
`[code](no.md)`
{long}
| {long} |
[{long}](test_documents.py)
```bash
python -m ppo_nlu.train configs/sst2.yaml \\
    optim.lr=1 | grep nothing  # a comment
python -m ppo_nlu.nothing  # [code](no.md) {long}
```
Run `python benchmarks/sst2.py --data "a b"`.
""".format(long="word " * 30)


def test_what_is_wrong_in_a_document_is_found() -> None:
    here = Path(__file__)
    assert broken(here, SPOILT) == ["nothing.md", "#nothing", "../../nothing", "no.svg"]
    assert too_long(SPOILT) == ["word " * 30]
    assert commands(SPOILT) == [
        ["python", "-m", "ppo_nlu.train", "configs/sst2.yaml", "optim.lr=1"],
        ["python", "-m", "ppo_nlu.nothing"],
        ["python", "benchmarks/sst2.py", "--data", "a b"],
    ]
    assert exists("ppo_nlu.train") and not exists("ppo_nlu.nothing") and not exists("no.thing")
    assert not exists("ppo_nlu.tasks")  # a package without a program


USES_THE_LOSS = """
import sys, torch
from ppo_nlu import losses, train
logprobs = torch.tensor([[-1.0, -2.0], [-3.0, float("nan")], [-5.0, -6.0]], requires_grad=True)
mask = torch.tensor([[True, True], [True, False], [True, True]])
loss = losses.imitation_loss(logprobs, mask, torch.tensor([1.0, 1.0, 0.0]), 8.0)
assert loss.item() == 0.75  # (1 + 2 + 3) / 8
loss.backward()
assert logprobs.grad.tolist() == [[-0.125, -0.125], [-0.125, 0.0], [0.0, 0.0]]
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_loss_of_the_how_to_add_applies_and_trains(tmp_path: Path, config: Path) -> None:
    """The diff in ppo_nlu/README.md, on a copy of the package: by hand, then in a run of PPO."""
    text = (ROOT / "ppo_nlu" / "README.md").read_text("utf-8")
    (diff,) = ("\n".join(lines) + "\n" for kind, lines in blocks(text) if kind == "diff")
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copytree(ROOT / "ppo_nlu", copy / "ppo_nlu")
    environment = {**os.environ, "PYTHONPATH": str(copy), "GIT_CEILING_DIRECTORIES": str(tmp_path)}
    subprocess.run(["git", "apply"], input=diff, text=True, cwd=copy, check=True, env=environment)
    command = [sys.executable, "-c", USES_THE_LOSS, str(config), *QUICK, "train.steps=2"]
    subprocess.run([*command, "--output", "run"], cwd=copy, check=True, env=environment)
    steps = [json.loads(line) for line in (copy / "run" / "metrics.jsonl").open()]
    assert len(steps) == 2 and all(row["policy/imitation"] > 0 for row in steps)
