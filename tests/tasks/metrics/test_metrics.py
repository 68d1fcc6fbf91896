"""All metrics of a task, and its report."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from sklearn import metrics as sk

from ppo_nlu.errors import UserError
from ppo_nlu.tasks import TASKS
from ppo_nlu.tasks.metrics import METRICS, classification_report, evaluate, report, task_score
from tests.tasks.metrics.judged import TEXT, random_answers, rows, spelt


@pytest.mark.parametrize(("task", "name"), [("sst2", "pearson"), ("stsb", "accuracy")])
def test_a_metric_of_another_kind_is_refused(task: str, name: str) -> None:
    spec = replace(TASKS[task], metrics=(name,))
    with pytest.raises(UserError, match=f"metrics of {task}: unknown metric '{name}'; use "):
        evaluate(spec, rows([spec.words[0]]), [spec.words[0]])


@pytest.mark.parametrize(
    ("labels", "given"), [([], []), (["Yes"], []), ([None], ["Yes"]), (["Yes"], ["Maybe"])]
)
def test_rows_that_cannot_be_judged_are_refused(labels: list, given: list) -> None:
    with pytest.raises(ValueError):
        evaluate(TASKS["cola"], rows(labels), given)
    if None in labels:
        with pytest.raises(ValueError, match="row 0 has no label"):
            evaluate(TEXT, rows(labels), given)
    if labels == ["Yes"]:
        with pytest.raises(ValueError, match="probabilities"):
            evaluate(TASKS["cola"], rows(labels), ["Yes"], [None, None])


def test_every_metric_of_every_task_is_known() -> None:
    for spec in TASKS.values():
        assert all(METRICS[name].kind == spec.kind for name in spec.metrics), spec.name


def test_a_report_holds_the_metrics_and_the_counts() -> None:
    gold, given = random_answers(("Yes", "No"), 400)
    figures = report(TASKS["mrpc"], rows(gold), given)
    said = [p == "Yes" for p in given]
    f1 = sk.f1_score([g == "Yes" for g in gold], said)
    right = sk.accuracy_score(gold, spelt(given))
    assert figures["metrics"] == {"f1": pytest.approx(f1), "accuracy": pytest.approx(right)}
    assert figures["score"] == pytest.approx((f1 + right) / 2) == task_score(figures["metrics"])
    plain = classification_report(gold, given, ("Yes", "No"))
    assert {key: figures[key] for key in plain} == plain
    assert figures["interval"][0] < figures["score"] < figures["interval"][1]
    assert json.loads(json.dumps(figures)) == figures
    assert report(TASKS["mrpc"], rows(gold), given) == figures
    assert report(TASKS["mrpc"], rows(gold), given, seed=1)["interval"] != figures["interval"]
    bare = report(TASKS["mrpc"], rows(gold), given, resamples=0)
    assert bare["interval"] is None and bare["accuracy_interval"] is None
