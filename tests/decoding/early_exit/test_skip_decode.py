"""SkipDecode runs fewer layers for later tokens, by its schedule, and tokens attend only to what was computed."""

import dataclasses
from functools import cache
from math import ceil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.decoding.drafters import NoDraft
from decodax.decoding.early_exit import SkipDecode
from decodax.decoding.speculative_decoding import speculative
from decodax.decoding.verifiers import ExactMatch
from tests.decoding.early_exit.deep import DEEP, PARAMS, L, assert_follows, read, start
from tests.odd_drafters import RandomTrees, ShallowExit
from tests.speculation import LENGTHS, MODEL, NEW, padded, texts
from tests.speculation import PARAMS as SMALL_PARAMS
from tests.speculation import start as small_start

ALONE = NoDraft()
FALLING = SkipDecode(max_layers=4, min_layers=2, decay_tokens=7)
LOW = SkipDecode(max_layers=3, min_layers=2, decay_tokens=5, warmup=0)


def layers(layer_policy, total, new_tokens):
    """The layers of the token that is run after `new_tokens` new ones, by the paper."""
    share = min(new_tokens / layer_policy.decay_tokens, 1)
    count = ceil(layer_policy.max_layers - share * (layer_policy.max_layers - layer_policy.min_layers) - 1e-9)
    return {*range(layer_policy.warmup), *range(total - count + layer_policy.warmup, total)}


def layers_in_row(layer_policy):
    """For `deep.read`: the prompt's last token is the first one run after it."""
    return lambda row, place: layers(layer_policy, L, max(0, place + 1 - LENGTHS[row]))


def counts(layer_policy, new):
    """Layers of a row that generated `new` tokens, one at a time."""
    return sum(len(layers(layer_policy, L, count)) for count in range(new))


@cache
def decode(layer_policy, drafter=ALONE):
    return jax.jit(speculative(DEEP, drafter, ExactMatch(), layer_policy))


@cache
def decoded(layer_policy):
    return decode(layer_policy)(PARAMS, None, start(layer_policy))


@pytest.mark.parametrize(
    ("total", "layer_policy"),
    [
        (4, FALLING),
        (4, LOW),
        (8, SkipDecode(8, 3, 11, 2)),
        (24, SkipDecode(21, 5, 300, 3)),
        (5, SkipDecode(5, 2, 1)),
        (2, SkipDecode(2, 2, 3)),
    ],
)
def test_every_layer_that_a_token_needs_was_run_for_all_before_it(total, layer_policy):
    steps = np.arange(2 * layer_policy.decay_tokens + 3, dtype=np.int32)
    number = layer_policy.num_layers(jnp.asarray(steps))
    active = [layer_policy.active(index, total, number) for index in range(total)]
    run = np.stack([np.broadcast_to(np.asarray(which), steps.shape) for which in active], axis=1)
    for step in steps:
        assert set(np.flatnonzero(run[step])) == layers(layer_policy, total, int(step))
    assert not np.any(run[1:] & ~run[:-1])  # what is needed later is among what is written now
    prompt = [
        layer_policy.active(index, total, jnp.int32(layer_policy.max_layers)) is not False for index in range(total)
    ]
    np.testing.assert_array_equal(run[0], prompt)
    assert run[0].sum() == layer_policy.max_layers and run[-1].sum() == layer_policy.min_layers


@pytest.mark.parametrize("layer_policy", [FALLING, LOW])
@pytest.mark.quick_cases(1)
def test_tokens_are_those_of_forwards_over_the_whole_text(layer_policy):
    state = decoded(layer_policy)
    assert_follows(PARAMS, texts(state), layers_in_row(layer_policy))
    full = read(PARAMS, texts(state), lambda row, place: range(L))[0]
    assert not all(
        np.array_equal(text[LENGTHS[row] :], full[row, LENGTHS[row] - 1 : len(text) - 1])
        for row, text in enumerate(texts(state))
    )  # leaving out layers does change something here


@pytest.mark.parametrize("layer_policy", [FALLING, LOW])
def test_layers_are_counted(layer_policy):
    state = decoded(layer_policy)
    np.testing.assert_array_equal(state.layer_counts.row, [counts(layer_policy, new) for new in NEW])
    assert int(state.layer_counts.batch) == counts(layer_policy, max(NEW))  # rows started together


def test_a_draft_changes_no_token_though_its_nodes_differ_in_depth():
    wanted = decoded(FALLING)
    state = decode(FALLING, RandomTrees())(PARAMS, padded(texts(wanted), 48), start(FALLING))
    for got, want in zip(texts(state), texts(wanted), strict=True):
        np.testing.assert_array_equal(got, want)
    assert int(state.num_target_forwards) < int(wanted.num_target_forwards)
    assert np.all(np.asarray(state.layer_counts.row) <= int(state.layer_counts.batch))
    for cache_, want in zip(state.caches, wanted.caches, strict=True):
        np.testing.assert_array_equal(cache_.length, want.length)


@pytest.mark.parametrize("far", [0, 2])
def test_a_layer_runs_if_any_row_that_is_not_done_needs_it(far):
    state = start(FALLING)
    history = dataclasses.replace(state.history, num_new_tokens=jnp.full(3, 50, jnp.int32).at[far].set(0))
    state = dataclasses.replace(state, history=history, limit=state.length + 1)  # one round
    after = decode(FALLING)(PARAMS, None, state)
    row = np.full(3, 2)
    row[far] = 4
    np.testing.assert_array_equal(after.layer_counts.row, row)
    assert int(after.layer_counts.batch) == 4
    done = dataclasses.replace(state, done=state.done.at[far].set(True))
    after = decode(FALLING)(PARAMS, None, done)
    row[far] = 0
    np.testing.assert_array_equal(after.layer_counts.row, row)
    assert int(after.layer_counts.batch) == 2


def test_layers_that_are_never_run_are_not_computed():
    """With three of four layers and none to warm up, the first is never run, neither for the prompt nor later."""
    poisoned = PARAMS | {"blocks_0": jax.tree.map(lambda leaf: leaf * jnp.nan, PARAMS["blocks_0"])}
    state = decode(LOW)(poisoned, None, start(LOW, poisoned))
    assert not np.any(state.failed)
    for got, want in zip(texts(state), texts(decoded(LOW)), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "fields",
    [
        {"min_layers": 5},
        {"min_layers": 1},
        {"min_layers": 0, "warmup": 0},
        {"warmup": -1},
        {"warmup": 4},
    ],
)
def test_bad_schedules_are_refused(fields):
    with pytest.raises(ValueError, match="0 <= warmup < min_layers <= max_layers, got"):
        dataclasses.replace(FALLING, **fields)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="decay_tokens must be at least 1"):
        dataclasses.replace(FALLING, decay_tokens=0)
    with pytest.raises(ValueError, match="max_layers must be at most 2"):
        small_start(layer_policy=FALLING)
    whole = SkipDecode(max_layers=2, min_layers=2, decay_tokens=5)
    with pytest.raises(ValueError, match="a drafter that runs none of the target's own"):
        jax.eval_shape(speculative(MODEL, ShallowExit(), ExactMatch(), whole), SMALL_PARAMS, None, small_start())
