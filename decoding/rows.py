"""Takes rows out of decoding states and puts them into others, found by the axis B that every array declares.

    fresh = prefill(model, params, tokens, length, new, seed, capacity=state.tokens.shape[1])
    state = put_rows(state, jnp.array([3, 0]), fresh)

Whatever has an axis B moves: caches, drafts, histories, options. Numbers that a state keeps for all rows together stay
those of the state that rows are put into.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

from decodax.core.axes import required_axes
from decodax.decoding.programs import bounded_jit
from decodax.decoding.sizes import free_bytes
from decodax.decoding.state import DecodeState

_WHY = "rows are found by the axis B that arrays of a state declare"
Rows = TypeVar("Rows")


def take_rows(state: Rows, rows: Int[Array | np.ndarray, " R"]) -> Rows:
    """The state of these rows, in their order; a state of R rows that goes on as those rows would have.

    state: a `DecodeState`, or a part of one such as its caches or its sampling options.
    rows: indices, which may repeat.
    Raises ValueError for arrays without declared axes.
    """

    def taken(leaf: Array, axes: tuple[str, ...]) -> Array:
        return jnp.take(leaf, rows, axis=axes.index("B")) if "B" in axes else leaf

    leaves, structure = jax.tree.flatten(state)
    pairs = zip(leaves, required_axes(state, _WHY), strict=True)
    return jax.tree.unflatten(structure, [taken(leaf, axes) for leaf, axes in pairs])


def put_rows(state: Rows, rows: Int[Array | np.ndarray, " R"], fresh: Rows) -> Rows:
    """The state with these rows replaced by the R rows of another; a row past the end is dropped.

    Donate `state` to a jitted function that calls this, and its buffers are written in place.

    state: where rows are put; its numbers for all rows together are kept.
    rows: indices in `state`, each once.
    fresh: a state of the same model, capacity and options.
    Raises ValueError for states that differ in more than their rows, and for arrays without declared axes.
    """
    _check_alike(state, fresh)

    def replaced(leaf: Array, new: Array, axes: tuple[str, ...]) -> Array:
        if "B" not in axes:
            return leaf
        place = (slice(None),) * axes.index("B")
        return leaf.at[(*place, rows)].set(new, mode="drop")

    leaves, structure = jax.tree.flatten(state)
    pairs = zip(leaves, jax.tree.leaves(fresh), required_axes(state, _WHY), strict=True)
    return jax.tree.unflatten(structure, [replaced(*pair) for pair in pairs])


def _check_alike(state: object, fresh: object) -> None:
    """Raises ValueError, naming the place, where one state cannot take rows of the other."""
    ours, theirs = jax.tree_util.tree_leaves_with_path(state), jax.tree_util.tree_leaves_with_path(fresh)
    if jax.tree.structure(state) != jax.tree.structure(fresh):
        only = {jax.tree_util.keystr(path) for path, _ in ours} ^ {jax.tree_util.keystr(path) for path, _ in theirs}
        raise ValueError(
            "rows can be put into a state of the same model, strategy and options alone, and these two differ in "
            f"{', '.join(sorted(only)[:3]) or 'what is fixed in them'}: prefill both in the same way"
        )
    for (path, leaf), (_, new), axes in zip(ours, theirs, required_axes(state, _WHY), strict=True):
        sizes = [
            (size, other)
            for name, size, other in zip(axes, leaf.shape, new.shape, strict=True)
            if name != "B" and size != other
        ]
        if "B" in axes and (sizes or leaf.dtype != new.dtype):
            raise ValueError(
                f"rows can be put into a state of the same capacity alone: {jax.tree_util.keystr(path)} has shape "
                f"{list(leaf.shape)} {leaf.dtype}, the new rows {list(new.shape)} {new.dtype}; pass "
                "prefill(..., capacity=state.tokens.shape[1])"
            )


@bounded_jit(static_argnums=(0,), donate_argnums=(1,), name="put_rows")
def put_rows_in_place(
    constrained: Callable[[DecodeState], DecodeState],
    state: DecodeState,
    rows: Int[Array | np.ndarray, " R"],
    fresh: DecodeState,
) -> DecodeState:
    """`put_rows` as a program of its own, to which the state is donated.

    constrained: gives a state its sharding constraints.
    """
    return constrained(put_rows(state, rows, fresh))


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
    axes_of_all = required_axes(state, _WHY)
    rows = [
        jnp.repeat(leaf, count, axis=axes.index("B")) if "B" in axes else leaf
        for leaf, axes in zip(leaves, axes_of_all, strict=True)
    ]
    return constrained(dataclasses.replace(jax.tree.unflatten(structure, rows), seed=seed))
