"""The stages of training, one after the other: pretrain, recall, rate, instruct."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from itertools import chain, islice
from statistics import fmean as mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ppo_nlu.config import ModelConfig, OptimConfig
from ppo_nlu.errors import UserError
from ppo_nlu.methods.minibatch import OptimizerStep
from ppo_nlu.model.policy import Policy, ValueHead
from ppo_nlu.pretrain.config import (
    ArchitectureConfig,
    InstructConfig,
    PretrainConfig,
    RatingConfig,
    RecallConfig,
    TinyConfig,
)
from ppo_nlu.pretrain.corpus import Corpus
from ppo_nlu.pretrain.lessons import RECALL, Lesson, Material, lesson, rating
from ppo_nlu.pretrain.scores import (
    answer_logprobs,
    expected_accuracy,
    label_logprobs,
    score_accuracy,
)
from ppo_nlu.runtime import optim
from ppo_nlu.tasks import Example
from ppo_nlu.tasks.prompts import render

StageConfig = PretrainConfig | RecallConfig | RatingConfig | InstructConfig


def new_policy(cfg: ArchitectureConfig, tokenizer: Any) -> Policy:
    """A Llama with random weights, all of which train; it drops nothing out."""
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaConfig(
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
    model = LlamaForCausalLM(llama).eval()
    return Policy(model, tokenizer, ValueHead(1, "linear"), ModelConfig())


class Descent:
    """A stage's optimizer steps over all weights: AdamW, warm-up, then as the schedule says."""

    def __init__(self, policy: Policy, key: str, cfg: StageConfig, steps: int, schedule: str):
        self.key, self.steps, self.done = key, steps, 0
        self.settings = OptimConfig(
            name="adamw",
            lr=cfg.lr,
            weight_decay=cfg.weight_decay,
            eps=1e-8,
            schedule=schedule,
            warmup=cfg.warmup,
        )
        matrices = [p for p in policy.model.parameters() if p.ndim > 1]
        norms = [p for p in policy.model.parameters() if p.ndim <= 1]
        self.optimizer = optim.build_optimizer(self.settings, matrices, norms)
        self.optimizer.param_groups[-1]["weight_decay"] = 0.0  # norms are not decayed

    def step(self, loss: Tensor) -> None:
        """One optimizer step with clipped gradients."""
        optim.set_lr(self.optimizer, optim.learning_rate(self.settings, self.done, self.steps))
        step = OptimizerStep(self.optimizer, self.settings.max_grad_norm)
        step.backward(loss, {})
        if not step.take():
            raise UserError(
                f"{self.key}.lr: the gradient of step {self.done + 1} is not finite; lower it"
            )
        self.done += 1


def pack(corpus: Corpus, tokenizer: Any, cfg: PretrainConfig, seed: int) -> Tensor:
    """All texts in a shuffled stream, each between <s> and </s>, cut to rows: (N, length)."""
    length = cfg.length
    documents: list[list[int]] = []
    for name, texts in corpus.texts.items():
        ids = tokenizer(texts)["input_ids"]
        documents += [[*row, tokenizer.eos_token_id] for row in ids] * corpus.passes.get(name, 1)
    random.Random(seed).shuffle(documents)
    stream = torch.tensor([token for document in documents for token in document])
    rows = stream[: len(stream) // length * length].view(-1, length)
    return rows[: cfg.max_tokens // length] if cfg.max_tokens else rows


def pretrain(policy: Policy, m: Material, cfg: TinyConfig) -> dict[str, Any]:
    """Causal pretraining; the loss is the mean of the last tenth of the steps."""
    rows = pack(m.corpus, policy.tokenizer, cfg.pretrain, cfg.seed)
    began = time.perf_counter()
    batches = rows.split(cfg.pretrain.batch_size)
    descent = Descent(policy, "pretrain", cfg.pretrain, len(batches), "cosine")
    losses = []
    bar = tqdm(batches, desc="pretrain", unit="step", mininterval=5, disable=None)
    for batch in bar:
        logits = policy.model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        descent.step(loss)
        losses.append(loss.item())
        bar.set_postfix(loss=f"{mean(losses[-50:]):.3f}", refresh=False)
    seconds = round(time.perf_counter() - began)
    return {"loss": mean(last_tenth(losses)), "tokens": rows.numel(), "seconds": seconds}


def last_tenth(losses: list[float]) -> list[float]:
    """The last tenth of a stage's losses, at least one."""
    return losses[-max(1, len(losses) // 10) :]


def word_targets(tokenizer: Any, texts: list[str], weight: Tensor) -> Tensor:
    """For each text a distribution over its pieces, rare ones more likely, (B, V)."""
    target = torch.zeros(len(texts), len(weight))
    rows = tokenizer([" " + text for text in texts], add_special_tokens=False)["input_ids"]
    for row, ids in zip(target, rows, strict=True):
        row[ids] = weight[ids]
    return target / target.sum(1, keepdim=True)


def recall(policy: Policy, m: Material, cfg: TinyConfig) -> dict[str, Any]:
    """Teach the place of the answer to gather the words of the text before it.

    Causal pretraining on a few million tokens gives a two-layer model no reason to look at a whole
    text from one place; a judgement has to. Returns the mean loss of the last tenth, less the least
    that it can be.
    """
    own, tokenizer, rng = cfg.recall, policy.tokenizer, random.Random(cfg.seed)
    film = [text for name in m.corpus.passes for text in m.corpus.texts[name]]
    texts = [text for text in film if 3 < len(text.split()) < 60]
    counts = torch.bincount(
        torch.tensor([i for row in tokenizer(texts)["input_ids"] for i in row]),
        minlength=len(tokenizer),
    )
    weight = own.rare / (own.rare + counts / counts.sum())
    descent = Descent(policy, "recall", own, own.steps, "cosine")
    losses = []
    bar = tqdm(range(own.steps), desc="recall", unit="step", mininterval=5, disable=None)
    for _ in bar:
        batch = rng.sample(texts, min(own.batch_size, len(texts)))
        target = word_targets(tokenizer, batch, weight)
        prompts = [policy.encode(render(RECALL, {"sentence": text})) for text in batch]
        # The states that predict a first token, whichever it is.
        hidden, _ = policy.hidden(prompts, [[tokenizer.eos_token_id]] * len(prompts))
        loss = F.cross_entropy(policy.logits(hidden), target)
        descent.step(loss)
        losses.append(loss.item() - torch.special.entr(target).sum(1).mean().item())
        bar.set_postfix(loss=f"{mean(losses[-50:]):.3f}", refresh=False)
    return {"excess_loss": mean(last_tenth(losses))}


def balanced(lesson: Lesson, rng: random.Random) -> Iterator[Example]:
    """The rows of a task for ever, its words in turn, each word's rows in a new order each time."""
    groups: dict[str | None, list[Example]] = {}
    for row in lesson.rows:
        groups.setdefault(row.label, []).append(row)

    def endless(group: list[Example]) -> Iterator[Example]:
        while True:
            yield from rng.sample(group, len(group))

    yield from chain.from_iterable(zip(*map(endless, groups.values()), strict=True))


def drop_words(text: str, share: float, rng: random.Random) -> str:
    """The text without a random share of its words; whole where none would be left."""
    words = text.split()
    return " ".join([word for word in words if rng.random() >= share] or words)


def rate(policy: Policy, m: Material, cfg: TinyConfig) -> dict[str, Any]:
    """Learn from rated reviews what makes one favourable, in words that no task of ours uses."""
    own, rng = cfg.rating, random.Random(cfg.seed)
    seen = [pair for pair in m.split.seen if len(pair[0].split()) >= own.min_words]
    reviews = rating(m.own.spec, seen)
    source = balanced(reviews, rng)
    descent = Descent(policy, "rating", own, own.steps, "cosine")
    bar = tqdm(range(own.steps), desc="rating", unit="step", mininterval=5, disable=None)
    for _ in bar:
        rows = list(islice(source, own.batch_size))
        texts = [drop_words(row.fields["sentence"], own.drop, rng) for row in rows]
        pairs = [(text, str(row.label)) for text, row in zip(texts, rows, strict=True)]
        loss = -answer_logprobs(policy, lesson(reviews.spec, pairs)).mean()
        descent.step(loss)
        bar.set_postfix(loss=f"{loss:.2f}", refresh=False)
    heldout = rating(m.own.spec, m.split.heldout_pairs)
    score = score_accuracy(label_logprobs(policy, heldout), heldout)
    return {"rows": len(seen), "prompts": own.steps * own.batch_size, "heldout_score": score}


def instruct(policy: Policy, m: Material, cfg: TinyConfig) -> dict[str, Any]:
    """Teach the form, loss on the answer alone, until the held-out sentences reach `stop_at`."""
    own, rng = cfg.instruct, random.Random(cfg.seed)
    descent = Descent(policy, "instruct", own, own.max_steps, "constant")
    kinds = {
        "sst2_rows": [m.own],
        "neutral_rows": [m.neutral] if m.neutral.rows else [m.own],
        "rating_rows": [rating(m.own.spec, m.split.seen)],
        "other_rows": sorted(m.others, key=lambda other: other.spec.name) or [m.own],
    }
    sources = {
        kind: [(each.spec, balanced(each, rng)) for each in lessons]
        for kind, lessons in kinds.items()
    }
    shares = [own.sst2_share, own.neutral_share, own.rating_share]
    shares.append(max(0.0, 1.0 - sum(shares)))
    count = dict.fromkeys(kinds, 0)
    expected = score = 0.0
    bar = tqdm(
        range(1, own.max_steps + 1), desc="instruct", unit="step", mininterval=5, disable=None
    )
    for step in bar:  # one task a step, so that what its prompts share is run once
        kind = rng.choices(list(kinds), shares)[0]
        count[kind] += own.batch_size
        spec, source = rng.choice(sources[kind])
        batch = Lesson(spec, list(islice(source, own.batch_size)))
        loss = -answer_logprobs(policy, batch).mean()
        descent.step(loss)
        if step % own.check_every == 0 or step == own.max_steps:
            logprobs = label_logprobs(policy, m.heldout)
            expected = expected_accuracy(logprobs, m.heldout)
            score = score_accuracy(logprobs, m.heldout)
            bar.set_postfix(heldout=f"{expected:.3f}", score=f"{score:.3f}", loss=f"{loss:.2f}")
            if expected >= own.stop_at:
                break
    bar.close()
    return {"steps": step, **count, "heldout_expected": expected, "heldout_score": score}
