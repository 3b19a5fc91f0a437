"""Derives the shardings of a state on a mesh from the array axes that its classes declare.

Every array of a state is a field of a frozen dataclass with its shape, as in `key: Float[Array, "B K S H"]`. Sharding
rules map those logical axes to a mesh, so a new cache or state needs no second description.
"""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from decodax.core.axes import AXES, OTHER, required_axes
from decodax.sharding.regions import mesh_here
from decodax.sharding.rules import Rules

# Arrays of a state are not split by T between forwards: the tokens of a forward are split only while it runs.
_SPLIT_IN_STATES = AXES - {"T"}


def shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """The tree with a sharding for every array (or its shape), by its declared axes.

    Raises ValueError, with the places, for arrays without declared axes: replicated, they would fill every device.
    """
    leaves, structure = jax.tree.flatten(tree)
    axes = required_axes(tree, "on a mesh the arrays of a state must declare their axes")
    assert len(axes) == len(leaves), "every array of a state has its axes, in the same order"
    here = mesh_here(mesh)

    def sharding(leaf: Any, names: tuple[str, ...]) -> NamedSharding:
        split = [name if name in _SPLIT_IN_STATES else OTHER for name in names]
        return NamedSharding(here, rules.spec(mesh, split, leaf.shape))

    return jax.tree.unflatten(structure, map(sharding, leaves, axes))
