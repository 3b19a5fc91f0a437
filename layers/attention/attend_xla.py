"""Attention in plain JAX, on any device, with any cache and any mask.

softmax(scale q k^T + mask) v over the union of the cached keys and the keys of this forward, with grouped heads (GQA,
arXiv 2305.13245) and an optional soft-cap on the scores (Gemma 2, arXiv 2408.00118). The two parts are merged by the
online softmax of FlashAttention-2 (arXiv 2307.08691), so no score array over the whole cache exists, and the cache is
never concatenated.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from decodax.layers.attention.contained import contained
from decodax.layers.attention.mask import Mask, Tokens
from decodax.layers.kv_cache._contract import Cache
from decodax.layers.kv_cache.staged import Staged

BLOCK_TOKENS = 256  # cached tokens per step on CPU: 128 to 512 were measured, 256 reads fastest
WHOLE_FROM = 0.75  # on CPU, the share of the cache in use from which reading all of it is faster
TILE_TOKENS = 128  # new tokens that ask at once for the new tokens before them: half of all scores are never made
_MASKED = -1e30  # finite, so that a fully masked tile gives weights that later tiles wipe out, and never NaN


class _Partial(NamedTuple):
    """Softmax over the keys seen so far: their maximum score, the sum of weights and the weighted values."""

    maximum: Float[Array, "B K Q"]
    total: Float[Array, "B K Q"]
    output: Float[Array, "B K Q H"]


def attend_in_xla(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K U H"],
    value: Float[Array, "B K U H"],
    position: Int[Array, "B T"],
    mask: Mask,
    cache: Cache | Staged | None,
    *,
    scale: float,
    softcap: float | None,
    block_tokens: int | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Each query's mixture of the values it may read, as in `attend`, and the log-sum-exp of its scores in float32.

    The new tokens are the queries' own, or there are none (U = 0) and only the cache is read. A query that reads
    nothing gives 0 and a log-sum-exp of -inf.

    `block_tokens` sets how many cached tokens one step of a loop reads; the loop stops after the longest row. By
    default it is BLOCK_TOKENS, but for few queries the whole cache is read at once where that is faster: on CPU once
    the longest row fills WHOLE_FROM of it, as XLA copies every block before it multiplies; on accelerators always, as
    such a loop costs a host round trip per step there.
    """
    batch, num_queries, num_heads, head_size = query.shape
    num_kv_heads = key.shape[1]
    grouped = query.reshape(batch, num_queries, num_kv_heads, -1, head_size)
    packed = jnp.moveaxis(grouped, 1, 2).reshape(batch, num_kv_heads, -1, head_size)
    group = num_heads // num_kv_heads
    key_position, num_staged = position, 0
    if isinstance(cache, Staged):
        num_staged = cache.position.shape[1]
        key = jnp.concatenate([cache.rows.key.astype(key.dtype), key], axis=2)
        value = jnp.concatenate([cache.rows.value.astype(value.dtype), value], axis=2)
        key_position = jnp.concatenate([cache.position, position], axis=1)
    cached: Cache | None = cache.cache if isinstance(cache, Staged) else cache

    if key.shape[2] > 1:
        key, value = contained(key, value)

    def scores(
        packed: Float[Array, "B K Q H"], keys: Float[Array, "B K S H"], allowed: Bool[Array, "#B #K T S"]
    ) -> Float[Array, "B K Q S"]:
        score = jnp.einsum("bkqh,bksh->bkqs", packed, keys, preferred_element_type=jnp.float32) * scale
        if softcap is not None:
            score = softcap * jnp.tanh(score / softcap)
        return jnp.where(jnp.repeat(allowed, group, axis=2), score, _MASKED)

    def absorb(seen: _Partial, score: Float[Array, "B K Q S"], values: Float[Array, "B K S H"]) -> _Partial:
        maximum = jnp.maximum(seen.maximum, jnp.max(score, axis=-1))
        weight = jnp.exp(score - maximum[..., None])
        decay = jnp.exp(seen.maximum - maximum)
        mixed = jnp.einsum("bkqs,bksh->bkqh", weight.astype(values.dtype), values, preferred_element_type=jnp.float32)
        total = seen.total * decay + jnp.sum(weight, axis=-1)
        return _Partial(maximum, total, seen.output * decay[..., None] + mixed)

    def new_tokens(start: int, end: int) -> _Partial:
        """What queries start .. end - 1 see of the staged and the new tokens: none of those after them."""
        queries = packed[:, :, start * group : end * group]
        nothing = jnp.zeros(queries.shape[:3], jnp.float32)
        seen = _Partial(nothing + _MASKED, nothing, jnp.zeros(queries.shape, jnp.float32))
        keys_end = num_staged + end
        keys = Tokens(key_position[:, :keys_end], is_new=True)
        allowed = mask.allows(Tokens(position[:, start:end], True, start), keys)
        return absorb(seen, scores(queries, key[:, :, :keys_end], allowed[:, None]), value[:, :, :keys_end])

    if key.shape[2] == 0:
        nothing = jnp.zeros(packed.shape[:3], jnp.float32)
        seen = _Partial(nothing + _MASKED, nothing, jnp.zeros(packed.shape, jnp.float32))
    else:
        starts = range(0, num_queries, TILE_TOKENS)
        tiles = [new_tokens(start, min(start + TILE_TOKENS, num_queries)) for start in starts]
        joined = (jnp.concatenate(parts, 2) for parts in zip(*tiles, strict=True))
        seen = tiles[0] if len(tiles) == 1 else _Partial(*joined)
    if cached is not None:
        queries = Tokens(position, is_new=True)
        seen = _absorb_cache(seen, partial(scores, packed), absorb, queries, mask, cached, block_tokens)
    reads_nothing = seen.maximum < _MASKED / 2
    total = jnp.where(reads_nothing, 1.0, seen.total)
    output = jnp.where(reads_nothing[..., None], 0.0, seen.output / total[..., None]).astype(value.dtype)
    lse = jnp.where(reads_nothing, -jnp.inf, seen.maximum + jnp.log(total))

    def by_query(packed: Array) -> Array:
        unpacked = packed.reshape(batch, num_kv_heads, num_queries, group, *packed.shape[3:])
        return jnp.moveaxis(unpacked, 1, 2).reshape(batch, num_queries, num_heads, *packed.shape[3:])

    return by_query(output), by_query(lse)


def _absorb_cache(seen, scores, absorb, queries: Tokens, mask: Mask, cache: Cache, block_tokens: int | None):
    """Adds the cached tokens to the softmax, at least from the first visible one to the longest row's last."""
    # With no more queries than a head has coordinates, the scores of the whole cache take no more room than its keys.
    may_read_whole = block_tokens is None and seen.output.shape[2] <= seen.output.shape[3]
    on_cpu = jax.default_backend() == "cpu"
    if block_tokens is None:
        block_tokens = BLOCK_TOKENS if on_cpu or not may_read_whole else cache.capacity
    block_tokens = min(block_tokens, cache.capacity)

    def read(start: Int[Array, ""], num_tokens: int, unread_from: Int[Array, ""], seen: _Partial) -> _Partial:
        keys, values, cached_position, filled = cache.read(start, num_tokens)
        unread = start + jnp.arange(num_tokens) >= unread_from
        allowed = mask.allows(queries, Tokens(cached_position, is_new=False))[:, None]
        allowed = allowed & (filled & unread[None, None, :])[:, :, None, :]
        return absorb(seen, scores(keys, allowed), values)

    def read_whole(seen: _Partial) -> _Partial:
        return read(jnp.int32(0), cache.capacity, jnp.int32(0), seen)

    def read_blocks(seen: _Partial) -> _Partial:
        def step(block: Int[Array, ""], seen: _Partial) -> _Partial:
            # The last block may not fit: it starts earlier, and skips what the block before it has read.
            start = jnp.minimum(block * block_tokens, cache.capacity - block_tokens)
            return read(start, block_tokens, block * block_tokens, seen)

        return jax.lax.fori_loop(first // block_tokens, (longest + block_tokens - 1) // block_tokens, step, seen)

    if block_tokens == cache.capacity:
        return read_whole(seen)
    first = jnp.maximum(jnp.min(mask.first_visible(queries.position)), 0)
    longest = jnp.max(cache.length)
    if may_read_whole:
        return jax.lax.cond(longest - first > int(WHOLE_FROM * cache.capacity), read_whole, read_blocks, seen)
    return read_blocks(seen)
