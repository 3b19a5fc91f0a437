"""Computes `mla_decode` in plain JAX, where no kernel takes the operands.

As attention with one key-value head (`core/blockwise_attention.py`), whose keys are the latents with their rope keys
and whose values are the latents: a loop over blocks of the cache up to the longest row, so that neither the scores nor
a copy of the cache ever exists in full. Every block of latents is read twice; the kernels read it once.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from decodax.core.blockwise_attention import (
    KeyBlock,
    Slots,
    attend_to_block,
    attend_to_slots,
    finish_by_query,
    full_float32,
    group_queries,
    loop_tokens,
)
from decodax.core.partial_softmax import OnlineSoftmax
from decodax.kernels_pallas.mla_decode.new_latents import NewLatents, mask_nonfinite
from decodax.kernels_pallas.selection import platform_of_device


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
) -> tuple[Float[Array, "B T N R"], Float32[Array, "B T N"]]:
    """As the public function (see `__init__.py`), with any sizes and dtypes."""
    grouped = group_queries(jnp.concatenate([query_latent, query_rope], axis=3), 1)
    seen = OnlineSoftmax.start(grouped.shape[:3], latent.shape[2])
    slots, end = Slots(partial(_read, latent, rope_key, length), latent.shape[1]), jnp.max(length)
    options, on_cpu = {"scale": scale, "softcap": softcap}, platform_of_device() == "cpu"
    with full_float32(latent.dtype):
        if new is not None:
            new = mask_nonfinite(new)
            block = _one_head(new.latent, new.rope_key, new.allowed[:, None])
            seen = attend_to_block(seen, grouped, block, **options)
        seen = attend_to_slots(
            seen, grouped, slots, jnp.int32(0), end, **options, block_tokens=loop_tokens(on_cpu), on_cpu=on_cpu
        )
    return finish_by_query(seen, query_latent.shape[1], query_latent.dtype)


def _read(
    latent: Float[Array, "B S R"],
    rope_key: Float[Array, "B S H"],
    length: Int[Array, " B"],
    start: Int[Array, ""],
    num_tokens: int,
) -> KeyBlock:
    """Slots of the cache; what was never written may be NaN."""
    latents, rope_keys = (jax.lax.dynamic_slice_in_dim(x, start, num_tokens, axis=1) for x in (latent, rope_key))
    filled = (start + jnp.arange(num_tokens, dtype=jnp.int32))[None, :] < length[:, None]
    return _one_head(latents, rope_keys, filled[:, None, None]).without_unread()


def _one_head(
    latent: Float[Array, "B A R"], rope_key: Float[Array, "B A H"], allowed: Bool[Array, "B 1 #T A"]
) -> KeyBlock:
    return KeyBlock(jnp.concatenate([latent, rope_key], axis=2)[:, None], latent[:, None], allowed)
