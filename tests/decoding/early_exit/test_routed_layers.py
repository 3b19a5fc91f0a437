"""Layer gates decide a row's layers once, from its prompt by the formula, and decoding keeps them to its end."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.decoding.drafters import NoDraft
from decodax.decoding.early_exit import RoutedLayers
from decodax.decoding.speculative_decoding import speculative
from decodax.decoding.verifiers import ExactMatch
from tests.decoding.early_exit.deep import DEEP, PARAMS, WIDTH, L, assert_follows, read, start
from tests.odd_drafters import RandomTrees
from tests.speculation import LENGTHS, NEW, padded, texts

ALONE = NoDraft()
POLICY = RoutedLayers(kept_first=0)
FIRST_CHUNK = 4
LAYER_GATES = {
    "weight": jax.random.normal(jax.random.key(8), (L, WIDTH)),
    "bias": jnp.array([0.3, -0.2, 0.1, 0.4]),
}
ROUTED = PARAMS | {"layer_gates": LAYER_GATES}


@cache
def decode(drafter=ALONE):
    return jax.jit(speculative(DEEP, drafter, ExactMatch(), POLICY))


@cache
def decoded():
    return decode()(ROUTED, None, start(POLICY, ROUTED))


def layers_in_row(runs):
    return lambda row, place: np.flatnonzero(runs[row])


def decisions(state, first_chunk=512):
    """The layers each row should run: the formula in float64, on the layers' inputs in a forward without caches."""
    runs = np.asarray(state.layer_policy)
    _, inputs = read(PARAMS, texts(state), layers_in_row(runs))
    wanted = np.ones((3, L), bool)
    for row, length in enumerate(LENGTHS):
        for index in range(L - 1):  # the last layer always runs
            chances = []
            for hidden in inputs[row, : min(length - 1, first_chunk), index].astype(np.float64):
                hidden = hidden / np.sqrt(np.mean(hidden**2))
                score = np.dot(np.asarray(LAYER_GATES["weight"][index], np.float64), hidden)
                chances.append(1 / (1 + np.exp(-score - float(LAYER_GATES["bias"][index]))))
            wanted[row, index] = not chances or np.mean(chances) <= 0.5
    return wanted


def test_decisions_are_those_of_the_formula_and_decoding_follows_them():
    state = decoded()
    runs = np.asarray(state.layer_policy)
    np.testing.assert_array_equal(runs, decisions(state))
    assert len({tuple(row) for row in runs}) == 3 and runs[2].all()  # rows differ; one token of prompt decides nothing
    np.testing.assert_array_equal(start(POLICY, ROUTED).layer_policy, runs)
    assert_follows(PARAMS, texts(state), layers_in_row(runs))


def test_layers_are_counted():
    state = decoded()
    runs = np.asarray(state.layer_policy)
    np.testing.assert_array_equal(state.layer_counts.row, runs.sum(axis=1) * NEW)
    steps = (runs[step < NEW].any(axis=0).sum() for step in range(max(NEW)))
    assert int(state.layer_counts.batch) == sum(steps)


def test_a_later_chunk_of_the_prompt_follows_the_first(monkeypatch):
    monkeypatch.setattr("decodax.decoding.chunked_prefill.MAX_CHUNK_TOKENS", FIRST_CHUNK)
    state = start(POLICY, ROUTED)
    assert int(state.num_target_forwards) == 3
    state = decode()(ROUTED, None, state)
    runs = np.asarray(state.layer_policy)
    np.testing.assert_array_equal(runs, decisions(state, FIRST_CHUNK))
    assert np.any(runs != decisions(state))  # a decision on the whole prompt would differ
    assert_follows(PARAMS, texts(state), layers_in_row(runs))


def test_a_first_chunk_of_more_tokens_decides_as_a_small_one(monkeypatch):
    """As where a prompt's tokens are split over devices, each of which has a chunk."""
    monkeypatch.setattr("decodax.decoding.early_exit.routed_layers.DECIDING_TOKENS", FIRST_CHUNK)
    state = start(RoutedLayers(0.5 - 1e-9, kept_first=0), ROUTED)  # another policy than that of compiled programs
    assert int(state.num_target_forwards) == 1
    state = decode()(ROUTED, None, state)
    np.testing.assert_array_equal(state.layer_policy, decisions(state, FIRST_CHUNK))
    assert np.any(np.asarray(state.layer_policy) != decisions(state))


def test_a_draft_changes_no_token():
    wanted = decoded()
    state = decode(RandomTrees())(ROUTED, padded(texts(wanted), 48), start(POLICY, ROUTED))
    for got, want in zip(texts(state), texts(wanted), strict=True):
        np.testing.assert_array_equal(got, want)
    assert int(state.num_target_forwards) < int(wanted.num_target_forwards)


def test_a_skipped_layer_leaves_no_trace():
    """Where every row skips a layer, nothing of it is computed: its weights may be anything."""
    skipping = PARAMS | {"layer_gates": {"weight": jnp.zeros((L, WIDTH)), "bias": jnp.array([-9.0, 9.0, -9.0, -9.0])}}
    poisoned = skipping | {"blocks_1": jax.tree.map(lambda leaf: leaf * jnp.nan, PARAMS["blocks_1"])}
    rows = [0, 1, 0]  # the third, whose prompt decides nothing, would run it
    want, got = (decode()(params, None, start(POLICY, params, rows)) for params in (skipping, poisoned))
    assert not np.any(got.failed)
    np.testing.assert_array_equal(got.layer_policy, [[True, False, True, True]] * 3)
    np.testing.assert_array_equal(got.tokens, want.tokens)


@pytest.mark.parametrize(
    "layer_gates",
    [
        None,
        {},
        {"weight": jnp.zeros((L, WIDTH))},
        {"weight": jnp.zeros((L - 1, WIDTH)), "bias": jnp.zeros(L - 1)},
        {"weight": jnp.zeros((L, WIDTH)), "bias": jnp.zeros((L, 1))},
    ],
)
def test_layer_gates_that_do_not_fit_are_refused(layer_gates):
    params = PARAMS if layer_gates is None else PARAMS | {"layer_gates": layer_gates}
    with pytest.raises(
        ValueError, match=r"must hold weight \(4, 23\) and bias \(4,\), got .*decodax train first_gates"
    ):
        start(POLICY, params)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threshold": 1.1}, "threshold must be in 0..1"),
        ({"threshold": -0.1}, "threshold must be in 0..1"),
        ({"kept_first": -1}, "kept layers must be 0 or more, got -1 first"),
        ({"kept_last": -2}, "and -2 last"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RoutedLayers(**fields)
