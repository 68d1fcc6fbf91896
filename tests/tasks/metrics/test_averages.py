"""The benchmarks' averages against the paper's tables and by hand."""

from __future__ import annotations

import pytest

from ppo_nlu.tasks import TASKS
from ppo_nlu.tasks.metrics import average

# arXiv 2410.11020, tables 1 and 2, with their averages. Left out: the two rows whose printed
# average does not follow from them (PPO-MT of GLUE, few-shot of SuperGLUE). Each printed number is
# rounded by at most 0.05, so a mean of them may differ from the printed mean by 0.1.
GLUE_ORDER = ("mnli", "mnli-mm", "qqp", "qnli", "sst2", "cola", "stsb", "mrpc", "glue/rte")
GLUE_ROWS = {
    "BERT-base": ((84.6, 83.4, 71.2, 90.5, 93.5, 52.1, 85.8, 88.9, 66.4), 79.6),
    "BERT-large": ((86.7, 85.9, 72.1, 92.7, 94.9, 60.5, 86.5, 89.3, 70.1), 82.1),
    "zero-shot": ((38.3, 39.7, 31.3, 58.5, 75.7, 18.6, 27.5, 66.3, 59.3), 46.1),
    "few-shot": ((62.4, 61.7, 30.9, 60.7, 84.2, 29.0, 45.5, 80.8, 72.9), 58.7),
    "PPO-ST": ((88.8, 88.2, 70.5, 93.2, 96.4, 59.9, 92.6, 89.4, 84.3), 84.8),
    "SFT-ST": ((87.0, 86.5, 63.8, 93.6, 73.8, 50.7, 84.7, 85.8, 80.4), 78.5),
    "SFT-MT": ((84.9, 84.5, 62.9, 86.0, 72.0, 41.4, 85.5, 82.6, 86.2), 76.2),
}
SUPERGLUE_ORDER = ("boolq", "cb", "copa", "multirc", "record", "superglue/rte", "wic", "wsc")
SUPERGLUE_ROWS = {
    "BERT-large": (
        ((77.4,), (75.7, 83.6), (70.6,), (70.0, 24.0), (72.0, 71.3), (71.6,), (69.5,), (64.3,)),
        69.0,
    ),
    "BERT-large++": (
        ((79.0,), (84.7, 90.4), (73.8,), (70.0, 24.1), (72.0, 71.3), (79.0,), (69.5,), (64.3,)),
        71.5,
    ),
    "zero-shot": (
        ((75.8,), (26.4, 43.6), (57.0,), (51.9, 20.3), (27.0, 26.2), (59.2,), (54.4,), (52.1,)),
        49.5,
    ),
    "PPO-ST": (
        ((85.9,), (74.7, 88.0), (88.6,), (82.5, 50.0), (70.6, 69.9), (84.3,), (72.1,), (78.1,)),
        78.3,
    ),
}


@pytest.mark.parametrize("model", GLUE_ROWS)
def test_the_papers_glue_average_follows_from_its_rows(model: str) -> None:
    values, published = GLUE_ROWS[model]
    # The metrics that the paper does not show are there too, and must not count.
    scores = {
        task: {TASKS[task].shown[0]: value} | {"other": -1e9}
        for task, value in zip(GLUE_ORDER, values, strict=True)
    }
    scores |= {"wnli": {"accuracy": -1e9}, "ax": {"mcc": -1e9}}
    assert average("glue", scores, "paper") == pytest.approx(published, abs=0.1)


@pytest.mark.parametrize("model", SUPERGLUE_ROWS)
def test_the_papers_superglue_average_follows_from_its_rows(model: str) -> None:
    rows, published = SUPERGLUE_ROWS[model]
    scores = {
        task: dict(zip(TASKS[task].metrics, values, strict=True))
        for task, values in zip(SUPERGLUE_ORDER, rows, strict=True)
    }
    scores |= {"ax-b": {"mcc": -1e9}, "ax-g": {"gender_parity": -1e9, "accuracy": -1e9}}
    for style in ("paper", "official"):
        assert average("superglue", scores, style) == pytest.approx(published, abs=0.1)


def test_the_official_glue_average_by_hand() -> None:
    scores = {
        "cola": {"mcc": 0.5},
        "sst2": {"accuracy": 1.0},
        "mrpc": {"f1": 0.8, "accuracy": 0.6},  # 0.7
        "qqp": {"f1": 0.7, "accuracy": 0.9},  # 0.8
        "stsb": {"pearson": 0.9, "spearman": 0.7},  # 0.8
        "mnli": {"accuracy": 0.8},  # with -mm 0.7
        "mnli-mm": {"accuracy": 0.6},
        "qnli": {"accuracy": 0.9},
        "glue/rte": {"accuracy": 0.6},
        "wnli": {"accuracy": 0.4},
        "ax": {"mcc": -1.0},
    }
    # .5 1 .7 .8 .8 .7 .9 .6 .4
    assert average("glue", scores) == pytest.approx(6.4 / 9)
    # the paper's: .8 .6 .7 .9 1 .5 .7 .8 .6
    assert average("glue", scores, "paper") == pytest.approx(6.6 / 9)
    for task, styles in {"wnli": {"official"}, "mnli-mm": {"official", "paper"}}.items():
        short = {name: values for name, values in scores.items() if name != task}
        missing = {s for s in ("official", "paper") if average("glue", short, s) is None}
        assert missing == styles


def test_the_paper_shows_only_metrics_that_the_tasks_have() -> None:
    for spec in TASKS.values():
        assert set(spec.shown) <= set(spec.metrics)
    assert [name for name, spec in TASKS.items() if spec.shown != spec.metrics] == [
        "qqp",
        "stsb",
        "mrpc",
    ]
