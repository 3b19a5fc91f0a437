"""Writes new tokens into the buffer of a cache, each row at its own slots.

The scatter is batched over rows and heads. So every device writes its own shard, whichever of the dimensions are split,
slots included, and nothing is sent but new tokens that are themselves split by tokens. With a scatter index for each
row and head, the compiler gathers all rows on all devices first.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped


def slots_after(length: Int[Array, " B"], count: Int[Array, " B"], num_tokens: int, capacity: int) -> Int[Array, "B T"]:
    """Where each of a row's new tokens goes: after its `length`; the capacity, so nowhere, from its `count` on.

    Tokens beyond the last slot go to the last one.
    """
    offset = jnp.arange(num_tokens, dtype=jnp.int32)[None, :]
    after = jnp.minimum(length[:, None] + offset, capacity - 1)
    return jnp.where(offset < count[:, None], after, capacity)


def invalid_without_room(
    tokens: Shaped[Array, "B *tokens"], overflows: Bool[Array, " B"]
) -> Shaped[Array, "B *tokens"]:
    """The new tokens, NaN in the rows that have no room for theirs: decoding loops then report these rows as failed."""
    rows = overflows.reshape(-1, *[1] * (tokens.ndim - 1))
    return jnp.where(rows, jnp.full((), jnp.nan, tokens.dtype), tokens)


def write_tokens(
    buffer: Shaped[Array, "B *slots"], tokens: Shaped[Array, "B *tokens"], slot: Int[Array, "B T"], *, axis: int
) -> Shaped[Array, "B *slots"]:
    """The buffer with new token t of row b at `slot[b, t]`; a slot beyond the last is dropped.

    buffer: of the cache.
    tokens: new tokens.
    slot: of each new token.
    axis: of the slots in `buffer` and of the tokens in `tokens`. The axes before it, rows and heads, are batched.
    """

    def write(slots: Array, new: Array, slot: Array) -> Array:
        return slots.at[slot].set(new.astype(slots.dtype), mode="drop")

    for _ in range(axis):
        write = jax.vmap(write)
    # A slot for every head: if heads were in the scatter's window, XLA's layout for TPU would put them beside tokens,
    # and a loop would copy the full cache at every step into the layout that a kernel reads.
    slot = jnp.expand_dims(slot, tuple(range(1, axis)))
    return write(buffer, tokens, jnp.broadcast_to(slot, tokens.shape[: axis + 1]))
