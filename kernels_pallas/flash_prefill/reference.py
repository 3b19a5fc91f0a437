"""Computes `flash_prefill` in plain JAX, where no kernel takes the operands.

Loops over blocks of queries and keys (`core/blockwise_attention.py`), so that no array of T x S scores exists and
blocks that no row reads are left out.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from decodax.core.blockwise_attention import KeyBlock, Slots, attend_to_block, finish_by_query, group_queries
from decodax.core.partial_softmax import OnlineSoftmax
from decodax.kernels_pallas.flash_prefill.spans import Blocks, Rows, Rules, Segments, blocks_to_read

QUERY_BLOCK = 256
KEY_BLOCK = 512


def flash_prefill(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S I"],
    rows: Rows,
    segments: Segments | None,
    sink_logits: Float[Array, " N"] | None,
    *,
    scale: float,
    rules: Rules,
    softcap: float | None,
) -> tuple[Float[Array, "B T N I"], Float[Array, "B T N"]]:
    """See `decodax.kernels_pallas.flash_prefill.flash_prefill`."""
    num_queries, num_kv_heads, num_keys = query.shape[1], *key.shape[1:3]
    query_block, key_block = min(QUERY_BLOCK, num_queries), min(KEY_BLOCK, num_keys)
    blocks = blocks_to_read(
        rows, segments, rules, num_queries=num_queries, query_block=query_block, key_block=key_block
    )
    index = rows.offset[:, None] + jnp.arange(num_queries, dtype=jnp.int32)[None, :]
    segment = jnp.zeros_like(index) if segments is None else segments.query
    source = _Source(key, value, rows, None if segments is None else segments.key, rules)
    sinks = None
    if sink_logits is not None:
        sinks = jnp.tile(sink_logits.reshape(1, num_kv_heads, -1), (1, 1, query_block))

    def one_block(block: tuple[Array, ...]) -> tuple[Array, Array]:
        queries, query_index, query_segment, num_steps, num_sink_blocks, skipped = block
        slots = Slots(partial(source.read, query_index, query_segment), num_keys)
        grouped = group_queries(queries, num_kv_heads)

        def step(index: Array, seen: OnlineSoftmax) -> OnlineSoftmax:
            keys = slots.block(Blocks.at(index, num_sink_blocks, skipped), key_block).without_unread()
            return attend_to_block(seen, *_of_one_dtype(grouped, keys), scale=scale, softcap=softcap)

        nothing = OnlineSoftmax.start(grouped.shape[:3], value.shape[3], sinks)
        return finish_by_query(jax.lax.fori_loop(0, num_steps, step, nothing), query_block, query.dtype)

    by_block = (_by_block(tokens, query_block) for tokens in (query, index, segment))
    output, lse = jax.lax.map(one_block, (*by_block, *_of_any_row(blocks)))
    output, lse = (jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]) for x in (output, lse))
    return output[:, :num_queries], lse[:, :num_queries]


class _Source(NamedTuple):
    """The keys, and what says which of them a query attends to."""

    key: Float[Array, "B K S H"]
    value: Float[Array, "B K S I"]
    rows: Rows
    segment: Int[Array, "B S"] | None
    rules: Rules

    def read(
        self, index: Int[Array, "B Q"], segment: Int[Array, "B Q"], start: Int[Array, ""], num_tokens: int
    ) -> KeyBlock:
        """Consecutive keys, for queries at an index and of a segment."""
        key, value = (jax.lax.dynamic_slice_in_dim(x, start, num_tokens, axis=2) for x in (self.key, self.value))
        shape = (*index.shape, num_tokens)
        key_index = jnp.broadcast_to(start + jnp.arange(num_tokens, dtype=jnp.int32), shape)
        length, num_sink_tokens = (x[:, None, None] for x in (self.rows.length, self.rows.num_sink_tokens))
        allowed = self.rules.read(jnp.broadcast_to(index[:, :, None], shape), key_index, length, num_sink_tokens)
        if self.segment is not None:
            key_segment = jax.lax.dynamic_slice_in_dim(self.segment, start, num_tokens, axis=1)
            allowed = allowed & (segment[:, :, None] == key_segment[:, None, :])
        return KeyBlock(key, value, allowed[:, None])


def _of_one_dtype(grouped: Float[Array, "B K Q H"], block: KeyBlock) -> tuple[Array, KeyBlock]:
    """Queries and keys of two dtypes in float32."""
    if grouped.dtype == block.key.dtype:
        return grouped, block
    return grouped.astype(jnp.float32), block._replace(key=block.key.astype(jnp.float32))


def _by_block(tokens: Shaped[Array, "B T *rest"], block_tokens: int) -> Shaped[Array, "blocks B Q *rest"]:
    """Tokens in blocks, the last token repeated to fill the last block."""
    batch, num_tokens, *rest = tokens.shape
    padding = ((0, 0), (0, -num_tokens % block_tokens)) + ((0, 0),) * len(rest)
    padded = jnp.pad(tokens, padding, mode="edge")
    return jnp.moveaxis(padded.reshape(batch, -1, block_tokens, *rest), 1, 0)


def _of_any_row(blocks: Blocks) -> tuple[Array, Array, Array]:
    """The blocks that at least one row of the batch reads, in the same form, each [blocks]."""
    has_run = blocks.num_steps > blocks.num_sink_blocks
    num_sink_blocks = jnp.max(blocks.num_sink_blocks, axis=0)
    last = jnp.max(jnp.where(has_run, blocks.num_steps + blocks.skipped, 0), axis=0)
    first = jnp.where(has_run, blocks.num_sink_blocks + blocks.skipped, jnp.iinfo(jnp.int32).max)
    first = jnp.clip(jnp.min(first, axis=0), num_sink_blocks, jnp.maximum(last, num_sink_blocks))
    return num_sink_blocks + jnp.maximum(last - first, 0), num_sink_blocks, first - num_sink_blocks
