"""DEL chooses exit layer and draft length every round: each round against NumPy, and what it converges to.

The model has three layers, so that there are two exits to choose from; the layers after the first add little, so that
the exits are often right. `every` = 2 throughout: the exits are looked at in every other round.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax import decoding
from decodax.decoding.drafters import DynamicExit
from decodax.decoding.drafters.del_choice import DECAY
from decodax.decoding.exit_counts import UNSEEN, ExitCounts
from decodax.decoding.verifiers import ExactMatch
from decodax.models.model import Model
from tests.speculation import (
    LENGTHS,
    NEW,
    NO_STOPS,
    OPTIONS,
    PARAMS,
    PROMPTS,
    TOLERANCE,
    VOCABULARY,
    assert_same,
    padded,
    penalised,
    penalised_drafts,
    texts,
    with_penalties,
)
from tests.speculation import MODEL as TWO_LAYERS

BLOCKS = TWO_LAYERS.config.blocks
MODEL = Model(dataclasses.replace(TWO_LAYERS.config, blocks=(*BLOCKS, BLOCKS[1])))
LAYERS, MAX_TOKENS = 3, 4
DRAFTER = DynamicExit(MODEL, MAX_TOKENS, every=2)
SPECULATIVE = decoding.speculative(MODEL, DRAFTER, ExactMatch())
decode = jax.jit(SPECULATIVE, donate_argnums=2)
plain_decode = jax.jit(decoding.autoregressive(MODEL), donate_argnums=1)
begin, propose = jax.jit(SPECULATIVE.start), jax.jit(DRAFTER.propose)


def with_strengths(second, third):
    """Parameters whose second and third layers' outputs are scaled by `second` and `third`."""

    def block(amount, flipped):
        own = PARAMS["blocks_1"]
        mixer, feed_forward = dict(own["mixer"]), dict(own["feed_forward"])
        for part, names in ((mixer, ("out", "out_bias")), (feed_forward, ("down", "down_bias"))):
            part.update({name: amount * (part[name][::-1] if flipped else part[name]) for name in names})
        return {**own, "mixer": mixer, "feed_forward": feed_forward}

    return {**PARAMS, "blocks_1": block(second, False), "blocks_2": block(third, True)}


EARLY = with_strengths(0.05, 0.03)


def start(rows=slice(None), *, params=EARLY, options="greedy", new=NEW):
    index = np.arange(3)[rows]
    per_row = {
        name: [value[i] for i in index] if isinstance(value, list) else value
        for name, value in OPTIONS[options].items()
    }
    sampling = decoding.Sampling.create(len(index), VOCABULARY, **per_row)
    return decoding.prefill(
        MODEL, params, PROMPTS[rows], LENGTHS[rows], new[rows], index, sampling=sampling, stop_token_ids=NO_STOPS
    )


@jax.jit
def forward(params, tokens):
    """The head's logits after each layer, in texts without a cache."""
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    out = MODEL.apply(params, tokens, position, capture=(1, 2, 3))
    return jnp.stack([MODEL.logits(params, out.captured[layer]) for layer in (1, 2, 3)])


def exits(rows):
    """Token and confidence of every exit, the last layer's included, after every token: [L, B, T]."""
    logits = np.asarray(forward(EARLY, padded(rows)), np.float64)
    chance = np.exp(logits - logits.max(axis=3, keepdims=True))
    return logits.argmax(axis=3), chance.max(axis=3) / chance.sum(axis=3)


def counted(token, confidence, targets):
    """right, wrong and their confidences, of the two exits: over (row, place, target token)."""
    counts = np.zeros((4, LAYERS - 1))
    for row, place, right_token in targets:
        for layer in range(LAYERS - 1):
            kind = 0 if token[layer, row, place] == right_token else 1
            counts[kind, layer] += 1
            counts[kind + 2, layer] += confidence[layer, row, place]
    return counts


def chosen(counts):
    """Exit layer, length and threshold by trying all."""
    right, wrong, right_confidence, wrong_confidence = counts
    best = (0.0, 0, 0)
    for layer in range(1, LAYERS):
        total = right[layer - 1] + wrong[layer - 1]
        agreement = right[layer - 1] / total if total else UNSEEN
        for length in range(MAX_TOKENS + 1):
            tokens = sum(agreement**i for i in range(length + 1))
            worth = tokens / ((length + 1) * layer + LAYERS - layer)
            if worth > best[0] + 1e-9:
                best = (worth, layer, length)
    _, layer, length = best
    known = right[layer - 1] > 0 and wrong[layer - 1] > 0
    means = (
        right_confidence[layer - 1] / max(right[layer - 1], 1e-9),
        wrong_confidence[layer - 1] / max(wrong[layer - 1], 1e-9),
    )
    return layer, length, sum(means) / 2 if known else 0.0


def drafted_tokens(rows, done, layer, length, threshold):
    """How many tokens a round drafts, and the drafts, found by forwards over whole texts."""
    drafts = [list(row) for row in rows]
    for number in range(length):
        token, confidence = exits(drafts)
        last = [(row, len(text) - 1) for row, text in enumerate(drafts)]
        if all(done[row] or confidence[layer - 1, row, place] < threshold for row, place in last):
            return number, drafts
        for row, place in last:
            drafts[row].append(token[layer - 1, row, place])
    return length, drafts


def as_numpy(counts):
    return np.stack([counts.right, counts.wrong, counts.right_confidence, counts.wrong_confidence]).astype(float)


def test_the_first_counts_are_those_of_the_prompts():
    state = begin(EARLY, None, start())
    token, confidence = exits(texts(state))
    places = [(row, place, token[2, row, place]) for row in range(3) for place in range(LENGTHS[row] - 1)]
    np.testing.assert_allclose(as_numpy(state.draft.counts), counted(token, confidence, places), atol=1e-4)
    assert int(state.draft.round) == 0


@pytest.mark.slow
def test_jitted_equals_eager():
    state = start()
    eager, jitted = SPECULATIVE.start(EARLY, None, state), begin(EARLY, None, state)
    proposal, wanted = DRAFTER.propose(EARLY, None, eager)[0], propose(EARLY, None, jitted)[0]
    for found in ((eager.draft, jitted.draft), (proposal, wanted)):
        for mine, other in zip(*map(jax.tree.leaves, found), strict=True):
            np.testing.assert_allclose(mine, other, atol=TOLERANCE, rtol=TOLERANCE)


def test_rows_that_are_done_neither_count_nor_keep_a_draft_going():
    state = start()
    token, confidence = exits(texts(state))

    def begun_without(done):
        return begin(EARLY, None, dataclasses.replace(state, done=state.done.at[done].set(True)))

    for done in range(3):
        places = [(r, i, token[2, r, i]) for r in range(3) if r != done for i in range(LENGTHS[r] - 1)]
        counts = as_numpy(begun_without(done).draft.counts)
        np.testing.assert_allclose(counts, counted(token, confidence, places), atol=1e-4)

    last = np.array([confidence[0, row, length - 1] for row, length in enumerate(LENGTHS)])
    second, sure = np.argsort(last)[-2:]
    # Counts by which the first exit drafts all it may, and a threshold that only the most confident row passes.
    threshold = (last[sure] + last[second]) / 2
    counts = np.array([[9.0, 0.0], [1.0, 9.0], [9 * threshold, 0.0], [threshold, 9.0]])
    assert chosen(counts) == (1, MAX_TOKENS, pytest.approx(threshold))
    drafts = []
    without = begun_without(int(sure))
    for begun in (without, dataclasses.replace(without, done=state.done)):
        draft = dataclasses.replace(begun.draft, counts=ExitCounts(*map(jnp.float32, counts)))
        proposal, _ = propose(EARLY, None, dataclasses.replace(begun, draft=draft))
        drafts.append(int(proposal.is_candidate[0].sum()))
        assert int(proposal.num_draft_forwards) == int(proposal.layers_run) == drafts[-1] + 1
    assert drafts[0] == 0 < drafts[1]


def test_every_round_equals_numpy():
    """The choice, the drafts, where they end, the layers run, the tokens accepted, and the counts afterwards.

    The first counts are such that the second exit is chosen at first.
    """
    state = decode(EARLY, None, start(), 0)
    first = [[1.0, 6.0], [8.0, 0.5], [0.5, 5.0], [4.0, 0.2]]
    state = dataclasses.replace(
        state, draft=dataclasses.replace(state.draft, counts=ExitCounts(*map(jnp.asarray, first)))
    )
    choices, ended_early, all_accepted = set(), 0, 0
    while not np.all(state.done):
        before, done = texts(state), np.asarray(state.done)
        counts, round_ = as_numpy(state.draft.counts), int(state.draft.round)
        forwards = int(state.counts.num_draft_forwards)
        batch, of_rows = int(state.layer_counts.batch), np.asarray(state.layer_counts.row)
        layer, length, threshold = chosen(counts)
        drafted, drafts = drafted_tokens(before, done, layer, length, threshold)
        state = decode(EARLY, None, state, 1)
        assert int(state.counts.num_draft_forwards) - forwards == drafted + 1
        layers = (drafted + 1) * layer + LAYERS - layer
        assert int(state.layer_counts.batch) - batch == layers
        np.testing.assert_array_equal(np.asarray(state.layer_counts.row) - of_rows, np.where(done, 0, layers))
        after, places = texts(state), []
        token, confidence = exits(after)
        for row in np.flatnonzero(~done):
            old, new, draft = len(before[row]), len(after[row]), drafts[row]
            right = [after[row][i] == draft[i] for i in range(old, min(new, old + drafted))]
            assert all(right[:-1]) and (new - old <= drafted + 1)
            all_accepted += new - old == drafted + 1 > 1
            places += [(row, place - 1, after[row][place]) for place in range(old, new)]
        new_counts = counts if round_ % 2 else DECAY * counts + counted(token, confidence, places)
        np.testing.assert_allclose(as_numpy(state.draft.counts), new_counts, atol=1e-3)
        choices.add((layer, length))
        ended_early += drafted < length
    assert {layer for layer, _ in choices} == {1, 2} and len(choices) > 2  # all of these cases occur
    assert ended_early and all_accepted
    assert_same(state, plain_decode(EARLY, start()))


def test_penalties_count_the_draft_s_own_tokens():
    """In the draft, and in the counts of the exits afterwards, where the tokens that the round emitted count."""
    begun = begin(EARLY, None, start())
    # Counts by which the first exit drafts all it may, without a threshold.
    counts = np.array([[9.0, 0.0], [0.0, 9.0], [9.0, 0.0], [0.0, 9.0]])
    assert chosen(counts) == (1, MAX_TOKENS, 0.0)
    draft = dataclasses.replace(begun.draft, counts=ExitCounts(*map(jnp.float32, counts)))
    state = with_penalties(dataclasses.replace(begun, draft=draft))
    before = texts(state)
    proposal, _ = propose(EARLY, None, state)
    wanted = penalised_drafts(lambda rows: forward(EARLY, padded(rows))[0], before, MAX_TOKENS)
    np.testing.assert_array_equal(proposal.token[:, 1:], wanted)

    state = decode(EARLY, None, state, 1)
    after = texts(state)
    logits, confidence = np.asarray(forward(EARLY, padded(after)), np.float64), exits(after)[1]
    kinds = []
    for counts_emitted in (True, False):
        token = np.zeros(logits.shape[:3], int)
        places = [(r, i - 1, after[r][i]) for r in range(3) for i in range(LENGTHS[r], len(after[r]))]
        for row, place, _ in places:
            output = after[row][LENGTHS[row] : place + 1] if counts_emitted else ()
            for layer in range(LAYERS - 1):
                token[layer, row, place] = np.argmax(penalised(logits[layer, row, place], before[row], output, row))
        kinds.append(DECAY * counts + counted(token, confidence, places))
    np.testing.assert_allclose(as_numpy(state.draft.counts), kinds[0], atol=1e-3)
    assert np.max(np.abs(kinds[0] - kinds[1])) > 0.5


@pytest.mark.parametrize(
    ("second", "third", "right", "wanted"),
    [
        (0.0, 0.0, (0.0, 0.0), lambda layer, length: (layer, length) == (1, MAX_TOKENS)),
        (3.0, 0.0, (1.0, 0.0), lambda layer, length: layer == 2 and length > 0),
        (0.0, 30.0, (1.0, 1.0), lambda layer, length: length == 0),
    ],
)
def test_the_choice_converges_to_the_best_exit(second, third, right, wanted):
    """The first exit where it is always right, the second where only that one is, no draft where none is.

    Each run begins with counts that suggest the contrary.
    """
    params = with_strengths(second, third)
    state = decode(params, None, start(params=params), 0)
    right = jnp.asarray(right)
    misleading = ExitCounts(3 * right, 3 * (1 - right), 2 * right, 1 - right)
    state = dataclasses.replace(state, draft=dataclasses.replace(state.draft, counts=misleading))
    assert not wanted(*chosen(as_numpy(misleading))[:2])
    state = decode(params, None, state)
    assert_same(state, plain_decode(params, start(params=params)))
    assert wanted(*chosen(as_numpy(state.draft.counts))[:2])


def test_counts_of_nothing():
    counts = ExitCounts.zero(2)
    np.testing.assert_array_equal(counts.agreement(), [UNSEEN, UNSEEN])
    np.testing.assert_array_equal(counts.threshold(), [0.0, 0.0])


def test_bad_input():
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        DynamicExit(MODEL, 0)
    with pytest.raises(ValueError, match=r"every must be at least 1 .*, got 0"):
        DynamicExit(MODEL, every=0)
    with pytest.raises(ValueError, match="needs a model of at least 2 layers"):
        DynamicExit(Model(dataclasses.replace(MODEL.config, blocks=BLOCKS[:1])))
    with pytest.raises(ValueError, match="must be the target's own"):
        DRAFTER.check(TWO_LAYERS, None)
