"""Prompts that fit into the context."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny

from ppo_nlu.config import Config, DataConfig
from ppo_nlu.errors import UserError
from ppo_nlu.methods.prompts import fit_prompt, longest_prompt
from ppo_nlu.model.policy import Policy
from ppo_nlu.tasks import Example
from ppo_nlu.tasks.prompts import render

TWO_FIELDS = replace(tiny.SST2, name="pair", query="{short} # {long}", fields=("short", "long"))


def length(policy: Policy, sentence: str) -> int:
    return len(policy.encode(render(tiny.SST2, {"sentence": sentence})))


def test_a_prompt_that_fits_stays_as_it_is() -> None:
    policy = tiny.policy(shaken=False)
    text = "the film was long and slow"
    fit = fit_prompt(
        policy, tiny.SST2, Example("1", {"sentence": text}, None), length(policy, text)
    )
    assert fit.text == render(tiny.SST2, {"sentence": text}) and not fit.cut
    assert fit.ids == policy.encode(fit.text)


@pytest.mark.parametrize("model", ["tiny", "stories260K"])
def test_a_long_prompt_loses_the_end_of_its_sentence_only(model: str) -> None:
    policy = tiny.policy(shaken=False) if model == "tiny" else tiny.pretrained(model)
    sentence = " ".join(["it was a good film and the best of the long"] * 6)
    form = render(tiny.SST2, {"sentence": "@"}).split("@")
    empty, whole = length(policy, ""), length(policy, sentence)
    kept = set()
    for longest in (*range(empty + 1, whole, 7), whole - 1):
        example = Example("1", {"sentence": sentence}, "Positive")
        fit = fit_prompt(policy, tiny.SST2, example, longest)
        text, ids = fit.text, fit.ids
        assert fit.cut and len(ids) <= longest and ids == policy.encode(text)
        assert text.startswith(form[0]) and text.endswith(form[1])
        body = text.removeprefix(form[0]).removesuffix(form[1])
        assert sentence.startswith(body)
        assert longest - len(ids) <= 12, "no more is cut than needed"
        kept.add(body)
        assert example.fields == {"sentence": sentence}, "the row itself is untouched"
    assert len(kept) > 4


def test_the_longest_field_is_cut() -> None:
    policy = tiny.policy(shaken=False)
    fields = {"short": "good film", "long": "the film was long and slow " * 5}
    whole = len(policy.encode(render(TWO_FIELDS, fields)))
    fit = fit_prompt(policy, TWO_FIELDS, Example("1", fields, None), whole - 12)
    assert fit.cut and len(fit.ids) <= whole - 12
    assert "\ngood film # the film was long and slow the film" in fit.text
    text = fit_prompt(policy, TWO_FIELDS, Example("1", fields, None), whole - 29).text
    first, second = text.split("Prompt:\n")[1].split("\nAssistant")[0].split(" # ")
    assert 0 < len(first) < 10 and 0 < len(second) < 10, "then both in turn"


def test_a_form_that_does_not_fit_is_the_users_mistake() -> None:
    policy = tiny.policy(shaken=False)
    empty = length(policy, "")
    example = Example("1", {"sentence": "good film " * 40}, None)
    assert len(fit_prompt(policy, tiny.SST2, example, empty).ids) == empty
    with pytest.raises(UserError, match=f"data.max_prompt_tokens.*needs {empty} .*{empty - 1} are"):
        fit_prompt(policy, tiny.SST2, example, empty - 1)


def test_longest_prompt_leaves_room_for_the_answer() -> None:
    policy = tiny.policy(shaken=False)
    assert longest_prompt(policy, Config("sst2"), 16) == 240
    assert longest_prompt(policy, Config("sst2", data=DataConfig(max_prompt_tokens=100)), 16) == 100
    assert longest_prompt(policy, Config("sst2", data=DataConfig(max_prompt_tokens=999)), 16) == 240
    with pytest.raises(UserError, match=r"rollout.max_new_tokens: 256 leaves no room"):
        longest_prompt(policy, Config("sst2"), 256)
