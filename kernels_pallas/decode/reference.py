"""Computes in plain JAX what the decode kernels compute: attention to a cache and to new tokens.

Made of `core/blockwise_attention.py`, as the attention of models in plain JAX is.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from decodax.core.blockwise_attention import KeyBlock, attend_to_block, finish_by_query, group_queries
from decodax.core.partial_softmax import OnlineSoftmax
from decodax.kernels_pallas.decode.new_tokens import NewTokens

CHUNK_TOKENS = 1024  # cached tokens per step, for caches whose tokens are gathered: bounds the scores' memory


def attend_to_new(
    query: Float[Array, "B T N H"],
    num_kv_heads: int,
    value_size: int,
    new: NewTokens | None,
    *,
    scale: float,
    softcap: float | None,
    sink_logits: Float[Array, " N"] | None,
) -> tuple[Float[Array, "B K Q H"], OnlineSoftmax]:
    """The queries of each key-value head, and their softmax over the sinks and the new tokens.

    query: of T new tokens.
    num_kv_heads: K.
    value_size: I.
    new: keys and values of the new tokens, None for none.
    scale, softcap: of the scores.
    sink_logits: one more score per query head, without a value.
    """
    grouped, num_queries = group_queries(query, num_kv_heads), query.shape[1]
    sinks = None if sink_logits is None else jnp.tile(sink_logits.reshape(1, num_kv_heads, -1), (1, 1, num_queries))
    seen = OnlineSoftmax.start(grouped.shape[:3], value_size, sinks)
    if new is not None:
        block = as_read(query, KeyBlock(new.key, new.value, new.allowed[:, None]))
        seen = attend_to_block(seen, grouped, block, scale=scale, softcap=softcap)
    return grouped, seen


def attend_in_chunks(
    query: Float[Array, "B T N H"],
    read: Callable[[Int[Array, ""]], KeyBlock],
    num_chunks: Int[Array, ""],
    num_kv_heads: int,
    value_size: int,
    new: NewTokens | None,
    *,
    scale: float,
    softcap: float | None,
    sink_logits: Float[Array, " N"] | None,
) -> tuple[Float[Array, "B T N I"], Float32[Array, "B T N"]]:
    """The attention of a decode kernel whose cached tokens are gathered.

    query: of T new tokens.
    read: gives chunk i of the cache.
    num_chunks: how many chunks the longest row has.
    num_kv_heads, value_size, new, scale, softcap, sink_logits: see `attend_to_new`.
    """
    options = {"scale": scale, "softcap": softcap}
    grouped, seen = attend_to_new(query, num_kv_heads, value_size, new, **options, sink_logits=sink_logits)
    step = lambda index, seen: attend_to_block(seen, grouped, as_read(query, read(index)), **options)
    seen = jax.lax.fori_loop(0, num_chunks, step, seen)
    return finish_by_query(seen, query.shape[1], query.dtype)


def as_read(query: Float[Array, "B T N H"], block: KeyBlock) -> KeyBlock:
    """A block in the queries' dtype, without the values that no query attends to."""
    key, value = (tokens.astype(query.dtype) for tokens in (block.key, block.value))
    return KeyBlock(key, value, block.allowed).without_unread()


def readable(
    slot: Int[Array, " A"], first: Int[Array, "B T"] | None, num_sink_tokens: int
) -> Bool[Array, "B 1 T A"] | Bool[Array, "1 1 1 A"]:
    """Which slots are in the queries' windows or among the sink tokens."""
    if first is None:
        return jnp.ones((1, 1, 1, slot.size), bool)
    slot = slot[None, None]
    return ((slot >= first[..., None]) | (slot < num_sink_tokens))[:, None]
