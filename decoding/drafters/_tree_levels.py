"""Lays a fixed tree out in levels for a draft model, with one node more: the token before the last one."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from decodax.decoding.drafters._staged_draft import Layout
from decodax.decoding.tree import Tree


def tree_layout(tree: Tree, length: Int[Array, " B"], lacks_two: Bool[Array, " B"]) -> Layout:
    """The tree, and after its nodes the token before the last one, to which all attend where the cache lacks it."""
    nodes = tree.num_nodes
    depth = np.append(tree.depth[0], -1)
    above = np.pad(tree.ancestors[0] & ~np.eye(nodes, dtype=bool), ((0, 1), (0, 1)))
    above = jnp.broadcast_to(jnp.asarray(above), (length.shape[0], *above.shape))
    above = above.at[:, :nodes, nodes].set(lacks_two[:, None])
    position = jnp.maximum(length[:, None] - 1 + jnp.asarray(depth, jnp.int32)[None, :], 0)
    return Layout(position, above, _levels(tree))


def _levels(tree: Tree) -> Int[np.ndarray, "I W"]:
    """The levels to run: the token before the last one (C), the root, then the nodes with children at each depth.

    Padded with C + 1.
    """
    parent, depth = tree.parent[0], tree.depth[0]
    inner = np.unique(parent[1:])
    levels = [[tree.num_nodes], *(inner[depth[inner] == level] for level in range(int(depth.max())))]
    return _padded(levels, tree.num_nodes + 1)


def children_table(tree: Tree) -> Int[np.ndarray, "C_plus_2 I"]:
    """The children of each node in order; none of the token before the last one (C), nor of padding (C + 1)."""
    return _padded([np.flatnonzero(tree.parent[0] == node) for node in range(tree.num_nodes + 2)], tree.num_nodes + 1)


def _padded(lists: Sequence[Sequence[int] | np.ndarray], filling: int) -> np.ndarray:
    width = max(len(nodes) for nodes in lists)
    return np.array([[*nodes, *[filling] * (width - len(nodes))] for nodes in lists], np.int32)
