"""Latent attention for decoding in plain JAX: what XLA runs where no kernel fits.

A loop over blocks of the cache up to the longest row, so that neither the scores nor a copy of the cache ever exists
whole. Every block of latents is read for the scores and again as the values; the kernels read it once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from decodax.kernels_pallas.mla_decode.new_latents import NewLatents, contained, packed

BLOCK_TOKENS = 512
_MASKED = -1e30  # finite, so that no difference is NaN


class _Seen(NamedTuple):
    """Softmax over the tokens seen so far: their maximum score, the sum of weights and the weighted latents."""

    maximum: Float[Array, "B M"]
    total: Float[Array, "B M"]
    output: Float[Array, "B M R"]


def mla_decode(
    query_latent: Float[Array, "B T N R"],
    query_rope: Float[Array, "B T N H"],
    latent: Float[Array, "B S R"],
    rope_key: Float[Array, "B S H"],
    length: Int[Array, " B"],
    new: NewLatents | None,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[Float[Array, "B T N R"], Float[Array, "B T N"]]:
    """As the public function (see `__init__.py`), with any sizes and dtypes."""
    batch, num_queries, num_heads, rank = query_latent.shape
    rows_latent, rows_rope = packed(query_latent), packed(query_rope)

    def absorb(
        seen: _Seen, latents: Float[Array, "B I R"], rope_keys: Float[Array, "B I H"], allowed: Bool[Array, "B #M I"]
    ) -> _Seen:
        score = (
            _products("bmi,bsi->bms", rows_latent, latents) + _products("bmi,bsi->bms", rows_rope, rope_keys)
        ) * scale
        if softcap is not None:
            score = softcap * jnp.tanh(score / softcap)
        score = jnp.where(allowed, score, _MASKED)
        maximum = jnp.maximum(seen.maximum, jnp.max(score, axis=2))
        weight = jnp.exp(score - maximum[:, :, None])
        decay = jnp.exp(seen.maximum - maximum)
        mixed = _products("bms,bsi->bmi", weight.astype(latents.dtype), latents)
        total = seen.total * decay + jnp.sum(weight, axis=2)
        return _Seen(maximum, total, seen.output * decay[:, :, None] + mixed)

    nothing = jnp.zeros((batch, num_queries * num_heads), jnp.float32)
    seen = _Seen(nothing + _MASKED, nothing, jnp.zeros((*nothing.shape, rank), jnp.float32))
    if new is not None:
        new = contained(new)
        seen = absorb(seen, new.latent, new.rope_key, jnp.repeat(new.allowed, num_heads, axis=1))

    capacity = latent.shape[1]
    block_tokens = min(BLOCK_TOKENS, capacity)

    def step(block: Int[Array, ""], seen: _Seen) -> _Seen:
        # The last block may not fit: it starts earlier, and skips what the block before it has read.
        start = jnp.minimum(block * block_tokens, capacity - block_tokens)
        latents, rope_keys = (jax.lax.dynamic_slice_in_dim(x, start, block_tokens, axis=1) for x in (latent, rope_key))
        slot = (start + jnp.arange(block_tokens, dtype=jnp.int32))[None, :]
        is_filled = slot < length[:, None]
        # What was never written may be NaN, and 0 x NaN is NaN.
        latents = jnp.where(is_filled[:, :, None], latents, jnp.zeros((), latents.dtype))
        return absorb(seen, latents, rope_keys, (is_filled & (slot >= block * block_tokens))[:, None, :])

    seen = jax.lax.fori_loop(0, (jnp.max(length) + block_tokens - 1) // block_tokens, step, seen)
    is_empty = seen.maximum < _MASKED / 10
    total = jnp.where(is_empty, 1.0, seen.total)
    output = jnp.where(is_empty[:, :, None], 0.0, seen.output / total[:, :, None])
    lse = jnp.where(is_empty, -jnp.inf, seen.maximum + jnp.log(total))
    return output.astype(query_latent.dtype).reshape(query_latent.shape), lse.reshape(batch, num_queries, num_heads)


def _products(axes: str, left: Array, right: Array) -> Array:
    precision = jax.lax.Precision.HIGHEST if right.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.einsum(axes, left, right, precision=precision, preferred_element_type=jnp.float32)
