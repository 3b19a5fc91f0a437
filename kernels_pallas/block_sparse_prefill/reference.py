"""Computes block-sparse prefill attention in plain JAX, where no kernel takes the operands.

One block of queries at a time, for all heads at once; each takes as many steps as its longest list has blocks, so that
work is proportional to the lists, and no more than one block of scores per head exists.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.core.blockwise_attention import KeyBlock, attend_to_block, full_float32
from decodax.core.partial_softmax import OnlineSoftmax
from decodax.kernels_pallas.block_sparse_prefill.lists import BlockLists


def block_sparse_prefill(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S I"],
    blocks: BlockLists,
    *,
    scale: float,
    offset: Int[Array, " B"],
    length: Int[Array, " B"],
    softcap: float | None,
) -> tuple[Float[Array, "B T N I"], Float[Array, "B T N"]]:
    """As the public function (see `__init__.py`), with any sizes and dtypes."""
    batch, num_tokens, num_heads, head_size = query.shape
    num_kv_heads, capacity = key.shape[1:3]
    num_lists, num_entries = blocks.index.shape[1:]
    query_block, key_block, num_blocks = blocks.query_block, blocks.key_block, blocks.num_query_blocks
    heads_per_list = num_heads // num_lists
    padded = jnp.pad(query, ((0, 0), (0, num_blocks * query_block - num_tokens), (0, 0), (0, 0)))
    by_block = padded.reshape(batch, num_blocks, query_block, num_lists, heads_per_list, head_size)
    # [query blocks, B, lists, heads of a list x queries, H]
    by_block = by_block.transpose(1, 0, 3, 4, 2, 5).reshape(num_blocks, batch, num_lists, -1, head_size)
    kv_head = jnp.arange(num_lists) // (num_lists // num_kv_heads)
    row = jnp.arange(batch)[:, None, None]

    def one_block(operands: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        block, queries, start, end = operands
        at = block * query_block + jnp.tile(jnp.arange(query_block, dtype=jnp.int32), heads_per_list)
        at = offset[:, None] + at[None, :]

        def step(entry: Array, seen: OnlineSoftmax) -> OnlineSoftmax:
            place = jnp.minimum(start + entry, num_entries - 1)
            listed = jnp.take_along_axis(blocks.index, place[..., None], axis=2)  # [B, lists, 1]
            slot = listed * key_block + jnp.arange(key_block, dtype=jnp.int32)[None, None, :]
            slot = jnp.where((start + entry < end)[..., None], slot, capacity)
            read = jnp.minimum(slot, capacity - 1)
            keys, values = (array[row, kv_head[None, :, None], read] for array in (key, value))
            allowed = (slot[:, :, None] <= at[:, None, :, None]) & (slot < length[:, None, None])[:, :, None]
            block = KeyBlock(keys, values, allowed).without_unread()
            return attend_to_block(seen, queries, block, scale=scale, softcap=softcap)

        nothing = OnlineSoftmax.start(queries.shape[:3], value.shape[3])
        return jax.lax.fori_loop(0, jnp.max(end - start, initial=0), step, nothing).finish(query.dtype)

    start = jnp.moveaxis(blocks.start, 2, 0)
    with full_float32(key.dtype):
        output, lse = jax.lax.map(one_block, (jnp.arange(num_blocks, dtype=jnp.int32), by_block, start[:-1], start[1:]))
    # [query blocks, B, lists, heads of a list x queries, ...] as [B, T, N, ...]
    output = output.reshape(num_blocks, batch, num_heads, query_block, -1).transpose(1, 0, 3, 2, 4)
    lse = lse.reshape(num_blocks, batch, num_heads, query_block).transpose(1, 0, 3, 2)
    output = output.reshape(batch, -1, num_heads, value.shape[3])[:, :num_tokens]
    return output, lse.reshape(batch, -1, num_heads)[:, :num_tokens]
