"""The zips for the two servers, byte for byte, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ppo_nlu import data, submit
from ppo_nlu.answering import kept
from ppo_nlu.answering.answer import Answer
from ppo_nlu.answering.predictions import write_predictions
from ppo_nlu.config import dump, load_config
from ppo_nlu.errors import UserError
from ppo_nlu.model import peft_format
from ppo_nlu.runtime import cli, run_folder
from ppo_nlu.tasks import TASKS, Example, TaskSpec

GLUE_TASKS = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "glue/rte", "wnli")
SUPERGLUE_TASKS = (
    "boolq", "cb", "copa", "multirc", "record", "superglue/rte", "wic", "wsc",
)  # fmt: skip
Answers = Mapping[str, Sequence[str | None]]


def numbered(task: str, count: int) -> list[Example]:
    return [Example(str(i), {}, None, task, extra={"idx": i}) for i in range(count)]


def labelled(task: str, labels: Sequence[str]) -> list[Example]:
    return [Example(f"train-{i}", {}, label, task) for i, label in enumerate(labels)]


@dataclass
class World:
    """Made-up splits in place of files, and run folders whose answers are kept already."""

    root: Path
    splits: dict[tuple[str, str], list[Example]] = field(default_factory=dict)

    def load_split(self, spec: TaskSpec, split: str, data_cfg: object) -> Any:
        if (spec.name, split) not in self.splits:
            raise UserError(f"/data: no {split} split of {spec.title}")
        return SimpleNamespace(examples=self.splits[spec.name, split])

    def run(self, name: str, *tasks: str, answers: Answers | None = None) -> Path:
        named = f"task: {tasks[0]}" if len(tasks) == 1 else f"tasks: [{', '.join(tasks)}]"
        (self.root / "run.yaml").write_text(named)
        folder = self.root / name
        run_folder.claim(folder, dump(load_config(self.root / "run.yaml"))).release()
        (folder / "adapter").mkdir()
        (folder / "adapter" / peft_format.CONFIG_FILE).write_text("{}")
        for task, given in (answers or {}).items():
            self.keep(folder, task, given)
        return folder

    def keep(
        self,
        folder: Path,
        task: str,
        given: Sequence[str | None],
        probabilities: Sequence[Any] = (),
        decode: str = "greedy",
    ) -> Path:
        """Write answers down as an evaluation does; test rows are made up if there are none."""
        rows = self.splits.setdefault((task, "test"), numbered(task, len(given)))
        place = folder / "submit" / task.replace("/", "-")
        place.mkdir(parents=True, exist_ok=True)
        scored = probabilities or [None] * len(given)
        made = [
            Answer(row, word, "", by_word)
            for row, word, by_word in zip(rows, given, scored, strict=True)
        ]
        how = "score" if TASKS[task].reader == "record" else decode
        path = place / f"predictions-{how}.jsonl"
        write_predictions(path, made)
        return path


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path)
    monkeypatch.setattr(data, "load_split", made.load_split)
    monkeypatch.setattr(kept, "load_trained", _no_model)
    return made


def _no_model(*_: object) -> None:
    raise AssertionError("the model was loaded")


def sized(monkeypatch: pytest.MonkeyPatch, **rows: int) -> None:
    """Test files of so many rows, by task; any other has two."""
    for name, spec in TASKS.items():
        count = rows.get(name.replace("-", "_"), 2)
        monkeypatch.setitem(TASKS, name, replace(spec, leaderboard_rows=count))


def submitted(benchmark: str, runs: Sequence[Path], *more: str, name: str = "out.zip") -> Path:
    output = runs[0].parent / name
    arguments = [*map(str, runs), "--benchmark", benchmark, "--output", str(output), *more]
    assert submit.main(arguments) == 0
    return output


def unzipped(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


# ---- golden files ----------------------------------------------------------------------------

GLUE_ANSWERS = {
    "cola": ["Yes", "No"],
    "sst2": ["Negative", "Positive"],
    "mrpc": ["No", "Yes"],
    "qqp": ["Yes", "Yes"],
    "stsb": ["3.8", "-0.2", "7", "-0.0", "2.54321"],
    "mnli": ["Entailment", "Neutral"],
    "mnli-mm": ["Contradiction", "Entailment"],
    "ax": ["Neutral", "Contradiction"],
    "qnli": ["Yes", "No"],
    "glue/rte": ["No", "Yes"],
    "wnli": ["No", "No"],
}
GLUE_FILES = {
    "AX.tsv": b"index\tprediction\n0\tneutral\n1\tcontradiction\n",
    "CoLA.tsv": b"index\tprediction\n0\t1\n1\t0\n",
    "MNLI-m.tsv": b"index\tprediction\n0\tentailment\n1\tneutral\n",
    "MNLI-mm.tsv": b"index\tprediction\n0\tcontradiction\n1\tentailment\n",
    "MRPC.tsv": b"index\tprediction\n0\t0\n1\t1\n",
    "QNLI.tsv": b"index\tprediction\n0\tentailment\n1\tnot_entailment\n",
    "QQP.tsv": b"index\tprediction\n0\t1\n1\t1\n",
    "RTE.tsv": b"index\tprediction\n0\tnot_entailment\n1\tentailment\n",
    "SST-2.tsv": b"index\tprediction\n0\t0\n1\t1\n",
    "STS-B.tsv": b"index\tprediction\n0\t3.800\n1\t0.000\n2\t5.000\n3\t0.000\n4\t2.543\n",
    "WNLI.tsv": b"index\tprediction\n0\t0\n1\t0\n",
}


def test_a_whole_glue_submission(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sized(monkeypatch, stsb=5)
    path = submitted("glue", [world.run("all", *GLUE_TASKS, answers=GLUE_ANSWERS)])
    assert unzipped(path) == GLUE_FILES
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["AX.tsv: 2 rows", "CoLA.tsv: 2 rows"] and len(lines) == 12
    assert lines[-1] == f"written: {path}"


def multirc_rows() -> list[Example]:
    """Two paragraphs: questions 0 and 1 with answers 0, 1 and 2, then question 2 with answer 3."""
    places = [(0, 0, 0), (0, 0, 1), (0, 1, 2), (5, 2, 3)]
    return [
        Example(f"{p}-{q}-{a}", {}, None, "multirc", f"{p}-{q}", {"idx": (p, q, a)})
        for p, q, a in places
    ]


def record_rows(passage: str = "Göran met Lee. Lee spoke to Kim.") -> list[Example]:
    """Two queries with the entities Göran, Lee and Kim."""
    return [
        Example(
            f"{query}-{place}",
            {"passage": passage},
            None,
            "record",
            str(query),
            {"idx": query, "entity": entity},
        )
        for query in (17, 18)
        for place, entity in enumerate(("Kim", "Lee", "Göran"))
    ]


SUPERGLUE_ANSWERS = {
    "boolq": ["Yes", "No"],
    "cb": ["Contradiction", "Neutral"],
    "copa": ["Second", "First"],
    "multirc": ["True", "False", "False", "True"],
    "record": ["No", "No", "Yes", "No", "Yes", "Yes"],
    "superglue/rte": ["Yes", "No"],
    "wic": ["Different", "Same"],
    "wsc": ["Yes", "No"],
    "ax-b": ["No", "Yes"],
    "ax-g": ["Yes", "Yes"],
}
SUPERGLUE_FILES = {
    "AX-b.jsonl": (b'{"idx": 0, "label": "not_entailment"}\n{"idx": 1, "label": "entailment"}\n'),
    "AX-g.jsonl": (b'{"idx": 0, "label": "entailment"}\n{"idx": 1, "label": "entailment"}\n'),
    "BoolQ.jsonl": b'{"idx": 0, "label": "true"}\n{"idx": 1, "label": "false"}\n',
    "CB.jsonl": b'{"idx": 0, "label": "contradiction"}\n{"idx": 1, "label": "neutral"}\n',
    "COPA.jsonl": b'{"idx": 0, "label": 1}\n{"idx": 1, "label": 0}\n',
    "MultiRC.jsonl": (
        b'{"idx": 0, "passage": {"questions": ['
        b'{"idx": 0, "answers": [{"idx": 0, "label": 1}, {"idx": 1, "label": 0}]}, '
        b'{"idx": 1, "answers": [{"idx": 2, "label": 0}]}]}}\n'
        b'{"idx": 5, "passage": {"questions": [{"idx": 2, "answers": [{"idx": 3, "label": 1}]}]}}\n'
    ),
    "RTE.jsonl": (b'{"idx": 0, "label": "entailment"}\n{"idx": 1, "label": "not_entailment"}\n'),
    "ReCoRD.jsonl": b'{"idx": 17, "label": "G\\u00f6ran"}\n{"idx": 18, "label": "Lee"}\n',
    "WSC.jsonl": b'{"idx": 0, "label": "True"}\n{"idx": 1, "label": "False"}\n',
    "WiC.jsonl": b'{"idx": 0, "label": "false"}\n{"idx": 1, "label": "true"}\n',
}


def test_a_whole_superglue_submission(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sized(monkeypatch, multirc=4)
    world.splits["multirc", "test"] = multirc_rows()
    world.splits["record", "test"] = record_rows()
    path = submitted("superglue", [world.run("all", *SUPERGLUE_TASKS, answers=SUPERGLUE_ANSWERS)])
    assert unzipped(path) == SUPERGLUE_FILES
    assert "ReCoRD.jsonl: 2 rows\n" in capsys.readouterr().out


def test_an_index_that_is_a_string_in_the_data_is_written_as_a_number(world: World) -> None:
    rows = [Example("7", {}, "Yes", "ax-b", extra={"idx": "7"})]
    world.splits["ax-b", "test"] = rows
    run = world.run("rte", "superglue/rte", answers={"superglue/rte": ["Yes"], "ax-b": ["No"]})
    path = submitted("superglue", [run], "--allow-partial")
    assert unzipped(path)["AX-b.jsonl"] == b'{"idx": 7, "label": "not_entailment"}\n'


def test_label_scores_pick_the_entity(world: World) -> None:
    world.splits["record", "test"] = record_rows()
    run = world.run("record", "record")
    sure = [0.1, 0.2, 0.3, 0.9, 0.95, 0.7]
    words = ["No", "No", "No", "Yes", "Yes", "Yes"]
    scored = [{"Yes": p, "No": 1 - p} for p in sure]
    world.keep(run, "record", words, probabilities=scored, decode="score")
    path = submitted("superglue", [run], "--allow-partial", "--decode", "score")
    entities = [json.loads(row)["label"] for row in unzipped(path)["ReCoRD.jsonl"].splitlines()]
    assert entities == ["Göran", "Lee"]


def test_the_same_answers_give_the_same_zip(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    sized(monkeypatch, stsb=5)
    one = submitted("glue", [world.run("all", *GLUE_TASKS, answers=GLUE_ANSWERS)])
    # the same answers from two runs, given in another order, at another time
    first = ("wnli", "stsb", "mnli")
    given = {task: GLUE_ANSWERS[task] for task in (*first, "mnli-mm", "ax")}
    rest = {task: words for task, words in GLUE_ANSWERS.items() if task not in given}
    runs = [world.run("b", *rest, answers=rest), world.run("a", *first, answers=given)]
    monkeypatch.setattr(time, "localtime", lambda *_: time.gmtime(2e9))
    two = submitted("glue", runs, name="two.zip")
    assert one.read_bytes() == two.read_bytes()
    with zipfile.ZipFile(two) as archive:
        entries = archive.infolist()
    assert [entry.filename for entry in entries] == sorted(GLUE_FILES)
    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
    assert {entry.compress_type for entry in entries} == {zipfile.ZIP_DEFLATED}


# ---- stand-ins -------------------------------------------------------------------------------


def test_the_majority_stands_in(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.splits["cola", "train"] = labelled("cola", ["No", "Yes", "Yes"])
    world.splits["stsb", "train"] = labelled("stsb", ["1.000", "2.500", "4.500"])
    answers = {"cola": [None, "No", None], "stsb": ["1.0", None]}
    run = world.run("two", "cola", "stsb", answers=answers)
    files = unzipped(submitted("glue", [run], "--allow-partial"))
    assert files["CoLA.tsv"] == b"index\tprediction\n0\t1\n1\t0\n2\t1\n"
    # (1 + 2.5 + 4.5) / 3
    assert files["STS-B.tsv"] == b"index\tprediction\n0\t1.000\n1\t2.667\n"
    out = capsys.readouterr().out
    assert "CoLA.tsv: 3 rows, 2 unparsed answers filled (majority)\n" in out
    assert "STS-B.tsv: 2 rows, 1 unparsed answers filled (majority)\n" in out


def test_of_two_equal_majorities_the_first_label_of_the_task_stands_in(world: World) -> None:
    world.splits["cola", "train"] = labelled("cola", ["No", "Yes"])
    files = unzipped(
        submitted("glue", [world.run("c", "cola", answers={"cola": [None]})], "--allow-partial")
    )
    assert files["CoLA.tsv"].endswith(b"0\t1\n")


def test_a_set_without_training_rows_takes_the_majority_of_what_was_learned(world: World) -> None:
    world.splits["mnli", "train"] = labelled("mnli", ["Neutral", "Neutral", "Entailment"])
    run = world.run("m", "mnli", answers={"mnli": ["Entailment"], "ax": [None]})
    assert unzipped(submitted("glue", [run], "--allow-partial"))["AX.tsv"].endswith(b"0\tneutral\n")


def test_without_training_rows_the_other_stand_in_is_named(world: World) -> None:
    run = world.run("c", "cola", answers={"cola": [None]})
    with pytest.raises(UserError, match=r"CoLA.tsv: .*train.*; or use --fallback random"):
        submitted("glue", [run], "--allow-partial")
    assert not (world.root / "out.zip").exists()


def test_random_stand_ins_are_seeded_and_cover_all_answers(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    run = world.run("two", "cola", "stsb", answers={"cola": [None] * 400, "stsb": [None] * 400})

    def drawn(name: str, seed: int) -> dict[str, bytes]:
        more = ("--allow-partial", "--fallback", "random", "--seed", str(seed))
        return unzipped(submitted("glue", [run], *more, name=name))

    files = drawn("1.zip", 3)
    labels = [row.split(b"\t")[1] for row in files["CoLA.tsv"].splitlines()[1:]]
    # 400 fair draws: 200 expected, deviation 10
    assert set(labels) == {b"0", b"1"} and 150 < labels.count(b"1") < 250
    numbers = [float(row.split(b"\t")[1]) for row in files["STS-B.tsv"].splitlines()[1:]]
    # uniform on [0, 5]: the mean has deviation 5 / sqrt(12 * 400) = 0.072
    assert 0 <= min(numbers) < 0.2 < 4.8 < max(numbers) <= 5
    assert sum(numbers) / 400 == pytest.approx(2.5, abs=0.36)
    assert drawn("2.zip", 3) == files != drawn("3.zip", 4)
    assert "CoLA.tsv: 400 rows, 400 unparsed answers filled (random)\n" in capsys.readouterr().out


def test_an_entity_stands_in_for_an_unanswered_query(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.splits["record", "test"] = record_rows()
    given = ["No", None, "No", "Yes", "No", "No"]
    run = world.run("r", "record", answers={"record": given})
    path = submitted("superglue", [run], "--allow-partial")
    assert unzipped(path)["ReCoRD.jsonl"] == (
        b'{"idx": 17, "label": "Lee"}\n{"idx": 18, "label": "Kim"}\n'
    )
    out = capsys.readouterr().out
    assert "ReCoRD.jsonl: 2 rows, 1 unanswered queries filled (majority)\n" in out
    seen = set()
    for seed in range(12):
        more = ("--allow-partial", "--fallback", "random", "--seed", str(seed))
        files = unzipped(submitted("superglue", [run], *more, name=f"{seed}.zip"))
        seen.add(json.loads(files["ReCoRD.jsonl"].splitlines()[0])["label"])
    assert seen == {"Kim", "Lee", "Göran"}


# ---- what is refused -------------------------------------------------------------------------


def test_a_submission_that_is_not_whole_is_refused_with_all_that_is_missing(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sized(monkeypatch, stsb=5, sst2=1821)
    trained = [task for task in GLUE_TASKS if task not in ("wnli", "glue/rte")]
    short = {task: GLUE_ANSWERS[task] for task in trained} | {"ax": ["Neutral", "Neutral"]}
    run = world.run("some", *trained, answers=short)
    output = world.root / "x.zip"
    arguments = [str(run), "--benchmark", "glue", "--output", str(output)]
    assert cli.run(submit.main, arguments) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and not output.exists()
    for line in (
        "SST-2.tsv: 2 test rows, the official file has 1,821",
        "MNLI-mm.tsv: /data: no test split of MNLI-mm",
        "RTE.tsv: no run was trained on glue/rte",
        "WNLI.tsv: no run was trained on wnli",
        "--allow-partial",
    ):
        assert line in message
    assert "CoLA.tsv" not in message and "AX.tsv" not in message
    assert cli.run(submit.main, [*arguments, "--allow-partial"]) == 0
    files = unzipped(output)
    assert set(files) == set(GLUE_FILES) - {"MNLI-mm.tsv", "RTE.tsv", "WNLI.tsv"}
    assert files["SST-2.tsv"] == GLUE_FILES["SST-2.tsv"]
    assert "not whole: WNLI.tsv: no run was trained on wnli\n" in capsys.readouterr().out


def test_what_goes_with_a_task_is_missed_under_the_tasks_name(world: World) -> None:
    run = world.run("c", "cola", answers={"cola": ["Yes"]})
    with pytest.raises(UserError, match=r"AX.tsv: no run was trained on mnli;"):
        submitted("glue", [run])


def test_test_rows_must_be_numbered_from_0(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    sized(monkeypatch)
    world.splits["cola", "test"] = list(reversed(numbered("cola", 2)))
    run = world.run("c", "cola", answers={"cola": ["Yes", "No"]})
    with pytest.raises(
        UserError, match=r"CoLA.tsv: the test rows are not numbered 0 to 1 in order"
    ):
        submitted("glue", [run])
    files = unzipped(submitted("glue", [run], "--allow-partial"))
    assert files["CoLA.tsv"] == b"index\tprediction\n1\t1\n0\t0\n"


def test_a_row_that_comes_twice_stands_for_one_that_is_missing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    sized(monkeypatch)
    run = world.run("w", "wic", answers={"wic": ["Same", "Different"]})
    first = world.splits["wic", "test"][0]
    world.splits["wic", "test"] = [first, first]
    world.keep(run, "wic", ["Same", "Same"])
    with pytest.raises(UserError, match=r"WiC.jsonl: some test rows come twice"):
        submitted("superglue", [run])


def test_the_queries_of_record_are_counted_and_not_its_rows(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    sized(monkeypatch, record=6)
    world.splits["record", "test"] = record_rows()
    run = world.run("r", "record", answers={"record": ["No"] * 5 + ["Yes"]})
    with pytest.raises(UserError, match=r"ReCoRD.jsonl: 2 test rows, the official file has 6"):
        submitted("superglue", [run])


def test_two_runs_of_one_task_are_refused(world: World) -> None:
    runs = [world.run("one", "cola", "sst2"), world.run("two", "sst2")]
    with pytest.raises(UserError, match=r"sst2: both .*one and .*two were trained on it"):
        submitted("glue", runs)
    with pytest.raises(UserError, match="sst2: both"):
        submitted("glue", [runs[1], runs[1]])


def test_a_run_of_another_benchmark_is_refused(world: World) -> None:
    runs = [world.run("g", "cola"), world.run("s", "superglue/rte")]
    with pytest.raises(UserError, match="s: was trained on superglue/rte, and the glue submission"):
        submitted("glue", runs, "--allow-partial")
    with pytest.raises(UserError, match="g: was trained on cola"):
        submitted("superglue", runs, "--allow-partial")


def test_nothing_at_all_is_refused(world: World) -> None:
    with pytest.raises(UserError, match="not whole"):
        submitted("glue", [world.run("c", "cola")], "--allow-partial")


@pytest.mark.parametrize("name", ["there.zip", "nowhere/out.zip"])
def test_a_bad_output_is_refused_at_once(world: World, name: str) -> None:
    (world.root / "there.zip").write_text("x")
    with pytest.raises(UserError, match=r"--output .*(exists already|no folder)"):
        submitted("glue", [world.run("c", "cola", answers={"cola": ["Yes"]})], name=name)


def test_bad_arguments_are_refused(world: World) -> None:
    output = str(world.root / "out.zip")
    with pytest.raises(UserError, match="name at least one finished run"):
        submit.main(["seed=1", "--benchmark", "glue", "--output", output])
    with pytest.raises(UserError, match="no-such-run"):
        submit.main(["no-such-run", "--benchmark", "glue", "--output", output])
    run = str(world.run("c", "cola"))
    with pytest.raises(UserError, match="nonsense"):
        submit.main([run, "nonsense.key=1", "--benchmark", "glue", "--output", output])
    with pytest.raises(UserError, match="--benchmark"):
        submit.main([run, "--benchmark", "blue", "--output", output])


# ---- whose answers ---------------------------------------------------------------------------


class Model:
    """Stands in for an `Answerer`: counts its loads, and says the first word to everything."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.loads: list[str] = []
        self.asked: list[tuple[str, int]] = []
        monkeypatch.setattr(kept, "load_trained", self.load)

    def load(self, cfg: Any, folder: Path) -> Any:
        self.loads.append(Path(folder).name)
        return self

    def require_fit(self, spec: TaskSpec) -> None:
        pass

    def answer(self, spec: TaskSpec, examples: Sequence[Example], decode: str) -> Iterator[Answer]:
        assert decode == "greedy"
        self.asked.append((spec.name, len(examples)))
        for example in examples:
            yield Answer(example, spec.words[0], "said")


def test_the_model_is_asked_once_and_for_what_is_not_kept(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(monkeypatch)
    for task, count in {"mnli": 3, "ax": 2, "cola": 4, "sst2": 1}.items():
        world.splits[task, "test"] = numbered(task, count)
    runs = [
        world.run("one", "mnli", answers={"ax": ["Neutral", "Neutral"]}),
        world.run("two", "cola", "sst2"),
    ]
    files = unzipped(submitted("glue", runs, "--allow-partial"))
    assert model.loads == ["one", "two"]
    assert sorted(model.asked) == [("cola", 4), ("mnli", 3), ("sst2", 1)]
    assert files["MNLI-m.tsv"].endswith(b"2\tentailment\n")
    assert files["AX.tsv"].endswith(b"1\tneutral\n")
    assert (runs[0] / "submit" / "mnli" / "predictions-greedy.jsonl").is_file()
    assert (runs[1] / "submit" / "cola" / "predictions-greedy.jsonl").is_file()
    again = submitted("glue", runs, "--allow-partial", name="again.zip")
    assert unzipped(again) == files and len(model.loads) == 2


def test_a_set_without_training_is_asked_as_the_task_that_was_learned(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(monkeypatch)
    world.splits["ax-b", "test"] = numbered("ax-b", 2)
    submitted("superglue", [world.run("rte", "superglue/rte")], "--allow-partial")
    assert model.asked == [("superglue/rte", 2)]


def _cut(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def _swap(path: Path) -> None:
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))


def _break(path: Path) -> None:
    path.write_text(path.read_text()[:-9])


def _reword(path: Path) -> None:
    path.write_text(path.read_text().replace("No", "Nope"))


def _age(path: Path) -> None:
    os.utime(path, (1, 1))


@pytest.mark.parametrize("spoil", [_cut, _swap, _break, _reword, _age])
def test_answers_that_do_not_fit_are_not_used(
    world: World, monkeypatch: pytest.MonkeyPatch, spoil: Any
) -> None:
    model = Model(monkeypatch)
    run = world.run("c", "cola", answers={"cola": ["No", "No", "No"]})
    spoil(run / "submit" / "cola" / "predictions-greedy.jsonl")
    files = unzipped(submitted("glue", [run], "--allow-partial"))
    assert model.asked == [("cola", 3)]
    assert files["CoLA.tsv"] == b"index\tprediction\n0\t1\n1\t1\n2\t1\n"


@pytest.mark.parametrize("word", ["many", "nan", "inf"])
def test_a_rating_that_is_no_number_is_not_used(
    world: World, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    model = Model(monkeypatch)
    run = world.run("s", "stsb", answers={"stsb": ["1.0", word]})
    files = unzipped(submitted("glue", [run], "--allow-partial"))
    assert model.asked == [("stsb", 2)] and files["STS-B.tsv"].endswith(b"1\t0.000\n")


def test_answers_of_another_decoding_are_not_used(world: World) -> None:
    run = world.run("c", "cola", answers={"cola": ["No"]})
    with pytest.raises(AssertionError, match="the model was loaded"):
        submitted("glue", [run], "--allow-partial", "--decode", "score")


# ---- real ------------------------------------------------------------------------------------


def test_a_real_run_end_to_end(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, output = tmp_path / "run", tmp_path / "sst2.zip"
    shutil.copytree(finished_run, run, ignore=shutil.ignore_patterns("eval-*"))
    arguments = [str(run), "--benchmark", "glue", "--output", str(output)]
    more = ["--allow-partial", "--fallback", "random", "eval.batch_size=64"]
    assert cli.run(submit.main, arguments) == 2
    assert cli.run(submit.main, arguments + more) == 0
    rows = unzipped(output)["SST-2.tsv"].decode().splitlines()
    assert rows[0] == "index\tprediction"
    assert [row.split("\t")[0] for row in rows[1:]] == [str(i) for i in range(len(rows) - 1)]
    assert {row.split("\t")[1] for row in rows[1:]} <= {"0", "1"}
    kept = (run / "submit" / "sst2" / "predictions-greedy.jsonl").read_text().splitlines()
    lost = sum(json.loads(row)["prediction"] is None for row in kept)
    assert len(kept) == len(rows) - 1
    filled = f", {lost:,} unparsed answers filled (random)" if lost else ""
    assert f"SST-2.tsv: {len(kept):,} rows{filled}\n" in capsys.readouterr().out


RECORD_TEST = {
    "idx": 3,
    "source": "made up",
    "passage": {
        "text": "Ann met Bo in Rome.\n@highlight\nBo likes Rome",
        "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 9}, {"start": 14, "end": 17}],
    },
    "qas": [
        {"idx": 40, "query": "@placeholder was met."},
        {"idx": 41, "query": "They met in @placeholder."},
    ],
}
MNLI_COLUMNS = (
    "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse "
    "sentence1_parse sentence2_parse sentence1 sentence2"
)
MNLI_TEST = "".join(
    "\t".join(row) + "\n"
    for row in (MNLI_COLUMNS.split(), ["0", *"bcdefghij"], ["1", *"bcdefghij"])
)
# The official test files that are not among the real ones at hand, with the answers to their rows.
OFFICIAL_SHAPE: dict[str, tuple[str, str, list[str], str, bytes]] = {
    "qqp": (
        "glue/QQP/test.tsv",
        'id\tquestion1\tquestion2\n0\tWhy?\tHow?\n1\tWho "is\tWho is\n',
        ["No", "Yes"],
        "QQP.tsv",
        b"index\tprediction\n0\t0\n1\t1\n",
    ),
    "mnli": (
        "glue/MNLI/test_matched.tsv",
        MNLI_TEST,
        ["Neutral", "Contradiction"],
        "MNLI-m.tsv",
        b"index\tprediction\n0\tneutral\n1\tcontradiction\n",
    ),
    "mnli-mm": (
        "glue/MNLI/test_mismatched.tsv",
        MNLI_TEST,
        ["Entailment", "Contradiction"],
        "MNLI-mm.tsv",
        b"index\tprediction\n0\tentailment\n1\tcontradiction\n",
    ),
    "record": (
        "superglue/ReCoRD/test.jsonl",
        json.dumps(RECORD_TEST) + "\n",
        ["No", "Yes", "No", "No", "No", "Yes"],
        "ReCoRD.jsonl",
        b'{"idx": 40, "label": "Bo"}\n{"idx": 41, "label": "Rome"}\n',
    ),
}


@pytest.mark.parametrize("task", OFFICIAL_SHAPE)
def test_files_of_the_official_shape_are_read_and_answered(task: str, tmp_path: Path) -> None:
    path, text, words, name, expected = OFFICIAL_SHAPE[task]
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(text)
    world = World(tmp_path)
    run = world.run("run", task)
    cfg = load_config(run / "config.yaml", [f"data.path={tmp_path}"])
    world.splits[task, "test"] = data.load_split(TASKS[task], "test", cfg.data).examples
    world.keep(run, task, words)
    benchmark = TASKS[task].benchmark
    files = unzipped(submitted(benchmark, [run], "--allow-partial", f"data.path={tmp_path}"))
    assert files == {name: expected}
