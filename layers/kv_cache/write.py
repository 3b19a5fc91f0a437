"""Writes rows of new tokens into the buffer of a cache, each batch row at its own slots.

Batch rows, and heads, are dimensions that the scatter is batched over. So the compiler writes on every device what lies
there, whichever of the dimensions are split, slots included, and nothing is sent but rows that are themselves split by
tokens. With an index for each batch row and head, it gathers all rows on all devices first.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


def write_tokens(
    buffer: Shaped[Array, "B *slots"], rows: Shaped[Array, "B *tokens"], slot: Int[Array, "B T"], *, axis: int
) -> Shaped[Array, "B *slots"]:
    """The buffer with new token t of batch row b at `slot[b, t]`; what is behind the last slot is dropped.

    axis: of the slots in `buffer` and the tokens in `rows`. The axes before it, batch rows and heads, are batched over.
    """

    def write(slots: Array, new: Array, slot: Array) -> Array:
        return slots.at[slot].set(new.astype(slots.dtype), mode="drop")

    for _ in range(axis):
        write = jax.vmap(write)
    # A slot for every head: as part of what is written, heads would stand beside tokens in XLA's layout for TPU, and a
    # loop would copy the whole cache at every step into the layout that a kernel reads.
    slot = jnp.expand_dims(slot, tuple(range(1, axis)))
    return write(buffer, rows, jnp.broadcast_to(slot, rows.shape[: axis + 1]))
