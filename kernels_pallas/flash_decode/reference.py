"""`flash_decode` in plain JAX: what runs where no kernel fits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.kernels_pallas.decode_reference import CHUNK_TOKENS, Chunk, attend_in_chunks, readable
from decodax.kernels_pallas.new_tokens import NewTokens


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
    capacity = key.shape[2]
    chunk_tokens = min(CHUNK_TOKENS, capacity)

    def read(chunk: Int[Array, ""]) -> Chunk:
        # The last chunk may not fit: it starts earlier, and skips what the chunk before it has read.
        start = jnp.minimum(chunk * chunk_tokens, capacity - chunk_tokens)
        keys, values = (jax.lax.dynamic_slice_in_dim(x, start, chunk_tokens, axis=2) for x in (key, value))
        slot = start + jnp.arange(chunk_tokens, dtype=jnp.int32)
        unread = (slot >= chunk * chunk_tokens)[None, None, None]
        filled = (slot[None] < length[:, None])[:, None, None]
        return Chunk(keys, values, filled & unread & readable(slot, first, num_sink_tokens))

    num_chunks = (jnp.max(length, initial=0) + chunk_tokens - 1) // chunk_tokens
    heads = {"num_kv_heads": key.shape[1], "value_size": value.shape[3]}
    return attend_in_chunks(
        query, read, num_chunks, **heads, new=new, scale=scale, softcap=softcap, sink_logits=sink_logits
    )
