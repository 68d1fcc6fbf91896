"""From a cell of a file to the gold label, as the task writes it."""

from __future__ import annotations

import unicodedata

from ppo_nlu.errors import UserError, quoted
from ppo_nlu.tasks import TaskSpec
from ppo_nlu.tasks.prompts import STOP
from ppo_nlu.tasks.words import fold


def gold(spec: TaskSpec, value: str | None, where: str, words: bool = False) -> str | None:
    """The gold label for a cell (None: unlabelled): a label word, the number as it is written, or
    the free text. With `words` the cell of a choice may be the word itself."""
    if value is None:
        return None
    if spec.kind == "text":
        return without_tags(value, spec.label_column, where).strip()
    if spec.rating:
        return _rated(spec, value, where)
    known = {label.value: label.word for label in spec.labels}
    if words:
        known = {fold(word): word for word in spec.words} | known
    plain = value.strip()
    loose = fold(plain) if words or plain.lower() in ("true", "false") else plain
    word = known.get(plain, known.get(loose))
    if word is None:  # an accent may be a letter's own or a mark behind it: they look the same
        word = {_composed(v): w for v, w in known.items()}.get(_composed(plain))
    if word is None:
        allowed = ", ".join(label.value for label in spec.labels)
        what = f"{spec.title} has no label {quoted(value)}; it has {allowed}"
        mend = "; add it to custom.labels or drop the rows" if spec.reader == "custom" else ""
        raise UserError(f"{where}: {what}{mend}")
    return word


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _rated(spec: TaskSpec, value: str, where: str) -> str:
    assert spec.rating is not None
    try:
        inside = spec.rating.holds(float(value))
    except ValueError:
        inside = False
    if not inside:
        raise UserError(f"{where}: {quoted(value)} is not {spec.allowed}; mend or drop the row")
    return value.strip()


def without_tags(text: str, column: str, where: str) -> str:
    """The text of an answer or of its reason; a UserError where it holds a tag that ends it."""
    tag = next((tag for tag in (STOP, "<Judgement>", "</Analysis>") if tag in text), None)
    if tag:
        raise UserError(
            f"{where}: {column!r} holds {tag}, which parts an answer from its reason; "
            "take it out, or drop the row"
        )
    return text
