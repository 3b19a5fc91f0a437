"""The contract of a drafter: guess what comes next, as a tree of tokens that one forward of the target then checks.

    drafter.start(params, draft_params, state)            -> its state, after reading the prompts
    drafter.propose(params, draft_params, state)          -> Proposal, its state
    drafter.update(params, draft_params, state, outcome)  -> its state, after the target has decided

A drafter is a frozen, hashable object: whatever changes stands in its state (`state.draft`, any pytree), whatever is
trained in `draft_params`. It never sees the target's random numbers, and what it keeps of rejected tokens it drops.
"""

import enum
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from decodax.decoding.state import DecodeState
from decodax.decoding.tree import Tree
from decodax.layers import pytree
from decodax.models.model import Model
from decodax.models.transformer import Forward


class Children(enum.Enum):
    """How the children of a node come about, which decides what verifier keeps the target's law.

    CHOSEN: by any rule that draws nothing (the most probable ones, a lookup). INDEPENDENT: drawn from the drafter's
    law at the node, each by itself. WITHOUT_REPLACEMENT: drawn one after the other, each from that law with the earlier
    ones taken out. In a chain the last two are the same.
    """

    CHOSEN = "chosen"
    INDEPENDENT = "independent"
    WITHOUT_REPLACEMENT = "without replacement"


@pytree.dataclass
class Proposal:
    """A tree of C nodes per row for the target to run in one forward.

    token: of each node; the root's is the row's pending token. Siblings stand in the order in which they came about.
    is_candidate: nodes that may be accepted; the root, padding, and nodes that only carry vectors may not.
    law: log-probabilities from which the children of each node were drawn; None for CHOSEN children.
    num_draft_forwards: runs of the drafter's own network that this took.
    vectors, rows: where the tokens' embeddings are not what the target shall start from. `vectors` are hidden states
        after the target's first `len(rows)` layers, and `rows` what those layers gave, so that a drafter made of them
        need not have them run twice.
    first_layer: where only the round says how many layers the drafter has run; `rows` then has an entry for every layer
        of the target, of which those from `first_layer` on are overwritten.
    layers_run, row_layers: runs of the target's layers that the draft took, for the batch, and those that each row
        asked for (None: all of them).
    likely: tokens that the drafter finds likely after each node, likeliest first, whether or not they are nodes; -1 in
        all places of a node about which it says nothing, and where it has fewer. Depths that decide by them read it.
    """

    token: Int[Array, "B C"]
    tree: Tree
    is_candidate: Bool[Array, "B C"]
    law: Float32[Array, "B C V"] | None
    num_draft_forwards: Int[Array, ""]
    vectors: Float[Array, "B C D"] | None = None
    rows: tuple[Any, ...] = ()
    first_layer: Int[Array, ""] | None = None
    layers_run: Int[Array, ""] | int = 0
    row_layers: Int[Array, " B"] | None = None
    likely: Int[Array, "B C I"] | None = None


@pytree.dataclass
class Outcome:
    """What became of a proposal, in rows that were not done.

    logits: the target's own, at every node. forward: its hidden states and those captured, at every node; the rows
    have been committed. path[b]: the root and the accepted nodes, one per depth. num_emitted[b]: tokens that the row
    gained, so the first `num_emitted[b]` nodes of the path were committed; 0 for rows that were done or failed.
    """

    proposal: Proposal
    logits: Float32[Array, "B C V"]
    forward: Forward
    path: Int[Array, "B A"]
    num_emitted: Int[Array, " B"]


class Drafter:
    """What `speculative` asks of a drafter; only `propose` has to be written.

    num_nodes: C, nodes in every proposal, the root included. max_depth: edges on the longest path.
    children: how they come about. capture: after how many of the target's layers `update` wants the hidden states; not
    of layers that the drafter runs itself.
    """

    num_nodes: int
    max_depth: int
    children: Children = Children.CHOSEN
    capture: tuple[int, ...] = ()
    trained_part: ClassVar[str | None] = None

    def check(self, model: Model, draft_params: Any) -> None:
        """Raises ValueError when this drafter cannot draft for the target."""

    def start(self, params: Any, draft_params: Any, state: DecodeState) -> Any:
        """The drafter's state for rows whose prompts have been read; the last token of each is pending."""
        return ()

    def propose(self, params: Any, draft_params: Any, state: DecodeState) -> tuple[Proposal, Any]:
        """Drafts for every row; its own state is `state.draft`."""
        raise NotImplementedError(f"{type(self).__name__} must say what it proposes")

    def update(self, params: Any, draft_params: Any, state: DecodeState, outcome: Outcome) -> Any:
        """The drafter's state after the round; `state` already holds the new tokens, and the state from `propose`."""
        return state.draft

    def laid_out(self, draft: Any, model: Model) -> Any:
        """The drafter's state, told where to lie over a mesh: as the target's, or where its own network's execution has
        it."""
        return model.execution.laid_out(draft)


def fixed_proposal(
    tree: Tree,
    token: Int[Array, "B C"],
    is_candidate: Bool[Array, "B C"],
    *,
    law: Array | None = None,
    forwards: Any = 0,
) -> Proposal:
    """A proposal of tokens in a tree, the root never being a candidate."""
    behind_root = jnp.arange(token.shape[1]) > 0
    return Proposal(token, tree, is_candidate & behind_root[None, :], law, jnp.asarray(forwards, jnp.int32))
