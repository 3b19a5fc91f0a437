"""Drafts from the target's first layer: tokens, hidden states for the target, cost, and unchanged output."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax import decoding
from decodax.decoding.drafters import EarlyLayers
from decodax.decoding.verifiers import ExactMatch
from decodax.models.head import HeadConfig
from decodax.models.model import Model
from tests.speculation import (
    LENGTHS,
    MODEL,
    PARAMS,
    TOLERANCE,
    assert_same,
    forward,
    padded,
    penalised_drafts,
    plain_decode,
    start,
    texts,
    with_penalties,
)

DRAFT_TOKENS = 3
DRAFTER = EarlyLayers(MODEL, 1, DRAFT_TOKENS)
SPECULATIVE = decoding.speculative(MODEL, DRAFTER, ExactMatch())
decode = jax.jit(SPECULATIVE, donate_argnums=2)
propose = jax.jit(DRAFTER.propose)


def damped(params, amount):
    """The parameters with the second layer adding less, so that the first one's token is often the model's."""
    block = params["blocks_1"]
    mixer, feed_forward = dict(block["mixer"]), dict(block["feed_forward"])
    for part, names in ((mixer, ("out", "out_bias")), (feed_forward, ("down", "down_bias"))):
        part.update({name: amount * part[name] for name in names})
    return {**params, "blocks_1": {**block, "mixer": mixer, "feed_forward": feed_forward}}


EARLY = damped(PARAMS, 0.1)


def test_output_is_plain_decoding_s_and_every_layer_is_counted():
    """In greedy rows; what sampling options do to a draft is the same code as, and tested in, test_del_choice.py."""
    want = plain_decode(EARLY, start(params=EARLY))
    got = decode(EARLY, None, start(params=EARLY))
    assert_same(got, want)
    lengths, rounds = np.asarray(got.counts.accepted_lengths), int(got.num_target_forwards) - 1  # one was the prefill
    new = np.asarray(got.length) - LENGTHS
    assert np.dot(lengths, np.arange(1, DRAFT_TOKENS + 2)) == new.sum()
    assert 0 < lengths[0] < lengths.sum() and lengths[-1] > 0  # some drafts are fully accepted, some not at all
    per_round = (1 + DRAFT_TOKENS) * 1 + 1  # every node through the first layer, one forward through the second
    assert int(got.layer_counts.batch) == rounds * per_round
    assert int(got.counts.num_draft_forwards) == rounds * (1 + DRAFT_TOKENS)
    row = np.asarray(got.layer_counts.row)
    assert row.sum() == lengths.sum() * per_round and row.max() == rounds * per_round


def test_a_row_beside_itself_runs_the_layers_that_it_needs_in_any_batch():
    together = decode(EARLY, None, start(params=EARLY)).layer_counts.row
    for row in range(3):
        same = decode(EARLY, None, start([row] * 3, params=EARLY))
        assert int(same.layer_counts.batch) == int(together[row])
        np.testing.assert_array_equal(same.layer_counts.row, [together[row]] * 3)


def test_the_proposal_equals_forwards_without_a_cache():
    state = start(params=EARLY)
    proposal, _ = propose(EARLY, None, state)
    drafted = texts(state)
    for _ in range(DRAFT_TOKENS):
        exits = MODEL.logits(EARLY, forward(EARLY, padded(drafted))[0].captured[1])
        last = [np.argmax(exits[row, len(text) - 1]) for row, text in enumerate(drafted)]
        drafted = [np.append(text, token) for text, token in zip(drafted, last, strict=True)]
    out, _ = forward(EARLY, padded(drafted))
    (update,) = proposal.cache_updates
    for row, text in enumerate(drafted):
        nodes = slice(len(text) - DRAFT_TOKENS - 1, len(text))
        np.testing.assert_array_equal(proposal.token[row], text[nodes])
        np.testing.assert_allclose(proposal.hidden[row], out.captured[1][row, nodes], atol=TOLERANCE)
        np.testing.assert_allclose(update.key[row], out.cache_updates[0].key[row, :, nodes], atol=TOLERANCE)
        np.testing.assert_allclose(update.value[row], out.cache_updates[0].value[row, :, nodes], atol=TOLERANCE)


def test_penalties_count_the_draft_s_own_tokens():
    state = with_penalties(start(params=EARLY))
    proposal, _ = propose(EARLY, None, state)

    def exit_logits(rows):
        return MODEL.logits(EARLY, forward(EARLY, padded(rows))[0].captured[1])

    np.testing.assert_array_equal(proposal.token[:, 1:], penalised_drafts(exit_logits, texts(state), DRAFT_TOKENS))


@pytest.mark.slow
def test_jitted_equals_eager():
    state = start(params=EARLY)
    eager, jitted = DRAFTER.propose(EARLY, None, state)[0], propose(EARLY, None, state)[0]
    for mine, other in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(mine, other, atol=TOLERANCE)


def test_bad_input():
    for exit_layer in (0, 2, 7):
        with pytest.raises(
            ValueError, match=rf"exit_layer must be in 1..1 \(layers that draft, of 2\), got {exit_layer}"
        ):
            EarlyLayers(MODEL, exit_layer, 3)
    shallow = Model(dataclasses.replace(MODEL.config, blocks=MODEL.config.blocks[:1]))
    with pytest.raises(ValueError, match="needs a model of at least 2 layers, got 1"):
        EarlyLayers(shallow, 1, 3)
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        EarlyLayers(MODEL, 1, 0)
    with pytest.raises(ValueError, match="must be the target's own"):
        DRAFTER.check(Model(dataclasses.replace(MODEL.config, head=HeadConfig())), None)
    with pytest.raises(ValueError, match="leave draft_params out"):
        DRAFTER.check(MODEL, {"head": jnp.zeros(1)})
