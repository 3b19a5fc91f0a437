"""The draft model of the draft scheme, itself sped up by prompt tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax import decoding
from decodax.decoding.draft_vocabulary import in_target_vocabulary
from decodax.decoding.drafters import NestedDraft, PromptTokens
from decodax.decoding.prompt_tree import dynamic_trees
from decodax.decoding.verifiers import ExactMatch
from tests.speculation import DRAFT_PARAMS, MODEL, PARAMS, assert_same, plain, start
from tests.tiny import tiny_config

TREES = dynamic_trees([[0.5, 0.2, 0.1], [0.4, 0.2, 0.1], [0.3, 0.2, 0.1]], 12)
DRAFTER = NestedDraft(decoding.speculative(MODEL, PromptTokens(MODEL, TREES), ExactMatch()), 3)
EMBEDDING = jax.random.normal(jax.random.key(3), (3, 1, MODEL.config.hidden_size))
DRAFT = {"model": DRAFT_PARAMS, "drafter": {"embedding": EMBEDDING}}


@pytest.mark.slow
def test_the_chain_is_what_the_draft_model_would_generate():
    decode = decoding.speculative(MODEL, DRAFTER, ExactMatch())
    state = jax.jit(decode.start)(PARAMS, DRAFT, start())
    propose, step = jax.jit(DRAFTER.propose), jax.jit(decode.step)
    alone = jax.jit(decoding.autoregressive(MODEL))
    for _ in range(3):
        proposal, _ = propose(PARAMS, DRAFT, state)
        lengths = np.asarray(state.length)
        fresh = decoding.prefill(MODEL, DRAFT_PARAMS, state.tokens, lengths, 3, np.zeros(3, np.uint32))
        written = alone(DRAFT_PARAMS, fresh).tokens
        for row, length in enumerate(lengths):
            np.testing.assert_array_equal(proposal.token[row], written[row, length - 1 : length + 3])
        state = step(PARAMS, DRAFT, state)


@pytest.mark.slow
@pytest.mark.parametrize("size", [31, 41])
def test_a_draft_model_of_another_vocabulary(size):
    """Its vocabulary is a subset of the target's, or padded with tokens that it finds more probable than any other."""
    model = in_target_vocabulary(dataclasses.replace(MODEL, config=tiny_config(vocab_size=size)), MODEL.vocab_size)
    extra = ((0, max(0, size - MODEL.vocab_size)), (0, 0))
    tables = {name: jnp.pad(PARAMS[name][:size], extra, constant_values=9.0) for name in ("embedding", "head")}
    drafter = NestedDraft(decoding.speculative(model, PromptTokens(model, TREES), ExactMatch()), 3)
    draft = DRAFT | {"model": DRAFT_PARAMS | tables}
    state = jax.jit(decoding.speculative(MODEL, drafter, ExactMatch()))(PARAMS, draft, start())
    assert_same(state, plain())
    assert int(state.counts.accepted.sum()) > 0
