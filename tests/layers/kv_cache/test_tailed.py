"""A tailed cache keeps keys and values as the plain cache does, and the columns of the last committed tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.layers.kv_cache.full import KVCache, KVUpdate, MarkedCache
from decodax.layers.kv_cache.tailed import TailedCache, TailedUpdate

BATCH, HEADS, TOKENS, SIZE, COLUMNS, CAPACITY, TAIL = 3, 2, 5, 7, 11, 13, 3
PATH = np.array([[0, 2, 4], [0, 1, 3], [0, 0, 0]], np.int32)


def new_update(seed=0):
    random = np.random.default_rng(seed)
    key, value = random.normal(size=(2, BATCH, HEADS, TOKENS, SIZE)).astype(np.float32)
    columns = random.normal(size=(BATCH, TOKENS, COLUMNS)).astype(np.float32)
    return TailedUpdate(KVUpdate(jnp.asarray(key), jnp.asarray(value)), jnp.asarray(columns))


def empty(policy=KVCache):
    return TailedCache.empty(BATCH, HEADS, CAPACITY, SIZE, (TAIL, COLUMNS), jnp.float32, policy)


@pytest.mark.parametrize("path", [None, PATH])
def test_commit(path):
    """Twice, with other counts, so that the second tail holds tokens of both forwards."""
    counts = np.array([[3, 1, 0], [2, 3, 1]], np.int32)
    cache, plain = empty(), KVCache.empty(BATCH, HEADS, CAPACITY, SIZE, jnp.float32)
    history = [np.zeros((0, COLUMNS), np.float32) for _ in range(BATCH)]
    commit = jax.jit(
        lambda cache, update, count: cache.commit(update, count, None if path is None else jnp.asarray(path))
    )
    for seed, count in enumerate(counts):
        new = new_update(seed)
        cache, plain = commit(cache, new, jnp.asarray(count)), commit(plain, new.kv, jnp.asarray(count))
        for row in range(BATCH):
            nodes = np.arange(TOKENS) if path is None else path[row]
            taken = np.asarray(new.columns)[row, nodes[: count[row]]]
            history[row] = np.concatenate([history[row], taken])
    for got, want in zip(jax.tree.leaves(cache.kv), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(cache.length, counts.sum(axis=0))
    assert cache.capacity == CAPACITY
    for row, columns in enumerate(history):
        padded = np.concatenate([np.zeros((TAIL, COLUMNS), np.float32), columns])
        np.testing.assert_array_equal(cache.tail[row], padded[-TAIL:])


def test_place_writes_slots_and_drops_those_beyond():
    staged, new = TailedUpdate.empty(BATCH, HEADS, 4, SIZE, COLUMNS, jnp.float32), new_update()
    placed = staged.place(new, jnp.array([2, 0, 7, 9, 4]))
    np.testing.assert_array_equal(placed.columns[:, [2, 0]], new.columns[:, :2])
    np.testing.assert_array_equal(placed.kv.key[:, :, [2, 0]], new.kv.key[:, :, :2])
    np.testing.assert_array_equal(placed.columns[:, [1, 3]], 0)


def test_a_tail_has_no_gaps():
    with pytest.raises(ValueError, match="has to run for every token"):
        empty(MarkedCache)
