"""Committing writes the accepted latents, in order, after the cached ones, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.layers.kv_cache.contract import Cache, MarksTokens, Rewindable
from decodax.layers.kv_cache.latent import LatentCache, LatentUpdate
from decodax.layers.kv_cache.staged import place

BATCH, CAPACITY, RANK, ROPE, TOKENS = 3, 11, 5, 2, 4
LENGTHS = np.array([0, 3, 9])
NAMES = ("latent", "rope_key")


def filled_cache(kept=False):
    random = np.random.default_rng(0)
    latent, rope_key = (
        jnp.asarray(random.standard_normal((BATCH, CAPACITY, size)), jnp.float32) for size in (RANK, ROPE)
    )
    marks = jnp.asarray(random.random((BATCH, CAPACITY)) < 0.5) if kept else None
    return LatentCache(latent, rope_key, jnp.asarray(LENGTHS), marks)


def new_update(kept=None):
    random = np.random.default_rng(1)
    latent, rope_key = (
        jnp.asarray(random.standard_normal((BATCH, TOKENS, size)), jnp.float32) for size in (RANK, ROPE)
    )
    return LatentUpdate(latent, rope_key, kept)


@pytest.mark.parametrize("commit", [LatentCache.commit, jax.jit(LatentCache.commit)], ids=["eager", "jitted"])
@pytest.mark.parametrize("path", [None, np.array([[0, 2, 3], [1, 1, 0], [3, 0, 2]])], ids=["chain", "path"])
def test_commit(commit, path):
    """The last row has room for two tokens only: the third is dropped."""
    cache, update, count = filled_cache(), new_update(), np.array([3, 0, 3])
    after = commit(cache, update, jnp.asarray(count), None if path is None else jnp.asarray(path))
    for name in NAMES:
        want = np.array(getattr(cache, name))
        for row in range(BATCH):
            for step in range(min(count[row], CAPACITY - LENGTHS[row])):
                node = step if path is None else path[row, step]
                want[row, LENGTHS[row] + step] = np.asarray(getattr(update, name))[row, node]
        np.testing.assert_array_equal(getattr(after, name), want)
    np.testing.assert_array_equal(after.length, LENGTHS + count)


def test_kept_tokens_are_marked_and_skipped_ones_are_not():
    kept = jnp.asarray([[True, False, True, True], [False, True, True, True], [True, True, False, False]])
    cache, path = filled_cache(kept=True), jnp.asarray([[0, 1, 2], [0, 3, 1], [3, 1, 0]])
    after = cache.commit(new_update(kept), jnp.asarray([3, 2, 1]), path)
    want = np.array(cache.kept)
    want[0, 0:3] = [True, False, True]
    want[1, 3:5] = [False, True]
    want[2, 9] = False
    np.testing.assert_array_equal(after.kept, want)
    plain = cache.commit(new_update(), jnp.asarray([1, 1, 1]))
    assert np.asarray(plain.kept)[np.arange(BATCH), LENGTHS].all()
    with pytest.raises(ValueError, match="track_kept=True"):
        filled_cache().commit(new_update(kept), jnp.asarray([1, 1, 1]))


def test_read_gives_positions_and_filled_slots():
    cache = filled_cache(kept=True)
    latent, rope_key, position, filled = cache.read_latents(jnp.int32(2), 6)
    np.testing.assert_array_equal(latent, cache.latent[:, 2:8])
    np.testing.assert_array_equal(rope_key, cache.rope_key[:, 2:8])
    np.testing.assert_array_equal(position, np.arange(2, 8)[None])
    np.testing.assert_array_equal(filled, np.asarray(cache.kept)[:, 2:8] & (np.arange(2, 8) < LENGTHS[:, None]))


def test_is_a_cache_of_one_head_to_attention():
    cache = filled_cache()
    assert isinstance(cache, Cache)
    key, value, position, filled = cache.read(jnp.int32(3), 2)
    np.testing.assert_array_equal(key[:, 0], np.concatenate([cache.latent, cache.rope_key], axis=2)[:, 3:5])
    np.testing.assert_array_equal(value, key)
    np.testing.assert_array_equal(position, [[3, 4]])
    np.testing.assert_array_equal(filled[:, 0], [[False, False], [False, False], [True, True]])


def test_rewinding_and_marking():
    assert isinstance(filled_cache(), Rewindable) and isinstance(filled_cache(), MarksTokens)
    assert filled_cache(kept=True).marks_tokens and not filled_cache().marks_tokens
    rewound = filled_cache().rewound(jnp.array([2, 1, 9]))
    np.testing.assert_array_equal(rewound.length, [0, 1, 9])
    np.testing.assert_array_equal(rewound.latent, filled_cache().latent)


def test_place_writes_slots_and_drops_those_beyond():
    staged, new = LatentUpdate.empty(BATCH, TOKENS, RANK, ROPE, jnp.bfloat16), new_update()
    pair = jax.tree.map(lambda leaf: leaf[:, :2], new)
    (got,) = place((staged,), (pair,), jnp.array([3, TOKENS]))
    for name in NAMES:
        rows = np.asarray(getattr(got, name), np.float32)
        np.testing.assert_array_equal(rows[:, 3], getattr(new, name)[:, 0].astype(jnp.bfloat16))
        assert not rows[:, :3].any()
    with pytest.raises(ValueError, match="cannot be staged"):
        place((staged,), (dataclasses.replace(pair, kept=jnp.ones((BATCH, 2), bool)),), jnp.arange(2))


def test_staged_latents_are_placed_before_new_ones():
    new = new_update()
    staged, fresh = (jax.tree.map(lambda leaf, piece=piece: leaf[:, piece], new) for piece in (slice(3), slice(3, 4)))
    both = fresh.after(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), staged))
    for name in NAMES:
        np.testing.assert_array_equal(getattr(both, name), getattr(new, name))
