"""Who answers what of a submission, and the official test files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from ppo_nlu import data
from ppo_nlu.answering.answer import Answer
from ppo_nlu.answering.leaderboard import Entry, FinishedRun, assign, lacking, submitted
from ppo_nlu.answering.leaderboard_files import Fallback, write
from ppo_nlu.config import Config, load_config
from ppo_nlu.tasks import TASKS


def trained(*groups: Sequence[str]) -> dict[str, tuple[str, str]]:
    runs = [
        FinishedRun(Path(str(i)), Config(tasks=list(names)), {name: TASKS[name] for name in names})
        for i, names in enumerate(groups)
    ]
    found = assign(set(TASKS), runs)
    return {task: (run.folder.name, spec.name) for task, (run, spec) in found.items()}


def test_a_run_answers_what_goes_with_its_tasks() -> None:
    assert trained(["mnli"], ["glue/rte"], ["superglue/rte", "cb"]) == {
        "mnli": ("0", "mnli"), "mnli-mm": ("0", "mnli"), "ax": ("0", "mnli"),
        "glue/rte": ("1", "glue/rte"),
        "superglue/rte": ("2", "superglue/rte"), "cb": ("2", "cb"),
        "ax-b": ("2", "superglue/rte"), "ax-g": ("2", "superglue/rte"),
    }  # fmt: skip


def test_a_run_that_was_trained_on_the_other_task_goes_first() -> None:
    assert trained(["mnli"], ["mnli-mm"]) == {
        "mnli": ("0", "mnli"),
        "mnli-mm": ("1", "mnli-mm"),
        "ax": ("0", "mnli"),
    }


# What is complete among the real files at hand; QQP and ReCoRD have no test file there.
REAL = {
    "glue": ("cola", "sst2", "mrpc", "stsb", "qnli", "glue/rte", "wnli", "ax"),
    "superglue": (
        "boolq", "cb", "copa", "multirc", "superglue/rte", "wic", "wsc", "ax-b", "ax-g",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("benchmark", "task"), [(name, task) for name, tasks in REAL.items() for task in tasks]
)
def test_the_real_test_files_have_the_official_rows(
    real_data: Path, benchmark: str, task: str, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text(f'task: {task}\ndata: {{path: "{real_data}"}}\n')
    cfg = load_config(tmp_path / "c.yaml")
    examples = data.load_split(TASKS[task], "test", cfg.data).examples
    spec, rows = TASKS[task], TASKS[task].leaderboard_rows
    assert spec in submitted(benchmark)
    run = FinishedRun(tmp_path, cfg, {task: spec})
    entry = Entry(spec, run, spec, examples)
    assert list(lacking(entry)) == []
    assert len({example.id for example in examples}) == len(examples)
    given = [Answer(example, TASKS[task].words[0], "") for example in examples]
    content, filled = write(entry, given, Fallback("majority", 0))
    lines = content.decode().splitlines()
    assert filled == 0 and content.endswith(b"\n")
    if benchmark == "glue":
        assert len(lines) == rows + 1 and lines[-1].split("\t")[0] == str(rows - 1)
    elif task == "multirc":
        parsed = [json.loads(line) for line in lines]
        questions = [q for row in parsed for q in row["passage"]["questions"]]
        assert len(parsed) == 166 and sum(len(q["answers"]) for q in questions) == rows
    else:
        assert [json.loads(line)["idx"] for line in lines] == list(range(rows))
