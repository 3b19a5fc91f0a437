"""Runs attention whose tokens, slots or heads are split over devices: context parallelism.

Everything else in a model treats tokens one by one, and XLA splits it by itself. Attention is where tokens meet, and
what happens here within `shard_map` depends on how many new tokens there are.

- Few of them, as when decoding: they are replicated. Each device attends to its own slots of the cache, one of them to
  the new tokens too, and the partial softmaxes are merged (`sharding/split_cache.py`).
- A chunk of a prompt: each device has some of its tokens. They attend to each other by a ring or by Ulysses
  (`sharding/context_algorithm.py`), and to the cached tokens on the devices that have them.

Heads come in here, too, where key-value heads are fewer than the devices that query heads are split over, and held in
copies: which queries share a head is then no split of one axis that XLA could follow.

Whatever else a mask or a cache may be (a cache of another class, a long tree) is left to XLA, which gets it right and
may gather the cache for it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from decodax.core import pytree
from decodax.core.partial_softmax import PartialSoftmax, merge
from decodax.kernels_pallas.decode.new_tokens import MAX_STEP_TOKENS
from decodax.layers.attention.mask import Mask, Span, Tokens
from decodax.layers.execution import Execution
from decodax.layers.kv_cache.contract import Splittable
from decodax.layers.kv_cache.staged import Staged
from decodax.layers.kv_cache.view import committed, num_staged
from decodax.sharding.context_algorithm import select_context_algorithm
from decodax.sharding.ring import ring
from decodax.sharding.split_cache import merge_over_devices, read_by_all
from decodax.sharding.ulysses import ulysses


@pytree.dataclass
class OwnSlots(Mask):
    """A mask for a device that has some of the slots.

    mask: for all slots.
    first: the first slot of the device, counted from 0.
    attends_to_new: whether its queries attend to the new tokens: on one device only, as partial softmaxes are merged.
    """

    mask: Mask
    first: Int[Array, ""]
    attends_to_new: Bool[Array, ""]

    @property
    def attends_ahead(self) -> bool:
        return self.mask.attends_ahead

    def span(self, *, is_new: bool) -> Span | None:
        return self.mask.span(is_new=is_new)

    def allows(self, query: Tokens, key: Tokens) -> Bool[Array, "#B T S"]:
        if key.is_new:
            return self.mask.allows(query, key) & self.attends_to_new
        return self.mask.allows(query, dataclasses.replace(key, position=key.position + self.first))

    def first_visible(self, position: Int[Array, "B T"]) -> Int[Array, "B T"]:
        return self.mask.first_visible(position) - self.first


class Heads(NamedTuple):
    """How many query heads and key-value heads attention has."""

    query: int
    key_value: int


def tokens_unsupported_reason(
    num_tokens: int, heads: Heads, mask: Mask, cache: Any, execution: Execution
) -> str | None:
    """Why `over_tokens` does not run; None if it does."""
    reason = _slots_reason(heads, cache, execution)
    if reason is not None:
        return reason
    if num_staged(cache):
        return "there are staged tokens"
    if committed(cache) is not None and num_tokens <= MAX_STEP_TOKENS:
        return f"up to {MAX_STEP_TOKENS} new tokens after a cache are on every device, these are {num_tokens}"
    if execution.mesh_axes("T", num_tokens) != execution.mesh_axes("S"):
        return f"{num_tokens} tokens do not divide over {execution.num_shards('S')} devices"
    if mask.span(is_new=True) is None:
        return f"its mask ({type(mask).__name__}) is no chain with a window"
    return None


def slots_unsupported_reason(heads: Heads, cache: Any, execution: Execution) -> str | None:
    """Why `over_slots` does not run; None if it does."""
    reason = _slots_reason(heads, cache, execution)
    if reason is None and committed(cache) is None:
        return "there is no cache"
    return reason


def heads_unsupported_reason(heads: Heads, cache: Any, execution: Execution) -> str | None:
    """Why `over_heads` does not run; None if it does."""
    reason = _devices_reason(heads, cache, execution)
    if reason is None and execution.num_shards("S") > 1:
        return "slots are split over devices, too"
    if reason is None and execution.num_shards("K", heads.key_value) == execution.num_shards("N"):
        return "XLA can split the heads by itself"
    return reason


def _slots_reason(heads: Heads, cache: Any, execution: Execution) -> str | None:
    """Why attention is not split over the devices that slots and tokens are split over."""
    bare = committed(cache)
    reason = _devices_reason(heads, cache, execution)
    if reason is None and execution.num_shards("S") == 1:
        return "neither slots nor tokens are split over devices"
    if reason is None and bare is not None and execution.mesh_axes("S", bare.capacity) != execution.mesh_axes("S"):
        return f"{bare.capacity} slots do not divide over {execution.num_shards('S')} devices"
    return reason


def _devices_reason(heads: Heads, cache: Any, execution: Execution) -> str | None:
    """Why attention does not run on each device with its share of the operands."""
    bare, num_shards = committed(cache), execution.num_shards("N")
    if heads.query % num_shards or execution.num_shards("K", heads.key_value) not in (num_shards, heads.key_value):
        return f"the query heads of one of {num_shards} devices would not find their key-value heads on it"
    if bare is not None and not isinstance(bare, Splittable):
        return f"the cache ({type(bare).__name__}) is not Splittable"
    return None


Attention = Callable[..., tuple[Array, Array]]  # (*operands, position, mask, cache) -> output and log-sum-exp


def over_heads(attention: Attention, axes: tuple[str | None, ...], execution: Execution) -> Attention:
    """`attention`, run on every device with its heads; the arguments are those of `over_slots`."""

    def on_device(position: Array, mask: Mask, cache: Any, *operands: Any) -> tuple[Array, Array]:
        return attention(*operands, position, mask, cache)

    return _for_operands_first(execution.per_device(on_device, ("B T", None, None, *axes), _RESULT))


def over_slots(attention: Attention, axes: tuple[str | None, ...], execution: Execution) -> Attention:
    """`attention`, run on every device with all new tokens and its slots of the cache, and merged.

    attention: of one device.
    axes: of the operands, the first of which are queries "B T N H"; None: as their classes declare them.
    execution: the devices.
    """
    axis = execution.mesh_axes("S")

    def on_device(position: Array, mask: Mask, cache: Any, *operands: Any) -> tuple[Array, Array]:
        device, bare = jax.lax.axis_index(axis), committed(cache)
        first = device * bare.capacity
        own = bare.shard(first)
        if isinstance(cache, Staged):
            own = dataclasses.replace(cache, cache=own)
        output, lse = attention(*operands, position, OwnSlots(mask, first, device == 0), own)
        merged = merge_over_devices(PartialSoftmax(output, lse), axis)
        return merged.output.astype(output.dtype), merged.lse

    return _for_operands_first(execution.per_device(on_device, ("B T", None, None, *axes), _RESULT, split="S"))


def over_tokens(
    among_new: Callable[..., PartialSoftmax],
    cached: Callable[..., PartialSoftmax],
    axes: tuple[str | None, ...],
    execution: Execution,
) -> Attention:
    """Attention of a chunk of a prompt, run on every device with its tokens and its slots of the cache.

    among_new: of a device's share of the operands, the attention of its queries to all new tokens.
    cached: of all devices' queries, the other operands, `position`, `mask` and `cache`, the attention to this device's
        slots.
    axes: of the operands, the first of which are queries "B T N H".
    execution: the devices.
    """
    axis = execution.mesh_axes("T")

    def on_device(position: Array, mask: Mask, cache: Any, *operands: Any) -> tuple[Array, Array]:
        query, *others = operands
        partial = among_new(*operands)
        if cache is not None:
            first = jax.lax.axis_index(axis) * cache.capacity
            own_mask, own = OwnSlots(mask, first, jnp.bool_(False)), cache.shard(first)
            read = lambda query: cached(query, *others, position, own_mask, own)
            partial = merge(partial, read_by_all(query, read, axis=axis))
        return partial.output.astype(query.dtype), partial.lse

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
    block: Callable[[Array, Array, Array, Array], PartialSoftmax],
    *,
    result_size: int,
    window: int | None,
    execution: Execution,
) -> PartialSoftmax:
    """The attention of a device's queries to all new tokens, by the algorithm that `execution` or the sizes select.

    query: of the device's tokens.
    key, value: of the device's tokens; or what is sent in their place, of which `block` makes them.
    block: attention of queries to keys and values; its last argument is how many tokens the first query is after the
        first key.
    result_size: numbers of an output head.
    window: tokens that a query attends to at most, None for all.
    execution: the devices, and which algorithm is asked for.
    """
    axis = execution.mesh_axes("T")
    algorithm = select_context_algorithm(
        execution.context,
        num_tokens=query.shape[1],
        num_devices=execution.num_shards("T"),
        num_heads=query.shape[2],
        num_kv_heads=key.shape[1],
        query_size=query.shape[3],
        kv_size=key.shape[3] + value.shape[3],
        result_size=result_size,
        window=window,
    )
    with jax.named_scope(algorithm):
        if algorithm == "ulysses":
            of_all = lambda query, key, value: block(query, key, value, jnp.int32(0))
            return ulysses(query, key, value, of_all, axis=axis)
        return ring(query, key, value, block, axis=axis, window=window)
