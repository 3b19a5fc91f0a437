"""Defines new latents, tokens that are not in the cache yet, and packs the queries of all heads as rows of a matrix."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class NewLatents(NamedTuple):
    """Latents and rope keys of U new tokens (at most 128), and which of them each query attends to.

    Tokens staged by earlier forwards may precede those of this one, so U is T or more.
    """

    latent: Float[Array, "B U R"]
    rope_key: Float[Array, "B U H"]
    allowed: Bool[Array, "B T U"]


def mask_nonfinite(new: NewLatents) -> NewLatents:
    """Turns tokens with non-finite latents into NaN keys and zero values: only queries that attend to them become NaN.

    The other queries give them the weight 0, and 0 x NaN is NaN.
    """
    is_finite = jnp.all(jnp.isfinite(new.latent), axis=2, keepdims=True)
    latent = jnp.where(is_finite, new.latent, jnp.zeros((), new.latent.dtype))
    rope_key = jnp.where(is_finite, new.rope_key, jnp.full((), jnp.nan, new.rope_key.dtype))
    return new._replace(latent=latent, rope_key=rope_key)


def packed(query: Float[Array, "B T N I"]) -> Float[Array, "B M I"]:
    """The queries of all heads as M = T N rows of one matrix: all of them read the same latents."""
    batch, num_queries, num_heads, size = query.shape
    return query.reshape(batch, num_queries * num_heads, size)
