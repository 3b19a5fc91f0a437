"""Prompt tokens: draft tokens from the right positions, drafted with the tree of each row's state."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax import decoding
from decodax.decoding.drafters import PromptTokens
from decodax.decoding.prompt_tree import PromptTree, dynamic_trees
from decodax.decoding.verifiers import ExactMatch
from tests.speculation import CAPACITY, MODEL, PARAMS, VOCABULARY, start, texts

WIDTH = MODEL.config.hidden_size
ACCURACY = [[0.5, 0.2, 0.1], [0.4, 0.2, 0.1], [0.3, 0.2, 0.1]]
DYNAMIC = dynamic_trees(ACCURACY, 12)
STATIC = (PromptTree((-1, 0, 0, 1), (2, 2, 1, 2)),)


def embedding(distances, ensemble=1):
    return {"embedding": jax.random.normal(jax.random.key(3), (distances, ensemble, WIDTH))}


KINDS = {
    "dynamic": (PromptTokens(MODEL, DYNAMIC), embedding(3)),
    "ensemble": (PromptTokens(MODEL, STATIC, ensemble=2), embedding(2, 2)),
}


TOKENS = jnp.arange(VOCABULARY, dtype=jnp.int32)[None]
EMBEDDED = np.asarray(MODEL.embed(PARAMS, TOKENS, TOKENS * 0))[0]


@jax.jit
def logits_of(vectors):
    """Logits of one row, padded to one length so that one program serves all; padding does not change them."""
    position = jnp.arange(vectors.shape[1], dtype=jnp.int32)[None]
    return MODEL.logits(PARAMS, MODEL.apply(PARAMS, vectors, position).hidden)


def most_probable(logits, count):
    return np.argsort(-np.asarray(logits, np.float64), kind="stable")[:count]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.quick_cases(1)
def test_draft_tokens_are_those_of_prompt_tokens_after_the_text(kind):
    """Round by round against a forward without cache over the text, with the prompt tokens appended."""
    drafter, draft_params = KINDS[kind]
    decode = decoding.speculative(MODEL, drafter, ExactMatch())
    step = jax.jit(decode.step)
    state = jax.jit(decode.start)(PARAMS, draft_params, start())
    seen, vectors = set(), np.asarray(draft_params["embedding"])
    for _ in range(9):
        state = step(PARAMS, draft_params, state)
        for row, text in enumerate(texts(state)):
            if state.done[row]:
                continue
            number = int(state.draft.distances[row])
            seen.add(number)
            read = EMBEDDED[text[:-1]]  # all but the new last token
            logits = []
            for member in range(drafter.ensemble):
                whole = np.concatenate([read, vectors[:number, member]])
                filled = np.pad(whole, ((0, CAPACITY + 8 - len(whole)), (0, 0)))[None]
                logits.append(np.asarray(logits_of(filled))[0, len(whole) - number : len(whole)])
            for distance, scores in enumerate(np.mean(logits, axis=0)):
                want = most_probable(scores, drafter.num_ranks)
                np.testing.assert_array_equal(state.draft.token[row, distance], want)
    assert seen == {*np.concatenate([tree.prompts for tree in drafter.trees])}


def test_a_row_drafts_with_the_tree_of_its_state():
    drafter, draft_params = KINDS["dynamic"]
    state = jax.jit(drafter.propose)
    begun = dataclasses.replace(start(), draft=drafter.start(PARAMS, draft_params, start()))
    nothing, _ = state(PARAMS, draft_params, begun)
    assert not nothing.is_candidate.any()  # no draft tokens yet
    draft_tokens = jnp.arange(3 * 3 * drafter.num_ranks, dtype=jnp.int32).reshape(3, 3, -1)
    draft = dataclasses.replace(begun.draft, token=draft_tokens, distances=jnp.array([1, 2, 3], jnp.int32))
    proposal, _ = state(PARAMS, draft_params, dataclasses.replace(begun, draft=draft))
    for row, tree in enumerate(DYNAMIC):
        count = len(tree.parents)
        np.testing.assert_array_equal(proposal.tree.parent[row, :count], tree.parents)
        np.testing.assert_array_equal(np.flatnonzero(proposal.is_candidate[row]), np.arange(1, count))
        children = [node for node in range(1, count) if tree.parents[node] == 0]
        np.testing.assert_array_equal(proposal.token[row, np.array(children)], draft_tokens[row, 0, : len(children)])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"embeddings of shape \(3, 1, 23\) .* got \(3, 1, 24\): train them"):
        KINDS["dynamic"][0].check(MODEL, {"embedding": jnp.zeros((3, 1, WIDTH + 1))})
    with pytest.raises(ValueError, match=r"got \(2, 1, 23\)"):
        KINDS["dynamic"][0].check(MODEL, embedding(2))
    with pytest.raises(ValueError, match="one tree for each of the 3 states, or one for all, got 2"):
        PromptTokens(MODEL, DYNAMIC[1:])
    with pytest.raises(ValueError, match="must not be deeper, got depth 2"):
        PromptTokens(MODEL, (PromptTree((-1, 0, 1), (2, 1, 1)), STATIC[0]))
