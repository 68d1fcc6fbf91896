"""The texts that the model reads, and the sentences of SST-2 whose labels it may see.

No SST-2 dev or test sentence enters any training text. A sentence of train whose label is seen
takes all phrases along that are a run of words inside it, and the held-out ones are not read.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ppo_nlu.data import normalise
from ppo_nlu.data.readers import read_split
from ppo_nlu.errors import UserError
from ppo_nlu.pretrain.config import SeenConfig, TextConfig, TinyConfig
from ppo_nlu.tasks import Example, TaskSpec, get_task


def data_root(cfg: TinyConfig) -> Path:
    """The folder that holds glue/, superglue/ and extra/."""
    place = cfg.data.path or os.environ.get("PPO_NLU_DATA")
    if not place:
        raise UserError("data.path: no data folder given; set data.path=FOLDER or $PPO_NLU_DATA")
    for root in (Path(place), Path(place).parent):
        if (root / "glue" / "SST-2" / "train.tsv").is_file():
            return root
    raise UserError(f"data.path: {place} holds no glue/SST-2/train.tsv; give the folder above glue")


# Parts of train sets, and never a label: what the card calls them, task, file, fields.
TEXTS = (
    ("AG News", "ag_news", "extra/AG_News/train.subset10k.tsv.gz", ("sentence",)),
    ("SNLI", "snli", "extra/SNLI/train.subset10k.tsv.gz", ("premise", "hypothesis")),
    ("MNLI", "mnli", "glue/MNLI/train.subset10k.tsv.gz", ("premise", "hypothesis")),
    ("QNLI", "qnli", "glue/QNLI/train.subset10k.tsv.gz", ("question", "sentence")),
    ("QQP", "qqp", "glue/QQP/train.subset9k.tsv.gz", ("question1", "question2")),
    ("MRPC", "mrpc", "glue/MRPC/train.tsv", ("sentence1", "sentence2")),
    ("STS-B", "stsb", "glue/STS-B/train.tsv", ("sentence1", "sentence2")),
    ("RTE", "glue/rte", "glue/RTE/train.tsv", ("premise", "hypothesis")),
    ("WiC", "wic", "superglue/WiC/train.jsonl", ("sentence1", "sentence2")),
    ("CB", "cb", "superglue/CB/train.jsonl", ("premise", "hypothesis")),
    ("COPA", "copa", "superglue/COPA/train.jsonl", ("premise", "choice1", "choice2")),
    ("BoolQ", "boolq", "superglue/BoolQ/train.fewglue64.jsonl", ("passage", "question")),
    ("CoLA (acceptable)", "cola", "glue/CoLA/train.tsv", ("sentence",)),
    ("MultiRC", "multirc", "superglue/MultiRC/train.jsonl.gz", ("passage",)),
)


def train_rows(spec: TaskSpec, path: Path) -> list[Example]:
    """The rows of a file of the task; none where the file is not there."""
    return read_split(spec, "train", path).examples if path.is_file() else []


def texts_of(rows: Iterable[Example], fields: Sequence[str]) -> list[str]:
    """The fields of each row, a line each."""
    return ["\n".join(row.fields[name].strip() for name in fields) for row in rows]


def general_texts(root: Path) -> dict[str, list[str]]:
    """Texts of the train parts of other sets, by name; a set that is not there is left out."""
    found: dict[str, list[str]] = {}
    for name, task, file, fields in TEXTS:
        spec = get_task(task)
        rows = train_rows(spec, root / file)
        if task == "cola":  # the other sentences are no English
            rows = [row for row in rows if row.label == spec.word_of("1")]
        texts = texts_of(rows, fields)
        if task == "multirc":  # a row is an answer, and a passage has many
            texts = list(dict.fromkeys(texts))
        if texts:
            found[name] = texts
    return found


def squash(text: str) -> str:
    """Letters and digits alone, so that tokenisation and punctuation hide no sentence."""
    return re.sub(r"[\W_]+", "", text.lower())


class LeakFilter:
    """Tells whether a text is, or holds, one of the forbidden sentences.

    A forbidden sentence of under `min_chars` letters ("delightful .") is only looked for as a whole
    line: as a part of lines it is a word or two of everybody's English.
    """

    def __init__(self, sentences: Iterable[str], min_chars: int = 16) -> None:
        keys = {squash(sentence) for sentence in sentences} - {""}
        self.whole = keys
        self.min_chars = min_chars
        self.by_head: dict[str, list[str]] = {}
        for key in keys:
            if len(key) >= min_chars:
                self.by_head.setdefault(key[:min_chars], []).append(key)

    def hits(self, text: str) -> bool:
        """True where the text must not be trained on."""
        lines = [squash(line) for line in text.split("\n")]
        if any(line in self.whole for line in lines):
            return True
        key, size, heads = "".join(lines), self.min_chars, self.by_head
        for at in range(len(key) - size + 1):
            if key[at : at + size] in heads:
                needles = heads[key[at : at + size]]
                if any(key.startswith(needle, at) for needle in needles):
                    return True
        return False

    def keep(self, texts: Iterable[str]) -> list[str]:
        """The texts that may be trained on."""
        return [text for text in texts if not self.hits(text)]


def parts(words: Sequence[str]) -> Iterator[str]:
    """All contiguous word sequences of a text."""
    for start in range(len(words)):
        for end in range(start + 1, len(words) + 1):
            yield " ".join(words[start:end])


def sentences_of(keys: Iterable[str]) -> list[str]:
    """The maximal phrases: those that are no part of another one. Sorted."""
    rows = set(keys)
    inner = {part for key in rows for part in parts(key.split()) if part != key and part in rows}
    return sorted(rows - inner)


def closure(sentences: Iterable[str], keys: Iterable[str]) -> set[str]:
    """Those of the keys that are one of the sentences, or a run of words inside one."""
    rows = set(keys)
    return {part for sentence in sentences for part in parts(sentence.split()) if part in rows}


@dataclass(frozen=True)
class Split:
    """SST-2 train, cut by sentence: (phrase, label word) rows."""

    seen: list[tuple[str, str]]
    heldout: list[tuple[str, str]]
    heldout_sentences: list[str]
    sentences: list[str]
    phrases: list[str]
    total_rows: int
    excluded_rows: int

    @property
    def heldout_pairs(self) -> list[tuple[str, str]]:
        """The held-out rows that are whole sentences."""
        whole = set(self.heldout_sentences)
        return [pair for pair in self.heldout if pair[0] in whole]


def split_labels(rows: Sequence[Example], cfg: SeenConfig, seed: int) -> Split:
    """Choose the sentences whose labels the model may see, with all their sub-phrases."""
    keys = [normalise(row.fields["sentence"]) for row in rows]
    labels = {key: str(row.label) for key, row in zip(keys, rows, strict=True)}
    sentences = sentences_of(labels)
    order = random.Random(seed).sample(sentences, len(sentences))
    cut = round(cfg.train_share * len(order))
    end = cut + round(cfg.heldout_share * len(order))
    # A phrase that stands in both kinds of sentence is neither trained on nor judged by, but seen.
    seen, held = closure(order[:cut], labels), closure(order[cut:end], labels)
    return Split(
        seen=[(key, labels[key]) for key in sorted(seen - held)],
        heldout=[(key, labels[key]) for key in sorted(held)],
        heldout_sentences=sorted(order[cut:end]),
        sentences=sentences,
        phrases=sorted(set(labels) - set(sentences)),
        total_rows=len(rows),
        excluded_rows=sum(key in seen or key in held for key in keys),
    )


def seen_keys(split: Split) -> set[str]:
    """The distinct phrases whose label was seen."""
    return {key for key, _ in (*split.seen, *split.heldout)}


@dataclass(frozen=True)
class Corpus:
    """The training texts: name -> (texts, passes), and how many lines the filter dropped."""

    texts: dict[str, list[str]]
    passes: dict[str, int]
    dropped: dict[str, int]


def build_corpus(root: Path, split: Split, leaks: LeakFilter, cfg: TextConfig) -> Corpus:
    """Film text first, then everything else; no line with a forbidden sentence."""
    long = [text for text in split.phrases if len(text.split()) >= cfg.phrase_min_words]
    texts = {"SST-2 train sentences": split.sentences, "SST-2 train phrases": long}
    passes = dict(zip(texts, (cfg.sentence_passes, cfg.phrase_passes), strict=True))
    if film := train_rows(get_task("mr"), root / "extra/MR/train.no_sst2_devtest.tsv.gz"):
        texts["MR"] = texts_of(film, ("sentence",))
        passes["MR"] = cfg.sentence_passes
    texts |= general_texts(root)
    held = set(split.heldout_sentences) | {key for key, _ in split.heldout}
    heldout = LeakFilter(held)
    kept, dropped = {}, {}
    for name, lines in texts.items():
        kept[name] = leaks.keep(lines)
        dropped[name] = len(lines) - len(kept[name])
        if name in passes:  # held-out sentences judge the recipe: their text is not shown either
            kept[name] = [t for t in kept[name] if normalise(t) not in held and not heldout.hits(t)]
    return Corpus(kept, passes, dropped)
