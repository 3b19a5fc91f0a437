"""Describes a tree of draft tokens: the parents, depths and ancestors of its nodes, and its attention mask.

Node 0 is the root: the row's last token, which is known. Every other node is a draft token that may follow its parent;
a path from the root is one possible continuation. A chain is a tree in which every node has one child.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from decodax.core import pytree
from decodax.core.arguments import shown
from decodax.layers.attention.mask import Ancestors, Causal, Mask

# The attention mask grows with the square of the number of nodes, and every node has logits for the whole vocabulary:
# more nodes than this compile for minutes, and fill the memory. Published methods draft up to about a hundred.
MAX_DRAFT_TOKENS = 1024


@pytree.dataclass
class Tree:
    """C nodes of every row; the first axis has length 1 where all rows have the same tree.

    parent: of each node, -1 for the root; a parent comes before its children.
    depth: of each node, 0 for the root.
    ancestors[b, i, j]: whether node j is on the path from the root to node i, ends included.
    is_chain: every node but the last has one child.
    """

    parent: Int[Array | np.ndarray, "#B C"]
    depth: Int[Array | np.ndarray, "#B C"]
    ancestors: Bool[Array | np.ndarray, "#B C C"]
    is_chain: bool = pytree.static(default=False)

    @classmethod
    def fixed(cls, parents: Sequence[int]) -> "Tree":
        """The same tree in every row and every round, given by the parent of each node, -1 for the root.

        Raises ValueError when there is no root, more than one, a parent that does not precede its child, or more than
        `MAX_DRAFT_TOKENS` of them.

        >>> Tree.fixed([-1, 0, 0, 1]).depth
        array([[0, 1, 1, 2]], dtype=int32)
        """
        if not len(parents) or parents[0] != -1:
            raise ValueError(f"a tree must begin with its root, whose parent is -1, got parents {shown(parents)}")
        if len(parents) - 1 > MAX_DRAFT_TOKENS:
            raise ValueError(f"a draft must hold at most {MAX_DRAFT_TOKENS} tokens, got {len(parents) - 1}")
        depth = np.zeros(len(parents), np.int32)
        ancestors = np.eye(len(parents), dtype=bool)
        for node, parent in enumerate(parents[1:], start=1):
            if not 0 <= parent < node:
                raise ValueError(
                    f"parents must precede their children: node {node} needs one in 0..{node - 1}, got {parent}; "
                    "number the nodes level by level"
                )
            depth[node] = depth[parent] + 1
            ancestors[node] |= ancestors[parent]
        parent = np.asarray(parents, np.int32)
        is_chain = bool(np.all(parent == np.arange(len(parents)) - 1))
        return cls(parent[None], depth[None], ancestors[None], is_chain)

    @classmethod
    def chain(cls, num_nodes: int) -> "Tree":
        """The root and `num_nodes - 1` tokens after it, each the child of the one before."""
        return cls.fixed(range(-1, num_nodes - 1))

    @classmethod
    def grown(cls, parent: Int[Array, "B C"]) -> "Tree":
        """A tree whose parents are known only after drafting; they precede their children."""
        ancestors = Ancestors.from_parents(parent).allowed
        return cls(parent, jnp.sum(ancestors, axis=2, dtype=jnp.int32) - 1, ancestors)

    @property
    def num_nodes(self) -> int:
        return self.parent.shape[1]

    def mask(self) -> Mask:
        """The attention mask of one forward over all nodes."""
        return Causal() if self.is_chain else Ancestors(jnp.asarray(self.ancestors))

    def path_to(self, node: Int[Array, " B"], max_depth: int) -> Int[Array, "B A"]:
        """The nodes from the root to `node`, one per depth 0 .. max_depth (A of them); after `node`, zeros."""
        on_path = jnp.take_along_axis(jnp.asarray(self.ancestors), node[:, None, None], axis=1)[:, 0]
        at_depth = jnp.asarray(self.depth)[:, :, None] == jnp.arange(max_depth + 1, dtype=jnp.int32)[None, None, :]
        return jnp.argmax(on_path[:, :, None] & at_depth, axis=1).astype(jnp.int32)

    def accepted_path(self, accepted: Bool[Array, "B C"]) -> Int[Array, " B"]:
        """The deepest node whose path from the root is all `accepted` (the root always is); of equals the first."""
        with_root = accepted.at[:, 0].set(True)
        is_reached = jnp.all(with_root[:, None, :] | ~jnp.asarray(self.ancestors), axis=2)
        return jnp.argmax(jnp.where(is_reached, jnp.asarray(self.depth), -1), axis=1).astype(jnp.int32)


def expansion(branches: Sequence[int]) -> tuple[int, ...]:
    """Parents of the tree in which every node at depth d has `branches[d]` children, numbered level by level.

    Raises ValueError where a level has none.

    >>> expansion((2, 1))
    (-1, 0, 0, 1, 2)
    """
    if not branches or min(branches) < 1:
        raise ValueError(f"every level must have at least 1 child per node, got branches {tuple(branches)}")
    parents, level = [-1], [0]
    for number in branches:
        first = len(parents)
        parents += [node for node in level for _ in range(number)]
        level = list(range(first, len(parents)))
    return tuple(parents)


def check_draft_tokens(num_tokens: int, context: int) -> None:
    """Raises ValueError, naming the option, for more tokens than any draft may have or the `context` has room for.

    Called before the drafter is made, which would take long and much memory for absurd sizes.
    """
    most = min(MAX_DRAFT_TOKENS, context - 1)
    if num_tokens > most:
        why = f", as the model's context is {context}" if most < MAX_DRAFT_TOKENS else ""
        raise ValueError(f"draft_tokens must be at most {most}{why}, got {shown(num_tokens)}")
