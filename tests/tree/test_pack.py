"""The packed row by hand: tokens, positions, where answers are predicted from, and the cost."""

from __future__ import annotations

import pytest

from ppo_nlu.tree import prefixes
from ppo_nlu.tree.pack import Branches, build, pad
from ppo_nlu.tree.packed_row import Cost
from tests.tree.shapes import BASE, SHAPES

pytestmark = pytest.mark.usefixtures("every_prefix_counts")


def test_hand_made_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 shared tokens; 2, 1 and 4 more per prompt; answers without their last: 2, 0 and 1. The
    longest run, the third prompt's, lies first."""
    tree = build(*SHAPES["shared prefix"])
    assert tree.ids.tolist() == [*BASE, 24, 26, 27, 28, 13, 20, 21, 31, 12, 23]
    assert tree.position_ids.tolist() == [*range(8), 8, 9, 10, 11, 12, 8, 9, 10, 11, 8]
    assert tree.branches == Branches([(0, 8)], [(13, 4), (17, 1), (8, 5)], [0, 0, 0])
    # Causal pairs of 8, 4, 1 and 5 tokens, and 10 tokens that see the 8 shared ones.
    pairs = 36 + 10 + 1 + 15 + 10 * 8
    assert tree.cost == Cost(18, (10 + 2) + (9 + 0) + (12 + 1), pairs, predicting=6)
    assert tree.ends.tolist() == [14, 17, 11]
    assert tree.mask.tolist() == [[True, True, True], [True, False, False], [True, True, False]]
    assert tree.predicted_from[tree.mask].tolist() == [14, 15, 16, 17, 11, 12]
    assert tree.lengths == [10, 9, 12]
    monkeypatch.setattr(prefixes, "PREFIX_COST", 16)  # the 2 x 8 tokens saved are not worth it
    few = build(*SHAPES["shared prefix"])
    assert few.branches is not None
    assert few.branches.prefixes == [] and few.branches.prefix_of == [-1, -1, -1]


@pytest.mark.parametrize("group", [1, 4])
def test_distinct_tokens_run_once(group: int) -> None:
    """16 rows with 80 shared, 20 own and 6 answer tokens (the last of which predicts nothing)."""
    shared = [i % 40 + 3 for i in range(80)]
    prompts = [[*shared, 50 + row, *range(19)] for row in range(16)]
    answers = [[60 + row, 1, 2, 3, 4, 5] for row in range(16 * group)]
    tree = build(prompts, answers, [row // group for row in range(16 * group)])
    assert tree.cost.tokens_run == len(tree.ids) == 80 + 16 * 20 + 16 * group * 5
    assert tree.cost.tokens_full == 16 * group * 105
    plain = build(prompts, answers, [row // group for row in range(16 * group)], packed=False)
    full = 16 * group * 105
    assert plain.cost == Cost(full, full, full * 106 // 2)


def test_pad() -> None:
    ids, mask = pad([[1, 2, 3], [4], []], fill=9)
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9], [9, 9, 9]]
    assert mask.tolist() == [[True, True, True], [True, False, False], [False, False, False]]
    ids, mask = pad([[1, 2, 3], [4]], left=True)
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]
