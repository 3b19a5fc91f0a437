"""Computes attention that gives a token the same bits whether the tokens before it are cached or of the same forward.

`attend` adds up the weighted values of the new tokens, then those of the cache. So a token decoded alone and the same
token as one of a chain add the same numbers in another order, and differ in the last bits. Here the order is that of
the slots, whatever they hold: slot s holds the token at position s of the query's own past, taken from the cache or
from the query's ancestors among the new tokens, and slots are summed in blocks that begin at multiples of BLOCK_TOKENS.
Every query is multiplied alone, in products whose shapes do not depend on how many tokens are new. Masked keys have
weight zero, so blocks of them change nothing. New keys and values are first rounded to the cache's dtype, as they will
be when they are read back.

`models/invariant.py` does the rest of the mode.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from decodax.core import pytree
from decodax.core.blockwise_attention import KeyBlock, attend_to_block, distance_bias
from decodax.core.partial_softmax import OnlineSoftmax
from decodax.layers.attention.mask import Mask, Tokens
from decodax.layers.attention.nonfinite import mask_nonfinite
from decodax.layers.attention.sinks import without_share
from decodax.layers.kv_cache.full import KVCache, KVUpdate

BLOCK_TOKENS = 64  # slots per step: of 64, 128 and 256 the fastest for short rows, and not slower at 900 tokens


@pytree.dataclass
class Tile:
    """The cache of a layer whose input is a tile: R rows of one token each, the first B * T of which are real.

    Row b * T + t is new token t of batch row b.

    cache: the earlier tokens.
    rows: tokens between the cache and the new ones, staged by a drafter or of earlier tiles of the same forward.
    position: of `rows`, -1 where there is no token yet.
    batch_size: B.
    num_tokens: T.
    is_chain: the new tokens of a batch row follow each other, so that all its queries find the same token in a slot.
    """

    cache: KVCache | None
    rows: KVUpdate | None
    position: Int[Array, "B U"] | None
    batch_size: int = pytree.static()
    num_tokens: int = pytree.static()
    is_chain: bool = pytree.static()

    def tokens(self, rows: Array) -> Array:
        """[R, ...] to [B, T, ...]."""
        return rows[: self.batch_size * self.num_tokens].reshape(self.batch_size, self.num_tokens, *rows.shape[1:])

    def new_rows(self, rows: KVUpdate) -> KVUpdate:
        """The cache update of the tile's R rows, as that of the T tokens of B rows."""
        key, value = (jnp.moveaxis(self.tokens(x)[:, :, :, 0], 1, 2) for x in (rows.key, rows.value))
        return KVUpdate(key, value)


@pytree.dataclass
class TileMask(Mask):
    """A mask for one tile.

    mask: of the whole forward.
    allowed: which of the tokens in `Tile.rows` and of the tile's own each query attends to.
    """

    mask: Mask
    allowed: Bool[Array, "#B T U"]

    def allows(self, query: Tokens, key: Tokens) -> Bool[Array, "#B T S"]:
        return self.allowed if key.is_new else self.mask.allows(query, key)

    def first_visible(self, position: Int[Array, "B T"]) -> Int[Array, "B T"]:
        return self.mask.first_visible(position)


class _New(NamedTuple):
    """All tokens that are in no cache, those of the tile last, rounded as the cache would."""

    key: Float[Array, "B K U H"]
    value: Float[Array, "B K U H"]
    position: Int[Array, "B U"]


class _Slots(NamedTuple):
    """The tokens of consecutive slots, and whether a query may attend to them."""

    key: Float[Array, "B K S H"]
    value: Float[Array, "B K S H"]
    readable: Bool[Array, "B #K S"]


def attend_invariant(
    query: Float[Array, "rows 1 N H"],
    key: Float[Array, "rows K 1 H"],
    value: Float[Array, "rows K 1 H"],
    position: Int[Array, "rows 1"],
    mask: Mask,
    tile: Tile,
    *,
    scale: float,
    softcap: float | None,
    sink: Float[Array, " N"] | None = None,
    slopes: Float32[Array, " N"] | None = None,
) -> tuple[Float[Array, "rows 1 N H"], Float32[Array, "rows 1 N"]]:
    """`attend` for a tile, in the order of slots: the outputs, and the log-sum-exps of the scores.

    Rows that are not real, and a query that attends to nothing, give zeros.

    query, key, value: of the R rows.
    position: of the R rows.
    mask: which keys a query attends to: of two new tokens of the same position only one.
    tile: the cache, whose slot s must hold position s, and which rows are real.
    scale: of the scores.
    softcap: of the scores, None for none.
    sink: a learned score per head.
    slopes: of each head (`attend`).
    """
    query, key, value = jax.lax.optimization_barrier((query, key, value))
    asking = Tokens(tile.tokens(position)[..., 0], is_new=True)
    new = _new_tokens(tile, tile.new_rows(KVUpdate(key, value)), asking.position)
    queries = tile.tokens(query).reshape(tile.batch_size, tile.num_tokens, key.shape[1], -1, key.shape[3])
    queries = jnp.moveaxis(queries, 1, 0)
    exists = new.position >= 0
    reads_new = None
    if not tile.is_chain:
        reads_new = jnp.moveaxis(mask.allows(asking, Tokens(new.position, is_new=True)) & exists[:, None], 1, 0)

    def read(block: Int[Array, ""], seen: OnlineSoftmax, *, with_new: bool) -> OnlineSoftmax:
        start = block * BLOCK_TOKENS
        position = start + jnp.arange(BLOCK_TOKENS, dtype=jnp.int32)
        slots = _cached(tile.cache, start, new)
        if with_new and tile.is_chain:
            slots = _overlay(slots, new, exists, position)
        visible = mask.allows(asking, Tokens(position[None, :], is_new=False))
        readable = jnp.moveaxis(visible, 1, 0)[:, :, None, :] & slots.readable[None]

        def one_query(inputs) -> OnlineSoftmax:
            query, readable, reads_new, own_position, seen = inputs
            own_slots = slots._replace(readable=readable)
            if with_new and not tile.is_chain:
                own_slots = _overlay(own_slots, new, reads_new, position)
            query, own_slots = jax.lax.optimization_barrier((query, own_slots))
            bias = None
            if slopes is not None:
                bias = distance_bias(slopes, query.shape[1], own_position[:, None], position[None, :])
            block = KeyBlock(own_slots.key, own_slots.value, own_slots.readable[:, :, None, :], bias)
            return attend_to_block(seen, query, block, scale=scale, softcap=softcap, reproducible=True)

        return jax.lax.map(one_query, (queries, readable, reads_new, jnp.moveaxis(asking.position, 1, 0), seen))

    seen = OnlineSoftmax.start(queries.shape[:-1], queries.shape[-1])
    first = jnp.maximum(jnp.min(mask.first_visible(asking.position)), 0) // BLOCK_TOKENS
    end = jnp.max(asking.position) // BLOCK_TOKENS + 1
    first_new = jnp.min(new.position, where=exists, initial=jnp.iinfo(jnp.int32).max) // BLOCK_TOKENS
    first_new = jnp.clip(first_new, first, end)
    seen = jax.lax.fori_loop(first, first_new, partial(read, with_new=False), seen)
    seen = jax.lax.fori_loop(first_new, end, partial(read, with_new=True), seen)
    output, lse = seen.finish(value.dtype)

    def as_rows(per_query: Array) -> Array:
        rows = jnp.moveaxis(per_query, 0, 1).reshape(-1, *query.shape[1:3], *per_query.shape[4:])
        return jnp.pad(rows, [(0, query.shape[0] - rows.shape[0])] + [(0, 0)] * (rows.ndim - 1))

    return jax.lax.optimization_barrier(without_share(as_rows(output), as_rows(lse), sink))


def _new_tokens(tile: Tile, own: KVUpdate, position: Int[Array, "B T"]) -> _New:
    dtype = own.key.dtype if tile.cache is None else tile.cache.key.dtype
    parts = [own] if tile.rows is None else [tile.rows, own]
    key = jnp.concatenate([rows.key.astype(dtype) for rows in parts], axis=2)
    value = jnp.concatenate([rows.value.astype(dtype) for rows in parts], axis=2)
    key, value = mask_nonfinite(key, value)
    return _New(key, value, position if tile.position is None else jnp.concatenate([tile.position, position], axis=1))


def _cached(cache: KVCache | None, start: Int[Array, ""], new: _New) -> _Slots:
    """The cache's slots from `start` on, at the same index whatever the capacity; empty ones without a cache."""
    batch, num_kv_heads, _, head_size = new.key.shape
    if cache is None:
        empty = jnp.zeros((batch, num_kv_heads, BLOCK_TOKENS, head_size), new.key.dtype)
        return _Slots(empty, empty, jnp.zeros((batch, 1, BLOCK_TOKENS), bool))
    width = min(BLOCK_TOKENS, cache.capacity)
    begin = jnp.minimum(start, cache.capacity - width)
    key, value, _, filled = cache.read(begin, width)
    if cache.capacity % BLOCK_TOKENS:  # the last slots are read with some before them, and moved to their own index

        def moved(slots: Array) -> Array:
            padded = jnp.pad(slots, [(0, BLOCK_TOKENS if axis == 2 else 0) for axis in range(slots.ndim)])
            return jax.lax.dynamic_slice_in_dim(padded, start - begin, BLOCK_TOKENS, axis=2)

        key, value, filled = moved(key), moved(value), moved(filled)
    is_slot = start + jnp.arange(BLOCK_TOKENS, dtype=jnp.int32) < cache.capacity
    return _Slots(key, value, filled & is_slot[None, None, :])


def _overlay(slots: _Slots, new: _New, reads: Bool[Array, "#B U"], position: Int[Array, " S"]) -> _Slots:
    """The slots of these positions, with every new token that is attended to in its slot."""
    is_in = reads[:, None, :] & (new.position[:, None, :] == position[None, :, None])
    index = jnp.argmax(is_in, axis=2)[:, None, :, None]
    is_new = jnp.any(is_in, axis=2)[:, None, :]
    key = jnp.where(is_new[..., None], jnp.take_along_axis(new.key, index, axis=2), slots.key)
    value = jnp.where(is_new[..., None], jnp.take_along_axis(new.value, index, axis=2), slots.value)
    return _Slots(key, value, slots.readable | is_new)
