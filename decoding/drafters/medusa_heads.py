"""Drafts with Medusa heads on the target's last hidden state; a fixed tree combines their top-k tokens.

Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads, arXiv 2401.10774. The forward that
verifies one tree gives the hidden state for the next one, so drafting costs the heads alone (`models/medusa_heads.py`),
and needs no cache of its own. The first round of a row drafts nothing, as prefill keeps no hidden state.
"""

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from decodax.core import pytree
from decodax.decoding.drafters._size import set_tree
from decodax.decoding.drafters.contract import Drafter, Outcome, Proposal, fixed_proposal
from decodax.decoding.ranked_tokens import sibling_ranks, top_k_per_distance, tree_tokens
from decodax.decoding.state import DecodeState
from decodax.decoding.tree import Tree
from decodax.models.medusa_heads import check_heads, head_logits
from decodax.models.model import Model


@pytree.dataclass
class RankedTokens:
    """The drafter's state.

    token[b, d, r]: the r-th most probable token at distance d + 1 after the last one.
    is_possible: false before the first.
    """

    token: Int[Array, "B A R"]
    is_possible: Bool[Array, "B A R"]


@dataclass(frozen=True)
class MedusaHeads(Drafter):
    """A tree in which every node at depth d is one of the top-k tokens of head d - 1; `draft_params` are the heads.

    Its state is `RankedTokens`.

    model: the target.
    parents: of each node, -1 for the root (`decoding/tree_choice.py` chooses them); siblings are in order of
        probability.
    Raises ValueError for a tree of the root alone, and where the heads do not fit the target or are fewer than the
    tree is deep.
    """

    model: Model
    parents: tuple[int, ...]
    num_nodes: int = field(init=False)
    max_depth: int = field(init=False)

    auxiliary_weights = "heads on the last hidden state: `decodax train medusa`"

    def __post_init__(self) -> None:
        set_tree(self, self.parents)

    @property
    def ranks(self) -> Int[np.ndarray, " C"]:
        return sibling_ranks(self.parents)

    def check(self, model: Model, draft_params: Any) -> None:
        if self.model.config != model.config:
            raise ValueError("MedusaHeads must be made with the target that they draft for, got another model")
        most, vocab_size = int(self.ranks.max()) + 1, model.config.vocab_size
        if most > vocab_size:
            raise ValueError(f"a node can have at most {vocab_size} children (the vocabulary), got {most}")
        check_heads(model, draft_params)
        if self.max_depth > len(draft_params):
            raise ValueError(
                f"a tree can be as deep as there are heads, {len(draft_params)}, got depth {self.max_depth}: choose a "
                "flatter tree or train more heads"
            )

    def start(self, params: Any, draft_params: Any, state: DecodeState) -> RankedTokens:
        shape = (state.tokens.shape[0], self.max_depth, int(self.ranks.max()) + 1)
        return RankedTokens(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))

    def propose(self, params: Any, draft_params: Any, state: DecodeState) -> tuple[Proposal, RankedTokens]:
        tree, last_token, rank = Tree.fixed(self.parents), state.last_token(), self.ranks[None]
        token = tree_tokens(state.draft.token, last_token, tree.depth, rank)
        possible = tree_tokens(state.draft.is_possible.astype(jnp.int32), last_token, tree.depth, rank) > 0
        return fixed_proposal(tree, token, possible, forwards=1), state.draft

    def update(self, params: Any, draft_params: Any, state: DecodeState, outcome: Outcome) -> RankedTokens:
        """The tokens after the new last token, from the state before it: its own hidden state is not known yet."""
        last = jnp.maximum(outcome.num_emitted - 1, 0)[:, None]
        node = jnp.take_along_axis(outcome.path, last, axis=1)  # the last token that was run and accepted
        hidden = jnp.take_along_axis(outcome.forward.hidden, node[:, :, None], axis=1)
        normed = self.model.normed(params, hidden)
        logits = head_logits(self.model, params, draft_params, normed, self.max_depth)[:, :, 0]
        old = state.draft
        token, is_possible = top_k_per_distance(logits, old.token.shape[2])
        is_new = (outcome.num_emitted > 0)[:, None, None]
        return RankedTokens(jnp.where(is_new, token, old.token), jnp.where(is_new, is_possible, old.is_possible))
