"""The policy: scores against a naive loop, the value head, the stop detector, loading."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoTokenizer

from ppo_nlu.config import Config, LoraConfig, ModelConfig
from ppo_nlu.errors import UserError
from ppo_nlu.model import lora
from ppo_nlu.model.base_model import pick_device
from ppo_nlu.model.load import check_words, load_policy
from ppo_nlu.model.path_check import choose_path
from ppo_nlu.model.policy import trainable, unflatten
from ppo_nlu.model.stop import StopDetector
from ppo_nlu.model.value_head import ValueHead
from ppo_nlu.tasks.prompts import STOP, answer, render
from ppo_nlu.tree import interface, packed_row
from ppo_nlu.tree import plain as plain_path
from ppo_nlu.tree.cache import TreeCache
from tests.tree.shapes import SHAPES

TOKENIZERS = ("llama2", "gpt2", "gptneox-20b", "qwen2", "stories260K")


# ---- scores ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shared prefix", "several answers a prompt", "two clusters"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mpt"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_score_is_of_the_action_given_what_stands_before_it(kind, name, temperature) -> None:
    """Column t is log π(a_t | prompt, a_<t): a naive loop runs the model once for every token."""
    policy = tiny.policy(kind)
    prompts, answers, prompt_of = SHAPES[name]
    with torch.no_grad():
        scored = policy.score(prompts, answers, prompt_of, temperature, values=True)
        assert scored.values is not None
        row = 0
        for j, reply in enumerate(answers):
            prompt = prompts[j if prompt_of is None else prompt_of[j]]
            for t, action in enumerate(reply):
                ids = torch.tensor([[*prompt, *reply[:t]]])
                out = policy.model(input_ids=ids, use_cache=False, output_hidden_states=True)
                logprobs = torch.log_softmax(out.logits[0, -1] / temperature, -1)
                assert abs(scored.logprobs[j, t] - logprobs[action]) < 1e-5
                assert abs(scored.entropy[j, t] + (logprobs.exp() * logprobs).sum()) < 1e-5
                state = policy.decoder(input_ids=ids, use_cache=False).last_hidden_state[0, -1:]
                tiny.close(scored.hidden[row], state[0])
                assert abs(scored.values[j, t] - policy.value_head(state)[0]) < 1e-5
                row += 1
    assert scored.mask.sum(1).tolist() == [len(reply) for reply in answers]
    assert scored.mask.dtype == torch.bool and scored.mask.shape == (
        len(answers),
        max(map(len, answers)),
    )
    for column in (scored.logprobs, scored.entropy, scored.values):
        assert column.dtype == torch.float32 and not column[~scored.mask].any()
    assert bool((scored.mask.long().diff(dim=1) <= 0).all()), "right-padded"


def test_score_gradient_reaches_only_what_trains() -> None:
    policy = tiny.policy()
    prompts, answers, prompt_of = SHAPES["several answers a prompt"]
    scored = policy.score(prompts, answers, prompt_of, values=True)
    assert scored.values is not None
    (scored.logprobs.sum() + scored.values.sum()).backward()
    got = {id(p) for p in policy.model.parameters() if p.grad is not None}
    assert got == {id(p) for p in lora.lora_parameters(policy.model)}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable(policy))


def test_unflatten_puts_rows_side_by_side() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    table = unflatten(torch.arange(1.0, 7.0), mask)
    assert table.tolist() == [[1, 2, 0], [3, 0, 0], [4, 5, 6]]


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_value_head_starts_at_zero_in_fp32(kind: str) -> None:
    head = ValueHead(8, kind, width=5)
    states = torch.randn(3, 8, dtype=torch.bfloat16)
    assert head(states).tolist() == [0.0, 0.0, 0.0] and head(states).dtype == torch.float32
    assert [p.shape[0] for p in head.parameters()] == ([5, 5, 1, 1] if kind == "mlp" else [1, 1])
    with torch.no_grad():
        head.out.bias.fill_(3.0)
    assert head(states).tolist() == [3.0, 3.0, 3.0]


def test_reference_is_the_same_model_with_lora_off() -> None:
    fresh, shaken = tiny.policy(shaken=False), tiny.policy()
    prompts, answers, prompt_of = SHAPES["several answers a prompt"]
    with torch.no_grad():
        start = fresh.score(prompts, answers, prompt_of).logprobs
        assert not torch.allclose(
            shaken.score(prompts, answers, prompt_of).logprobs, start, atol=1e-2
        )
        with lora.lora_disabled(shaken.model):
            assert torch.equal(shaken.score(prompts, answers, prompt_of).logprobs, start)


# ---- the stop detector ----------------------------------------------------------------------


@cache
def real_tokenizer(name: str) -> Any:
    folder = tiny.models_folder()
    return AutoTokenizer.from_pretrained(
        folder / name if name == "stories260K" else folder / "tokenizers" / name
    )


def detector(tokenizer: Any, eos: Any = None) -> StopDetector:
    size = max(tokenizer.get_vocab().values()) + 1
    model = SimpleNamespace(
        config=SimpleNamespace(vocab_size=size),
        generation_config=SimpleNamespace(eos_token_id=eos),
    )
    return StopDetector(model, tokenizer)


def byte_table() -> dict[int, str]:
    """GPT-2's printable character for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


def segmenter(tokenizer: Any) -> Callable[[str, random.Random, int], list[tuple[int, str]]]:
    """Random ways of spelling a text: (token id, its text), pieces of at most so many characters.

    With a longest piece of 0 every character is spelled in bytes.
    """
    vocab: dict[str, int] = tokenizer.get_vocab()
    in_bytes = "<0x41>" in vocab
    table = byte_table()

    def spell(text: str) -> str:
        if in_bytes:
            return text.replace(" ", "▁")
        return "".join(table[b] for b in text.encode())

    def single(char: str) -> int:
        return vocab[f"<0x{ord(char):02X}>" if in_bytes else spell(char)]

    def split(text: str, rng: random.Random, longest: int) -> list[tuple[int, str]]:
        found, at = [], 0
        while at < len(text):
            sizes = [n for n in range(1, longest + 1) if spell(text[at : at + n]) in vocab]
            size = min(rng.choice(sizes), len(text) - at) if sizes else 1
            piece = text[at : at + size]
            found.append((vocab[spell(piece)] if sizes else single(piece), piece))
            at += size
        return found

    return split


TEXTS = (
    " Positive </Judgement> more",
    " Positive </Judgement>",
    "</Judgement>\n</Judgement>",
    " >> a > b </Judgment> </Judgement>>.",
    " <Judgement> </ Judgement> </judgement> Negative</Judgement><Judgement>",
)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_stop_fires_at_the_token_that_completes_the_tag(name: str) -> None:
    tokenizer = real_tokenizer(name)
    stop, split, rng = detector(tokenizer), segmenter(tokenizer), random.Random(0)
    lengths = set()
    for text in TEXTS:
        ways = [split(text, rng, longest) for longest in [0, 1, 2, 3] + [12] * 12]
        for way in ways:
            ids = [token for token, _ in way]
            done = next(
                k for k in range(len(way)) if STOP in "".join(piece for _, piece in way[: k + 1])
            )
            fired = stop.ended([ids[: k + 1] for k in range(done + 1)])
            assert fired == [False] * done + [True], (text, [piece for _, piece in way])
            lengths.add(len(ids))
    assert len(lengths) > 10, "the ways of spelling differ"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_stop_on_the_tokenizers_own_spelling(name: str) -> None:
    tokenizer = real_tokenizer(name)
    stop = detector(tokenizer)
    for text in TEXTS[:2]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        fired = [k for k in range(len(ids)) if stop.ended([ids[: k + 1]])[0]]
        done = [k for k in range(len(ids)) if STOP in tokenizer.decode(ids[: k + 1])]
        assert fired and fired[0] == done[0]
        assert not tokenizer.decode(ids[: done[0]]).count(STOP)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_stop_on_eos_even_where_it_is_the_pad_too(name: str) -> None:
    tokenizer = real_tokenizer(name)
    tokenizer.pad_token = tokenizer.eos_token
    word = tokenizer(" good", add_special_tokens=False)["input_ids"]
    eos = tokenizer.eos_token_id
    assert detector(tokenizer).ended([word, [*word, eos], [eos]]) == [False, True, True]


def test_every_listed_eos_stops() -> None:
    words = tiny.tokenizer()
    assert detector(words).eos == {2}
    assert detector(words, eos=5).eos == {2, 5}
    stop = detector(words, eos=[5, 7])
    assert stop.eos == {2, 5, 7}
    assert stop.ended([[8, 2], [8, 5], [8, 7], [5, 8]]) == [True, True, True, False]


def test_a_token_between_does_not_hide_the_tag_from_the_stop_alone() -> None:
    """The parser reads the text without special tokens, so the stop detector must too."""
    tokenizer = real_tokenizer("llama2")
    split, rng = segmenter(tokenizer), random.Random(0)
    ids = [token for token, _ in split(" Positive </Judgement>", rng, 1)]
    ids.insert(-3, tokenizer.bos_token_id)
    assert STOP in tokenizer.decode(ids, skip_special_tokens=True)
    assert detector(tokenizer).ended([ids[:-1], ids]) == [False, True]


# ---- words, loading, paths ------------------------------------------------------------------


def test_check_words_refuses_a_tokenizer_without_the_tag() -> None:
    with pytest.raises(UserError, match=r"tinystories-656k.*does not keep 'Positive </Judgement>'"):
        check_words(tiny.pretrained("tinystories-656k"), tiny.SST2)


def test_check_words_accepts() -> None:
    check_words(tiny.pretrained("stories260K"), tiny.SST2)
    check_words(tiny.policy(), tiny.SST2)


def test_encode_keeps_the_opening_and_adds_no_closing() -> None:
    policy = tiny.pretrained("stories260K")
    ids = policy.encode("Once upon a time")
    assert ids[0] == 1 and ids[-1] != 2
    assert policy.decode(ids) == "Once upon a time"
    plain = policy.tokenizer
    policy.tokenizer = Closing(plain)
    assert policy.encode("Once upon a time") == ids, "an eos that the tokenizer adds is taken away"
    policy.tokenizer = plain
    prompt = render(tiny.SST2, {"sentence": "It was a happy day."})
    whole = policy.encode(prompt + answer("Positive"))
    assert STOP in policy.decode(whole[-25:])


class Closing:
    """A tokenizer that adds eos behind every text."""

    def __init__(self, plain: Any):
        self.plain = plain

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        ids = self.plain(text, **options)["input_ids"]
        return {"input_ids": [*ids, self.plain.eos_token_id]}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox", "mpt"])
def test_context_is_the_models_own(kind: str) -> None:
    assert tiny.policy(kind).context == 256


def test_load_policy_from_a_folder(tmp_path) -> None:
    tiny.causal_lm("llama").save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    cfg = Config(
        task="sst2",
        seed=3,
        model=ModelConfig(str(tmp_path), device="cpu"),
        lora=LoraConfig(r=4, dropout=0.5),
    )
    policy, again = load_policy(cfg), load_policy(cfg)
    assert policy.tree and not policy.model.training
    for one, two in zip(trainable(policy), trainable(again), strict=True):
        assert torch.equal(one, two), "one seed, one start"
    tiny.shake(policy)
    logprobs = [policy.score([[5, 6, 7]], [[8, 9]]).logprobs for _ in range(2)]
    assert torch.equal(*logprobs), "no dropout in LoRA"


def test_loading_mistakes_are_the_users(tmp_path) -> None:
    with pytest.raises(UserError, match=r"model.name_or_path: .* holds no config.json"):
        load_policy(Config(task="sst2", model=ModelConfig(str(tmp_path))))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"model.name_or_path: cannot load"):
        load_policy(Config(task="sst2", model=ModelConfig(str(tmp_path))))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"model.device: cuda"):
            pick_device("cuda")


def test_a_tree_that_is_wrong_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that answers otherwise in a tree: the plain path, or an error where none is right."""
    policy, plain, tree = tiny.policy(), plain_path.forward, interface.forward

    def off(decoder, ids, places, plan):
        return tree(decoder, ids, places * 2, plan)

    def broken(*args):
        raise TypeError("forward() got an unexpected keyword argument 'tree'")

    monkeypatch.setattr(interface, "forward", off)
    assert choose_path(policy, "auto") is False
    with pytest.raises(
        UserError, match=r"model.path: in the prefix tree this model gives other lo"
    ):
        choose_path(policy, "tree")
    monkeypatch.setattr(interface, "forward", broken)
    assert choose_path(policy, "auto") is False
    monkeypatch.setattr(plain_path, "forward", lambda *a: plain(a[0], a[1] * 0, *a[2:]))
    with pytest.raises(UserError, match="llama gives other logits behind padding"):
        choose_path(policy, "auto")


@pytest.mark.parametrize(("kind", "changes"), [("mpt", {}), ("mistral", {"sliding_window": 16})])
def test_a_tree_that_is_asked_for_and_impossible_is_refused(kind: str, changes: dict) -> None:
    with pytest.raises(UserError, match=r"model.path"):
        choose_path(tiny.policy(kind, **changes), "tree")


def test_the_check_at_load_decodes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Score passes may be right where token by token is not: the tree is not taken then."""
    policy = tiny.policy()
    step = TreeCache.step
    monkeypatch.setattr(TreeCache, "step", lambda s, d, token, place: step(s, d, token, place + 1))
    assert choose_path(policy, "auto") is False


def test_the_check_at_load_has_a_shared_prefix_and_several_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong merging of a shared run, or of a prompt with several answers, must be seen."""
    policy = tiny.policy()
    plan = packed_row.plan_of
    monkeypatch.setattr(
        packed_row, "plan_of", lambda runs, shared, own, *a: plan(runs, [], own, *a)
    )
    assert choose_path(policy, "auto") is False
    monkeypatch.setattr(
        packed_row, "plan_of", lambda runs, shared, own, *a: plan(runs, shared, [], *a)
    )
    assert choose_path(policy, "auto") is False


@pytest.mark.parametrize(("window", "tree"), [(16, False), (64, True), (256, True), (512, True)])
def test_a_window_that_holds_the_check_leaves_the_tree_to_shorter_rows(
    window: int, tree: bool
) -> None:
    policy = tiny.policy("mistral", sliding_window=window)
    assert policy.tree is tree and policy.window == window
    assert policy.packs(window) is tree and not policy.packs(window + 1)
