"""How good the model's answers are: label scoring, decoding, and the scores on the card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ppo_nlu.pretrain.config import EvalConfig
from ppo_nlu.pretrain.lessons import Lesson
from ppo_nlu.tasks.answers import parse
from ppo_nlu.tasks.prompts import answer
from ppo_nlu.tree.prefix_tree import cache_argument, kept_cache


def common_prefix(rows: list[list[int]]) -> int:
    """How many leading ids all rows share; the last id of no row counts."""
    shortest = min(map(len, rows)) - 1
    return next((i for i in range(shortest) if len({row[i] for row in rows}) > 1), shortest)


def shared_cache(model: Any, prefix: list[int], size: int) -> Any:
    """The keys and values of one prefix, for `size` rows; the gradient sums over them."""
    from transformers import DynamicCache

    cache = DynamicCache()
    once = kept_cache(model.model(input_ids=torch.tensor([prefix]), use_cache=True))
    for index, layer in enumerate(once.layers):
        keys, values = (x.expand(size, -1, -1, -1) for x in (layer.keys, layer.values))
        cache.update(keys, values, index)
    return cache


def answer_logprobs(model: Any, tokenizer: Any, prompts: list[str], words: list[str]) -> Tensor:
    """log P of the whole ` Word </Judgement>` behind each prompt, (B,); the opening is run once."""
    heads = tokenizer(prompts)["input_ids"]
    wholes = tokenizer([p + answer(w) for p, w in zip(prompts, words, strict=True)])["input_ids"]
    shared = max(1, common_prefix(heads))
    longest = max(map(len, wholes)) - shared
    pad = tokenizer.pad_token_id
    rests = [row[shared:] for row in wholes]
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rests])  # causal: pad is idle
    cache = shared_cache(model, wholes[0][:shared], len(wholes))
    before = {cache_argument(model.model): cache}
    hidden = model.model(input_ids=ids, use_cache=True, **before).last_hidden_state
    place = torch.arange(1, longest)
    starts = torch.tensor([len(row) - shared for row in heads])[:, None]
    ends = torch.tensor([len(row) for row in rests])[:, None]
    mask = (place >= starts) & (place < ends)  # (B, longest - 1): the answer's tokens
    logprobs = F.log_softmax(model.lm_head(hidden[:, :-1][mask]).float(), dim=-1)
    picked = logprobs.gather(1, ids[:, 1:][mask][:, None])[:, 0]
    owner = torch.arange(len(wholes))[:, None].expand_as(mask)[mask]
    return torch.zeros(len(wholes)).index_add(0, owner, picked)


@torch.no_grad()
def label_scores(model: Any, tokenizer: Any, lesson: Lesson, batch_size: int) -> Tensor:
    """log P of every label's whole answer: (rows, labels)."""
    model.eval()
    asked = lesson.prompts()
    order = sorted(range(len(asked)), key=lambda i: len(asked[i]))
    scores = torch.zeros(len(asked), len(lesson.spec.words))
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        prompts = [asked[i] for i in index]
        for k, word in enumerate(lesson.spec.words):
            words = [word] * len(index)
            scores[index, k] = answer_logprobs(model, tokenizer, prompts, words)
    return scores


def gold_index(lesson: Lesson) -> Tensor:
    """The place of each row's right word among the task's."""
    return torch.tensor([lesson.spec.words.index(str(row.label)) for row in lesson.rows])


def expected_accuracy(scores: Tensor, lesson: Lesson) -> float:
    """The mean probability of the right answer: what one sample a row scores on average."""
    gold = gold_index(lesson)
    return scores.gather(1, gold[:, None]).exp().mean().item()


def score_accuracy(scores: Tensor, lesson: Lesson) -> float:
    """Accuracy of the likelier label."""
    gold = gold_index(lesson)
    return (scores.argmax(1) == gold).float().mean().item()


@dataclass(frozen=True)
class Scores:
    """Fractions of all rows; an unparsed answer is a wrong one."""

    rows: int
    sampled: float  # one sample a row at temperature 1, mean of the runs
    sampled_runs: list[float]
    greedy: float
    score: float  # the likelier of the whole answers
    expected: float  # mean probability of the right answer
    unparsed: float  # of the samples
    first_word_share: float  # of the samples


@torch.no_grad()
def respond(
    model: Any, tokenizer: Any, lesson: Lesson, cfg: EvalConfig, rng: torch.Generator | None
) -> list[str]:
    """One response to each prompt; sampled at temperature 1 with `rng`, greedy without."""
    model.eval()
    prompts = tokenizer(lesson.prompts())["input_ids"]
    groups: dict[int, list[int]] = {}
    for i, ids in enumerate(prompts):  # equal lengths together: no padding
        groups.setdefault(len(ids), []).append(i)
    texts = [""] * len(prompts)
    for group in groups.values():
        ids = torch.tensor([prompts[i] for i in group])
        cache, made = None, torch.zeros(len(group), 0, dtype=torch.long)
        for _ in range(cfg.max_new_tokens):
            before = {cache_argument(model): cache}
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **before)
            cache = kept_cache(out)
            probs = out.logits[:, -1].float().softmax(-1)
            greedy = probs.argmax(-1, keepdim=True)
            ids = greedy if rng is None else probs.multinomial(1, generator=rng)
            made = torch.cat([made, ids], dim=1)
        for i, row in zip(group, tokenizer.batch_decode(made), strict=True):
            texts[i] = row
    return texts


def evaluate(model: Any, tokenizer: Any, lesson: Lesson, cfg: EvalConfig, seed: int) -> Scores:
    """Sampled, greedy and label-scoring accuracy, and the share of samples without an answer."""
    spec, gold = lesson.spec, [row.label for row in lesson.rows]

    def words(rng: torch.Generator | None) -> list[str | None]:
        return [parse(spec, text) for text in respond(model, tokenizer, lesson, cfg, rng)]

    def right(found: list[str | None]) -> float:
        return sum(a == b for a, b in zip(found, gold, strict=True)) / len(gold)

    rng = torch.Generator().manual_seed(seed)
    runs = [words(rng) for _ in range(cfg.samples)]
    drawn = [word for run in runs for word in run]
    scores = label_scores(model, tokenizer, lesson, cfg.batch_size)
    return Scores(
        rows=len(gold),
        sampled=sum(map(right, runs)) / len(runs),
        sampled_runs=[right(run) for run in runs],
        greedy=right(words(None)),
        score=score_accuracy(scores, lesson),
        expected=expected_accuracy(scores, lesson),
        unparsed=drawn.count(None) / len(drawn),
        first_word_share=drawn.count(spec.words[0]) / len(drawn),
    )
