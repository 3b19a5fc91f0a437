"""Chooses the draft tree of a given size with the longest expected accepted path.

If a node's r-th child is the target's token with probability a[r], a path is accepted with the product of its tokens'
probabilities, and the expected number of accepted tokens is the sum of these products over all nodes. So the best tree
of n nodes has the n largest products; it is connected, as a product falls along a path.

Sequoia, arXiv 2402.12374, and Medusa, arXiv 2401.10774 (section 2.3.3), choose in this way. Here the probabilities may
depend on the depth or not.
"""

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from decodax.decoding.ranked_tokens import sibling_ranks
from decodax.decoding.tree import Tree


def best_tree(acceptance: Sequence[Sequence[float]] | Sequence[float], num_tokens: int) -> tuple[int, ...]:
    """Parents of the tree with `num_tokens` nodes after the root, numbered level by level, siblings by rank.

    acceptance: probability that a node's r-th child is the target's token, one sequence for all depths, or one per
        depth (the last holds for all that follow).
    Raises ValueError for fewer tokens than 1, and for numbers that are no probabilities.

    >>> best_tree([0.6, 0.2, 0.1], 5)  # products: .6, .36, .216, .2, .1296
    (-1, 0, 0, 1, 3, 4)
    """
    table = np.atleast_2d(np.asarray(acceptance, np.float64))
    if num_tokens < 1:
        raise ValueError(f"a draft must hold at least 1 token, got {num_tokens}")
    if table.ndim != 2 or not np.all((table >= 0) & (table <= 1)) or np.any(table.sum(axis=1) > 1 + 1e-6):
        raise ValueError(f"acceptance must be probabilities of the children of a node, at most 1 in all, got {table}")
    # Paths are tuples of ranks; the heap holds those whose parent is in the tree.
    frontier: list[tuple[float, tuple[int, ...]]] = [(-value, (rank,)) for rank, value in enumerate(table[0])]
    heapq.heapify(frontier)
    taken: list[tuple[int, ...]] = []
    while frontier and len(taken) < num_tokens:
        value, path = heapq.heappop(frontier)
        taken.append(path)
        for rank, share in enumerate(table[min(len(path), len(table) - 1)]):
            heapq.heappush(frontier, (value * share, (*path, rank)))
    paths = sorted(taken, key=lambda path: (len(path), path))
    index = {(): 0} | {path: node for node, path in enumerate(paths, start=1)}
    return (-1, *(index[path[:-1]] for path in paths))


def acceptance_probabilities(
    acceptance: Sequence[Sequence[float]] | Sequence[float], parents: Sequence[int]
) -> Float[np.ndarray, " C"]:
    """The probability that each node of a tree is accepted, under the same assumption; that of the root is 1.

    acceptance: as in `best_tree`; a child beyond the ranks of its depth is never accepted.

    >>> acceptance_probabilities([0.6, 0.2], (-1, 0, 0, 1)).tolist()
    [1.0, 0.6, 0.2, 0.36]
    """
    levels: Sequence[Any] = acceptance if np.ndim(acceptance[0]) else [acceptance]
    ranks, depth = sibling_ranks(parents), np.asarray(Tree.fixed(parents).depth)[0]
    accepted = np.ones(len(parents))
    for node in range(1, len(parents)):
        shares = levels[min(depth[node], len(levels)) - 1]
        accepted[node] = accepted[parents[node]] * (shares[ranks[node]] if ranks[node] < len(shares) else 0.0)
    return accepted


def expected_tokens(acceptance: Sequence[Sequence[float]] | Sequence[float], parents: Sequence[int]) -> float:
    """Expected tokens per target forward of a tree, the target's own included, under the same assumption.

    >>> round(expected_tokens([0.6], (-1, 0, 1)), 2)  # 1 + .6 + .36
    1.96
    """
    return float(acceptance_probabilities(acceptance, parents).sum())
