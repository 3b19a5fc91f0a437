"""Computes attention in plain JAX, on any device, with any cache and any mask.

softmax(scale q k^T + mask) v over the union of the cached keys and the keys of this forward, with grouped heads (GQA,
arXiv 2305.13245) and an optional soft-cap on the scores (Gemma 2, arXiv 2408.00118). New tokens come first, then the
cache block by block (`core/blockwise_attention.py`), so no score array over the whole cache exists, and the cache is
never concatenated.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from decodax.core.blockwise_attention import (
    KeyBlock,
    Slots,
    attend_to_block,
    attend_to_slots,
    distance_bias,
    finish_by_query,
    group_queries,
)
from decodax.core.partial_softmax import OnlineSoftmax
from decodax.kernels_pallas.selection import platform_of_device
from decodax.layers.attention.mask import Mask, Tokens
from decodax.layers.attention.nonfinite import mask_nonfinite
from decodax.layers.execution import ON_THIS_DEVICE, Execution
from decodax.layers.kv_cache.contract import ReadableCache
from decodax.layers.kv_cache.staged import Staged
from decodax.layers.kv_cache.view import CacheView, committed

QUERY_TILE_TOKENS = 128  # queries that attend at once to the new tokens up to the last of them: half the scores


class NewKeys(NamedTuple):
    """Keys and values of the staged tokens and, after them, of the new ones."""

    key: Float[Array, "B K U H"]
    value: Float[Array, "B K U I"]
    position: Int[Array, "B U"]


def attend_in_xla(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K U H"],
    value: Float[Array, "B K U H"],
    position: Int[Array, "B T"],
    mask: Mask,
    cache: CacheView,
    *,
    scale: float,
    softcap: float | None,
    execution: Execution = ON_THIS_DEVICE,
    block_tokens: int | None = None,
    slopes: Float32[Array, " N"] | None = None,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]:
    """The attention output of each query, as in `attend`, and the log-sum-exp of its scores.

    query: T new tokens.
    key, value: of the queries' own tokens, or of none (U = 0), and then only the cache is read.
    position: of the new tokens.
    mask: which keys a query attends to. One that attends to none gives 0 and a log-sum-exp of -inf.
    cache: keys and values of earlier tokens, and staged ones.
    scale: of the scores.
    softcap: of the scores, None for none.
    execution: says which device the program is compiled for.
    block_tokens: how many cached tokens one step of a loop reads; the loop stops after the longest row. None: as
        `attend_to_slots` chooses.
    slopes: of each head (`attend`).
    """
    grouped = group_queries(query, key.shape[1])
    options = {"scale": scale, "softcap": softcap, "slopes": slopes}
    if key.shape[2] == 0:
        seen = OnlineSoftmax.start(grouped.shape[:3], value.shape[3])
    else:
        new = staged_and_new(key, value, position, cache)
        if new.key.shape[2] > 1:  # a token alone has no other query
            key, value = mask_nonfinite(new.key, new.value)
            new = new._replace(key=key, value=value)
        tiles = [
            _attend_to_new(grouped, position, mask, new, slice(start, start + QUERY_TILE_TOKENS), **options)
            for start in range(0, query.shape[1], QUERY_TILE_TOKENS)
        ]
        seen = tiles[0] if len(tiles) == 1 else jax.tree.map(lambda *tile: jnp.concatenate(tile, axis=2), *tiles)
    if committed(cache) is not None:
        on_cpu = is_for_cpu(execution)
        seen = _attend_to_cache(
            seen, grouped, position, mask, committed(cache), **options, block_tokens=block_tokens, on_cpu=on_cpu
        )
    return finish_by_query(seen, query.shape[1], value.dtype)


def staged_and_new(
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T I"],
    position: Int[Array, "B T"],
    cache: CacheView,
) -> NewKeys:
    """The staged tokens, if there are any, with the new ones after them."""
    if isinstance(cache, Staged):
        key = jnp.concatenate([cache.update.key.astype(key.dtype), key], axis=2)
        value = jnp.concatenate([cache.update.value.astype(value.dtype), value], axis=2)
        position = jnp.concatenate([cache.position, position], axis=1)
    return NewKeys(key, value, position)


def _attend_to_new(
    grouped: Float[Array, "B K Q H"],
    position: Int[Array, "B T"],
    mask: Mask,
    new: NewKeys,
    tile: slice,
    *,
    scale: float,
    softcap: float | None,
    slopes: Float32[Array, " N"] | None,
) -> OnlineSoftmax:
    """The softmax of some queries over the staged tokens and the new ones, up to the queries if the mask allows it."""
    num_queries, num_staged = position.shape[1], new.position.shape[1] - position.shape[1]
    group, start, end = grouped.shape[2] // num_queries, tile.start, min(tile.stop, num_queries)
    queries = grouped[:, :, start * group : end * group]
    keys_end = num_staged + (num_queries if mask.attends_ahead else end)
    keys = Tokens(new.position[:, :keys_end], is_new=True)
    allowed = mask.allows(Tokens(position[:, start:end], is_new=True, first=start), keys)
    bias = None if slopes is None else distance_bias(slopes, new.key.shape[1], position[:, start:end], keys.position)
    block = KeyBlock(new.key[:, :, :keys_end], new.value[:, :, :keys_end], allowed[:, None], bias)
    seen = OnlineSoftmax.start(queries.shape[:3], new.value.shape[3])
    return attend_to_block(seen, queries, block, scale=scale, softcap=softcap)


def _attend_to_cache(
    seen: OnlineSoftmax,
    grouped: Float[Array, "B K Q H"],
    position: Int[Array, "B T"],
    mask: Mask,
    cache: ReadableCache,
    *,
    scale: float,
    softcap: float | None,
    slopes: Float32[Array, " N"] | None,
    block_tokens: int | None,
    on_cpu: bool,
) -> OnlineSoftmax:
    """The softmax with the cached tokens added, from the first visible one to the longest row's last."""
    first = jnp.maximum(jnp.min(mask.first_visible(position)), 0)
    slots = Slots(partial(_read, cache, mask, position, slopes), cache.capacity)
    options = {"scale": scale, "softcap": softcap, "block_tokens": block_tokens, "on_cpu": on_cpu}
    return attend_to_slots(seen, grouped, slots, first, jnp.max(cache.length), **options)


def _read(
    cache: ReadableCache,
    mask: Mask,
    position: Int[Array, "B T"],
    slopes: Float32[Array, " N"] | None,
    start: Int[Array, ""],
    num_tokens: int,
) -> KeyBlock:
    """Slots of the cache. Their values are used as they are, so a slot that was never written must not hold NaN."""
    key, value, key_position, filled = cache.read(start, num_tokens)
    allowed = mask.allows(Tokens(position, is_new=True), Tokens(key_position, is_new=False))[:, None]
    bias = None if slopes is None else distance_bias(slopes, key.shape[1], position, key_position)
    return KeyBlock(key, value, allowed & filled[:, :, None, :], bias)


def is_for_cpu(execution: Execution) -> bool:
    """Whether a program of this execution is compiled for a CPU, as far as can be said before it is lowered.

    Not by `lax.platform_dependent`: every program would trace the CPU's loop as well, which has no gradient.
    """
    if execution.implementation in ("tpu", "gpu"):
        return False
    if execution.mesh is not None:
        return execution.mesh.devices.flat[0].platform == "cpu"
    return platform_of_device() == "cpu"
