"""Repeats the rows of a decoding state, found by the axis B that every array declares."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from decodax.core.axes import required_axes
from decodax.decoding.programs import bounded_jit
from decodax.decoding.sizes import free_bytes
from decodax.decoding.state import DecodeState


def repeat_rows(
    state: DecodeState,
    seed: UInt32[Array | np.ndarray, " B_new"],
    constrained: Callable[[DecodeState], DecodeState],
) -> DecodeState:
    """The state with every row several times, one after the other: samples of prompts that were prefilled once.

    The drafter's state is repeated, too; numbers that it keeps for all rows together stay as they are.

    seed: of each new row; there are a whole number of them for each row.
    constrained: gives a state its sharding constraints, `Speculative.constrained` or those of the model's execution.
    Raises ValueError for arrays without declared axes, and for another number of seeds.
    Raises MemoryError when the rows would not fit.
    """
    batch, num_rows = state.length.shape[0], seed.shape[0]
    if num_rows % batch or not num_rows:
        raise ValueError(f"seed must have one entry for each new row, a multiple of {batch} rows, got {num_rows}")
    needed, free = num_rows // batch * sum(leaf.nbytes for leaf in jax.tree.leaves(state)), free_bytes()
    if free is not None and needed > free:
        raise MemoryError(
            f"{num_rows} samples of {batch} prompts need {needed:,} bytes, and {free:,} are free: ask for fewer, lower "
            "max_new_tokens, or split the batch"
        )
    return _repeated(constrained, state, seed)


@bounded_jit(static_argnums=(0,), name="repeat_rows")
def _repeated(
    constrained: Callable[[DecodeState], DecodeState], state: DecodeState, seed: UInt32[Array, " B_new"]
) -> DecodeState:
    count = seed.shape[0] // state.length.shape[0]
    leaves, structure = jax.tree.flatten(state)
    axes_of_all = required_axes(state, "rows are found by the axis B that arrays of a state declare")
    rows = [
        jnp.repeat(leaf, count, axis=axes.index("B")) if "B" in axes else leaf
        for leaf, axes in zip(leaves, axes_of_all, strict=True)
    ]
    return constrained(dataclasses.replace(jax.tree.unflatten(structure, rows), seed=seed))
