"""The check at load: what a model is measured to be, and which paths it may take.

Expected numbers are those of plain transformers, one row at a time without padding or cache, on
the model as it was loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ppo_nlu import teach_form
from ppo_nlu.answering.by_policy import PolicyAnswerer, label_probabilities
from ppo_nlu.config import Config, DataConfig, LoraConfig, ModelConfig
from ppo_nlu.errors import UserError
from ppo_nlu.methods import memory
from ppo_nlu.methods.prompts import fit_prompt
from ppo_nlu.methods.workload import Workload
from ppo_nlu.model import lora, norms, path_check, shape
from ppo_nlu.model.as_loaded import AsLoaded
from ppo_nlu.model.generate import Sampling, generate
from ppo_nlu.model.head_form import HeadForm, head_form
from ppo_nlu.model.load import load_policy
from ppo_nlu.model.path_check import choose_path
from ppo_nlu.model.policy import Policy
from ppo_nlu.runtime import flops
from ppo_nlu.tree import attention, interface
from ppo_nlu.tree import plain as plain_path

SMALL = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def saved(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> str:
    """A folder with a random model of this type, and the tests' tokenizer."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[kind](**{**SMALL, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    model.to(dtype).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def loaded(folder: str, dtype: str = "float32", longest: int = 0, targets: Any = "all-linear"):
    cfg = Config(
        task="sst2",
        model=ModelConfig(folder, device="cpu", dtype=dtype),
        lora=LoraConfig(r=4, alpha=8.0, targets=targets),
        data=DataConfig(max_prompt_tokens=longest),
    )
    return load_policy(cfg)


def plain(folder: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model of transformers, untouched."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def alone(model: Any, prompt: list[int], answer: list[int], temperature: float = 1.0) -> Tensor:
    """log π of each token of an answer, by the model's own logits of the one row."""
    ids = torch.tensor([[*prompt, *answer]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def rows(length: int, count: int = 2) -> list[list[int]]:
    """Prompts of up to so many tokens, which share their first half."""
    shared = [3 + (i * 5) % 30 for i in range(length // 2)]
    return [
        [*shared, *(3 + (i * 7 + 11 * c) % 30 for i in range(length - length // 2 - 2 * c))]
        for c in range(count)
    ]


ANSWERS = [[8, 9, 3], [4, 5], [7, 7, 6, 3]]
PROMPT_OF = [0, 1, 1]


def assert_right(policy: Policy, model: Any, length: int, temperature: float = 1.0) -> None:
    """Scores are those of each row alone."""
    prompts = rows(length)
    with torch.no_grad():
        scored = policy.score(prompts, ANSWERS, PROMPT_OF, temperature)
    for j, answer in enumerate(ANSWERS):
        expected = alone(model, prompts[PROMPT_OF[j]], answer, temperature)
        tiny.close(scored.logprobs[j, : len(answer)], expected, 1e-4)


# ---- the head --------------------------------------------------------------------------------

HEADS = {
    "gemma2": ({"final_logit_softcapping": 2.0, "head_dim": 8}, HeadForm(1.0, 2.0)),
    "cohere": ({"logit_scale": 0.25}, HeadForm(0.25)),
    "granite": ({"logits_scaling": 3.0}, HeadForm(1 / 3)),
    "llama": ({}, HeadForm()),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", HEADS)
def test_what_a_model_makes_of_its_heads_numbers(kind: str, dtype: str, tmp_path: Path) -> None:
    """A cap of 2 on logits of several units cannot be missed; in bf16 it must be there too."""
    changes, form = HEADS[kind]
    folder = saved(tmp_path, kind, getattr(torch, dtype), **changes)
    policy = loaded(folder, dtype)
    assert policy.head_form.scale == pytest.approx(form.scale, rel=1e-5)
    assert (policy.head_form.cap or 0) == pytest.approx(form.cap or 0, rel=1e-4)
    model = plain(folder, getattr(torch, dtype))
    if dtype == "float32":
        assert_right(policy, model, 40, 0.7)
    hidden = torch.randn(3, 32).to(model.dtype)
    raw = hidden.float() @ model.lm_head.weight.float().t()
    if form.cap:
        raw = form.cap * torch.tanh(raw / form.cap)
    tiny.close(policy.logits(hidden), raw * form.scale, 1e-6)


def test_gradients_through_a_capped_head(tmp_path: Path) -> None:
    """Of the LoRA weights, against autograd through the library's own logits."""
    policy = loaded(saved(tmp_path, "gemma2", final_logit_softcapping=2.0, head_dim=8))
    tiny.shake(policy)
    prompt, answer = rows(20)[0], ANSWERS[2]
    scored = policy.score([prompt], [answer], entropy_grad=True)
    (scored.logprobs.sum() + scored.entropy.sum()).backward()
    ours = [p.grad.clone() for p in lora.lora_parameters(policy.model)]
    policy.model.zero_grad()
    ids = torch.tensor([[*prompt, *answer]])
    logits = policy.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    logp = logits.log_softmax(-1)
    chosen = logp.gather(1, torch.tensor(answer)[:, None]).sum()
    (chosen - (logp.exp() * logp).sum()).backward()
    for one, parameter in zip(ours, lora.lora_parameters(policy.model), strict=True):
        tiny.close(one, parameter.grad, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits + torch.arange(logits.shape[-1]) * 0.05,
        lambda logits: logits.masked_fill(logits > 60, 60),
        lambda logits: -logits,
    ],
)
def test_a_head_of_another_form_is_refused(
    change: Callable[[Tensor], Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the dtype: the head is compared alone, in fp32."""
    model = tiny.causal_lm("llama").to(dtype)
    forward = type(model).forward

    def changed(self: Any, *args: Any, **named: Any) -> Any:
        out = forward(self, *args, **named)
        out.logits = change(out.logits)
        return out

    monkeypatch.setattr(type(model), "forward", changed)
    with pytest.raises(UserError, match="llama does more behind its last layer"):
        head_form(model, model.model)


def test_a_model_without_a_linear_head_is_refused() -> None:
    model = tiny.causal_lm("llama")
    model.lm_head = nn.Identity()
    with pytest.raises(UserError, match="llama has no linear LM head"):
        head_form(model, model.model)


def test_the_width_of_the_value_head_is_the_heads(tmp_path: Path) -> None:
    """OPT-350m projects its last state to another width than `hidden_size`."""
    folder = saved(tmp_path, "opt", word_embed_proj_dim=16, ffn_dim=48, do_layer_norm_before=False)
    policy = loaded(folder)
    assert policy.value_head.out.in_features == 16
    scored = policy.score(rows(20), ANSWERS, PROMPT_OF, values=True)
    assert scored.values is not None and scored.values.shape == (3, 4)
    assert_right(policy, plain(folder), 40)


# ---- windows and positions -------------------------------------------------------------------


def test_rows_longer_than_a_window_take_the_plain_path(tmp_path: Path) -> None:
    folder = saved(tmp_path, "mistral", sliding_window=64)
    policy, model = loaded(folder), plain(folder)
    assert policy.tree and policy.window == 64 and policy.context == 256
    assert policy.packs(64) and not policy.packs(65)
    for length in (40, 63, 66, 120):
        assert_right(policy, model, length)
    assert policy.prefix_cache([[*row, 5] for row in rows(120)]) is not None
    for length in (50, 62, 70, 120):  # the second grows across the window
        prompts = rows(length)
        drawn = generate(policy, prompts, Sampling(6, greedy=True))
        for prompt, answer, logprobs in zip(prompts, drawn.rows, drawn.logprobs, strict=True):
            assert answer == greedy(model, prompt, len(answer))
            tiny.close(logprobs[: len(answer)], alone(model, prompt, answer), 1e-4)


@torch.no_grad()
def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_the_context_ends_where_position_tables_change(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Behind 48 tokens LongRoPE takes other frequencies for every row of the batch."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0, 5.0, 7.0, 9.0]}
    rope["original_max_position_embeddings"] = 48
    folder = saved(tmp_path, "llama", rope_parameters=rope, max_position_embeddings=192)
    policy = loaded(folder)
    assert policy.context == 48 and "context ends at 48 tokens" in capsys.readouterr().err
    assert_right(policy, plain(folder), 40)


def test_a_far_window_ends_the_context_unless_longer_rows_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A window of 1,100: rows behind it would have to be tried at load, which costs seconds of a
    real model, for rows that most tasks do not have."""
    folder = saved(tmp_path, "mistral", sliding_window=1100, max_position_embeddings=1300)
    policy = loaded(folder)
    assert policy.tree and policy.context == 1100
    assert "context ends at 1,100 tokens, the window" in capsys.readouterr().err
    policy = loaded(folder, longest=1200)
    assert policy.tree and policy.context == 1300 and not capsys.readouterr().err
    assert_right(policy, plain(folder), 1150)
    policy = loaded(folder, longest=500)  # cannot be reached
    assert policy.context == 1100 and not capsys.readouterr().err


def test_rows_end_at_a_window_that_the_plain_path_gets_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path, "mistral", sliding_window=64)
    step = plain_path.PlainCache.step
    monkeypatch.setattr(
        plain_path.PlainCache, "step", lambda s, d, token, place: step(s, d, token, place + 1)
    )
    policy = loaded(folder)
    assert policy.tree and policy.context == 64
    assert "rows end at 64 tokens" in capsys.readouterr().err


# ---- which path ------------------------------------------------------------------------------


def of(policy: Policy) -> AsLoaded:
    return AsLoaded.of(policy.model, policy.tokenizer, 256)


@pytest.mark.parametrize("off", [0.0005, 0.01, 0.3])
def test_a_path_that_is_a_little_off_is_not_taken(
    off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32 nothing but rounding may lie between the paths: 1e-4 of logits of a few units."""
    policy = tiny.policy(shaken=False)
    as_loaded = of(policy)
    run, plain = interface.forward, plain_path.forward
    monkeypatch.setattr(interface, "forward", lambda *a: run(*a) * (1 + off))
    assert choose_path(policy, "auto", as_loaded) is False

    def scaled(*args: Any) -> Any:
        out = plain(*args)
        out.last_hidden_state = out.last_hidden_state * (1 + off)
        return out

    monkeypatch.setattr(plain_path, "forward", scaled)
    with pytest.raises(UserError, match="llama gives other logits behind padding"):
        choose_path(policy, "auto", as_loaded)


def test_in_bf16_small_mistakes_are_seen_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared runs that weigh 10 % too much: in bf16 that drowns in the rounding of the whole, so
    the first layers are compared in fp32."""
    model = tiny.causal_lm("llama").to(torch.bfloat16).requires_grad_(False)
    words = tiny.tokenizer()
    as_loaded = AsLoaded.of(model, words, 256)
    lora.attach(model, LoraConfig(r=4))
    policy = tiny.Policy(model, words, tiny.ValueHead(32), ModelConfig())
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert choose_path(policy, "auto", as_loaded) is True
    for name, parameter in model.named_parameters():  # what was fp32 for the check is so no longer
        assert parameter.dtype == before[name].dtype and torch.equal(parameter, before[name])
    assert len(policy.decoder.layers) == 2
    merge = attention._merge_into

    def heavier(out: Tensor, lse: Tensor, more: Tensor, norm: Tensor) -> None:
        merge(out, lse, more, norm + 0.1)

    monkeypatch.setattr(attention, "_merge_into", heavier)
    assert choose_path(policy, "auto", as_loaded) is False


def test_the_unmodified_model_is_the_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What replaces modules of the model is part of what is checked."""
    folder = saved(tmp_path, "llama")
    attach = norms.attach

    def wrong(model: nn.Module) -> int:
        count = attach(model)
        for module in model.modules():
            if isinstance(module, norms.FrozenRMSNorm):
                module.variance_epsilon = 0.05
        return count

    monkeypatch.setattr(norms, "attach", wrong)
    with pytest.raises(UserError, match="llama gives other logits"):
        loaded(folder)


def test_decoding_on_the_plain_path_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path, "mpt", d_model=32, n_heads=4, n_layers=2, max_seq_len=256)
    policy = loaded(folder)
    assert not policy.tree
    assert_right(policy, plain(folder), 40)
    step = plain_path.PlainCache.step

    def off(self: Any, decoder: Any, token: Tensor, place: Any) -> Tensor:
        return step(self, decoder, token.flip(0), place)

    monkeypatch.setattr(plain_path.PlainCache, "step", off)
    with pytest.raises(UserError, match="mpt gives other logits behind tokens that were run befo"):
        loaded(folder)


def test_what_raises_in_a_batch_is_not_supported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path, "mpt", d_model=32, n_heads=4, n_layers=2, max_seq_len=256)

    def broken(*args: Any) -> None:
        raise AttributeError("'State' object has no attribute 'keys'\nmore")

    monkeypatch.setattr(plain_path.PlainCache, "keep", broken)
    line = "mpt cannot be run in batches (AttributeError: 'State' object has no attribute 'keys')"
    with pytest.raises(UserError) as caught:
        loaded(folder)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_running_out_of_memory_is_not_the_architectures_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise torch.cuda.OutOfMemoryError("no room")

    folder = saved(tmp_path, "llama")
    monkeypatch.setattr(interface, "forward", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        loaded(folder)


def test_an_architecture_without_sdpa_runs_with_eager(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path, "bloom", n_layer=2, n_head=4)
    policy = loaded(folder)
    assert "attention is eager" in capsys.readouterr().err
    assert_right(policy, plain(folder), 40)


# ---- where LoRA goes -------------------------------------------------------------------------


def test_a_layer_that_is_never_called_gets_no_lora(tmp_path: Path) -> None:
    """Jamba reads the weight of `dt_proj` itself: LoRA there would be saved, and do nothing."""
    folder = saved(
        tmp_path, "jamba", num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=4, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False,
    )  # fmt: skip
    policy = loaded(folder)
    names = lora.lora_layers(policy.model)
    assert names and not any(name.endswith("dt_proj") for name in names)
    assert any(name.endswith("in_proj") for name in names)
    policy.score(rows(20), ANSWERS, PROMPT_OF).logprobs.sum().backward()
    assert all(layer.lora_b.grad is not None for layer in names.values())
    with pytest.raises(UserError, match=r"lora.targets: dt_proj matches no linear layer"):
        loaded(folder, targets=["dt_proj"])


def test_a_linear_class_of_its_own_is_tried(tmp_path: Path) -> None:
    """Falcon's linears compute what linears do; a router, whose class is a linear too, does not."""
    policy = loaded(saved(tmp_path / "falcon", "falcon", new_decoder_architecture=True))
    assert len(lora.lora_layers(policy.model)) == 8
    tiny.shake(policy)
    policy.score(rows(20), ANSWERS, PROMPT_OF).logprobs.sum().backward()

    class Router(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            scores = super().forward(x)
            return scores.topk(2)

    class Bits(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.sign(), self.bias)

    model = tiny.causal_lm("llama")
    model.model.layers[0].mlp.router = Router(32, 4)
    model.model.layers[0].mlp.bits = Bits(32, 4)
    assert not {"router", "bits"} & {n.split(".")[-1] for n in lora.attach(model, LoraConfig(r=2))}


def test_a_model_that_reads_pictures_is_run_by_its_text(tmp_path: Path) -> None:
    from transformers import Gemma3Config

    text = {**SMALL, "head_dim": 8, "sliding_window": 64}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4,
                          image_token_index=31, boi_token_index=32, eoi_token_index=33)  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    policy = loaded(str(tmp_path))
    assert policy.tree and policy.window == 64 and policy.context == 256
    assert all("vision" not in name for name in lora.lora_layers(policy.model))
    model = plain(str(tmp_path))
    for length in (40, 90):
        assert_right(policy, model, length)


def test_gpt2_does_not_look_for_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its look at each packed row would wait for the device."""
    policy = tiny.policy("gpt2")
    assert policy.config.pad_token_id is not None

    def looks(*args: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(type(policy.decoder), "warn_if_padding_and_no_attention_mask", looks)
    policy.score(rows(20), ANSWERS, PROMPT_OF)


def test_only_rows_that_can_be_reached_are_run() -> None:
    model, words = tiny.causal_lm("mistral", sliding_window=64), tiny.tokenizer()
    assert len(AsLoaded.of(model, words, 256).far) == 1
    assert len(AsLoaded.of(model, words, 64).far) == 0
    assert shape.windows(model.config) == [64]


def test_how_far_logits_may_be_apart_in_low_precision() -> None:
    """A tenth of their spread, which is 1 here: logits of -1 and 1 about their mean of 5."""
    expected = torch.tensor([[4.0, 6.0, 4.0, 6.0]]).repeat(3, 1)
    sign = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    assert path_check._near(expected + 0.099 * sign, expected, exact=False)
    assert not path_check._near(expected + 0.101 * sign, expected, exact=False)
    assert not path_check._near(expected * float("nan"), expected, exact=False)


# ---- models that are odd in other ways -------------------------------------------------------


def mamba(folder: Path) -> str:
    return saved(
        folder, "mamba2", num_heads=8, head_dim=8, state_size=8, expand=2, n_groups=1, chunk_size=8,
        use_cache=True,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["mamba2", "gpt2"])
def test_the_plans_of_memory_and_time_hold_for_any_config(kind: str, tmp_path: Path) -> None:
    """Mamba 2 has no attention heads; a head of keys may have a size of its own."""
    folder = mamba(tmp_path) if kind == "mamba2" else saved(tmp_path, kind, n_embd=32, n_head=4)
    policy = loaded(folder)
    cfg = Config(task="sst2", model=ModelConfig(folder))
    work = Workload.on_rollouts(cfg.rollout, cfg.ppo, critic=True)
    plan = memory.plan(policy, cfg, work, lora.lora_parameters(policy.model), rows(20))
    assert plan.tokens > 0 and "memory plan" in plan.lines()[0]
    assert flops.weights_of(policy).blocks > 0


def test_layers_whose_settings_differ(tmp_path: Path) -> None:
    """transformers raises where one number is asked for and each layer has its own."""
    config = tiny.causal_lm("mistral", sliding_window=100).config
    config.per_layer_config = {0: {"sliding_window": 16}, 1: {"sliding_window": 100}}
    with pytest.raises(Exception, match="sliding_window"):
        _ = config.sliding_window
    assert shape.windows(config) == [16, 100]
    assert shape.context_of(config) == 256


def test_damaged_base_weights_are_told_as_such(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    model = plain(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="NaN or infinite; its weights are damaged"):
        loaded(folder)


def test_a_window_that_no_config_names_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code that is not the library's may mask what it likes: rows of 300 tokens are tried."""
    from transformers.models.llama import modeling_llama

    folder = saved(tmp_path, "llama", max_position_embeddings=512)
    forward = modeling_llama.LlamaModel.forward

    class Windowed(modeling_llama.LlamaModel):
        def forward(self, input_ids=None, **named):  # type: ignore[no-untyped-def]
            out = forward(self, input_ids=input_ids, **named)
            far = named.get("position_ids")
            count = input_ids.shape[1] if far is None else int(far.max()) + 1
            if count > 100:  # with a long row the whole batch comes out differently
                out.last_hidden_state = out.last_hidden_state * (1 + 0.01 * count)
            return out

    assert loaded(folder).context == 512
    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", Windowed.forward)
    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "__module__", "modeling_of_a_stranger")
    with pytest.raises(UserError, match="llama gives other logits behind padding"):
        loaded(folder)


def test_a_merged_model_needs_weights_that_no_two_adapters_share() -> None:
    model = tiny.causal_lm("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    lora.attach(model, LoraConfig(r=2))
    with pytest.raises(UserError, match=r"share one weight.*export without --merge"):
        lora.merge(model)


def test_log_probs_that_are_no_numbers_decide_nothing() -> None:
    """An adapter of finite numbers, whose product is not: no label may be the first by default."""
    policy = tiny.policy()
    with torch.no_grad():
        for parameter in lora.lora_parameters(policy.model):
            parameter.fill_(3e38)
    prompt = fit_prompt(policy, tiny.SST2, tiny.examples(1)[0], 200)
    with pytest.raises(UserError, match="log-probabilities are no numbers"):
        label_probabilities(policy, tiny.SST2, [prompt])
    with pytest.raises(UserError, match="log-probabilities are no numbers"):
        answerer = PolicyAnswerer(policy, Config(task="sst2"))
        list(answerer.answer(tiny.SST2, tiny.examples(1), "greedy"))


def test_teach_form_keeps_to_the_same_limits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0,
            "short_factor": [1.0] * 4, "long_factor": [3.0, 5.0, 7.0, 9.0],
            "original_max_position_embeddings": 64}  # fmt: skip
    folder = saved(tmp_path, "llama", rope_parameters=rope, max_position_embeddings=192)
    policy = teach_form._load(Config(task="sst2", model=ModelConfig(folder, device="cpu")))
    assert policy.context == 64 and "context ends at 64" in capsys.readouterr().err
