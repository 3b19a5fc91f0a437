"""Pads and packs operands for a kernel's blocks. Not for caches: those are never copied."""

import jax
import jax.numpy as jnp

WORD_BITS = 32


def padded(array: jax.Array, axis: int, size: int) -> jax.Array:
    """The array padded with zeros up to `size` along an axis."""
    return jnp.pad(array, [(0, size - length if i == axis else 0) for i, length in enumerate(array.shape)])


def bit_words(allowed: jax.Array, num_words: int) -> jax.Array:
    """Packs bool [B, T, U] into a bit per token, int32 [B, T, num_words], the first of 32 tokens in the lowest bit."""
    bits = padded(allowed, 2, num_words * WORD_BITS).reshape(*allowed.shape[:2], num_words, WORD_BITS)
    bits = jnp.left_shift(bits.astype(jnp.uint32), jax.lax.broadcasted_iota(jnp.uint32, bits.shape, 3))
    return jax.lax.bitcast_convert_type(jnp.sum(bits, axis=3, dtype=jnp.uint32), jnp.int32)
