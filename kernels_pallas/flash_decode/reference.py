"""Computes `flash_decode` in plain JAX, where no kernel takes the operands."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.core.blockwise_attention import KeyBlock, Slots, attend_to_slots, finish_by_query
from decodax.kernels_pallas.decode.new_tokens import NewTokens
from decodax.kernels_pallas.decode.reference import as_read, attend_to_new, readable
from decodax.kernels_pallas.selection import platform_of_device


def flash_decode(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S I"],
    length: Int[Array, " B"],
    new: NewTokens | None,
    *,
    scale: float,
    softcap: float | None,
    first: Int[Array, "B T"] | None,
    num_sink_tokens: int,
    sink_logits: Float[Array, " N"] | None,
) -> tuple[Float[Array, "B T N I"], Float[Array, "B T N"]]:
    """See `decodax.kernels_pallas.flash_decode.flash_decode`."""
    options = {"scale": scale, "softcap": softcap}
    grouped, seen = attend_to_new(query, key.shape[1], value.shape[3], new, **options, sink_logits=sink_logits)

    def read(start: Int[Array, ""], num_tokens: int) -> KeyBlock:
        keys, values = (jax.lax.dynamic_slice_in_dim(x, start, num_tokens, axis=2) for x in (key, value))
        slot = start + jnp.arange(num_tokens, dtype=jnp.int32)
        filled = (slot[None] < length[:, None])[:, None, None]
        return as_read(query, KeyBlock(keys, values, filled & readable(slot, first, num_sink_tokens)))

    lowest = jnp.int32(0) if first is None or num_sink_tokens else jnp.maximum(jnp.min(first), 0)
    end = jnp.max(length, initial=0)
    on_cpu = platform_of_device() == "cpu"
    seen = attend_to_slots(
        seen, grouped, Slots(read, key.shape[2]), lowest, end, **options, block_tokens=None, on_cpu=on_cpu
    )
    return finish_by_query(seen, query.shape[1], query.dtype)
