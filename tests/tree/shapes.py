"""Prompts and answers of many shapes, and what a tree of them is measured by."""

from __future__ import annotations

import tiny
import torch
from torch import Tensor, nn

from ppo_nlu.tree.pack import Tree, build
from ppo_nlu.tree.passes import run

BASE = [5, 9, 3, 14, 22, 7, 30, 11]


OTHER = [6, 4, 17, 25, 8, 19]


# name: (prompts, answers, prompt_of)
SHAPES: dict[str, tuple[list[list[int]], list[list[int]], list[int] | None]] = {
    "shared prefix": (
        [[*BASE, 20, 21], [*BASE, 23], [*BASE, 24, 26, 27, 28]],
        [[31, 12, 2], [31], [13, 15]],
        None,
    ),
    "nothing shared": ([BASE, OTHER, [40, 41, 42]], [[31, 12], [13, 15, 16], [2]], None),
    "two clusters": (
        [[*BASE, 20], [*OTHER, 21, 22], [*BASE, 23, 29], [*OTHER, 24], [*OTHER, 26]],
        [[31, 12], [13], [15, 16, 2], [33, 34], [35]],
        None,
    ),
    "a prompt opens or equals another": (
        [BASE, BASE[:5], [*BASE, 20, 21], list(BASE)],
        [[31, 12], [13, 15, 2], [16], [33, 34]],
        None,
    ),
    "several answers a prompt": (
        [[*BASE, 20, 21], [*BASE, 23], [*BASE, 24, 26, 27]],
        [[31, 12, 2], [31], [13, 15], [16, 2], [16, 31, 33, 2], [34]],
        [0, 0, 0, 1, 1, 2],
    ),
    "prompt_of out of order, one prompt without": (
        [[*BASE, 20], OTHER, [*BASE, 23]],
        [[31, 12], [13], [15, 16, 2]],
        [2, 0, 2],
    ),
    "answers of one token": (
        [[*BASE, 20], [*BASE, 21, 22]],
        [[31], [12], [13], [15]],
        [0, 0, 1, 1],
    ),
    "one row": ([BASE], [[31, 12, 2]], None),
    "one prompt, four answers": ([BASE], [[31, 12], [13, 15, 16], [2], [31, 13]], [0, 0, 0, 0]),
}


def weights_of(count: int, width: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(5)) / count


def pull(hidden: Tensor, params: list[nn.Parameter]) -> list[Tensor]:
    """Gradients of a fixed random projection of the states (zeros where there is none)."""
    loss = (hidden * weights_of(*hidden.shape)).sum()
    return list(torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True))


def by_row(decoder: nn.Module, prompts, answers, prompt_of) -> Tensor:
    prompt_of = range(len(answers)) if prompt_of is None else prompt_of
    rows = zip(prompt_of, answers, strict=True)
    return torch.cat([tiny.alone(decoder, prompts[o], answer) for o, answer in rows])


def through(decoder: nn.Module, tree: Tree, takes_positions: bool = True) -> Tensor:
    flat, _ = run(decoder, tree, takes_positions)
    return flat[tree.predicted_from[tree.mask]]


def assert_equal_to_rows(
    decoder: nn.Module, params, shape, packed: bool = True, takes_positions: bool = True
) -> None:
    prompts, answers, prompt_of = shape
    actual = through(decoder, build(prompts, answers, prompt_of, packed), takes_positions)
    expected = by_row(decoder, prompts, answers, prompt_of)
    tiny.close(actual, expected)
    for mine, theirs in zip(pull(actual, params), pull(expected, params), strict=True):
        tiny.close(mine, theirs)
