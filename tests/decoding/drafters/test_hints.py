"""Hints are the draft's most probable tokens; a tree with hints drafts and counts as the tree without them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.decoding.drafters import DraftModel
from decodax.decoding.drafters.hints import Hints
from decodax.decoding.speculative_decoding import speculative
from decodax.decoding.tree import Tree
from decodax.decoding.verifiers import ExactMatch
from decodax.models.model import Model
from tests.speculation import DRAFT_PARAMS, LENGTHS, MODEL, PARAMS, VOCABULARY, plain, start, texts
from tests.tiny import tiny_config

PARENTS = (-1, 0, 0, 1, 1, 3)
LIKELY = 5
HINTED = Hints(MODEL, PARENTS, LIKELY)


@partial(jax.jit, static_argnums=0)
def some_rounds(drafter, state):
    """The state after five rounds, and what is proposed next."""
    decode = speculative(MODEL, drafter, ExactMatch())
    state = decode.start(PARAMS, DRAFT_PARAMS, state)
    state = jax.lax.fori_loop(0, 5, lambda _, state: decode.step(PARAMS, DRAFT_PARAMS, state), state)
    return state, drafter.propose(PARAMS, DRAFT_PARAMS, state)[0]


@jax.jit
def draft_logits(tokens):
    """The draft's logits after the last of each row's tokens, run without a cache."""
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return MODEL.logits(DRAFT_PARAMS, MODEL.apply(DRAFT_PARAMS, tokens, position).hidden)


def most_probable(text, count=LIKELY):
    padded = np.zeros((1, 40), np.int32)
    padded[0, : len(text)] = text
    return np.argsort(-np.asarray(draft_logits(jnp.asarray(padded)))[0, len(text) - 1], kind="stable")[:count]


@pytest.mark.parametrize("drafter", [HINTED, Hints(MODEL, num_likely=LIKELY)], ids=["tree", "alone"])
@pytest.mark.parametrize("options", ["greedy", "sampled"])
@pytest.mark.quick_cases(2)
def test_hints_are_the_most_probable_tokens_after_every_node_that_was_run(drafter, options):
    """Of greedy rows beside sampled ones, too."""
    state, proposal = some_rounds(drafter, start(options=options))
    tree = Tree.fixed(drafter.parents)
    assert proposal.token.shape == (3, drafter.num_nodes) and proposal.likely.shape == (3, drafter.num_nodes, LIKELY)
    np.testing.assert_array_equal(proposal.tree.parent, tree.parent)
    for b, text in enumerate(texts(state)):
        assert int(proposal.token[b, 0]) == text[-1]
        for node in range(drafter.num_nodes):
            path = np.flatnonzero(tree.ancestors[0, node])
            own = np.concatenate([text[:-1], np.asarray(proposal.token)[b, path]])
            is_run = node == 0 or node in drafter.parents
            np.testing.assert_array_equal(proposal.likely[b, node], most_probable(own) if is_run else [-1] * LIKELY)
    assert int(proposal.num_draft_forwards) in (1 + int(tree.depth.max()), max(1, int(tree.depth.max())))


@pytest.mark.slow
def test_a_tree_with_hints_drafts_as_the_tree_without_them():
    hinted, proposal = some_rounds(HINTED, start())
    state, wanted = some_rounds(DraftModel.top_k(MODEL, PARENTS), start())
    assert int(jnp.sum(state.length)) > LENGTHS.sum() + 15  # some drafts have been accepted
    np.testing.assert_array_equal(hinted.tokens, state.tokens)
    np.testing.assert_array_equal(proposal.token, wanted.token)
    np.testing.assert_array_equal(proposal.is_candidate, wanted.is_candidate)
    jax.tree.map(np.testing.assert_array_equal, hinted.counts, state.counts)
    for mine, theirs in zip(hinted.draft, state.draft, strict=True):
        np.testing.assert_array_equal(mine.length, theirs.length)
        np.testing.assert_allclose(mine.key, theirs.key, atol=2e-5)  # keys and values of size about 1, sums in float32


def test_hints_alone_are_plain_decoding_and_the_draft_runs_every_token_once():
    state, _ = some_rounds(Hints(MODEL, num_likely=LIKELY), start())
    for row, mine in enumerate(texts(state)):
        np.testing.assert_array_equal(mine, texts(plain())[row][: len(mine)])
    np.testing.assert_array_equal(state.length, LENGTHS + 5)
    np.testing.assert_array_equal(state.draft[0].length, LENGTHS + 4)


@pytest.mark.slow
def test_tokens_that_a_sampling_option_rules_out_are_no_hints():
    _, proposal = some_rounds(Hints(MODEL, num_likely=LIKELY), start(options="every option"))
    possible = np.asarray(proposal.likely[:, 0] >= 0)
    assert possible[:, 0].all() and np.all(possible[:, :-1] >= possible[:, 1:])


def test_bad_inputs_are_refused():
    for count in (0, VOCABULARY + 1):
        with pytest.raises(ValueError, match=f"num_likely must be in 1..{VOCABULARY} .*, got {count}"):
            Hints(MODEL, num_likely=count)
    with pytest.raises(ValueError, match="a tree must begin with its root"):
        Hints(MODEL, (0, 1))
    with pytest.raises(ValueError, match="must have the target's vocabulary of 41 tokens, got 37"):
        Hints(MODEL).check(Model(tiny_config(vocab_size=41)), DRAFT_PARAMS)
