"""For tests: tiny random models, a word tokenizer, and where the pretrained models are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from ppo_nlu.config import Config, LoraConfig, ModelConfig
from ppo_nlu.methods import sampler
from ppo_nlu.methods.base import Method
from ppo_nlu.model import lora, norms
from ppo_nlu.model.as_loaded import AsLoaded
from ppo_nlu.model.generate import Generation
from ppo_nlu.model.load import load_policy
from ppo_nlu.model.path_check import choose_path
from ppo_nlu.model.policy import Policy
from ppo_nlu.model.value_head import ValueHead
from ppo_nlu.tasks import Example, get_task
from ppo_nlu.tasks.prompts import STOP, render
from ppo_nlu.tree import interface, pack

GIVEN = os.environ.get("PPO_NLU_DATA")  # read at import: the tests clear it
SST2 = get_task("sst2")
SPECS = {"sst2": SST2}
TREE_KINDS = ("llama", "qwen2", "gpt2", "neox")
SPLIT = Regex(r"</?Judgement>|\w+|[^\w\s]")
FEW = ("Positive", "Negative", STOP, "<Judgement>", "film", "good", "bad", "a", "the")


def tokenizer(few: bool = False) -> PreTrainedTokenizerFast:
    """Words as tokens, `</Judgement>` one of them, pad the same as eos; `few`: 12 words in all."""
    splitter = pre_tokenizers.Split(SPLIT, "removed", invert=True)
    text = render(SST2, {"sentence": "a good or bad film, long and slow; it was the best."})
    seen = [] if few else [word for word, _ in splitter.pre_tokenize_str(text)]
    words = dict.fromkeys(["<unk>", "<s>", "</s>", *FEW, *seen])
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    )


VOCAB = len(tokenizer())


def causal_lm(
    kind: str, vocab: int = VOCAB, seed: int = 0, scale: float = 0.2, **changes: Any
) -> Any:
    """A random model of two layers and 32 units, fp32, biases and norms random too."""
    common = {"vocab_size": vocab, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    wide = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "max_position_embeddings": 256}
    kv = {"num_key_value_heads": 2}
    no_drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    gpt = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, **no_drop}
    mpt = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "expansion_ratio": 2}
    makers: dict[str, tuple[type, dict[str, Any]]] = {
        "llama": (LlamaConfig, {**wide, **heads, **kv}),
        "qwen2": (Qwen2Config, {**wide, **heads, **kv}),
        "gpt2": (GPT2Config, gpt),
        "neox": (GPTNeoXConfig, {**wide, **heads}),
        "mpt": (MptConfig, mpt),
        "mistral": (MistralConfig, {**wide, **heads, **kv}),
    }
    cls, options = makers[kind]
    config = cls(**{**common, **options, **changes})
    attention = "eager" if kind == "mpt" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draw) * scale
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise / 2)
    return model.float().eval()


def policy(
    kind: str = "llama",
    seed: int = 0,
    few: bool = False,
    shaken: bool = True,
    model_cfg: ModelConfig | None = None,
    lora_cfg: LoraConfig | None = None,
    **changes: Any,
) -> Policy:
    """A policy around a random model; `shaken`: LoRA and value head are not at zero."""
    cfg, words = model_cfg or ModelConfig(), tokenizer(few)
    model = causal_lm(kind, len(words), seed, **changes).requires_grad_(False)
    loaded = AsLoaded.of(model, words, 256)
    torch.manual_seed(seed)
    lora.attach(model, lora_cfg or LoraConfig(r=4, alpha=8.0))
    norms.attach(model)
    head = ValueHead(model.config.hidden_size, cfg.value_head, cfg.value_hidden)
    made = Policy(model, words, head, cfg)
    made.settle(choose_path(made, cfg.path, loaded))
    if shaken:
        shake(made, seed)
    return made


def shake(made: Policy, seed: int = 0, scale: float = 0.1) -> None:
    """Random LoRA B and value head, so that nothing is zero by its start."""
    draw = torch.Generator().manual_seed(seed + 1000)
    layers = lora.lora_layers(made.model).values()
    with torch.no_grad():
        for p in [*(layer.lora_b for layer in layers), *made.value_head.parameters()]:
            p.add_(torch.randn(p.shape, generator=draw) * scale)


def alone(decoder: nn.Module, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """The states (R, H) that predict the answer, by the plain HF forward of one row."""
    ids = torch.tensor([[*prompt, *answer[:-1]]])
    return decoder(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 :]


def examples(count: int, label: str | None = None) -> list[Example]:
    """SST-2 rows; labels by turns, or all the same."""
    texts = ("a good film", "a bad film", "the film was long and slow", "it was the best", "good")
    labels = ("Positive", "Negative")
    return [
        Example(str(i), {"sentence": texts[i % len(texts)]}, label or labels[i % 2], "sst2")
        for i in range(count)
    ]


def models_folder() -> Path:
    """../shared/models beside the repository (or near $PPO_NLU_DATA); skips where there is none."""
    places = [Path(__file__).parents[2] / "shared" / "models"]
    if GIVEN:
        given = Path(GIVEN).resolve()
        places += [parent / "models" for parent in (given, *given.parents[:3])]
    for place in places:
        if (place / "stories260K" / "config.json").is_file():
            return place
    pytest.skip("needs the small pretrained models in ../shared/models")


def pretrained(name: str, **changes: Any) -> Policy:
    """The policy of a model in ../shared/models, as `load_policy` makes it."""
    model = ModelConfig(name_or_path=str(models_folder() / name), device="cpu")
    return load_policy(Config(task="sst2", model=model, lora=LoraConfig(r=4, alpha=8.0), **changes))


def close(actual: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    """No entry further away than `bound` times the largest (at least 1)."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach(), expected.detach()
    size = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    gap = float((actual - expected).abs().max()) if expected.numel() else 0.0
    assert gap <= bound * size, f"off by {gap:.2e}, allowed {bound * size:.1e}"


def sizes_of_passes(patch: pytest.MonkeyPatch) -> list[int]:
    """A list that learns how many tokens each pass through the tree runs."""
    sizes: list[int] = []
    plain = interface.forward

    def spy(decoder: nn.Module, ids: Tensor, *rest: Any) -> Tensor:
        sizes.append(len(ids))
        return plain(decoder, ids, *rest)

    patch.setattr(interface, "forward", spy)
    return sizes


def keep_gradients(method: Method) -> list[Tensor]:
    """A list that learns the gradients of the method's next optimizer step, which moves nothing."""
    kept: list[Tensor] = []
    parameters = [p for group in method.parameters() for p in group]

    def keep(*_: object) -> None:
        kept.extend(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters)

    method.optimizer = torch.optim.SGD(parameters, lr=0.0)
    method.optimizer.register_step_pre_hook(keep)
    return kept


def force(patch: pytest.MonkeyPatch, made: Policy, answers: list[list[int]]) -> None:
    """Makes every rollout give these answers, with the log-probs and values that they have."""

    def generate(policy, prompts, sampling, **more):
        prompt_of = [p for p in range(len(prompts)) for _ in range(sampling.samples)]
        with torch.no_grad():
            scored = policy.score(prompts, answers, prompt_of, sampling.temperature, values=True)
        tokens, mask = pack.pad(answers)
        return Generation(
            tokens=tokens,
            mask=mask,
            logprobs=scored.logprobs,
            values=scored.values,
            hidden=scored.hidden,
        )

    patch.setattr(sampler, "generate", generate)
