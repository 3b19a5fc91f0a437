"""Gives the target a draft model's most probable next tokens, whether or not they are nodes to verify.

SpecEE (SpecEE: Accelerating Large Language Model Inference with Speculative Early Exiting, arXiv 2504.08850) needs only
a few likely tokens from a draft: `HintedProposal`. The draft is a `DraftModel` whose tree has `num_likely` children at
every node that the draft runs; the target verifies the nodes of a smaller tree, `parents`. By default that is the root
alone, which is plain decoding with hints.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from decodax.decoding.drafters._size import set_size
from decodax.decoding.drafters.contract import Children, Drafter, Outcome, Proposal, fixed_proposal
from decodax.decoding.drafters.draft_model import DraftModel
from decodax.decoding.drafters.wider_proposals import HintedProposal
from decodax.decoding.state import DecodeState
from decodax.decoding.tree import Tree
from decodax.models.model import Model


@dataclass(frozen=True)
class Hints(Drafter):
    """Gives the most probable tokens after the root and after every node that has children; leaves get none.

    The nodes themselves are the draft's most probable tokens, as in `DraftModel.top_k`. Its state is that of the draft.

    model: the draft model.
    parents: the tree to verify.
    num_likely: tokens per node.
    """

    model: Model
    parents: tuple[int, ...] = (-1,)
    num_likely: int = 4
    num_nodes: int = field(init=False)
    max_depth: int = field(init=False)

    children = Children.CHOSEN
    auxiliary_weights = DraftModel.auxiliary_weights

    def __post_init__(self) -> None:
        if not 1 <= self.num_likely <= self.model.config.vocab_size:
            raise ValueError(
                f"num_likely must be in 1..{self.model.config.vocab_size} (the draft's vocabulary), got "
                f"{self.num_likely}"
            )
        tree = Tree.fixed(self.parents)
        set_size(self, tree.num_nodes, int(np.max(tree.depth)))

    @property
    def draft(self) -> DraftModel:
        """The drafter with all children; its first `num_nodes` nodes are those of `parents`."""
        return DraftModel.top_k(self.model, _with_children(self.parents, self.num_likely))

    def constrained(self, draft: Any, model: Model) -> Any:
        return self.draft.constrained(draft, model)

    def check(self, model: Model, draft_params: Any) -> None:
        self.draft.check(model, draft_params)

    def start(self, params: Any, draft_params: Any, state: DecodeState) -> Any:
        return self.draft.start(params, draft_params, state)

    def propose(self, params: Any, draft_params: Any, state: DecodeState) -> tuple[Proposal, Any]:
        whole, draft = self.draft.propose(params, draft_params, state)
        child = _first_children(self.draft.parents, self.num_nodes, self.num_likely)
        is_known = jnp.asarray(child >= 0)[None] & whole.is_candidate[:, child]
        token, is_candidate = whole.token[:, : self.num_nodes], whole.is_candidate[:, : self.num_nodes]
        proposal = fixed_proposal(Tree.fixed(self.parents), token, is_candidate, forwards=whole.num_draft_forwards)
        return HintedProposal.extend(proposal, jnp.where(is_known, whole.token[:, child], -1)), draft

    def update(self, params: Any, draft_params: Any, state: DecodeState, outcome: Outcome) -> Any:
        draft = self.draft
        # The draft's tree may be one level deeper than the target's; nodes there are never accepted.
        path = jnp.pad(outcome.path, ((0, 0), (0, draft.max_depth - self.max_depth)))
        return draft.update(params, draft_params, state, dataclasses.replace(outcome, path=path))


def _with_children(parents: Sequence[int], num_likely: int) -> tuple[int, ...]:
    """The tree with leaves added at its end, until the root and every inner node have `num_likely` children.

    >>> _with_children((-1, 0, 0, 1), 2)
    (-1, 0, 0, 1, 1)
    """
    inner = sorted({0, *parents[1:]})
    added = [node for node in inner for _ in range(num_likely - parents[1:].count(node))]
    return (*parents, *added)


def _first_children(parents: Sequence[int], num_nodes: int, num_likely: int) -> Int[np.ndarray, "C I"]:
    """The first `num_likely` children of each of the first nodes; -1 for nodes without children."""
    found = [np.flatnonzero(np.asarray(parents) == node)[:num_likely] for node in range(num_nodes)]
    return np.array([own if len(own) else [-1] * num_likely for own in found], np.int32)
