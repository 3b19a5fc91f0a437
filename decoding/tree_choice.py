"""Chooses the draft tree of a given size with the longest expected accepted path.

If a node's r-th child is the target's token with probability a[r], a path is accepted with the product of its tokens'
probabilities, and the expected number of accepted tokens is the sum of these products over all nodes. So the best tree
of n nodes has the n largest products; it is connected, as a product falls along a path.

Sequoia, arXiv 2402.12374, and Medusa, arXiv 2401.10774 (section 2.3.3), choose in this way. Here the probabilities may
depend on the depth or not.
"""

import heapq
from collections.abc import Sequence

import numpy as np


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


def expected_tokens(acceptance: Sequence[Sequence[float]] | Sequence[float], parents: Sequence[int]) -> float:
    """Expected tokens per target forward of a tree, the target's own included, under the same assumption.

    >>> round(expected_tokens([0.6], (-1, 0, 1)), 2)  # 1 + .6 + .36
    1.96
    """
    table = np.atleast_2d(np.asarray(acceptance, np.float64))
    value, depth, siblings = [1.0], [0], [0] * len(parents)
    for parent in parents[1:]:
        share = table[min(depth[parent], len(table) - 1)]
        rank = siblings[parent]
        siblings[parent] += 1
        value.append(value[parent] * (share[rank] if rank < len(share) else 0.0))
        depth.append(depth[parent] + 1)
    return float(sum(value))
