"""Attention of a prompt that reads, for each block of its queries, only the blocks of keys listed for it.

What is listed is read exactly: softmax(scale q k^T) v over the keys of the listed blocks that stand no later than the
query. Work and loads go with the number of listed blocks. Which blocks those are is for a method to say: MInference
(arXiv 2407.02490), FlexPrefill (arXiv 2502.20766) and others end in such lists.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.kernels_pallas.block_sparse_prefill.lists import BlockLists
from decodax.kernels_pallas.choice import Choice, Implementation, choose_in
from decodax.kernels_pallas.new_tokens import check_range

__all__ = ["BlockLists", "block_sparse_prefill", "choose_block_sparse_prefill"]


def block_sparse_prefill(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S I"],
    blocks: BlockLists,
    *,
    scale: float,
    offset: Int[Array, " B"] | None = None,
    length: Int[Array, " B"] | None = None,
    softcap: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N I"], Float[Array, "B T N"]]:
    """Attention over the listed blocks, in the operands' dtype, and the log-sum-exp of each query's scores in float32.

    blocks: for each block of queries the blocks of keys it reads, per head or group of heads. Query block i holds
    queries i * query_block and on, key block j the slots j * key_block and on, whatever the offset is.
    offset: query t of a row stands in slot offset + t (0 by default), and reads no slot behind its own.
    length: slots of a row that are filled (offset + T by default); what later ones hold does not matter.
    softcap: scores are softcap * tanh(score / softcap) (Gemma 2, arXiv 2408.00118).

    A query that reads nothing gives 0 and a log-sum-exp of -inf.

    Raises ValueError for operands that do not belong together and, where values are known, for lists that point outside
    or name a block twice, and lengths and offsets outside 0..S (inside jit a block that is not there counts as empty,
    and lengths are clipped); NotImplementedError if the implementation asked for does not take the operands.
    """
    _check_shapes(query, key, value, blocks)
    batch, num_tokens = query.shape[:2]
    capacity = key.shape[2]
    blocks = blocks.within(-(-capacity // blocks.key_block))
    check_range("offset", offset, 0, capacity, "a query stands in a slot of its row")
    check_range("length", length, 0, capacity, "there are no more slots (S)")
    offset = jnp.zeros(batch, jnp.int32) if offset is None else offset.astype(jnp.int32)
    visible = jnp.minimum(offset + num_tokens, capacity)  # to the row's last query, which bounds what can be read
    length = visible if length is None else jnp.clip(length.astype(jnp.int32), 0, visible)
    options: dict[str, Any] = {"scale": scale, "offset": offset, "length": length, "softcap": softcap}
    choice = choose_block_sparse_prefill(query, key, value, blocks, implementation=implementation)
    with jax.named_scope("block_sparse_prefill"):
        if choice.backend == "xla":
            from decodax.kernels_pallas.block_sparse_prefill import reference

            return reference.block_sparse_prefill(query, key, value, blocks, **options)
        if choice.backend == "tpu":
            from decodax.kernels_pallas.block_sparse_prefill import kernel_tpu

            return kernel_tpu.block_sparse_prefill(query, key, value, blocks, **options, interpret=choice.interpret)
        from decodax.kernels_pallas.block_sparse_prefill import kernel_gpu

        return kernel_gpu.block_sparse_prefill(query, key, value, blocks, **options, interpret=choice.interpret)


def choose_block_sparse_prefill(
    query: Any, key: Any, value: Any, blocks: BlockLists, *, implementation: Implementation | None = None
) -> Choice:
    """What `block_sparse_prefill` runs for operands of these shapes and dtypes, and why."""
    return choose_in("block_sparse_prefill", implementation, query, key, value, blocks)


def _check_shapes(query: Any, key: Any, value: Any, blocks: BlockLists) -> None:
    batch, num_tokens, num_heads, head_size = query.shape
    num_kv_heads = key.shape[1]
    if (key.shape[0], key.shape[3]) != (batch, head_size) or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            "query [B, T, N, H], key [B, K, S, H] and value [B, K, S, I] must agree in B, K, S and H, got "
            f"{query.shape}, {key.shape} and {value.shape}"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value must have one dtype, got {query.dtype}, {key.dtype} and {value.dtype}: cast them"
        )
    if num_tokens == 0 or key.shape[2] == 0 or blocks.index.shape[2] == 0:
        raise ValueError(
            "there must be at least one query (T), one slot of keys (S) and room for one entry in the lists (M), got "
            f"{num_tokens}, {key.shape[2]} and {blocks.index.shape[2]}"
        )
    if num_heads % num_kv_heads:
        raise ValueError(f"the {num_heads} query heads must be a multiple of the {num_kv_heads} key-value heads")
    if blocks.query_block < 1 or blocks.key_block < 1:
        raise ValueError(f"blocks must have at least one token, got {blocks.query_block} and {blocks.key_block}")
    num_query_blocks = -(-num_tokens // blocks.query_block)
    lists_batch, num_lists, num_starts = blocks.start.shape
    if blocks.index.shape[:2] != (lists_batch, num_lists) or lists_batch != batch:
        raise ValueError(
            f"block lists must have starts [B, lists, {num_query_blocks + 1}] and entries [B, lists, M], B = {batch}, "
            f"got {blocks.start.shape} and {blocks.index.shape}"
        )
    if num_lists % num_kv_heads or num_lists == 0 or num_heads % num_lists:
        raise ValueError(
            f"there must be one set of block lists per query head ({num_heads}) or per group of heads that share a "
            f"key-value head ({num_kv_heads} of them), got {num_lists} sets"
        )
    if num_starts != num_query_blocks + 1:
        raise ValueError(
            f"{num_tokens} queries in blocks of {blocks.query_block} need {num_query_blocks + 1} starts (one per block "
            f"and the last one's end), got {num_starts}"
        )
