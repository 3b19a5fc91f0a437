"""The one place where activations meet a weight matrix.

Every projection of every layer goes through `linear`, so that another kind of weight (quantised, low-rank, sharded in a
special way) is one more case here and nowhere else.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from decodax.layers.execution import Execution, scatter_of
from decodax.sharding.regions import on_each_device


def linear(
    inputs: Float[Array, "*batch in_"],
    weight: Float[Array, "out in_"],
    bias: Float[Array, " out"] | None = None,
    *,
    output_dtype: DTypeLike | None = None,
) -> Float[Array, "*batch out"]:
    """inputs times weight transposed, plus bias; the weight is [outputs, inputs], the result in `output_dtype`.

    XLA's CPU backend reads a two-dimensional weight in place. It repacks the second operand of a matrix product at
    every call, so there the weight comes first: measured 1.2 to 2 times faster for 2 to 64 rows. The barrier keeps XLA
    from swapping the operands back. Axes of the inputs stay apart, as rows and tokens may be split over devices.
    """
    last = inputs.ndim - 1
    dtype = output_dtype or inputs.dtype

    def weight_first(inputs: Array, weight: Array) -> Array:
        product = jax.lax.dot_general(weight, inputs, (((1,), (last,)), ((), ())), preferred_element_type=dtype)
        return jnp.moveaxis(jax.lax.optimization_barrier(product), 0, last)

    def weight_last(inputs: Array, weight: Array) -> Array:
        return jax.lax.dot_general(inputs, weight, (((last,), (1,)), ((), ())), preferred_element_type=dtype)

    if inputs.size > inputs.shape[-1]:
        # By the device that the program is compiled for, which need not be one of this machine.
        product = jax.lax.platform_dependent(inputs, weight, cpu=weight_first, default=weight_last)
    else:
        product = weight_last(inputs, weight)
    return product if bias is None else product + bias.astype(product.dtype).reshape(*[1] * last, -1)


def linear_from_parts(
    inputs: Float[Array, "B T in_"],
    weight: Float[Array, "D in_"],
    bias: Float[Array, " D"] | None = None,
    *,
    letter: str,
    execution: Execution,
) -> Float[Array, "B T D"]:
    """`linear` for the product that ends a part of a block, whose inputs (heads or features, `letter`) may be split.

    Each device has its part of a sum. By default the compiler adds the parts up for all devices (an all-reduce); with
    `scatter_norms` each gets the sum of its own rows or tokens (a reduce-scatter).
    """
    parts = execution.mesh_axes(letter)
    scatter = scatter_of(execution, *inputs.shape[:2]) if execution.scatter_norms and parts else None
    if scatter is None or scatter.axis is None:
        return linear(inputs, weight, bias)
    assert execution.mesh is not None
    axis = scatter.axis

    def own(inputs: Array, weight: Array) -> Array:
        return jax.lax.psum_scatter(linear(inputs, weight), parts, scatter_dimension=axis, tiled=True)

    whole = [execution.mesh_axes(name, size) or None for name, size in zip("BT", inputs.shape, strict=False)]
    in_specs = (PartitionSpec(*whole, parts), PartitionSpec(None, parts))
    summed = on_each_device(own, execution.mesh, in_specs, scatter.spec)(inputs, weight)
    return summed if bias is None else summed + bias.astype(summed.dtype)[None, None, :]
