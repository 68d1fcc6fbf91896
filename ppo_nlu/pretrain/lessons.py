"""The rows that the model is taught to answer: prompts in the <Judgement> form and their words."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ppo_nlu.errors import UserError
from ppo_nlu.pretrain.config import TinyConfig
from ppo_nlu.pretrain.corpus import (
    Corpus,
    LeakFilter,
    Split,
    build_corpus,
    data_root,
    split_labels,
    table,
)
from ppo_nlu.tasks import Label, TaskSpec, get_task
from ppo_nlu.tasks.prompts import render

TOPIC = TaskSpec(
    name="topic",
    title="AG News",
    benchmark="extra",
    folder="AG_News",
    description="You read a piece of news. The task is to name its desk.",
    query='Now name the desk of the news "{sentence}".',
    fields=("sentence",),
    labels=(
        Label("World", "World"),
        Label("Sports", "Sports"),
        Label("Business", "Business"),
        Label("Science", "Sci/Tech"),
    ),
    label_column="label",
)
RELATION = TaskSpec(
    name="relation",
    title="SNLI",
    benchmark="extra",
    folder="SNLI",
    description="You compare a premise with a hypothesis. The task is to name their relation.",
    query='Premise: "{sentence1}". Hypothesis: "{sentence2}". Now judge the relation.',
    fields=("sentence1", "sentence2"),
    labels=(
        Label("Entailment", "entailment"),
        Label("Neutral", "neutral"),
        Label("Contradiction", "contradiction"),
    ),
    label_column="gold_label",
)
SAME = TaskSpec(
    name="same",
    title="QQP",
    benchmark="glue",
    folder="QQP",
    description="You compare two questions asked on a forum.",
    query='Now judge if "{question1}" and "{question2}" ask the same thing.',
    fields=("question1", "question2"),
    labels=(Label("Yes", "1"), Label("No", "0")),
    label_column="is_duplicate",
)
RECALL = TaskSpec(
    name="recall",
    title="word recall",
    benchmark="extra",
    folder="",
    description="You read a sentence. The task is to name a word of it.",
    query='Now name a word of the sentence "{sentence}".',
    fields=("sentence",),
    labels=(),
    label_column="",
)
RATING = TaskSpec(
    name="rating",
    title="rating",
    benchmark="extra",
    folder="",
    description="You read a film review. The task is to rate it as favourable or unfavourable.",
    query='Now rate the review "{sentence}".',
    fields=("sentence",),
    labels=(Label("favourable", "1"), Label("unfavourable", "0")),
    label_column="label",
)
OTHER_TASKS = (
    (TOPIC, "extra/AG_News/train.subset10k.tsv.gz"),
    (RELATION, "extra/SNLI/train.subset10k.tsv.gz"),
    (SAME, "glue/QQP/train.subset9k.tsv.gz"),
)


@dataclass(frozen=True)
class Row:
    """One prompt of the instruction stage with its gold word."""

    spec: TaskSpec
    prompt: str
    word: str


def rows_of(spec: TaskSpec, table_rows: Iterable[dict[str, str]]) -> list[Row]:
    """The rows with a known label, rendered."""
    found = []
    for row in table_rows:
        word = spec.word_of(row[spec.label_column])
        if word is not None:
            found.append(Row(spec, render(spec, row), word))
    return found


def rows_of_pairs(spec: TaskSpec, pairs: Iterable[tuple[str, str]]) -> list[Row]:
    """(phrase, label) pairs as prompts."""
    return rows_of(spec, ({"sentence": key, spec.label_column: label} for key, label in pairs))


def other_rows(root: Path, leaks: LeakFilter, limit: int, rng: random.Random) -> list[Row]:
    """Prompts of the other tasks, at most `limit` of each, from their train parts."""
    found: list[Row] = []
    for spec, file in OTHER_TASKS:
        if (root / file).is_file():
            rows = [r for r in rows_of(spec, table(root / file)) if not leaks.hits(r.prompt)]
            found += rng.sample(rows, min(limit, len(rows)))
    return found


def neutral_rows(spec: TaskSpec, corpus: Corpus, limit: int, rng: random.Random) -> list[Row]:
    """Texts without an opinion in the task's own form, each with every label word.

    They teach which words answer, and that without evidence all are equally likely.
    """
    lines = [
        text.partition("\n")[0]
        for name, texts in corpus.texts.items()
        if name not in corpus.passes  # those with passes are the film texts
        for text in texts
    ]
    short = sorted({line for line in lines if 3 < len(line.split()) < 30})
    chosen = rng.sample(short, min(limit, len(short)))
    prompts = [render(spec, {"sentence": line}) for line in chosen]
    return [Row(spec, prompt, word) for prompt in prompts for word in spec.words]


@dataclass(frozen=True)
class Material:
    """Everything that the stages read: nothing forbidden is in it but the dev rows, for scoring."""

    spec: TaskSpec
    corpus: Corpus
    split: Split
    seen: list[Row]
    others: list[Row]
    neutral: list[Row]
    heldout: list[Row]
    dev: list[Row]


def gather(cfg: TinyConfig) -> Material:
    """Read the data, choose the seen labels, and drop what must not be seen."""
    spec, root = get_task(cfg.task), data_root(cfg)
    folder = root / spec.benchmark / spec.folder
    read = {name: table(folder / files[0]) for name, files in spec.files.items()}
    leaks = LeakFilter(row["sentence"] for name in ("dev", "test") for row in read[name])
    split = split_labels(read["train"], cfg.seen, cfg.seed)
    whole = set(split.heldout_sentences)
    rng = random.Random(cfg.seed)
    if not (split.seen and split.heldout_sentences):
        raise UserError("seen.train_share, seen.heldout_share: no sentence chosen; raise them")
    corpus = build_corpus(root, split, leaks, cfg.data)
    return Material(
        spec=spec,
        corpus=corpus,
        split=split,
        seen=rows_of_pairs(spec, [pair for pair in split.seen if not leaks.hits(pair[0])]),
        others=other_rows(root, leaks, cfg.instruct.rows_per_task, rng),
        neutral=neutral_rows(spec, corpus, cfg.instruct.rows_per_task, rng),
        heldout=rows_of_pairs(spec, [pair for pair in split.heldout if pair[0] in whole]),
        dev=rows_of(spec, read["dev"]),
    )
