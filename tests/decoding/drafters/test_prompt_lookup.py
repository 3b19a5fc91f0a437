"""Prompt lookup equals plain Python, on random texts of few distinct tokens, at both ends of the buffer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax import decoding
from decodax.decoding.drafters import Children, PromptLookup
from tests.speculation import MODEL, PARAMS

ROWS, CAPACITY = 60, 24
SETTINGS = [(4, 3, 1), (1, 1, 1), (7, 4, 2)]


def example():
    random = np.random.default_rng(0)
    length = np.array([1, 2, 3, CAPACITY - 1, *random.integers(1, CAPACITY, ROWS - 4)])  # one more fits in every row
    # After the row's end are tokens that the lookup would match.
    vocabulary = np.where(np.arange(ROWS) % 2, 3, 7)[:, None]
    return random.integers(0, vocabulary, (ROWS, CAPACITY)), length


def looked_up(text, num_tokens, max_ngram, min_ngram):
    """The tokens after the latest earlier occurrence of the longest n-gram at the end of a list."""
    for size in range(max_ngram, min_ngram - 1, -1):
        if size >= len(text):
            continue
        for begin in range(len(text) - size - 1, -1, -1):
            if text[begin : begin + size] == text[-size:]:
                return text[begin + size :][:num_tokens]
    return []


def start(tokens, length):
    """A state of these texts; the model is not needed, so nothing is prefilled."""
    state = decoding.prefill(MODEL, PARAMS, tokens[:, :1], np.ones_like(length), CAPACITY - 1, np.zeros_like(length))
    return dataclasses.replace(
        state, tokens=jnp.asarray(tokens, jnp.int32), length=jnp.asarray(length, jnp.int32), draft=()
    )


@pytest.mark.parametrize("settings", SETTINGS)
def test_proposes_the_tokens_after_the_latest_match(settings):
    drafter = PromptLookup(*settings)
    tokens, length = example()
    assert (drafter.num_nodes, drafter.max_depth, drafter.children) == (settings[0] + 1, settings[0], Children.CHOSEN)
    found = []
    proposal, state = jax.jit(drafter.propose)(PARAMS, None, start(tokens, length))
    assert (
        state == () and proposal.tree.is_chain and proposal.logprobs is None and int(proposal.num_draft_forwards) == 0
    )
    for row in range(ROWS):
        text = tokens[row, : length[row]].tolist()
        want = looked_up(text, *settings)
        found.append(len(want))
        assert proposal.token[row, 0] == text[-1]
        np.testing.assert_array_equal(proposal.token[row, 1 : len(want) + 1], want)
        is_proposed = np.arange(settings[0] + 1)
        np.testing.assert_array_equal(proposal.is_candidate[row], (is_proposed > 0) & (is_proposed <= len(want)))
    assert {0, 1, settings[0]} <= set(found)
    eager, _ = drafter.propose(PARAMS, None, start(tokens[7:8], length[7:8]))  # and a row alone
    np.testing.assert_array_equal(eager.token, proposal.token[7:8])
    np.testing.assert_array_equal(eager.is_candidate, proposal.is_candidate[7:8])


def test_the_example():
    tokens = np.zeros((1, CAPACITY), int)
    tokens[0, :5] = [7, 8, 9, 7, 8]
    proposal, _ = PromptLookup(4).propose(PARAMS, None, start(tokens, np.array([5])))
    np.testing.assert_array_equal(proposal.token[0, 1:4], [9, 7, 8])
    np.testing.assert_array_equal(proposal.is_candidate[0], [False, True, True, True, False])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((0,), "at least 1 token, got 0"),
        ((1025,), "a draft must hold at most 1024 tokens, got 1025"),
        ((10**6,), "a draft must hold at most 1024 tokens, got 1000000"),
        ((3, 2, 0), "1 <= min_ngram <= max_ngram .* got 0 and 2"),
        ((3, 2, 3), "got 3 and 2"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PromptLookup(*settings)
