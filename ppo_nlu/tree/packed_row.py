"""A packed row while it grows, and what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ppo_nlu.tree.plan import Link, Plan, Run, plan_of
from ppo_nlu.tree.prefixes import Tokens


@dataclass(frozen=True)
class Cost:
    """Tokens of a pass, padding not counted: as run, and as one row an answer would need; `pairs`
    counts each token that is run with each one it attends to, `wanted` those whose states are
    asked for, where the last block runs no others."""

    tokens_run: int
    tokens_full: int
    pairs: int
    wanted: int | None = None


class PackedRow:
    """Runs of tokens end to end, and the links from queries to what they continue."""

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
        """Append a prompt's answers, each from `position` on and short of its last token, and link
        them to the prompt's suffix; `starts` learns where they lie."""
        began = len(self.ids)
        for j in mine:
            starts[j] = self.add(answers[j][:-1], position)[0]
        self.to_suffixes.append((began, len(self.ids) - began, *suffix))

    def link_to_prefix(self, began: int, prefix: Run | None) -> None:
        """All tokens from `began` on stand behind this prefix."""
        if prefix is not None:
            self.to_prefixes.append((began, len(self.ids) - began, *prefix))

    def plan(self, earlier: tuple[bool, bool], wanted: Tensor | None = None) -> Plan:
        """The plan of this row; the arguments are those of `plan_of`."""
        longest = max(self.position_ids) + 1
        return plan_of(self.runs, self.to_prefixes, self.to_suffixes, wanted, longest, earlier)

    def cost(self, full: int, wanted: int | None = None) -> Cost:
        """What the row costs; tokens attend inside of their run, and along the links."""
        links = [*self.to_prefixes, *self.to_suffixes]
        pairs = triangles(length for _, length in self.runs)
        pairs += sum(asked * length for _, asked, _, length in links)
        return Cost(len(self.ids), full, pairs, wanted)


def triangles(lengths: Iterable[int]) -> int:
    """Pairs of causal attention inside runs of these lengths."""
    return sum(n * (n + 1) // 2 for n in lengths)
