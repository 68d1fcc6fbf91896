"""The policy: one model in memory that is policy, reference (LoRA off) and critic at once."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppo_nlu import ops
from ppo_nlu.config import ModelConfig
from ppo_nlu.errors import UserError
from ppo_nlu.model import lora
from ppo_nlu.model.chat import Chat
from ppo_nlu.model.head_form import head_form, head_of
from ppo_nlu.model.shape import (
    Shape,
    context_of,
    decoder_of,
    shape_of,
    windows,
)
from ppo_nlu.model.stop import StopDetector
from ppo_nlu.model.tokens import Codec
from ppo_nlu.model.value_head import ValueHead
from ppo_nlu.runtime import profiling
from ppo_nlu.tasks.prompts import Message
from ppo_nlu.tree import pack, passes
from ppo_nlu.tree.checkpointing import checkpoint_blocks
from ppo_nlu.tree.decode_graph import Recorder
from ppo_nlu.tree.packed_row import Cost
from ppo_nlu.tree.passes import PromptPass
from ppo_nlu.tree.prefixes import PrefixCache, Tokens
from ppo_nlu.tree.trim import trim


@dataclass
class Scored:
    """What a pass gives for the answers: (B, R) each, zero where `mask` is False."""

    mask: Tensor
    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None
    hidden: Tensor  # (N, H), the states that predict the answers' tokens, row by row


class Policy:
    """A causal language model with LoRA and a value head, and the text side of its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any, value_head: ValueHead, cfg: ModelConfig):
        self.model, self.tokenizer, self.value_head = model, tokenizer, value_head
        self.device = next(model.parameters()).device
        self.decoder: nn.Module = decoder_of(model)
        self.head_form = head_form(model, self.decoder)
        trim(self.decoder)
        self.decoder.warn_if_padding_and_no_attention_mask = _no_warning
        self.detach_value = cfg.detach_value
        self.window = min(windows(self.config), default=None)
        self.last_pass = Cost(0, 0, 0)
        self.takes_positions = "position_ids" in inspect.signature(self.decoder.forward).parameters
        self.stop = StopDetector(model, tokenizer)
        self._codec: Codec | None = None
        self._chat: Chat | None = None
        self.settle()

    def settle(
        self,
        tree: bool = True,
        limit: int | None = None,
        checkpointing: bool = False,
        recorded: bool = False,
    ) -> None:
        """Settle how rows are run.

        Args:
            tree: in the prefix tree, where rows are no longer than a window.
            limit: in a context of at most so many tokens; None: the model's own.
            checkpointing: blocks are run again in the backward.
            recorded: decode steps are recorded, where there is a GPU and the tree.
        """
        self.tree, self.limit, self.checkpointing = tree, limit, checkpointing
        self.recorder: Recorder | None = None
        if recorded and tree and self.device.type == "cuda":
            self.recorder = Recorder(self.decoder)
        if checkpointing:
            checkpoint_blocks(self.decoder)

    @property
    def config(self) -> Any:
        """The decoder's configuration; of a model that also reads pictures, that of its text."""
        return self.decoder.config

    @property
    def context(self) -> int:
        """The longest sequence that is run, in tokens: what the model was made for, or less."""
        own = context_of(self.config)
        return own if self.limit is None else min(own, self.limit)

    @property
    def shape(self) -> Shape:
        """What plans of memory and time are made from."""
        return shape_of(self.decoder)

    def packs(self, longest: int) -> bool:
        """Whether rows of at most `longest` tokens take the prefix tree."""
        return self.tree and (self.window is None or longest <= self.window)

    @property
    def head(self) -> nn.Linear:
        """The LM head."""
        return head_of(self.model)

    def chat(self, messages: Sequence[Message], shots: bool = False) -> str:
        """The messages in the model's own chat format, up to where its answer begins; `shots`: the
        task has shots."""
        template = getattr(self.tokenizer, "chat_template", None)
        if not template:
            raise UserError(
                f"prompt.chat_template: {self.model.name_or_path!r} has no chat template; set it "
                "to false, or take a chat model"
            )
        if self._chat is None or self._chat.template is not template:
            self._chat = Chat(self.tokenizer, self.model.name_or_path)
        return self._chat.render(messages, shots)

    @property
    def codec(self) -> Codec:
        """The tokenizer as texts go through it."""
        if self._codec is None or self._codec.tokenizer is not self.tokenizer:
            rows = self.model.get_input_embeddings().weight.shape[0]
            self._codec = Codec(self.tokenizer, self.stop.eos, rows)
        return self._codec

    def encode(self, text: str) -> list[int]:
        """Token ids of a whole text, with the tokenizer's own opening token and no closing one."""
        return self.codec.encode(text)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids."""
        return self.codec.decode(ids, skip_special)

    def seal(self, text: str) -> str:
        """The text of a row, marked so that `encode` finds no control tokens in it."""
        return self.codec.seal(text)

    def hidden(
        self,
        prompts: Sequence[Tokens],
        answers: Sequence[Tokens],
        prompt_of: Sequence[int] | None = None,
        prefix_cache: PrefixCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """States that predict the answers' tokens (N, H), row by row, and the mask (B, R)."""
        longest = max(map(len, prompts)) + max(map(len, answers), default=0)
        tree = pack.build(prompts, answers, prompt_of, self.packs(longest), prefix_cache)
        tree = tree.to(self.device)
        self.last_pass = cost = tree.cost
        count = sum(map(len, answers))
        saved = cost.tokens_full - cost.tokens_run
        profiling.count(
            cost.tokens_run, saved, positions=count, pairs=cost.pairs, predicting=cost.predicting
        )
        flat, _ = passes.run(self.decoder, tree, self.takes_positions)
        return flat.index_select(0, tree.predicted_from[tree.mask]), tree.mask

    def _hidden_behind(
        self, prompt_pass: PromptPass, answers: Sequence[Tokens], prompt_of: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """As `hidden`, for answers behind prompts that were run before under autograd."""
        hidden, mask, cost = passes.run_answers(self.decoder, prompt_pass, answers, prompt_of)
        saved = cost.tokens_full - cost.tokens_run
        profiling.count(cost.tokens_run, saved, positions=len(hidden), pairs=cost.pairs)
        before = prompt_pass.tree.cost
        profiling.count_backward(before.tokens_run, before.pairs, before.predicting)
        return hidden, mask

    def score(
        self,
        prompts: Sequence[Tokens],
        answers: Sequence[Tokens],
        prompt_of: Sequence[int] | None = None,
        temperature: float = 1.0,
        values: bool = False,
        entropy_grad: bool = False,
        prompt_pass: PromptPass | None = None,
        prefix_cache: PrefixCache | None = None,
    ) -> Scored:
        """Log-probabilities, entropies and (where asked) values of the answers' tokens.

        Args:
            entropy_grad: the loss will ask for the entropy's gradient.
            prompt_pass: a pass over exactly these prompts, run under autograd with these weights;
                then only the answers are run. It serves one backward.
            prefix_cache: what the prompts begin with, run with these weights; it is not run again
                and gets no gradient.
        """
        if prompt_pass is None:
            hidden, mask = self.hidden(prompts, answers, prompt_of, prefix_cache)
        else:
            assert prompt_pass.tree.lengths == [len(prompt) for prompt in prompts]
            prompt_of = range(len(answers)) if prompt_of is None else prompt_of
            hidden, mask = self._hidden_behind(prompt_pass, answers, prompt_of)
        targets = torch.tensor([t for a in answers for t in a], device=self.device)
        head, form = self.head, self.head_form
        logprobs, entropy = ops.linear_logprobs(
            hidden,
            head.weight,
            targets,
            bias=getattr(head, "bias", None),
            temperature=temperature / form.scale,
            entropy_grad=entropy_grad,
            softcap=form.cap and form.cap / form.scale,
        )
        return Scored(
            mask=mask,
            logprobs=unflatten(logprobs, mask),
            entropy=unflatten(entropy, mask),
            values=unflatten(self.value(hidden), mask) if values else None,
            hidden=hidden,
        )

    def prefix_cache(self, prompts: Sequence[Tokens]) -> PrefixCache | None:
        """What these prompts begin with, run once with the present weights for all passes over some
        of them. None where it is too short to be worth it, and on the plain path."""
        if not self.tree:
            return None
        with profiling.phase("prefill"):
            found = passes.cache_prefix(self.decoder, prompts, self.window)
            if found is not None:
                n = len(found.tokens)
                profiling.count(n, -n, pairs=n * (n + 1) // 2, predicting=1)
        return found

    def value(self, hidden: Tensor) -> Tensor:
        """V(s) for each state (N, H), fp32."""
        return self.value_head(hidden.detach() if self.detach_value else hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (N, V) in fp32, not rounded on the way."""
        raw = ops.linear_logits(hidden, self.head.weight, getattr(self.head, "bias", None))
        return self.head_form.apply(raw)


def _no_warning(*_: Any) -> None:
    """In place of a check for padding, at which GPT-2 would wait for the device in each pass."""


def unflatten(values: Tensor, mask: Tensor) -> Tensor:
    """(N,) values of the tokens in `mask` as (B, R), zero elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def trainable(policy: Policy) -> list[nn.Parameter]:
    """LoRA weights, then the value head's: all that trains."""
    return [*lora.lora_parameters(policy.model), *policy.value_head.parameters()]
