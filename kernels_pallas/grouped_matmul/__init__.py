"""Computes grouped matmuls, tokens sorted by expert times their expert's weights: MoE without padding or dropping.

Row i of the tokens belongs to the group (expert) that covers it when groups of `group_sizes` rows follow each other.
The work is that of the rows that exist: an empty group costs nothing, and a group's weights are read in place.
MegaBlocks, arXiv 2211.15841. Departs from it: groups are not padded to tiles of rows (a tile that several groups share
is visited once for each), and gate, up and SiLU are one kernel.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from decodax.kernels_pallas.selection import Implementation, KernelSelection, select_in_folder

__all__ = ["grouped_gate_up", "grouped_matmul", "select_grouped_matmul"]


def grouped_matmul(
    tokens: Float[Array, "M D"],
    weight: Float[Array, "E F D"],
    group_sizes: Int[Array, " E"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "M F"]:
    """tokens[i] weight[group of i]^T, summed in float32, in the tokens' dtype; rows after the last group are zeros.

    tokens: sorted by group.
    weight: one matrix per group.
    group_sizes: rows of each group, 0 or more, their sum at most M. Inside `jit`, where it cannot be checked, rows that
        do not exist are left out.
    implementation: None takes the kernel of this device if it supports the operands, else XLA. Only "xla" has
        derivatives.

    Raises ValueError for operands that do not fit each other.
    Raises NotImplementedError if the implementation asked for does not support the operands.
    """
    return _run("grouped_matmul", tokens, {"weight": weight}, group_sizes, implementation)


def grouped_gate_up(
    tokens: Float[Array, "M D"],
    gate: Float[Array, "E F D"],
    up: Float[Array, "E F D"],
    group_sizes: Int[Array, " E"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "M F"]:
    """silu(tokens gate^T) * (tokens up^T) with each row's own gate and up; the first half of a gated expert.

    Both products and the activation are float32, rounded once to the tokens' dtype.

    tokens, group_sizes, implementation: as for `grouped_matmul`.
    gate, up: one matrix per group each.
    """
    return _run("grouped_gate_up", tokens, {"gate": gate, "up": up}, group_sizes, implementation)


def select_grouped_matmul(tokens: Any, *weights: Any, implementation: Implementation | None = None) -> KernelSelection:
    """The implementation for operands of these shapes and dtypes (one matrix per expert, or gate and up), and why."""
    name = "grouped_matmul" if len(weights) == 1 else "grouped_gate_up"
    return select_in_folder("grouped_matmul", implementation, tokens, *weights, name=name)


def _run(
    name: str,
    tokens: jax.Array,
    weights: dict[str, jax.Array],
    group_sizes: jax.Array,
    implementation: Implementation | None,
) -> jax.Array:
    _check(name, tokens, weights, group_sizes)
    operands = (tokens, *weights.values())
    selection = select_grouped_matmul(*operands, implementation=implementation)
    num_outputs = operands[1].shape[1]
    if tokens.shape[0] == 0 or num_outputs == 0 or tokens.shape[1] == 0:
        return jnp.zeros((tokens.shape[0], num_outputs), tokens.dtype)
    with jax.named_scope(name):
        if selection.backend == "xla":
            from decodax.kernels_pallas.grouped_matmul import reference

            return getattr(reference, name)(*operands, group_sizes)
        if selection.backend == "tpu":
            from decodax.kernels_pallas.grouped_matmul import kernel_tpu

            return getattr(kernel_tpu, name)(*operands, group_sizes, interpret=selection.interpret)
        from decodax.kernels_pallas.grouped_matmul import kernel_gpu

        return getattr(kernel_gpu, name)(*operands, group_sizes, interpret=selection.interpret)


def _check(name: str, tokens: jax.Array, weights: dict[str, jax.Array], group_sizes: jax.Array) -> None:
    if tokens.ndim != 2:
        raise ValueError(f"{name}: tokens must be [M, D], got {tokens.shape}; flatten batch and tokens, sort by expert")
    shape = next(iter(weights.values())).shape
    for which, weight in weights.items():
        if weight.ndim != 3 or weight.shape != shape or weight.shape[2] != tokens.shape[1] or not weight.shape[0]:
            raise ValueError(
                f"{name}: {' and '.join(weights)} must be [E, F, D] (outputs x inputs, E at least 1) with D = "
                f"{tokens.shape[1]} of the tokens, got {which} {weight.shape}"
            )
        if weight.dtype != tokens.dtype:
            raise ValueError(f"{name}: {which} must have the tokens' dtype {tokens.dtype}, got {weight.dtype}")
    if group_sizes.shape != shape[:1] or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(
            f"{name}: group_sizes must be integers, one per expert ({shape[0]}), got {group_sizes.dtype}"
            f"{list(group_sizes.shape)}"
        )
    if isinstance(group_sizes, Tracer):
        return
    sizes = np.asarray(group_sizes, np.int64)
    if sizes.min() < 0 or sizes.sum() > tokens.shape[0]:
        raise ValueError(
            f"{name}: group_sizes must be 0 or more and sum to at most {tokens.shape[0]} (M, rows of tokens), got sum "
            f"{sizes.sum()} and smallest {sizes.min()}"
        )
