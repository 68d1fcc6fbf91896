"""A packed row while it grows, and what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ppo_nlu.tree.plan import Link, Plan, Run, plan_of
from ppo_nlu.tree.prefixes import Tokens


@dataclass(frozen=True)
class Cost:
    """Tokens of a pass, padding not counted: those that are run, and those of one row for each
    answer. `pairs` counts each token that is run with each one it attends to. `predicting` counts
    the tokens that another one is predicted from: the last block runs no others (None: all)."""

    tokens_run: int
    tokens_full: int
    pairs: int
    predicting: int | None = None


class PackedRow:
    """Runs of tokens end to end, and the links from queries to the run that they continue."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.position_ids: list[int] = []
        self.runs: list[Run] = []
        self.to_prefixes: list[Link] = []
        self.to_suffixes: list[Link] = []

    def add(self, tokens: Tokens, position: int) -> Run:
        """Append a run whose first token has this position."""
        run = (len(self.ids), len(tokens))
        self.ids += tokens
        self.position_ids += range(position, position + len(tokens))
        self.runs.append(run)
        return run

    def add_answers(
        self,
        answers: Sequence[Tokens],
        mine: Iterable[int],
        position: int,
        suffix: Run,
        starts: list[int],
    ) -> None:
        """Append a prompt's answers, each without its last token and from `position` on, and link
        them to the prompt's suffix. Where they start is written into `starts`."""
        began = len(self.ids)
        for j in mine:
            starts[j] = self.add(answers[j][:-1], position)[0]
        self.to_suffixes.append((began, len(self.ids) - began, *suffix))

    def link_to_prefix(self, began: int, prefix: Run | None) -> None:
        """All tokens from `began` on stand behind this prefix."""
        if prefix is not None:
            self.to_prefixes.append((began, len(self.ids) - began, *prefix))

    def plan(self, earlier: tuple[bool, bool], predicting: Tensor | None = None) -> Plan:
        """The plan of this row; the arguments are those of `plan_of`."""
        longest = max(self.position_ids) + 1
        return plan_of(self.runs, self.to_prefixes, self.to_suffixes, predicting, longest, earlier)

    def cost(self, full: int, predicting: int | None = None) -> Cost:
        """What the row costs: tokens attend inside their run and along the links."""
        links = [*self.to_prefixes, *self.to_suffixes]
        pairs = triangles(length for _, length in self.runs)
        pairs += sum(asked * length for _, asked, _, length in links)
        return Cost(len(self.ids), full, pairs, predicting)


def triangles(lengths: Iterable[int]) -> int:
    """Pairs of causal attention inside runs of these lengths."""
    return sum(n * (n + 1) // 2 for n in lengths)
