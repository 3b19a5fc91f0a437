"""The tree chosen for given acceptance rates is the best of all trees of its size, by enumeration."""

import itertools

import numpy as np
import pytest

from decodax.decoding.tree import Tree
from decodax.decoding.tree_choice import best_tree, expected_tokens


def value_of(paths, table):
    return sum(np.prod([table[min(i, len(table) - 1)][rank] for i, rank in enumerate(path)]) for path in paths)


@pytest.mark.parametrize("table", [[[0.6, 0.2, 0.1]], [[0.5, 0.3, 0.1], [0.45, 0.05, 0.02], [0.9, 0.0, 0.0]]])
@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_best_of_all_trees(table, size):
    every = [path for depth in range(1, 5) for path in itertools.product(range(3), repeat=depth)]
    connected = (
        chosen
        for chosen in itertools.combinations([path for path in every if value_of([path], table) > 0.01], size)
        if all(len(path) == 1 or path[:-1] in chosen for path in chosen)
    )
    best = max(value_of(chosen, table) for chosen in connected)
    parents = best_tree(table, size)
    assert len(parents) == size + 1
    assert Tree.fixed(parents).num_nodes == size + 1
    assert expected_tokens(table, parents) == pytest.approx(1 + best)


def test_nodes_are_numbered_level_by_level_and_siblings_by_rank():
    # Products of 0.5, 0.3, 0.1: 0, 1, 00, 01, 10, 000, then 2 (0.1) before 11 (0.09).
    assert best_tree([0.5, 0.3, 0.1], 7) == (-1, 0, 0, 0, 1, 1, 2, 4)


def test_no_second_draft_token_gives_a_chain():
    assert best_tree([0.7], 4) == (-1, 0, 1, 2, 3)


@pytest.mark.parametrize(
    ("acceptance", "size", "message"),
    [([0.5], 0, "at least 1 token, got 0"), ([0.7, 0.6], 3, "at most 1 in all"), ([-0.1], 3, "must be probabilities")],
)
def test_bad_input(acceptance, size, message):
    with pytest.raises(ValueError, match=message):
        best_tree(acceptance, size)
