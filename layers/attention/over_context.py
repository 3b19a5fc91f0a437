"""Attention whose tokens, or whose cache's slots, are split over devices: context parallelism.

Everything else in a model treats tokens one by one, and XLA splits it by itself. Attention is where tokens meet, and
what happens here within `shard_map` depends on how many new tokens there are.

- Few of them, as when decoding: all devices have them all. Each reads its own slots of the cache, one of them the new
  tokens too, and what they have read is merged (`sharding/split_cache.py`).
- A chunk of a prompt: each device has some of its tokens. They read each other by a ring or by Ulysses
  (`sharding/context.py`), and the cached tokens where these lie.

Heads come in here, too, where key-value heads are fewer than the devices that query heads are split over, and held in
copies: which queries share a head is then no split of one axis that XLA could follow.

Whatever else a mask or a cache may be (a cache of another class, a long tree) is left to XLA, which gets it right and
may gather the cache for it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from decodax.layers import pytree
from decodax.layers.attention.mask import Mask, Span, Tokens
from decodax.layers.execution import STEP_TOKENS, Execution
from decodax.layers.kv_cache._contract import Splittable
from decodax.layers.kv_cache.staged import Staged, num_staged, unstaged
from decodax.sharding.context import choose_way
from decodax.sharding.merging import Part, merge
from decodax.sharding.ring import ring
from decodax.sharding.split_cache import merge_over_devices, read_by_all
from decodax.sharding.ulysses import ulysses


@pytree.dataclass
class OwnSlots(Mask):
    """A mask seen from a device that has the slots from `first` on, counted from 0; `reads_new` says who reads the new.

    Only one device may: what all have read is added up.
    """

    whole: Mask
    first: Int[Array, ""]
    reads_new: Bool[Array, ""]

    def span(self, *, is_new: bool) -> Span | None:
        return self.whole.span(is_new=is_new)

    def allows(self, query: Tokens, key: Tokens) -> Bool[Array, "#B T S"]:
        if key.is_new:
            return self.whole.allows(query, key) & self.reads_new
        return self.whole.allows(query, dataclasses.replace(key, position=key.position + self.first))

    def first_visible(self, position: Int[Array, "B T"]) -> Int[Array, "B T"]:
        return self.whole.first_visible(position) - self.first


def what_is_split(
    num_tokens: int, num_heads: int, num_kv_heads: int, mask: Mask, cache: Any, execution: Execution
) -> Literal["tokens", "slots", "heads"] | None:
    """Which of the ways above attention takes; None: none, as there is one device, or it is left to XLA."""
    axes, bare = execution.mesh_axes("S"), unstaged(cache)
    parts, kv_parts = execution.num_parts("N"), execution.num_parts("K", num_kv_heads)
    if num_heads % parts or kv_parts not in (parts, num_kv_heads):
        return None  # a device's query heads would not find their key-value heads on it
    if bare is not None and not isinstance(bare, Splittable):
        return None
    if execution.num_parts("S") == 1:
        return None if kv_parts == parts else "heads"
    if bare is not None and execution.mesh_axes("S", bare.capacity) != axes:
        return None
    tokens_divide = execution.mesh_axes("T", num_tokens) == axes
    is_chunk = bare is None or num_tokens > STEP_TOKENS
    if is_chunk and tokens_divide and mask.span(is_new=True) is not None and not num_staged(cache):
        return "tokens"
    return None if bare is None else "slots"


Attention = Callable[..., tuple[Array, Array]]  # (*operands, position, mask, cache) -> output and log-sum-exp


def over_heads(attention: Attention, axes: tuple[str | None, ...], execution: Execution) -> Attention:
    """`attention`, run on every device with its heads; the arguments are those of `over_slots`."""

    def on_device(position: Array, mask: Mask, cache: Any, *operands: Any) -> tuple[Array, Array]:
        return attention(*operands, position, mask, cache)

    return _for_operands_first(execution.per_device(on_device, ("B T", None, None, *axes), _RESULT))


def over_slots(attention: Attention, axes: tuple[str | None, ...], execution: Execution) -> Attention:
    """`attention`, run on every device with all new tokens and its slots of the cache, and merged.

    axes: of the operands, the first of which are queries "B T N H"; None: as their classes declare them.
    """
    axis = execution.mesh_axes("S")

    def on_device(position: Array, mask: Mask, cache: Any, *operands: Any) -> tuple[Array, Array]:
        device, bare = jax.lax.axis_index(axis), unstaged(cache)
        first = device * bare.capacity
        own = bare.part(first)
        if isinstance(cache, Staged):
            own = dataclasses.replace(cache, cache=own)
        output, lse = attention(*operands, position, OwnSlots(mask, first, device == 0), own)
        merged = merge_over_devices(Part(output, lse), axis)
        return merged.output.astype(output.dtype), merged.lse

    return _for_operands_first(execution.per_device(on_device, ("B T", None, None, *axes), _RESULT, split="S"))


def over_tokens(
    among_new: Callable[..., Part],
    cached: Callable[..., Part],
    axes: tuple[str | None, ...],
    execution: Execution,
) -> Attention:
    """Attention of a chunk of a prompt, run on every device with its tokens and its slots of the cache.

    among_new: gets a device's part of the operands, and gives what its queries read of all new tokens. cached: gets all
    devices' queries, the other operands, `position`, `mask` and `cache`, and gives what they read of this cache.
    """
    axis = execution.mesh_axes("T")

    def on_device(position: Array, mask: Mask, cache: Any, *operands: Any) -> tuple[Array, Array]:
        query, *others = operands
        part = among_new(*operands)
        if cache is not None:
            first = jax.lax.axis_index(axis) * cache.capacity
            own_mask, own = OwnSlots(mask, first, jnp.bool_(False)), cache.part(first)
            read = lambda query: cached(query, *others, position, own_mask, own)
            part = merge(part, read_by_all(query, read, axis=axis))
        return part.output.astype(query.dtype), part.lse

    # All devices get the positions of all tokens.
    return _for_operands_first(execution.per_device(on_device, ("B _", None, None, *axes), _RESULT, split="TS"))


_RESULT = ("B T N H", "B T N")


def _for_operands_first(run: Callable[..., tuple[Array, Array]]) -> Attention:
    def attention(*arguments: Any) -> tuple[Array, Array]:
        *operands, position, mask, cache = arguments
        return run(position, mask, cache, *operands)

    return attention


def exchange(
    query: Array,
    key: Array,
    value: Array,
    block: Callable[[Array, Array, Array, Array], Part],
    *,
    result_size: int,
    window: int | None,
    execution: Execution,
) -> Part:
    """What a device's queries read of all new tokens, by the way that suits.

    block: what queries read of keys and values, with how many tokens the first query stands behind the first key. Keys
    and values may be anything that is sent in their place, and of which `block` makes them.
    """
    axis = execution.mesh_axes("T")
    way = choose_way(
        execution.context,
        num_tokens=query.shape[1],
        num_devices=execution.num_parts("T"),
        num_heads=query.shape[2],
        num_kv_heads=key.shape[1],
        query_size=query.shape[3],
        kv_size=key.shape[3] + value.shape[3],
        result_size=result_size,
        window=window,
    )
    with jax.named_scope(way):
        if way == "ulysses":
            whole = lambda query, key, value: block(query, key, value, jnp.int32(0))
            return ulysses(query, key, value, whole, axis=axis)
        return ring(query, key, value, block, axis=axis, window=window)
