"""Where the parts of a state lie on a mesh: their axes are read from what their classes declare.

Every array of a state stands in a frozen dataclass with its shape, as in `key: Float[Array, "B K S H"]`. Those letters
are the axes that rules map to a mesh, so a new cache or state needs no second description.
"""

import dataclasses
import typing
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from decodax.layers.axes import AXES
from decodax.sharding.regions import mesh_here
from decodax.sharding.rules import Rules

# What lies in a state between forwards is not split by these: tokens of a forward (T) only are while it runs.
_SPLIT_IN_STATES = AXES - {"T"}


def shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """The tree with a sharding for every array (or its shape): by its declared axes, and replicated without any."""
    leaves, structure = jax.tree.flatten(tree)
    axes = _axes(tree, None)
    assert len(axes) == len(leaves), "every array of a state has its axes, in the same order"
    here = mesh_here(mesh)

    def sharding(leaf: Any, letters: tuple[str, ...]) -> NamedSharding:
        spec = rules.spec(mesh, letters, leaf.shape) if letters else PartitionSpec()
        return NamedSharding(here, spec)

    return jax.tree.unflatten(structure, map(sharding, leaves, axes))


def _axes(node: Any, declared: Any, stacked: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The axes of every array in a tree, in the order of its leaves; empty for one that says nothing.

    stacked: the axes in front of those that are declared.
    """
    if node is None:
        return []
    if dataclasses.is_dataclass(node):
        found = []
        for field in dataclasses.fields(node):
            if not field.metadata.get("static", False):
                in_front = (*stacked, *field.metadata.get("stacked", ()))
                found += _axes(getattr(node, field.name), field.type, in_front)
        return found
    if jax.tree_util.all_leaves([node]):
        rest = node.ndim - len(stacked)
        return [(*stacked, *(_letters(declared, rest) or "_" * rest)) if stacked else _letters(declared, rest)]
    children = jax.tree.leaves(node, is_leaf=lambda child: child is not node)
    return [axes for child in children for axes in _axes(child, None, stacked)]


def _letters(declared: Any, ndim: int) -> tuple[str, ...]:
    """One name per dimension from a jaxtyping annotation, the first of a union that has as many; "_" splits nothing."""
    for option in (declared, *typing.get_args(declared)):
        names = getattr(option, "dim_str", "").split()
        if names and names[0] == "*rows":  # rows, and perhaps nodes of a tree
            names = ["B", *["_"] * (ndim - len(names)), *names[1:]]
        if len(names) == ndim:
            bare = (name.lstrip("#") for name in names)
            return tuple(name if name in _SPLIT_IN_STATES else "_" for name in bare)
    return ()
