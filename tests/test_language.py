"""Prompts, the parser and rewards: what the model reads, writes and earns."""

from __future__ import annotations

import pytest

from ppo_nlu.answers import parse
from ppo_nlu.prompts import STOP, answer, render
from ppo_nlu.rewards import SCALES, score
from ppo_nlu.tasks import TASKS, Label, TaskSpec, get_task

SST2 = get_task("sst2")

GOLDEN = """\
System_prompt:
You read a sentence from a film review. The task is to decide if its overall opinion is favourable or unfavourable.
The result you give should have the following form:
<Judgement> {Insert only Positive or Negative here} </Judgement>
Prompt:
Now judge the opinion of the sentence "it 's a {charming} "journey" .".
Assistant:
<Judgement>"""  # noqa: E501


def _spec(*words: str) -> TaskSpec:
    labels = tuple(Label(word, str(value)) for value, word in enumerate(words))
    return TaskSpec("t", "T", "b", "T", "d", "{x}", ("x",), labels, "label")


def test_the_prompt_is_this_text_to_the_letter() -> None:
    # The official sentences end in a space, which does not reach the prompt; braces and quote
    # marks in a sentence stay what they are.
    assert render(SST2, {"sentence": 'it \'s a {charming} "journey" . '}) == GOLDEN


def test_a_prompt_uses_the_task_fields_and_ignores_others() -> None:
    assert render(SST2, {"sentence": "x", "id": "3"}) == render(SST2, {"sentence": "x"})
    assert "Insert only Yes or No or Maybe here" in render(_spec("Yes", "No", "Maybe"), {"x": ""})


@pytest.mark.parametrize("name", TASKS)
def test_every_label_word_is_read_back(name: str) -> None:
    spec = TASKS[name]
    for label in spec.labels:
        assert answer(label.word) == f" {label.word} </Judgement>"
        assert parse(spec, answer(label.word)) == label.word
        lowered = answer(label.word.lower())
        assert parse(spec, lowered) == label.word
        assert spec.word_of(label.value) == label.word
    assert spec.word_of("no such value") is None


def test_the_form_inside_the_prompt_is_no_answer() -> None:
    # Parsing reads generated text only; the form itself would read as two labels, so as none.
    assert parse(SST2, render(SST2, {"sentence": "x"})) is None


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (" Positive </Judgement>", "Positive"),
        ("Positive</Judgement>", "Positive"),
        (" POSITIVE </Judgement>", "Positive"),
        (" negative. </Judgement>", "Negative"),
        (' "Negative"! </Judgement>', "Negative"),
        ("\n\tNegative\n</Judgement>", "Negative"),
        (" It is positive, very positive </Judgement>", "Positive"),
        (" Positive </Judgement> Negative </Judgement>", "Positive"),  # text behind the tag
        (" Positive </Judgement></s>", "Positive"),
        (" Positive", None),  # no tag
        (" Positive </judgement>", None),  # not the tag
        (" Positive </Judgement", None),
        (" </Judgement> Positive", None),
        (" </Judgement>", None),
        ("", None),
        (" Positive and Negative </Judgement>", None),
        (" Positive positive negative </Judgement>", None),
        (" Positively </Judgement>", None),  # inside other words
        (" nonnegative </Judgement>", None),
        (" Positive_Negative </Judgement>", None),
        (" Positive1 </Judgement>", None),
        (" Posi tive </Judgement>", None),
        (" 1 </Judgement>", None),  # the data value is no answer
    ],
)
def test_sst2_answers(response: str, expected: str | None) -> None:
    assert parse(SST2, response) == expected


@pytest.mark.parametrize(
    ("words", "response", "expected"),
    [
        (("Yes", "No"), " None </Judgement>", None),
        (("Yes", "No"), " Nothing </Judgement>", None),
        (("Yes", "No"), " Not </Judgement>", None),
        (("Yes", "No"), " Yes and No </Judgement>", None),
        (("Yes", "No"), " no, none of it </Judgement>", "No"),
        (("entailment", "not_entailment"), " not_entailment </Judgement>", "not_entailment"),
        (("entailment", "not_entailment"), " entailment </Judgement>", "entailment"),
        (("True", "Not True"), " not true </Judgement>", "Not True"),  # longer words first
        (("True", "Not True"), " Not True, true </Judgement>", None),
        (("A+", "A"), " A+ </Judgement>", "A+"),  # no letter of a word is a pattern
        (("A.", "B"), " Ax </Judgement>", None),
        # Letters that count as k, s and i in another case: once an error, not an answer.
        (("Ok", "Bad"), " O\u212a </Judgement>", "Ok"),
        (("Positive", "Negative"), " Po\u017fitive </Judgement>", "Positive"),
    ],
)
def test_answers_with_other_words(
    words: tuple[str, ...], response: str, expected: str | None
) -> None:
    assert parse(_spec(*words), response) == expected


@pytest.mark.parametrize(
    ("prediction", "paper", "code"),
    [("Positive", 1.0, 1.0), ("Negative", 0.0, -1.0), (None, -1.0, -3.0)],
)
def test_rewards(prediction: str | None, paper: float, code: float) -> None:
    assert score(prediction, "Positive") == paper
    assert score(prediction, "Positive", "paper") == paper
    assert score(prediction, "Positive", "code") == code


def test_one_scale_is_an_affine_map_of_the_other() -> None:
    assert SCALES["code"] == tuple(2 * reward - 1 for reward in SCALES["paper"])


def test_the_stop_closes_every_answer_once() -> None:
    assert STOP == "</Judgement>" and answer("x").count(STOP) == 1 and answer("x").endswith(STOP)
