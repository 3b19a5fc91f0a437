"""Runs a function on every device's shard (`jax.shard_map`), also inside another such region.

Pipeline stages use one axis of the mesh; kernels and experts within a stage use the others. A nested region must be
given JAX's current abstract mesh, and must not use the outer axes.
"""

from collections.abc import Callable, Set
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from decodax.sharding.rules import automatic


def mesh_here(mesh: Mesh) -> Mesh | AbstractMesh:
    """The mesh to use where this is traced; axes of an enclosing region cannot be split again."""
    here = jax.sharding.get_abstract_mesh()
    return here if AxisType.Manual in here.axis_types else automatic(mesh)


def on_each_device(
    function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any, over: Set[str] | None = None
) -> Callable[..., Any]:
    """`function` run by each device on its shard of the arguments.

    function: of the shards.
    mesh: of the devices.
    in_specs, out_specs: partition specs of the arguments and the results.
    over: the mesh axes of the region, by default all that are left; the compiler partitions over the others.
    """
    here = mesh_here(mesh)
    left = {name for name, kind in zip(here.axis_names, here.axis_types, strict=True) if kind != AxisType.Manual}
    over = left if over is None else over
    if not over:
        return function
    options = {"mesh": here, "axis_names": over, "in_specs": in_specs, "out_specs": out_specs}
    return jax.shard_map(function, check_vma=False, **options)
