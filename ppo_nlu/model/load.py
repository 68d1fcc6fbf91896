"""The policy of a config: the base model with LoRA and a value head, on the path it may take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ppo_nlu.config import Config, PromptConfig
from ppo_nlu.errors import UserError
from ppo_nlu.model import lora, norms, path_check, peft_format
from ppo_nlu.model.as_loaded import AsLoaded
from ppo_nlu.model.base_model import load_base, tell
from ppo_nlu.model.head_form import head_of
from ppo_nlu.model.policy import Policy
from ppo_nlu.model.shape import limit_of
from ppo_nlu.model.value_head import ValueHead
from ppo_nlu.tasks import TaskSpec
from ppo_nlu.tasks.answers import parse
from ppo_nlu.tasks.prompts import OPENING, STOP, answer, render


def load_policy(cfg: Config) -> Policy:
    """The base with fresh LoRA layers (zero at the start) and a fresh value head, from `seed`."""
    model, tokenizer = load_base(cfg.model)
    loaded, limit = measure(model, tokenizer, cfg)
    torch.manual_seed(cfg.seed)
    lora.attach(model, cfg.lora, idle=loaded.idle)
    norms.attach(model)
    width = head_of(model).in_features
    head = ValueHead(width, cfg.model.value_head, cfg.model.value_hidden)
    policy = Policy(model, tokenizer, head.to(next(model.parameters()).device), cfg.model)
    tree, limit = path_and_limit(policy, cfg, loaded, limit)
    if cfg.model.checkpointing and not tree:
        raise UserError(
            "model.checkpointing: needs the prefix tree, which this model cannot take; set it "
            "to false and lower ppo.micro_batch_size"
        )
    policy.settle(tree, limit, cfg.model.checkpointing, recorded=cfg.rollout.cuda_graph)
    if cfg.init_from:
        # Start from a trained adapter, which as a frozen copy is the reference too.
        peft_format.load_adapter(model, adapter_folder(cfg.init_from))
        lora.freeze_reference(model)
    return policy


def measure(model: Any, tokenizer: Any, cfg: Config) -> tuple[AsLoaded, int]:
    """What the model gives before anything in it is replaced, and where its context ends. A line
    tells the user where that is early."""
    asked = cfg.data.max_prompt_tokens and cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens
    limit, note = limit_of(model, asked)
    tell(note)
    return AsLoaded.of(model, tokenizer, min(limit, asked or limit)), limit


def path_and_limit(policy: Policy, cfg: Config, loaded: AsLoaded, limit: int) -> tuple[bool, int]:
    """Whether the prefix tree is taken, and how long rows may be, for `Policy.settle`. A UserError
    where the model runs rightly on neither path."""
    tree = path_check.choose_path(policy, cfg.model.path, loaded)
    end = path_check.longest_row(policy, loaded) if tree else None
    if end is not None:
        tell(f"rows end at {end} tokens, the window of this model's attention")
    return tree, limit if end is None else end


def adapter_folder(path: str) -> Path:
    """The adapter of a run folder, or the adapter folder itself."""
    for folder in (Path(path) / "adapter", Path(path)):
        if (folder / peft_format.CONFIG_FILE).is_file():
            return folder
    raise UserError(
        f"init_from: {path} holds no {peft_format.CONFIG_FILE}; "
        "give a finished run or an adapter folder"
    )


def check_words(policy: Policy, spec: TaskSpec, style: PromptConfig | None = None) -> None:
    """Each label word and the closing tag must survive the tokenizer; else a UserError."""
    form = (style or PromptConfig()).form
    fields = dict.fromkeys(spec.fields, "a film")
    prompt = render(spec, fields, form=form)
    for word in spec.words or ("a film",):
        expected = answer(word, form)
        text = policy.decode(policy.encode(prompt + answer(policy.seal(word), form)))
        reply = text.rpartition(OPENING[form])[2]
        if parse(spec, reply, form) != word or STOP not in reply:
            raise UserError(
                f"model.name_or_path: the tokenizer of {policy.model.name_or_path!r} does not keep "
                f"{expected.strip()!r} (it reads back {reply.strip()[-40:]!r}); "
                "use a model whose tokenizer knows these characters"
            )
