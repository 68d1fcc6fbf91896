"""LoRA layers: against the base, against the real peft, and against careless files."""

from __future__ import annotations

import copy
import json
import random
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ppo_nlu.config import LoraConfig
from ppo_nlu.errors import UserError
from ppo_nlu.model import lora, peft_format
from ppo_nlu.storage.folders import CHECKSUMS

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

CFG = LoraConfig(r=3, alpha=6.0)
ARCHITECTURES = ["llama", "qwen2", "gpt2", "gpt_neox", "mpt"]
WITH_PEFT = ["llama", "qwen2", "gpt2", "gpt_neox"]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])


def tiny(name: str, tied: bool = False) -> Any:
    """A random two-layer model in fp32; weights large enough that every layer matters."""
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "tie_word_embeddings": tied}
    llama = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 24,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
    }  # fmt: skip
    neox = {k: v for k, v in llama.items() if k != "num_key_value_heads"}
    configs = {
        "llama": lambda: transformers.LlamaConfig(**llama, **ids),
        "qwen2": lambda: transformers.Qwen2Config(**llama, **ids),
        "gpt2": lambda: transformers.GPT2Config(
            n_embd=16, n_layer=2, n_head=4, vocab_size=24, n_positions=32, **ids
        ),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**neox, **ids),
        "mpt": lambda: transformers.MptConfig(
            d_model=16, n_layers=2, n_heads=4, vocab_size=24, max_seq_len=32, expansion_ratio=2,
            **ids,
        ),
    }  # fmt: skip
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(configs[name]()).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def with_lora(name: str, cfg: LoraConfig = CFG, seed: int = 1, **kwargs: bool) -> Any:
    model = tiny(name, **kwargs)
    lora.attach(model, cfg, torch.Generator().manual_seed(seed))
    return model


def randomise(model: Any, seed: int = 5) -> Any:
    """As if trained: B is no longer zero, for our layers and for peft's."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def train_steps(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(lora.lora_parameters(model), lr=0.05)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# ---- the layer -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lora_is_zero_at_the_start(name: str) -> None:
    """Bit for bit, except that Conv1D multiplies by the transposed weight in another order."""
    base, ours = logits(tiny(name)), logits(with_lora(name))
    assert gap(base, ours) <= (1e-5 if name == "gpt2" else 0.0)


def test_layer_against_the_formula() -> None:
    """y = W x + b + (alpha / r) B A x, and alpha / sqrt(r) for rslora, written out in loops."""
    base = nn.Linear(5, 4)
    x = torch.randn(2, 5)
    for rslora, scaling in ((False, 6.0 / 4), (True, 6.0 / 2)):  # r = 4: alpha / 4, alpha / 2
        layer = lora.LoraLinear(base, LoraConfig(r=4, alpha=6.0, rslora=rslora))
        nn.init.normal_(layer.lora_b)
        y = layer(x)
        for row in range(2):
            low = [sum(layer.lora_a[k, i] * x[row, i] for i in range(5)) for k in range(4)]
            for o in range(4):
                want = base.bias[o] + sum(base.weight[o, i] * x[row, i] for i in range(5))
                want = want + scaling * sum(layer.lora_b[o, k] * low[k] for k in range(4))
                assert y[row, o].item() == pytest.approx(want.item(), abs=1e-5)


def test_a_is_drawn_as_in_peft() -> None:
    """kaiming-uniform with a = sqrt(5) is uniform on (-1/sqrt(in), 1/sqrt(in)); B is zero."""
    layer = lora.LoraLinear(nn.Linear(400, 7), LoraConfig(r=50), torch.Generator().manual_seed(0))
    bound = 1 / 20
    assert layer.lora_a.abs().max() <= bound
    assert layer.lora_a.abs().max() > 0.99 * bound
    assert layer.lora_a.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert layer.lora_b.count_nonzero() == 0


def test_seed_decides_a() -> None:
    one, same, other = (lora.state_dict(with_lora("llama", seed=s)) for s in (1, 1, 2))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not any(torch.equal(one[k], other[k]) for k in one if "lora_A" in k)


def test_masters_are_fp32_on_a_bf16_base() -> None:
    model = tiny("llama").bfloat16()
    lora.attach(model, CFG)
    assert {p.dtype for p in lora.lora_parameters(model)} == {torch.float32}
    out = model(input_ids=IDS, labels=IDS)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    gradients = [p.grad for p in lora.lora_parameters(model)]
    assert all(g is not None and g.dtype == torch.float32 for g in gradients)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_reach_a_and_b_and_nothing_else(name: str) -> None:
    model = randomise(with_lora(name))
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.rpartition(".")[2] for n in trains} == {"lora_a", "lora_b"}
    model(input_ids=IDS, labels=IDS).loss.backward()
    for n, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (n in trains), n
        assert n not in trains or parameter.grad.count_nonzero() > 0, n


def test_dropout_is_off_in_eval_and_right_on_average() -> None:
    """E[y] = y without dropout; per entry of x var = p / (1 - p) * (scaling * B A x)²."""
    p = 0.25
    base = nn.Linear(1, 1, bias=False)
    layer = lora.LoraLinear(base, LoraConfig(r=1, alpha=2.0, dropout=p))
    nn.init.constant_(base.weight, 0.5)
    nn.init.constant_(layer.lora_a, 1.0)
    nn.init.constant_(layer.lora_b, 3.0)
    x = torch.ones(40_000, 1)
    torch.manual_seed(0)
    layer.eval()
    assert torch.equal(layer(x), torch.full_like(x, 0.5 + 6.0))
    layer.train()
    y = layer(x).detach()
    values = [pytest.approx(0.5), pytest.approx(0.5 + 6.0 / (1 - p))]
    assert sorted(set(y.flatten().tolist())) == values
    assert float(y.mean()) == pytest.approx(6.5, abs=0.07)  # 4 sigma = 4 * 6 * sqrt(1/3) / 200
    assert float(y.var()) == pytest.approx(36 * p / (1 - p), rel=0.05)
    assert not torch.equal(layer(x), y), "every forward draws a mask of its own"
    torch.manual_seed(0)
    assert torch.equal(layer(x), y), "the mask comes from torch's generator"
    layer.disabled = True
    assert torch.equal(layer(x), base(x))


# ---- the reference ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lora_off_is_the_base_after_training(name: str) -> None:
    before = logits(tiny(name))
    model = with_lora(name)
    train_steps(model)
    assert gap(logits(model), before) > 1e-3
    with lora.lora_disabled(model):
        assert torch.equal(logits(model), before)
    assert gap(logits(model), before) > 1e-3


def test_frozen_reference_stays_where_it_was() -> None:
    model = randomise(with_lora("llama", LoraConfig(r=3, alpha=6.0, dropout=0.5)))
    before, base = logits(model), logits(tiny("llama"))
    keys = list(model.state_dict())
    lora.freeze_reference(model)
    assert list(model.state_dict()) == keys
    train_steps(model)
    assert gap(logits(model), before) > 1e-3
    assert gap(base, before) > 1e-3
    with lora.lora_disabled(model.train()):
        assert torch.equal(logits(model), before), "no dropout in the reference either"
    with lora.bare(model):
        assert torch.equal(logits(model), base)
    with lora.lora_disabled(model):
        assert torch.equal(logits(model), before), "the reference is back"


def test_disabled_survives_nesting_and_exceptions() -> None:
    model = randomise(with_lora("llama"))
    on = logits(model)
    with lora.lora_disabled(model):
        off = logits(model)
        with lora.lora_disabled(model):
            assert torch.equal(logits(model), off)
        assert torch.equal(logits(model), off)
    assert torch.equal(logits(model), on)
    with pytest.raises(RuntimeError, match="inside"), lora.lora_disabled(model):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), on)


# ---- which layers ----------------------------------------------------------------------------

LLAMA_LAYERS = (
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
    "mlp.gate_proj mlp.up_proj mlp.down_proj"
)


@pytest.mark.parametrize(
    ("name", "targets", "block", "layers"),
    [
        ("llama", "all-linear", "model.layers", LLAMA_LAYERS),
        ("llama", "attention", "model.layers", " ".join(LLAMA_LAYERS.split()[:4])),
        ("llama", ["q_proj", "v_proj"], "model.layers", "self_attn.q_proj self_attn.v_proj"),
        ("qwen2", "all-linear", "model.layers", LLAMA_LAYERS),
        ("gpt2", "all-linear", "transformer.h",
         "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),
        ("gpt2", "attention", "transformer.h", "attn.c_attn attn.c_proj"),
        ("gpt2", ["mlp.c_proj"], "transformer.h", "mlp.c_proj"),
        ("gpt_neox", "all-linear", "gpt_neox.layers",
         "attention.query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h"),
        ("gpt_neox", "attention", "gpt_neox.layers", "attention.query_key_value attention.dense"),
        ("mpt", "all-linear", "transformer.blocks",
         "attn.Wqkv attn.out_proj ffn.up_proj ffn.down_proj"),
        ("mpt", "attention", "transformer.blocks", "attn.Wqkv attn.out_proj"),
    ],
)  # fmt: skip
def test_targets(name: str, targets: str | list[str], block: str, layers: str) -> None:
    model = tiny(name)
    names = lora.attach(model, replace(CFG, targets=targets))
    assert set(names) == {f"{block}.{i}.{layer}" for i in range(2) for layer in layers.split()}
    assert names == list(lora.lora_layers(model))
    assert len(lora.lora_parameters(model)) == 2 * len(names)


def test_one_layer_by_its_full_name() -> None:
    names = lora.attach(tiny("llama"), replace(CFG, targets=["model.layers.1.mlp.up_proj"]))
    assert names == ["model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize(
    "targets", [["nonsense"], ["q_proj", "v_prj"], ["proj"], ["lm_head"], ["embed_tokens"], []]
)
def test_no_match_names_what_there_is(targets: list[str]) -> None:
    """Endings are whole names: `proj` is no q_proj. The head is no target: no forward calls it."""
    with pytest.raises(UserError) as error:
        lora.attach(tiny("llama"), replace(CFG, targets=targets))
    message = str(error.value)
    assert message.startswith("lora.targets: ")
    assert all(layer in message for layer in LLAMA_LAYERS.split())
    assert "\n" not in message
    if "q_proj" in targets:
        assert message.startswith("lora.targets: v_prj matches no")


def test_a_word_is_no_list() -> None:
    with pytest.raises(UserError, match=r"give a list, \[q_proj\]"):
        lora.attach(tiny("llama"), replace(CFG, targets="q_proj"))


# ---- files: the real peft is the oracle ------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", "attention"])
@pytest.mark.parametrize("name", WITH_PEFT)
def test_peft_loads_our_adapter(name: str, targets: str, rslora: bool, tmp_path: Path) -> None:
    cfg = replace(CFG, targets=targets, rslora=rslora)
    model = randomise(with_lora(name, cfg))
    peft_format.save_adapter(model, tmp_path, cfg, "some/base")
    base = tiny(name)
    plain = logits(base)
    with warnings.catch_warnings():  # a wrong key only warns there, and loads nothing
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        theirs = peft.PeftModel.from_pretrained(base, str(tmp_path))
    assert gap(logits(theirs), logits(model)) <= 1e-5
    assert gap(logits(theirs), plain) > 1e-3
    config = peft.LoraConfig.from_pretrained(str(tmp_path))
    assert (config.r, config.lora_alpha, config.use_rslora) == (3, 6.0, rslora)
    assert config.fan_in_fan_out == (name == "gpt2")
    assert config.base_model_name_or_path == "some/base"
    assert (config.task_type, config.bias, config.inference_mode) == ("CAUSAL_LM", "none", True)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", WITH_PEFT)
def test_we_load_an_adapter_of_peft(name: str, rslora: bool, tmp_path: Path) -> None:
    base = tiny(name)
    plain = logits(base)
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.1, target_modules="all-linear", use_rslora=rslora,
        task_type="CAUSAL_LM", fan_in_fan_out=name == "gpt2",
    )  # fmt: skip
    theirs = randomise(peft.get_peft_model(base, settings)).eval()
    theirs.save_pretrained(str(tmp_path))
    cfg = peft_format.read_adapter_config(tmp_path)
    assert (cfg.r, cfg.alpha, cfg.rslora, cfg.dropout) == (4, 6.0, rslora, 0.1)
    model = tiny(name)
    lora.attach(model, cfg)
    peft_format.load_adapter(model, tmp_path)
    assert gap(logits(model), logits(theirs)) <= 1e-5
    assert gap(logits(model), plain) > 1e-3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saved_and_loaded_is_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    model = randomise(with_lora(name))
    peft_format.save_adapter(model, tmp_path, CFG, "base")
    again = tiny(name)
    lora.attach(again, peft_format.read_adapter_config(tmp_path))
    peft_format.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    names = [peft_format.CONFIG_FILE, peft_format.WEIGHTS_FILE, CHECKSUMS]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_keys_come_in_one_order() -> None:
    """A before B, layer by layer as the model has them, whatever the order of the targets."""
    keys = list(lora.state_dict(with_lora("llama", replace(CFG, targets=["v_proj", "q_proj"]))))
    assert keys == [
        f"base_model.model.model.layers.{i}.self_attn.{layer}.lora_{half}.weight"
        for i in range(2)
        for layer in ("q_proj", "v_proj")
        for half in "AB"
    ]
    model = with_lora("llama", replace(CFG, targets=["v_proj", "q_proj"]))
    in_order = zip(lora.state_dict(model).values(), lora.lora_parameters(model), strict=True)
    assert all(torch.equal(saved, p) for saved, p in in_order)


def test_state_dict_is_a_copy() -> None:
    model = with_lora("llama")
    state = lora.state_dict(model)
    before = {k: v.clone() for k, v in state.items()}
    randomise(model)
    assert all(torch.equal(state[k], before[k]) for k in state)


def test_target_modules_name_our_layers_and_no_others(tmp_path: Path) -> None:
    """GPT-2 has two c_proj; layer 1 alone needs the full name."""
    for targets, want in (
        ("attention", ["attn.c_proj", "c_attn"]),
        ("all-linear", ["c_attn", "c_fc", "c_proj"]),
        (["transformer.h.1.mlp.c_fc"], ["1.mlp.c_fc"]),
    ):
        cfg = replace(CFG, targets=targets)
        peft_format.save_adapter(with_lora("gpt2", cfg), tmp_path, cfg, "base")
        written = json.loads((tmp_path / peft_format.CONFIG_FILE).read_text())
        assert written["target_modules"] == want


# ---- files: what is refused ------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter as other tools leave it: without checksums."""
    peft_format.save_adapter(randomise(with_lora("llama")), tmp_path, CFG, "base")
    (tmp_path / CHECKSUMS).unlink()
    return tmp_path


KEY = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / peft_format.WEIGHTS_FILE)
    save_file(change(tensors), folder / peft_format.WEIGHTS_FILE)


def edit_config(folder: Path, **values: object) -> None:
    path = folder / peft_format.CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refused(folder: Path, *words: str) -> None:
    """Loading raises one line with these words, and leaves the model as it was."""
    model = with_lora("llama")
    before = lora.state_dict(model)
    with pytest.raises(UserError) as error:
        peft_format.load_adapter(model, folder)
    message = str(error.value)
    assert str(folder) in message and "\n" not in message
    assert all(word in message for word in words), message
    assert all(torch.equal(before[k], v) for k, v in lora.state_dict(model).items())


def test_refuses_missing_keys(adapter: Path) -> None:
    edit_weights(adapter, lambda t: {k: v for k, v in t.items() if k != KEY})
    refused(adapter, "lacks 1 ", KEY)


def test_refuses_unexpected_keys(adapter: Path) -> None:
    extra = "base_model.model.lm_head.lora_A.weight"
    edit_weights(adapter, lambda t: {**t, extra: torch.zeros(3, 16)})
    refused(adapter, "unexpected", extra)


def test_refuses_a_wrong_prefix(adapter: Path) -> None:
    """With such keys peft itself loads nothing and goes on."""
    edit_weights(adapter, lambda t: {k.removeprefix("base_model."): v for k, v in t.items()})
    refused(adapter, "no LoRA weights")


def test_refuses_wrong_shapes(adapter: Path) -> None:
    edit_weights(adapter, lambda t: {**t, KEY: torch.zeros(3, 17)})
    refused(adapter, KEY, "(3, 17)", "(3, 16)")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"r": 8}, ["r is 8", "has 3 rows"]),
        ({"lora_alpha": 7}, ["alpha is 7.0", "lora.alpha=6.0"]),
        ({"use_rslora": True}, ["rslora is True", "lora.rslora=False"]),
        ({"use_dora": True}, ["use_dora"]),
        ({"alpha_pattern": {"q_proj": 3}}, ["alpha_pattern"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save"]),
        ({"bias": "all"}, ["bias"]),
        ({"a_variant_to_come": True}, ["a_variant_to_come"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights"]),
        ({"peft_type": "IA3"}, ["peft_type", "IA3"]),
        ({"r": None}, ["r is None"]),
        ({"r": float("inf")}, ["r is inf"]),
        ({"r": -3}, ["r is -3"]),
        ({"r": 0}, ["r is 0"]),
        ({"r": 2.5}, ["r is 2.5"]),
        ({"r": True}, ["r is True"]),
        ({"r": 10**30}, ["r is 1000"]),
        ({"lora_alpha": "much"}, ["lora_alpha is 'much'"]),
        ({"lora_alpha": float("nan")}, ["lora_alpha is nan"]),
        ({"lora_alpha": None}, ["lora_alpha is None"]),
        ({"lora_dropout": 1.5}, ["lora_dropout is 1.5"]),
        ({"lora_dropout": [0.1]}, ["lora_dropout is [0.1]"]),
        ({"use_rslora": "no"}, ["use_rslora is 'no'"]),
    ],
)
def test_refuses_a_config_that_says_otherwise(
    adapter: Path, values: dict[str, object], words: list[str]
) -> None:
    edit_config(adapter, **values)
    refused(adapter, *words)


def test_refuses_a_config_nested_too_deeply(adapter: Path) -> None:
    (adapter / peft_format.CONFIG_FILE).write_text('{"r": ' + "[" * 100_000 + "]" * 100_000 + "}")
    refused(adapter, "nested too deeply")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_refuses_weights_that_are_not_finite(adapter: Path, value: float) -> None:
    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[KEY][0, 1] = value
        return tensors

    edit_weights(adapter, spoil)
    refused(adapter, KEY, "NaN or infinity")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_refuses_weights_that_are_no_floats(adapter: Path, dtype: torch.dtype) -> None:
    edit_weights(adapter, lambda t: {**t, KEY: torch.ones(t[KEY].shape).to(dtype)})
    refused(adapter, KEY, "not floating-point")


def test_refuses_a_number_too_large_for_fp32(adapter: Path) -> None:
    """Finite as float64, infinite in the layer."""
    edit_weights(adapter, lambda t: {**t, KEY: t[KEY].double() + 1e300})
    refused(adapter, KEY, "NaN or infinity")


def test_half_precision_weights_are_taken(adapter: Path) -> None:
    edit_weights(adapter, lambda t: {k: v.bfloat16() for k, v in t.items()})
    peft_format.load_adapter(with_lora("llama"), adapter)


def test_any_changed_byte_of_an_adapter_is_noticed(tmp_path: Path) -> None:
    """Bits flipped all over the three files; peft's own folders have no sums and are taken."""
    peft_format.save_adapter(randomise(with_lora("llama")), tmp_path, CFG, "base")
    draw = random.Random(0)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for place in draw.sample(range(len(whole)), 40):
            spoilt = bytearray(whole)
            spoilt[place] ^= 1 << draw.randrange(8)
            path.write_bytes(spoilt)
            refused(tmp_path, "damaged")
        path.write_bytes(whole[:-1])
        refused(tmp_path, "damaged")
        path.write_bytes(whole)
    peft_format.load_adapter(with_lora("llama"), tmp_path)


def test_a_base_is_named_without_its_machines_path(tmp_path: Path) -> None:
    for given, written in (
        ("/home/me/models/base", "base"),
        ("~/models/base", "base"),
        ("models/base", "models/base"),
        ("owner/name", "owner/name"),
        ("bundled", "bundled"),
    ):
        peft_format.save_adapter(with_lora("llama"), tmp_path, CFG, given)
        config = json.loads((tmp_path / peft_format.CONFIG_FILE).read_text())
        assert config["base_model_name_or_path"] == written


def test_refuses_what_is_not_there_or_not_whole(adapter: Path) -> None:
    config, weights = adapter / peft_format.CONFIG_FILE, adapter / peft_format.WEIGHTS_FILE
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(adapter, peft_format.WEIGHTS_FILE, "damaged")
    weights.unlink()
    refused(adapter, "has no " + peft_format.WEIGHTS_FILE)
    (adapter / "adapter_model.bin").write_bytes(b"pickle")
    refused(adapter, "is a pickle")
    config.write_text("{")
    refused(adapter, "JSON")
    config.write_text("[]")
    refused(adapter, "JSON object")
    config.unlink()
    refused(adapter, "not an adapter folder")


def test_a_failed_write_leaves_the_old_file(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in adapter.iterdir()}

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="no space left"):
        peft_format.save_adapter(randomise(with_lora("llama"), seed=9), adapter, CFG, "base")
    assert {p.name: p.read_bytes() for p in adapter.iterdir()} == before


# ---- merge -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merge_is_the_same_function_without_lora(name: str, tied: bool) -> None:
    model = randomise(with_lora(name, replace(CFG, rslora=True), tied=tied))
    state = copy.deepcopy(model.state_dict())
    merged = lora.merge(model)
    assert gap(logits(merged), logits(model)) <= 1e-5
    assert gap(logits(merged), logits(tiny(name, tied))) > 1e-3
    assert type(merged) is type(model) and not lora.lora_layers(merged)
    assert [n for n, _ in merged.named_parameters()] == [
        n for n, _ in tiny(name, tied).named_parameters()
    ]
    head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied
    assert len(lora.lora_layers(model)) > 0
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_merge_rounds_once_in_low_precision() -> None:
    """The sum is formed in fp32 and rounded to bf16 once: equal to rounding the exact sum."""
    model = tiny("llama").bfloat16()
    lora.attach(model, CFG)
    randomise(model)
    merged = lora.merge(model)
    for name, layer in lora.lora_layers(model).items():
        exact = layer.weight.double() + 2.0 * layer.lora_b.double() @ layer.lora_a.double()
        weight = merged.get_submodule(name).weight
        assert weight.dtype == torch.bfloat16
        assert (weight.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
        wrong = (weight != exact.bfloat16()).float().mean()
        assert wrong < 0.01, "but for ties that fp32 itself moves"


def test_merged_model_survives_save_and_load(tmp_path: Path) -> None:
    model = randomise(with_lora("qwen2", tied=True))
    lora.merge(model).save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert gap(logits(again), logits(model)) <= 1e-5
