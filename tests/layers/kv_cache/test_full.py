"""The full cache is read by each head as it kept tokens, and can be made with marks."""

import jax.numpy as jnp
import numpy as np

from decodax.layers.kv_cache.contract import CachePolicy, MarksTokens, Rewindable
from decodax.layers.kv_cache.full import KVCache, MarkedCache

BATCH, KV_HEADS, CAPACITY, SIZE = 3, 2, 11, 5
LENGTHS = np.array([0, 3, 9])


def test_each_head_reads_the_slots_that_it_kept():
    random = np.random.default_rng(0)
    shape = (BATCH, KV_HEADS, CAPACITY)
    key, value = (jnp.asarray(random.standard_normal((*shape, SIZE)), jnp.float32) for _ in "kv")
    kept = random.random(shape) < 0.5
    cache = KVCache(key, value, jnp.asarray(LENGTHS), jnp.asarray(kept))
    *read, position, valid = cache.read(jnp.int32(2), 6)
    np.testing.assert_array_equal(read, [key[:, :, 2:8], value[:, :, 2:8]])
    np.testing.assert_array_equal(position, np.arange(2, 8)[None])
    np.testing.assert_array_equal(valid, kept[:, :, 2:8] & (np.arange(2, 8) < LENGTHS[:, None])[:, None])


def test_policies_make_caches_with_and_without_marks():
    for policy, marks in ((KVCache, False), (MarkedCache, True)):
        cache = policy.empty(BATCH, KV_HEADS, CAPACITY, SIZE, jnp.float32)
        assert isinstance(policy, CachePolicy) and isinstance(cache, Rewindable) and isinstance(cache, MarksTokens)
        assert cache.marks_tokens == marks
