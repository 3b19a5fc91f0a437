"""Rows that are repeated, taken and put are those of prompts prefilled so, for every kind of model and cache."""

import dataclasses

import jax
import numpy as np
import pytest

from decodax import decoding
from decodax.decoding.rows import put_rows, put_rows_in_place, repeat_rows, take_rows
from decodax.decoding.sampling import Sampling
from tests.model_kinds import LAYERS, LENGTHS, NEW, NO_STOPS, PROMPTS, VOCABULARY, model_of, params_of
from tests.speculation import assert_same_caches

SEEDS = np.arange(6, dtype=np.uint32) + 3
OPTIONS = {"temperature": [0.0, 0.7, 1.3], "frequency_penalty": [0.5, 0.0, 0.2], "min_new_tokens": 2}


def start(kind, rows, seeds, **options):
    sampling = take_rows(Sampling.create(3, VOCABULARY, end_token_ids=(1,), **OPTIONS), rows)
    return decoding.prefill(
        model_of(kind), params_of(kind), PROMPTS[rows], LENGTHS[rows], NEW[rows], seeds, sampling=sampling,
        stop_token_ids=NO_STOPS, **options,
    )  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.quick_cases(1)
def test_repeated_rows_are_prompts_given_several_times(kind):
    twice = np.repeat(np.arange(3), 2)
    wanted = start(kind, twice, SEEDS)
    got = repeat_rows(start(kind, np.arange(3), SEEDS[::2]), SEEDS, model_of(kind).execution.constrained)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    assert_same_caches(got.caches, wanted.caches, np.arange(6))
    rest = lambda state: jax.tree.leaves(dataclasses.replace(state, caches=()))
    for mine, theirs in zip(rest(got), rest(wanted), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    decode = jax.jit(decoding.autoregressive(model_of(kind)))
    mine, theirs = (decode(params_of(kind), state) for state in (got, wanted))
    np.testing.assert_array_equal(mine.tokens, theirs.tokens)
    assert len({tuple(row) for row in np.asarray(mine.tokens)}) == 5  # only the greedy prompt's samples are equal


def test_what_cannot_be_repeated_is_refused(monkeypatch):
    state = start("moe", np.arange(3), SEEDS[::2])
    execution = model_of("moe").execution
    with pytest.raises(ValueError, match="seed must have one entry for each new row, a multiple of 3 rows, got 4"):
        repeat_rows(state, SEEDS[:4], execution.constrained)
    bare = dataclasses.replace(state, draft=(state.length,))
    with pytest.raises(ValueError, match=r"rows are found by the axis B .*, and DecodeState.draft\[0\] has none"):
        repeat_rows(bare, SEEDS, execution.constrained)
    monkeypatch.setattr("decodax.decoding.rows.free_bytes", lambda: 1000)
    with pytest.raises(MemoryError, match=r"6 samples of 3 prompts need .* bytes, and 1,000 are free: ask for fewer"):
        repeat_rows(state, SEEDS, execution.constrained)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.quick_cases(1)
def test_a_row_that_joins_others_on_their_way_is_the_row_alone(kind):
    """And the others go on as if nothing had happened; the numbers for all rows together are theirs."""
    decode = jax.jit(decoding.autoregressive(model_of(kind)), donate_argnums=1)
    params, whole = params_of(kind), np.arange(3)
    alone = decode(params, start(kind, whole, SEEDS[:3]))
    state = decode(params, start(kind, np.array([1, 1, 2]), SEEDS[[5, 1, 2]]), 7)
    forwards, room = int(state.num_target_forwards), state.tokens.shape[1]
    fresh = start(kind, np.array([0, 0]), SEEDS[[0, 0]], capacity=room)
    state = put_rows_in_place(model_of(kind).execution.constrained, state, np.array([0, 3], np.int32), fresh)
    assert int(state.num_target_forwards) == forwards
    joined = decode(params, state)
    np.testing.assert_array_equal(joined.tokens, alone.tokens)
    np.testing.assert_array_equal(joined.length, alone.length)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.quick_cases(1)
def test_what_is_taken_and_put_back_changes_nothing(kind):
    state = jax.jit(decoding.autoregressive(model_of(kind)))(params_of(kind), start(kind, np.arange(3), SEEDS[:3]), 5)
    rows = np.array([2, 0])
    taken = take_rows(state, rows)
    np.testing.assert_array_equal(taken.tokens, np.asarray(state.tokens)[rows])
    again = put_rows(state, rows, taken)
    for mine, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.quick_cases(1)
def test_rows_are_put_in_place(kind):
    """The program holds no copy of a cache beside the donated ones."""
    state, fresh = (start(kind, rows, SEEDS[: len(rows)]) for rows in (np.array([1, 0, 1]), np.array([0])))
    fresh = start(kind, np.array([0]), SEEDS[:1], capacity=state.tokens.shape[1])
    put = jax.jit(put_rows, donate_argnums=0)
    memory = put.lower(state, np.array([1], np.int32), fresh).compile().memory_analysis()
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(state.caches))
    assert memory.alias_size_in_bytes > 0.9 * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert memory.temp_size_in_bytes < largest


def test_rows_that_do_not_fit_are_refused():
    state = start("moe", np.arange(3), SEEDS[:3])
    short = start("moe", np.array([2]), SEEDS[:1], capacity=state.tokens.shape[1] + 40)
    with pytest.raises(ValueError, match=r"same capacity alone: \.tokens has shape .* pass prefill\(..., capacity="):
        put_rows(state, np.array([0]), short)
    other = dataclasses.replace(take_rows(state, np.array([0])), draft=state.length)
    with pytest.raises(ValueError, match=r"the same model, strategy and options alone, .* \.draft: prefill both"):
        put_rows(state, np.array([0]), other)
    with pytest.raises(ValueError, match=r"capacity must be at least \d+ \(tokens of the longest row"):
        start("moe", np.arange(3), SEEDS[:3], capacity=5)
