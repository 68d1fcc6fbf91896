"""The rows that the model is taught to answer: prompts in the <Judgement> form and their words."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ppo_nlu.config import DataConfig
from ppo_nlu.data import load_split
from ppo_nlu.errors import UserError
from ppo_nlu.pretrain.config import TinyConfig
from ppo_nlu.pretrain.corpus import (
    Corpus,
    LeakFilter,
    Split,
    build_corpus,
    data_root,
    split_labels,
    train_rows,
)
from ppo_nlu.tasks import Example, Label, TaskSpec, get_task
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
class Lesson:
    """The rows of one task, each with its right word."""

    spec: TaskSpec
    rows: list[Example]

    def prompts(self) -> list[str]:
        """What the rows ask."""
        return [render(self.spec, row.fields) for row in self.rows]


def lesson(spec: TaskSpec, pairs: Iterable[tuple[str, str]]) -> Lesson:
    """The lesson of (sentence, word) pairs."""
    rows = [Example("", {"sentence": text}, word, spec.name) for text, word in pairs]
    return Lesson(spec, rows)


def rating(spec: TaskSpec, pairs: Iterable[tuple[str, str]]) -> Lesson:
    """The same pairs as rated reviews, in words that no task of ours uses."""
    words = {label.word: RATING.word_of(label.value) for label in spec.labels}
    return lesson(RATING, ((text, str(words[word])) for text, word in pairs))


def other_lessons(root: Path, leaks: LeakFilter, limit: int, rng: random.Random) -> list[Lesson]:
    """The other tasks, at most `limit` rows of each, from their train parts."""
    found = []
    for spec, file in OTHER_TASKS:
        rows = train_rows(spec, root / file)
        rows = [row for row in rows if not leaks.hits(render(spec, row.fields))]
        if chosen := rng.sample(rows, min(limit, len(rows))):
            found.append(Lesson(spec, chosen))
    return found


def neutral_lesson(spec: TaskSpec, corpus: Corpus, limit: int, rng: random.Random) -> Lesson:
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
    return lesson(spec, ((line, word) for line in chosen for word in spec.words))


@dataclass(frozen=True)
class Material:
    """Everything that the stages read: nothing forbidden is in it but the dev rows, for scoring."""

    corpus: Corpus
    split: Split
    own: Lesson
    others: list[Lesson]
    neutral: Lesson
    heldout: Lesson
    dev: Lesson


def gather(cfg: TinyConfig) -> Material:
    """Read the data, choose the seen labels, and drop what must not be seen."""
    spec, root = get_task(cfg.task), data_root(cfg)
    place = DataConfig(path=str(root))
    train, dev, test = (load_split(spec, name, place).examples for name in ("train", "dev", "test"))
    leaks = LeakFilter(row.fields["sentence"] for row in (*dev, *test))
    split = split_labels(train, cfg.seen, cfg.seed)
    if not (split.seen and split.heldout_sentences):
        raise UserError("seen.train_share, seen.heldout_share: no sentence chosen; raise them")
    rng = random.Random(cfg.seed)
    corpus = build_corpus(root, split, leaks, cfg.data)
    limit = cfg.instruct.rows_per_task
    return Material(
        corpus=corpus,
        split=split,
        own=lesson(spec, (pair for pair in split.seen if not leaks.hits(pair[0]))),
        others=other_lessons(root, leaks, limit, rng),
        neutral=neutral_lesson(spec, corpus, limit, rng),
        heldout=lesson(spec, split.heldout_pairs),
        dev=Lesson(spec, dev),
    )
