"""Lays trees of candidates and prompt tokens out as tables of nodes, which a drafter reads by the row's state."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from decodax.decoding.prompt_tree import PromptTree
from decodax.decoding.ranked_tokens import sibling_ranks


class PromptTables(NamedTuple):
    """The nodes of the trees, one entry per state; trees are padded to one size with unused nodes.

    parent, rank: of each node.
    is_candidate: false for prompt tokens and padding.
    distance: 0 for a candidate, i for the i-th prompt token.
    member: the ensemble member of a prompt token.
    prompt_node[s, c, e, i]: the node of prompt token i of member e after candidate c.
    num_prompts: after each candidate.
    """

    parent: Int[np.ndarray, "I C"]
    rank: Int[np.ndarray, "I C"]
    is_candidate: Bool[np.ndarray, "I C"]
    distance: Int[np.ndarray, "I C"]
    member: Int[np.ndarray, "I C"]
    prompt_node: Int[np.ndarray, "I C n m"]
    num_prompts: Int[np.ndarray, "I C"]


def prompt_table(tree: PromptTree, ensemble: int, distances: int, num_nodes: int) -> PromptTables:
    """One tree's tables: candidates, then for each of them its chains, then padding nodes under the root."""
    count = len(tree.parents)
    parent = [*tree.parents, *[0] * (num_nodes - count)]
    distance, member = np.zeros(num_nodes, np.int32), np.zeros(num_nodes, np.int32)
    prompt_node = np.zeros((num_nodes, ensemble, distances), np.int32)
    node = count
    for candidate, number in enumerate(tree.prompts):
        for own in range(ensemble):
            for step in range(number):
                parent[node] = candidate if step == 0 else node - 1
                distance[node], member[node], prompt_node[candidate, own, step] = step + 1, own, node
                node += 1
    rank = np.pad(sibling_ranks(tree.parents), (0, num_nodes - count))
    is_candidate = np.arange(num_nodes) < count
    num_prompts = np.pad(np.asarray(tree.prompts, np.int32), (0, num_nodes - count))
    return PromptTables(np.asarray(parent, np.int32), rank, is_candidate, distance, member, prompt_node, num_prompts)
