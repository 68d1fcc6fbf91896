"""How good the answers are: label scoring while the model learns, and the scores on the card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppo_nlu.answering.aggregate import report
from ppo_nlu.answering.by_policy import PolicyAnswerer
from ppo_nlu.config import Config, EvalConfig, ModelConfig, RolloutConfig
from ppo_nlu.model.policy import Policy
from ppo_nlu.pretrain.config import TinyConfig
from ppo_nlu.pretrain.lessons import Lesson
from ppo_nlu.tasks.prompts import answer

BATCH = 64  # held-out rows at a time, while the model learns


def tokens(policy: Policy, prompt: str, words: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """A prompt, and the answers behind it, each tokenised with it as one text."""
    ids = policy.encode(prompt)
    return ids, [policy.encode(prompt + answer(word))[len(ids) :] for word in words]


def answer_logprobs(policy: Policy, lesson: Lesson) -> Tensor:
    """log P of each row's whole right answer, ` Word </Judgement>`, (rows,)."""
    prompts, answers = [], []
    for row, prompt in zip(lesson.rows, lesson.prompts(), strict=True):
        ids, replies = tokens(policy, prompt, [str(row.label)])
        prompts.append(ids)
        answers += replies
    return policy.score(prompts, answers).logprobs.sum(1)


@torch.no_grad()
def label_logprobs(policy: Policy, lesson: Lesson, batch_size: int = BATCH) -> Tensor:
    """log P of every label's whole answer, (rows, labels)."""
    words = lesson.spec.words
    asked = [tokens(policy, prompt, words) for prompt in lesson.prompts()]
    prefix_cache = policy.prefix_cache([ids for ids, _ in asked])
    found = []
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        answers = [reply for _, replies in batch for reply in replies]
        prompt_of = [place for place in range(len(batch)) for _ in words]
        scored = policy.score(
            [ids for ids, _ in batch], answers, prompt_of, prefix_cache=prefix_cache
        )
        found.append(scored.logprobs.sum(1).view(len(batch), len(words)))
    return torch.cat(found)


def expected_accuracy(logprobs: Tensor, lesson: Lesson) -> float:
    """The mean probability of the right answer: what one sample a row scores on average."""
    return logprobs.gather(1, gold_index(lesson)[:, None]).exp().mean().item()


def score_accuracy(logprobs: Tensor, lesson: Lesson) -> float:
    """Accuracy of the likelier label."""
    return (logprobs.argmax(1) == gold_index(lesson)).float().mean().item()


def gold_index(lesson: Lesson) -> Tensor:
    """The place of each row's right word among the task's."""
    return torch.tensor([lesson.spec.words.index(str(row.label)) for row in lesson.rows])


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


def settings(cfg: TinyConfig, model: Path) -> Config:
    """The config of a run whose base is the finished model."""
    return Config(
        task=cfg.task,
        seed=cfg.seed,
        model=ModelConfig(name_or_path=str(model), device="cpu"),
        rollout=RolloutConfig(max_new_tokens=cfg.eval.max_new_tokens),
        eval=EvalConfig(batch_size=cfg.eval.batch_size),
    )


def evaluate(policy: Policy, lesson: Lesson, cfg: Config, samples: int) -> Scores:
    """Sampled, greedy and label-scoring accuracy, and the share of samples without an answer."""
    spec, count = lesson.spec, len(lesson.rows)

    def measured(decode: str, draw: int = 0) -> dict[str, Any]:
        drawn = replace(cfg, seed=cfg.seed + draw)
        return report(spec, list(PolicyAnswerer(policy, drawn).answer(spec, lesson.rows, decode)))

    runs = [measured("sample", draw) for draw in range(samples)]
    accuracies = [run["score"] for run in runs]
    first = sum(run["predicted"][spec.words[0]] for run in runs)
    return Scores(
        rows=count,
        sampled=sum(accuracies) / samples,
        sampled_runs=accuracies,
        greedy=measured("greedy")["score"],
        score=measured("score")["score"],
        expected=expected_accuracy(label_logprobs(policy, lesson), lesson),
        unparsed=sum(run["unparsed"] for run in runs) / samples,
        first_word_share=first / (samples * count),
    )
