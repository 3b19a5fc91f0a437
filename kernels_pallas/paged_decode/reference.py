"""Computes `paged_decode` in plain JAX, where no kernel takes the operands."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.core.blockwise_attention import KeyBlock
from decodax.kernels_pallas.decode.new_tokens import NewTokens
from decodax.kernels_pallas.decode.reference import CHUNK_TOKENS, attend_in_chunks, readable


def paged_decode(
    query: Float[Array, "B T N H"],
    key_pages: Float[Array, "P Kp A H"],
    value_pages: Float[Array, "P Kp A I"],
    table: Int[Array, "B Kt M"],
    length: Int[Array, "B Kt"],
    new: NewTokens | None,
    *,
    scale: float,
    softcap: float | None,
    first: Int[Array, "B T"] | None,
    num_sink_tokens: int,
    sink_logits: Float[Array, " N"] | None,
) -> tuple[Float[Array, "B T N I"], Float[Array, "B T N"]]:
    """See `decodax.kernels_pallas.paged_decode.paged_decode`."""
    _, heads_per_page, page_tokens, _ = key_pages.shape
    batch, num_tables, pages_per_table = table.shape
    num_kv_heads = max(heads_per_page, num_tables)
    chunk_pages = max(1, min(CHUNK_TOKENS // page_tokens, pages_per_table))
    head = jnp.arange(heads_per_page)[None, :, None]

    def read(chunk: Int[Array, ""]) -> KeyBlock:
        entry = chunk * chunk_pages + jnp.arange(chunk_pages, dtype=jnp.int32)
        page = jnp.take(table, entry, axis=2, mode="clip")

        def gathered(pages: Float[Array, "P Kp A D"]) -> Float[Array, "B K S D"]:
            return pages[page, head].reshape(batch, num_kv_heads, chunk_pages * page_tokens, -1)

        slot = chunk * chunk_pages * page_tokens + jnp.arange(chunk_pages * page_tokens, dtype=jnp.int32)
        filled = (slot[None, None] < length[..., None])[:, :, None]
        return KeyBlock(gathered(key_pages), gathered(value_pages), filled & readable(slot, first, num_sink_tokens))

    chunk_tokens = chunk_pages * page_tokens
    num_chunks = (jnp.max(length, initial=0) + chunk_tokens - 1) // chunk_tokens
    heads = {"num_kv_heads": num_kv_heads, "value_size": value_pages.shape[3]}
    return attend_in_chunks(
        query, read, num_chunks, **heads, new=new, scale=scale, softcap=softcap, sink_logits=sink_logits
    )
