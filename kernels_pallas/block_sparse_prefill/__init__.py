"""Computes block-sparse prefill attention: each block of queries attends only to the blocks of keys in its list.

Attention to the listed blocks is exact: softmax(scale q k^T) v over their keys that are no later than the query. Work
and loads are proportional to the number of listed blocks. A method chooses the blocks: MInference (arXiv 2407.02490),
FlexPrefill (arXiv 2502.20766) and others produce such lists.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.kernels_pallas.block_sparse_prefill.lists import BlockLists
from decodax.kernels_pallas.decode.new_tokens import check_range
from decodax.kernels_pallas.selection import Implementation, KernelSelection, select_in_folder

__all__ = ["BlockLists", "block_sparse_prefill", "select_block_sparse_prefill"]


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

    query: of T tokens.
    key, value: slots of each row.
    blocks: for each block of queries the blocks of keys it attends to, per head or group of heads. Query block i holds
        queries from i * query_block on, key block j the slots from j * key_block on, whatever the offset is.
    scale: of the scores.
    offset: query t of a row is in slot offset + t (0 by default), and attends to no later slot.
    length: slots of a row that are filled (offset + T by default); later ones may hold anything.
    softcap: scores are softcap * tanh(score / softcap) (Gemma 2, arXiv 2408.00118).
    implementation: None takes the kernel of this device if it supports the operands, else XLA.

    A query that attends to nothing gives 0 and a log-sum-exp of -inf.

    Raises ValueError for operands that do not fit each other and, if values are known, for lists that point outside or
    name a block twice, and lengths and offsets outside 0..S (inside jit a missing block counts as empty, and lengths
    are clipped).
    Raises NotImplementedError if the implementation asked for does not support the operands.
    """
    _check_shapes(query, key, value, blocks)
    batch, num_tokens = query.shape[:2]
    capacity = key.shape[2]
    blocks = blocks.within(-(-capacity // blocks.key_block))
    check_range("offset", offset, 0, capacity, "a query is in a slot of its row")
    check_range("length", length, 0, capacity, "there are no more slots (S)")
    offset = jnp.zeros(batch, jnp.int32) if offset is None else offset.astype(jnp.int32)
    end = jnp.minimum(offset + num_tokens, capacity)  # after the row's last query, the last slot to attend to
    length = end if length is None else jnp.clip(length.astype(jnp.int32), 0, end)
    options: dict[str, Any] = {"scale": scale, "offset": offset, "length": length, "softcap": softcap}
    selection = select_block_sparse_prefill(query, key, value, blocks, implementation=implementation)
    with jax.named_scope("block_sparse_prefill"):
        if selection.backend == "xla":
            from decodax.kernels_pallas.block_sparse_prefill import reference

            return reference.block_sparse_prefill(query, key, value, blocks, **options)
        if selection.backend == "tpu":
            from decodax.kernels_pallas.block_sparse_prefill import kernel_tpu

            return kernel_tpu.block_sparse_prefill(query, key, value, blocks, **options, interpret=selection.interpret)
        from decodax.kernels_pallas.block_sparse_prefill import kernel_gpu

        return kernel_gpu.block_sparse_prefill(query, key, value, blocks, **options, interpret=selection.interpret)


def select_block_sparse_prefill(
    query: Any, key: Any, value: Any, blocks: BlockLists, *, implementation: Implementation | None = None
) -> KernelSelection:
    """The implementation of `block_sparse_prefill` for operands of these shapes and dtypes, and the reason."""
    return select_in_folder("block_sparse_prefill", implementation, query, key, value, blocks)


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
