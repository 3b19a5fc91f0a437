"""Staged tokens are attended to as if they were committed, or of the same forward."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.layers.attention.attend import attend
from decodax.layers.attention.mask import Ancestors, Causal, Window
from decodax.layers.kv_cache.full import KVCache, KVUpdate
from decodax.layers.kv_cache.staged import Staged, place, stage
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
    return attend(query, new.key, new.value, position, mask, cache, scale=0.3, softcap=2.0)


def positions(first, count):
    return jnp.asarray(LENGTHS[:, None] + first + np.arange(count), jnp.int32)


@pytest.mark.parametrize("run", [attended, jax.jit(attended)], ids=["eager", "jitted"])
@pytest.mark.parametrize("window", [None, 3])
def test_a_staged_chain_is_read_as_if_committed(run, window):
    query, new, staged, cache = example()
    mask = Causal() if window is None else Causal() & Window(window)
    position = positions(STAGED, NEW)
    got = run(query, new, position, mask, Staged(cache, staged, positions(0, STAGED)))
    committed = cache.commit(staged, jnp.full(BATCH, STAGED))
    np.testing.assert_allclose(got, run(query, new, position, mask, committed), atol=TOLERANCE)
    both = KVUpdate(*(jnp.concatenate(pair, axis=2) for pair in ((staged.key, new.key), (staged.value, new.value))))
    padded = jnp.concatenate([jnp.zeros((BATCH, STAGED, HEADS, SIZE)), query], axis=1)
    chain = run(padded, both, positions(0, STAGED + NEW), mask, cache)
    np.testing.assert_allclose(got, chain[:, STAGED:], atol=TOLERANCE)


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


@pytest.mark.parametrize("apply", [place, jax.jit(place)], ids=["eager", "jitted"])
def test_place_writes_slots_and_drops_those_beyond(apply):
    _, new, staged, _ = example()
    (got,) = apply((staged,), (new,), jnp.array([3, STAGED]))
    np.testing.assert_array_equal(got.key[:, :, 3], new.key[:, :, 0])
    np.testing.assert_array_equal(got.value[:, :, 3], new.value[:, :, 0])
    np.testing.assert_array_equal(got.key[:, :, :3], staged.key[:, :, :3])
    np.testing.assert_array_equal(got.value[:, :, :3], staged.value[:, :, :3])


def test_updates_that_mark_tokens_are_refused():
    """Staging would lose the mark, and a token that the layer did not run for would be attended to."""
    _, new, staged, _ = example()
    marked = dataclasses.replace(new, kept=jnp.ones((new.key.shape[0], new.key.shape[2]), bool))
    with pytest.raises(ValueError, match="cannot be staged"):
        place((staged,), (marked,), jnp.arange(new.key.shape[2]))


def test_stage_pairs_every_layer_with_its_update():
    _, new, staged, cache = example()
    position = positions(0, STAGED)
    first, second = stage((cache, cache), (staged, new), position)
    assert first.update is staged and second.update is new and first.cache is second.cache is cache
    np.testing.assert_array_equal(first.cache.length, LENGTHS)
    with pytest.raises(ValueError, match="argument 2 is longer"):
        stage((cache,), (staged, new), position)
