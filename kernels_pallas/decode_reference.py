"""What the references of the decode kernels share: softmax over a cache that is read in chunks, and over new tokens.

Plain JAX. The chunks bound the scores' memory; the loop ends with the longest row.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from decodax.kernels_pallas.new_tokens import NewTokens

CHUNK_TOKENS = 1024
_MASKED = -1e30  # finite, so that no difference is NaN


class Chunk(NamedTuple):
    """Some tokens, and which of them a query may read. What none may read may be anything."""

    key: Float[Array, "B K A H"]
    value: Float[Array, "B K A I"]
    allowed: Bool[Array, "B #K #T A"]


class _Seen(NamedTuple):
    maximum: Float[Array, "B K T G"]
    total: Float[Array, "B K T G"]
    output: Float[Array, "B K T G I"]


def attend_in_chunks(
    query: Float[Array, "B T N H"],
    read: Callable[[Int[Array, ""]], Chunk],
    num_chunks: Int[Array, ""],
    num_kv_heads: int,
    value_size: int,
    new: NewTokens | None,
    *,
    scale: float,
    softcap: float | None,
    sink_logits: Float[Array, " N"] | None,
) -> tuple[Float[Array, "B T N I"], Float[Array, "B T N"]]:
    """The attention of a decode kernel, where `read(i)` gives the i-th of `num_chunks` chunks of the cache."""
    batch, num_queries, num_heads, head_size = query.shape
    grouped = jnp.moveaxis(query.reshape(batch, num_queries, num_kv_heads, -1, head_size), 2, 1)

    def absorb(seen: _Seen, chunk: Chunk) -> _Seen:
        key, value = chunk.key.astype(query.dtype), chunk.value.astype(query.dtype)
        value = jnp.where(jnp.any(chunk.allowed, axis=2)[..., None], value, 0)
        score = jnp.einsum("bktgh,bkah->bktga", grouped, key, preferred_element_type=jnp.float32) * scale
        if softcap is not None:
            score = softcap * jnp.tanh(score / softcap)
        score = jnp.where(chunk.allowed[:, :, :, None], score, _MASKED)
        maximum = jnp.maximum(seen.maximum, jnp.max(score, axis=-1))
        weight = jnp.exp(score - maximum[..., None])
        decay = jnp.exp(seen.maximum - maximum)
        mixed = jnp.einsum("bktga,bkai->bktgi", weight.astype(value.dtype), value, preferred_element_type=jnp.float32)
        total = seen.total * decay + jnp.sum(weight, axis=-1)
        return _Seen(maximum, total, seen.output * decay[..., None] + mixed)

    shape = grouped.shape[:-1]
    if sink_logits is None:
        maximum, total = jnp.full(shape, _MASKED), jnp.zeros(shape)
    else:
        logits = jnp.maximum(sink_logits.astype(jnp.float32), _MASKED).reshape(1, num_kv_heads, 1, -1)
        maximum, total = jnp.broadcast_to(logits, shape), jnp.ones(shape)
    seen = _Seen(maximum, total, jnp.zeros((*shape, value_size)))
    seen = jax.lax.fori_loop(0, num_chunks, lambda i, seen: absorb(seen, read(i)), seen)
    if new is not None:
        seen = absorb(seen, Chunk(new.key, new.value, new.allowed[:, None]))
    empty = seen.maximum <= _MASKED
    total = jnp.where(empty, 1.0, seen.total)
    output = jnp.where(empty[..., None], 0.0, seen.output / total[..., None]).astype(query.dtype)
    log_sum_exp = jnp.where(empty, -math.inf, seen.maximum + jnp.log(total))
    output, log_sum_exp = (jnp.moveaxis(x, 1, 2) for x in (output, log_sum_exp))
    return output.reshape(batch, num_queries, num_heads, -1), log_sum_exp.reshape(batch, num_queries, num_heads)


def readable(
    slot: Int[Array, " A"], first: Int[Array, "B T"] | None, num_sink_tokens: int
) -> Bool[Array, "B 1 T A"] | Bool[Array, "1 1 1 A"]:
    """Which slots lie in the queries' windows or among the sinks."""
    if first is None:
        return jnp.ones((1, 1, 1, slot.size), bool)
    slot = slot[None, None]
    return ((slot >= first[..., None]) | (slot < num_sink_tokens))[:, None]
