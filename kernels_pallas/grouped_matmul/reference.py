"""Computes grouped matmuls in plain JAX, where no kernel takes the operands: a loop over the work list.

XLA's own operation for this, `jax.lax.ragged_dot_general`, takes weights as [E, F, D] too, but on CPU and GPU it masks
the tokens once per expert and multiplies all of them (64 experts: 64 times the work, and E M D numbers of temporary
memory), and on TPU it copies the weights into the transposed layout first. The loop reads each expert's weights in
place, for its own tokens only. (On CPU a slice of an array is copied before a product reads it, whatever the product is
written as: one row costs 1.5 to 1.6 times as much as in a separate matrix, and still less than all alternatives that
were measured: unrolled slices 9 times, a gather of the weights 20 times, sums of products without a copy 2 times.)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.core.linear import linear
from decodax.kernels_pallas.grouped_matmul.work import power_of_two, rows_per_group, work_list


def grouped_matmul(
    tokens: Float[Array, "M D"], weight: Float[Array, "E F D"], group_sizes: Int[Array, " E"]
) -> Float[Array, "M F"]:
    return _grouped(tokens, (weight,), group_sizes, lambda product: product)


def grouped_gate_up(
    tokens: Float[Array, "M D"],
    gate: Float[Array, "E F D"],
    up: Float[Array, "E F D"],
    group_sizes: Int[Array, " E"],
) -> Float[Array, "M F"]:
    return _grouped(tokens, (gate, up), group_sizes, lambda gated, raised: jax.nn.silu(gated) * raised)


def _grouped(
    tokens: jax.Array, weights: tuple[jax.Array, ...], group_sizes: jax.Array, combine: Callable[..., jax.Array]
) -> jax.Array:
    num_rows, num_outputs = tokens.shape[0], weights[0].shape[1]
    tile_rows = _tile_rows(num_rows, rows_per_group(tokens, weights[0]))
    work = work_list(group_sizes, num_rows, tile_rows, multiple=1)

    @jax.checkpoint  # the backward pass reads the weights again, instead of keeping a copy of them per item
    def product(begin: jax.Array, group: jax.Array) -> jax.Array:
        tile = jax.lax.dynamic_slice_in_dim(tokens, begin, tile_rows)
        products = (linear(tile, w[group], output_dtype=jnp.float32) for w in weights)
        return combine(*products).astype(tokens.dtype)

    def item(output: jax.Array, this: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        index, row, group, first, last = this
        begin = jnp.minimum(row, num_rows - tile_rows)
        nothing = lambda begin, group: jnp.zeros((tile_rows, num_outputs), tokens.dtype)
        value = jax.lax.cond(index < work.counts[0], product, nothing, begin, group)
        rows = begin + jnp.arange(tile_rows)
        own = (rows >= first) & (rows < last) & (index < work.counts[0])
        before = jax.lax.dynamic_slice_in_dim(output, begin, tile_rows)
        after = jnp.where(own[:, None], value, before)
        return jax.lax.dynamic_update_slice_in_dim(output, after, begin, axis=0), None

    items = (jnp.arange(len(work.row)), work.row, work.group, work.first, work.last)
    return jax.lax.scan(item, jnp.zeros((num_rows, num_outputs), tokens.dtype), items)[0]


def _tile_rows(num_rows: int, per_group: float) -> int:
    """Rows per tile; 1 if groups seldom have two: a matrix-vector product needs no packing of its operands on CPU."""
    return 1 if per_group <= 0.5 else min(num_rows, power_of_two(per_group, 4, 128))
