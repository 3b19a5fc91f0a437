"""Derives the shardings of a state on a mesh from the array axes that its classes declare.

Every array of a state is a field of a frozen dataclass with its shape, as in `key: Float[Array, "B K S H"]`. Sharding
rules map those logical axes to a mesh, so a new cache or state needs no second description.
"""

import dataclasses
import typing
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from decodax.core.axes import AXES
from decodax.sharding.regions import mesh_here
from decodax.sharding.rules import Rules

# Arrays of a state are not split by T between forwards: the tokens of a forward are split only while it runs.
_SPLIT_IN_STATES = AXES - {"T"}


def shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """The tree with a sharding for every array (or its shape): by its declared axes; without axes, replicated."""
    leaves, structure = jax.tree.flatten(tree)
    axes = _axes(tree, None)
    assert len(axes) == len(leaves), "every array of a state has its axes, in the same order"
    here = mesh_here(mesh)

    def sharding(leaf: Any, axis_names: tuple[str, ...]) -> NamedSharding:
        spec = rules.spec(mesh, axis_names, leaf.shape) if axis_names else PartitionSpec()
        return NamedSharding(here, spec)

    return jax.tree.unflatten(structure, map(sharding, leaves, axes))


def _axes(node: Any, declared: Any, stacked: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The axes of every array in a tree, in the order of its leaves; empty for an array without declared axes.

    stacked: the axes before those that are declared.
    """
    if node is None:
        return []
    if dataclasses.is_dataclass(node):
        found = []
        for field in dataclasses.fields(node):
            if not field.metadata.get("static", False):
                outer = (*stacked, *field.metadata.get("stacked", ()))
                found += _axes(getattr(node, field.name), field.type, outer)
        return found
    if jax.tree_util.all_leaves([node]):
        rest = node.ndim - len(stacked)
        return [(*stacked, *(_axis_names(declared, rest) or "_" * rest)) if stacked else _axis_names(declared, rest)]
    children = jax.tree.leaves(node, is_leaf=lambda child: child is not node)
    return [axes for child in children for axes in _axes(child, None, stacked)]


def _axis_names(declared: Any, ndim: int) -> tuple[str, ...]:
    """One name per dimension from a jaxtyping annotation, or the first of a union that fits; "_" is never split."""
    for option in (declared, *typing.get_args(declared)):
        names = getattr(option, "dim_str", "").split()
        if names and names[0] == "*rows":  # rows, and perhaps nodes of a tree
            names = ["B", *["_"] * (ndim - len(names)), *names[1:]]
        if len(names) == ndim:
            bare = (name.lstrip("#") for name in names)
            return tuple(name if name in _SPLIT_IN_STATES else "_" for name in bare)
    return ()
