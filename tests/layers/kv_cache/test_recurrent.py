"""States of recurrent layers: what is committed, strong decays, and the kernels that run chains."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.layers.attention.mask import Ancestors, Causal
from decodax.layers.execution import Execution
from decodax.layers.kv_cache.full import KVCache
from decodax.layers.kv_cache.recurrent import RecurrentCache, RecurrentUpdate
from decodax.layers.recurrence.block import Past, past_of
from decodax.layers.recurrence.delta import delta_recurrence
from decodax.layers.recurrence.linear import linear_recurrence
from tests.oracles.recurrence import recurrence

BATCH, TOKENS, HEADS, KEY_SIZE, VALUE_SIZE = 3, 71, 2, 5, 7
# Log decays of a token: none, weak, beyond the range of float32 in sum, and forgetting everything.
DECAYS = np.array([0.0, -0.01, -1.0, -50.0, -90.0, -1000.0, -np.inf], np.float32)


def operands(per_channel, num_tokens=TOKENS, batch=BATCH, seed=0):
    random = np.random.default_rng(seed)
    query, key = (random.standard_normal((batch, num_tokens, HEADS, KEY_SIZE)).astype(np.float32) for _ in range(2))
    key /= np.linalg.norm(key, axis=3, keepdims=True)
    value = random.standard_normal((batch, num_tokens, HEADS, VALUE_SIZE)).astype(np.float32)
    chance = [0.3, 0.4, 0.1, 0.05, 0.05, 0.05, 0.05]
    log_decay = random.choice(DECAYS, (batch, num_tokens, HEADS, KEY_SIZE if per_channel else 1), p=chance)
    beta = random.uniform(size=(batch, num_tokens, HEADS)).astype(np.float32)
    state = random.standard_normal((batch, HEADS, KEY_SIZE, VALUE_SIZE)).astype(np.float32)
    return query, key, value, log_decay, beta, state


def past(state):
    cache = RecurrentCache.empty(len(state), state.shape[1:], 0, jnp.float32)
    return Past(dataclasses.replace(cache, state=jnp.asarray(state)), None, None)


def read(kind, mask, position, query, key, value, log_decay, beta, state, execution=None):
    """Outputs, and the cache update to commit."""
    tokens = tuple(map(jnp.asarray, (query, key, value, log_decay)))
    if kind == "delta":
        output, corrected = delta_recurrence(*tokens, jnp.asarray(beta), position, mask, past(state), scale=0.4)
        return output, RecurrentUpdate(tokens[1], corrected, tokens[3])
    options = {"scale": 0.4, "execution": execution or Execution()}
    output = linear_recurrence(*tokens, position, mask, past(state), **options)
    return output, RecurrentUpdate(*tokens[1:])


read_in_jit = jax.jit(read, static_argnums=0)


def chain(num_tokens=TOKENS, batch=BATCH):
    return jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32)[None], (batch, num_tokens))


def want_row(kind, row, count, query, key, value, log_decay, beta, state):
    tokens = (x[row, :count] for x in (query, key, value, log_decay))
    with np.errstate(invalid="raise"):
        return recurrence(*tokens, state[row], scale=0.4, beta=beta[row] if kind == "delta" else None)


# Sums of at most a hundred terms of size 1 in float32; exp of a log decay of up to 10 that counts at all.
CLOSE = {"rtol": 0, "atol": 2e-5}


@pytest.mark.parametrize(("kind", "per_channel"), [("linear", True), ("linear", False), ("delta", False)])
def test_strong_decays_and_the_committed_state(kind, per_channel):
    """Decays of 0, and of which 70 in a row overflow: a chain, the same chain as a tree, and the state after it."""
    arrays = operands(per_channel)
    output, update = read_in_jit(kind, Causal(), chain(), *arrays)
    as_tree = Ancestors(jnp.tril(jnp.ones((1, TOKENS, TOKENS), bool)))
    tree_output, tree_update = read_in_jit(kind, as_tree, chain(), *arrays)
    count = np.array([TOKENS, 0, 40])
    after = past(arrays[-1]).cache.commit(update, jnp.asarray(count, jnp.int32))
    for row in range(BATCH):
        want, added, _ = want_row(kind, row, TOKENS, *arrays)
        np.testing.assert_allclose(output[row], want, **CLOSE)
        np.testing.assert_allclose(tree_output[row], want, **CLOSE)
        np.testing.assert_allclose(tree_update.value[row], added, **CLOSE)
        np.testing.assert_allclose(after.state[row], want_row(kind, row, count[row], *arrays)[2], **CLOSE)
    np.testing.assert_array_equal(after.state[1], arrays[-1][1])


def test_decays_per_channel_in_the_delta_rule():
    arrays = operands(per_channel=True)
    output, update = read_in_jit("delta", Causal(), chain(), *arrays)
    after = past(arrays[-1]).cache.commit(update, jnp.full(BATCH, TOKENS, jnp.int32))
    for row in range(BATCH):
        want, _, state = want_row("delta", row, TOKENS, *arrays)
        np.testing.assert_allclose(output[row], want, **CLOSE)
        np.testing.assert_allclose(after.state[row], state, **CLOSE)


def test_weights_are_sums_of_exactly_their_decays():
    """After decays that sum up to -1e6 the weights of the last tokens are still exact to the last digits."""
    update = RecurrentUpdate(
        jnp.ones((1, 40, 1, 1)), jnp.ones((1, 40, 1, 1)), jnp.full((1, 40, 1, 1), -110.0).at[:, -3:].set(-1e-4)
    )
    cache = RecurrentCache.empty(1, (1, 1, 1), 0, jnp.float32)
    got = cache.commit(update, jnp.asarray([40], jnp.int32)).state
    np.testing.assert_allclose(got[0, 0, 0, 0], np.exp(-1e-4 * np.arange(4)).sum(), rtol=3e-7)


@pytest.mark.parametrize(("implementation", "num_devices"), [("tpu_interpreted", 2), ("gpu_interpreted", 1)])
def test_chains_run_in_kernels_on_every_device(implementation, num_devices):
    """Each device runs the kernel on its heads; the result is that of plain JAX, non-finite tokens included."""
    random = np.random.default_rng(0)
    shape = (1, 70, 2, 64)
    query, key, value = (random.standard_normal(shape).astype(np.float32) for _ in range(3))
    value[0, 60, 1, 3] = np.nan
    log_decay, state = np.full((*shape[:3], 1), -0.1, np.float32), np.ones((1, 2, 64, 64), np.float32)
    arrays = (query, key, value, log_decay, np.ones(shape[:3], np.float32), state)
    mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2]) if num_devices == 2 else None
    want, _ = read_in_jit("linear", Causal(), chain(70, 1), *arrays)
    execution = Execution(implementation, mesh)
    got = jax.jit(lambda *arrays: read("linear", Causal(), chain(70, 1), *arrays, execution)[0])(*arrays)
    assert len(got.sharding.device_set) == num_devices
    np.testing.assert_array_equal(np.isnan(got).any((0, 2, 3)), np.arange(70) >= 60)
    # Products of 64 terms, added in another order.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_heads_that_do_not_divide_over_devices():
    arrays = operands(per_channel=False, num_tokens=4)
    mesh = jax.make_mesh((8,), ("tensor",))
    with pytest.raises(NotImplementedError, match="2 heads do not divide over 8 devices"):
        read("linear", Causal(), chain(4), *arrays, Execution("tpu_interpreted", mesh))
    got, _ = read("linear", Causal(), chain(4), *arrays, Execution("xla", mesh))
    np.testing.assert_array_equal(got, read("linear", Causal(), chain(4), *arrays)[0])


def test_caches_of_another_kind():
    empty = RecurrentCache.empty(1, (1, 2, 3), 5, jnp.float32)
    assert past_of(None, empty).cache is empty and past_of(empty, empty).update is None and empty.capacity == 5
    with pytest.raises(ValueError, match="must be a RecurrentCache"):
        past_of(KVCache.empty(1, 1, 2, 3, jnp.float32), empty)
