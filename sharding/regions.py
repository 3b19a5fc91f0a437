"""Code that every device runs on its own part (`jax.shard_map`), also inside other such code.

Pipeline stages run so over one axis of the mesh, and kernels and experts within a stage over the others. Within, JAX
wants the mesh by which it describes the place where it is, and the outer axes left alone.
"""

from collections.abc import Callable, Set
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from decodax.sharding.rules import automatic


def mesh_here(mesh: Mesh) -> Mesh | AbstractMesh:
    """The mesh as it has to be named where this is traced; over axes taken by code around it nothing can be split."""
    here = jax.sharding.get_abstract_mesh()
    return here if AxisType.Manual in here.axis_types else automatic(mesh)


def on_each_device(
    function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any, over: Set[str] | None = None
) -> Callable[..., Any]:
    """`function` run by each device on its part of the arguments, by their partition specs.

    over: the axes of the mesh that are divided so, all that are left by default; over others the compiler goes on.
    """
    here = mesh_here(mesh)
    left = {name for name, kind in zip(here.axis_names, here.axis_types, strict=True) if kind != AxisType.Manual}
    over = left if over is None else over
    if not over:
        return function
    options = {"mesh": here, "axis_names": over, "in_specs": in_specs, "out_specs": out_specs}
    return jax.shard_map(function, check_vma=False, **options)
