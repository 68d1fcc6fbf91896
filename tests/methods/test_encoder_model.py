"""How an encoder reads rows, and the answers that it gives."""

from __future__ import annotations

import pytest
import torch

from ppo_nlu.config import EvalConfig
from ppo_nlu.methods import encoder_load, encoder_model
from ppo_nlu.methods.encoder_model import Encoder
from ppo_nlu.tasks import Example, get_task
from tests.methods.encoders import MNLI, MRPC, STSB, config, pairs

# ---- rows -----------------------------------------------------------------------------------


def test_control_tokens_in_a_row_are_text() -> None:
    """`</s>` frames a row; in the text of a row it is four ordinary characters."""
    made = encoder_load.load(config(), get_task("sst2"))
    frame = made.tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    row = Example("1", {"sentence": "so </s> bad <s>"}, "Positive", "sst2")
    ids = made.read([row], 64)["input_ids"][0].tolist()
    assert [ids.count(token) for token in frame] == [1, 1]


def test_a_pair_is_framed_as_bert_reads_it() -> None:
    made = encoder_load.load(config("mrpc"), MRPC)
    rows = pairs(MRPC, ["Yes", "No", "Yes"])
    batch = made.read(rows, 128)
    for i, row in enumerate(rows):
        first, second = (
            made.tokenizer(row.fields[f], add_special_tokens=False)["input_ids"]
            for f in MRPC.fields
        )
        ids = [1, *first, 2, *second, 2]  # <s> and </s>
        pad = batch["input_ids"].shape[1] - len(ids)
        kinds = [0] * (len(first) + 2) + [1] * (len(second) + 1)
        assert batch["input_ids"][i].tolist() == ids + [3] * pad
        assert batch["token_type_ids"][i].tolist() == kinds + [0] * pad
        assert batch["attention_mask"][i].tolist() == [1] * len(ids) + [0] * pad


def test_a_single_field_and_more_than_two() -> None:
    sst2, copa = get_task("sst2"), get_task("copa")
    assert encoder_model.as_pair(sst2, {"sentence": " a film "}) == ("a film", "")
    fields = {"premise": "It rained.", "choice1": "A.", "choice2": "B.", "question": "effect"}
    assert encoder_model.as_pair(copa, fields) == ("It rained.", "A. B. effect")
    made = encoder_load.load(config(), sst2)
    batch = made.read([Example("0", {"sentence": "a film"}, None)], 128)
    assert batch["input_ids"][0, 0] == 1 and batch["input_ids"][0].tolist().count(2) == 1
    assert not batch["token_type_ids"].any()


def test_the_longer_part_is_cut() -> None:
    made = encoder_load.load(config("mrpc"), MRPC)
    row = Example("0", {"sentence1": "a film", "sentence2": "a b c d e f g h i j"}, None)
    short = made.tokenizer("a film", add_special_tokens=False)["input_ids"]
    ids = made.read([row], 10)["input_ids"][0].tolist()
    assert len(ids) == 10 and ids[1 : 1 + len(short)] == short and ids[-1] == 2


# ---- answers --------------------------------------------------------------------------------


def sharpened() -> Encoder:
    """Probabilities that differ from row to row."""
    made = encoder_load.load(config("mnli"), MNLI)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        head = made.model.classifier.weight
        head.copy_(torch.randn(head.shape, generator=draw) * 0.3)
    return made


def test_answers_are_the_most_probable_words_in_the_order_of_the_rows() -> None:
    made, rows = sharpened(), pairs(MNLI, ["Neutral"] * 9)
    with torch.no_grad():
        table = torch.cat([made(made.read([row], 128)) for row in rows]).softmax(-1)
    few = config("mnli", eval=EvalConfig(batch_size=2))
    for cfg in (config("mnli"), few):
        for decode in ("greedy", "score"):
            found = list(encoder_model.answer_all(made, MNLI, cfg, rows, decode))
            for (word, probabilities), wanted in zip(found, table, strict=True):
                assert probabilities is not None
                assert list(probabilities) == ["Entailment", "Neutral", "Contradiction"]
                assert list(probabilities.values()) == pytest.approx(wanted.tolist(), abs=1e-5)
                assert word == max(probabilities, key=lambda w: probabilities[w])
    draws = [list(encoder_model.answer_all(made, MNLI, cfg, rows, "sample")) for cfg in (few, few)]
    assert draws[0] == draws[1]
    alone = [w for w, _ in encoder_model.answer_all(made, MNLI, config("mnli"), rows, "sample")]
    assert alone == [w for w, _ in draws[0]], "the batch size changes no draw"
    alike = [w for w, _ in encoder_model.answer_all(made, MNLI, few, rows[:1] * 40, "sample")]
    assert alike[:20] != alike[20:] and len(set(alike[::2])) > 1, "each row has its own draw"
    calls = iter([False, False, True])
    assert (
        list(encoder_model.answer_all(made, MNLI, few, rows, "greedy", lambda: next(calls))) == []
    )


def test_samples_follow_the_probabilities() -> None:
    output = torch.tensor([0.2, 0.5, 0.3]).log()
    found = [encoder_model._given(MNLI, output, "sample", ("test", i))[0] for i in range(3000)]
    for word, share in zip(MNLI.words, (0.2, 0.5, 0.3), strict=True):
        assert abs(found.count(word) / 3000 - share) < 0.04  # 4 standard deviations
    assert encoder_model._given(MNLI, output, "greedy", ())[0] == "Neutral"


@pytest.mark.parametrize(
    ("output", "text"), [(2.53349, "2.533"), (-0.2, "0.000"), (7.0, "5.000"), (float("inf"), None)]
)
def test_a_rating_stays_in_its_range(output: float, text: str | None) -> None:
    assert encoder_model._given(STSB, torch.tensor([output]), "sample", ("test",)) == (text, None)
