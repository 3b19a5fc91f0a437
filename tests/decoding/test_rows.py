"""Rows repeated after one prefill are those of prompts that were each prefilled, for every kind of model and cache."""

import dataclasses

import jax
import numpy as np
import pytest

from decodax import decoding
from decodax.decoding.rows import repeat_rows
from decodax.decoding.sampling import Sampling
from tests.model_kinds import LAYERS, LENGTHS, NEW, NO_STOPS, PROMPTS, VOCABULARY, model_of, params_of
from tests.speculation import assert_same_caches

SEEDS = np.arange(6, dtype=np.uint32) + 3
OPTIONS = {"temperature": [0.0, 0.7, 1.3], "frequency_penalty": [0.5, 0.0, 0.2], "min_new_tokens": 2}


def start(kind, rows, seeds):
    per_row = {name: np.asarray(value)[rows] if np.ndim(value) else value for name, value in OPTIONS.items()}
    sampling = Sampling.create(len(rows), VOCABULARY, end_token_ids=(1,), **per_row)
    return decoding.prefill(
        model_of(kind), params_of(kind), PROMPTS[rows], LENGTHS[rows], NEW[rows], seeds, sampling=sampling,
        stop_token_ids=NO_STOPS,
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
