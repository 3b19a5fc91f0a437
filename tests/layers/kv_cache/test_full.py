"""Committing writes the accepted keys and values, in order, after the cached ones, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.layers.kv_cache.full import KVCache, KVUpdate

BATCH, KV_HEADS, CAPACITY, SIZE, TOKENS = 3, 2, 11, 5, 4
LENGTHS = np.array([0, 3, 9])


def filled_cache(kept=False):
    random = np.random.default_rng(0)
    shape = (BATCH, KV_HEADS, CAPACITY)
    key, value = (jnp.asarray(random.standard_normal((*shape, SIZE)), jnp.float32) for _ in "kv")
    return KVCache(key, value, jnp.asarray(LENGTHS), jnp.asarray(random.random(shape) < 0.5) if kept else None)


def new_update(kept=None):
    random = np.random.default_rng(1)
    key, value = (jnp.asarray(random.standard_normal((BATCH, KV_HEADS, TOKENS, SIZE)), jnp.float32) for _ in "kv")
    return KVUpdate(key, value, kept)


@pytest.mark.parametrize("commit", [KVCache.commit, jax.jit(KVCache.commit)], ids=["eager", "jitted"])
@pytest.mark.parametrize("path", [None, np.array([[0, 2, 3], [1, 1, 0], [3, 0, 2]])], ids=["chain", "path"])
def test_commit(commit, path):
    cache, update, count = filled_cache(), new_update(), np.array([3, 0, 2])
    after = commit(cache, update, jnp.asarray(count), None if path is None else jnp.asarray(path))
    for name in ("key", "value"):
        want = np.array(getattr(cache, name))
        for row in range(BATCH):
            for step in range(count[row]):
                node = step if path is None else path[row, step]
                want[row, :, LENGTHS[row] + step] = np.asarray(getattr(update, name))[row, :, node]
        np.testing.assert_array_equal(getattr(after, name), want)
    np.testing.assert_array_equal(after.length, LENGTHS + count)


def test_kept_tokens_are_marked_and_skipped_ones_are_not():
    kept = jnp.asarray([[True, False, True, True], [False, True, True, True], [True, True, False, False]])
    cache, path = filled_cache(kept=True), jnp.asarray([[0, 1, 2], [0, 3, 1], [3, 1, 0]])
    after = cache.commit(new_update(kept), jnp.asarray([3, 2, 1]), path)
    want = np.array(cache.kept)
    want[0, :, 0:3] = [True, False, True]
    want[1, :, 3:5] = [False, True]
    want[2, :, 9] = False
    np.testing.assert_array_equal(after.kept, want)
    plain = cache.commit(new_update(), jnp.asarray([1, 1, 1]))
    assert np.asarray(plain.kept)[np.arange(BATCH), :, LENGTHS].all()


def test_tokens_beyond_the_capacity_are_dropped():
    cache = filled_cache()
    after = cache.commit(new_update(), jnp.asarray([0, 0, 4]))
    np.testing.assert_array_equal(after.key[2, :, 9:], new_update().key[2, :, :2])
    np.testing.assert_array_equal(after.key[2, :, :9], cache.key[2, :, :9])


def test_skipped_tokens_need_a_cache_that_tracks_them():
    with pytest.raises(ValueError, match="track_kept=True"):
        filled_cache().commit(new_update(jnp.ones((BATCH, TOKENS), bool)), jnp.asarray([1, 1, 1]))


def test_read_gives_positions_and_filled_slots():
    cache = filled_cache(kept=True)
    key, value, position, filled = cache.read(jnp.int32(2), 6)
    np.testing.assert_array_equal(key, cache.key[:, :, 2:8])
    np.testing.assert_array_equal(value, cache.value[:, :, 2:8])
    np.testing.assert_array_equal(position, np.arange(2, 8)[None])
    want = np.asarray(cache.kept)[:, :, 2:8] & (np.arange(2, 8) < LENGTHS[:, None])[:, None]
    np.testing.assert_array_equal(filled, want)
