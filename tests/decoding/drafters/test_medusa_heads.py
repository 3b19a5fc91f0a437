"""Medusa heads: logits against NumPy, draft tokens from the right hidden state, drafts that are fully accepted."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax import decoding
from decodax.decoding.drafters import MedusaHeads
from decodax.decoding.verifiers import ExactMatch
from decodax.models.medusa_heads import MedusaShape, head_logits, initial_heads
from tests.speculation import MODEL, NEW, PARAMS, VOCABULARY, disturbed, forward, padded, start, texts
from tests.tiny import tiny_model

PARENTS = (-1, 0, 0, 1, 3, 2)  # three tokens deep, with two draft tokens for the first of them
WIDTH = MODEL.config.hidden_size
# Logits of at most 5 in float32, of sums over 23 products.
TOLERANCE = 2e-5


def random_heads(heads=3, *, blocks=1, tied=True):
    shape = MedusaShape(heads, blocks, tied)
    return disturbed(initial_heads(PARAMS, shape), 0.5, seed=11)


def oracle_logits(heads, normed, head_matrix, cap):
    """Every head's logits of states [N, D], in float64."""
    found = []
    for index in range(len(heads)):
        head, state = heads[f"head_{index}"], np.asarray(normed, np.float64)
        for block in range(len([name for name in head if name != "out"])):
            weights = head[f"block_{block}"]
            inner = state @ np.asarray(weights["weight"], np.float64).T + np.asarray(weights["bias"], np.float64)
            state = state + inner / (1 + np.exp(-inner))
        if "out" in head:
            found.append(state @ np.asarray(head["out"], np.float64).T)
        else:
            found.append(cap * np.tanh(state @ np.asarray(head_matrix, np.float64).T / cap))
    return np.stack(found)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own"])
def test_the_logits_of_every_head(tied):
    heads = random_heads(blocks=2, tied=tied)
    normed = jax.random.normal(jax.random.key(3), (2, 5, WIDTH))
    found = head_logits(MODEL, PARAMS, heads, normed, 3)
    assert found.shape == (2, 3, 5, VOCABULARY)
    for row in range(2):
        want = oracle_logits(heads, normed[row], PARAMS["head"], MODEL.config.head.softcap)
        scale = np.abs(want).max()
        np.testing.assert_allclose(found[row], want, atol=TOLERANCE * scale)
    fewer = head_logits(MODEL, PARAMS, heads, normed, 2)
    np.testing.assert_allclose(fewer, found[:, :2], atol=TOLERANCE * np.abs(found).max())


def test_initial_heads_have_the_logits_of_the_model():
    hidden = jax.random.normal(jax.random.key(4), (2, 3, WIDTH))
    normed = MODEL.normed(PARAMS, hidden)
    found = head_logits(MODEL, PARAMS, initial_heads(PARAMS, MedusaShape(2, 3)), normed, 2)
    want = MODEL.logits(PARAMS, hidden)
    np.testing.assert_allclose(found, jnp.stack([want, want], axis=1), atol=TOLERANCE)
    own = initial_heads(PARAMS, MedusaShape(2, 1, tied=False))
    np.testing.assert_array_equal(own["head_1"]["out"], PARAMS["head"])


# A target in which the next token follows from the last alone, by a fixed order of all tokens: every hidden state is an
# embedding, and so is every row of the head. Heads can know such a target, fully or partly.
ORDER = np.random.default_rng(4).permutation(VOCABULARY)
AFTER = np.empty(VOCABULARY, np.int64)
AFTER[ORDER] = np.roll(ORDER, -1)


def known_target():
    silent = {name: jax.tree.map(jnp.zeros_like, PARAMS[name]) for name in PARAMS if name.startswith("blocks_")}
    norm = jax.tree.map(jnp.ones_like, PARAMS["final_norm"])
    unit = PARAMS["embedding"] / jnp.linalg.norm(PARAMS["embedding"], axis=1, keepdims=True)
    return PARAMS | silent | {"final_norm": norm, "head": jnp.zeros_like(PARAMS["head"]).at[AFTER].set(unit)}


KNOWN = known_target()


def knowing_heads(num_wrong):
    """Three heads, each of which confuses `num_wrong` pairs of tokens."""
    heads, row = initial_heads(KNOWN, MedusaShape(3, 1, tied=False)), np.arange(VOCABULARY)
    for index in range(3):
        before = row.copy()
        for _ in range(index + 1):
            before = np.argsort(AFTER)[before]
        for pair in np.random.default_rng(index).permutation(VOCABULARY)[: 2 * num_wrong].reshape(-1, 2):
            before[pair] = before[pair[::-1]]
        heads[f"head_{index}"]["out"] = KNOWN["head"][before]
    return heads


@cache
def compiled():
    speculative = decoding.speculative(MODEL, MedusaHeads(MODEL, PARENTS), ExactMatch())
    return jax.jit(speculative.start), jax.jit(speculative, donate_argnums=2)


@cache
def continued():
    """What follows the prompts in the known target."""
    return [list(text) for text in texts(jax.jit(decoding.autoregressive(MODEL))(KNOWN, start(params=KNOWN)))]


def test_the_known_target_follows_its_order():
    for row, text in enumerate(continued()):
        new = text[-int(NEW[row]) :]
        np.testing.assert_array_equal(new[1:], AFTER[new[:-1]])


def test_drafts_of_heads_that_know_the_target_are_fully_accepted():
    begin, decode = compiled()
    heads = knowing_heads(0)
    state = decode(KNOWN, heads, begin(KNOWN, heads, start(params=KNOWN)), 1000)
    assert [list(text) for text in texts(state)] == continued()
    # The first round drafts nothing; each further one takes three draft tokens and one token of the target's own.
    rounds = 1 + -(-(NEW - 1) // 4)
    assert int(state.num_target_forwards) == rounds.max() + 1  # and one for prefill
    lengths = np.asarray(state.counts.accepted_lengths)
    assert lengths[0] >= 3 and lengths[1:3].sum() <= 3 and lengths[3] >= (rounds - 2).sum()


def test_draft_tokens_come_from_the_state_before_the_last_accepted_token():
    """After every round, of every row still running: the draft tokens that the state before the last token gives."""
    begin, decode = compiled()
    heads = knowing_heads(9)
    state, lengths = begin(KNOWN, heads, start(params=KNOWN)), set()
    before = np.asarray(state.length)
    assert not np.asarray(state.draft.is_possible).any()
    while not np.asarray(state.done).all():
        state = decode(KNOWN, heads, state, 1)
        assert np.asarray(state.draft.is_possible).all()
        for row, text in enumerate(texts(state)):
            gained = int(state.length[row]) - before[row]
            if state.done[row] or not gained:
                continue
            lengths |= {gained}
            hidden = forward(KNOWN, padded([text]))[0].hidden[0, len(text) - 2]
            normed = np.asarray(hidden, np.float64) / np.sqrt(np.mean(np.asarray(hidden, np.float64) ** 2) + 1e-5)
            logits = oracle_logits(heads, normed[None], None, None)[:, 0]
            np.testing.assert_array_equal(state.draft.token[row], np.argsort(-logits, axis=1)[:, :2])
        before = np.asarray(state.length)
    assert lengths == {1, 2, 3, 4}
    assert [list(text) for text in texts(state)] == continued()


def test_bad_input():
    heads = random_heads()
    with pytest.raises(ValueError, match="a draft must hold at least 1 token, got 0"):
        MedusaHeads(MODEL, (-1,))
    with pytest.raises(ValueError, match="heads and blocks must be at least 1, got 0 and 1"):
        MedusaShape(0)

    def check(drafter, heads, model=MODEL):
        decoding.speculative(model, drafter, ExactMatch()).start(PARAMS, heads, start())

    chain = MedusaHeads(MODEL, (-1, 0))
    with pytest.raises(ValueError, match="as there are heads, 3, got depth 4"):
        check(MedusaHeads(MODEL, range_of(5)), heads)
    with pytest.raises(ValueError, match=r'must be \{"head_0": ..., "head_1"'):
        check(chain, {"head_1": heads["head_1"]})
    with pytest.raises(ValueError, match="at most 37 children"):
        check(MedusaHeads(MODEL, (-1, *[0] * 38)), heads)
    with pytest.raises(ValueError, match="must be made with the target"):
        check(MedusaHeads(tiny_model(vocab_size=5)[0], (-1, 0)), heads)
    narrow = {"head_0": {"block_0": {"weight": jnp.zeros((7, 7)), "bias": jnp.zeros(7)}}}
    with pytest.raises(ValueError, match=r"weights \[23, 23\] and biases \[23\].* got \[\(7, 7, 7\)\] in head_0"):
        check(chain, narrow)
    own = random_heads(1, tied=False)
    with pytest.raises(ValueError, match="vocabulary of 37 tokens, got 36 in head_0"):
        check(chain, {"head_0": own["head_0"] | {"out": own["head_0"]["out"][1:]}})
    with pytest.raises(ValueError, match="for all heads or for none: see head_1"):
        check(chain, {"head_0": heads["head_0"], "head_1": own["head_0"]})


def range_of(num_nodes):
    """The parents of a chain."""
    return tuple(range(-1, num_nodes - 1))
