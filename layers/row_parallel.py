"""Computes the row-parallel linear layer that ends a mixer or feed-forward: inputs are split, products are summed.

As in Megatron-LM (arXiv 1909.08053); with sequence parallelism (arXiv 2205.05198) the all-reduce is a reduce-scatter.
"""

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from decodax.core.linear import linear
from decodax.layers.execution import Execution, sequence_sharding
from decodax.sharding.regions import on_each_device


def row_parallel_linear(
    inputs: Float[Array, "B T in_"],
    weight: Float[Array, "D in_"],
    bias: Float[Array, " D"] | None = None,
    *,
    axis_name: str,
    execution: Execution,
) -> Float[Array, "B T D"]:
    """`linear` for a product whose inputs may be split over devices.

    Each device has a partial sum. By default the compiler inserts an all-reduce; with `sequence_parallel` a
    reduce-scatter gives each device the sum of its own rows or tokens.

    inputs, weight, bias: as in `linear`.
    axis_name: logical axis of the inputs: heads or features.
    execution: with the mesh.
    """
    input_axes = execution.mesh_axes(axis_name)
    scatter = sequence_sharding(execution, *inputs.shape[:2]) if execution.sequence_parallel and input_axes else None
    if scatter is None or scatter.axis is None:
        return linear(inputs, weight, bias)
    assert execution.mesh is not None
    axis = scatter.axis

    def own(inputs: Array, weight: Array) -> Array:
        return jax.lax.psum_scatter(linear(inputs, weight), input_axes, scatter_dimension=axis, tiled=True)

    token_axes = [execution.mesh_axes(name, size) or None for name, size in zip("BT", inputs.shape, strict=False)]
    in_specs = (PartitionSpec(*token_axes, input_axes), PartitionSpec(None, input_axes))
    summed = on_each_device(own, execution.mesh, in_specs, scatter.spec)(inputs, weight)
    return summed if bias is None else summed + bias.astype(summed.dtype)[None, None, :]
