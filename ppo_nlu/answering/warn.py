"""What a run warns of at its end: a model that is worse than it looks, or not worth its cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ppo_nlu.errors import quoted

LISTED = 5  # classes that a warning names
EXCESS = 0.2  # of all answers that a word may have above its share of the labels
Entry = Mapping[str, Any]  # of a task in a summary.json, with `baselines` where they were measured


def of_task(entry: Entry, by_reward: bool) -> list[str]:
    """One line for each doubt about a choice task's tuned model; `by_reward`: it learned from the
    reward of its own answers."""
    if not entry.get("per_class"):
        return []
    first = "method=sft first (init_from)" if by_reward else "a higher optim.lr"
    found = (
        *_unparsed(entry),
        *_never_given(entry, first),
        *_one_word(entry),
        *_no_gain(entry),
        *_beaten(entry),
    )
    return [f"{entry['title']}: {line}" for line in found]


def _unparsed(entry: Entry) -> Iterator[str]:
    """Most greedy answers name no label."""
    share = entry["reports"]["greedy"]["unparsed"]
    if share > 0.5:
        yield (
            f"{percent(share)} of the greedy answers name no label; train longer, or teach the "
            "form first (python -m ppo_nlu.teach_form)"
        )


def _never_given(entry: Entry, first: str) -> Iterator[str]:
    """Classes that have rows and are no greedy answer."""
    report = entry["reports"]["greedy"]
    rows = {word: figures["support"] for word, figures in entry["per_class"].items()}
    never = [word for word, count in rows.items() if count and not report["predicted"][word]]
    if never:
        total = f"{report['count']:,} rows"
        named = ", ".join(f"{quoted(word)} ({rows[word]:,} of {total})" for word in never[:LISTED])
        more = f" and {len(never) - LISTED} more" if len(never) > LISTED else ""
        yield f"never answered: {named}{more}; try more of their rows, more train.steps or {first}"


def _one_word(entry: Entry) -> Iterator[str]:
    """A word that is most of the greedy answers, and far more of them than of the labels. Answers
    as skewed as the labels are no fault, so the share of a word alone says nothing."""
    report = entry["reports"]["greedy"]
    counts = {word: report["predicted"][word] for word in entry["per_class"]}
    word = max(counts, key=lambda name: counts[name])
    given = counts[word] / report["count"]
    gold = entry["per_class"][word]["support"] / report["count"]
    if given > 0.5 and given - gold > EXCESS:
        yield (
            f"{percent(given)} of the greedy answers are {quoted(word)}, and {percent(gold)} of "
            "the labels; train longer where the base does so too, else lower optim.lr"
        )


def _no_gain(entry: Entry) -> Iterator[str]:
    """Neither greedy nor scored answers are above the constant, by the task's own metrics."""
    constant, tuned = entry.get("baselines", {}).get("constant"), best(entry, "score")
    if constant and tuned <= constant["score"]:
        yield (
            f"tuned ({percent(tuned)}) is not above the constant ({percent(constant['score'])}), "
            f"which always answers {quoted(constant['answer'])}; do not use this model: train "
            "longer, or take a larger base"
        )


def _beaten(entry: Entry) -> Iterator[str]:
    """TF-IDF is above the better of greedy and scored answers, by the task's metrics or by
    macro-F1."""
    rival = entry.get("baselines", {}).get("tfidf", {})
    named = " and ".join(rival.get("metrics", ())).replace("macro_f1", "macro-F1")
    above = [
        f"{title} {percent(rival[key])} beside {percent(best(entry, key))}"
        for title, key in {named: "score", "macro-F1": "macro_f1"}.items()
        if key in rival and rival[key] > best(entry, key)
    ]
    if above:
        yield (
            f"TF-IDF is better than tuned: {', '.join(above)}; take such a classifier, or try more "
            "train.steps or a larger base"
        )


def percent(share: float) -> str:
    """A share of 1 as a warning writes it."""
    return f"{100 * share:.1f} %"


def best(entry: Entry, key: str) -> float:
    """The better of greedy and scored answers."""
    reports = entry["reports"]
    return max(reports[name][key] for name in ("greedy", "score") if name in reports)
