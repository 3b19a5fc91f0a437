"""The same in plain JAX: what runs where no kernel fits.

FlashAttention-2's online softmax (arXiv 2307.08691) as loops over blocks of queries and keys, so that no array of T x S
scores exists and blocks that no row reads are left out.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from decodax.kernels_pallas.flash_prefill.spans import Blocks, Rows, Rules, Segments, blocks_to_read

QUERY_BLOCK = 256
KEY_BLOCK = 512
_MASKED = -1e30  # finite, so that no difference of scores is NaN; a score below half of it was never seen


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
    batch, num_queries, num_heads, head_size = query.shape
    num_kv_heads, num_keys, value_size = value.shape[1:]
    query_block, key_block = min(QUERY_BLOCK, num_queries), min(KEY_BLOCK, num_keys)
    num_blocks = -(-num_queries // query_block)
    padding = num_blocks * query_block - num_queries
    blocks = blocks_to_read(
        rows, segments, rules, num_queries=num_queries, query_block=query_block, key_block=key_block
    )
    blocks = _of_any_row(blocks)

    def per_block(tokens: Array) -> Array:
        """[B, T, ...] as [blocks, B, block, ...], the last token repeated."""
        padded = jnp.pad(tokens, ((0, 0), (0, padding)) + ((0, 0),) * (tokens.ndim - 2), mode="edge")
        return jnp.moveaxis(padded.reshape(batch, num_blocks, query_block, *tokens.shape[2:]), 1, 0)

    grouped = query.reshape(batch, num_queries, num_kv_heads, -1, head_size)
    index = rows.offset[:, None] + jnp.arange(num_queries, dtype=jnp.int32)[None, :]
    segment = jnp.zeros_like(index) if segments is None else segments.query
    dtype = query.dtype if query.dtype == key.dtype else jnp.float32

    def one_block(block: tuple[Array, ...]) -> tuple[Array, Array]:
        queries, query_index, query_segment, *blocks = block
        num_steps, num_sink_blocks, skipped = blocks
        shape = (batch, num_kv_heads, num_heads // num_kv_heads, query_block)
        maximum, total = jnp.full(shape, _MASKED, jnp.float32), jnp.zeros(shape, jnp.float32)
        if sink_logits is not None:
            logits = sink_logits.astype(jnp.float32).reshape(1, num_kv_heads, -1, 1)
            maximum, total = jnp.broadcast_to(logits, shape), total + 1
        seen = (maximum, total, jnp.zeros((*shape, value_size), jnp.float32))

        def step(index: Array, seen: tuple[Array, ...]) -> tuple[Array, ...]:
            key_block = Blocks.at(index, num_sink_blocks, skipped)
            return absorb(queries.astype(dtype), query_index, query_segment, key_block, seen)

        maximum, total, output = jax.lax.fori_loop(0, num_steps, step, seen)
        empty = maximum < _MASKED / 2
        total = jnp.where(empty, 1.0, total)
        output = jnp.where(empty[..., None], 0.0, output / total[..., None])
        return output.astype(query.dtype), jnp.where(empty, -jnp.inf, maximum + jnp.log(total))

    def absorb(
        queries: Array, query_index: Array, query_segment: Array, block: Array, seen: tuple[Array, ...]
    ) -> tuple[Array, ...]:
        maximum, total, output = seen
        # The last block may not fit: it starts earlier, and leaves out what the block before it has read.
        start = jnp.minimum(block * key_block, num_keys - key_block)
        keys, values = (jax.lax.dynamic_slice_in_dim(x, start, key_block, axis=2) for x in (key, value))
        key_index = (start + jnp.arange(key_block, dtype=jnp.int32))[None, None, :]
        shape = (batch, query_block, key_block)
        length, num_sink_tokens = (x[:, None, None] for x in (rows.length, rows.num_sink_tokens))
        query_index, key_index = (jnp.broadcast_to(x, shape) for x in (query_index[:, :, None], key_index))
        allowed = rules.read(query_index, key_index, length, num_sink_tokens) & (key_index >= block * key_block)
        if segments is not None:
            key_segment = jax.lax.dynamic_slice_in_dim(segments.key, start, key_block, axis=1)
            allowed = allowed & (query_segment[:, :, None] == key_segment[:, None, :])
        score = jnp.einsum("bqkgh,bksh->bkgqs", queries, keys.astype(dtype), preferred_element_type=jnp.float32)
        score = score * scale if softcap is None else softcap * jnp.tanh(score * (scale / softcap))
        score = jnp.where(allowed[:, None, None], score, _MASKED)
        exists = (key_index[:, 0] < rows.length[:, None])[:, None, :, None]
        values = jnp.where(exists, values, 0)  # what no key stands for may be NaN
        new_maximum = jnp.maximum(maximum, jnp.max(score, axis=-1))
        weight = jnp.exp(score - new_maximum[..., None])
        decay = jnp.exp(maximum - new_maximum)
        mixed = jnp.einsum("bkgqs,bksi->bkgqi", weight.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return new_maximum, total * decay + jnp.sum(weight, axis=-1), output * decay[..., None] + mixed

    output, lse = jax.lax.map(one_block, (*map(per_block, (grouped, index, segment)), *blocks))
    output = jnp.moveaxis(output, (0, 4), (1, 2)).reshape(batch, -1, num_heads, value_size)
    lse = jnp.moveaxis(lse, (0, 4), (1, 2)).reshape(batch, -1, num_heads)
    return output[:, :num_queries], lse[:, :num_queries]


def _of_any_row(blocks: Blocks) -> tuple[Array, Array, Array]:
    """The blocks that at least one row of the batch reads, in the same form, each [blocks]."""
    has_run = blocks.num_steps > blocks.num_sink_blocks
    num_sink_blocks = jnp.max(blocks.num_sink_blocks, axis=0)
    last = jnp.max(jnp.where(has_run, blocks.num_steps + blocks.skipped, 0), axis=0)
    first = jnp.where(has_run, blocks.num_sink_blocks + blocks.skipped, jnp.iinfo(jnp.int32).max)
    first = jnp.clip(jnp.min(first, axis=0), num_sink_blocks, jnp.maximum(last, num_sink_blocks))
    return num_sink_blocks + jnp.maximum(last - first, 0), num_sink_blocks, first - num_sink_blocks
