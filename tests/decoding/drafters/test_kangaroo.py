"""Kangaroo: drafts against forwards over whole texts, layers counted by hand, output and caches of plain decoding."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax import decoding
from decodax.decoding import chunked_prefill
from decodax.decoding.drafters import Kangaroo
from decodax.decoding.early_exit import AllLayers
from decodax.decoding.training.kangaroo import initial_adapter
from decodax.decoding.verifiers import ExactMatch
from decodax.models.head import HeadConfig
from decodax.models.model import Model
from tests.speculation import (
    LENGTHS,
    MODEL,
    NEW,
    PARAMS,
    TOLERANCE,
    assert_same,
    forward,
    padded,
    penalised_drafts,
    plain,
    plain_decode,
    start,
    texts,
    with_penalties,
)

ADAPTER = {"adapter": initial_adapter(MODEL, PARAMS, 1)}
MOST = 3
SOMETIMES = 0.13  # the adapter is more confident than this of about half of its tokens
ALL_TOKENS = 1000


@cache
def compiled(confidence=SOMETIMES):
    """The loop, so that all runs in one shape of buffers share it."""
    decode = decoding.speculative(MODEL, Kangaroo(MODEL, 1, MOST, confidence), ExactMatch())
    return jax.jit(decode, donate_argnums=2)


begin = jax.jit(decoding.speculative(MODEL, Kangaroo(MODEL, 1, MOST), ExactMatch()).start)  # whatever the confidence


def run(options="greedy", *, confidence=SOMETIMES, blocks=(ALL_TOKENS,), rows=slice(None), **changes):
    decode = compiled(confidence)
    state = begin(PARAMS, ADAPTER, start(rows, options=options, **changes))
    for max_tokens in blocks:
        state = decode(PARAMS, ADAPTER, state, max_tokens)
    return state


ended = cache(run)


@jax.jit
def exit_of(tokens):
    """The target's captured states, the adapter's cache update and its logits over whole texts, without any cache."""
    out, _ = forward(PARAMS, tokens)
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    normed, update = Kangaroo(MODEL, 1).adapter.apply(ADAPTER["adapter"], out.captured[1], position)
    return out.captured, update, MODEL.read_out(PARAMS, normed)


def assert_adapter_cache(state, cache_):
    """It holds every token of a text but the last one, as one forward computes them, and nothing after them."""
    update = exit_of(padded(texts(state)))[1]
    np.testing.assert_array_equal(cache_.length, np.asarray(state.length) - 1)
    for row, length in enumerate(np.asarray(state.length) - 1):
        for got, want in ((cache_.key, update.key), (cache_.value, update.value)):
            np.testing.assert_allclose(got[row, :, :length], want[row, :, :length], atol=TOLERANCE)
            assert not np.any(got[row, :, length:])


def test_output_and_caches_are_those_of_plain_decoding():
    state = ended()
    assert_same(state, plain())
    assert_adapter_cache(state, state.draft)
    assert int(state.num_target_forwards) < int(plain().num_target_forwards)
    assert np.asarray(state.counts.accepted)[1] > 0  # beyond the first drafted token


def test_a_row_beside_itself_runs_the_layers_that_it_needs_in_any_batch():
    for row in range(3):
        same = run(rows=[row] * 3)
        needed = ended().layer_counts.row[row]
        assert int(same.layer_counts.batch) == int(needed)
        np.testing.assert_array_equal(same.layer_counts.row, [needed] * 3)


def test_stops_inside_a_draft_leave_no_later_token_in_a_cache():
    """Wherever a stop cuts a draft, no cache holds a token accepted after it."""
    output = texts(plain())[2][LENGTHS[2] :]
    for place in (5, 8, 11, 14):
        stops = (int(output[place]), -1)
        state = run(stop_token_ids=stops)
        assert_same(state, plain_decode(PARAMS, start(stop_token_ids=stops)))
        assert_adapter_cache(state, state.draft)


def test_prefill_in_many_chunks_gives_the_same_cache(monkeypatch):
    monkeypatch.setattr(chunked_prefill, "DRAFT_CHUNK_TOKENS", 5)  # neither buffer nor prompts are multiples of it
    state = start()
    cache_ = jax.jit(Kangaroo(MODEL, 1).start)(PARAMS, ADAPTER, state)
    assert_adapter_cache(state, cache_)


def expected_draft(text):
    """One row's draft in plain Python, from whole texts: its tokens; all hidden states of what was run."""
    drafted, unsure = [], False
    while len(drafted) < MOST and not unsure:
        logits = np.asarray(exit_of(padded([[*text, *drafted]]))[2], np.float64)[0, len(text) + len(drafted) - 1]
        weights = np.exp(logits - logits.max())
        drafted.append(int(np.argmax(logits)))
        unsure = weights.max() / weights.sum() < SOMETIMES
    captured = exit_of(padded([[*text, *drafted]]))[0]
    return drafted, [np.asarray(captured[layer])[0, len(text) - 1 : len(text) + len(drafted)] for layer in (1, 2)]


@jax.jit
def proposed(state):
    """The proposal, and the target's forward through the remaining layers."""
    proposal, _ = Kangaroo(MODEL, 1, MOST, SOMETIMES).propose(PARAMS, ADAPTER, state)
    position = state.length[:, None] - 1 + jnp.arange(MOST + 1)[None, :]
    return proposal, AllLayers().forward(MODEL, PARAMS, state, proposal, position, ())


def test_drafts_end_when_unsure_and_no_layer_runs_twice():
    met = set()
    at = [
        ((), NEW),
        ((1,), NEW),
        ((1, 1), NEW),
        ((26,), NEW),
        ((8,), np.array([3, 24, 33])),
    ]  # in the last a row is done
    for blocks, new in at:
        state = run(blocks=blocks, new=new)
        proposal, reached = proposed(state)
        deep = np.asarray(reached.forward.hidden)
        assert int(reached.layers_run) == proposal.layers_run + 1 and np.isfinite(deep).all()
        runs = []
        for row, text in enumerate(texts(state)):
            drafted, (shallow, whole) = ([], ([], [])) if state.done[row] else expected_draft(text)
            runs.append(len(shallow))
            is_drafted = (np.arange(MOST + 1) > 0) & (np.arange(MOST + 1) <= len(drafted))
            np.testing.assert_array_equal(proposal.is_candidate[row], is_drafted)
            np.testing.assert_array_equal(proposal.token[row][: len(drafted) + 1], [text[-1], *drafted])
            if runs[-1]:
                np.testing.assert_allclose(proposal.hidden[row, : runs[-1]], shallow, atol=TOLERANCE)
                np.testing.assert_allclose(deep[row, : runs[-1]], whole, atol=TOLERANCE)
        np.testing.assert_array_equal(proposal.row_layers, runs)
        assert int(proposal.num_draft_forwards) == int(proposal.layers_run) == max(runs)
        assert not np.any(proposal.hidden[:, max(runs) :])
        met |= set(runs)
    assert met == {0, 2, 3, 4}


def test_penalties_count_the_draft_s_own_tokens():
    state = with_penalties(begin(PARAMS, ADAPTER, start()))
    proposal, _ = jax.jit(Kangaroo(MODEL, 1, MOST, confidence=0.0).propose)(PARAMS, ADAPTER, state)
    wanted = penalised_drafts(lambda rows: exit_of(padded(rows))[2], texts(state), MOST)
    np.testing.assert_array_equal(proposal.token[:, 1:], wanted)


@pytest.mark.parametrize(("confidence", "drafted"), [pytest.param(1.0, 1, marks=pytest.mark.slow), (0.0, MOST)])
def test_layers_are_counted_exactly_at_the_extremes(confidence, drafted):
    """Never sure: one token per draft. Always: as many as there may be. One layer for each and for the last one."""
    state = run(confidence=confidence)
    assert_same(state, plain())
    rounds, row_rounds = int(state.num_target_forwards) - 1, int(state.counts.accepted_lengths.sum())
    assert int(state.counts.num_draft_forwards) == (1 + drafted) * rounds
    assert int(state.layer_counts.batch) == 1 * (1 + drafted) * rounds + (2 - 1) * rounds
    assert int(state.layer_counts.row.sum()) == 1 * (1 + drafted) * row_rounds + (2 - 1) * row_rounds
    assert int(state.counts.proposed[0]) == row_rounds
    assert (np.asarray(state.counts.proposed)[1:] > 0).all() == (drafted > 1)


def test_ending_when_unsure_gives_more_tokens_per_layer_than_drafts_of_full_length():
    def per_layer(state):
        return NEW.sum() / int(state.layer_counts.row.sum())

    assert per_layer(ended()) > per_layer(run(confidence=0.0))


@pytest.mark.slow
def test_jitted_equals_eager():
    state = run(blocks=())
    eager, _ = Kangaroo(MODEL, 1, MOST, SOMETIMES).propose(PARAMS, ADAPTER, state)
    for mine, other in zip(jax.tree.leaves(eager), jax.tree.leaves(proposed(state)[0]), strict=True):
        np.testing.assert_allclose(mine, other, atol=TOLERANCE)


def test_what_does_not_fit_is_refused():
    for exit_layer in (0, 2, -1):
        with pytest.raises(ValueError, match=rf"exit_layer must be in 1\.\.1 .* got {exit_layer}"):
            Kangaroo(MODEL, exit_layer)
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        Kangaroo(MODEL, 1, 0)
    with pytest.raises(ValueError, match=r"probability in 0\.\.1, got 1.5"):
        Kangaroo(MODEL, 1, confidence=1.5)
    drafter, other = Kangaroo(MODEL, 1), Model(dataclasses.replace(MODEL.config, head=HeadConfig()))
    drafter.check(MODEL, ADAPTER)
    with pytest.raises(ValueError, match="must be the target's own"):
        drafter.check(other, ADAPTER)
    for adapter in (None, {}, ADAPTER["adapter"]):
        with pytest.raises(ValueError, match="decodax train kangaroo"):
            drafter.check(MODEL, adapter)
    norm = {"weight": jnp.ones(22)}
    with pytest.raises(ValueError, match=r"mixer_norm.weight must have shape \(23,\), got \(22,\)"):
        drafter.check(MODEL, {"adapter": ADAPTER["adapter"] | {"mixer_norm": norm}})
    with pytest.raises(ValueError, match=r"post_norm.weight must have shape none, got \(22,\)"):
        drafter.check(MODEL, {"adapter": ADAPTER["adapter"] | {"post_norm": norm}})
