"""Attention that gives a token the same bits whether the tokens before it are cached or new in the same forward.

`attend` adds up what a query reads from the new tokens and then from the cache, so that a token decoded alone and the
same token as one of a chain add the same numbers in another order, and differ in the last bits. Here the order is that
of the slots, whatever stands in them: slot s holds the token at position s of the query's own past, taken from the
cache or from the query's ancestors among the new tokens, and slots are summed in blocks that begin at multiples of
BLOCK_TOKENS. Every query is multiplied alone, in products whose shapes do not tell how many tokens are new. What a
query may not read has weight zero, so blocks of it change nothing. New rows are first rounded to the cache's dtype, as
they will be when they are read back.

The online softmax is that of FlashAttention-2, arXiv 2307.08691. `models/invariant.py` does the rest of the mode.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from decodax.layers import pytree
from decodax.layers.attention.contained import contained
from decodax.layers.attention.mask import Mask, Tokens
from decodax.layers.attention.sinks import without_share
from decodax.layers.kv_cache.full import KVCache, KVRows

BLOCK_TOKENS = 64  # slots per step: of 64, 128 and 256 the fastest for short rows, and not slower at 900 tokens
_MASKED = -1e30  # finite, so that no difference of two scores is NaN


@pytree.dataclass
class Tile:
    """What a layer reads when its input is a tile: R rows of one token each, the first B * T of which are real.

    Row b * T + t is new token t of batch row b. `rows` are tokens between the cache and these (staged by a drafter, or
    of earlier tiles of the same forward) at `position`, which is -1 where there is none yet.
    is_chain: the new tokens of a batch row follow each other, so that all its queries find the same in a slot.
    """

    cache: KVCache | None
    rows: KVRows | None
    position: Int[Array, "B U"] | None
    batch_size: int = pytree.static()
    num_tokens: int = pytree.static()
    is_chain: bool = pytree.static()

    def tokens(self, rows: Array) -> Array:
        """[R, ...] to [B, T, ...]."""
        return rows[: self.batch_size * self.num_tokens].reshape(self.batch_size, self.num_tokens, *rows.shape[1:])

    def new_rows(self, rows: KVRows) -> KVRows:
        """What a layer gives for the tile's R rows, as that of the T tokens of B rows."""
        key, value = (jnp.moveaxis(self.tokens(x)[:, :, :, 0], 1, 2) for x in (rows.key, rows.value))
        return KVRows(key, value)


@pytree.dataclass
class TileMask(Mask):
    """A mask seen from one tile: `allowed` is its answer for the tokens in `Tile.rows` and the tile's own."""

    whole: Mask
    allowed: Bool[Array, "#B T U"]

    def allows(self, query: Tokens, key: Tokens) -> Bool[Array, "#B T S"]:
        return self.allowed if key.is_new else self.whole.allows(query, key)

    def first_visible(self, position: Int[Array, "B T"]) -> Int[Array, "B T"]:
        return self.whole.first_visible(position)


class _Partial(NamedTuple):
    """Softmax over the slots seen so far: their maximum score, the sum of weights and the weighted values.

    Of all queries, [T, B, K, G], or of one per batch row, [B, K, G].
    """

    maximum: Float[Array, "*T B K G"]
    total: Float[Array, "*T B K G"]
    output: Float[Array, "*T B K G H"]


class _New(NamedTuple):
    """All tokens that are in no cache, those of the tile last, rounded as the cache would."""

    key: Float[Array, "B K U H"]
    value: Float[Array, "B K U H"]
    position: Int[Array, "B U"]


class _Slots(NamedTuple):
    """What stands in consecutive slots, and which of them may be read."""

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
) -> Float[Array, "rows 1 N H"]:
    """`attend` for a tile, in the order of slots; rows that are not real, and a query that reads nothing, give zeros.

    Slot s of the cache must hold position s, and no query may read two new tokens of the same position.
    """
    query, key, value = jax.lax.optimization_barrier((query, key, value))
    asking = Tokens(tile.tokens(position)[..., 0], is_new=True)
    new = _new_tokens(tile, tile.new_rows(KVRows(key, value)), asking.position)
    queries = tile.tokens(query).reshape(tile.batch_size, tile.num_tokens, key.shape[1], -1, key.shape[3])
    queries = jnp.moveaxis(queries, 1, 0)
    exists = new.position >= 0
    reads_new = None
    if not tile.is_chain:
        reads_new = jnp.moveaxis(mask.allows(asking, Tokens(new.position, is_new=True)) & exists[:, None], 1, 0)

    def read(block: Int[Array, ""], seen: _Partial, *, with_new: bool) -> _Partial:
        start = block * BLOCK_TOKENS
        position = start + jnp.arange(BLOCK_TOKENS, dtype=jnp.int32)
        slots = _cached(tile.cache, start, new)
        if with_new and tile.is_chain:
            slots = _overlay(slots, new, exists, position)
        visible = mask.allows(asking, Tokens(position[None, :], is_new=False))
        readable = jnp.moveaxis(visible, 1, 0)[:, :, None, :] & slots.readable[None]

        def one_query(inputs) -> _Partial:
            query, readable, reads_new, seen = inputs
            own_slots = slots._replace(readable=readable)
            if with_new and not tile.is_chain:
                own_slots = _overlay(own_slots, new, reads_new, position)
            return _absorb(seen, query, own_slots, scale=scale, softcap=softcap)

        return jax.lax.map(one_query, (queries, readable, reads_new, seen))

    nothing = jnp.zeros(queries.shape[:-1], jnp.float32)
    seen = _Partial(nothing + _MASKED, nothing, jnp.zeros(queries.shape, jnp.float32))
    first = jnp.maximum(jnp.min(mask.first_visible(asking.position)), 0) // BLOCK_TOKENS
    end = jnp.max(asking.position) // BLOCK_TOKENS + 1
    first_new = jnp.min(new.position, where=exists, initial=jnp.iinfo(jnp.int32).max) // BLOCK_TOKENS
    first_new = jnp.clip(first_new, first, end)
    seen = jax.lax.fori_loop(first, first_new, partial(read, with_new=False), seen)
    seen = jax.lax.fori_loop(first_new, end, partial(read, with_new=True), seen)
    total = jnp.where(seen.total > 0, seen.total, 1.0)
    output = (seen.output / total[..., None]).astype(value.dtype)

    def as_rows(per_query: Array) -> Array:
        rows = jnp.moveaxis(per_query, 0, 1).reshape(-1, *query.shape[1:3], *per_query.shape[4:])
        return jnp.pad(rows, [(0, query.shape[0] - rows.shape[0])] + [(0, 0)] * (rows.ndim - 1))

    output = without_share(as_rows(output), as_rows(seen.maximum + jnp.log(total)), sink)
    return jax.lax.optimization_barrier(output)


def _new_tokens(tile: Tile, own: KVRows, position: Int[Array, "B T"]) -> _New:
    dtype = own.key.dtype if tile.cache is None else tile.cache.key.dtype
    parts = [own] if tile.rows is None else [tile.rows, own]
    key = jnp.concatenate([rows.key.astype(dtype) for rows in parts], axis=2)
    value = jnp.concatenate([rows.value.astype(dtype) for rows in parts], axis=2)
    key, value = contained(key, value)
    return _New(key, value, position if tile.position is None else jnp.concatenate([tile.position, position], axis=1))


def _cached(cache: KVCache | None, start: Int[Array, ""], new: _New) -> _Slots:
    """The cache's slots from `start` on, each in the same place whatever the capacity; empty ones without a cache."""
    batch, num_kv_heads, _, head_size = new.key.shape
    if cache is None:
        empty = jnp.zeros((batch, num_kv_heads, BLOCK_TOKENS, head_size), new.key.dtype)
        return _Slots(empty, empty, jnp.zeros((batch, 1, BLOCK_TOKENS), bool))
    width = min(BLOCK_TOKENS, cache.capacity)
    begin = jnp.minimum(start, cache.capacity - width)
    key, value, _, filled = cache.read(begin, width)
    if cache.capacity % BLOCK_TOKENS:  # the last slots are read with some before them, and moved to where they belong

        def moved(slots: Array) -> Array:
            padded = jnp.pad(slots, [(0, BLOCK_TOKENS if axis == 2 else 0) for axis in range(slots.ndim)])
            return jax.lax.dynamic_slice_in_dim(padded, start - begin, BLOCK_TOKENS, axis=2)

        key, value, filled = moved(key), moved(value), moved(filled)
    is_slot = start + jnp.arange(BLOCK_TOKENS, dtype=jnp.int32) < cache.capacity
    return _Slots(key, value, filled & is_slot[None, None, :])


def _overlay(slots: _Slots, new: _New, reads: Bool[Array, "#B U"], position: Int[Array, " S"]) -> _Slots:
    """The slots of these positions, in which every new token that is read has taken its place."""
    stands = reads[:, None, :] & (new.position[:, None, :] == position[None, :, None])
    index = jnp.argmax(stands, axis=2)[:, None, :, None]
    is_new = jnp.any(stands, axis=2)[:, None, :]
    key = jnp.where(is_new[..., None], jnp.take_along_axis(new.key, index, axis=2), slots.key)
    value = jnp.where(is_new[..., None], jnp.take_along_axis(new.value, index, axis=2), slots.value)
    return _Slots(key, value, slots.readable | is_new)


def _absorb(
    seen: _Partial, query: Float[Array, "B K G H"], slots: _Slots, *, scale: float, softcap: float | None
) -> _Partial:
    """The softmax of one query per batch row, with a block of slots added.

    The barriers keep XLA from merging a product and a sum into one rounding in one program and not in another.
    """
    query, slots = jax.lax.optimization_barrier((query, slots))
    score = jnp.einsum("bkgh,bksh->bkgs", query, slots.key, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        score = softcap * jnp.tanh(score / softcap)
    readable = slots.readable[:, :, None, :]
    score = jax.lax.optimization_barrier(jnp.where(readable, score, _MASKED))
    maximum = jnp.maximum(seen.maximum, jnp.max(score, axis=-1))
    weight = jnp.where(readable, jnp.exp(score - maximum[..., None]), 0.0)
    decay = jnp.exp(seen.maximum - maximum)
    weight, decay = jax.lax.optimization_barrier((weight, decay))
    mixed = jnp.einsum(
        "bkgs,bksh->bkgh", weight.astype(slots.value.dtype), slots.value, preferred_element_type=jnp.float32
    )
    total = seen.total * decay + jnp.sum(weight, axis=-1)
    return jax.lax.optimization_barrier(_Partial(maximum, total, seen.output * decay[..., None] + mixed))
