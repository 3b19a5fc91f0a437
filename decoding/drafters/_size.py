"""Fills in a drafter's number of nodes and depth, which follow from what it was made with: for its `__post_init__`."""

from collections.abc import Sequence

import numpy as np

from decodax.decoding.drafters._contract import Drafter
from decodax.decoding.tree import Tree


def set_size(drafter: Drafter, num_nodes: int, max_depth: int) -> None:
    """The drafter is a frozen dataclass, so that plain assignment would raise."""
    object.__setattr__(drafter, "num_nodes", num_nodes)
    object.__setattr__(drafter, "max_depth", max_depth)


def set_chain(drafter: Drafter, num_tokens: int) -> None:
    """The root and `num_tokens` tokens behind it; raises ValueError for none."""
    if num_tokens < 1:
        raise ValueError(f"a draft must hold at least 1 token, got {num_tokens}")
    set_size(drafter, num_tokens + 1, num_tokens)


def set_tree(drafter: Drafter, parents: Sequence[int]) -> None:
    """A fixed tree (`parents` as in `Tree.fixed`); raises ValueError where it has no node but the root."""
    tree = Tree.fixed(parents)
    if tree.num_nodes < 2:
        raise ValueError("a draft must hold at least 1 token, got 0: for none, use the strategy 'autoregressive'")
    set_size(drafter, tree.num_nodes, int(np.max(tree.depth)))
