"""Is PPO better than SFT, or only sharper: the first part of the report, in words and a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ppo_nlu.reproduce import comparisons
from ppo_nlu.reproduce.comparisons import Comparison
from ppo_nlu.reproduce.document import Figure, Folded, Group, Heading, Items, Part, Table, Text
from ppo_nlu.reproduce.methods import method_title
from ppo_nlu.reproduce.results import DECODES, Results
from ppo_nlu.reproduce.tables import DASH, between, counted, number, signed, title_of

WAYS = {
    "sample": "when both answer with one sample at T=1",
    "greedy": "when both decode greedily",
    "score": "when the labels are scored",
}


def verdict(found: Comparison) -> str:
    """Where the interval lies: above, below, or not distinguishable from."""
    low, high = found.interval
    return "above" if low > 0 else "below" if high < 0 else "not distinguishable from"


def sentence(condition: str, a: str, b: str, found: Mapping[str, Comparison]) -> str:
    """What the three comparisons of a with b say, in words."""
    clauses = [
        f"{verdict(row)} {b} {WAYS[decode]} ({signed(row.difference)} points, 95 % interval "
        f"{between(row.interval)})"
        for decode, row in found.items()
    ]
    listed = clauses[0] if len(clauses) == 1 else f"{', '.join(clauses[:-1])}, and {clauses[-1]}"
    size = next(iter(found.values()))
    pairs = f"{counted(size.tasks, 'task')}, {counted(size.pairs, 'pair')} of task and seed"
    return f"**{condition}** ({pairs}), {a} is {listed}."


def sharpening(a: str, b: str, found: Mapping[str, Comparison]) -> str:
    """How much of the sampled difference greedy decoding leaves, and what sampling costs each."""
    sampled, greedy = found["sample"], found["greedy"]
    cost_a, cost_b = greedy.a - sampled.a, greedy.b - sampled.b
    first = (
        f"One sample in place of the greedy answer costs {b} {number(cost_b)} points and {a} "
        f"{number(cost_a)}."
    )
    gap, kept = round(sampled.difference, 1), round(greedy.difference, 1)
    if gap <= 0:
        return f"{first} Under sampling {a} has no advantage that this could explain."
    if sampled.interval[0] <= 0:
        return f"{first} The sampled difference may be chance: its interval holds 0."
    if kept >= gap:
        return (
            f"{first} So the advantage of {a} does not come from the sampling: it is no smaller "
            "greedily."
        )
    if kept <= 0:
        return (
            f"{first} All of the {number(gap)} points that {a} is ahead under sampling are the "
            f"sharper answer distribution: greedily it is not ahead ({signed(kept)})."
        )
    return (
        f"{first} Of the {number(gap)} points that {a} is ahead under sampling, {number(kept)} are "
        f"left when both decode greedily; the other {number(gap - kept)} are the sharper "
        "distribution."
    )


QUESTIONS = (  # a, b, under what condition
    ("ppo-st", "sft-st", "At equal numbers of labels"),
    ("ppo-st", "sft-seconds", "At equal seconds of training"),
    ("ppo-mt", "sft-mt", "One model for several tasks, at equal numbers of labels"),
)


def question(results: Results, figures: Mapping[str, Figure]) -> Iterator[Part]:
    """PPO against SFT, the first thing to know."""
    yield Heading("Is PPO better than SFT, or only sharper?")
    yield Text(
        "PPO from labels rewards sampled answers, so it also makes the answer distribution "
        "sharper: at T=1 that alone raises the score, without knowing more. So every comparison "
        "is made three times: with one **sampled** answer at T=1 (as the paper does), with the "
        "**greedy** answer, and with the label that the model finds most likely (**scored**). "
        "Both methods have the same prompt, label words and parser."
    )
    rows, sentences, first = [], [], None
    for a, b, condition in QUESTIONS:
        known = {d: comparisons.compare(results, a, b, d) for d in DECODES}
        found = {d: row for d, row in known.items() if row is not None}
        if not found:
            continue
        rival = method_title("sft-st" if b == "sft-seconds" else b)
        said = sentence(condition, method_title(a), rival, found)
        if {"sample", "greedy"} <= set(found):
            said += f" {sharpening(method_title(a), rival, found)}"
        sentences.append(said)
        first = first or (found if (a, b) == ("ppo-st", "sft-st") else None)
        rows += [
            [f"{method_title(a)} vs {method_title(b)}", DECODES[d], number(row.a), number(row.b),
             signed(row.difference), between(row.interval), verdict(row), str(row.tasks),
             str(row.pairs)]
            for d, row in found.items()
        ]  # fmt: skip
    if not rows:
        yield Text(
            "Neither comparison can be made yet: it needs finished cells of PPO and of SFT.", True
        )
        return
    for text in sentences:
        yield Text(text, True)
    head = ("comparison", "decoding", "PPO", "SFT", "difference", "95 % interval", "so PPO is",
            "tasks", "pairs")  # fmt: skip
    yield Table(head, [Group("", rows)], 2)
    yield Text(
        "Means over tasks of the mean over seeds, in points of a hundred (accuracy, the mean of "
        "two metrics where a task has two, Matthews' and other correlations times 100). "
        "Intervals: percentile bootstrap over tasks and the seeds of each, 10,000 resamples."
    )
    if first:
        yield from _expected(first)
    yield from _by_task(results)
    if "sampled_greedy" in figures:
        yield figures["sampled_greedy"]


def _expected(found: Mapping[str, Comparison]) -> Iterator[Part]:
    """The two things that are expected of PPO at equal labels."""
    checks = []
    if "sample" in found:
        gap = found["sample"].difference
        held = "holds" if gap > 0 else "**fails**"
        checks.append(f"PPO-ST above SFT-ST with one sample at T=1: {held} ({signed(gap)})")
    if "greedy" in found:
        gap = found["greedy"].difference
        held = "holds" if gap >= -1 else "**fails**"
        checks.append(
            f"PPO-ST not more than one point below SFT-ST when both are greedy: {held} "
            f"({signed(gap)})"
        )
    yield Text("Expected at equal labels, on the mean over tasks:")
    yield Items(checks)


def _by_task(results: Results) -> Iterator[Part]:
    """PPO - SFT for each task."""
    pairs = [(a, b) for a, b, _ in QUESTIONS]
    found = {
        (a, b, d): row.by_task
        for a, b in pairs
        for d in DECODES
        if (row := comparisons.compare(results, a, b, d)) is not None
    }
    present = [pair for pair in pairs if any(key[:2] == pair for key in found)]
    head = [
        "task",
        *(
            f"{method_title(a)} − {method_title(b)}, {DECODES[d]}"
            for a, b in present
            for d in DECODES
        ),
    ]
    tasks = [t for t in results.tasks() if any(t in row for row in found.values())]
    keys = [(a, b, d) for a, b in present for d in DECODES]
    gaps = {task: [found.get(key, {}).get(task) for key in keys] for task in tasks}
    rows = [
        [title_of(task), *(DASH if gap is None else signed(gap) for gap in row)]
        for task, row in gaps.items()
    ]
    yield Folded("The difference, task by task", (Table(head, [Group("", rows)]),))
