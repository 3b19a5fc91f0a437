"""Trees given as parents become ancestor masks, and a mask's lower bound excludes no allowed key."""

import jax.numpy as jnp
import numpy as np
import pytest

from decodax.layers.attention.mask import Ancestors, Causal, Tokens, Window


def test_ancestors_from_parents():
    parent = np.array([[-1, 0, 0, 1, 3, 2, -1], [-1, -1, 1, 2, 0, 4, 5]])
    allowed = np.asarray(Ancestors.from_parents(jnp.asarray(parent)).allowed)
    for row, tree in enumerate(parent):
        for node in range(len(tree)):
            path, above = set(), node
            while above >= 0:
                path.add(above)
                above = tree[above]
            assert set(np.nonzero(allowed[row, node])[0]) == path


@pytest.mark.parametrize("mask", [Causal(), Window(3), Causal() & Window(4), Window(2)])
def test_no_mask_of_ours_lets_a_token_attend_to_later_ones(mask):
    assert not mask.attends_ahead
    place = jnp.arange(9)[None]
    assert not np.triu(mask.allows(Tokens(place, is_new=True), Tokens(place, is_new=True))[0], 1).any()


@pytest.mark.parametrize("mask", [Causal(), Window(3), Causal() & Window(5), Window(2) & Window(7)])
def test_the_first_allowed_key_is_a_lower_bound(mask):
    query = jnp.asarray([[2, 9, 13], [0, 1, 30]])
    keys = jnp.broadcast_to(jnp.arange(31), (2, 31))
    allowed = np.asarray(mask.allows(Tokens(query, is_new=True), Tokens(keys, is_new=False)))
    first = np.asarray(mask.first_visible(query))
    for row in range(2):
        for token in range(3):
            visible = np.nonzero(allowed[row, token])[0]
            assert visible.min() == max(first[row, token], 0)
