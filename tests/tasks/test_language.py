"""Prompts, the parser and rewards: what the model reads, writes and earns."""

from __future__ import annotations

import sys

import pytest

from ppo_nlu.errors import UserError
from ppo_nlu.tasks import TASKS, Example, Label, Rating, TaskSpec, get_task
from ppo_nlu.tasks.answers import parse
from ppo_nlu.tasks.prompts import OPENING, STOP, answer, gold_answer, render, turns
from ppo_nlu.tasks.rewards import SCALES, RunningScale, load, reward, score

SST2, STSB, COPA = get_task("sst2"), get_task("stsb"), get_task("copa")
FREE = TaskSpec("f", "F", "b", "F", "d", "{x}", ("x",), reward="f1")

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
    return TaskSpec("t", "T", "b", "T", "d", "{x}", ("x",), labels)


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


# ---- several examples, a reason first, chat ------------------------------------------------------

FEW_SHOT = """\
System_prompt:
You rate how close two sentences are in meaning, from 0 (unrelated) to 5 (same meaning).
The result you give should have the following form:
<Judgement> {Insert only a decimal number between 0 and 5 here} </Judgement>
Here are 2 examples.
[Prompt:
Now rate "A plane lands." against "A plane takes off.".
Assistant:
<Judgement> 2.5 </Judgement>]
[Prompt:
Now rate "x" against "x".
Assistant:
<Judgement> 5.0 </Judgement>]
Prompt:
Now rate "a" against "b".
Assistant:
<Judgement>"""
SHOTS = (
    Example("1", {"sentence1": "A plane lands.", "sentence2": "A plane takes off."}, "2.533"),
    Example("2", {"sentence1": "x", "sentence2": "x "}, "5.000"),
)


def test_the_few_shot_prompt_is_this_text_to_the_letter() -> None:
    assert render(STSB, {"sentence1": "a", "sentence2": "b"}, SHOTS) == FEW_SHOT


def test_the_analysis_form_asks_for_the_reason_first() -> None:
    text = render(SST2, {"sentence": "x"}, form="analysis")
    assert "<Analysis> {Insert your reasoning here} </Analysis>\n<Judgement> {Insert only" in text
    assert text.endswith("Assistant:\n<Analysis>")
    reasoned = Example("1", {"sentence": "x"}, "Positive", extra={"rationale": "It is warm."})
    written = gold_answer(SST2, reasoned, "analysis")
    assert written == " It is warm. </Analysis>\n<Judgement> Positive </Judgement>"
    assert parse(SST2, written, "analysis") == "Positive"
    bare = answer("Positive", "analysis")
    assert bare == " </Analysis>\n<Judgement> Positive </Judgement>"
    assert parse(SST2, bare, "analysis") == "Positive"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (" Not Negative at all. </Analysis> <Judgement> Positive </Judgement>", "Positive"),
        (" Positive </Judgement>", None),  # no judgement was opened
        (" so </Analysis><Judgement> Positive", None),
        (" <Judgement> Negative <Judgement> Positive </Judgement>", "Positive"),  # the last
    ],
)
def test_the_reason_is_not_the_answer(response: str, expected: str | None) -> None:
    assert parse(SST2, response, "analysis") == expected


def test_chat_turns_hold_the_same_text() -> None:
    fields = {"sentence1": "a", "sentence2": "b"}
    found = turns(STSB, fields, SHOTS)
    assert [turn["role"] for turn in found] == ["system", *["user", "assistant"] * 2, "user"]
    plain = render(STSB, fields, SHOTS)
    for turn in found:
        assert turn["content"] in plain
    assert found[2]["content"] == "<Judgement> 2.5 </Judgement>"
    assert OPENING == {"judgement": "<Judgement>", "analysis": "<Analysis>"}


def test_what_a_row_asks_for_stands_in_the_description_too() -> None:
    fields = {"premise": "p", "choice1": "{x}", "choice2": "b", "question": "effect"}
    text = render(COPA, fields)
    assert "pick the more likely effect." in text and "Now choose the effect." in text
    assert 'First: "{x}"' in text


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (" 3.8 </Judgement>", "3.8"),
        (" 5 </Judgement>", "5"),
        (" .5 </Judgement>", ".5"),
        (" +2.0, I think 3 </Judgement>", "+2.0"),  # the first counts
        (" about 3.5/5 </Judgement>", "3.5"),
        (" 3. </Judgement>", "3"),
        (" -0.0 </Judgement>", "-0.0"),
        (" 1e9 </Judgement>", None),
        (" 1000000000 </Judgement>", None),
        (" 5.1 </Judgement>", None),
        (" -1 </Judgement>", None),
        (" v2 </Judgement>", None),
        (" 1.2.3 </Judgement>", None),
        (" three </Judgement>", None),
        (" nan </Judgement>", None),
        (" 3.8", None),
    ],
)
def test_numbers(response: str, expected: str | None) -> None:
    assert parse(STSB, response) == expected


def test_the_grid_of_a_rating() -> None:
    assert STSB.words[:3] == ("0.0", "0.2", "0.4") and STSB.words[-1] == "5.0"
    assert len(STSB.words) == 26
    assert Rating(-1, 1, 0.5).grid == ("-1.0", "-0.5", "0.0", "0.5", "1.0")
    assert all(parse(STSB, answer(word)) == word for word in STSB.words)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("2.5", 2.5), ("5.0", 0.0), ("0", 0.0), (None, -2.5)],
)
def test_the_reward_of_a_rating_is_the_paper_s(prediction: str | None, expected: float) -> None:
    # 2.5 - |y' - y|, and -2.5 without a number; the scale of label rewards has no part in it.
    row = Example("1", {}, "2.500")
    for scale in SCALES:
        assert reward(STSB, row, prediction, "", scale) == expected


# ---- free text and the user's own reward ---------------------------------------------------------


def test_free_text_is_what_stands_before_the_tag() -> None:
    assert parse(FREE, "  the Eiffel Tower \n</Judgement>") == "the Eiffel Tower"
    assert parse(FREE, " </Judgement>") is None and parse(FREE, "Paris") is None
    assert "Insert only a short answer here" in render(FREE, {"x": ""})


def test_free_text_earns_token_f1_or_all_or_nothing() -> None:
    row = Example("1", {"x": ""}, "the Eiffel Tower")
    assert reward(FREE, row, "Eiffel tower!", "") == 1.0  # articles, case, punctuation
    # "big Eiffel": 1 of 2 words right, 1 of 2 found: F1 = 1/2
    assert reward(FREE, row, "big Eiffel", "") == pytest.approx(0.5)
    assert reward(FREE, row, "big Eiffel", "", "code") == pytest.approx(0.0)
    assert reward(FREE, row, None, "") == -1.0
    exact = TaskSpec("f", "F", "b", "F", "d", "{x}", ("x",), reward="exact")
    assert reward(exact, row, "Eiffel tower", "") == 1.0
    assert reward(exact, row, "big Eiffel", "") == 0.0
    assert reward(exact, row, "tower Eiffel", "") == 0.0  # the same words in another order


def test_a_reward_of_the_user_s_own(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def length(text, row):\n    return len(text) + 10 * (row['label'] == row['x'])\n"
        "def bad(text, row):\n    return 'high'\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    row = Example("1", {"x": "g"}, "g")

    def own(path: str) -> TaskSpec:
        return TaskSpec("f", "F", "b", "F", "d", "{x}", ("x",), reward=path)

    # The text before the tag, stripped; the row's fields and label.
    assert reward(own("my_rewards:length"), row, "abc", " abc </Judgement> x") == 13.0
    assert reward(own("my_rewards.length"), row, None, " ab") == 12.0
    with pytest.raises(UserError, match=r"custom.reward: my_rewards:bad returned 'high'"):
        reward(own("my_rewards:bad"), row, None, "")
    for path, words in (
        ("my_rewards:none", "cannot import"),
        ("no_such_module:f", "cannot import"),
        ("nonsense", "cannot import"),
        ("my_rewards:number", "is not a function"),
    ):
        with pytest.raises(UserError, match=f"custom.reward: .*{words}"):
            load(path)


ODD_REWARDS = """
import sys, torch, numpy
def raises(text, row): raise KeyError("no\\ncolumn")
def leaves(text, row): sys.exit(0)
def deep(text, row): return deep(text, row)
def none(text, row): return None
def nan(text, row): return float("nan")
def inf(text, row): return -float("inf")
def huge(text, row): return 10 ** 5000
def tensor(text, row): return torch.ones(())
def long(text, row): return "x" * 9000
class Odd:
    def __repr__(self): raise ValueError
def odd(text, row): return Odd()
def one(text): return 1.0
def three(text, row, more): return 1.0
async def later(text, row): return 1.0
class Mute(Exception):
    def __str__(self): raise RuntimeError
class Base(BaseException): pass
class Slippery(float):
    def __float__(self): raise RuntimeError("no")
    def __abs__(self): raise RuntimeError("no")
def mute(text, row): raise Mute
def base(text, row): raise Base("gone")
def slippery(text, row): return Slippery(1.0)
def right(text, row): return True
def single(text, row): return numpy.float32(0.5)
def more(text, row, more=0, **rest): return 1
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", "failed on row 'r7' .KeyError: .*odd_rewards.py:3"),
        ("leaves", "failed on row 'r7' .SystemExit"),
        ("deep", "failed on row 'r7' .RecursionError"),
        ("mute", "failed on row 'r7' .Mute, at"),
        ("base", "failed on row 'r7' .Base: gone"),
        ("slippery", "failed on row 'r7' .RuntimeError: no"),
        *(
            (name, "returned .* for row 'r7'; it must return a finite number")
            for name in ("none", "nan", "inf", "huge", "tensor", "long", "odd")
        ),
        *((name, "does not take .text, row.") for name in ("one", "three", "later")),
    ],
)
def test_a_reward_that_goes_wrong_names_the_row(tmp_path, monkeypatch, name, words) -> None:
    (tmp_path / "odd_rewards.py").write_text(ODD_REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd_rewards", raising=False)
    load.cache_clear()
    row = Example("r7", {"x": "g"}, "g")

    def own(function: str) -> float:
        path = f"odd_rewards:{function}"
        spec = TaskSpec("f", "F", "b", "F", "d", "{x}", ("x",), reward=path)
        return reward(spec, row, None, "a")

    assert (own("right"), own("single"), own("more")) == (1.0, 0.5, 1.0)
    with pytest.raises(UserError, match=f"custom.reward: .*odd_rewards:{name}'? {words}") as caught:
        own(name)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["import sys; sys.exit(3)", "1/0", "def f(:", "raise SystemExit"])
def test_a_module_of_rewards_that_fails_on_import(tmp_path, monkeypatch, text: str) -> None:
    (tmp_path / "broken_rewards.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    load.cache_clear()
    with pytest.raises(UserError, match=r"custom.reward: cannot import 'broken_rewards:f'"):
        load("broken_rewards:f")


def test_running_scale_is_mean_and_deviation_so_far() -> None:
    scale, values = RunningScale(), [1.0, 0.0, -1.0, 1.0, 1.0]
    for value in values:
        scale.update("a", value)
    scale.update("b", 2.5)
    mean = sum(values) / 5
    deviation = (sum((value - mean) ** 2 for value in values) / 5) ** 0.5
    assert scale.apply("a", 1.0) == pytest.approx((1.0 - mean) / deviation)
    assert scale.apply("b", 2.5) == 0.0  # one value has no deviation
