"""Prompt trees equal a simulation of the rounds, and beat every other distribution of prompt tokens over nodes."""

import itertools

import numpy as np
import pytest

from decodax.decoding.prompt_tree import (
    PromptTree,
    dynamic_trees,
    node_probabilities,
    static_tree,
    stationary_distribution,
    stationary_expected_tokens,
)

ACCURACY = [[0.5, 0.2, 0.1], [0.4, 0.15, 0.1], [0.3, 0.1, 0.05]]


def simulate(trees, rounds=40_000, seed=0):
    """Tokens per round and the share of each state, with draft tokens independently right as the table says."""
    random, state, tokens, seen = np.random.default_rng(seed), len(trees), 0, np.zeros(len(trees))
    for _ in range(rounds):
        tree = trees[state - 1]
        seen[state - 1] += 1
        node, depth = 0, 0
        while True:
            children = [child for child, parent in enumerate(tree.parents) if parent == node]
            right = random.choice(4, p=[*ACCURACY[depth], 1 - sum(ACCURACY[depth])]) if depth < 3 else 3
            if right >= len(children):
                break
            node, depth = children[right], depth + 1
        tokens += depth + 1
        state = tree.prompts[node]
    return tokens / rounds, seen / rounds


@pytest.mark.parametrize("num_nodes", [9, 17])
def test_stationary_expected_tokens_and_states_are_those_of_a_simulation(num_nodes):
    trees = dynamic_trees(ACCURACY, num_nodes)
    tokens, states = simulate(trees)
    assert stationary_expected_tokens(ACCURACY, trees) == pytest.approx(tokens, abs=0.02)  # four standard errors
    np.testing.assert_allclose(stationary_distribution(ACCURACY, trees), states, atol=0.015)


def test_probabilities_of_nodes():
    accepted, ends = node_probabilities(ACCURACY, (-1, 0, 0, 1, 3))
    np.testing.assert_allclose(accepted, [1, 0.5, 0.2, 0.2, 0.06])
    np.testing.assert_allclose(ends, [0.3, 0.3, 0.2, 0.14, 0.06])
    assert node_probabilities(ACCURACY, (-1, 0, 0, 0, 0))[0][4] == 0  # a fourth draft token, of which nothing is known


@pytest.mark.parametrize("num_nodes", [8, 12, 24, 40])
def test_dynamic_trees_are_at_least_as_good_as_static_ones(num_nodes):
    trees = dynamic_trees(ACCURACY, num_nodes)
    assert all(tree.num_nodes() <= num_nodes and tree.depth <= state for state, tree in enumerate(trees, start=1))
    fitting = [static_tree(ACCURACY, count) for count in range(1, 12)]
    best = max(
        stationary_expected_tokens(ACCURACY, [tree]) for tree in fitting if tree.num_nodes() <= max(num_nodes, 8)
    )
    assert stationary_expected_tokens(ACCURACY, trees) >= best - 1e-9


@pytest.mark.parametrize(("num_nodes", "ways"), [(12, 10), (14, 23), (15, 26 * 6 * 6)])
def test_no_other_distribution_of_the_prompt_tokens_is_better(num_nodes, ways):
    """All distributions over the trees' own candidates: with these accuracies the greedy choice is the best."""
    trees, options = dynamic_trees(ACCURACY, num_nodes), []
    for tree in trees:
        room = num_nodes - len(tree.parents)
        dealt = itertools.product((1, 2, 3), repeat=len(tree.parents) - 1)
        options.append([PromptTree(tree.parents, (3, *rest)) for rest in dealt if 3 + sum(rest) <= room])
    choices = list(itertools.product(*options))
    assert len(choices) == ways and trees in choices
    best = max(stationary_expected_tokens(ACCURACY, choice) for choice in choices)
    assert stationary_expected_tokens(ACCURACY, trees) == pytest.approx(best, rel=1e-12)  # least squares in float64


def test_draft_tokens_that_were_never_right_do_not_make_a_tree_deeper():
    never = [[0.3, 0.0], [0.0, 0.0], [0.0, 0.0]]
    trees = dynamic_trees(never, 32)
    assert [tree.depth <= state for state, tree in enumerate(trees, start=1)] == [True] * 3
    assert stationary_expected_tokens(never, trees) == pytest.approx(1.3)


def test_an_ensemble_needs_more_nodes():
    for tree in dynamic_trees(ACCURACY, 30, ensemble=2):
        assert tree.num_nodes(2) <= 30 and tree.num_nodes(2) == len(tree.parents) + 2 * sum(tree.prompts)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"3 distances needs at least 6 nodes, got 5: raise draft_tokens"):
        dynamic_trees(ACCURACY, 5)
    with pytest.raises(ValueError, match="at least 1 prompt token and the root the most"):
        PromptTree((-1, 0), (1, 2))
    with pytest.raises(ValueError, match="got 1 for 2"):
        PromptTree((-1, 0), (2,))
