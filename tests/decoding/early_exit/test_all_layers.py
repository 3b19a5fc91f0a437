"""One layer runs for the active tokens only; and all layers run, from the layer where a drafter stopped."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.decoding.early_exit import AllLayers, run_layer
from decodax.decoding.speculative_decoding import speculative
from decodax.decoding.verifiers import ExactMatch
from decodax.layers.kv_cache.staged import place
from tests.odd_drafters import ShallowExit
from tests.speculation import MODEL, PARAMS, TOLERANCE, assert_same, plain, start

L = MODEL.config.num_layers
POISONED = PARAMS | {"blocks_1": jax.tree.map(lambda leaf: leaf * jnp.nan, PARAMS["blocks_1"])}


@jax.jit
def layer_one(params, hidden, position, caches, active, otherwise):
    """Layer 1 with a cache update given for when it does not run, and with none given."""
    call = (MODEL, params, 1, hidden, position, caches, None, active)
    return run_layer(*call, otherwise=otherwise), run_layer(*call)


@pytest.fixture(scope="module")
def middle():
    """Layer 1 after the three prompts: hidden states, positions, caches, a distinct cache update, and outputs."""
    state = start()
    position = state.length[:, None] - 1 + jnp.arange(2, dtype=jnp.int32)[None]
    hidden = jax.random.normal(jax.random.key(3), (3, 2, MODEL.config.hidden_size))
    otherwise = jax.tree.map(lambda leaf: leaf + 7, MODEL.empty_update(3, 2, jnp.float32)[1])
    out = jax.jit(lambda *inputs: MODEL.apply(PARAMS, *inputs, layers=(1, 2)))(hidden, position, state.caches)
    return hidden, position, state.caches, otherwise, out


@pytest.mark.parametrize("active", [[[1, 0], [0, 0], [0, 1]], [[1], [0], [1]]])
def test_a_layer_changes_the_tokens_that_are_active(middle, active):
    hidden, position, caches, otherwise, out = middle
    active = jnp.array(active, bool)
    for new, rows, ran in layer_one(PARAMS, hidden, position, caches, active, otherwise):
        assert bool(ran)
        np.testing.assert_allclose(new, np.where(active[..., None], out.hidden, hidden), atol=TOLERANCE)
        np.testing.assert_allclose(rows.key, out.cache_updates[0].key, atol=TOLERANCE)
    for new, _, _ in layer_one(POISONED, hidden, position, caches, active, otherwise):
        np.testing.assert_array_equal(np.isnan(new).any(axis=2), np.broadcast_to(active, (3, 2)))


@pytest.mark.parametrize("active", [[[0, 0]] * 3, [[0], [0], [0]]])
def test_a_layer_without_active_tokens_is_not_computed(middle, active):
    hidden, position, caches, otherwise, _ = middle
    given, not_given = layer_one(POISONED, hidden, position, caches, jnp.array(active, bool), otherwise)
    for (new, rows, ran), number in ((given, 7), (not_given, 0)):
        assert not ran
        np.testing.assert_array_equal(new, hidden)
        np.testing.assert_array_equal(rows.key, np.full(rows.key.shape, number))
        np.testing.assert_array_equal(rows.value, np.full(rows.value.shape, number))


def test_one_flag_for_all_tokens(middle):
    hidden, position, caches, otherwise, out = middle
    new, _, ran = layer_one(PARAMS, hidden, position, caches, jnp.array(True), otherwise)[0]
    assert bool(ran)
    np.testing.assert_allclose(new, out.hidden, atol=TOLERANCE)


@dataclass(frozen=True)
class SometimesExit(ShallowExit):
    """A drafter that decides at run time: in every other round it has run the first layer, else none."""

    def propose(self, params, draft_params, state):
        proposal, draft = super().propose(params, draft_params, state)
        updates = MODEL.empty_update(*proposal.token.shape, jnp.float32)
        updates = place((updates[0],), proposal.cache_updates, jnp.arange(self.num_nodes)) + updates[1:]
        has_run = state.num_target_forwards % 2
        hidden = jnp.where(has_run > 0, proposal.hidden, MODEL.embed(params, proposal.token, proposal.token * 0))
        return dataclasses.replace(proposal, hidden=hidden, cache_updates=updates, first_layer=has_run), draft


def test_the_target_continues_at_the_layer_where_the_drafter_stopped():
    begun = start()
    decode = jax.jit(speculative(MODEL, SometimesExit(), ExactMatch()))
    state = decode(PARAMS, None, begun)
    assert_same(state, plain())
    first, last = int(begun.num_target_forwards), int(state.num_target_forwards)
    assert int(state.layer_counts.batch) == sum(L - number % 2 for number in range(first, last))


def test_the_result_does_not_depend_on_the_split_of_layers():
    state = dataclasses.replace(start(), num_target_forwards=jnp.int32(1))

    def reached(drafter, state):
        proposal = drafter.propose(PARAMS, None, state)[0]
        position = state.length[:, None] - 1 + jnp.asarray(proposal.tree.depth)
        return AllLayers().forward(MODEL, PARAMS, state, proposal, position, (2,))

    drafters = (ShallowExit(num_nodes=2, max_depth=1), SometimesExit(num_nodes=2, max_depth=1))
    fixed, dynamic = jax.jit(lambda state: [reached(drafter, state) for drafter in drafters])(state)
    assert int(fixed.layers_run) == int(dynamic.layers_run) == L - 1
    np.testing.assert_array_equal(dynamic.row_layers, [L - 1] * 3)
    for got, want in zip(jax.tree.leaves(dynamic.forward), jax.tree.leaves(fixed.forward), strict=True):
        np.testing.assert_allclose(got, want, atol=TOLERANCE)
