"""The stages of training, one after the other: pretrain, recall, rate, instruct."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ppo_nlu.config import OptimConfig
from ppo_nlu.errors import UserError
from ppo_nlu.pretrain.config import (
    InstructConfig,
    ModelConfig,
    PretrainConfig,
    RatingConfig,
    RecallConfig,
)
from ppo_nlu.pretrain.corpus import Corpus
from ppo_nlu.pretrain.lessons import RECALL, Lesson, Material, rating
from ppo_nlu.pretrain.scores import (
    answer_logprobs,
    common_prefix,
    expected_accuracy,
    label_scores,
    score_accuracy,
    shared_cache,
)
from ppo_nlu.runtime import optim
from ppo_nlu.tasks import Example
from ppo_nlu.tasks.prompts import render
from ppo_nlu.tree.prefix_tree import cache_argument

StageConfig = PretrainConfig | RecallConfig | RatingConfig | InstructConfig


def new_model(cfg: ModelConfig, tokenizer: Any) -> Any:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=cfg.hidden,
        intermediate_size=cfg.ffn,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.heads,
        max_position_embeddings=cfg.context,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


class Descent:
    """A stage's optimizer steps over all weights: AdamW, warm-up, then as the schedule says."""

    def __init__(self, model: Any, key: str, cfg: StageConfig, steps: int, schedule: str):
        self.key, self.steps, self.done = key, steps, 0
        self.settings = OptimConfig(
            name="adamw",
            lr=cfg.lr,
            weight_decay=cfg.weight_decay,
            eps=1e-8,
            schedule=schedule,
            warmup=cfg.warmup,
        )
        self.parameters = list(model.parameters())
        matrices = [p for p in self.parameters if p.ndim > 1]
        norms = [p for p in self.parameters if p.ndim <= 1]
        self.optimizer = optim.build_optimizer(self.settings, matrices, norms)
        self.optimizer.param_groups[-1]["weight_decay"] = 0.0  # norms are not decayed

    def step(self, loss: Tensor) -> None:
        """One optimizer step with clipped gradients."""
        loss.backward()
        norm = optim.clip_gradients(self.parameters, self.settings.max_grad_norm)
        if not math.isfinite(float(norm)):
            raise UserError(
                f"{self.key}.lr: the gradient of step {self.done + 1} is not finite; lower it"
            )
        optim.set_lr(self.optimizer, optim.learning_rate(self.settings, self.done, self.steps))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1


def pack(corpus: Corpus, tokenizer: Any, cfg: PretrainConfig, seed: int) -> Tensor:
    """All texts in a shuffled stream, each between <s> and </s>, cut to rows: (N, length)."""
    length = cfg.length
    documents: list[list[int]] = []
    for name, texts in corpus.texts.items():
        ids = tokenizer(texts)["input_ids"]
        documents += [row + [tokenizer.eos_token_id] for row in ids] * corpus.passes.get(name, 1)
    random.Random(seed).shuffle(documents)
    stream = torch.tensor([token for document in documents for token in document])
    rows = stream[: len(stream) // length * length].view(-1, length)
    return rows[: cfg.max_tokens // length] if cfg.max_tokens else rows


def pretrain(model: Any, rows: Tensor, cfg: PretrainConfig) -> float:
    """Causal pretraining; the mean loss of the last tenth of the steps."""
    batches = rows.split(cfg.batch_size)
    descent = Descent(model, "pretrain", cfg, len(batches), "cosine")
    model.train()
    losses = []
    bar = tqdm(batches, desc="pretrain", unit="step", mininterval=5)
    for batch in bar:
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        descent.step(loss)
        losses.append(loss.item())
        bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}", refresh=False)
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Matrix products in a lower precision while the weights stay float32; put back afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def last_hidden(model: Any, tokenizer: Any, prompts: list[str]) -> Tensor:
    """The last hidden state of each prompt, (B, H); the opening they share is run once."""
    rows = tokenizer(prompts)["input_ids"]
    shared = max(1, common_prefix(rows))
    rests = [row[shared:] for row in rows]
    longest = max(map(len, rests))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rests])
    cache = shared_cache(model, rows[0][:shared], len(rows))
    before = {cache_argument(model.model): cache}
    hidden = model.model(input_ids=ids, use_cache=True, **before).last_hidden_state
    return hidden[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rests])]


def word_targets(tokenizer: Any, texts: list[str], weight: Tensor) -> Tensor:
    """For each text a distribution over the pieces: its own, the rare ones more, (B, V)."""
    target = torch.zeros(len(texts), len(weight))
    rows = tokenizer([" " + text for text in texts], add_special_tokens=False)["input_ids"]
    for row, ids in zip(target, rows, strict=True):
        row[ids] = weight[ids]
    return target / target.sum(1, keepdim=True)


def recall(model: Any, tokenizer: Any, corpus: Corpus, cfg: RecallConfig, seed: int) -> float:
    """Teach the place of the answer to gather the words of the text before it.

    Causal pretraining on a few million tokens gives a two-layer model no reason to look at a whole
    text from one place; a judgement has to. The mean loss of the last tenth, less its least value.
    """
    rng = random.Random(seed)
    texts = [t for name in corpus.passes for t in corpus.texts[name] if 3 < len(t.split()) < 60]
    counts = torch.bincount(
        torch.tensor([i for row in tokenizer(texts)["input_ids"] for i in row]),
        minlength=len(tokenizer),
    )
    weight = cfg.rare / (cfg.rare + counts / counts.sum())
    descent = Descent(model, "recall", cfg, cfg.steps, "cosine")
    model.train()
    losses = []
    bar = tqdm(range(cfg.steps), desc="recall", unit="step", mininterval=5)
    for _ in bar:
        batch = rng.sample(texts, min(cfg.batch_size, len(texts)))
        target = word_targets(tokenizer, batch, weight)
        hidden = last_hidden(model, tokenizer, [render(RECALL, {"sentence": t}) for t in batch])
        loss = F.cross_entropy(model.lm_head(hidden), target)
        descent.step(loss)
        losses.append(loss.item() - torch.special.entr(target).sum(1).mean().item())
        bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}", refresh=False)
    tail = losses[-max(1, cfg.steps // 10) :]
    return sum(tail) / len(tail)


def balanced(lesson: Lesson, rng: random.Random) -> Iterator[Example]:
    """The rows of a task for ever, its words in turn, each word's rows in a new order each time."""
    groups: dict[str | None, list[Example]] = {}
    for row in lesson.rows:
        groups.setdefault(row.label, []).append(row)

    def endless(group: list[Example]) -> Iterator[Example]:
        while True:
            yield from rng.sample(group, len(group))

    yield from chain.from_iterable(zip(*map(endless, groups.values()), strict=True))


@dataclass(frozen=True)
class Rated:
    """How the rating stage went; the accuracy is in its own form."""

    rows: int
    prompts: int
    heldout_score: float


def drop_words(text: str, share: float, rng: random.Random) -> str:
    """The text without a random share of its words; whole where none would be left."""
    words = text.split()
    return " ".join([word for word in words if rng.random() >= share] or words)


def rate(model: Any, tokenizer: Any, m: Material, cfg: RatingConfig, seed: int) -> Rated:
    """Learn from rated reviews what makes one favourable, in words that no task of ours uses."""
    rng = random.Random(seed)
    seen = [pair for pair in m.split.seen if len(pair[0].split()) >= cfg.min_words]
    lesson = rating(m.own.spec, seen)
    source = balanced(lesson, rng)
    descent = Descent(model, "rating", cfg, cfg.steps, "cosine")
    model.train()
    bar = tqdm(range(cfg.steps), desc="rating", unit="step", mininterval=5)
    for _ in bar:
        batch = list(islice(source, cfg.batch_size))
        texts = [drop_words(row.fields["sentence"], cfg.drop, rng) for row in batch]
        prompts = [render(lesson.spec, {"sentence": text}) for text in texts]
        loss = -answer_logprobs(model, tokenizer, prompts, [str(r.label) for r in batch]).mean()
        descent.step(loss)
        bar.set_postfix(loss=f"{loss:.2f}", refresh=False)
    heldout = rating(m.own.spec, m.split.heldout_pairs)
    scores = label_scores(model, tokenizer, heldout, 64)
    return Rated(len(seen), cfg.steps * cfg.batch_size, score_accuracy(scores, heldout))


@dataclass(frozen=True)
class Instructed:
    """How the instruction stage went."""

    steps: int
    sst2_rows: int
    neutral_rows: int
    rating_rows: int
    other_rows: int
    heldout_expected: float
    heldout_score: float


def instruct(model: Any, tokenizer: Any, m: Material, cfg: InstructConfig, seed: int) -> Instructed:
    """Teach the form, loss on the answer alone, until the held-out sentences reach `stop_at`."""
    rng = random.Random(seed)
    descent = Descent(model, "instruct", cfg, cfg.max_steps, "constant")
    own = [m.own]
    neutral = [m.neutral] if m.neutral.rows else own
    rated = [rating(m.own.spec, m.split.seen)]
    other = sorted(m.others, key=lambda lesson: lesson.spec.name) or own
    kinds = [
        [(lesson.spec, balanced(lesson, rng)) for lesson in kind]
        for kind in (own, neutral, rated, other)
    ]
    shares = [cfg.sst2_share, cfg.neutral_share, cfg.rating_share]
    shares.append(max(0.0, 1.0 - sum(shares)))
    expected, score, steps = 0.0, 0.0, [0, 0, 0, 0]
    bar = tqdm(range(1, cfg.max_steps + 1), desc="instruct", unit="step", mininterval=5)
    for step in bar:  # one task a step, so that its opening is run once
        kind = rng.choices(range(4), shares)[0]
        steps[kind] += 1
        spec, source = rng.choice(kinds[kind])
        batch = list(islice(source, cfg.batch_size))
        model.train()
        prompts, words = [render(spec, r.fields) for r in batch], [str(r.label) for r in batch]
        loss = -answer_logprobs(model, tokenizer, prompts, words).mean()
        descent.step(loss)
        if step % cfg.check_every == 0 or step == cfg.max_steps:
            scores = label_scores(model, tokenizer, m.heldout, 64)
            expected = expected_accuracy(scores, m.heldout)
            score = score_accuracy(scores, m.heldout)
            bar.set_postfix(heldout=f"{expected:.3f}", score=f"{score:.3f}", loss=f"{loss:.2f}")
            if expected >= cfg.stop_at:
                break
    bar.close()
    rows = [count * cfg.batch_size for count in steps]
    return Instructed(step, rows[0], rows[1], rows[2], rows[3], expected, score)
