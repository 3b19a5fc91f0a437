"""The mask decides which staged tokens a query attends to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.layers.attention.attend import attend
from decodax.layers.attention.mask import Ancestors
from decodax.layers.kv_cache.full import KVCache, KVUpdate
from decodax.layers.kv_cache.staged import Staged, stage
from tests.oracles.attention import attention

BATCH, STAGED, NEW, HEADS, KV_HEADS, SIZE, CAPACITY = 3, 4, 2, 6, 2, 7, 19
LENGTHS = np.array([0, 5, 11])
# float32 sums of at most 17 weighted values of size about 1, after an exponential: a few units of 2^-24 each.
TOLERANCE = 2e-6


def example():
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)
    cache = KVCache(*(draw(BATCH, KV_HEADS, CAPACITY, SIZE) for _ in "kv"), jnp.asarray(LENGTHS))
    staged = KVUpdate(*(draw(BATCH, KV_HEADS, STAGED, SIZE) for _ in "kv"))
    new = KVUpdate(*(draw(BATCH, KV_HEADS, NEW, SIZE) for _ in "kv"))
    return draw(BATCH, NEW, HEADS, SIZE), new, staged, cache


def attended(query, new, position, mask, cache):
    return attend(query, new.key, new.value, position, mask, cache, scale=0.3, softcap=2.0)[0]


def positions(first, count):
    return jnp.asarray(LENGTHS[:, None] + first + np.arange(count), jnp.int32)


def test_the_mask_decides_which_staged_tokens_a_query_attends_to():
    """Each row has its own pattern, by the definition; a masked slot may hold anything finite."""
    query, new, staged, cache = example()
    allowed = np.random.default_rng(1).random((BATCH, NEW, STAGED + NEW)) < 0.5
    allowed[:, :, STAGED:] = np.eye(NEW, dtype=bool)
    allowed[:, :, 2] = False
    staged = KVUpdate(*(rows.at[:, :, 2].set(1e4) for rows in (staged.key, staged.value)))
    position = positions(2, NEW)
    mask = Ancestors(jnp.asarray(allowed))
    got = jax.jit(attended)(query, new, position, mask, Staged(cache, staged, positions(0, STAGED)))
    for row, length in enumerate(LENGTHS):
        keys, values = (
            np.concatenate([old[row, :, :length], beside[row], fresh[row]], 1).swapaxes(0, 1)
            for old, beside, fresh in ((cache.key, staged.key, new.key), (cache.value, staged.value, new.value))
        )
        for token in range(NEW):
            readable = np.concatenate([np.ones(length, bool), allowed[row, token]])
            want = attention(np.asarray(query[row, token]), keys, values, readable, 0.3, 2.0)
            np.testing.assert_allclose(got[row, token], want, atol=TOLERANCE, rtol=TOLERANCE)


def test_stage_pairs_every_layer_with_its_update():
    _, new, staged, cache = example()
    position = positions(0, STAGED)
    first, second = stage((cache, cache), (staged, new), position)
    assert first.update is staged and second.update is new and first.cache is second.cache is cache
    np.testing.assert_array_equal(first.cache.length, LENGTHS)
    with pytest.raises(ValueError, match="argument 2 is longer"):
        stage((cache,), (staged, new), position)
