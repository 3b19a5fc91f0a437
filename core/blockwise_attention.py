"""Computes attention in plain JAX over keys that come block by block: new tokens, and the slots of a cache.

This is what runs where no kernel does, and what the kernels are tested against: `attend_in_xla` in models and the
`reference.py` of the kernel folders are made of these functions. No array of all scores exists, and a cache is read
where it is.

The queries that share a key-value head (GQA, arXiv 2305.13245) are the rows of one matrix: Q = T G of them, token by
token, each with its G heads.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int

from decodax.core.partial_softmax import OnlineSoftmax

BLOCK_TOKENS = 256  # cached tokens per step on CPU: 128 to 512 were measured, 256 is fastest
ACCELERATOR_BLOCK_TOKENS = 2048  # a step of a loop costs a host round trip there; not measured
WHOLE_FROM = 0.75  # on CPU, the share of the cache in use from which one block of all slots is faster


class KeyBlock(NamedTuple):
    """Keys and values of S tokens, which of them each of T queries attends to, and what is added to the scores."""

    key: Float[Array, "B K S H"]
    value: Float[Array, "B K S I"]
    allowed: Bool[Array, "#B #K #T S"]
    bias: Float32[Array, "B K Q S"] | None = None

    def without_unread(self) -> "KeyBlock":
        """Values that no query attends to as zeros: slots never written may hold NaN, and 0 x NaN is NaN."""
        is_read = jnp.any(self.allowed, axis=2)[..., None]
        return self._replace(value=jnp.where(is_read, self.value, jnp.zeros((), self.value.dtype)))


class Slots(NamedTuple):
    """Consecutive slots of keys and values, read some at a time.

    read: gives slots, by the first of them and their number; they exist.
    capacity: how many there are.
    """

    read: Callable[[Int[Array, ""], int], KeyBlock]
    capacity: int

    def block(self, index: Int[Array, ""], num_tokens: int) -> KeyBlock:
        """Block number `index`. The last may not fit: it starts earlier, and masks the slots of the block before it."""
        start = jnp.minimum(index * num_tokens, self.capacity - num_tokens)
        block = self.read(start, num_tokens)
        is_own = start + jnp.arange(num_tokens, dtype=jnp.int32) >= index * num_tokens
        return block._replace(allowed=block.allowed & is_own[None, None, None, :])


def group_queries(query: Float[Array, "B T N H"], num_kv_heads: int) -> Float[Array, "B K Q H"]:
    """The queries of each key-value head as one matrix."""
    batch, num_queries, _, head_size = query.shape
    by_head = jnp.moveaxis(query.reshape(batch, num_queries, num_kv_heads, -1, head_size), 1, 2)
    return by_head.reshape(batch, num_kv_heads, -1, head_size)


def finish_by_query(
    seen: OnlineSoftmax, num_queries: int, dtype: DTypeLike
) -> tuple[Float[Array, "B T N I"], Float32[Array, "B T N"]]:
    """The outputs in `dtype` and the log-sum-exps, by token and head."""

    def by_query(grouped: Array) -> Array:
        batch, num_kv_heads, _, *rest = grouped.shape
        apart = grouped.reshape(batch, num_kv_heads, num_queries, -1, *rest)
        return jnp.moveaxis(apart, 1, 2).reshape(batch, num_queries, -1, *rest)

    output, lse = seen.finish(dtype)
    return by_query(output), by_query(lse)


def attend_to_block(
    seen: OnlineSoftmax,
    query: Float[Array, "B K Q H"],
    block: KeyBlock,
    *,
    scale: float,
    softcap: float | None,
    reproducible: bool = False,
) -> OnlineSoftmax:
    """The softmax over the keys so far and those of one block.

    seen: over the keys so far.
    query: as `group_queries` gives them.
    block: more keys.
    scale: of the products of queries and keys.
    softcap: scores become softcap tanh(score / softcap) (Gemma 2, arXiv 2408.00118).
    reproducible: see `OnlineSoftmax.absorb`.
    """
    score = jnp.einsum("bkqh,bksh->bkqs", query, block.key, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        score = softcap * jnp.tanh(score / softcap)
    if block.bias is not None:
        score = score + block.bias
    allowed = block.allowed
    if allowed.shape[2] > 1:
        allowed = jnp.repeat(allowed, query.shape[2] // allowed.shape[2], axis=2)
    return seen.absorb(score, allowed, block.value, reproducible=reproducible)


def attend_to_slots(
    seen: OnlineSoftmax,
    query: Float[Array, "B K Q H"],
    slots: Slots,
    first: Int[Array, ""],
    end: Int[Array, ""],
    *,
    scale: float,
    softcap: float | None,
    block_tokens: int | None,
    on_cpu: bool,
) -> OnlineSoftmax:
    """The softmax over the keys so far and those of a cache, at least its slots `first` .. `end` - 1.

    seen: over the keys so far.
    query: as `group_queries` gives them.
    slots: of the cache.
    first: no query attends to a slot before it.
    end: nor to this one or one after it.
    scale, softcap: see `attend_to_block`.
    block_tokens: how many slots a step of the loop reads. None: BLOCK_TOKENS, but for few queries all slots are one
        block where that is faster: on CPU once WHOLE_FROM of them are in use, as XLA copies every block before it
        multiplies; on accelerators always, as such a loop costs a host round trip per step there.
    on_cpu: whether the program is compiled for a CPU.
    """
    # With no more queries than a head has coordinates, the scores of the whole cache take no more room than its keys.
    may_be_one_block = block_tokens is None and query.shape[2] <= query.shape[3]
    if block_tokens is None:
        block_tokens = BLOCK_TOKENS if on_cpu or not may_be_one_block else slots.capacity
    size = min(block_tokens, slots.capacity)
    attend = partial(attend_to_block, query=query, scale=scale, softcap=softcap)

    def all_slots(seen: OnlineSoftmax) -> OnlineSoftmax:
        return attend(seen, block=slots.read(jnp.int32(0), slots.capacity))

    def in_blocks(seen: OnlineSoftmax) -> OnlineSoftmax:
        step = lambda index, seen: attend(seen, block=slots.block(index, size))
        return jax.lax.fori_loop(first // size, (end + size - 1) // size, step, seen)

    if size == slots.capacity:
        return all_slots(seen)
    if may_be_one_block:
        return jax.lax.cond(end - first > int(WHOLE_FROM * slots.capacity), all_slots, in_blocks, seen)
    return in_blocks(seen)


def distance_bias(
    slopes: Float32[Array, " N"],
    num_kv_heads: int,
    query_position: Int[Array, "B T"],
    key_position: Int[Array, "#B S"],
) -> Float32[Array, "B K Q S"]:
    """ALiBi's biases, slope x (position of the key - position of the query), of queries as in `group_queries`."""
    distance = (key_position[:, None] - query_position[:, :, None]).astype(jnp.float32)
    by_head = slopes.reshape(1, num_kv_heads, 1, -1, 1) * distance[:, None, :, None]
    return by_head.reshape(distance.shape[0], num_kv_heads, -1, distance.shape[2])


def full_float32(dtype: DTypeLike) -> AbstractContextManager[None]:
    """Within it, products of float32 are computed in full precision, as those of kernels are; others as ever."""
    return jax.default_matmul_precision("highest") if dtype == jnp.float32 else nullcontext()


def loop_tokens(on_cpu: bool) -> int:
    """Slots per step of a loop over a cache that is never one block, as its keys are made when it is read."""
    return BLOCK_TOKENS if on_cpu else ACCELERATOR_BLOCK_TOKENS
