"""The bundled tiny model and the program that trains it: tokenizer, leak filter, seen labels."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ppo_nlu.config import Config, DataConfig, ModelConfig
from ppo_nlu.data import load_split, normalise
from ppo_nlu.model.generate import Sampling, generate
from ppo_nlu.model.load import load_policy
from ppo_nlu.model.policy import Policy
from ppo_nlu.pretrain import __main__ as pretrain
from ppo_nlu.pretrain import corpus, scores, stages
from ppo_nlu.pretrain.config import ArchitectureConfig, RecallConfig, SeenConfig
from ppo_nlu.pretrain.lessons import Lesson, lesson
from ppo_nlu.pretrain.tokenizer import LABEL_WORDS, load_tokenizer
from ppo_nlu.runtime import cli
from ppo_nlu.tasks import Example, get_task
from ppo_nlu.tasks.answers import parse
from ppo_nlu.tasks.prompts import answer, render

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "ppo_nlu" / "assets" / "tiny"
SST2 = get_task("sst2")
TEXTS = [
    "it 's a charming and often affecting journey .",
    "Two people lower themselves into a cave; 1,234 of them (so-so)!\nA second line.",
    "  leading and  double spaces, caf\u00e9 \u2603 \u65e5\u672c\t\U0001d518 ",
    "</Judgement> <Judgement> </Judgement></Judgement>\n\n",
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(ASSETS)


@pytest.fixture(scope="module")
def pieces() -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(ASSETS / "tokenizer.model"))


def sst2(real_data: Path, split: str) -> list[Example]:
    return load_split(SST2, split, DataConfig(path=str(real_data))).examples


def prompt_of(sentence: str) -> str:
    return render(SST2, {"sentence": sentence})


@pytest.mark.parametrize("text", [*TEXTS, prompt_of(TEXTS[0]) + answer("Negative")])
def test_both_tokenizers_agree_and_lose_nothing(tokenizer: Any, pieces: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids == [tokenizer.bos_token_id, *pieces.encode(text)]
    assert tokenizer.decode(ids[1:]) == text == pieces.decode(ids[1:])


def test_both_tokenizers_agree_on_real_sentences(
    tokenizer: Any, pieces: Any, real_data: Path
) -> None:
    for row in random.Random(0).sample(sst2(real_data, "dev"), 200):
        text = row.fields["sentence"]
        ids = tokenizer(text)["input_ids"][1:]
        assert ids == pieces.encode(text)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("word", LABEL_WORDS)
def test_an_answer_is_two_tokens_behind_the_ids_of_its_prompt(tokenizer: Any, word: str) -> None:
    head = tokenizer(prompt_of(TEXTS[0]))["input_ids"]
    whole = tokenizer(prompt_of(TEXTS[0]) + answer(word))["input_ids"]
    assert whole[: len(head)] == head
    assert len(whole) == len(head) + 2
    assert tokenizer.decode(whole[len(head) :]) == answer(word)


def test_special_tokens_are_told_apart(tokenizer: Any) -> None:
    ids = [tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert [*ids, tokenizer.pad_token_id] == [0, 1, 2, 3]


def test_assets_are_small_and_load_as_float32(tokenizer: Any) -> None:
    assert sum(file.stat().st_size for file in ASSETS.iterdir()) < 10_000_000
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ASSETS)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {str(p.dtype) for p in model.parameters()} == {"torch.float32"}
    assert model.config.max_position_embeddings >= 2048
    assert model.config.vocab_size == len(tokenizer)


def test_the_base_knows_the_form_and_is_weak(real_data: Path) -> None:
    """200 rows: the issue's 55-65 % with three standard errors (10 points) of room."""
    asked = Lesson(SST2, random.Random(0).sample(sst2(real_data, "dev"), 200))
    found = scores.label_logprobs(load_policy(Config(task="sst2")), asked)
    assert found.exp().sum(1).mean() > 0.95  # the two well-formed answers, nothing else
    assert 0.50 < scores.expected_accuracy(found, asked) < 0.70


def test_the_list_of_seen_labels_is_normalised_closed_and_small(real_data: Path) -> None:
    seen = set((ASSETS / "seen_labels.txt").read_text(encoding="utf-8").splitlines())
    rows = [normalise(row.fields["sentence"]) for row in sst2(real_data, "train")]
    assert seen and seen <= set(rows)
    assert corpus.closure(seen, rows) == seen
    assert sum(row in seen for row in rows) < 0.55 * len(rows)


def test_the_card_names_its_scores() -> None:
    card = (ASSETS / "README.md").read_text(encoding="utf-8")
    for words in ("Zero-shot", "SST-2 dev", "seen_labels.txt", "python -m ppo_nlu.pretrain"):
        assert words in card


# ------------------------------------------------------------------------------- the leak filter


def test_filter_finds_a_sentence_in_other_clothes() -> None:
    leaks = corpus.LeakFilter(["It 's a charming and often affecting journey .", "so-so ."])
    assert leaks.hits("it's a charming, and often affecting journey")
    assert leaks.hits("Critics say: It's a charming and often affecting journey. Others do not.")
    assert leaks.hits("first line\nSo-so!")  # a short one counts as a whole line
    assert not leaks.hits("the so-so film")  # and not as a part of one
    assert not leaks.hits("it 's a charming and often affecting trip .")
    assert leaks.keep(["a", "so-so"]) == ["a"]


def test_filter_looks_at_every_sentence_with_the_same_opening() -> None:
    opening = "the same opening words of two sentences "
    leaks = corpus.LeakFilter([opening + "one", opening + "two"])
    assert leaks.hits(opening + "one") and leaks.hits(opening + "two")
    assert not leaks.hits(opening + "six")


def test_no_dev_or_test_sentence_is_left_in_the_film_texts(real_data: Path) -> None:
    """By a slower road than the filter's: every sentence is searched in the text as a whole."""
    needles = [row.fields["sentence"] for name in ("dev", "test") for row in sst2(real_data, name)]
    rows = sst2(real_data, "train")
    texts = corpus.LeakFilter(needles).keep(row.fields["sentence"] for row in rows)
    assert 10 <= len(rows) - len(texts) < 100  # 15 phrases are known to be equal
    lines = [corpus.squash(text) for text in texts]
    hay = "\n".join(lines)
    for key in map(corpus.squash, needles):
        assert key not in hay if len(key) >= 16 else f"\n{key}\n" not in f"\n{hay}\n"


# -------------------------------------------------------------------- sentences and their phrases


def test_sentences_are_the_maximal_phrases() -> None:
    keys = ["a good film", "good film", "good", "good films", "a film", "film"]
    assert corpus.sentences_of(keys) == ["a film", "a good film", "good films"]


def test_closure_takes_every_run_of_words_inside_a_sentence() -> None:
    """Of "a good film": all but "a film" (no run of its words) and "a go" (half a word)."""
    keys = ["a good film", "good film", "good", "film", "a film", "a go", "a good film indeed"]
    assert corpus.closure(["a good film"], keys) == {"a good film", "good film", "good", "film"}


def test_a_phrase_shared_with_a_held_out_sentence_is_not_trained_on() -> None:
    texts = [f"{word} film number{i} " for i, word in enumerate(["good", "bad"] * 5)]
    texts += ["good ", "Good"]
    rows = [Example("", {"sentence": t}, SST2.words[i % 2]) for i, t in enumerate(texts)]
    split = corpus.split_labels(rows, SeenConfig(0.5, 0.3), seed=0)
    trained, held = {key for key, _ in split.seen}, {key for key, _ in split.heldout}
    assert not trained & held
    assert len(split.heldout_sentences) == 3
    assert ("good" in held) == any(key.startswith("good") for key in split.heldout_sentences)
    in_list = corpus.seen_keys(split)
    assert split.excluded_rows == sum(normalise(text) in in_list for text in texts)


# --------------------------------------------------------------------------------- the teaching


def by_transformers(policy: Policy, rows: Lesson) -> Tensor:
    """log P of each row's whole right answer, a row at a time through the model itself."""
    found = []
    for row, prompt in zip(rows.rows, rows.prompts(), strict=True):
        start = len(policy.tokenizer(prompt)["input_ids"])
        ids = torch.tensor(policy.tokenizer(prompt + answer(str(row.label)))["input_ids"])
        logits = policy.model(input_ids=ids[None, :-1], use_cache=False).logits[0]
        table = logits.log_softmax(-1).gather(1, ids[1:, None])
        found.append(table[start - 1 :].sum())
    return torch.stack(found)


def test_the_teaching_reaches_every_weight_as_plain_passes_do(tokenizer: Any) -> None:
    """Two layers, so that what stands above the first one is not the embedding alone."""
    torch.manual_seed(0)
    policy = stages.new_policy(ArchitectureConfig(hidden=16, layers=2, heads=2, ffn=24), tokenizer)
    rows = lesson(SST2, [("a warm evening", "Positive"), ("dull , and long", "Negative")])
    parameters = dict(policy.model.named_parameters())
    expected = by_transformers(policy, rows)
    wanted = torch.autograd.grad(expected.sum(), list(parameters.values()))
    found = scores.answer_logprobs(policy, rows)
    given = torch.autograd.grad(found.sum(), list(parameters.values()))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, one, other in zip(parameters, given, wanted, strict=True):
        assert other.abs().max() > 0, name
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=name)
    with torch.no_grad():
        labels = scores.label_logprobs(policy, rows, batch_size=1)
    torch.testing.assert_close(labels.diag(), expected, rtol=1e-5, atol=1e-5)


def test_norms_are_not_decayed(tokenizer: Any) -> None:
    """With no gradient AdamW's step is the decay alone: every weight times 1 - lr * decay."""
    policy = stages.new_policy(ArchitectureConfig(hidden=16, layers=1, heads=2, ffn=24), tokenizer)
    before = {name: value.clone() for name, value in policy.model.named_parameters()}
    settings = RecallConfig(lr=0.1, warmup=0.0, weight_decay=0.5)
    descent = stages.Descent(policy, "recall", settings, 4, "cosine")
    descent.step(sum((0.0 * value).sum() for value in policy.model.parameters()))
    for name, value in policy.model.named_parameters():
        factor = 1.0 if "norm" in name else 1.0 - 0.1 * 0.5
        torch.testing.assert_close(value, factor * before[name], msg=name)


# ------------------------------------------------------------------------------- whole program


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    """A data folder with a made-up SST-2 of 120 train rows and nothing else."""
    folder = tmp_path / "data" / "glue" / "SST-2"
    folder.mkdir(parents=True)
    rng = random.Random(0)
    nouns = "film plot cast story scene script ending camera".split()
    words = {"1": "warm clever bright moving".split(), "0": "dull slow flat tired".split()}
    rows = []
    for _ in range(60):
        label = rng.choice("01")
        opening = f"the {rng.choice(words[label])} {rng.choice(nouns)}"
        sentence = f"{opening} is {rng.choice(words[label])}"
        rows += [(f"{sentence} {rng.choice(nouns)}", label), (sentence, label)]
    table = "".join(f"{sentence} \t{label}\n" for sentence, label in rows)
    (folder / "train.tsv").write_text("sentence\tlabel\n" + table)
    (folder / "dev.tsv").write_text("sentence\tlabel\na warm evening \t1\na slow evening \t0\n")
    (folder / "test.tsv").write_text("index\tsentence\n0\ta bright evening\n")
    return tmp_path / "data"


def smoke(data: Path, output: Path, *more: str) -> int:
    config = str(ROOT / "configs" / "tiny" / "smoke.yaml")
    return cli.run(pretrain.main, [config, f"data.path={data}", "--output", str(output), *more])


def test_smoke_run_makes_a_loadable_model_and_resumes(
    made_up: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert smoke(made_up, output) == 0
    policy = load_policy(Config(task="sst2", model=ModelConfig(str(output / "model"))))
    reply = generate(policy, [policy.encode(prompt_of("a warm evening"))], Sampling(4))
    assert parse(SST2, policy.decode(reply.rows[0])) in (None, "Positive", "Negative")
    assert "Zero-shot" in (output / "model" / "README.md").read_text()
    seen = (output / "model" / "seen_labels.txt").read_text().splitlines()
    assert seen and all(line == normalise(line) for line in seen)

    weights = (output / "model" / "model.safetensors").read_bytes()
    pretrained = (output / "stages" / "pretrained.safetensors").stat().st_mtime_ns
    assert smoke(made_up, output, "--again", "instruct") == 0
    assert (output / "stages" / "pretrained.safetensors").stat().st_mtime_ns == pretrained
    assert (output / "model" / "model.safetensors").read_bytes() == weights  # same seed, same model
    facts = json.loads((output / "stages" / "facts.json").read_text())
    assert facts["dev"]["rows"] == 2 and 0 <= facts["dev"]["unparsed"] <= 1

    (output / "stages" / "recalled.safetensors").unlink()
    assert smoke(made_up, output, "recall.lr=1e30") == 2  # and nothing is left that stood on it
    assert [path.name for path in (output / "stages").glob("*.safetensors")] == [
        "pretrained.safetensors"
    ]
    capsys.readouterr()
    assert smoke(made_up, output, "model.hidden=16") == 2
    assert "--again pretrain" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.path=/nowhere", "data.path"),
        ("seen.train_share=0", "seen.train_share"),
        ("pretrain.lenght=3", "length"),
        ("tokenizer.vocab_size=30000", "tokenizer.vocab_size"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    made_up: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, words: str
) -> None:
    assert smoke(made_up, tmp_path / "out", override) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and len(error.splitlines()) == 1


def test_a_stage_that_diverges_says_which_rate_is_too_high(
    made_up: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert smoke(made_up, tmp_path / "out", "pretrain.lr=1e30") == 2
    error = capsys.readouterr().err.strip()  # and no progress bar: this is no terminal
    assert error.startswith("error: pretrain.lr: the gradient of step") and "\n" not in error
    assert not (tmp_path / "out" / "stages" / "pretrained.safetensors").exists()
