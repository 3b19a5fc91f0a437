"""Keeps what is broken in one new token away from the queries that do not read it."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def contained(key: Float[Array, "B K T H"], value: Float[Array, "B K T H"]) -> tuple[Array, Array]:
    """New tokens whose values are not finite as NaN keys and zero values: who reads them breaks, and nobody else.

    A masked token has weight 0, and 0 x NaN is NaN, so a broken draft token would break its whole row.
    """
    is_sound = jnp.all(jnp.isfinite(value), axis=3, keepdims=True)
    return jnp.where(is_sound, key, jnp.nan), jnp.where(is_sound, value, 0.0)
