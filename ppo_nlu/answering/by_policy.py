"""A policy answers: prompts in windows of batches, decoded or scored label by label."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from ppo_nlu.answering.answer import Answer, never
from ppo_nlu.config import Config
from ppo_nlu.data.shots import Shots
from ppo_nlu.errors import UserError
from ppo_nlu.methods.prompts import Fitted, fit_prompt, longest_prompt
from ppo_nlu.methods.rollout import seeded
from ppo_nlu.model.generate import Sampling, generate
from ppo_nlu.model.load import check_words
from ppo_nlu.model.policy import Policy
from ppo_nlu.tasks import Example, TaskSpec
from ppo_nlu.tasks.answers import parse
from ppo_nlu.tasks.prompts import answer
from ppo_nlu.tree.prefixes import PrefixCache, common

WINDOW = 16  # batches whose rows are sorted by length together


class PolicyAnswerer:
    """A policy as an `Answerer`; `shots` that a run has read already are not read again."""

    def __init__(self, policy: Policy, cfg: Config, shots: Shots | None = None):
        self.policy, self.cfg, self.shots = policy, cfg, shots or Shots(cfg)
        self._priors: dict[tuple[str, int], torch.Tensor] = {}  # of the weights as they are

    @property
    def device(self) -> torch.device:
        """Where the policy runs."""
        return self.policy.device

    def require_fit(self, spec: TaskSpec) -> None:
        """A UserError where the tokenizer changes the answers, or where the form of the prompt
        leaves no room for one."""
        check_words(self.policy, spec, self.cfg.prompt)
        fit_prompt(self.policy, spec, _empty(spec), self._longest(spec), self.cfg.prompt)

    def answer(
        self,
        spec: TaskSpec,
        examples: Sequence[Example],
        decode: str,
        stop: Callable[[], bool] = never,
    ) -> Iterator[Answer]:
        """Answers in the order of the examples, a window of batches at a time; ends early where
        `stop` says so.

        Inside a window rows of like length run together, so the plain path runs little padding;
        what all of its prompts begin with is run once.
        """
        if decode == "score" and not spec.words:
            raise UserError(f"--decode: {spec.name} has no list of answers to score; use greedy")
        policy, style = self.policy, self.cfg.prompt
        longest, size = self._longest(spec), self.cfg.eval.batch_size
        shots = self.shots.pool(spec)
        for start in range(0, len(examples), WINDOW * size):
            window = examples[start : start + WINDOW * size]
            fitted = [fit_prompt(policy, spec, row, longest, style, shots) for row in window]
            order = sorted(range(len(window)), key=lambda i: -len(fitted[i].ids))
            prefix_cache = (
                policy.prefix_cache([fit.ids for fit in fitted]) if len(window) > size else None
            )
            done: dict[int, Answer] = {}
            for place in range(0, len(order), size):
                if stop():
                    return
                index = order[place : place + size]
                rows, prompts = [window[i] for i in index], [fitted[i] for i in index]
                if decode == "score":
                    answers = self._scored(spec, rows, prompts, prefix_cache)
                else:
                    generator = seeded("evaluate", self.cfg.seed, start, index[0])
                    answers = self._decoded(
                        spec, rows, prompts, decode == "greedy", generator, prefix_cache
                    )
                for i, row in zip(index, answers, strict=True):
                    done[i] = replace(row, cut=fitted[i].cut, dropped=fitted[i].dropped)
            yield from (done[i] for i in range(len(window)))

    def _longest(self, spec: TaskSpec) -> int:
        """Tokens that a prompt may have: behind it the longest answer, sampled or a label word,
        must fit."""
        replies = _replies(self.policy, spec, self.cfg.prompt.form)
        words = max((len(self.policy.encode(reply)) for reply in replies), default=0)
        room = max(self.cfg.rollout.max_new_tokens, words)
        return longest_prompt(self.policy, self.cfg, room)

    def _decoded(
        self,
        spec: TaskSpec,
        rows: Sequence[Example],
        prompts: Sequence[Fitted],
        greedy: bool,
        generator: torch.Generator,
        prefix_cache: PrefixCache | None,
    ) -> list[Answer]:
        cfg = self.cfg
        limit, top_k, top_p = cfg.rollout.max_new_tokens, cfg.eval.top_k, cfg.eval.top_p
        drawn = generate(
            self.policy,
            [prompt.ids for prompt in prompts],
            Sampling(limit, greedy=greedy, top_k=top_k, top_p=top_p),
            generator=generator,
            prefix_cache=prefix_cache,
        )
        _require_numbers(drawn.logprobs)
        texts = [self.policy.decode(row) for row in drawn.rows]
        form = cfg.prompt.form
        return [Answer(e, parse(spec, t, form), t) for e, t in zip(rows, texts, strict=True)]

    def _scored(
        self,
        spec: TaskSpec,
        rows: Sequence[Example],
        prompts: Sequence[Fitted],
        prefix_cache: PrefixCache | None,
    ) -> list[Answer]:
        """The likeliest word; for a rating the expectation over its grid."""
        form, how = self.cfg.prompt.form, self.cfg.eval.label_scores
        prior = self._prior(spec, prompts) if how == "prior" else None
        table = label_probabilities(
            self.policy, spec, prompts, form, prefix_cache, how == "mean", prior
        )
        answers = []
        for example, probabilities in zip(rows, table.tolist(), strict=True):
            by_word = dict(zip(spec.words, probabilities, strict=True))
            best = max(by_word, key=lambda word: by_word[word])
            if spec.rating:
                best = f"{sum(float(word) * p for word, p in by_word.items()):.3f}"
            answers.append(Answer(example, best, answer(best, form), by_word))
        return answers

    def _prior(self, spec: TaskSpec, prompts: Sequence[Fitted]) -> torch.Tensor:
        """log π(label | the prompt with empty texts), (P, K); run once for a task and a number of
        shots."""
        for dropped in {prompt.dropped for prompt in prompts}:
            if (spec.name, dropped) not in self._priors:
                self._priors[spec.name, dropped] = self._without_text(spec, dropped)
        return torch.stack([self._priors[spec.name, prompt.dropped] for prompt in prompts])

    @torch.no_grad()
    def _without_text(self, spec: TaskSpec, dropped: int) -> torch.Tensor:
        style, pool = self.cfg.prompt, self.shots.pool(spec)
        shots = pool[: min(style.shots, len(pool)) - dropped]
        prompt = fit_prompt(self.policy, spec, _empty(spec), self._longest(spec), style, shots)
        return label_logprobs(self.policy, spec, [prompt], style.form)[0].sum(-1)[0]


@torch.no_grad()
def label_probabilities(
    policy: Policy,
    spec: TaskSpec,
    prompts: Sequence[Fitted],
    form: str = "judgement",
    prefix_cache: PrefixCache | None = None,
    mean: bool = False,
    prior: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax over the labels of log π(` Word </Judgement>` | prompt), (P, K).

    `mean`: of that sum over the label's tokens, divided by their number. `prior`: of that sum less
    `prior`, so of the pointwise mutual information of label and text (arXiv 2104.08315).
    """
    logprobs, mask = label_logprobs(policy, spec, prompts, form, prefix_cache)
    scores = logprobs.sum(-1)
    if mean:
        scores = scores / mask.sum(-1)
    if prior is not None:
        scores = scores - prior
    return scores.softmax(-1)


def label_logprobs(
    policy: Policy,
    spec: TaskSpec,
    prompts: Sequence[Fitted],
    form: str = "judgement",
    prefix_cache: PrefixCache | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log π of each token of ` Word </Judgement>` behind each prompt, and their mask, (P, K, R).

    Each label is tokenised behind its prompt, as a whole text; where a label changes the prompt's
    last tokens, scoring starts at the first token that differs. In the analysis form the label
    stands behind an empty reason.
    """
    beginnings, answers, prompt_of = [], [], []
    replies = _replies(policy, spec, form)
    for number, prompt in enumerate(prompts):
        whole = [policy.encode(prompt.text + reply) for reply in replies]
        cut = min(common(prompt.ids, row) for row in whole)
        beginnings.append(prompt.ids[:cut])
        answers += [row[cut:] for row in whole]
        prompt_of += [number] * len(whole)
    scored = policy.score(beginnings, answers, prompt_of, prefix_cache=prefix_cache)
    _require_numbers(scored.logprobs)
    shape = (len(prompts), len(replies), -1)
    return scored.logprobs.view(shape), scored.mask.view(shape)


def _empty(spec: TaskSpec) -> Example:
    return Example("", dict.fromkeys(spec.fields, ""), None)


def _replies(policy: Policy, spec: TaskSpec, form: str) -> list[str]:
    """The whole answer for each of the task's words, marked for `encode`."""
    return [answer(policy.seal(word), form) for word in spec.words]


def _require_numbers(logprobs: torch.Tensor) -> None:
    """A UserError where log-probs are NaN: finite weights can have logits that are not."""
    if bool(logprobs.isnan().any()):
        raise UserError(
            "the model's log-probabilities are no numbers: its weights or the adapter's are "
            "damaged or far too large, or model.dtype is too narrow for them"
        )
