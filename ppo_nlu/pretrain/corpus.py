"""The texts that the model reads, and the sentences of SST-2 whose labels it may see.

No SST-2 dev or test sentence enters any training text. A sentence of train whose label is seen
takes all phrases along that are a run of words inside it, and the held-out ones are not read.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppo_nlu.errors import UserError
from ppo_nlu.pretrain.config import DataConfig, SeenConfig, TinyConfig


def data_root(cfg: TinyConfig) -> Path:
    """The folder that holds glue/, superglue/ and extra/."""
    place = cfg.data.path or os.environ.get("PPO_NLU_DATA")
    if not place:
        raise UserError("data.path: no data folder given; set data.path=FOLDER or $PPO_NLU_DATA")
    for root in (Path(place), Path(place).parent):
        if (root / "glue" / "SST-2" / "train.tsv").is_file():
            return root
    raise UserError(f"data.path: {place} holds no glue/SST-2/train.tsv; give the folder above glue")


def open_text(path: Path) -> io.StringIO:
    """The text of a file, gzipped or not, without a byte order mark."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return io.StringIO(raw.decode("utf-8-sig"), newline="")


def table(path: Path, names: Sequence[str] | None = None) -> list[dict[str, str]]:
    """The rows of a tab-separated file by column name; quotes mean nothing."""
    lines = [line.rstrip("\r\n").split("\t") for line in open_text(path)]
    header, body = (list(names), lines) if names else (lines[0], lines[1:])
    return [dict(zip(header, row, strict=False)) for row in body if len(row) >= len(header)]


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file."""
    return [json.loads(line) for line in open_text(path) if line.strip()]


def columns(rows: Iterable[dict[str, Any]], *names: str) -> list[str]:
    """One text for each row: the named columns, a line each."""
    return ["\n".join(str(row[name]).strip() for name in names) for row in rows]


# Train parts only, and never a label: (name, file, columns).
TEXT_TABLES = (
    ("AG News", "extra/AG_News/train.subset10k.tsv.gz", ("sentence",)),
    ("SNLI", "extra/SNLI/train.subset10k.tsv.gz", ("sentence1", "sentence2")),
    ("MNLI", "glue/MNLI/train.subset10k.tsv.gz", ("sentence1", "sentence2")),
    ("QNLI", "glue/QNLI/train.subset10k.tsv.gz", ("question", "sentence")),
    ("QQP", "glue/QQP/train.subset9k.tsv.gz", ("question1", "question2")),
    ("MRPC", "glue/MRPC/train.tsv", ("#1 String", "#2 String")),
    ("STS-B", "glue/STS-B/train.tsv", ("sentence1", "sentence2")),
    ("RTE", "glue/RTE/train.tsv", ("sentence1", "sentence2")),
)
TEXT_JSON = (
    ("WiC", "superglue/WiC/train.jsonl", ("sentence1", "sentence2")),
    ("CB", "superglue/CB/train.jsonl", ("premise", "hypothesis")),
    ("COPA", "superglue/COPA/train.jsonl", ("premise", "choice1", "choice2")),
    ("BoolQ", "superglue/BoolQ/train.fewglue64.jsonl", ("passage", "question")),
)
COLA_COLUMNS = ("source", "label", "mark", "sentence")


def general_texts(root: Path) -> dict[str, list[str]]:
    """Texts of the train parts of other sets, by name; a set that is not there is left out."""
    found: dict[str, list[str]] = {}
    for name, file, names in TEXT_TABLES:
        if (root / file).is_file():
            found[name] = columns(table(root / file), *names)
    for name, file, keys in TEXT_JSON:
        if (root / file).is_file():
            found[name] = columns(json_lines(root / file), *keys)
    cola = root / "glue/CoLA/train.tsv"
    if cola.is_file():
        rows = [row for row in table(cola, COLA_COLUMNS) if row["label"] == "1"]
        found["CoLA (acceptable)"] = columns(rows, "sentence")
    multirc = root / "superglue/MultiRC/train.jsonl.gz"
    if multirc.is_file():
        found["MultiRC"] = [row["passage"]["text"].strip() for row in json_lines(multirc)]
    return found


def normalise(text: str) -> str:
    """The key by which rows are matched to the list of seen labels."""
    return " ".join(text.lower().split())


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
    """Every run of consecutive words, the whole included."""
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
    """SST-2 train, cut by sentence: (phrase, label value) rows."""

    seen: list[tuple[str, str]]
    heldout: list[tuple[str, str]]
    heldout_sentences: list[str]
    sentences: list[str]
    phrases: list[str]
    total_rows: int
    excluded_rows: int


def split_labels(rows: list[dict[str, str]], cfg: SeenConfig, seed: int) -> Split:
    """Choose the sentences whose labels the model may see, with all their sub-phrases."""
    labels = {normalise(row["sentence"]): row["label"] for row in rows}
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
        excluded_rows=sum(normalise(row["sentence"]) in seen | held for row in rows),
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


def build_corpus(root: Path, split: Split, leaks: LeakFilter, cfg: DataConfig) -> Corpus:
    """Film text first, then everything else; no line with a forbidden sentence."""
    long = [text for text in split.phrases if len(text.split()) >= cfg.phrase_min_words]
    texts = {"SST-2 train sentences": split.sentences, "SST-2 train phrases": long}
    passes = dict(zip(texts, (cfg.sentence_passes, cfg.phrase_passes), strict=True))
    film = root / "extra/MR/train.no_sst2_devtest.tsv.gz"
    if film.is_file():
        texts["MR"] = columns(table(film), "sentence")
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
