"""Keeps NaN where it belongs: in the queries that attend to a non-finite token, and in no others."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


def mask_nonfinite(key: Float[Array, "B K T H"], value: Float[Array, "B K T H"]) -> tuple[Array, Array]:
    """New tokens with non-finite values as NaN keys and zero values: the queries that attend to them become NaN.

    A masked token has weight 0, and 0 x NaN is NaN, so a non-finite draft token would make its whole row NaN.
    """
    is_finite = jnp.all(jnp.isfinite(value), axis=3, keepdims=True)
    return jnp.where(is_finite, key, jnp.nan), jnp.where(is_finite, value, 0.0)


def mask_nonfinite_latents(latent: Float[Array, "B T R"], rope_key: Float[Array, "B T H"]) -> tuple[Array, Array]:
    """As `mask_nonfinite`, for the latents and rope keys of new tokens."""
    is_finite = jnp.all(jnp.isfinite(latent), axis=2, keepdims=True)
    return jnp.where(is_finite, latent, 0.0), jnp.where(is_finite, rope_key, jnp.nan)


def of_own_tokens(lse: Float32[Array, "B T N"]) -> Float32[Array, "B T N"]:
    """Log-sum-exps of a kernel over the new tokens, with NaN for -inf.

    A query attends to itself; a maximum in hardware may drop NaN, and then tells a non-finite query as one that attends
    to nothing, whose merged attention would be that to the cache alone.
    """
    return jnp.where(lse == -jnp.inf, jnp.nan, lse)
