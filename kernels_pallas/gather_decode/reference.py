"""Computes `gather_decode` in plain JAX, where no kernel takes the operands."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.core.blockwise_attention import KeyBlock
from decodax.kernels_pallas.decode.new_tokens import NewTokens
from decodax.kernels_pallas.decode.reference import CHUNK_TOKENS, attend_in_chunks


def gather_decode(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S I"],
    index: Int[Array, "B K M"],
    count: Int[Array, "B K"],
    length: Int[Array, " B"],
    new: NewTokens | None,
    *,
    block_tokens: int,
    scale: float,
    softcap: float | None,
    sink_logits: Float[Array, " N"] | None,
) -> tuple[Float[Array, "B T N I"], Float[Array, "B T N"]]:
    """See `decodax.kernels_pallas.gather_decode.gather_decode`."""
    batch, num_kv_heads, num_listed = index.shape
    chunk_pages = max(1, min(CHUNK_TOKENS // block_tokens, num_listed))
    offset = jnp.arange(block_tokens, dtype=jnp.int32)

    def read(chunk: Int[Array, ""]) -> KeyBlock:
        entry = chunk * chunk_pages + jnp.arange(chunk_pages, dtype=jnp.int32)
        page = jnp.take(index, entry, axis=2, mode="clip")
        slot = (page[..., None] * block_tokens + offset[None, None, None]).reshape(batch, num_kv_heads, -1)
        listed = jnp.repeat(entry[None, None] < count[..., None], block_tokens, axis=2)
        filled = listed & (slot < length[:, None, None])

        def gathered(cached: Float[Array, "B K S D"]) -> Float[Array, "B K A D"]:
            return jnp.take_along_axis(cached, slot[..., None], axis=2, mode="clip")

        return KeyBlock(gathered(key), gathered(value), filled[:, :, None])

    num_chunks = (jnp.max(count, initial=0) + chunk_pages - 1) // chunk_pages
    heads = {"num_kv_heads": num_kv_heads, "value_size": value.shape[3]}
    return attend_in_chunks(
        query, read, num_chunks, **heads, new=new, scale=scale, softcap=softcap, sink_logits=sink_logits
    )
