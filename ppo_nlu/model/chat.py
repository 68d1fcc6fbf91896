"""A model's own chat format: which messages its template keeps whole, and where its answer begins.

Templates differ in what they silently drop: system turns, all turns but the last, content that is
no list of parts. So at the first use a made-up row is rendered in one form of messages after
another, and the first form that keeps all of it is taken. Every row is checked too.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ppo_nlu.errors import UserError, first_line
from ppo_nlu.model.tokens import TextError
from ppo_nlu.tasks.prompts import Message, written_out

# What a template might change in the text of a row: case, marks, quotes, braces, line ends.
PROBE = 'It\'s "ÉTÉ 1" & <b>ไม่ดี</b> {x} {{y}} \\n 50 %\nand more.'
REPLY = "<Analysis> So. </Analysis>\n<Judgement> A Word </Judgement>"
ANSWER = "Answer"
# Switches of a thinking mode, where a template knows one: the answer must begin outside of it.
THINKING = ("enable_thinking", "thinking")
# Some templates write the date. A prompt must be the same on the day that a run is resumed, so
# they always get this day, the default of Llama 3.1's template.
DAY = datetime.datetime(2024, 7, 26)
CLOCK = (
    "{%- macro strftime_now(format) -%}{%- set it = namespace(text=format) -%}"
    "{%- for code, word in day.items() -%}{%- set it.text = it.text.replace(code, word) -%}"
    "{%- endfor -%}{{ it.text }}{%- endmacro -%}{{ '' }}"
)
_THOUGHT = re.compile(r"(<([\w:]*(?:think|thought|reason)\w*)>|\[(THINK)\])\s*$")


@dataclass(frozen=True)
class Form:
    """How messages are given to a template: `turns` as they are, `joined` with the system text in
    the first user turn, or all as `one` user turn. `parts`: each content is a list of one part."""

    turns: str
    parts: bool


FORMS = [Form(turns, parts) for parts in (False, True) for turns in ("turns", "joined", "one")]


class Chat:
    """A tokenizer's chat template, with the form of messages that it keeps whole."""

    def __init__(self, tokenizer: Any, name: str):
        self.tokenizer, self.name = tokenizer, name
        self.template = tokenizer.chat_template
        self._chosen: dict[bool, tuple[Form, str]] = {}

    def render(self, messages: Sequence[Message], shots: bool) -> str:
        """The messages in the chat format, up to where the answer begins. `shots`: the task
        has shots, even if this row shows none. All rows get the same form."""
        if shots not in self._chosen:
            self._chosen[shots] = self._choose(messages[0], shots)
        form, header = self._chosen[shots]
        try:
            text = self._rendered(_arranged(messages, form)) + header
        except Exception as error:  # a template may raise anything
            raise TextError(self._said(f"fails on its text ({_reason(error)})")) from error
        if lost := _lost(text, messages):
            raise TextError(self._said(f"loses {lost}"))
        return _without_thought(text)

    def _choose(self, system: Message, shots: bool) -> tuple[Form, str]:
        """The first form that keeps a made-up row whole, and the header of the answer."""
        query, reply = {"role": "user", "content": PROBE}, {"role": "assistant", "content": REPLY}
        worked = [query, reply, {"role": "user", "content": f"2. {PROBE}"}, reply]
        messages = [system, *(worked if shots else []), {"role": "user", "content": f"3. {PROBE}"}]
        wrong = []
        for form in FORMS:
            try:
                text = self._rendered(_arranged(messages, form))
                lost = _lost(text, messages)
                if not lost:
                    return form, self._header(messages, form, text)
                wrong.append(f"it loses {lost}")
            except Exception as error:  # a template may raise anything; reported below
                wrong.append(_reason(error))
        raise UserError(self._said(f"cannot be used: {', or '.join(dict.fromkeys(wrong[:2]))}"))

    def _header(self, messages: Sequence[Message], form: Form, text: str) -> str:
        """What the template writes before an answer that it is given, where it does not write this
        when it is asked for a new answer; else an empty text."""
        from jinja2 import TemplateError

        arranged = _arranged(messages, form)
        content: Any = [{"type": "text", "text": ANSWER}] if form.parts else ANSWER
        try:
            if self._rendered(arranged, ask=False) != text:
                return ""
            answered = self._rendered([*arranged, {"role": "assistant", "content": content}])
        except (TemplateError, TypeError):  # it takes no answer, so no header can be missing
            return ""
        before, found, _ = answered.rpartition(ANSWER)
        header = before.removeprefix(text)
        return header if found and before.startswith(text) and header.strip() else ""

    def _rendered(self, messages: Sequence[Message], ask: bool = True) -> str:
        source = self._source()
        return self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=ask,
            chat_template=CLOCK + source if "strftime_now" in source else source,
            day={f"%{code}": DAY.strftime(f"%{code}") for code in "aAbBdejmyYHIMSp"},
            **{switch: False for switch in THINKING if switch in source},
        )

    def _source(self) -> str:
        """The template; of several, the default one."""
        if not isinstance(self.template, dict):
            return self.template
        if len(self.template) == 1:
            return next(iter(self.template.values()))
        if "default" not in self.template:
            named = ", ".join(sorted(self.template))
            raise ValueError(f"there are several, {named}, and none is called default")
        return self.template["default"]

    def _said(self, what: str) -> str:
        return (
            f"prompt.chat_template: the chat template of {self.name!r} {what}; "
            "set it to false, or mend the template"
        )


def _arranged(messages: Sequence[Message], form: Form) -> list[dict[str, Any]]:
    """The messages in a form; the first is the system's, the last is the user's."""
    first, second, *rest = messages
    found: list[Message] = list(messages)
    if form.turns == "joined":
        joined = {"role": "user", "content": f"{first['content']}\n\n{second['content']}"}
        found = [joined, *rest]
    elif form.turns == "one":
        found = [{"role": "user", "content": written_out(messages)}]
    if not form.parts:
        return [dict(message) for message in found]
    return [m | {"content": [{"type": "text", "text": m["content"]}]} for m in found]


def _lost(text: str, messages: Sequence[Message]) -> str | None:
    """What of the messages the text does not hold, or None. The turns must be in their order, and
    the system's text before the last. White space does not count: many templates trim it."""
    flat, place, found = _flat(text), 0, 0
    told = flat.find(_flat(messages[0]["content"]))
    if told < 0:
        return "the description of the task"
    for count, message in enumerate(messages[1:], start=2):
        part = _flat(message["content"])
        found = flat.find(part, place)
        if found < 0:
            return "the text of the row" if count == len(messages) else "a shot"
        place = found + len(part)
    return "the order of the turns" if told > found else None


def _flat(text: str) -> str:
    return " ".join(text.split())


def _without_thought(text: str) -> str:
    """The text with the thinking closed, where the template opens it before every answer."""
    found = _THOUGHT.search(text)
    if not found:
        return text
    tag = f"[/{found[3]}]" if found[3] else f"</{found[2]}>"
    return f"{text[: found.end(1)]}\n\n{tag}\n\n"


def _reason(error: Exception) -> str:
    first = first_line(error)
    return first if isinstance(error, ValueError) else f"{type(error).__name__}: {first}"
