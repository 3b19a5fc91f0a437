"""Defines the contract of a drafter: it proposes a tree of draft tokens that one target forward verifies.

    drafter.start(params, draft_params, state)            -> its state, after prefilling the prompts
    drafter.propose(params, draft_params, state)          -> Proposal, its state
    drafter.update(params, draft_params, state, outcome)  -> its state, after verification

A drafter is a frozen, hashable object: what changes is in its state (`state.draft`, any pytree), what is trained in
`draft_params`. It never sees the target's random numbers, and it drops what it computed for rejected tokens.
"""

import enum
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int

from decodax.core import pytree
from decodax.decoding.state import DecodeState
from decodax.decoding.tree import Tree
from decodax.models.model import Model
from decodax.models.transformer import Forward


class Children(enum.Enum):
    """How the children of a node are found, which decides what verifier preserves the target distribution.

    CHOSEN: by any rule that draws nothing (the most probable ones, a lookup).
    INDEPENDENT: each drawn independently from the drafter's distribution at the node.
    WITHOUT_REPLACEMENT: drawn one after the other, each from that distribution without the earlier ones.
    In a chain the last two are the same.
    """

    CHOSEN = "chosen"
    INDEPENDENT = "independent"
    WITHOUT_REPLACEMENT = "without replacement"


@pytree.dataclass
class Proposal:
    """A tree of C nodes per row for the target to run in one forward.

    Drafters that run the target's own layers, or that give hints besides, propose a wider one (`wider_proposals.py`).

    token: of each node; the root's is the row's last token. Siblings are in the order in which they were drawn.
    tree: the parents of the nodes.
    is_candidate: nodes that may be accepted; the root, padding, and nodes that only carry vectors may not.
    logprobs: log-probabilities from which the children of each node were drawn; None for CHOSEN children.
    num_draft_forwards: runs of the drafter's own network for this proposal.
    """

    token: Int[Array, "B C"]
    tree: Tree
    is_candidate: Bool[Array, "B C"]
    logprobs: Float32[Array, "B C V"] | None
    num_draft_forwards: Int[Array, ""]

    @property
    def inputs(self) -> Array:
        """What the target's forward starts from: the tokens."""
        return self.token

    @property
    def parent(self) -> Int[Array, "B C"]:
        """Each node's parent; the root is its own."""
        return jnp.broadcast_to(jnp.maximum(jnp.asarray(self.tree.parent), 0), self.token.shape)


@pytree.dataclass
class Outcome:
    """The result of verifying a proposal.

    logits: the target's own, at every node.
    forward: its hidden states and those captured, at every node; the cache updates are committed already.
    path[b]: the root and the accepted nodes, one per depth.
    num_emitted[b]: new tokens of the row, so the first `num_emitted[b]` nodes of the path were committed; 0 for rows
        that were done or failed.
    """

    proposal: Proposal
    logits: Float32[Array, "B C V"]
    forward: Forward
    path: Int[Array, "B A"]
    num_emitted: Int[Array, " B"]


class Drafter:
    """What `speculative` needs of a drafter; only `propose` has to be written.

    num_nodes: C, nodes in every proposal, the root included.
    max_depth: edges on the longest path.
    children: how they are found.
    capture: after how many of the target's layers `update` needs the hidden states; not layers that the drafter runs.
    auxiliary_weights: weights beyond the target's own that it needs; None for none.
    """

    num_nodes: int
    max_depth: int
    children: Children = Children.CHOSEN
    capture: tuple[int, ...] = ()
    auxiliary_weights: ClassVar[str | None] = None

    def check(self, model: Model, draft_params: Any) -> None:
        """Raises ValueError when this drafter cannot draft for the target."""

    def start(self, params: Any, draft_params: Any, state: DecodeState) -> Any:
        """The drafter's state for rows whose prompts are prefilled; the last token of each is not in the cache yet."""
        return ()

    def propose(self, params: Any, draft_params: Any, state: DecodeState) -> tuple[Proposal, Any]:
        """Drafts for every row; its own state is `state.draft`."""
        raise NotImplementedError(f"{type(self).__name__} must say what it proposes")

    def update(self, params: Any, draft_params: Any, state: DecodeState, outcome: Outcome) -> Any:
        """The drafter's state after the round; `state` already holds the new tokens and the result of `propose`."""
        return state.draft

    def constrained(self, draft: Any, model: Model) -> Any:
        """The drafter's state with sharding constraints: those of the target's execution, or of its own network's."""
        return model.execution.constrained(draft)


def fixed_proposal(
    tree: Tree,
    token: Int[Array, "B C"],
    is_candidate: Bool[Array, "B C"],
    *,
    logprobs: Array | None = None,
    forwards: Any = 0,
) -> Proposal:
    """A proposal of tokens in a tree; the root is never a candidate. The fields are those of `Proposal`."""
    after_root = jnp.arange(token.shape[1]) > 0
    return Proposal(token, tree, is_candidate & after_root[None, :], logprobs, jnp.asarray(forwards, jnp.int32))
