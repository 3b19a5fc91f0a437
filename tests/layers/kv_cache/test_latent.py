"""The latent cache is read as latents, too, and its updates follow staged ones."""

import jax
import jax.numpy as jnp
import numpy as np

from decodax.layers.kv_cache.contract import MarksTokens, Rewindable
from decodax.layers.kv_cache.latent import LatentCache, LatentUpdate

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


def new_update():
    random = np.random.default_rng(1)
    latent, rope_key = (
        jnp.asarray(random.standard_normal((BATCH, TOKENS, size)), jnp.float32) for size in (RANK, ROPE)
    )
    return LatentUpdate(latent, rope_key)


def test_read_gives_positions_and_filled_slots():
    cache = filled_cache(kept=True)
    latent, rope_key, position, filled = cache.read_latents(jnp.int32(2), 6)
    np.testing.assert_array_equal(latent, cache.latent[:, 2:8])
    np.testing.assert_array_equal(rope_key, cache.rope_key[:, 2:8])
    np.testing.assert_array_equal(position, np.arange(2, 8)[None])
    np.testing.assert_array_equal(filled, np.asarray(cache.kept)[:, 2:8] & (np.arange(2, 8) < LENGTHS[:, None]))


def test_it_can_be_rewound_and_marks_tokens():
    assert isinstance(filled_cache(), Rewindable) and isinstance(filled_cache(), MarksTokens)
    assert filled_cache(kept=True).marks_tokens and not filled_cache().marks_tokens


def test_staged_latents_are_placed_before_new_ones():
    new = new_update()
    staged, fresh = (jax.tree.map(lambda leaf, piece=piece: leaf[:, piece], new) for piece in (slice(3), slice(3, 4)))
    both = fresh.after(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), staged))
    for name in NAMES:
        np.testing.assert_array_equal(getattr(both, name), getattr(new, name))
